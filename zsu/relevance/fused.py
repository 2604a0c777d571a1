"""One pass over memory where torch takes a dozen: the elementwise part of the backward pass, for tensors on a CPU.

Relevance is bound by memory, not by arithmetic, wherever no weights are involved. Each function has its plain twin in
:mod:`zsu.relevance.layers`, for other devices and layouts; tests hold both to the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Sums in any order, so that they use vector instructions; NaN and infinity as ever.
ONE_PASS = njit(cache=True, nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")


def fits(axes: tuple[int | None, int | None], *tensors: Tensor) -> bool:
    """Whether the functions below can take these tensors, of one shape: samples first, channels first or last."""
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


def arrive(z: Tensor, g: Tensor, channel: int) -> tuple[Tensor, Tensor, float]:
    """R = z g, its sums (N, K) over positions, and sum |R|."""
    R, sums, size, last = torch.empty_like(z), *per_sample(z, channel, 1), channel == z.dim() - 1
    _arrive(*(flat(t, last) for t in (z, g, R)), sums.numpy(), size, last)
    return R, sums, size.sum()


def over(portion: Tensor, zr: Tensor, epsilon: float, channel: int) -> tuple[Tensor, Tensor, float]:
    """c = portion / (zr + sign(zr) epsilon), its sums (K,) over all but channels, and what the stabiliser keeps."""
    c, sums, kept, last = torch.empty_like(zr), *per_sample(zr, channel, 1), channel == zr.dim() - 1
    epsilon = zr.numpy().dtype.type(epsilon)
    _over(*(flat(t, last) for t in (portion, zr, c)), epsilon, sums.numpy(), kept, last)
    return c, sums.sum(0), kept.sum()


def epsilon_rule(z: Tensor, g: Tensor, epsilon: float, s: Tensor | None, channel: int):
    """All of the epsilon rule but the weights, from R = z g: c s with c = R / (z + sign(z) epsilon) and s (K,) or None.

    Returns c s; the sums of R (N, K) over positions and of c (K,) over all but channels; sum |R|; what the stabiliser
    keeps.
    """
    c, sums, both, last = torch.empty_like(z), *per_sample(z, channel, 2), channel == z.dim() - 1
    c_sums, s = torch.zeros_like(sums), z.new_ones(z.shape[channel]) if s is None else s
    arrays = (*(flat(t, last) for t in (z, g, c)), z.numpy().dtype.type(epsilon), s.numpy(), sums.numpy())
    _epsilon_rule(*arrays, c_sums.numpy(), both, last)
    magnitude, kept = both.reshape(2, -1).sum(1)
    return c, sums, c_sums.sum(0), magnitude, kept


def split(z: Tensor, b: Tensor, g: Tensor, channel: int) -> tuple[Tensor, Tensor, float]:
    """Of z = a + b: the sums (N, K) over positions of z g and of b g, and sum |z g|."""
    sums, size = per_sample(z, channel, 1)
    b_sums, last = torch.zeros_like(sums), channel == z.dim() - 1
    _split(*(flat(t, last) for t in (z, b, g)), sums.numpy(), b_sums.numpy(), size, last)
    return sums, b_sums, size.sum()


def window(w: Tensor, gw: Tensor) -> Tensor:
    """Sum of w gw over the kernel's window: (K, J, ...) -> (K, J)."""
    e = w.new_empty(w.shape[:2])
    _window(*(t.numpy().reshape(*w.shape[:2], -1) for t in (w, gw)), e.numpy())
    return e


def per_sample(t: Tensor, channel: int, numbers: int) -> tuple[Tensor, np.ndarray]:
    """Room for sums by sample and channel, and for some float64 numbers by sample."""
    return t.new_zeros(t.shape[0], t.shape[channel]), np.zeros(numbers * t.shape[0])


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
def _epsilon_rule(z, g, c, epsilon, scale, sums, c_sums, both, last):
    samples = z.shape[0]
    for n in range(samples):
        for a in range(z.shape[1]):
            row, c_row, magnitude, stabiliser = z.dtype.type(0), z.dtype.type(0), z.dtype.type(0), z.dtype.type(0)
            if last:
                for b in range(z.shape[2]):
                    s = epsilon if z[n, a, b] >= 0 else -epsilon
                    r = z[n, a, b] * g[n, a, b]
                    q = r / (z[n, a, b] + s)
                    c[n, a, b] = q * scale[b]
                    sums[n, b] += r
                    c_sums[n, b] += q
                    magnitude += abs(r)
                    stabiliser += q * s
            else:
                for b in range(z.shape[2]):
                    s = epsilon if z[n, a, b] >= 0 else -epsilon
                    r = z[n, a, b] * g[n, a, b]
                    q = r / (z[n, a, b] + s)
                    c[n, a, b] = q * scale[a]
                    row += r
                    c_row += q
                    magnitude += abs(r)
                    stabiliser += q * s
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
def _window(w, gw, e):
    for k in range(w.shape[0]):
        for j in range(w.shape[1]):
            total = w.dtype.type(0)
            for p in range(w.shape[2]):
                total += w[k, j, p] * gw[k, j, p]
            e[k, j] = total
