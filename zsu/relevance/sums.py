"""The elementwise part of the backward pass, and sums over axes.

Relevance is bound by memory, not by arithmetic, wherever no weights are involved. So each of the first functions goes
over memory once, where torch takes a dozen passes, for tensors on a CPU, and in :mod:`.cards` for those on a card; for
other devices and layouts it calls torch. Tests hold all to the same numbers.
"""

import functools
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

Axes = tuple[int | None, int | None]  # of samples and of channels; None where they are not known
# Sums in any order, so that they use vector instructions; NaN and infinity as ever.
ONE_PASS = njit(cache=True, nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")


def arrive(z: Tensor, g: Tensor, axes: Axes) -> tuple[Tensor, Tensor, float | Tensor]:
    """R = z g, its sums (N, K) over positions, and sum |R|."""
    if on_card(axes, z, g):
        R, sums, _, size, _ = cards().sweep("arrive", axes[1], z, g)
        return R, sums, size
    if not fits(axes, z, g):
        R = z * g
        return R, over_positions(R, axes), torch.linalg.vector_norm(R, 1)
    R, sums, size, last = torch.empty_like(z), *per_sample(z, axes, 1)
    _arrive(*(flat(t, last) for t in (z, g, R)), sums.numpy(), size, last)
    return R, sums, size.sum()


def over(portion: Tensor, zr: Tensor, epsilon: float, axes: Axes) -> tuple[Tensor, Tensor, float | Tensor]:
    """c = portion / (zr + sign(zr) epsilon) with sign(0) = 1, its sums (K,) over all but channels, and what the
    stabiliser keeps.
    """
    if on_card(axes, portion, zr):
        c, _, sums, _, kept = cards().sweep("over", axes[1], portion, zr, epsilon=epsilon)
        return c, sums.sum(0), kept
    if not fits(axes, zr, portion):
        stabiliser = torch.where(zr < 0, zr.new_full((), -epsilon), epsilon)
        c = portion / (zr + stabiliser)
        return c, over_samples(c, axes), inner(c, stabiliser)
    c, sums, kept, last = torch.empty_like(zr), *per_sample(zr, axes, 1)
    epsilon = zr.numpy().dtype.type(epsilon)
    _over(*(flat(t, last) for t in (portion, zr, c)), epsilon, sums.numpy(), kept, last)
    return c, sums.sum(0), kept.sum()


def epsilon_rule(
    z: Tensor, g: Tensor, epsilon: float, s: Tensor | None, axes: Axes
) -> tuple[Tensor, Tensor, Tensor, float | Tensor, float | Tensor]:
    """All of the epsilon rule but the weights, from R = z g: c s with c = R / (z + sign(z) epsilon) and s (K,) or None.

    Returns c s; the sums of R (N, K) over positions and of c (K,) over all but channels; sum |R|; what the stabiliser
    keeps.
    """
    if on_card(axes, z, g):
        c, sums, c_sums, magnitude, kept = cards().sweep("epsilon_rule", axes[1], z, g, s, epsilon)
        return c, sums, c_sums.sum(0), magnitude, kept
    if not fits(axes, z, g):
        R, sums, magnitude = arrive(z, g, axes)
        c, c_sums, kept = over(R, z, epsilon, axes)
        return c if s is None else c * along_channels(s, c, axes), sums, c_sums, magnitude, kept
    c, sums, both, last = torch.empty_like(z), *per_sample(z, axes, 2)
    c_sums, s = torch.zeros_like(sums), sums.new_ones(sums.shape[1]) if s is None else s
    flows = (flat(z, last), flat(g, last), flat(c, last))
    _epsilon_rule(flows, z.numpy().dtype.type(epsilon), s.numpy(), sums.numpy(), c_sums.numpy(), both, last)
    magnitude, kept = both.reshape(2, -1).sum(1)
    return c, sums, c_sums.sum(0), magnitude, kept


def split(z: Tensor, b: Tensor, g: Tensor, axes: Axes) -> tuple[Tensor, Tensor, float | Tensor]:
    """Of z = a + b: the sums (N, K) over positions of z g and of b g, and sum |z g|."""
    if on_card(axes, z, b, g):
        _, sums, b_sums, size, _ = cards().sweep("split", axes[1], z, g, b)
        return sums, b_sums, size
    if not fits(axes, z, b, g):
        R = at_least_float32(z) * g
        of_b = over_positions(at_least_float32(b) * g, axes)
        return over_positions(R, axes), of_b, torch.linalg.vector_norm(R, 1)
    sums, size, last = per_sample(z, axes, 1)
    b_sums = torch.zeros_like(sums)
    _split(*(flat(t, last) for t in (z, b, g)), sums.numpy(), b_sums.numpy(), size, last)
    return sums, b_sums, size.sum()


def over_window(w: Tensor, gw: Tensor) -> Tensor:
    """Sum of w gw over the kernel's window: (K, J, ...) -> (K, J)."""
    if on_card((0, 1), w, gw):
        return cards().sweep("over_window", 1, w, gw)[1]
    if not fits((0, 1), w, gw):
        return (at_least_float32(gw) * w).flatten(2).sum(2)
    e = w.new_empty(w.shape[:2])
    _over_window(*(t.numpy().reshape(*w.shape[:2], -1) for t in (w, gw)), e.numpy())
    return e


@functools.cache
def cards() -> Any:
    """The twin of these functions for cards; None without Triton. It is not loaded before there is a card."""
    return import_module(".cards", __package__) if find_spec("triton") else None


def on_card(axes: Axes, *tensors: Tensor) -> bool:
    """Whether one pass on a card can take these tensors, of one shape."""
    return tensors[0].is_cuda and cards() is not None and cards().fit(axes, *tensors)


def fits(axes: Axes, *tensors: Tensor) -> bool:
    """Whether one pass can take these tensors, of one shape: samples first, channels first or last, on a CPU."""
    return (
        axes[0] == 0
        and axes[1] is not None
        and axes[1] in (1, tensors[0].dim() - 1)
        and all(t.is_contiguous() and t.device.type == "cpu" and t.dtype == tensors[0].dtype for t in tensors)
        and tensors[0].dtype in (torch.float32, torch.float64)
    )


def flat(t: Tensor, last: bool) -> np.ndarray:
    """View of a contiguous tensor as an array: (N, P, K) where channels are last, else (N, K, P)."""
    shape = (t.shape[0], t.numel() // (t.shape[0] * t.shape[-1]), t.shape[-1]) if last else (*t.shape[:2], -1)
    return t.numpy().reshape(shape)


def per_sample(t: Tensor, axes: Axes, numbers: int) -> tuple[Tensor, np.ndarray, bool]:
    """Room for sums by sample and channel, and for some float64 numbers by sample; and whether channels are last."""
    last = axes[1] == t.dim() - 1
    return t.new_zeros(t.shape[0], t.shape[-1 if last else 1]), np.zeros(numbers * t.shape[0]), last


# --- sums over axes -------------------------------------------------------------------------------------------


def at_least_float32(t: Tensor) -> Tensor:
    """float16 and bfloat16 hold too few digits and too small a range for quotients and sums."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def along_channels(v: Tensor, like: Tensor, axes: Axes) -> Tensor:
    """(K,) -> (1, K, 1, ...) so that it broadcasts over `like`."""
    return v.reshape([-1 if axis == axes[1] else 1 for axis in range(like.dim())])


def over_positions(t: Tensor, axes: Axes) -> Tensor:
    """Sum all but samples and channels: (N, K); (1, K) where samples are not known, (N, 1) where channels are not."""
    batch, channel = axes
    others = [axis for axis in range(t.dim()) if axis not in axes]
    t = t.sum(others) if others else t  # the axes that are known
    if batch is not None and channel is not None:
        return t if batch < channel else t.T
    return t.reshape(-1, 1) if channel is None else t[None]


def of_samples(t: Tensor, samples: int) -> Tensor:
    """(N windows, K) -> (N, K), where a model spreads windows of each sample over the batch axis; (1, K) stays."""
    return t if len(t) in (1, samples) else t.unflatten(0, (samples, -1)).sum(1)


def over_samples(t: Tensor, axes: Axes) -> Tensor:
    """(K,): the sum of all but the channels."""
    others = [axis for axis in range(t.dim()) if axis != axes[1]]
    return t.sum(others) if others else t  # torch sums over all axes where none is named


def total(t: Tensor) -> float:
    """Sum in float64."""
    return float(t.double().sum())


def on_host(numbers: Sequence[float | Tensor]) -> list[float]:
    """Numbers as Python has them; those on a device come in one transfer."""
    there = [number for number in numbers if isinstance(number, Tensor)]
    values = iter(torch.stack(there).tolist() if there else [])
    return [next(values) if isinstance(number, Tensor) else float(number) for number in numbers]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b, 0-dimensional; in one pass where both lie in memory alike and without gaps."""
    a, b = at_least_float32(a), at_least_float32(b)
    dense = a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
    if not dense or a.stride() != b.stride():
        return (a * b).sum()
    return torch.dot(*(t.as_strided((t.numel(),), (1,)) for t in (a, b)))


# --- one pass over memory -----------------------------------------------------------------------------------


@ONE_PASS
def _arrive(z, g, R, sums, size, last):
    for n in range(z.shape[0]):
        for a in range(z.shape[1]):
            row, magnitude = z.dtype.type(0), z.dtype.type(0)
            for b in range(z.shape[2]):
                r = z[n, a, b] * g[n, a, b]
                R[n, a, b] = r
                magnitude += abs(r)
                row += r
            size[n] += magnitude
            if last:
                sums[n] += R[n, a]
            else:
                sums[n, a] = row


@ONE_PASS
def _over(portion, zr, c, epsilon, sums, kept, last):
    for n in range(zr.shape[0]):
        for a in range(zr.shape[1]):
            row, stabiliser = zr.dtype.type(0), zr.dtype.type(0)
            for b in range(zr.shape[2]):
                s = epsilon if zr[n, a, b] >= 0 else -epsilon
                q = portion[n, a, b] / (zr[n, a, b] + s)
                c[n, a, b] = q
                stabiliser += q * s
                row += q
            kept[n] += stabiliser
            if last:
                sums[n] += c[n, a]
            else:
                sums[n, a] = row


@ONE_PASS
def _epsilon_rule(flows, epsilon, scale, sums, c_sums, both, last):
    z, g, c = flows
    samples = z.shape[0]
    for n in range(samples):
        for a in range(z.shape[1]):
            row, c_row, magnitude, stabiliser = z.dtype.type(0), z.dtype.type(0), z.dtype.type(0), z.dtype.type(0)
            for b in range(z.shape[2]):
                s = epsilon if z[n, a, b] >= 0 else -epsilon
                r = z[n, a, b] * g[n, a, b]
                q = r / (z[n, a, b] + s)
                magnitude += abs(r)
                stabiliser += q * s
                if last:
                    c[n, a, b] = q * scale[b]
                    sums[n, b] += r
                    c_sums[n, b] += q
                else:
                    c[n, a, b] = q * scale[a]
                    row += r
                    c_row += q
            if not last:
                sums[n, a] = row
                c_sums[n, a] = c_row
            both[n] += magnitude
            both[samples + n] += stabiliser


@ONE_PASS
def _split(z, summand, g, sums, b_sums, size, last):
    for n in range(z.shape[0]):
        for a in range(z.shape[1]):
            row, b_row, magnitude = z.dtype.type(0), z.dtype.type(0), z.dtype.type(0)
            for b in range(z.shape[2]):
                r, of_b = z[n, a, b] * g[n, a, b], summand[n, a, b] * g[n, a, b]
                magnitude += abs(r)
                if last:
                    sums[n, b] += r
                    b_sums[n, b] += of_b
                else:
                    row += r
                    b_row += of_b
            size[n] += magnitude
            if not last:
                sums[n, a] = row
                b_sums[n, a] = b_row


@ONE_PASS
def _over_window(w, gw, e):
    for k in range(w.shape[0]):
        for j in range(w.shape[1]):
            total = w.dtype.type(0)
            for p in range(w.shape[2]):
                total += w[k, j, p] * gw[k, j, p]
            e[k, j] = total
