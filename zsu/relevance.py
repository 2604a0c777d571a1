"""explain(): relevance of every input value, node and edge from one forward and one backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor, nn

from .errors import ZsuError
from .rules import Rule, as_rule
from .tape import Node, Tape, stabilised, total


@dataclass(eq=False)
class Relevance:
    """What `explain` returns. Tensors are on the device and of the dtype of the model and carry no graph.

    Attributes
    ----------
    input : Tensor (N, C, H, W)
        Relevance of every input value, per sample.
    logits : Tensor (N, classes)
        Output of the model.
    seed : Tensor (N, classes)
        The relevance that was handed to the outputs: the logit of the target class, or the seed given.
    layers : list of Node
        The input, the weighted layers and the additions, in the order of the forward pass.
    constant : float
        Relevance that went to tensors which do not depend on the input.
    """

    input: Tensor
    logits: Tensor
    seed: Tensor
    layers: list[Node]
    constant: float

    @cached_property
    def nodes(self) -> dict[str, Tensor]:
        """Relevance (N, K) of the output channels of each layer, summed over positions, by layer name."""
        return {layer.name: layer.relevance for layer in self.layers}

    @cached_property
    def edges(self) -> dict[str, Tensor]:
        """Relevance R[k, j] that flows from target channel k to source channel j, summed over samples, positions
        and the kernel window, (K, J) by layer name; (K, J / groups) for grouped convolutions. Weighted layers only.
        """
        return {n.name: n.edges[0] for n in self.layers if n.edges and n.kind != "add"}

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """Where the relevance went, summed over samples (float64), one row a layer, from the logit to the input.

        ``out`` arrived at the layer's outputs, ``into`` went on to its inputs, ``bias`` and ``stabiliser`` is what
        the layer kept; ``gap = out - into - bias - stabiliser`` is 0 up to rounding. The last row, ``all``, does the
        same for the whole model: from the logits to the input values and the constants.
        """
        rows = [
            {"layer": n.name, "kind": n.kind, "out": n.out, "into": n.into, "bias": n.bias, "stabiliser": n.stabiliser}
            for n in reversed(self.layers)
            if n.kind != "input"
        ]
        whole = {"layer": "all", "kind": "model", "out": total(self.seed), "into": total(self.input) + self.constant}
        whole |= {share: sum(row[share] for row in rows) for share in ("bias", "stabiliser")}
        frame = pd.DataFrame([*rows, whole])
        frame["gap"] = frame["out"] - frame["into"] - frame["bias"] - frame["stabiliser"]
        return frame


def explain(
    model: nn.Module, x: Tensor, target: int | Tensor, rules: str | Rule = "epsilon", *, edges: bool = True
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
    rules : str or Rule
        ``"epsilon"``, ``"gamma"``, ``"z+"``, ``"alpha-beta"`` or a `Rule` such as ``zsu.rules.Gamma(0.1)``, for
        every layer with weights.
    edges : bool
        Also sum the relevance of every edge, at about the cost of one more forward pass; `find_paths` needs it.

    Returns
    -------
    Relevance

    Raises
    ------
    ZsuError
        Model in train mode; input without batch dimension, of the wrong dtype, device or number of channels, empty
        or not finite; target out of range; output not (N, classes); an operation without a relevance rule, by name.
    """
    check_model(model)
    check_input(model, x)
    rule = as_rule(rules)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        first = leaf.clone()  # so that the model may change its input in place
        tape = Tape(model, rule, edges)
        tape.start(first)
        with tape:
            logits = model(first)
        weights = output_weights(logits, target, rule).detach()
        if not logits.requires_grad:
            raise unrelated()
        grads = gradients(logits, [leaf, *tape.constants], weights)
    if grads[0] is None:
        raise unrelated()
    relevance = leaf.detach() * grads[0]
    nodes = finished(tape.nodes, relevance)
    constant = sum(total(t * g) for t, g in zip(tape.constants, grads[1:], strict=True) if g is not None)
    return Relevance(relevance, logits.detach(), logits.detach() * weights, nodes, constant)


def gradients(logits: Tensor, inputs: list[Tensor], weights: Tensor) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad; what a change in place makes impossible is said with a remedy."""
    try:
        return torch.autograd.grad(logits, inputs, weights, allow_unused=True)
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


def finished(nodes: list[Node], relevance: Tensor) -> list[Node]:
    """Keep the nodes that relevance reached, renumber their sources, and make their names unique (conv, conv#2)."""
    nodes[0].relevance = relevance.flatten(2).sum(2) if relevance.dim() > 2 else relevance  # (N, C, ...) -> (N, C)
    kept = [i for i, n in enumerate(nodes) if n.relevance is not None]
    number = {old: new for new, old in enumerate(kept)}
    seen: dict[str, int] = {}
    for i in kept:
        node = nodes[i]
        seen[node.name] = seen.get(node.name, 0) + 1
        if seen[node.name] > 1:
            node.name += f"#{seen[node.name]}"
        node.sources = [
            None if run is None else tuple(type(s)(number[s.node], s.channels, s.group) for s in run)
            for run in node.sources
        ]
    return [nodes[i] for i in kept]


def check_model(model: nn.Module) -> None:
    """Refuse models whose forward pass the tape cannot see, or that are in train mode."""
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ZsuError(f"a {type(model).__name__}", where="explain", remedy="pass the plain module inside it")
    for name, module in model.named_modules():
        if module.training:
            raise ZsuError("the model is in train mode", where=name or type(model).__name__, remedy="call model.eval()")


def check_input(model: nn.Module, x: Tensor) -> None:
    """Refuse what is not a finite batch of the model's dtype and device."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ZsuError(f"x is {kind}", where="x", remedy="pass a floating-point tensor (N, C, H, W)")
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


def output_weights(logits: Tensor, target: int | Tensor, rule: Rule) -> Tensor:
    """Weights (N, classes) with logits * weights = relevance of the outputs, after checks of output and target."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ZsuError(f"the model's output is {shape}", where="explain", remedy="return logits of shape (N, classes)")
    if not logits.isfinite().all():
        raise ZsuError("the logits are not finite", where="explain", remedy="check the model's parameters for NaN")
    n, classes = logits.shape
    try:
        target = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ZsuError(f"target is {target!r}", where="target", remedy="pass the index of a class") from error
    if target.is_floating_point() and target.shape == logits.shape and target.isfinite().all():
        return target.to(logits.dtype) / stabilised(logits, rule.epsilon)
    if target.is_floating_point() or target.dtype == torch.bool or target.dim() > 1 or target.numel() not in (1, n):
        remedy = "pass a class, classes (N,), or a finite floating seed (N, classes)"
        raise ZsuError(f"target is {target.dtype} {tuple(target.shape)}", where="target", remedy=remedy)
    if target.min() < 0 or target.max() >= classes:
        wrong = target.min() if target.min() < 0 else target.max()
        raise ZsuError(f"class {int(wrong)} of {classes}", where="target", remedy=f"use 0 to {classes - 1}")
    return torch.zeros_like(logits).scatter_(1, target.long().expand(n)[:, None], 1.0)
