"""What `explain` checks: the images, the target, the number of a channel; of the model and its logits: `zsu.inside`."""

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ZsuError, is_integer
from ..inside import first_weight
from . import operations


def check_input(model: nn.Module, x: Tensor) -> bool:
    """Refuse what is not a finite batch of the model's dtype and device; whether no value of it is below 0."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ZsuError(f"x is {kind}", where="x", remedy="pass a floating-point tensor (N, C, H, W)")
    if x.layout != torch.strided or x.is_meta or x.is_nested:
        what = f"x is {'on meta' if x.is_meta else 'nested' if x.is_nested else x.layout}"
        raise ZsuError(what, where="x", remedy="pass a dense tensor with values")
    if x.dim() < 2 or x.numel() == 0:
        raise ZsuError(f"x has shape {tuple(x.shape)}", where="x", remedy="pass a batch (N, C, H, W) with N >= 1")
    like = first_weight(model)
    if like is not None and (like.dtype, like.device) != (x.dtype, x.device):
        what = f"x is {x.dtype} on {x.device}, the model is {like.dtype} on {like.device}"
        raise ZsuError(what, where="x", remedy="move one to the other with .to(...)")
    lowest, highest = torch.stack(x.aminmax()).tolist()  # NaN where any value is
    if not (isfinite(lowest) and isfinite(highest)):
        raise ZsuError("x contains NaN or infinity", where="x", remedy="clean the input")
    return lowest >= 0


class Target(NamedTuple):
    """What is explained, checked as far as can be without the logits."""

    given: Tensor  # on the device of the model: int64 (N,) classes, or a floating seed (N, classes)
    lowest: int = 0  # of the classes
    highest: int = 0


def as_target(target: int | Tensor, x: Tensor) -> Target:
    """The target for samples x; `ZsuError` for what can be none."""
    n, remedy = len(x), "pass a class, classes (N,), or a finite floating seed (N, classes)"
    try:
        given = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ZsuError(f"target is {target!r}", where="target", remedy="pass the index of a class") from error
    seed = given.is_floating_point() and given.dim() == 2 and len(given) == n and bool(given.isfinite().all())
    if seed:
        return Target(given.to(x.device))
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not whole or given.dim() > 1 or given.numel() not in (1, n):
        raise ZsuError(f"target is {given.dtype} {tuple(given.shape)}", where="target", remedy=remedy)
    lowest, highest = torch.stack(given.long().aminmax()).tolist()
    return Target(given.long().expand(n).to(x.device), lowest, highest)


def output_weights(logits: Tensor, target: Target) -> Tensor:
    """Weights (N, classes) with logits * weights = relevance of the outputs, after a check of the target."""
    given, classes = target.given, logits.shape[1]
    if given.is_floating_point():
        if given.shape != logits.shape:
            what, remedy = f"the seed is {tuple(given.shape)}", f"pass one of {tuple(logits.shape)}, as the logits are"
            raise ZsuError(what, where="target", remedy=remedy)
        return given.to(logits.dtype) / torch.where(logits == 0, 1, logits)
    if target.lowest < 0 or target.highest >= classes:
        wrong = target.lowest if target.lowest < 0 else target.highest
        raise ZsuError(f"class {wrong} of {classes}", where="target", remedy=f"use 0 to {classes - 1}")
    return torch.zeros_like(logits).scatter_(1, given[:, None], 1.0)


def unrelated(reads: list[str]) -> ZsuError:
    """Why there is no relevance of the input, of which the model has read values by these operations."""
    remedy = f"use no {', '.join(reads) or 'detach or no_grad'} in the model"
    return ZsuError("the output does not depend on the input", where="explain", remedy=remedy)


def check_channel(layer: str, channel: int, size: int) -> None:
    """Refuse what is no number of a channel."""
    if not is_integer(channel) or not 0 <= channel < size:
        raise ZsuError(f"channel {channel!r} of {size}", where=layer, remedy=f"use 0 to {size - 1}")


class Side(NamedTuple):
    """A tensor that depends on the input, and yet no relevance flows through it."""

    by: str | None  # the operation that took it out of the flow; None: torch.no_grad
    gate: bool  # may multiply what is in the flow
    joins: str | None = None  # the operation in which the flow met it otherwise


def refusal(side: Side) -> ZsuError:
    """Why what an operation made cannot be explained."""
    if side.by is None:
        what = "a part of the model runs under torch.no_grad, or is an autograd.Function of its own"
        remedy = "take no_grad out of the model's forward, write a Function as functions, remove backward hooks"
        return ZsuError(f"{what}, so no relevance flows through it", where="explain", remedy=remedy)
    what = f"operation {side.by!r} has no relevance rule"
    remedy = "replace it in the model, or explain a model without it"
    if side.joins:
        what = f"{side.joins!r} joins the output of {side.by!r} to what relevance flows through"
    if side.by in operations.PRODUCTS:
        remedy = "a product needs a gate: compute one factor with softmax, sigmoid or hardsigmoid in the model"
    elif side.by in operations.GATES and side.joins:
        remedy = "a gate may be reshaped, scaled and shifted, and then only multiply"
    elif (side.gate and side.by in operations.GATES) or side.by in ("log_softmax", "logsigmoid"):
        remedy = "explain the logits: remove the last softmax or sigmoid from the model"
    return ZsuError(what, where="explain", remedy=remedy)
