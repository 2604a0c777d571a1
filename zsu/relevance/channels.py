"""Which channel of which layer each value of a tensor comes from: its *sources*.

The channels of all layers are numbered through, in the order of the forward pass. The sources of a tensor are such
numbers in an int64 tensor that broadcasts to its shape: (1, C, 1, 1) for the output of a convolution, (1, heads, 1, d)
where the channels are split into heads. What only moves values (slices, permutations, reshapes, padding) does the same
to their sources; what mixes the values of several channels leaves them unknown: None. Always on the CPU.
"""

import itertools
import math
from bisect import bisect
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Layer
from .operations import ALONG_AXES, MATMUL, MOVING, REDUCING, RESHAPING, Call, tensors_in

NOTHING = -1  # the source of padding and of constants


class Numbers:
    """The numbers of the channels of all layers.

    Attributes
    ----------
    layers : list of Layer
        In the order of the forward pass.
    first : list of int
        The number of each layer's first channel, and that of the next layer to come.
    """

    def __init__(self):
        self.layers: list[Layer] = []
        self.first = [0]

    def add(self, layer: Layer, channels: int) -> int:
        """The number of the first channel of a new layer."""
        self.layers.append(layer)
        self.first.append(self.first[-1] + channels)
        return self.first[-2]

    def layers_of(self, sources: Tensor | None) -> list[Layer]:
        """The layers that sources are channels of, where they are known."""
        numbers = [] if sources is None else sources.unique().tolist()
        return list(dict.fromkeys(self.layers[bisect(self.first, n) - 1] for n in numbers if n >= 0))

    def are_all(self, sources: np.ndarray | None) -> bool:
        """Whether they are the channels of one layer, all of them and in their order."""
        if sources is None or sources[0] < 0:
            return False
        layer = bisect(self.first, sources[0]) - 1
        return np.array_equal(sources, np.arange(*self.first[layer : layer + 2]))

    def without_gaps(self, kept: Container[Layer]) -> np.ndarray:
        """The new number of each channel when only some layers are kept; the last is that of NOTHING."""
        number, count = np.full(self.first[-1] + 1, NOTHING), 0
        for layer, (begin, end) in zip(self.layers, itertools.pairwise(self.first), strict=True):
            if layer in kept:
                number[begin:end] = np.arange(count, count + end - begin)
                count += end - begin
        return number


def numbered(begin: int, out: Tensor, channel: int | None) -> Tensor:
    """Sources of a layer's own output, whose first channel has that number; its only one where they have no axis."""
    numbers = torch.arange(begin, begin + (1 if channel is None else out.shape[channel]), device="cpu")
    return numbers.view([-1 if axis == (channel or 0) else 1 for axis in range(out.dim())])  # (K,) -> (1, K, 1, ...)


def along(sources: Tensor | None, axis: int | None, size: int) -> np.ndarray | None:
    """Sources (size,) of the channels on an axis, or of the only one; None where they are unknown, or not the same at
    all positions.
    """
    if sources is None or sources.numel() != (1 if axis is None else sources.shape[axis]):
        return None
    return sources.flatten().expand(size).numpy()  # (1, size, 1, ...) -> (size,)


def sources_after(
    call: Call, sources: Tensor, x: Tensor, outs: list[Tensor], mixed: set[int], channel: int | None
) -> list[Tensor | None]:
    """Sources of what an operation without weights makes of x, which mixes values along these axes."""
    if call.name in RESHAPING:
        return [squeezed(reshaped(sources, x.shape, out.shape), channel) for out in outs]
    if call.name == "einsum":
        return [after_einsum(call, sources, x)]
    if any(sources.shape[axis] > 1 for axis in mixed):
        return [None] * len(outs)
    if call.name in MOVING:
        return [squeezed(t, channel) for t in moved(call, sources, x)]
    if call.name in REDUCING | MATMUL and outs[0].dim() < x.dim():
        return [sources.squeeze(sorted(mixed))] * len(outs)
    more = outs[0].dim() - x.dim()  # broadcast against more dimensions
    return [sources[(None,) * more] if more >= 0 else None] * len(outs)


def after_einsum(call: Call, sources: Tensor, x: Tensor) -> Tensor | None:
    """Sources after an einsum of which x is an operand; None where channels are summed over, or dots hide them."""
    own, result = einsum_letters(call, x)
    size = dict(zip(own, sources.shape, strict=False))
    if "." in own + result or len(size) < len(own) or any(size[c] > 1 for c in own if c not in result):
        return None
    kept = [c for c in result if c in size]
    return torch.einsum(f"{own}->{''.join(kept)}", sources).view([size.get(c, 1) for c in result])


def einsum_letters(call: Call, x: Tensor) -> tuple[str, str]:
    """The letters of x's axes in an einsum, and those of the result; a dot stands for an ellipsis."""
    terms, result = call.args[0].replace(" ", "").replace("...", ".").split("->")
    operands = tensors_in(call.args[1:])
    return terms.split(",")[next(n for n, t in enumerate(operands) if t is x)], result


def reshaped(sources: Tensor, before: torch.Size, after: torch.Size) -> Tensor:
    """Sources after a reshape: only axes that are split or merged, and along which they differ, are written out."""
    ends = [{math.prod(shape[:i]): i for i in range(len(shape) + 1)} for shape in (before, after)]
    cuts = sorted(ends[0].keys() & ends[1].keys())  # numbers of values that both shapes have a stretch of axes for
    wide, shape = [1] * ends[0][1], [1] * ends[1][1]
    for cut, end in itertools.pairwise(cuts):
        old, new = slice(ends[0][cut], ends[0][end]), after[ends[1][cut] : ends[1][end]]
        constant = math.prod(sources.shape[old]) == 1
        wide += sources.shape[old] if constant else before[old]
        shape += [1] * len(new) if constant else new
    return sources.expand(wide).reshape(shape)  # (1, C, 1, 1) -> (1, C H W), (1, g, C / g, 1, 1) or the like


def moved(call: Call, sources: Tensor, x: Tensor) -> list[Tensor]:
    """The operation's own work, done to the sources."""
    args, kwargs = on_cpu(call.args[1:]), on_cpu(call.kwargs)
    if call.name == "pad":
        pad, mode = call.argument(1, "pad"), call.argument(2, "mode", "constant")
        if all(sources.shape[axis] == 1 for axis in padded_axes(pad, x.dim())):
            return [sources]
        value = float(NOTHING) if mode == "constant" else None
        return [F.pad(sources.expand(x.shape).double(), pad, mode, value).long()]
    whole = call.name not in ALONG_AXES or (call.name == "roll" and call.argument(2, "dims", ()) == ())
    return tensors_in((call.func(sources.expand(x.shape) if whole else sources, *args, **kwargs),))


def padded_axes(pad: Sequence[int], dim: int) -> set[int]:
    """Axes that F.pad pads or crops."""
    return {dim - 1 - i // 2 for i, side in enumerate(pad) if side}


def on_cpu(value: Any) -> Any:
    """Arguments with their tensors, such as indices, on the CPU."""
    if isinstance(value, (tuple, list)):
        return type(value)(on_cpu(v) for v in value)
    if isinstance(value, dict):
        return {key: on_cpu(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def zero_at_zero(call: Call, dtype: torch.dtype) -> bool:
    """Whether a function gives 0 for 0: asked on the CPU, where nobody waits for an answer."""
    zero = torch.zeros(1, dtype=dtype, device="cpu")
    return not call.func(zero, *on_cpu(call.args[1:]), **on_cpu(call.kwargs)).any()


def squeezed(sources: Tensor, channel: int | None) -> Tensor:
    """With size 1 for each axis, other than that of the channels, along which the sources differ by NOTHING alone."""
    for axis in range(sources.dim()):
        if sources.shape[axis] > 1 and sources.stride(axis) == 0:
            sources = sources.narrow(axis, 0, 1)
    for axis in range(sources.dim()):
        if axis != channel and sources.shape[axis] > 1:
            most = sources.amax(axis, keepdim=True)
            if ((sources == most) | (sources == NOTHING)).all():
                sources = most
    return sources


def joined(parts: list[Tensor | None], sizes: list[int], axis: int, channel: int | None) -> Tensor:
    """Sources of a concatenation of parts of those sizes; a part without sources is constant."""
    dim = next(p.dim() for p in parts if p is not None)
    known = [torch.full([1] * dim, NOTHING, device="cpu") if p is None else p for p in parts]
    others = torch.broadcast_shapes(*(p.select(axis, 0).shape for p in known))
    wide = [p.expand(*others[:axis], size, *others[axis:]) for p, size in zip(known, sizes, strict=True)]
    return squeezed(torch.cat(wide, axis), channel)


def channel_axis(sources: Tensor | None, tracked: int | None) -> int | None:
    """The axis along which the sources differ; the one known otherwise where they differ along none."""
    many = [] if sources is None else [axis for axis, size in enumerate(sources.shape) if size > 1]
    return tracked if not many else many[0] if len(many) == 1 else None
