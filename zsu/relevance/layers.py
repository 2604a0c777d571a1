"""What happens to relevance at one step of the forward pass; :mod:`zsu.relevance.tape` decides which step is which.

Every tensor t carries c = R / t as its gradient, so that relevance is t * grad. Layers with weights replace their
backward pass by a rule (`zsu.relevance.rules`; `Weighted`), and sum on the way the relevance of every edge j -> k and
the shares that bias and stabiliser keep. Activations that bend (GELU, ReLU6) hand on what they get (`Ratio`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ZsuError
from . import fused
from .rules import Base, Epsilon, Part, Rule, same

BLOCK = 2**18  # values
PARTS = ("x", "|x|", "+", "-")
Number = float | Tensor  # sums stay on the device as 0-dimensional tensors until somebody looks
Axes = tuple[int | None, int | None]  # of samples and of channels; None where they are not known


@dataclass(frozen=True)
class Source:
    """A run of channels that one node hands on: `group` consecutive features belong to one channel."""

    node: int  # index into Tape.nodes
    channels: int
    group: int = 1


@dataclass(eq=False)
class Node:
    """One step of the forward pass that relevance flows through: the input, a weighted layer, an addition, a norm..."""

    kind: str
    name: str = ""
    weight: str | None = None  # name of the weight parameter, where it is one
    groups: int = 1  # convolution groups; 0: every channel has only its own source (BatchNorm)
    sources: list[tuple[Source, ...] | None] = field(default_factory=list)  # one entry a summand; None: unknown
    # filled by the backward pass; N samples, K channels, J sources
    relevance: Tensor | None = None  # (N, K)
    edges: list[Tensor] = field(default_factory=list)  # weighted: one (K, J / groups); addition: (K,) per summand
    handed: Number | None = None  # relevance that went to the inputs, summed over samples; None: the sum of the edges
    bias: Number = 0.0
    stabiliser: Number = 0.0
    constant: Number = 0.0  # ... to tensors that do not depend on the input
    magnitude: Number = 0.0  # sum of |R| over all outputs
    closed: bool = False  # hands nothing on, while single paths are followed

    @property
    def out(self) -> float:
        """Relevance that arrived, summed over samples."""
        return total(self.relevance)

    @property
    def into(self) -> float:
        """Relevance that went on to the inputs, summed over samples."""
        return sum(map(total, self.edges)) if self.handed is None else float(self.handed)

    def arrived(self, z: Tensor, g: Tensor, axes: Axes, samples: int) -> Tensor:
        """Note the relevance R = z g of the outputs, and return it."""
        if fused.fits(axes, z, g):
            R, self.relevance, self.magnitude = fused.arrive(z, g, axes[1])
            self.relevance = of_samples(self.relevance, samples)
        else:
            R = z * g
            self.relevance, self.magnitude = by_sample(R, axes, samples), torch.linalg.vector_norm(R, 1)
        return R

    def clear(self) -> None:
        """Forget what an earlier backward pass noted."""
        self.relevance, self.edges, self.handed = None, [], None
        self.bias = self.stabiliser = self.constant = self.magnitude = 0.0


# --- weighted operations -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """A convolution of any dimension; transposed too."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    transposed: bool = False
    output_padding: list[int] = field(default_factory=lambda: [0])

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(
            x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def backward(self, c: Tensor, x: Tensor, w: Tensor, edges: bool) -> tuple[Tensor, Tensor | None]:
        gx, gw, _ = torch.ops.aten.convolution_backward(
            c, x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, [True, edges, False],
        )  # fmt: skip
        return gx, self.edges(w, gw) if edges else None

    def edges(self, w: Tensor, gw: Tensor) -> Tensor:
        """Sum over the kernel's window of w * gw."""
        if fused.fits((0, 1), w, gw):
            e = fused.window(w, gw)  # (K, J/groups, window) -> (K, J/groups); transposed: (J, K/groups)
        else:
            e = (at_least_float32(gw) * w).flatten(2).sum(2)
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
        return c @ w, self.edges(c.flatten(0, -2), x.flatten(0, -2), w) if edges else None  # (..., K) -> (M, K)

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


@dataclass(eq=False)
class Layer:
    """A weighted layer while the tape runs: its operation, tensors, rule and node."""

    node: Node
    op: Conv | Linear | Affine
    x: Tensor
    w: Tensor
    s: Tensor | None  # (K,): the layer's weights are w times s, its BatchNorm's scale
    b: Tensor | None
    nonnegative: bool  # of x
    reads_input: bool  # x is the model's input itself
    edges: bool
    batch: int | None  # axis of x and of the output that holds the samples
    samples: int
    z: Tensor  # the output
    version: int  # of x when the layer read it
    rule: Rule | None = None  # chosen by a composite when the forward pass is over
    keep: bool = False  # another backward pass follows
    direct: Tensor | None = None  # relevance of x that is no multiple of x, for rules of the input layer

    @property
    def axes(self) -> Axes:
        """Of x and of the output."""
        return self.batch, channel_axis(self.op, self.x)


class Weighted(torch.autograd.Function):
    """Hands out the layer's own output z; its backward is the layer's LRP rule."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Layer) -> Tensor:
        z = layer.z
        layer.z = z.detach()  # shares memory with the output; Tape.protect copies it before a change in place
        ctx.layer = layer
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        if ctx.layer.node.closed:
            return None, None
        if ctx.layer.x._version != ctx.layer.version:
            raise ZsuError(
                "the input of this layer is changed in place after the layer has read it",
                where=ctx.layer.node.name,
                remedy="use the out-of-place function in the model",
            )
        return propagate(ctx.layer, g), None


def propagate(layer: Layer, g: Tensor) -> Tensor:
    """Gradient gx with x * gx = R of the layer's input, from g with z * g = R of its output; fills the node."""
    op, x = layer.op, layer.x
    z, g = at_least_float32(layer.z), at_least_float32(g)
    if isinstance(layer.rule, Epsilon) and fused.fits(layer.axes, z, g):
        return propagate_epsilon(layer, z, g)
    copies, shares = quotients(layer, z, g)
    gx, edges = None, None
    for base, share in zip(copies, shares, strict=True):
        if share is None:
            continue
        if base.own and layer.s is not None:
            share = share * along_channels(layer.s, share, layer.axes)
        gp, e = op.backward(narrowed(share, x.dtype), base.x, base.w, layer.edges)
        if isinstance(base.part, str):
            gx = added(gx, signed(gp, x, base.part))
        else:
            layer.direct = added(layer.direct, gp * base.x)
        if layer.edges:
            edges = added(edges, e)
    return finish(layer, torch.zeros_like(x) if gx is None else gx, edges)


def quotients(layer: Layer, z: Tensor, g: Tensor) -> tuple[list[Copy], list[Tensor | None]]:
    """The bases of the layer's rule, and for each the sum over portions of coefficient * share / zr."""
    node = layer.node
    R = node.arrived(z, g, layer.axes, layer.samples)
    bases, portions = layer.rule(R, z, layer.b, layer.nonnegative)
    check_split(layer, bases, portions)
    bases, portions = without_negative(bases, portions) if layer.nonnegative else (bases, portions)
    if not layer.reads_input and not all(isinstance(part, str) for part, _ in bases):
        raise ZsuError(
            f"{type(layer.rule).__name__} is a rule for layers that read the model's input",
            where=node.name,
            remedy="use it as Composite(first=...)",
        )
    copies = [Copy(layer, z, part, change) for part, change in bases]
    shares: list[Tensor | None] = [None] * len(bases)
    for portion, coefficients, b in portions:
        c, sums = over_stabilised(portion, pre_activation(layer, z, copies, coefficients, b), layer)
        if b is not None:
            node.bias = node.bias + torch.dot(sums, b.to(c.dtype))
        for m, coefficient in enumerate(coefficients):
            if coefficient:
                shares[m] = added(shares[m], c, coefficient)
        del portion, c
    for copy in copies:
        vars(copy).pop("product", None)  # large, and not needed any more
    return copies, shares


def check_split(layer: Layer, bases: list[Base], portions: list) -> None:
    """Refuse what a rule of one's own may not return."""
    parts = [part for part, _ in bases if isinstance(part, str) and part not in PARTS]
    if parts or any(len(coefficients) != len(bases) for _, coefficients, _ in portions):
        what = f"the rule has a part {parts[0]!r}" if parts else "a portion of the rule has not one coefficient a base"
        raise ZsuError(what, where=layer.node.name, remedy=f"use the parts {', '.join(PARTS)}, and see zsu.rules")


def propagate_epsilon(layer: Layer, z: Tensor, g: Tensor) -> Tensor:
    """The same for the epsilon rule, with everything but the weights in one pass over memory."""
    node, epsilon = layer.node, max(layer.rule.epsilon, torch.finfo(z.dtype).tiny)
    c, sums, c_sums, node.magnitude, node.stabiliser = fused.epsilon_rule(z, g, epsilon, layer.s, layer.axes[1])
    node.relevance = of_samples(sums, layer.samples)
    if layer.b is not None:
        node.bias = torch.dot(c_sums, layer.b.to(c.dtype))
    return finish(layer, *layer.op.backward(narrowed(c, layer.x.dtype), layer.x, layer.w, layer.edges))


def finish(layer: Layer, gx: Tensor, edges: Tensor | None) -> Tensor:
    """Note where the relevance went, and let go of what is not needed any more."""
    layer.node.edges = [edges] if layer.edges else []
    if not (layer.edges and isinstance(layer.op, Conv)):  # edges of a convolution are few, and summed when asked for
        layer.node.handed = inner(layer.x, gx) + (0.0 if layer.direct is None else total(layer.direct))
    if not layer.keep:
        layer.x = layer.z = None
    return gx


def without_negative(bases: list[Base], portions: list) -> tuple[list[Base], list]:
    """What a rule comes to where no input is negative."""
    kept = [m for m, (part, _) in enumerate(bases) if not (isinstance(part, str) and part == "-")]
    bases = [("x" if isinstance(bases[m][0], str) else bases[m][0], bases[m][1]) for m in kept]
    return bases, [(portion, [coefficients[m] for m in kept], b) for portion, coefficients, b in portions]


class Copy:
    """One base of a rule: its share of the input, and its weights, computed when first needed."""

    def __init__(self, layer: Layer, z: Tensor, part: Part, change: Callable[[Tensor], Tensor]):
        self.layer, self.z, self.part, self.change = layer, z, part, change
        self.own = change is same and isinstance(part, str) and part == "x"  # the layer as it is

    @cached_property
    def x(self) -> Tensor:
        return part_of(self.layer.x, self.part)

    @cached_property
    def w(self) -> Tensor:
        layer = self.layer
        if self.own or layer.s is None:
            return self.change(layer.w)
        w = layer.w * layer.s.reshape(-1, *[1] * (layer.w.dim() - 1))  # (K,) -> (K, 1, ...)
        return self.change(w).to(layer.x.dtype)

    @cached_property
    def product(self) -> Tensor:
        """x w, without bias."""
        layer = self.layer
        if self.own:
            return self.z if layer.b is None else self.z - along_channels(layer.b, self.z, layer.axes)
        return at_least_float32(layer.op.forward(self.x, self.w))


def pre_activation(layer: Layer, z: Tensor, copies: list[Copy], coefficients: list[float], b: Tensor | None) -> Tensor:
    """zr = sum of coefficient * product + b; z itself where that is the same."""
    used = [(copy, coefficient) for copy, coefficient in zip(copies, coefficients, strict=True) if coefficient]
    if len(used) == 1 and used[0][0].own and used[0][1] == 1 and b is layer.b:
        return z
    zr = None if b is None else along_channels(b, z, layer.axes)
    for copy, coefficient in used:
        zr = added(zr, copy.product, coefficient)
    return torch.zeros_like(z) if zr is None else zr


def over_stabilised(portion: Tensor, zr: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """c = portion / (zr + sign(zr) epsilon), sign(0) = 1, and its sums (K,); notes what the stabiliser keeps."""
    epsilon = max(layer.rule.epsilon, torch.finfo(zr.dtype).tiny)
    if fused.fits(layer.axes, zr, portion):
        c, sums, kept = fused.over(portion, zr, epsilon, layer.axes[1])
    else:
        stabiliser = torch.where(zr < 0, zr.new_tensor(-epsilon), epsilon)
        c = portion / (zr + stabiliser)
        sums, kept = over_samples(c, layer.axes), inner(c, stabiliser)
    layer.node.stabiliser = layer.node.stabiliser + kept
    return c, sums


def part_of(x: Tensor, part: Part) -> Tensor:
    """What a base sees of the input."""
    if isinstance(part, str):
        return {"x": lambda: x, "|x|": x.abs, "+": lambda: x.clamp(min=0), "-": lambda: x.clamp(max=0)}[part]()
    return torch.as_tensor(part, dtype=x.dtype, device=x.device).expand_as(x)


def signed(gp: Tensor, x: Tensor, part: str) -> Tensor:
    """gx with x * gx = part * gp."""
    if part == "x":
        return gp
    return gp * {"|x|": x.sign, "+": lambda: x > 0, "-": lambda: x < 0}[part]()


def added(to: Tensor | None, t: Tensor, coefficient: float = 1.0) -> Tensor:
    """to + coefficient * t, nothing computed for what is not there."""
    if to is None:
        return t if coefficient == 1 else t * coefficient
    return to.add(t, alpha=coefficient)


def narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype, and finite in it: nothing times infinity would be NaN."""
    if t.dtype == dtype:
        return t
    most = torch.finfo(dtype).max
    return t.clamp(-most, most).to(dtype)


def at_least_float32(t: Tensor) -> Tensor:
    """float16 and bfloat16 hold too few digits and too small a range for quotients and sums."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


# --- other steps ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Summands:
    """An addition z = a + b while the tape runs."""

    node: Node
    axes: Axes
    samples: int
    z: Tensor | None = None
    keep: bool = False  # another backward pass follows


class Addition(torch.autograd.Function):
    """a + b; its backward sums the relevance each summand gets."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, summands: Summands, in_place: bool) -> Tensor:
        z = a.add_(b) if in_place else a + b
        if in_place:
            ctx.mark_dirty(a)
        summands.z = z.detach()  # shares memory with the output; Tape.protect copies it before a change in place
        ctx.summands = summands
        ctx.save_for_backward(b)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        summands, (b,) = ctx.summands, ctx.saved_tensors
        z, axes, samples, node = summands.z, summands.axes, summands.samples, summands.node
        if node.closed:
            return (None,) * 4
        if fused.fits(axes, z, b, g):
            whole, of_b, node.magnitude = fused.split(z, b, g, axes[1])
            whole, of_b = of_samples(whole, samples), of_samples(of_b, samples)
        else:
            R = at_least_float32(z) * g
            whole, of_b = (by_sample(t, axes, samples) for t in (R, at_least_float32(b) * g))  # (N, K) each
            node.magnitude = torch.linalg.vector_norm(R, 1)
        node.relevance = whole
        node.edges = [(whole - of_b).sum(0), of_b.sum(0)]
        if not summands.keep:
            summands.z = None
        return g, g, None, None


class Norm(torch.autograd.Function):
    """y = (x - mean) / deviation * w + b with the deviation held constant: linear in x, and b keeps its share.

    x is normalised over the `last` axes of x.view(grouped); w and b broadcast over x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, node: Node, axes: Axes, samples: int, grouped: list[int], last: int, w, b, eps, edges):
        ctx.node, ctx.axes, ctx.samples, ctx.grouped, ctx.last = node, axes, samples, grouped, last
        ctx.w, ctx.b, ctx.eps, ctx.edges = w, b, eps, edges
        ctx.save_for_backward(x)
        return Norm.output(ctx, x)[0]

    @staticmethod
    def output(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and 1 / deviation."""
        y, _, s = torch.native_layer_norm(x.reshape(ctx.grouped), ctx.grouped[-ctx.last :], None, None, ctx.eps)
        y = y.view(x.shape)
        y = y if ctx.w is None else y * ctx.w
        return y if ctx.b is None else y + ctx.b, s

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.node.closed:
            return (None,) * 10
        (saved,) = ctx.saved_tensors
        x, g, node = at_least_float32(saved), at_least_float32(g), ctx.node
        y, s = Norm.output(ctx, x)  # again: the model may have changed what came out in place
        node.arrived(y, g, ctx.axes, ctx.samples)
        if ctx.b is not None:
            node.bias = (g * ctx.b).sum()
        u = (g if ctx.w is None else g * ctx.w).reshape(ctx.grouped) * s
        gx = (u - u.mean(list(range(-ctx.last, 0)), keepdim=True)).view(x.shape)
        node.handed = inner(x, gx)
        if ctx.edges:
            sets = group_sets if node.kind == "group_norm" else layer_sets
            node.edges = [centring_edges(*(sets(t.reshape(ctx.grouped), ctx.axes[1], ctx.last) for t in (u, x)))]
        return gx.to(saved.dtype), *[None] * 9


def group_sets(t: Tensor, channel: int, last: int) -> Tensor:
    """(N, G, C / G, ...) -> (sets that are normalised together, groups, channels, positions)."""
    return t.flatten(3) if t.dim() > 3 else t[..., None]


def layer_sets(t: Tensor, channel: int, last: int) -> Tensor:
    """The same of a tensor whose last axes are normalised together, the channels among them."""
    t = t.movedim(channel, -last)  # (..., C, positions)
    return t.reshape(-1, 1, t.shape[-last], math.prod(t.shape[t.dim() - last + 1 :]))


def centring_edges(u: Tensor, x: Tensor) -> Tensor:
    """Relevance of the edges of u * (x - mean x), for x (sets O, groups G, channels C, positions P): (G C, C)."""
    e = torch.einsum("ogk,ogj->gkj", u.sum(3), x.sum(3)).div_(-x.shape[2] * x.shape[3])
    e.diagonal(dim1=1, dim2=2).add_((u * x).sum((0, 3)))
    return e.flatten(0, 1)


class Meter(torch.autograd.Function):
    """Identity that notes the relevance passing by: as what a node gets ("out") or hands on ("into")."""

    @staticmethod
    def forward(ctx, t: Tensor, node: Node, side: str, axes: Axes, samples: int) -> Tensor:
        ctx.node, ctx.side, ctx.axes, ctx.samples = node, side, axes, samples
        ctx.save_for_backward(t)
        return t.clone() if side == "out" else t.view_as(t)  # the model may change what comes out in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        t = at_least_float32(ctx.saved_tensors[0])
        if ctx.side == "out":
            ctx.node.arrived(t, at_least_float32(g), ctx.axes, ctx.samples)
        else:
            ctx.node.handed = (ctx.node.handed or 0.0) + (t * g).sum()
        return g, None, None, None, None


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


class Overwrite(torch.autograd.Function):
    """Write b over a in place: what an operation in place comes to when it is computed out of place."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.mark_dirty(a)
        return a.copy_(b)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[None, Tensor]:
        return None, g


# --- sums over axes -------------------------------------------------------------------------------------------


def channel_axis(op: Conv | Linear | Affine, x: Tensor) -> int:
    """Axis of the channels in what the operation reads and returns."""
    return x.dim() - 1 if isinstance(op, Linear) else 1


def along_channels(v: Tensor, like: Tensor, axes: Axes) -> Tensor:
    """(K,) -> (1, K, 1, ...) so that it broadcasts over `like`."""
    shape = [1] * like.dim()
    shape[axes[1]] = -1
    return v.reshape(shape)


def over_positions(t: Tensor, axes: Axes) -> Tensor:
    """Sum all but samples and channels: (N, K); (1, K) where samples are not known, (N, 1) where channels are not."""
    batch, channel = axes
    others = [axis for axis in range(t.dim()) if axis not in axes]
    t = t.sum(others) if others else t  # the axes that are known
    if batch is None and channel is None:
        return t[None, None]
    if batch is None or channel is None:
        return t[None] if batch is None else t[:, None]
    return t if batch < channel else t.T


def by_sample(t: Tensor, axes: Axes, samples: int) -> Tensor:
    """`over_positions` with the windows of each sample, that some models spread over the batch axis, summed too."""
    return of_samples(over_positions(t, axes), samples)


def of_samples(t: Tensor, samples: int) -> Tensor:
    """(N windows, K) -> (N, K); (1, K) stays."""
    return t if len(t) in (1, samples) else t.unflatten(0, (samples, -1)).sum(1)


def over_samples(t: Tensor, axes: Axes) -> Tensor:
    """(K,): the sum of all but the channels."""
    return t.sum([axis for axis in range(t.dim()) if axis != axes[1]])


def total(t: Tensor) -> float:
    """Sum in float64."""
    return float(t.double().sum())


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b, 0-dimensional; in one pass where both lie in memory alike and without gaps."""
    a, b = at_least_float32(a), at_least_float32(b)
    dense = a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
    if not dense or a.stride() != b.stride():
        return (a * b).sum()
    return torch.dot(*(t.as_strided((t.numel(),), (1,)) for t in (a, b)))
