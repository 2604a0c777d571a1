"""The tape: records a forward pass of an unmodified model and rewrites its backward pass into LRP.

Every tensor t carries c = R / t as its gradient, so that relevance is t * grad and needs no rule for additions,
pools, ReLU, flatten or anything else that is linear or a masked identity. Only layers with weights are rewritten:
their backward (:meth:`Weighted.backward`) follows a rule of :mod:`zsu.rules`, and sums on the way the relevance of
every edge j -> k and the shares that bias and stabiliser swallow.

A `TorchFunctionMode` sees each torch function that the model calls. No hook is registered and no module replaced,
so reused modules, functional calls and in-place calls are right, and nothing is left behind after an exception.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .errors import ZsuError
from .rules import Rule


@dataclass(frozen=True)
class Source:
    """A run of channels that one node hands on: `group` consecutive features belong to one channel."""

    node: int  # index into Tape.nodes
    channels: int
    group: int = 1


@dataclass(eq=False)
class Node:
    """One step of the forward pass that relevance flows through: the input, a weighted layer or an addition."""

    kind: str
    name: str = ""
    weight: str | None = None  # name of the weight parameter, where it is one
    groups: int = 1  # convolution groups; 0: every channel has only its own source (BatchNorm)
    sources: list[tuple[Source, ...] | None] = field(default_factory=list)  # one entry a summand; None: unknown
    # filled by the backward pass; N samples, K channels, J sources
    relevance: Tensor | None = None  # (N, K)
    edges: list[Tensor] = field(default_factory=list)  # weighted: one (K, J / groups); addition: (K,) per summand
    out: float = 0.0  # relevance that arrived, summed over samples
    into: float = 0.0  # ... handed to the inputs
    bias: float = 0.0
    stabiliser: float = 0.0


@dataclass
class Origin:
    """What the tape knows of a tensor: where its channels come from, and that nothing in it is negative."""

    sources: tuple[Source, ...] | None
    nonnegative: bool = False
    layer: Layer | None = None  # set on the direct output of a weighted layer


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

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.ops.aten.convolution(
            x, w, b, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def backward(self, c: Tensor, x: Tensor, w: Tensor, edges: bool) -> tuple[Tensor, Tensor | None]:
        gx, gw, _ = torch.ops.aten.convolution_backward(
            c, x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, [True, edges, False],
        )  # fmt: skip
        return gx, gw

    def edges(self, w: Tensor, gw: Tensor) -> Tensor:
        e = (w * gw).flatten(2).sum(2)  # (K, J/groups, window) -> (K, J/groups); transposed: (J, K/groups)
        if not self.transposed:
            return e
        e = e.unflatten(0, (self.groups, -1)).transpose(1, 2)  # (J, K/g) -> (g, J/g, K/g) -> (g, K/g, J/g)
        return e.flatten(0, 1)  # (K, J/g)


class Linear:
    """A fully connected layer on (..., J)."""

    groups = 1

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, w, b)

    def backward(self, c: Tensor, x: Tensor, w: Tensor, edges: bool) -> tuple[Tensor, Tensor | None]:
        gw = c.flatten(0, -2).T @ x.flatten(0, -2) if edges else None  # (M, K)^T (M, J) -> (K, J)
        return c @ w, gw

    def edges(self, w: Tensor, gw: Tensor) -> Tensor:
        return w * gw


class Affine:
    """y_k = w_k x_k + b_k per channel: a BatchNorm that no convolution can take in."""

    groups = 0

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = x * per_channel(w, x)
        return z if b is None else z + per_channel(b, x)

    def backward(self, c: Tensor, x: Tensor, w: Tensor, edges: bool) -> tuple[Tensor, Tensor | None]:
        return c * per_channel(w, x), over_positions(c * x).sum(0) if edges else None

    def edges(self, w: Tensor, gw: Tensor) -> Tensor:
        return (w * gw)[:, None]  # (K,) -> (K, 1)


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """(K,) -> (1, K, 1, ...) so that it broadcasts over `like` (N, K, ...)."""
    return v.reshape(1, -1, *[1] * (like.dim() - 2))


def over_positions(t: Tensor, axis: int = 1) -> Tensor:
    """Sum all but sample and channel: (N, K, ...) -> (N, K); with axis -1, (N, ..., K) -> (N, K)."""
    if t.dim() == 2:
        return t
    return t.flatten(2).sum(2) if axis == 1 else t.flatten(1, -2).sum(1)


@dataclass(eq=False)
class Layer:
    """A weighted layer while the tape runs: its operation, tensors, rule and node."""

    node: Node
    op: Conv | Linear | Affine
    x: Tensor
    w: Tensor
    b: Tensor | None
    rule: Rule
    nonnegative: bool  # of x
    edges: bool
    z: Tensor  # the output
    version: int  # of x when the layer read it

    @property
    def axis(self) -> int:
        return -1 if isinstance(self.op, Linear) else 1


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
        if ctx.layer.x._version != ctx.layer.version:
            raise ZsuError(
                "the input of this layer is changed in place after the layer has read it",
                where=ctx.layer.node.name,
                remedy="use the out-of-place function in the model",
            )
        return propagate(ctx.layer, g), None


def propagate(layer: Layer, g: Tensor) -> Tensor:
    """Gradient c with x * c = R of the layer's input, from g with z * g = R of its output; fills the node."""
    node, op, x, z = layer.node, layer.op, layer.x, layer.z
    R = z * g
    relevance = over_positions(R, layer.axis)
    edges, gx = None, None
    for portion, terms in layer.rule(R, z, layer.w, layer.b):
        terms = [t for t in terms if not (layer.nonnegative and t[0] == "-")]
        parts = [part_of(x, part, layer.nonnegative) for part, _, _ in terms]
        plain = len(terms) == 1 and terms[0][1] is layer.w and parts[0] is x
        zr = z if plain else sum(op.forward(p, w, b) for p, (_, w, b) in zip(parts, terms, strict=True))
        denominator = stabilised(zr, layer.rule.epsilon)
        c = portion / denominator
        node.stabiliser += total(c * (denominator - zr))
        for p, (_, w, b) in zip(parts, terms, strict=True):
            gp, gw = op.backward(c, p, w, layer.edges)
            if p is not x:
                gp = gp * (p != 0)
            gx = gp if gx is None else gx.add_(gp)
            if layer.edges:
                e = op.edges(w, gw)
                edges = e if edges is None else edges.add_(e)
            if b is not None:
                node.bias += float(over_positions(c, layer.axis).double().sum(0) @ b.double())
    if gx is None:  # no relevance arrived
        gx = torch.zeros_like(x)
    if layer.edges and edges is None:
        edges = op.edges(layer.w, torch.zeros_like(layer.w))
    node.out += total(relevance)
    node.into += total(edges) if layer.edges else total(x * gx)
    node.relevance = relevance
    node.edges = [edges] if layer.edges else []
    layer.x = layer.z = None
    return gx


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z + sign(z) epsilon with sign(0) = 1, never 0 in z's dtype."""
    epsilon = max(epsilon, torch.finfo(z.dtype).tiny)
    return torch.where(z < 0, z - epsilon, z + epsilon)


def part_of(x: Tensor, part: str, nonnegative: bool) -> Tensor:
    """The share of x that a term sees; x itself where it is the same."""
    if part == "x" or (part == "+" and nonnegative):
        return x
    return x.clamp(min=0) if part == "+" else x.clamp(max=0)


def total(t: Tensor) -> float:
    """Sum in float64."""
    return float(t.sum(dtype=torch.float64))


class Addition(torch.autograd.Function):
    """a + b; its backward sums the relevance each summand gets."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, node: Node, in_place: bool) -> Tensor:
        ctx.node = node
        ctx.save_for_backward(a.clone() if in_place else a, b)
        if in_place:
            ctx.mark_dirty(a)
            return a.add_(b)
        return a + b

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        shares = [over_positions(t * g) for t in ctx.saved_tensors]  # (N, K) each
        node = ctx.node
        node.relevance = shares[0] + shares[1]
        node.edges = [s.sum(0) for s in shares]
        node.out = total(node.relevance)
        node.into = sum(total(e) for e in node.edges)
        return g, g, None, None


# --- the mode ------------------------------------------------------------------------------------------------

CONV = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
CONV_TRANSPOSE = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
# f(x) = a(x) * x with a(x) constant around x, or linear in x, channel by channel: gradient times input is exact.
PER_CHANNEL = set(
    "relu relu_ dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout contiguous clone pad "
    "leaky_relu leaky_relu_ max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate".split()
)
SIGN_CHANGING = {"pad", "interpolate", "mul", "mul_", "div", "div_"}
# The same, but channels may move: relevance is exact, the path graph follows only the first group.
REGROUPING = set("flatten reshape view squeeze".split())
REARRANGING = set("mean permute transpose unsqueeze expand chunk split unbind __getitem__ sum".split())
# Return no tensor, and yet what follows depends on the input.
HIDING = set("item tolist numpy __array__ __float__ __int__ __setitem__ __set__".split())
# with a tensor that does not depend on the input, or a number
SCALING = {"mul", "mul_", "div", "div_"}


class Tape(TorchFunctionMode):
    """Records the forward pass of `model` on one batch; see the module's docstring.

    Attributes
    ----------
    nodes : list of Node
        In the order of the forward pass; node 0 is the input.
    constants : list of Tensor
        Tensors that do not depend on the input but join it (position embeddings, class tokens); their share of the
        relevance is constant * gradient.
    """

    def __init__(self, model: nn.Module, rule: Rule, edges: bool):
        super().__init__()
        self.rule, self.edges = rule, edges
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.origins: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.layers: list[Layer] = []
        self.nodes: list[Node] = []
        self.constants: list[Tensor] = []

    def start(self, x: Tensor) -> None:
        """Declare x (N, C, ...) the input."""
        self.nodes.append(Node("input", "input"))
        self.origins[x] = Origin((Source(0, x.shape[1]),), nonnegative=bool((x >= 0).all()))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = [t for t in tensors_in((*args, *kwargs.values())) if t in self.origins]
        if not known:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in CONV or name in CONV_TRANSPOSE:
            return self.convolution(func, name, *args, **kwargs)
        if name in ("linear", "batch_norm"):
            return getattr(self, name)(func, *args, **kwargs)
        if name in ("add", "add_", "__add__", "__radd__", "__iadd__"):
            return self.add(*args, in_place=name in ("add_", "__iadd__"), **kwargs)
        if name == "cat":
            return self.cat(*args, **kwargs)
        return self.other(func, name, args, kwargs, known)

    # -- weighted layers

    def convolution(self, func, name, input, weight, bias=None, stride=1, padding=0, *rest, **kwargs):
        dim = CONV.get(name) or CONV_TRANSPOSE[name]
        transposed = name in CONV_TRANSPOSE
        keys = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        options = {"dilation": 1, "groups": 1, "output_padding": 0} | dict(zip(keys, rest, strict=False)) | kwargs
        groups = options["groups"]
        wanted = weight.shape[0] if transposed else weight.shape[1] * groups
        where = self.where(weight, name)
        if input.dim() != dim + 2 or input.shape[1] != wanted:
            shape = ", ".join(["N", str(wanted), "D", "H", "W"][:2] + ["D", "H", "W"][-dim:])
            raise ZsuError(
                f"its input has shape {tuple(input.shape)}, it wants ({shape})",
                where=where,
                remedy="pass a batch with that number of channels",
            )
        value = self.value(func, where, input, weight, bias, stride, padding, *rest, **kwargs)
        stride, dilation = as_list(stride, dim), as_list(options["dilation"], dim)
        if padding == "same":
            padding = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]  # both sides together
            if any(p % 2 for p in padding):
                input = self.pad_unevenly(input, padding)
                padding = [0] * dim
            else:
                padding = [p // 2 for p in padding]
        padding = [0] * dim if padding == "valid" else as_list(padding, dim)
        op = Conv(stride, padding, dilation, groups, transposed, as_list(options["output_padding"], dim))
        return self.weighted(name, op, input, weight, bias, value)

    def pad_unevenly(self, x: Tensor, both: list[int]) -> Tensor:
        """padding="same" of an even kernel: torch puts the odd pixel behind."""
        sides = [s for p in reversed(both) for s in (p // 2, p - p // 2)]
        out = F.pad(x, sides)
        self.origins[out] = Origin(self.origins[x].sources, self.origins[x].nonnegative)
        return out

    def linear(self, func, input, weight, bias=None):
        where = self.where(weight, "linear")
        if input.shape[-1] != weight.shape[1]:
            raise ZsuError(
                f"its input has shape {tuple(input.shape)}, it wants (..., {weight.shape[1]})",
                where=where,
                remedy="pass images of the size that the model was built for",
            )
        value = self.value(func, where, input, weight, bias)
        return self.weighted("linear", Linear(), input, weight, bias, value)

    def batch_norm(
        self, func, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        """y = s x + t. Right after a convolution or a Linear on (N, J): one weighted layer (w s, b s + t); elsewhere an
        affine layer of its own.
        """
        if training or running_mean is None:
            raise ZsuError(
                "BatchNorm computes the statistics of the batch",
                where=self.where(weight, "batch_norm"),
                remedy="call model.eval(); BatchNorm without running statistics cannot be explained",
            )
        with torch.no_grad():
            s = torch.rsqrt(running_var + eps)
            s = s if weight is None else s * weight
            t = -running_mean * s if bias is None else bias - running_mean * s
        value = self.value(func, "batch_norm", input, running_mean, running_var, weight, bias, False, momentum, eps)
        layer = self.origins[input].layer
        merges = layer is not None and (
            not layer.op.transposed if isinstance(layer.op, Conv) else isinstance(layer.op, Linear) and input.dim() == 2
        )
        if not merges:
            return self.weighted("batch_norm", Affine(), input, s, t, value, name=self.where(weight, "batch_norm"))
        with torch.no_grad():
            w = layer.w * s.reshape(-1, *[1] * (layer.w.dim() - 1))  # (K,) -> (K, 1, ...)
            b = t if layer.b is None else layer.b * s + t
        return self.weighted(layer.node.kind, layer.op, layer.x, w, b, value, name=layer.node.name, like=layer)

    def value(self, func, where, *args, **kwargs) -> Tensor:
        """The layer's own output; what torch refuses is said with the layer's name."""
        try:
            with torch.no_grad():
                return func(*args, **kwargs)
        except RuntimeError as error:
            remedy = "give images of the model's dtype, device and size"
            raise ZsuError(str(error).splitlines()[0], where=where, remedy=remedy) from error

    def weighted(self, kind, op, x, w, b, value, name=None, like=None) -> Tensor:
        origin = self.origins[x]
        weight_name = like.node.weight if like else self.names.get(id(w))
        follows_channels = x.dim() == 2 or not isinstance(op, Linear)  # a Linear on (N, C, J) mixes the last axis
        sources = origin.sources if follows_channels else None
        node = Node(kind, name or self.where(w, kind), weight_name, op.groups, [sources])
        layer = Layer(
            node,
            op,
            x,
            w.detach(),
            None if b is None else b.detach(),
            self.rule,
            origin.nonnegative,
            self.edges,
            value,
            like.version if like else x._version,
        )
        self.nodes.append(node)
        self.layers.append(layer)
        out = Weighted.apply(x, layer)
        channels = out.shape[layer.axis]
        known = layer.axis == 1 or out.dim() == 2
        self.origins[out] = Origin((Source(len(self.nodes) - 1, channels),) if known else None, layer=layer)
        return out

    def where(self, parameter: Tensor | None, kind: str) -> str:
        """The layer's name: that of its parameter without the last part."""
        name = self.names.get(id(parameter))
        return name.rpartition(".")[0] if name else kind

    # -- operations without weights

    def add(self, a, b, *, alpha=1, in_place=False):
        if alpha != 1 or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            raise ZsuError("addition of a number or with alpha", where="add", remedy="explain a model without it")
        if a not in self.origins or b not in self.origins:
            return self.add_constant(a, b, in_place)
        if a.shape != b.shape:
            raise ZsuError(f"adds {tuple(a.shape)} and {tuple(b.shape)}", where="add", remedy="use equal shapes")
        if in_place:
            self.protect(a)
        of_a, of_b = self.origins[a], self.origins[b]
        node = Node("add", "add", sources=[of_a.sources, of_b.sources])
        self.nodes.append(node)
        out = Addition.apply(a, b, node, in_place)
        known = (
            of_a.sources is not None
            and of_b.sources is not None
            and all(s.group == 1 for s in (*of_a.sources, *of_b.sources))
        )
        sources = (Source(len(self.nodes) - 1, out.shape[1]),) if known else None
        self.origins[out] = Origin(sources, of_a.nonnegative and of_b.nonnegative)
        return out

    def add_constant(self, a: Tensor, b: Tensor, in_place: bool) -> Tensor:
        x, constant = (a, b) if a in self.origins else (b, a)
        if in_place and x is b:
            raise ZsuError("adds the input's flow to a fixed tensor in place", where="add_", remedy="use a + b")
        if in_place:
            self.protect(a)
        leaf = constant.detach().requires_grad_()
        self.constants.append(leaf)
        out = a.add_(leaf) if in_place else x + leaf
        self.origins[out] = Origin(self.origins[x].sources)
        return out

    def cat(self, tensors, dim=0):
        joined = []
        for t in tensors:
            if t not in self.origins:
                t = t.detach().requires_grad_()
                self.constants.append(t)
            joined.append(t)
        out = torch.cat(joined, dim)
        origins = [self.origins.get(t) for t in joined]
        known = dim == 1 and all(o is not None and o.sources is not None for o in origins)
        self.origins[out] = Origin(
            tuple(s for o in origins for s in o.sources) if known else None,
            all(o is not None and o.nonnegative for o in origins),
        )
        return out

    def other(self, func, name, args, kwargs, known):
        x = known[0]
        origin = self.origins[x]
        scaled = name in SCALING and len(known) == 1 and (name.startswith("mul") or args[0] is x)
        if not (scaled or name in PER_CHANNEL | REGROUPING | REARRANGING):
            return self.unknown(func, name, args, kwargs)
        if "dropout" in name and bound(args, kwargs, 2, "training", True):
            raise ZsuError("dropout is active", where=name, remedy="call model.eval(), or pass training=False")
        if name == "pad" and bound(args, kwargs, 3, "value", None):
            raise ZsuError("pads with a value other than 0", where="pad", remedy="pad with 0 in the model")
        in_place = name.endswith("_") or kwargs.get("inplace")
        if in_place and not name.startswith("relu"):  # a ReLU in place zeroes only what gets no relevance
            self.protect(x)
        out = func(*args, **kwargs)
        sources = origin.sources if scaled or name in PER_CHANNEL else None
        if name in REGROUPING:
            sources = regrouped(origin.sources, x, out)
        if name == "mean" and (axes := bound(args, kwargs, 1, "dim", None)) is not None:
            sources = origin.sources if all(axis % x.dim() >= 2 for axis in as_list(axes, 1)) else None
        nonnegative = name in ("relu", "relu_") or (origin.nonnegative and name not in SIGN_CHANGING)
        for t in tensors_in(out if isinstance(out, (tuple, list)) else (out,)):
            if t.is_floating_point():
                self.origins[t] = Origin(sources, nonnegative)
        return out

    def unknown(self, func, name, args, kwargs):
        """Questions about a tensor (shape, dtype, ...) pass; anything else that depends on the input is refused."""
        if name not in HIDING:
            out = func(*args, **kwargs)
            if not tensors_in((out,)):
                return out
        heads = ("softmax", "log_softmax", "sigmoid", "logsigmoid")
        remedy = (
            "explain the logits: remove the last softmax or sigmoid from the model"
            if name in heads
            else "replace it in the model, or explain a model without it"
        )
        raise ZsuError(f"operation {name!r} has no relevance rule", where="explain", remedy=remedy)

    def protect(self, t: Tensor) -> None:
        """Before t changes in place: give each layer whose output shares t's memory a copy of that output."""
        for layer in self.layers:
            if layer.z is not None and layer.z.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                layer.z = layer.z.clone()


def regrouped(sources, x: Tensor, out) -> tuple[Source, ...] | None:
    """Sources after (N, C, ...) -> (N, C, other positions) or (N, C * positions); None for other rearrangements."""
    if sources is None or x.shape[:2] == out.shape[:2]:
        return sources
    if out.dim() != 2 or out.shape[0] != x.shape[0]:
        return None
    positions = x[0, 0].numel()
    return tuple(Source(s.node, s.channels, s.group * positions) for s in sources)


def tensors_in(values) -> list[Tensor]:
    """Tensors among the values and, one level deep, in their lists and tuples."""
    flat = (v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,)))
    return [v for v in flat if isinstance(v, Tensor)]


def as_list(value, dim: int) -> list[int]:
    """2 -> [2, 2]; (2, 3) -> [2, 3]."""
    value = list(value) if isinstance(value, (tuple, list)) else [value]
    return value * dim if len(value) == 1 else value


def bound(args, kwargs, position, name, default):
    """The argument at that position, or of that name."""
    return args[position] if len(args) > position else kwargs.get(name, default)
