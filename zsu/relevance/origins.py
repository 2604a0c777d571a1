"""What the tape knows of a tensor that relevance flows through, and what operations without weights make of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layers import Layer, Source
from .operations import EXPANDING, MATMUL, MAY_TURN_NEGATIVE, REARRANGING, RESHAPING, SCALING, Call, as_list, tensors_in
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
    sources: tuple[Source, ...] | None  # where its channels come from
    nonnegative: bool
    version: int  # of the tensor; another one: it has changed in place by way of a view of it
    layer: Layer | None = None  # whose direct output it is
    front: Front | None = None  # where no layer stands between the model's input and it
    read: bool = False  # by an operation

    @property
    def is_input(self) -> bool:
        """Whether each value is one of the input's, as it is or after arithmetic with constants."""
        return self.front is not None and self.front.maps is not None


def origin_after(call: Call, origin: Origin, x: Tensor, out: Tensor, samples: int) -> Origin:
    """Origin of what an operation without weights makes of x."""
    sources, (batch, channel) = origin.sources, origin.axes
    if call.name in RESHAPING:
        batch = after_reshape(batch, samples, x.shape, out.shape)
        if channel is not None:
            channels, above = x.shape[channel], -1 if batch is None else batch
            channel = after_reshape(channel, channels, x.shape, out.shape, above)
            if channel is not None and sources is not None:
                spread = out.shape[channel] // channels  # positions that now stand beside each other
                sources = tuple(replace(s, group=s.group * spread) for s in sources)
    elif call.name in REARRANGING | {"einsum"}:
        batch, channel = (after_move(call, axis, x, out) for axis in origin.axes)
    else:
        mixed, more = mixed_axes(call, x), out.dim() - x.dim()  # broadcast against more dimensions
        batch, channel = (None if i is None or i in mixed else i + more for i in origin.axes)
    nonnegative = call.name in ("relu", "relu_") or (origin.nonnegative and call.name not in MAY_TURN_NEGATIVE)
    front = origin.front and origin.front.then(*front_of(call, x, out))
    sources = None if channel is None else repeat_sources(sources, out.shape[channel])
    return Origin((batch, channel), sources, nonnegative, out._version, front=front)


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


def after_move(call: Call, axis: int | None, x: Tensor, out: Tensor) -> int | None:
    """Where `axis` of x is in `out`; None where it is gone, taken apart, or not known."""
    if axis is None:
        return None
    name = call.name
    if name == "einsum":
        return after_einsum(call, axis, x)
    if name == "__getitem__":
        return after_index(call.args[1], axis, x.dim())
    marked = torch.empty([2 if i == axis else 1 for i in range(x.dim())], device="meta")
    if name in ("permute", "transpose", "movedim", "swapaxes"):
        return list(getattr(marked, name)(*call.args[1:], **call.kwargs).shape).index(2)
    if name in EXPANDING:
        after = axis + out.dim() - x.dim()
        return after if x.shape[axis] in (1, out.shape[after]) else None
    default = 0 if name in ("chunk", "split", "unbind") else None
    dims = call.argument({"chunk": 2, "split": 2, "narrow": 1}.get(name, 1), "dim", default)
    dims = [d % x.dim() for d in (range(x.dim()) if dims is None else as_list(dims, 1))]
    if axis in dims:
        return None
    return axis if out.dim() == x.dim() else axis - sum(d < axis for d in dims)


def after_einsum(call: Call, axis: int, x: Tensor) -> int | None:
    """Where `axis` is after an einsum of which x is an operand; None where it is summed over, or dots hide it."""
    terms, result = call.args[0].replace(" ", "").replace("...", ".").split("->")
    operands = tensors_in(call.args[1:])
    own = terms.split(",")[next(n for n, t in enumerate(operands) if t is x)]
    return None if "." in own + result or own[axis] not in result else result.index(own[axis])


def after_index(index: Any, axis: int, dim: int) -> int | None:
    """Where `axis` is after x[index], with x of `dim` dimensions; None for anything but numbers, slices, None, ...."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in index):
        return None
    taken = sum(i is not None and i is not Ellipsis for i in index)
    index = index if Ellipsis in index else [*index, Ellipsis]
    at = index.index(Ellipsis)
    index[at : at + 1] = [slice(None)] * (dim - taken)
    own = [n for n, i in enumerate(index) if i is not None][axis]  # where in the index the axis is
    return sum(not isinstance(i, int) for i in index[:own]) if index[own] == slice(None) else None


def mixed_axes(call: Call, x: Tensor) -> set[int]:
    """Axes of x along which an operation moves or mixes values."""
    dim, name, args = x.dim(), call.name, call.args
    if name == "pad":
        return {dim - 1 - i // 2 for i, side in enumerate(call.argument(1, "pad", ())) if side}
    if name in ("roll", "flip"):
        dims = args[-1] if len(args) > (2 if name == "roll" else 1) else call.kwargs.get("dims")
        dims = args[1:] if name == "flip" and len(args) > 2 else dims
        return set(range(dim)) if dims is None else {d % dim for d in as_list(dims, 1)}
    if "_pool" in name:
        return set(range(dim - int(name[-2]), dim))
    if name == "interpolate":
        return set(range(2, dim))
    if name in MATMUL:
        return {dim - 1 if args[0] is x else max(dim - 2, 0)}
    return set()


def repeat_sources(sources: tuple[Source, ...] | None, width: int) -> tuple[Source, ...] | None:
    """Sources of so many channels: one channel repeated is as many sources; None where they do not fit."""
    if sources is None or sum(s.channels * s.group for s in sources) == width:
        return sources
    return sources * width if sources == (Source(sources[0].layer, 1),) else None
