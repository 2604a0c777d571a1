"""The elementwise part of the backward pass on a graphics card, in one pass over memory: the twin of :mod:`.sums` in
Triton, which comes with PyTorch for CUDA. Its interpreter runs the same code on a CPU, for the tests.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 2048  # that many keep a card busy; positions are divided until there are as many
TILES = {True: (64, 16), False: (4, 256)}  # channels, positions of a tile, where channels are last in memory or not


def strides(t: Tensor, channel: int | None) -> tuple[int, int, int] | None:
    """Strides of samples, channels and positions, of all of which there is one; None for other layouts."""
    if t.dim() < 2 or channel not in (1, t.dim() - 1):
        return None
    size = t[0].numel()
    if t.is_contiguous():
        last = channel == t.dim() - 1
        return size, 1 if last else size // t.shape[1], t.shape[-1] if last else 1
    last = channel == 1 and t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return (size, 1, t.shape[1]) if last else None


def fit(axes: tuple[int | None, int | None], *tensors: Tensor) -> bool:
    """Whether the kernel takes these tensors, of one shape: float32, samples first, alike in memory."""
    first = tensors[0]
    alike = all(t.stride() == first.stride() and t.dtype == torch.float32 for t in tensors)
    return alike and axes[0] == 0 and strides(first, axes[1]) is not None


def sweep(
    what: str, channel: int, a: Tensor, b: Tensor, third: Tensor | None = None, epsilon: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over a and b, for what :mod:`.sums` calls "arrive", "over", "epsilon_rule", "split" and "over_window".

    Returns the new tensor, two sums (N, K) over positions, and two over all.
    """
    sn, sk, sp = strides(a, channel)  # type: ignore[misc]
    n, k = a.shape[0], a.shape[channel]
    positions = a.numel() // (n * k)
    tile_k, tile_p = TILES[sk == 1]
    grid_k = triton.cdiv(k, tile_k)
    parts = max(1, min(triton.cdiv(positions, tile_p), PROGRAMS // (n * grid_k)))
    length = triton.cdiv(triton.cdiv(positions, parts), tile_p) * tile_p  # positions of a program
    out = a if what in ("split", "over_window") else torch.empty_like(a)
    rows = a.new_zeros(2, parts, n, k)
    sums = a.new_zeros(2, parts, n, grid_k)
    third = a if third is None else third
    kernel: Any = _sweep  # which launches as kernel[grid](...)
    kernel[n, grid_k, parts](
        a, b, third, out, rows, sums, epsilon, k, positions, length, sn, sk, sp, rows[0].numel(), sums[0].numel(),
        what, third is not a, tile_k, tile_p,
    )  # fmt: skip
    (first, second), (one, other) = rows.sum(1), sums.flatten(1).sum(1)  # (2, parts, N, K) -> (2, N, K)
    return out, first, second, one, other


@triton.jit
def _sweep(
    a, b, third, out, rows, sums, epsilon, K, P, length, sn, sk, sp, rows_size, sums_size,
    WHAT: tl.constexpr, THIRD: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    n, part = tl.program_id(0), tl.program_id(2)
    k = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    first = tl.zeros([TILE_K], tl.float32)
    second = tl.zeros([TILE_K], tl.float32)
    one = tl.zeros([TILE_K], tl.float32)
    other = tl.zeros([TILE_K], tl.float32)
    scale = tl.full([TILE_K], 1.0, tl.float32)
    if WHAT == "epsilon_rule" and THIRD:
        scale = tl.load(third + k, mask=k < K, other=0.0)
    for begin in range(0, length, TILE_P):
        p = part * length + begin + tl.arange(0, TILE_P)
        there = (k[:, None] < K) & (p[None, :] < P)
        at = n.to(tl.int64) * sn + k[:, None].to(tl.int64) * sk + p[None, :].to(tl.int64) * sp
        x = tl.load(a + at, mask=there, other=0.0)
        y = tl.load(b + at, mask=there, other=0.0)
        if WHAT == "over":
            r, z = x, y
        else:
            r, z = x * y, x
            first += tl.sum(r, 1)
            one += tl.sum(tl.abs(r), 1)
        if WHAT == "split":
            second += tl.sum(tl.load(third + at, mask=there, other=0.0) * y, 1)
        if WHAT == "arrive":
            tl.store(out + at, r, mask=there)
        if WHAT == "over" or WHAT == "epsilon_rule":
            stabiliser = tl.where(z < 0, -epsilon, epsilon)
            q = r / (z + stabiliser)
            second += tl.sum(q, 1)
            other += tl.sum(q * stabiliser, 1)
            tl.store(out + at, q * scale[:, None], mask=there)
    row = (part * tl.num_programs(0) + n) * K + k
    tl.store(rows + row, first, mask=k < K)
    tl.store(rows + rows_size + row, second, mask=k < K)
    tile = (part * tl.num_programs(0) + n) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + tile, tl.sum(one, 0))
    tl.store(sums + sums_size + tile, tl.sum(other, 0))
