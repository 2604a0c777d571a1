"""Layers with weights: the operations, and a backward pass that is the layer's LRP rule (:mod:`zsu.relevance.rules`).

On the way they sum the relevance of every edge j -> k, and the shares that bias and stabiliser keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ZsuError
from . import sums
from .layers import Step
from .origins import Origin
from .rules import RULES, Base, Epsilon, Part, Portion, Rule, Signs, like, negative, positive, same
from .sums import along_channels, at_least_float32, inner, of_samples, over_samples, over_window

BLOCK = 2**18  # values
PARTS: dict[str, Callable[[Tensor], Tensor]] = {"x": same, "|x|": torch.abs, "+": positive, "-": negative}


class Conv(NamedTuple):
    """A convolution of any dimension; transposed too. Its options are in the order in which torch takes them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, w, None, *self)

    def backward(self, c: Tensor, x: Tensor, w: Tensor, edges: bool) -> tuple[Tensor, Tensor | None]:
        gx, gw, _ = torch.ops.aten.convolution_backward(c, x, w, None, *self, [True, edges, False])
        return gx, self.edges(w, gw) if edges else None

    def edges(self, w: Tensor, gw: Tensor) -> Tensor:
        """Sum over the kernel's window of w * gw."""
        e = over_window(w, gw)  # (K, J/groups, window) -> (K, J/groups); transposed: (J, K/groups)
        if not self.transposed:
            return e
        e = e.unflatten(0, (self.groups, -1)).transpose(1, 2)  # (J, K/g) -> (g, J/g, K/g) -> (g, K/g, J/g)
        return e.flatten(0, 1)  # (K, J/g)


class Linear:
    """A fully connected layer on (..., J)."""

    groups = 1

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def backward(self, c: Tensor, x: Tensor, w: Tensor, edges: bool) -> tuple[Tensor, Tensor | None]:
        rows_c, rows_x = c.reshape(-1, c.shape[-1]), x.reshape(-1, x.shape[-1])  # (..., K) -> (M, K)
        return c @ w, self.edges(rows_c, rows_x, w) if edges else None

    def edges(self, c: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """w * (c^T x), of c (M, K) and x (M, J)."""
        e = torch.empty(w.shape, dtype=at_least_float32(w).dtype, device=w.device)
        for rows in blocks(w):
            torch.mul(c[:, rows].T @ x, w[rows], out=e[rows])
        return e


class Affine:
    """y_k = w_k x_k + b_k per channel: a BatchNorm that no convolution can take in."""

    groups = 0

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x * along_channels(w, x, (0, 1))

    def backward(self, c: Tensor, x: Tensor, w: Tensor, edges: bool) -> tuple[Tensor, Tensor | None]:
        e = (over_samples(at_least_float32(c) * x, (0, 1)) * w)[:, None] if edges else None  # (K,) -> (K, 1)
        return (c * along_channels(w, x, (0, 1))).to(c.dtype), e


def blocks(w: Tensor) -> Iterator[slice]:
    """Rows of a weight tensor, on a CPU in blocks that fit into its cache."""
    width = w[0].numel() if len(w) else 1
    size = max(1, BLOCK // width) if w.device.type == "cpu" else max(1, len(w))
    return (slice(begin, begin + size) for begin in range(0, len(w), size))


@dataclass(eq=False, kw_only=True)
class Weighted(Step):
    """A layer with weights while the tape runs."""

    op: Conv | Linear | Affine
    x: Tensor
    origin: Origin  # of x when the layer read it
    z: Tensor
    w: Tensor
    s: Tensor | None = None  # (K,): the layer's weights are w times s, its BatchNorm's scale
    b: Tensor | None
    rule: Rule = RULES["epsilon"]  # until a composite chooses one, when the forward pass is over
    read_by: Origin | None = None  # ... of z, which says what reads it

    @property
    def takes_in_batch_norm(self) -> bool:
        """Whether a BatchNorm right behind, whose channels are on axis 1, is part of this layer."""
        if isinstance(self.op, Conv):
            return not self.op.transposed
        return isinstance(self.op, Linear) and self.x.dim() == 2

    @property
    def signs(self) -> Signs:
        """What stands around the layer says that much of signs."""
        return Signs(self.origin.nonnegative, self.read_by is not None and self.read_by.rectified)

    @property
    def changed(self) -> bool:
        """Whether it reads the model's input after arithmetic."""
        return self.origin.front is not None and bool(self.origin.front.by)

    @property
    def epsilon(self) -> float:
        """The rule's stabiliser, never so small that it is 0."""
        return max(self.rule.epsilon, torch.finfo(at_least_float32(self.z).dtype).tiny)


class FollowRule(torch.autograd.Function):
    """Hands out the layer's own output z; its backward is the layer's LRP rule."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Weighted) -> Tensor:
        z = step.z
        step.z = z.detach()  # shares memory with the output; Tape.protect copies it before a change in place
        ctx.step = step
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None]:
        step = ctx.step
        if step.closed:
            return None, None
        if step.x._version != step.origin.version:
            what = "the input of this layer is changed in place after the layer has read it"
            raise ZsuError(what, where=step.layer.name, remedy="use the out-of-place function in the model")
        gx = propagate(step, at_least_float32(step.z), at_least_float32(g))
        if step.replay.last:
            del step.x, step.z
        return gx, None


def propagate(step: Weighted, z: Tensor, g: Tensor) -> Tensor:
    """Gradient gx with x * gx = R of the layer's input, from g with z * g = R of its output; fills the share."""
    x, gx, direct, edges = step.x, None, None, None
    follow = follow_epsilon if type(step.rule) is Epsilon else quotients
    copies = follow(step, z, g)
    past = step.changed and not all(isinstance(copy.part, str) for copy, _ in copies)  # what stands in front
    for copy, c in copies:
        gp, e = step.op.backward(clamp_to(x.dtype, c), copy.x, copy.w, step.replay.edges)
        edges = e if e is None else plus(edges, e)
        if isinstance(copy.part, str) and not past:
            gx = plus(gx, gradient_of_part(gp, x, copy.part))
        else:
            direct = plus(direct, gp * copy.x)
    gx = torch.zeros_like(x) if gx is None else gx
    share = step.share
    share.edges = [] if edges is None else [edges]
    if not (step.replay.edges and isinstance(step.op, Conv)):  # edges of a convolution are few, and summed when asked
        share.handed = inner(x, gx) + (0.0 if direct is None else direct.double().sum())
    if direct is not None:
        step.replay.direct.append(direct)
    return gx


def follow_epsilon(step: Weighted, z: Tensor, g: Tensor) -> list[tuple[Copy, Tensor]]:
    """`quotients` of the epsilon rule, whose only base is the layer as it is, in one pass."""
    share = step.share
    c, R_sums, c_sums, share.magnitude, share.stabiliser = sums.epsilon_rule(z, g, step.epsilon, step.s, step.axes)
    share.relevance = of_samples(R_sums, step.replay.samples)
    if step.b is not None:
        share.bias = torch.dot(c_sums, step.b.to(c.dtype))
    return [(Copy(step, z, "x", same), c)]


def quotients(step: Weighted, z: Tensor, g: Tensor) -> list[tuple[Copy, Tensor]]:
    """The bases of the layer's rule, each with its sum over portions of coefficient * portion / zr;
    notes what stabiliser and bias keep.
    """
    bases, portions = step.rule(step.arrive(z, g), z, step.b, step.signs)
    check_split(step, bases, portions)
    bases, portions = without_negative(bases, portions) if step.origin.nonnegative else (bases, portions)
    copies = [Copy(step, z, part, change) for part, change in bases]
    sums_of_c: list[Tensor | None] = [None] * len(bases)
    for portion, coefficients, b in portions:
        c, c_sums, kept = sums.over(portion, pre_activation(step, z, copies, coefficients, b), step.epsilon, step.axes)
        step.share.stabiliser = step.share.stabiliser + kept
        if b is not None:
            step.share.bias = step.share.bias + torch.dot(c_sums, b.to(c.dtype))
        for m, coefficient in enumerate(coefficients):
            if coefficient:
                sums_of_c[m] = plus(sums_of_c[m], c, coefficient)
        del portion, c
    for copy in copies:
        vars(copy).pop("product", None)  # large, and not needed any more
    return [
        (copy, c * along_channels(step.s, c, step.axes) if copy.own and step.s is not None else c)
        for copy, c in zip(copies, sums_of_c, strict=True)
        if c is not None
    ]


def check_split(step: Weighted, bases: list[Base], portions: list[Portion]) -> None:
    """Refuse what a rule of one's own may not return, and rules of the input layer elsewhere."""
    where = step.layer.name
    parts = [part for part, _ in bases if isinstance(part, str) and part not in PARTS]
    if parts or any(len(coefficients) != len(bases) for _, coefficients, _ in portions):
        what = f"the rule has a part {parts[0]!r}" if parts else "a portion of the rule has not one coefficient a base"
        raise ZsuError(what, where=where, remedy=f"use the parts {', '.join(PARTS)}, and see zsu.rules")
    if not step.origin.is_input and not all(isinstance(part, str) for part, _ in bases):
        what = f"{type(step.rule).__name__} is a rule for layers that read the model's input"
        raise ZsuError(what, where=where, remedy="use it as Composite(first=...)")


def without_negative(bases: list[Base], portions: list[Portion]) -> tuple[list[Base], list[Portion]]:
    """What a rule comes to where no input is negative."""
    kept = [m for m, (part, _) in enumerate(bases) if not (isinstance(part, str) and part == "-")]
    bases = [("x" if isinstance(bases[m][0], str) else bases[m][0], bases[m][1]) for m in kept]
    return bases, [(portion, [coefficients[m] for m in kept], b) for portion, coefficients, b in portions]


class Copy:
    """One base of a rule: its part of the input, and its weights, computed when first needed."""

    def __init__(self, step: Weighted, z: Tensor, part: Part, change: Callable[[Tensor], Tensor]):
        self.step, self.z, self.part, self.change = step, z, part, change
        self.own = change is same and isinstance(part, str) and part == "x"  # the layer as it is

    @cached_property
    def x(self) -> Tensor:
        return part_of(self.step.x, self.part)

    @cached_property
    def w(self) -> Tensor:
        step = self.step
        if self.own or step.s is None:
            return self.change(step.w)
        w = step.w * step.s.reshape(-1, *[1] * (step.w.dim() - 1))  # (K,) -> (K, 1, ...)
        return self.change(w).to(step.x.dtype)

    @cached_property
    def product(self) -> Tensor:
        """x w, without bias."""
        step = self.step
        if self.own:
            return self.z if step.b is None else self.z - along_channels(step.b, self.z, step.axes)
        return at_least_float32(step.op.forward(self.x, self.w))


def pre_activation(
    step: Weighted, z: Tensor, copies: list[Copy], coefficients: list[float], b: Tensor | None
) -> Tensor:
    """zr = sum of coefficient * product + b; z itself where that is the same."""
    used = [(copy, coefficient) for copy, coefficient in zip(copies, coefficients, strict=True) if coefficient]
    if len(used) == 1 and used[0][0].own and used[0][1] == 1 and b is step.b:
        return z
    zr = None if b is None else along_channels(b, z, step.axes)
    for copy, coefficient in used:
        zr = plus(zr, copy.product, coefficient)
    return torch.zeros_like(z) if zr is None else zr


def part_of(x: Tensor, part: Part) -> Tensor:
    """What a base sees of the input."""
    if isinstance(part, str):
        return PARTS[part](x)
    return like(x, part)


def gradient_of_part(gp: Tensor, x: Tensor, part: str) -> Tensor:
    """gx with x * gx = part * gp."""
    if part == "x":
        return gp
    return gp * (x.sign() if part == "|x|" else x > 0 if part == "+" else x < 0)


def plus(to: Tensor | None, t: Tensor, coefficient: float = 1.0) -> Tensor:
    """to + coefficient * t, nothing computed for what is not there."""
    if to is None:
        return t if coefficient == 1 else t * coefficient
    return to.add(t, alpha=coefficient)


def clamp_to(dtype: torch.dtype, t: Tensor) -> Tensor:
    """t in that dtype, and finite in it: nothing times infinity would be NaN."""
    if t.dtype == dtype:
        return t
    most = torch.finfo(dtype).max
    return t.clamp(-most, most).to(dtype)
