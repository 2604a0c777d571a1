"""What `explain` checks: the images, the target, the number of a channel; of the model and its logits: `zsu.inside`."""

import torch
from torch import Tensor, nn

from ..errors import ZsuError, is_integer
from ..inside import first_weight


def check_input(model: nn.Module, x: Tensor) -> None:
    """Refuse what is not a finite batch of the model's dtype and device."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ZsuError(f"x is {kind}", where="x", remedy="pass a floating-point tensor (N, C, H, W)")
    if x.layout != torch.strided or x.is_meta or x.is_nested:
        what = f"x is {'on meta' if x.is_meta else 'nested' if x.is_nested else x.layout}"
        raise ZsuError(what, where="x", remedy="pass a dense tensor with values")
    if x.dim() < 2 or len(x) == 0:
        raise ZsuError(f"x has shape {tuple(x.shape)}", where="x", remedy="pass a batch (N, C, H, W) with N >= 1")
    like = first_weight(model)
    if like is not None and (like.dtype, like.device) != (x.dtype, x.device):
        what = f"x is {x.dtype} on {x.device}, the model is {like.dtype} on {like.device}"
        raise ZsuError(what, where="x", remedy="move one to the other with .to(...)")
    if not x.isfinite().all():
        raise ZsuError("x contains NaN or infinity", where="x", remedy="clean the input")


def output_weights(logits: Tensor, target: int | Tensor) -> Tensor:
    """Weights (N, classes) with logits * weights = relevance of the outputs, after a check of the target."""
    n, classes = logits.shape
    try:
        target = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ZsuError(f"target is {target!r}", where="target", remedy="pass the index of a class") from error
    if target.is_floating_point() and target.shape == logits.shape and target.isfinite().all():
        return target.to(logits.dtype) / torch.where(logits == 0, 1, logits)
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if not whole or target.dim() > 1 or target.numel() not in (1, n):
        remedy = "pass a class, classes (N,), or a finite floating seed (N, classes)"
        raise ZsuError(f"target is {target.dtype} {tuple(target.shape)}", where="target", remedy=remedy)
    if target.min() < 0 or target.max() >= classes:
        wrong = target.min() if target.min() < 0 else target.max()
        raise ZsuError(f"class {int(wrong)} of {classes}", where="target", remedy=f"use 0 to {classes - 1}")
    return torch.zeros_like(logits).scatter_(1, target.long().expand(n)[:, None], 1.0)


def unrelated(reads: list[str]) -> ZsuError:
    """Why there is no relevance of the input, of which the model has read values by these operations."""
    remedy = f"use no {', '.join(reads) or 'detach or no_grad'} in the model"
    return ZsuError("the output does not depend on the input", where="explain", remedy=remedy)


def check_channel(layer: str, channel: int, size: int) -> None:
    """Refuse what is no number of a channel."""
    if not is_integer(channel) or not 0 <= channel < size:
        raise ZsuError(f"channel {channel!r} of {size}", where=layer, remedy=f"use 0 to {size - 1}")
