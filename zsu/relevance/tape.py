"""The tape: records a forward pass of an unmodified model and rewrites its backward pass into LRP.

Every tensor t carries c = R / t as its gradient, so that relevance is t * grad and needs no rule for additions, pools,
ReLU, flatten or anything else that is linear or a masked identity. Layers with weights follow a rule, activations that
bend hand on what they get, norms keep their bias (:mod:`zsu.relevance.layers`).

Products of two things that both depend on the input: a *gate* (what a sigmoid or softmax gives) counts as a constant
factor, and all relevance goes to what it gates (Arras et al. 2017, arXiv:1706.07206); so do attention weights (CP-LRP,
Ali et al. 2022, arXiv:2202.07304), unless AttnLRP is asked for, which halves the relevance at both products of
attention and follows the softmax (Achtibat et al. 2024, arXiv:2402.05602, sec. 3.3). Products that no softmax has seen
may not join the flow.

A `TorchFunctionMode` sees each torch function that the model calls. No hook is registered and no module replaced,
so reused modules, functional calls and in-place calls are right, and nothing is left behind after an exception.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ..errors import ZsuError
from .layers import (
    Addition,
    Affine,
    Axes,
    Conv,
    Layer,
    Linear,
    Meter,
    Node,
    Norm,
    Overwrite,
    Ratio,
    Source,
    Summands,
    Weighted,
    at_least_float32,
    channel_axis,
)

CONV = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
CONV_TRANSPOSE = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
ADD = set("add add_ __add__ __radd__ __iadd__".split())
# f(x) = a(x) * x with a(x) constant around x, or linear in x, channel by channel: gradient times input is exact.
PER_CHANNEL = set(
    "relu relu_ leaky_relu leaky_relu_ prelu rrelu dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout "
    "contiguous clone pad roll flip interpolate max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
# f(0) = 0, bending elsewhere: R goes through whole.
BENDING = set("relu6 hardtanh hardtanh_ gelu silu elu elu_ selu selu_ celu celu_ mish hardswish tanh tanh_".split())
BENDING |= set("softsign tanhshrink hardshrink softshrink".split())
# Values stay, axes move.
RESHAPING = set("flatten reshape view unflatten squeeze unsqueeze view_as reshape_as".split())
REARRANGING = set("permute transpose movedim swapaxes expand chunk split unbind select narrow __getitem__".split())
REARRANGING |= {"mean", "sum"}
# Return no tensor, and yet what follows depends on the input.
HIDING = set("item tolist numpy __array__ __float__ __int__ __setitem__ __set__".split())
FRESH = set("new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like".split())
SCALING = set(
    "mul mul_ multiply div div_ divide __mul__ __rmul__ __imul__ __truediv__ __itruediv__ neg negative __neg__".split()
)
MATMUL = set("matmul bmm __matmul__ __rmatmul__".split())
WEIGHTED = set("linear batch_norm layer_norm group_norm prelu".split())
MAY_TURN_NEGATIVE = SCALING | MATMUL | {"pad", "interpolate"}
NO_GRAD = "torch.no_grad"
GATES = set("sigmoid hardsigmoid softmax".split())

Note = TypeVar("Note")


@dataclass
class Origin:
    """What the tape knows of a tensor that relevance flows through."""

    axes: Axes  # of samples and channels
    sources: tuple[Source, ...] | None  # where its channels come from
    nonnegative: bool = False
    node: Node | None = None  # set on the direct output of a weighted layer
    is_input: bool = False  # the model's input itself
    read: bool = False  # by an operation


@dataclass
class Side:
    """A tensor that depends on the input, and yet no relevance flows through it."""

    by: str  # the operation that took it out of the flow
    gate: bool  # may multiply what is in the flow


class Tap(NamedTuple):
    """The output of a node."""

    edge: GradientEdge  # where the graph of autograd can be cut into
    axes: Axes
    value: Tensor


class Notes(Generic[Note]):
    """Notes on tensors, by identity. They keep no tensor alive."""

    def __init__(self):
        self.noted: dict[int, tuple[weakref.ref, Note, int]] = {}

    def __contains__(self, t: Tensor) -> bool:
        found = self.noted.get(id(t))
        return found is not None and found[0]() is t  # ids come again

    def __getitem__(self, t: Tensor) -> Note:
        return self.noted[id(t)][1]

    def __setitem__(self, t: Tensor, note: Note) -> None:
        self.noted[id(t)] = weakref.ref(t), note, t._version

    def outdated(self, t: Tensor) -> bool:
        """Whether t has changed in place since, by way of another tensor that shares its memory."""
        return self.noted[id(t)][2] != t._version


class Tape(TorchFunctionMode):
    """Records the forward pass of `model` on one batch; see the module's docstring.

    Attributes
    ----------
    nodes : list of Node
        What paths lead through, in the order of the forward pass: the input, weighted layers, norms and additions.
    rows : list of Node
        What keeps a share of the relevance: the nodes, and besides them softmax and constants.
    taps : dict of Node to Tap, or None
        The outputs of `nodes`; they keep all of the graph alive, so that only who needs them asks for them with a dict.
    constants : list of (Tensor, Node, str)
        Leaves that do not depend on the input but join the flow (position embeddings, the bias of a norm); their share
        constant * gradient belongs to that field of the node.
    """

    def __init__(self, model: nn.Module, edges: bool, attention: str, taps: dict | None = None):
        super().__init__()
        self.edges, self.attention, self.taps = edges, attention, taps
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.names = dict(self.parameters)  # and slices of parameters, which `parts` keeps alive
        self.parts: list[Tensor] = []
        self.origins: Notes[Origin] = Notes()
        self.sides: Notes[Side] = Notes()
        # What keeps its output for the backward pass, by node; the graph of autograd keeps it alive.
        self.layers: WeakValueDictionary[Node, Layer] = WeakValueDictionary()
        self.additions: WeakValueDictionary[Node, Summands] = WeakValueDictionary()
        self.nodes: list[Node] = []
        self.rows: list[Node] = []
        self.constants: list[tuple[Tensor, Node, str]] = []

    def start(self, x: Tensor) -> None:
        """Declare x (N, C, ...) the input."""
        self.samples = len(x)
        self.nodes.append(self.row(Node("input", "input")))
        sources = (Source(0, x.shape[1]),)
        self.origins[x] = Origin((0, 1), sources, nonnegative=bool((x >= 0).all()), is_input=True)
        self.tap(self.nodes[0], x, (0, 1))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()))
        flow = [t for t in tensors if t in self.origins]
        sides = [t for t in tensors if t in self.sides]
        if not flow and not sides:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if sides:
            return self.beside(func, name, args, kwargs, flow, sides)
        if name == "__get__":  # shape, dtype, ...
            return self.unknown(func, name, args, kwargs)
        args, kwargs = positional(args, kwargs)
        self.check(func, name, args, kwargs, flow)
        if not torch.is_grad_enabled():
            return self.aside(func(*args, **kwargs), NO_GRAD, gate=False)
        origins = [self.origins[t] for t in flow]
        try:
            return self.dispatch(func, name, args, kwargs, flow)
        finally:
            for origin in origins:
                origin.read = True

    def dispatch(self, func, name, args, kwargs, flow):
        if name in CONV or name in CONV_TRANSPOSE:
            return self.convolution(func, name, *args, **kwargs)
        if name in ("linear", "batch_norm", "layer_norm", "group_norm", "scaled_dot_product_attention"):
            return getattr(self, name)(func, *args, **kwargs)
        if name == "multi_head_attention_forward":
            return self.multi_head_attention(*args, **kwargs)
        if name in ADD:
            return self.add(*args, in_place=name in ("add_", "__iadd__"), **kwargs)
        if name in ("sub", "__sub__", "subtract"):
            return self.subtract(*args, **kwargs)
        if name in ("rsub", "__rsub__"):
            return self.subtract(args[1], args[0], **kwargs)
        if name in ("cat", "concat", "concatenate"):
            return self.cat(*args, **kwargs)
        if name in BENDING:
            return self.bending(func, name, args, kwargs)
        if name in GATES:
            return self.gate(func, name, args, kwargs)
        if len(flow) > 1 and name in SCALING | MATMUL:
            return self.product(func, name, args, kwargs)
        return self.other(func, name, args, kwargs, flow)

    def check(self, func, name, args, kwargs, flow) -> None:
        """Refuse what the tape would follow wrongly."""
        if any(self.origins.outdated(t) for t in flow):
            raise ZsuError(
                f"{name!r} reads a tensor that was changed in place by way of a view of it",
                where="explain",
                remedy="use the out-of-place function in the model",
            )
        if kwargs.get("out") is not None:
            raise ZsuError(f"{name!r} writes into out=", where="explain", remedy="use what it returns")
        if (name in CONV or name in CONV_TRANSPOSE or name in WEIGHTED) and any(t is not args[0] for t in flow):
            raise ZsuError(
                f"weights of {name!r} depend on the input", where="explain", remedy="explain a model without it"
            )

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
        origin = self.origins[x]
        self.origins[out] = Origin(origin.axes, origin.sources, origin.nonnegative)
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
            s = torch.rsqrt(at_least_float32(running_var) + eps)
            s = s if weight is None else s * weight
            t = -running_mean * s if bias is None else bias - running_mean * s
        value = self.value(func, "batch_norm", input, running_mean, running_var, weight, bias, False, momentum, eps)
        layer = self.layers.get(self.origins[input].node)
        merges = layer is not None and (
            not layer.op.transposed if isinstance(layer.op, Conv) else isinstance(layer.op, Linear) and input.dim() == 2
        )
        if not merges:
            return self.weighted("batch_norm", Affine(), input, s, t, value, name=self.where(weight, "batch_norm"))
        with torch.no_grad():
            b = t if layer.b is None else layer.b * s + t
            s = s if layer.s is None else layer.s * s
        return self.weighted(layer.node.kind, layer.op, layer.x, layer.w, b, value, layer.node.name, s, like=layer)

    def value(self, func, where, *args, **kwargs) -> Tensor:
        """The layer's own output; what torch refuses is said with the layer's name."""
        try:
            with torch.no_grad():
                return func(*args, **kwargs)
        except RuntimeError as error:
            remedy = "give images of the model's dtype, device and size"
            raise ZsuError(str(error).splitlines()[0], where=where, remedy=remedy) from error

    def weighted(self, kind, op, x, w, b, value, name=None, s=None, like=None) -> Tensor:
        origin = self.origins[x]
        batch, channel = origin.axes
        mine = channel_axis(op, x)
        node = Node(
            kind,
            name or self.where(w, kind),
            like.node.weight if like else self.parameters.get(id(w)),
            op.groups,
            [origin.sources if channel == mine else None],
        )
        layer = Layer(
            node,
            op,
            x,
            w.detach(),
            s,
            None if b is None else b.detach(),
            origin.nonnegative,
            origin.is_input,
            self.edges,
            None if batch == mine else batch,
            self.samples,
            value,
            like.version if like else x._version,
        )
        self.nodes.append(node)
        self.rows.append(node)
        self.layers[node] = layer
        out = Weighted.apply(x, layer)
        self.tap(node, out, layer.axes)
        self.origins[out] = Origin(layer.axes, (Source(len(self.nodes) - 1, out.shape[mine]),), node=node)
        return out

    def where(self, parameter: Tensor | None, kind: str) -> str:
        """The layer's name: that of its parameter without the last part."""
        name = self.names.get(id(parameter))
        return name.rpartition(".")[0] if name else kind

    # -- norms and activations

    def layer_norm(self, func, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        shape = list(normalized_shape)
        grouped = [*input.shape[: input.dim() - len(shape)], *shape]
        name = self.where(weight, "layer_norm")
        return self.norm("layer_norm", name, input, grouped, len(shape), weight, bias, eps)

    def group_norm(self, func, input, num_groups, weight=None, bias=None, eps=1e-5):
        n, channels, *positions = input.shape
        grouped = [n, num_groups, channels // num_groups, *positions]
        name = self.where(weight, "group_norm")
        weight, bias = (None if p is None else p.reshape(-1, *[1] * len(positions)) for p in (weight, bias))
        return self.norm("group_norm", name, input, grouped, len(grouped) - 2, weight, bias, eps)

    def norm(self, kind, name, x, grouped, last, weight, bias, eps) -> Tensor:
        """x as `grouped`, of which the `last` axes are normalised, times weight plus bias."""
        origin = self.origins[x]
        weight, bias = (None if p is None else p.detach() for p in (weight, bias))
        channel = origin.axes[1]
        known = channel is not None and (channel == 1 if kind == "group_norm" else channel >= x.dim() - last)
        groups = grouped[1] if kind == "group_norm" else 1
        node = self.row(Node(kind, name, groups=groups, sources=[origin.sources if known else None]))
        self.nodes.append(node)
        edges = self.edges and known
        out = Norm.apply(x, node, origin.axes, self.samples, grouped, last, weight, bias, eps, edges)
        self.tap(node, out, origin.axes)
        self.origins[out] = Origin(origin.axes, (Source(len(self.nodes) - 1, x.shape[channel]),) if known else None)
        return out

    def tap(self, node: Node, out: Tensor, axes: Axes) -> None:
        if self.taps is not None and axes[1] is not None:
            self.taps[node] = Tap(get_gradient_edge(out), axes, out.detach().clone())

    def row(self, node: Node) -> Node:
        self.rows.append(node)
        return node

    def leaf(self, constant: Tensor, node: Node, share: str) -> Tensor:
        """The constant as a leaf whose share of the relevance goes to that field of the node."""
        leaf = constant.detach().requires_grad_()
        self.constants.append((leaf, node, share))
        return leaf

    def bending(self, func, name, args, kwargs) -> Tensor:
        x, *rest = args
        if func(torch.zeros(1, dtype=x.dtype, device=x.device), *rest, **kwargs).any():
            raise ZsuError(f"{name!r} is not 0 at 0", where="explain", remedy="use an activation with f(0) = 0")
        in_place = changes_in_place(func, name, args, kwargs)
        if in_place:
            self.protect(x)
        out = Ratio.apply(x, lambda t: func(t, *rest, **kwargs), in_place)
        origin = self.origins[x]
        self.origins[out] = Origin(origin.axes, origin.sources, origin.nonnegative)
        return out

    # -- additions

    def add(self, a, b, *, alpha=1, in_place=False):
        if alpha != 1:
            raise ZsuError("addition with alpha", where="add", remedy="explain a model without it")
        if not (isinstance(a, Tensor) and a in self.origins and isinstance(b, Tensor) and b in self.origins):
            return self.add_constant(a, b, in_place)
        if a.shape != b.shape:
            raise ZsuError(f"adds {tuple(a.shape)} and {tuple(b.shape)}", where="add", remedy="use equal shapes")
        if in_place:
            self.protect(a)
        of_a, of_b = self.origins[a], self.origins[b]
        axes = tuple(i if i == j else None for i, j in zip(of_a.axes, of_b.axes, strict=True))
        node = self.row(Node("add", "add", sources=[of_a.sources, of_b.sources]))
        self.nodes.append(node)
        summands = self.additions[node] = Summands(node, axes, self.samples)
        out = Addition.apply(a, b, summands, in_place)
        self.tap(node, out, axes)
        known = (
            axes[1] is not None
            and of_a.sources is not None
            and of_b.sources is not None
            and all(s.group == 1 for s in (*of_a.sources, *of_b.sources))
        )
        sources = (Source(len(self.nodes) - 1, out.shape[axes[1]]),) if known else None
        self.origins[out] = Origin(axes, sources, of_a.nonnegative and of_b.nonnegative)
        return out

    def subtract(self, a, b, *, alpha=1):
        """a - b as a + (-b)."""
        if not isinstance(b, Tensor) or b not in self.origins:
            return self.add(a, -b, alpha=alpha)
        return self.add(a, self.other(torch.mul, "mul", (b, -1.0), {}, [b]), alpha=alpha)

    def add_constant(self, a, b, in_place: bool) -> Tensor:
        a_flows = isinstance(a, Tensor) and a in self.origins
        x, constant = (a, b) if a_flows else (b, a)
        if in_place and not a_flows:
            raise ZsuError("adds the input's flow to a fixed tensor in place", where="add_", remedy="use a + b")
        if in_place:
            self.protect(a)
        constant = torch.as_tensor(constant, dtype=x.dtype, device=x.device)
        origin = self.origins[x]
        node = self.row(Node("constant", self.names.get(id(constant), "constant")))
        through = Meter.apply(x.clone() if in_place else x, node, "into", origin.axes, self.samples)
        leaf = self.leaf(constant, node, "constant")
        total = through + leaf
        if total.shape != x.shape:  # it was x that was broadcast
            axes = tuple(None if i is None else i + total.dim() - x.dim() for i in origin.axes)
        else:
            axes = origin.axes
        out = Meter.apply(total, node, "out", axes, self.samples)
        if in_place:
            out = Overwrite.apply(a, out)
        sources = None if axes[1] is None else broadcast(origin.sources, out.shape[axes[1]])
        self.origins[out] = Origin(axes, sources)
        return out

    def cat(self, tensors, dim=0):
        flows = [t for t in tensors if t in self.origins]
        axes = self.origins[flows[0]].axes
        if any(self.origins[t].axes != axes for t in flows):
            axes = (axes[0] if all(self.origins[t].axes[0] == axes[0] for t in flows) else None, None)
        dim = dim % flows[0].dim()
        if len(flows) < len(tensors):
            node = self.row(Node("constant", "cat"))
            metered = {id(t): Meter.apply(t, node, "into", axes, self.samples) for t in flows}
            tensors = [metered[id(t)] if id(t) in metered else self.leaf(t, node, "constant") for t in tensors]
        out = torch.cat(tensors, dim)
        if len(flows) < len(tensors):
            out = Meter.apply(out, node, "out", axes, self.samples)
        origins = [self.origins[t] for t in flows]
        known = dim == axes[1] and len(flows) == len(tensors) and all(o.sources is not None for o in origins)
        sources = tuple(s for o in origins for s in o.sources) if known else None
        if dim != axes[1] and all(o.sources == origins[0].sources for o in origins):  # along positions
            sources = origins[0].sources
        if dim == axes[0]:
            axes = (None, axes[1])
        nonnegative = len(flows) == len(tensors) and all(o.nonnegative for o in origins)
        self.origins[out] = Origin(axes, sources, nonnegative)
        return out

    # -- products: gates, attention

    def beside(self, func, name, args, kwargs, flow, sides):
        """An operation on tensors that depend on the input outside the flow, alone or together with the flow."""
        gates = all(self.sides[t].gate for t in sides)
        if flow:
            if not (gates and name in SCALING | MATMUL):
                raise self.refusal(self.sides[sides[0]], joins=name)
            return self.other(func, name, args, kwargs, flow)
        if name in HIDING:
            return self.unknown(func, name, args, kwargs)
        with torch.no_grad():
            out = func(*args, **kwargs)
        stays = gates and name in PER_CHANNEL | RESHAPING | REARRANGING | SCALING
        by = name if name in GATES else self.sides[sides[0]].by
        return self.aside(out, by, stays or name in GATES)

    def aside(self, out, by: str, gate: bool):
        for t in tensors_in((out,)):
            if t.is_floating_point():
                self.sides[t] = Side(by, gate)
        return out

    def gate(self, func, name, args, kwargs) -> Tensor:
        if name == "softmax" and self.attention == "attnlrp":
            x, *rest = args
            axes = self.origins[x].axes
            node = self.row(Node("softmax", "softmax"))
            out = func(Meter.apply(x, node, "into", axes, self.samples), *rest, **kwargs)
            out = Meter.apply(out, node, "out", axes, self.samples)
            self.origins[out] = Origin(axes, None, nonnegative=True)
            return out
        with torch.no_grad():
            return self.aside(func(*args, **kwargs), name, gate=True)

    def product(self, func, name, args, kwargs) -> Tensor:
        """Of two tensors in the flow."""
        a, b = args
        if self.attention == "attnlrp" and name in MATMUL:
            out = (func(a, b.detach()) + func(a.detach(), b)) / 2  # each gets half
            batch = self.origins[a].axes[0]
            self.origins[out] = Origin((batch if batch is not None and batch < out.dim() - 2 else None, None), None)
            return out
        with torch.no_grad():
            return self.aside(func(a, b, **kwargs), name, gate=False)

    def scaled_dot_product_attention(
        self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs
    ):
        if dropout_p or kwargs.get("enable_gqa"):
            raise ZsuError("attention with dropout or grouped queries", where="attention", remedy="call model.eval()")
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        constant = self.attention == "cp-lrp" and value in self.origins
        if constant:
            query, key = query.detach(), key.detach()
        with nullcontext() if constant else self:  # recorded as if the model did it
            scores = torch.matmul(query * scale, key.transpose(-2, -1))
            scores = scores if attn_mask is None else scores + attn_mask
            weights = F.softmax(scores, -1)
        with self:
            return torch.matmul(weights, value)

    def multi_head_attention(
        self, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
        add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None,
        need_weights=True, attn_mask=None, use_separate_proj_weight=False, **kwargs
    ):  # fmt: skip
        where = self.where(in_proj_weight, "attention")
        if use_separate_proj_weight or bias_k is not None or add_zero_attn or key_padding_mask is not None:
            remedy = "use nn.MultiheadAttention without kdim, vdim, add_bias_kv, add_zero_attn and padding mask"
            raise ZsuError("attention with separate projections, extra keys or padding", where=where, remedy=remedy)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.detach().chunk(3)
        weights = in_proj_weight.detach().chunk(3)
        self.parts += weights  # kept alive, because names go by id
        self.names |= {id(w): f"{where}.{letter}.weight" for letter, w in zip("qkv", weights, strict=True)}

        def project(t, w, b):  # (L, N, E) -> (N, heads, L, d)
            return F.linear(t.transpose(0, 1), w, b).unflatten(2, (num_heads, -1)).transpose(1, 2)

        constant = self.attention == "cp-lrp" and value in self.origins
        if constant:
            query, key = query.detach(), key.detach()
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, num_heads))  # (N heads, L, L) -> (N, heads, L, L)
        with nullcontext() if constant else self:
            q, k = (project(*of) for of in zip((query, key), weights[:2], biases[:2], strict=True))
        with self:
            v = project(value, weights[2], biases[2])
            below = len(self.nodes) - 1
            out = F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)  # (N, L, E)
            if constant:  # constant weights mix positions, and leave each channel of v to itself
                self.origins[out] = Origin((self.origins[out].axes[0], 2), (Source(below, out.shape[2]),))
            out = F.linear(out, out_proj_weight, out_proj_bias).transpose(0, 1)  # (L, N, E)
        if not need_weights:
            return out, None
        with torch.no_grad():
            weights = (q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)).softmax(-1).mean(1)  # (N, L, L)
        return out, self.aside(weights, "softmax", gate=True)

    # -- everything else

    def other(self, func, name, args, kwargs, flow):
        x = flow[0]
        if len(flow) > 1 and name not in ("view_as", "reshape_as"):
            return self.unknown(func, name, args, kwargs)
        if name in MATMUL and x is args[0] and args[1] not in self.sides and args[1].dim() == 2:  # a Linear by hand
            return self.weighted("linear", Linear(), x, args[1].T, None, self.value(func, name, *args))
        scaled = len(flow) == 1 and name in SCALING | MATMUL and ("div" not in name or args[0] is x)
        if not (scaled or name in PER_CHANNEL | RESHAPING | REARRANGING):
            return self.unknown(func, name, args, kwargs)
        if "dropout" in name and bound(args, kwargs, 2, "training", True):
            raise ZsuError("dropout is active", where=name, remedy="call model.eval(), or pass training=False")
        if name == "pad" and bound(args, kwargs, 3, "value", None):
            raise ZsuError("pads with a value other than 0", where="pad", remedy="pad with 0 in the model")
        alone = name.startswith("relu") and not self.origins[x].read
        if changes_in_place(func, name, args, kwargs) and not alone:
            self.protect(x)  # a ReLU in place that reads x first zeroes only what gets no relevance
        out = func(*args, **kwargs)
        for t in tensors_in((out,)):
            if t.is_floating_point():
                self.origins[t] = self.after(name, args, kwargs, x, t)
        return out

    def after(self, name, args, kwargs, x: Tensor, out: Tensor) -> Origin:
        """Origin of what an operation without weights makes of x."""
        origin, sources = self.origins[x], self.origins[x].sources
        batch, channel = origin.axes
        if name in RESHAPING:
            batch = reshaped(batch, self.samples, x.shape, out.shape)
            if channel is not None:
                channels, above = x.shape[channel], -1 if batch is None else batch
                channel = reshaped(channel, channels, x.shape, out.shape, above)
                if channel is not None and sources is not None:
                    spread = out.shape[channel] // channels  # positions that now stand beside each other
                    sources = tuple(Source(s.node, s.channels, s.group * spread) for s in sources)
        elif name in REARRANGING:
            batch, channel = (rearranged(name, args, kwargs, axis, x, out) for axis in origin.axes)
        else:
            mixed = touched(name, args, kwargs, x)
            batch, channel = (None if i in mixed else i for i in origin.axes)
            if out.dim() != x.dim():  # broadcast against more dimensions
                batch, channel = (None if i is None else i + out.dim() - x.dim() for i in (batch, channel))
        nonnegative = name in ("relu", "relu_") or (origin.nonnegative and name not in MAY_TURN_NEGATIVE)
        is_input = origin.is_input and name in ("contiguous", "clone")
        sources = None if channel is None else broadcast(sources, out.shape[channel])
        return Origin((batch, channel), sources, nonnegative, is_input=is_input)

    def unknown(self, func, name, args, kwargs):
        """Questions about a tensor (shape, dtype, ...) pass; anything else that depends on the input is refused."""
        if name in FRESH:
            return func(*args, **kwargs)
        if name not in HIDING:
            out = func(*args, **kwargs)
            if not tensors_in((out,)):
                return out
        raise self.refusal(Side(name, name in ("log_softmax", "logsigmoid")))

    def refusal(self, side: Side, joins: str | None = None) -> ZsuError:
        """Why what an operation made cannot be explained."""
        if side.by == NO_GRAD:
            what = "a part of the model runs under torch.no_grad, so no relevance flows through it"
            return ZsuError(what, where="explain", remedy="take no_grad out of the model's forward")
        if joins:
            return ZsuError(
                f"{joins!r} joins the output of {side.by!r} to what relevance flows through",
                where="explain",
                remedy="only softmax, sigmoid and hardsigmoid may multiply other tensors",
            )
        remedy = (
            "explain the logits: remove the last softmax or sigmoid from the model"
            if side.gate
            else "replace it in the model, or explain a model without it"
        )
        return ZsuError(f"operation {side.by!r} has no relevance rule", where="explain", remedy=remedy)

    def keepers(self) -> list[Layer | Summands]:
        return [*self.layers.values(), *self.additions.values()]

    def protect(self, t: Tensor) -> None:
        """Before t changes in place: give each layer and sum whose output shares t's memory a copy of that output."""
        for keeper in self.keepers():
            if keeper.z is not None and keeper.z.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                keeper.z = keeper.z.clone()


# --- where the axes of samples and channels go --------------------------------------------------------------------


def reshaped(axis: int | None, size: int, before: torch.Size, after: torch.Size, above: int = -1) -> int | None:
    """Axis behind `above` after a reshape, in which `axis`, of which `size` entries count, is still the outer part."""
    if axis is None:
        return None
    outer = math.prod(before[:axis])
    for i in range(above + 1, len(after)):
        if math.prod(after[:i]) == outer and after[i] % size == 0:
            return i
    return None


def rearranged(name: str, args, kwargs, axis: int | None, x: Tensor, out: Tensor) -> int | None:
    """Where `axis` of x is in `out`; None where it is gone, taken apart, or not known."""
    if axis is None:
        return None
    if name == "__getitem__":
        return indexed(args[1], axis, x.dim())
    marked = torch.empty([2 if i == axis else 1 for i in range(x.dim())], device="meta")
    if name in ("permute", "transpose", "movedim", "swapaxes"):
        return list(getattr(marked, name)(*args[1:], **kwargs).shape).index(2)
    if name == "expand":
        return axis + out.dim() - x.dim()
    dims = bound(args, kwargs, {"chunk": 2, "split": 2, "narrow": 1}.get(name, 1), "dim", None)
    if name in ("chunk", "split", "unbind"):
        dims = 0 if dims is None else dims
    if dims is None:
        return None
    dims = [d % x.dim() for d in as_list(dims, 1)]
    if axis in dims:
        return None
    return axis if out.dim() == x.dim() else axis - sum(d < axis for d in dims)


def touched(name: str, args, kwargs, x: Tensor) -> set[int]:
    """Axes of x along which an operation moves or mixes values."""
    dim = x.dim()
    if name == "pad":
        sides = bound(args, kwargs, 1, "pad", ())
        return {dim - 1 - i // 2 for i, side in enumerate(sides) if side}
    if name in ("roll", "flip"):
        dims = args[-1] if len(args) > (2 if name == "roll" else 1) else kwargs.get("dims")
        dims = args[1:] if name == "flip" and len(args) > 2 else dims
        return set(range(dim)) if dims is None else {d % dim for d in as_list(dims, 1)}
    if "_pool" in name:
        return set(range(dim - int(name[-2]), dim))
    if name == "interpolate":
        return set(range(2, dim))
    if name in MATMUL:
        return {dim - 1 if args[0] is x else max(dim - 2, 0)}
    return set()


def broadcast(sources: tuple[Source, ...] | None, width: int) -> tuple[Source, ...] | None:
    """Sources of so many channels: one channel repeated is as many sources; None where they do not fit."""
    if sources is None or sum(s.channels * s.group for s in sources) == width:
        return sources
    return sources * width if sources == (Source(sources[0].node, 1),) else None


def indexed(index, axis: int, dim: int) -> int | None:
    """Where `axis` is after x[index], with x of `dim` dimensions; None for anything but numbers, slices, None, ...."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in index):
        return None
    named = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    at = index.index(Ellipsis)
    index[at : at + 1] = [slice(None)] * (dim - named)
    before, new = 0, 0  # axes of x and of the result so far
    for i in index:
        if i is None:
            new += 1
            continue
        if before == axis:
            return new if isinstance(i, slice) and i == slice(None) else None
        before += 1
        new += isinstance(i, slice)
    return None


# --- arguments ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def signature(func: Callable) -> inspect.Signature | None:
    """Of Python functions; built-in ones have none, and no argument `inplace` either."""
    try:
        return inspect.signature(func)
    except (ValueError, TypeError):
        return None


def changes_in_place(func: Callable, name: str, args, kwargs) -> bool:
    """relu_(x), x *= 2, relu(x, inplace=True) or relu(x, True)."""
    if (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
        return True
    if not (found := signature(func)) or "inplace" not in found.parameters:
        return False
    return bool(found.bind(*args, **kwargs).arguments.get("inplace"))


def tensors_in(values) -> list[Tensor]:
    """Tensors among the values and, one level deep, in their lists and tuples."""
    flat = (v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,)))
    return [v for v in flat if isinstance(v, Tensor)]


def as_list(value, dim: int) -> list[int]:
    """2 -> [2, 2]; (2, 3) -> [2, 3]."""
    value = list(value) if isinstance(value, (tuple, list)) else [value]
    return value * dim if len(value) == 1 else value


def positional(args, kwargs) -> tuple[tuple, dict]:
    """torch.add(input=a, other=b) as torch.add(a, b)."""
    if not kwargs:
        return args, kwargs
    kwargs = dict(kwargs)
    first = (kwargs.pop("input"),) if "input" in kwargs else ()
    second = (kwargs.pop("other"),) if "other" in kwargs else ()
    return (*first, *args, *second), kwargs


def bound(args, kwargs, position, name, default):
    """The argument at that position, or of that name."""
    return args[position] if len(args) > position else kwargs.get(name, default)
