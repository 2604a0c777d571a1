"""One pass over memory where torch takes a dozen: the elementwise part of the backward pass, for tensors on a CPU.

Relevance is bound by memory, not by arithmetic, wherever no weights are involved. Each function has its plain twin in
:mod:`zsu.layers`, for other devices and layouts; tests hold both to the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

FAST = {"reassoc", "contract"}  # sums in any order, so that they use vector instructions; NaN and infinity as ever


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
    R, sums, last = torch.empty_like(z), z.new_zeros(z.shape[0], z.shape[channel]), channel == z.dim() - 1
    return R, sums, _arrive(*(flat(t, last) for t in (z, g, R)), sums.numpy(), last)


def over(portion: Tensor, zr: Tensor, epsilon: float, channel: int) -> tuple[Tensor, Tensor, float]:
    """c = portion / (zr + sign(zr) epsilon), its sums (K,) over all but channels, and what the stabiliser keeps."""
    c, sums, last = torch.empty_like(zr), zr.new_zeros(zr.shape[channel]), channel == zr.dim() - 1
    arrays = (flat(t, last) for t in (portion, zr, c))
    return c, sums, _over(*arrays, zr.numpy().dtype.type(epsilon), sums.numpy(), last)


def window(w: Tensor, gw: Tensor) -> Tensor:
    """Sum of w gw over the kernel's window: (K, J, ...) -> (K, J)."""
    e = w.new_empty(w.shape[:2])
    _window(w.numpy().reshape(e.numel(), -1), gw.numpy().reshape(e.numel(), -1), e.numpy().reshape(-1))
    return e


@njit(cache=True, nogil=True, fastmath=FAST)
def _arrive(z, g, R, sums, channels_last):
    magnitude = 0.0
    for n in range(z.shape[0]):
        for a in range(z.shape[1]):
            row, size = z.dtype.type(0), z.dtype.type(0)
            for b in range(z.shape[2]):
                r = z[n, a, b] * g[n, a, b]
                R[n, a, b] = r
                size += abs(r)
                row += r
            magnitude += size
            if channels_last:
                for b in range(z.shape[2]):
                    sums[n, b] += R[n, a, b]
            else:
                sums[n, a] = row
    return magnitude


@njit(cache=True, nogil=True, fastmath=FAST)
def _over(portion, zr, c, epsilon, sums, channels_last):
    kept = 0.0
    for n in range(zr.shape[0]):
        for a in range(zr.shape[1]):
            row, stabiliser = epsilon * 0, epsilon * 0
            for b in range(zr.shape[2]):
                s = epsilon if zr[n, a, b] >= 0 else -epsilon
                q = portion[n, a, b] / (zr[n, a, b] + s)
                c[n, a, b] = q
                stabiliser += q * s
                row += q
            kept += stabiliser
            if channels_last:
                for b in range(zr.shape[2]):
                    sums[b] += c[n, a, b]
            else:
                sums[a] += row
    return kept


@njit(cache=True, nogil=True, fastmath=FAST)
def _window(w, gw, e):
    for i in range(len(e)):
        total = w.dtype.type(0)
        for p in range(w.shape[1]):
            total += w[i, p] * gw[i, p]
        e[i] = total
