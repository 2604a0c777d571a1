"""Steps without weights that need more than the gradient: additions, norms, activations that bend, constants."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layers import Step
from .sums import at_least_float32, inner, of_samples, split


class Addition(torch.autograd.Function):
    """a + b; its backward sums the relevance each summand gets."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, step: Step, in_place: bool) -> Tensor:
        z = a.add_(b) if in_place else a + b
        if in_place:
            ctx.mark_dirty(a)
        step.z = z.detach()  # shares memory with the output; Tape.protect copies it before a change in place
        ctx.step = step
        ctx.save_for_backward(b)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        step, (b,) = ctx.step, ctx.saved_tensors
        if step.closed:
            return (None,) * 4
        whole, of_b, step.share.magnitude = split(step.z, b, g, step.axes)
        whole, of_b = (of_samples(t, step.replay.samples) for t in (whole, of_b))  # (N, K) each
        step.share.relevance = whole
        step.share.edges = [(whole - of_b).sum(0), of_b.sum(0)]
        if step.replay.last:
            step.z = None
        return g, g, None, None


@dataclass(frozen=True, eq=False)
class Normalisation:
    """y = (x - mean) / deviation * w + b over the `last` axes of x.view(grouped); w and b broadcast over x."""

    kind: str
    grouped: list[int]
    last: int
    w: Tensor | None
    b: Tensor | None
    eps: float

    def output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and 1 / deviation."""
        y, _, s = torch.native_layer_norm(x.reshape(self.grouped), self.grouped[-self.last :], None, None, self.eps)
        y = y.view(x.shape)
        y = y if self.w is None else y * self.w
        return y if self.b is None else y + self.b, s

    def sets(self, t: Tensor, channel: int) -> Tensor:
        """t in the shape of x -> (sets that are normalised together, groups, channels, positions)."""
        t = t.reshape(self.grouped)
        if self.kind == "group_norm":  # (N, G, C / G, ...)
            return t.flatten(3) if t.dim() > 3 else t[..., None]
        t = t.movedim(channel, -self.last)  # (..., C, positions)
        return t.reshape(-1, 1, t.shape[-self.last], math.prod(t.shape[t.dim() - self.last + 1 :]))


class Norm(torch.autograd.Function):
    """A normalisation with the deviation held constant: linear in x, and b keeps its share."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Step, how: Normalisation, edges: bool) -> Tensor:
        ctx.step, ctx.how, ctx.edges = step, how, edges
        ctx.save_for_backward(x)
        return how.output(x)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        step, how, (saved,) = ctx.step, ctx.how, ctx.saved_tensors
        if step.closed:
            return (None,) * 4
        x, g, share = at_least_float32(saved), at_least_float32(g), step.share
        y, s = how.output(x)  # again: the model may have changed what came out in place
        step.arrive(y, g)
        if how.b is not None:
            share.bias = (g * how.b).sum()
        u = (g if how.w is None else g * how.w).reshape(how.grouped) * s
        gx = (u - u.mean(list(range(-how.last, 0)), keepdim=True)).view(x.shape)
        share.handed = inner(x, gx)
        if ctx.edges:
            share.edges = [centring_edges(*(how.sets(t, step.axes[1]) for t in (u, x)))]
        return gx.to(saved.dtype), None, None, None


def centring_edges(u: Tensor, x: Tensor) -> Tensor:
    """Relevance of the edges of u * (x - mean x), for x (sets O, groups G, channels C, positions P): (G C, C)."""
    e = torch.einsum("ogk,ogj->gkj", u.sum(3), x.sum(3)).div_(-x.shape[2] * x.shape[3])
    e.diagonal(dim1=1, dim2=2).add_((u * x).sum((0, 3)))
    return e.flatten(0, 1)  # (G, C, C) -> (G C, C)


class Meter(torch.autograd.Function):
    """Identity that notes the relevance passing by: as what a layer gets ("out") or hands on ("into")."""

    @staticmethod
    def forward(ctx, t: Tensor, step: Step, side: str) -> Tensor:
        ctx.step, ctx.side = step, side
        ctx.save_for_backward(t)
        return t.clone() if side == "out" else t.view_as(t)  # the model may change what comes out in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        t, share = at_least_float32(ctx.saved_tensors[0]), ctx.step.share
        if ctx.side == "out":
            ctx.step.arrive(t, at_least_float32(g))
        else:
            share.handed = (share.handed or 0.0) + (t * g).sum()
        return g, None, None


class Ratio(torch.autograd.Function):
    """y = f(x) with f(0) = 0, as y = (f(x) / x) x with a constant factor: all of R goes through."""

    @staticmethod
    def forward(ctx, x: Tensor, f: Callable[[Tensor], Tensor], in_place: bool) -> Tensor:
        y = f(x.clone() if in_place else x)
        if in_place:
            ctx.save_for_backward(ratio(x, y))
            ctx.mark_dirty(x)
            return x.copy_(y)
        ctx.save_for_backward(x, y)  # which the layers around keep anyway
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return g * (ratio(*saved) if len(saved) == 2 else saved[0]), None, None


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """y / x, and 0 where x is 0."""
    return torch.where(x == 0, 0, y / x)
