"""What the tape knows of a tensor that relevance flows through, and what operations without weights make of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .channels import channel_axis, einsum_letters, padded_axes, sources_after
from .layers import Layer
from .operations import MATMUL, MAY_TURN_NEGATIVE, MOVING, PERMUTING, REDUCING, RELU, RESHAPING, SCALING, Call, as_list
from .sums import Axes


class Front(NamedTuple):
    """What stands between the model's input and a tensor that no layer has made."""

    by: str = ""  # the first operation that changes values or their places
    maps: tuple[Callable[[Tensor], Tensor], ...] | None = ()  # value by value, in order; None: it mixes or moves them

    def then(self, by: str, change: Callable[[Tensor], Tensor] | None) -> Front:
        """With one more operation behind it."""
        maps = None if self.maps is None or change is None else (*self.maps, change)
        return Front(self.by or by, maps)

    def of(self, t: Tensor) -> Tensor:
        """What it makes of values in the place of the input's."""
        for change in self.maps or ():
            t = change(t)
        return t


@dataclass
class Origin:
    """What the tape knows of a tensor that relevance flows through."""

    axes: Axes  # of samples and channels
    sources: Tensor | None  # where its values come from, see `zsu.relevance.channels`
    nonnegative: bool
    version: int  # of the tensor; another one: it has changed in place by way of a view of it
    layer: Layer | None = None  # whose direct output it is
    front: Front | None = None  # where no layer stands between the model's input and it
    read: bool = False  # by an operation
    only_relus: bool = True  # read it

    @property
    def rectified(self) -> bool:
        """Whether a ReLU reads it, and nothing else does."""
        return self.read and self.only_relus

    @property
    def is_input(self) -> bool:
        """Whether each value is one of the input's, as it is or after arithmetic with constants."""
        return self.front is not None and self.front.maps is not None


def origins_after(call: Call, origin: Origin, x: Tensor, outs: list[Tensor], samples: int) -> list[Origin]:
    """Origins of what an operation without weights makes of x."""
    mixed = mixed_axes(call, x, outs[0])
    axes = axes_after(call, origin.axes, x, outs[0], samples, mixed)
    found = [origin.sources] * len(outs)
    if origin.sources is not None:
        found = sources_after(call, origin.sources, x, outs, mixed, axes[1])
    nonnegative = call.name in RELU or (origin.nonnegative and call.name not in MAY_TURN_NEGATIVE)
    front = origin.front and origin.front.then(*front_of(call, x, outs[0]))
    return [
        Origin((axes[0], channel_axis(s, axes[1])), s, nonnegative, out._version, front=front)
        for s, out in zip(found, outs, strict=True)
    ]


def shared_axis(a: Origin, b: Origin) -> int | None:
    """The axis of the channels of both summands; a single channel, repeated, has no axis of its own."""
    several = {of.axes[1] for of in (a, b) if of.sources is None or of.sources.numel() > 1}
    found = several or {a.axes[1], b.axes[1]}
    return found.pop() if len(found) == 1 else None


def axes_after(call: Call, axes: Axes, x: Tensor, out: Tensor, samples: int, mixed: set[int]) -> Axes:
    """Where samples and channels are in what an operation without weights makes of x."""
    batch, channel = (None if axis in mixed else axis for axis in axes)
    if call.name in RESHAPING:
        batch = after_reshape(batch, samples, x.shape, out.shape)
        if channel is not None:
            above = -1 if batch is None else batch
            channel = after_reshape(channel, x.shape[channel], x.shape, out.shape, above)
    elif call.name in MOVING | REDUCING | {"einsum"}:
        batch, channel = after_move(call, batch, x, out), after_move(call, channel, x, out, part=True)
    else:
        more = out.dim() - x.dim()  # broadcast against more dimensions; a product with a vector has one less
        behind = min(mixed) if more < 0 else -1
        batch, channel = (None if axis is None else axis + more * (axis > behind) for axis in (batch, channel))
    return batch, channel


def front_of(call: Call, x: Tensor, out: Tensor) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    """The operation's name, unless it leaves the values as they are, and what it does to each value alone."""
    name, func, args, kwargs, shape = call.name, call.func, call.args, call.kwargs, out.shape
    if name in RESHAPING:
        return "", lambda t: t.reshape(shape)
    if name in ("contiguous", "clone"):
        return "", lambda t: t
    if name not in SCALING or shape != x.shape:
        return name, None
    args = tuple(None if a is x else a for a in args)  # x itself is not to be kept alive
    return name, lambda t: func(*(t.clone() if a is None else a for a in args), **kwargs)


def after_reshape(axis: int | None, size: int, before: torch.Size, after: torch.Size, above: int = -1) -> int | None:
    """Axis behind `above` after a reshape, in which `axis`, of which `size` entries count, is still the outer part."""
    if axis is None:
        return None
    outer = math.prod(before[:axis])
    for i in range(above + 1, len(after)):
        if math.prod(after[:i]) == outer and after[i] % size == 0:
            return i
    return None


def after_move(call: Call, axis: int | None, x: Tensor, out: Tensor, part: bool = False) -> int | None:
    """Where `axis` of x is in `out`; None where it is gone, not known or, unless a part of it will do, changed."""
    if axis is None:
        return None
    if call.name == "einsum":
        own, result = einsum_letters(call, x)
        return None if "." in own + result or own[axis] not in result else result.index(own[axis])
    if call.name == "__getitem__":
        return after_index(call.args[1], axis, x.dim(), part)
    if call.name in PERMUTING:
        marked = torch.empty([2 if i == axis else 1 for i in range(x.dim())], device="meta")
        return list(call._replace(args=(marked, *call.args[1:])).run().shape).index(2)
    touched, more = touched_axes(call, x, out), out.dim() - x.dim()
    if axis in touched and (more < 0 or not part):
        return None
    return axis + more if more >= 0 else axis - sum(other < axis for other in touched)


def after_index(index: Any, axis: int, dim: int, part: bool) -> int | None:
    """Where `axis` is after x[index], with x of `dim` dimensions; None where it is gone, not known or, unless a part of
    it will do, changed.
    """
    index = list(index) if isinstance(index, tuple) else [index]
    lists = [i for i in index if not (i is None or i is Ellipsis or isinstance(i, (int, slice)))]
    if lists and (len(lists) > 1 or np.ndim(lists[0]) != 1 or any(isinstance(i, int) for i in index)):
        return None
    taken = sum(i is not None and i is not Ellipsis for i in index)
    at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    index[at : at + 1] = [slice(None)] * (dim - taken)
    own = [n for n, i in enumerate(index) if i is not None][axis]  # where in the index the axis is
    whole = isinstance(index[own], slice) and index[own] == slice(None)
    kept = whole or (part and not isinstance(index[own], int))
    return sum(not isinstance(i, int) for i in index[:own]) if kept else None


def touched_axes(call: Call, x: Tensor, out: Tensor) -> set[int]:
    """Axes of x along which an operation takes, moves or adds values."""
    name, args, dim = call.name, call.args, x.dim()
    if name == "pad":
        return padded_axes(call.argument(1, "pad"), dim)
    if name in ("channel_shuffle", "pixel_shuffle", "pixel_unshuffle"):
        return {dim - 3, *(range(dim - 2, dim) if name != "channel_shuffle" else ())}
    if name in ("expand", "expand_as", "broadcast_to", "repeat", "tile"):
        return {axis for axis in range(dim) if out.shape[axis + out.dim() - dim] != x.shape[axis]}
    if name == "flip" and len(args) > 2:  # x.flip(1, 2)
        dims = args[1:]
    else:
        position = {"chunk": 2, "split": 2, "tensor_split": 2, "roll": 2, "repeat_interleave": 2}.get(name, 1)
        default = 0 if name in ("chunk", "split", "tensor_split", "unbind") else None
        dims = call.argument(position, "dim", call.kwargs.get("dims", call.kwargs.get("axis", default)))
    return {d % dim for d in (range(dim) if dims is None else as_list(dims, 1))}


def mixed_axes(call: Call, x: Tensor, out: Tensor) -> set[int]:
    """Axes of x along which an operation mixes values."""
    dim, name = x.dim(), call.name
    if name in REDUCING:
        return touched_axes(call, x, out)
    if "_pool" in name:
        return set(range(dim - int(name[-2]), dim))
    if name == "interpolate":
        return set(range(2, dim))
    if name in MATMUL:
        return {dim - 1 if call.args[0] is x else max(dim - 2, 0)}
    return set()
