"""explain(): relevance of every input value, node and edge from one forward and one backward pass."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ..errors import ZsuError, check_flag
from ..inside import HOOKS, check_finite, check_logits, check_model, logits_of, run, uncompiled
from .checks import as_target, check_channel, check_input, output_weights
from .composites import Rules, as_composite
from .layers import Layer
from .result import Relevance
from .sums import at_least_float32, of_samples, over_positions
from .tape import Tape


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

    Notes
    -----
    Forward hooks and checks may read activations. A model that takes numbers or arrays out of them (``.item()``,
    ``.numpy()``), or uses tensors that were made out of sight, runs a second time, on slightly darker images: what
    joins the flow of relevance must then be the same, or it is refused.

    Raises
    ------
    ZsuError
        Model in train mode; input without batch dimension, of the wrong dtype, device or number of channels, empty
        or not finite; target out of range; output not (N, classes); an operation without a relevance rule, by name;
        a rule of the input layer elsewhere, or where no layer reads the input.

    Warns
    -----
    UserWarning
        Somewhere sum |R| is more than `EXPLODES` times that of the outputs: the rule does not suit the model. Or the
        stabilisers keep more than a tenth of the relevance: epsilon does not suit the size of the model's activations.
        Or the rule of the input is not that of all layers that read it.
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
    with recording(model, x, targets, rules, edges, attention) as (tape, weights):
        results = [tape.backward(weight, last=weight is weights[-1]) for weight in weights]
    for result in results:
        result.warn_if_unsound()
    return results


def explain_contrast(model: nn.Module, x: Tensor, target: int, rules: Rules = "z+") -> list[Relevance]:
    """`explain` for a class and for each sample's runner-up, from a relevance of 1 at each logit, whose sign then does
    not matter to z+: what `find_paths` compares with ``against``.
    """
    check_model(uncompiled(model))
    check_input(model, x)
    with torch.no_grad():
        logits = logits_of(model, x.clone())  # a model may change its input in place
    output_weights(logits, as_target(target, x))  # refuses a target that is no class
    if logits.shape[1] == 1:
        raise ZsuError(
            "the model has one class", where="explain_contrast", remedy="call explain, there is no runner-up"
        )
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
    with recording(model, x, [target], rules, taps=True) as (tape, (weights,)):
        layers = layers_by_name(tape, weights)
        maps = [tape.along(find_path(path, layers, tape), weights) for path in paths]
    return torch.stack(maps) if maps else x.new_zeros(0, *x.shape)


def activations(model: nn.Module, x: Tensor, channels: Iterable[tuple[str, int]]) -> Tensor:
    """Mean over positions of what each channel puts out, before the activation function, by `explain`'s layer names.

    Returns
    -------
    Tensor (N, number of channels)
    """
    with recording(model, x, [0], "epsilon", taps=True) as (tape, (weights,)):
        layers = layers_by_name(tape, torch.ones_like(weights))
        columns = []
        for name, channel in channels:
            _, axes, z = tape.taps[find_layer(name, channel, layers, tape)]
            sums = of_samples(over_positions(at_least_float32(z), axes), len(x))  # (N, K)
            columns.append(sums[:, channel] * sums.numel() / z.numel())
    return torch.stack(columns, 1)


@contextmanager
def recording(
    model: nn.Module,
    x: Tensor,
    targets: Sequence[int | Tensor],
    rules: Rules,
    edges: bool = False,
    attention: str = "cp-lrp",
    taps: bool = False,
) -> Iterator[tuple[Tape, list[Tensor]]]:
    """The tape of a forward pass, with a rule for each layer, and the weights of the logits for each target.

    It is replayed in the with block. Values are read on the host in the checks before it and, whether the logits are
    finite, after it; in between nothing waits for the device.
    """
    if not isinstance(attention, str) or attention not in ("cp-lrp", "attnlrp"):
        raise ZsuError(f"attention {attention!r}", where="explain", remedy="use 'cp-lrp' or 'attnlrp'")
    if any(isinstance(mode, Tape) for mode in _get_current_function_mode_stack()):
        what, remedy = "an explanation inside a model that is explained", "explain one after the other"
        raise ZsuError(what, where="explain", remedy=remedy)
    check_flag("edges", edges, "explain")
    model = uncompiled(model)
    check_model(model)
    nonnegative, composite = check_input(model, x), as_composite(rules)
    composite.check(x)
    aims = [as_target(target, x) for target in targets]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        tape = Tape(model, bool(edges), attention, taps)
        with torch.autograd.graph.disable_saved_tensors_hooks(HOOKS):
            logits = tape.record(x, lambda first: run(model, first), nonnegative)
            check_logits(model, logits, x)
            tape.check_flow(lambda first: run(model, first))
        last = tape.steps.get(tape.origins[logits].layer)  # of the layer whose direct output is the logits
        composite.assign(tape.weighted_steps(), last)
        yield tape, [output_weights(logits.detach(), aim) for aim in aims]
        check_finite(model, logits)


def layers_by_name(tape: Tape, weights: Tensor) -> dict[str, Layer]:
    """The layers that relevance reaches, after a backward pass that lets others follow."""
    tape.backward(weights, last=False)
    return {share.name: layer for layer, share in tape.reached().items()}


def find_layer(name: str, channel: int, layers: dict[str, Layer], tape: Tape) -> Layer:
    """The layer of that name, after a check that it and its channel are there."""
    if layers.get(name) not in tape.taps:
        known = [n for n, layer in layers.items() if layer in tape.taps]
        raise ZsuError(f"no layer is called {name!r}", where="explain", remedy=f"use one of {known}")
    tap = tape.taps[layers[name]]
    check_channel(name, channel, tap.value.shape[tap.axes[1]])
    return layers[name]


def find_path(path: Sequence[tuple[str, int]], layers: dict[str, Layer], tape: Tape) -> list[tuple[Layer, int]]:
    """The path as (layer, channel), after a check."""
    if any(not isinstance(step, (tuple, list)) or len(step) != 2 for step in path):
        what, remedy = f"{path!r} is no path", "pass a list of paths, each a list of (layer, channel)"
        raise ZsuError(what, where="explain_paths", remedy=remedy)
    found = [(find_layer(name, channel, layers, tape), channel) for name, channel in path]
    top = [layer for layer in tape.layers if layer in layers.values()][-1]
    if not found or found[-1][0] is not tape.layers[0] or found[0][0] is not top:
        raise ZsuError("not from the logits to the input", where="explain_paths", remedy="pass what find_paths found")
    return found
