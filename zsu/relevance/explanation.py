"""explain(): relevance of every input value, node and edge from one forward and one backward pass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..errors import ZsuError, is_integer, warn
from .composites import Rules, as_composite
from .layers import Node, Source, at_least_float32, by_sample, inner, total
from .tape import Tape

EXPLODES = 1e4  # times the relevance handed to the outputs
STAYS = 0.1  # of it
SHARES = ("into", "bias", "stabiliser", "constant")


@dataclass(eq=False)
class Relevance:
    """What `explain` returns. Tensors are on the device and of the dtype of the model (relevance of float16 and
    bfloat16 models is float32) and carry no graph.

    Attributes
    ----------
    input : Tensor (N, C, H, W)
        Relevance of every input value, per sample.
    logits : Tensor (N, classes)
        Output of the model.
    seed : Tensor (N, classes)
        The relevance that was handed to the outputs: the logit of the target class, or the seed given.
    layers : list of Node
        What paths lead through, in the order of the forward pass: the input, weighted layers, norms and additions.
    head : Node or None
        The one of them whose outputs are the logits, if there is one.
    rows : list of Node
        The same, and besides them softmax and constants: everything that keeps a share of the relevance.
    """

    input: Tensor
    logits: Tensor
    seed: Tensor
    layers: list[Node]
    head: Node | None
    rows: list[Node]

    def __repr__(self) -> str:
        n, classes = self.logits.shape
        return f"Relevance({n} samples, {classes} classes, {len(self.layers)} layers)"

    @cached_property
    def nodes(self) -> dict[str, Tensor]:
        """Relevance (N, K) of the output channels of each layer, summed over positions, by layer name.

        (1, K), summed over samples too, where the model moves samples and positions into one axis and out of order.
        """
        return {layer.name: layer.relevance for layer in self.layers}

    @cached_property
    def edges(self) -> dict[str, Tensor]:
        """Relevance R[k, j] that flows from target channel k to source channel j, summed over samples, positions
        and the kernel window, (K, J) by layer name; (K, J / groups) where channels are in groups. Of weighted layers
        and norms.
        """
        return {n.name: n.edges[0] for n in self.layers if n.edges and n.kind != "add"}

    @cached_property
    def runner_up(self) -> Tensor:
        """int64 (N,): the class with the highest logit among those that no relevance was handed to."""
        return self.logits.masked_fill(self.seed != 0, -torch.inf).argmax(1)

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """Where the relevance went, summed over samples (float64), one row a layer, from the logit to the input.

        ``out`` arrived at the layer's outputs and ``into`` went on to its inputs. ``bias`` and ``stabiliser`` is what
        the layer kept, ``constant`` what went to tensors that do not depend on the input (class token, positions).
        ``gap = out - into - bias - stabiliser - constant`` is 0 up to rounding. ``amplification`` is sum |R| over all
        outputs in units of what was handed to the logits: large where relevance of both signs cancels. The last row,
        ``all``, does the same for the whole model: from the logits to the input values.
        """
        rows = [
            {"layer": n.name, "kind": n.kind, "out": n.out}
            | {share: float(getattr(n, share)) for share in SHARES}
            | {"amplification": self.amplification(n)}
            for n in reversed(self.rows)
            if n.kind != "input"
        ]
        whole = {"layer": "all", "kind": "model", "out": total(self.seed), "into": total(self.input)}
        whole |= {share: sum(row[share] for row in rows) for share in SHARES[1:]}
        whole["amplification"] = float(self.input.abs().sum() / self.seed.abs().sum())
        frame = pd.DataFrame([*rows, whole])
        frame.insert(7, "gap", frame["out"] - sum(frame[share] for share in SHARES))
        return frame

    def amplification(self, node: Node) -> float:
        """Sum |R| over the outputs of a node, relative to the relevance handed to the model's outputs."""
        return float(node.magnitude / self.seed.abs().sum())

    def warn_if_unsound(self) -> None:
        """Relevance of both signs that cancels to the right sum, or stays with the stabiliser, says little."""
        kept = sum(abs(float(n.stabiliser)) for n in self.rows) / (float(self.seed.abs().sum()) + 1e-300)
        if kept > STAYS:
            warn(
                f"the stabilisers keep {100 * kept:.0f} % of the relevance; use a smaller epsilon, as in Epsilon(1e-9)"
            )
        if len(self.rows) == 1:  # the input alone
            return
        worst = max(self.rows[1:], key=lambda n: float(n.magnitude))
        if self.amplification(worst) > EXPLODES:
            warn(
                f"relevance explodes: at {worst.name}, sum |R| is {self.amplification(worst):.1e} times that of the "
                "outputs; use a rule that dampens it, such as 'gamma' or 'epsilon-plus'"
            )


def explain(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor,
    rules: Rules = "epsilon",
    *,
    edges: bool = True,
    attention: str = "cp-lrp",
) -> Relevance:
    """Layer-wise relevance propagation through an unmodified classifier.

    The logit of the target class is handed back layer by layer; each layer gives every input the share that its
    rule says (Bach et al. 2015, sec. 2; Montavon et al. 2019, sec. 10.2).

    Parameters
    ----------
    model : nn.Module
        Classifier in eval mode with raw logits (N, classes) as output. It is not changed.
    x : Tensor (N, C, ...)
        Batch of inputs, on the device and of the dtype of the model. Not changed; needs no gradient.
    target : int, int64 Tensor (N,) or floating Tensor (N, classes)
        The class whose logit is explained, for all samples or per sample; or a seed, the relevance of each output.
    rules : str, Rule, Composite or mapping
        A rule for every layer with weights: ``"epsilon"``, ``"gamma"``, ``"z+"``, ``"alpha-beta"``, or a `Rule` such
        as ``zsu.rules.Gamma(0.1)``. Or which rule where: ``"epsilon-gamma-box"``, ``"epsilon-plus"``,
        ``"epsilon-plus-flat"``, ``"epsilon-alpha2-beta1"``, a `zsu.composites.Composite`, or a mapping from names of
        layers to rules, such as ``{"features.*": "gamma"}``, with epsilon for the others.
    edges : bool
        Also sum the relevance of every edge, at about the cost of one more forward pass; `find_paths` needs it.
    attention : {"cp-lrp", "attnlrp"}
        Attention weights count as constants (Ali et al. 2022, arXiv:2202.07304), or the relevance is halved at both
        products of attention and goes on through the softmax (Achtibat et al. 2024, arXiv:2402.05602).

    Returns
    -------
    Relevance

    Raises
    ------
    ZsuError
        Model in train mode; input without batch dimension, of the wrong dtype, device or number of channels, empty
        or not finite; target out of range; output not (N, classes); an operation without a relevance rule, by name;
        a rule of the input layer elsewhere.

    Warns
    -----
    UserWarning
        Somewhere sum |R| is more than `EXPLODES` times that of the outputs: the rule does not suit the model. Or the
        stabilisers keep more than a tenth of the relevance: epsilon does not suit the size of the model's activations.
    """
    return explain_each(model, x, [target], rules, edges=edges, attention=attention)[0]


def explain_each(
    model: nn.Module,
    x: Tensor,
    targets: Sequence[int | Tensor],
    rules: Rules = "epsilon",
    *,
    edges: bool = True,
    attention: str = "cp-lrp",
) -> list[Relevance]:
    """`explain` for several targets, with one forward pass for all of them and a backward pass each.

    Parameters
    ----------
    targets : sequence
        Each a target as `explain` takes it.
    """
    if not isinstance(targets, Sequence) or not targets:
        raise ZsuError(f"targets is {targets!r}", where="explain_each", remedy="pass a list of targets")
    with recorded(model, x, edges, attention) as (tape, leaf, logits):
        weights = [output_weights(logits.detach(), target) for target in targets]
        assign(rules, tape, logits)
        results = []
        for i, weight in enumerate(weights):
            for keeper in tape.keepers():
                keeper.keep = i + 1 < len(weights)
            results.append(backward(tape, leaf, logits, weight, retain=i + 1 < len(weights)))
    for result in results:
        result.warn_if_unsound()
    return results


def explain_contrast(model: nn.Module, x: Tensor, target: int, rules: Rules = "z+") -> list[Relevance]:
    """`explain` for a class and for each sample's runner-up, from a relevance of 1 at each logit, whose sign then does
    not matter to z+: what `find_paths` compares with ``against``.
    """
    with torch.no_grad():
        logits = forward(model, x)
    own = torch.zeros_like(logits)
    own[:, target] = 1
    runner_up = logits.masked_fill(own > 0, -torch.inf).argmax(1, keepdim=True)
    return explain_each(model, x, [own, torch.zeros_like(own).scatter(1, runner_up, 1.0)], rules)


def explain_paths(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor,
    paths: Iterable[Sequence[tuple[str, int]]],
    rules: Rules = "epsilon",
) -> Tensor:
    """Input relevance of single paths: what reaches each input value by way of a path's channels alone.

    All paths together, those with negative edges included, give `explain`'s input relevance. The sum of a map is what
    flows along the path exactly; the probability that `find_paths` gives is another number, because the chain forgets
    at each channel by which positions the relevance came (as in concept relevance propagation, Achtibat et al. 2023,
    Nature Machine Intelligence 5, channels are conditioned on one after the other).

    Parameters
    ----------
    model, x, target, rules
        As for `explain`.
    paths : iterable of sequences of (layer, channel)
        From the logit to the input, such as a `Paths` or what it gives for an index.

    Returns
    -------
    Tensor (paths, N, C, ...)

    Raises
    ------
    ZsuError
        A path that does not lead from the logits to the input, or with a channel that there is not; and what `explain`
        refuses.
    """
    with recorded(model, x, False, "cp-lrp", taps={}) as (tape, leaf, logits):
        weights = output_weights(logits.detach(), target)
        assign(rules, tape, logits)
        nodes = named(tape, leaf, logits, weights)
        maps = [along(tape, leaf, logits, weights, located(path, nodes, tape)) for path in paths]
    return torch.stack(maps) if maps else leaf.new_zeros(0, *leaf.shape).detach()


def activations(model: nn.Module, x: Tensor, channels: Iterable[tuple[str, int]]) -> Tensor:
    """Mean over positions of what each channel puts out, before the activation function, by `explain`'s layer names.

    Returns
    -------
    Tensor (N, number of channels)
    """
    with recorded(model, x, False, "cp-lrp", taps={}) as (tape, leaf, logits):
        assign("epsilon", tape, logits)
        nodes = named(tape, leaf, logits, torch.ones_like(logits))
        columns = []
        for name, channel in channels:
            _, axes, z = tape.taps[tapped(name, channel, nodes, tape)]
            sums = by_sample(at_least_float32(z), axes, len(x))  # (N, K), over positions
            columns.append(sums[:, channel] * sums.numel() / z.numel())
    return torch.stack(columns, 1)


def named(tape: Tape, leaf: Tensor, logits: Tensor, weights: Tensor) -> dict[str, Node]:
    """The nodes that relevance reaches by their names, after a backward pass that lets others follow."""
    for keeper in tape.keepers():
        keeper.keep = True
    backward(tape, leaf, logits, weights, retain=True)
    return {row.name: node for node, row in reached(tape.rows).items()}


def tapped(name: str, channel: int, nodes: dict[str, Node], tape: Tape) -> Node:
    """The node of that name, after a check that it and its channel are there."""
    if nodes.get(name) not in tape.taps:
        known = [n for n, node in nodes.items() if node in tape.taps]
        raise ZsuError(f"no layer is called {name!r}", where="explain", remedy=f"use one of {known}")
    check_channel(name, channel, nodes[name].relevance.shape[1])
    return nodes[name]


def located(path: Sequence[tuple[str, int]], nodes: dict[str, Node], tape: Tape) -> list[tuple[Node, int]]:
    """The path as (node, channel), after a check."""
    if any(not isinstance(step, (tuple, list)) or len(step) != 2 for step in path):
        what, remedy = f"{path!r} is no path", "pass a list of paths, each a list of (layer, channel)"
        raise ZsuError(what, where="explain_paths", remedy=remedy)
    found = [(tapped(name, channel, nodes, tape), channel) for name, channel in path]
    top = [node for node in tape.nodes if node.relevance is not None][-1]
    if not found or found[-1][0] is not tape.nodes[0] or found[0][0] is not top:
        raise ZsuError("not from the logits to the input", where="explain_paths", remedy="pass what find_paths found")
    return found


def check_channel(layer: str, channel: int, size: int) -> None:
    """Refuse what is no number of a channel."""
    if not is_integer(channel) or not 0 <= channel < size:
        raise ZsuError(f"channel {channel!r} of {size}", where=layer, remedy=f"use 0 to {size - 1}")


def along(tape: Tape, leaf: Tensor, logits: Tensor, weights: Tensor, path: list[tuple[Node, int]]) -> Tensor:
    """Input relevance of one path: from each channel on to the next, with all other nodes closed."""
    for node in tape.rows:
        node.closed = True
    edge, grad = get_gradient_edge(logits), weights
    for node, channel in path:
        below, axis = tape.taps[node].edge, tape.taps[node].axes[1]
        for layer in tape.layers.values():
            layer.direct = None
        (grad,) = torch.autograd.grad(edge, below, grad, retain_graph=True, allow_unused=True)
        direct = [layer.direct for layer in tape.layers.values() if layer.direct is not None]
        if grad is None:
            raise ZsuError(f"nothing leads to {node.name}", where="explain_paths", remedy="pass what find_paths found")
        only = torch.zeros(grad.shape[axis], dtype=grad.dtype, device=grad.device)
        only[channel] = 1
        only = only.view([-1 if i == axis else 1 for i in range(grad.dim())])
        edge, grad = below, grad * only
        for other in tape.rows:
            other.closed = other is not node
    for node in tape.rows:
        node.closed = False
    return sum((only * d for d in direct), at_least_float32(leaf.detach()) * grad)


@contextmanager
def recorded(model: nn.Module, x: Tensor, edges: bool, attention: str, taps: dict | None = None):
    """(tape, input, logits) of a forward pass, after the checks; the backward passes go inside the with block."""
    if attention not in ("cp-lrp", "attnlrp"):
        raise ZsuError(f"attention {attention!r}", where="explain", remedy="use 'cp-lrp' or 'attnlrp'")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    check_model(model)
    check_input(model, x)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaf = x.detach().clone().requires_grad_()
        first = leaf.clone()  # so that the model may change its input in place
        tape = Tape(model, edges, attention, taps)
        tape.start(first)
        with tape, torch.autograd.graph.disable_saved_tensors_hooks(HOOKS):
            logits = forward(model, first)
        if isinstance(logits, Tensor) and logits in tape.sides:
            raise tape.refusal(tape.sides[logits])
        check_logits(model, logits)
        if logits not in tape.origins or not logits.requires_grad:
            raise unrelated()
        yield tape, leaf, logits


HOOKS = "zsu.explain cannot follow checkpoints and other hooks on saved tensors"


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """The logits; what torch refuses on the way is said in one line."""
    try:
        return model(x)
    except RuntimeError as error:
        what = HOOKS if HOOKS in str(error) else str(error).strip().splitlines()[0].rstrip(".")
        remedy = "explain the model without checkpoints" if what is HOOKS else "pass a batch that the model can take"
        raise ZsuError(what, where=type(model).__name__, remedy=remedy) from error


def assign(rules: Rules, tape: Tape, logits: Tensor) -> None:
    """Give each layer its rule."""
    as_composite(rules).assign(list(tape.layers.values()), tape.layers.get(tape.origins[logits].node))


def backward(tape: Tape, leaf: Tensor, logits: Tensor, weights: Tensor, retain: bool) -> Relevance:
    """One backward pass over the tape, from logits * weights down to the input."""
    for node in tape.rows:
        node.clear()
    for layer in tape.layers.values():
        layer.direct = None
    grads = gradients(logits, [leaf, *(constant for constant, _, _ in tape.constants)], weights, retain)
    direct = [layer.direct for layer in tape.layers.values() if layer.direct is not None]
    if grads[0] is None:
        raise unrelated()
    relevance = sum(direct, at_least_float32(leaf.detach()) * grads[0])
    for (constant, node, share), grad in zip(tape.constants, grads[1:], strict=True):
        if grad is not None:
            setattr(node, share, getattr(node, share) + inner(constant.detach(), grad))
    for node in tape.rows:
        if node.kind == "softmax":  # not linear: what its linear part does not explain stays there
            node.bias = node.out - node.into if node.relevance is not None else 0.0
    tape.nodes[0].relevance = relevance.flatten(2).sum(2) if relevance.dim() > 2 else relevance  # (N, C, ...) -> (N, C)
    rows = reached(tape.rows)
    layers = renumbered([rows.get(node) for node in tape.nodes])
    sources = tape.origins[logits].sources or ()
    whole = len(sources) == 1 and sources[0].group == 1 and sources[0].channels == logits.shape[1]
    head = rows.get(tape.nodes[sources[0].node]) if whole else None
    return Relevance(relevance, logits.detach(), logits.detach() * weights, layers, head, list(rows.values()))


def reached(rows: list[Node]) -> dict[Node, Node]:
    """Copies of the nodes that relevance reached, by node, with names that are unique (conv, conv#2)."""
    seen: dict[str, int] = {}
    copies = {}
    for node in rows:
        if node.relevance is not None:
            seen[node.name] = seen.get(node.name, 0) + 1
            name = node.name if seen[node.name] == 1 else f"{node.name}#{seen[node.name]}"
            copies[node] = dataclasses.replace(node, name=name)
    return copies


def renumbered(nodes: list[Node | None]) -> list[Node]:
    """The nodes without gaps, with their sources numbered accordingly."""
    kept = [i for i, node in enumerate(nodes) if node is not None]
    number = {old: new for new, old in enumerate(kept)}
    for i in kept:
        nodes[i].sources = [
            None if run is None else tuple(Source(number[s.node], s.channels, s.group) for s in run)
            for run in nodes[i].sources
        ]
    return [nodes[i] for i in kept]


def gradients(logits: Tensor, inputs: list[Tensor], weights: Tensor, retain: bool) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad; what a change in place makes impossible is said with a remedy."""
    try:
        return torch.autograd.grad(logits, inputs, weights, allow_unused=True, retain_graph=retain)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ZsuError(
            "a tensor that the backward pass needs is changed in place",
            where="explain",
            remedy="use the out-of-place function in the model",
        ) from error


def unrelated() -> ZsuError:
    return ZsuError(
        "the output does not depend on the input", where="explain", remedy="use no detach or no_grad in the model"
    )


def check_model(model: nn.Module) -> None:
    """Refuse models whose forward pass the tape cannot see, or that are in train mode."""
    if not isinstance(model, nn.Module):
        raise ZsuError(f"the model is a {type(model).__name__}", where="explain", remedy="pass an nn.Module")
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ZsuError(f"a {type(model).__name__}", where="explain", remedy="pass the plain module inside it")
    try:
        inspect.signature(model.forward).bind(None)
    except TypeError as error:
        what, remedy = f"forward does not take one input ({error})", "wrap it in a module that takes the batch alone"
        raise ZsuError(what, where=type(model).__name__, remedy=remedy) from error
    for name, module in model.named_modules():
        if module.training:
            raise ZsuError("the model is in train mode", where=name or type(model).__name__, remedy="call model.eval()")


def check_input(model: nn.Module, x: Tensor) -> None:
    """Refuse what is not a finite batch of the model's dtype and device."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ZsuError(f"x is {kind}", where="x", remedy="pass a floating-point tensor (N, C, H, W)")
    if x.layout != torch.strided or x.is_meta:
        raise ZsuError(
            f"x is {'on meta' if x.is_meta else x.layout}", where="x", remedy="pass a dense tensor with values"
        )
    if x.dim() < 2 or len(x) == 0:
        raise ZsuError(f"x has shape {tuple(x.shape)}", where="x", remedy="pass a batch (N, C, H, W) with N >= 1")
    like = next(model.parameters(), None)
    if like is not None and (like.dtype, like.device) != (x.dtype, x.device):
        raise ZsuError(
            f"x is {x.dtype} on {x.device}, the model is {like.dtype} on {like.device}",
            where="x",
            remedy="move one to the other with .to(...)",
        )
    if not x.isfinite().all():
        raise ZsuError("x contains NaN or infinity", where="x", remedy="clean the input")


def check_logits(model: nn.Module, logits: Tensor) -> None:
    """Refuse outputs that are not finite logits (N, classes)."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ZsuError(f"the model's output is {shape}", where="explain", remedy="return logits of shape (N, classes)")
    if not logits.isfinite().all():
        named = (*model.named_parameters(), *model.named_buffers())
        broken = next((name for name, t in named if not t.isfinite().all()), None)
        remedy = f"{broken} holds NaN or infinity" if broken else "check the size of the model's activations"
        raise ZsuError("the logits are not finite", where="explain", remedy=remedy)


def output_weights(logits: Tensor, target: int | Tensor) -> Tensor:
    """Weights (N, classes) with logits * weights = relevance of the outputs, after a check of the target."""
    n, classes = logits.shape
    try:
        target = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ZsuError(f"target is {target!r}", where="target", remedy="pass the index of a class") from error
    if target.is_floating_point() and target.shape == logits.shape and target.isfinite().all():
        return target.to(logits.dtype) / torch.where(logits == 0, 1, logits)
    if (
        target.is_floating_point()
        or target.is_complex()
        or target.dtype == torch.bool
        or target.dim() > 1
        or target.numel() not in (1, n)
    ):
        remedy = "pass a class, classes (N,), or a finite floating seed (N, classes)"
        raise ZsuError(f"target is {target.dtype} {tuple(target.shape)}", where="target", remedy=remedy)
    if target.min() < 0 or target.max() >= classes:
        wrong = target.min() if target.min() < 0 else target.max()
        raise ZsuError(f"class {int(wrong)} of {classes}", where="target", remedy=f"use 0 to {classes - 1}")
    return torch.zeros_like(logits).scatter_(1, target.long().expand(n)[:, None], 1.0)
