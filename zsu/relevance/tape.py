"""The tape: records a forward pass of an unmodified model, and replays it backwards as LRP.

Every tensor t carries c = R / t as its gradient, so that relevance is t * grad and needs no rule for additions, pools,
ReLU, flatten or anything else that is linear or a masked identity. Layers with weights follow a rule
(:mod:`zsu.relevance.weighted`), activations that bend hand on what they get, norms keep their bias
(:mod:`zsu.relevance.steps`).

Products of two things that both depend on the input: a *gate* (what a sigmoid or softmax gives) counts as a constant
factor, and all relevance goes to what it gates (Arras et al. 2017, arXiv:1706.07206); so do attention weights (CP-LRP,
Ali et al. 2022, arXiv:2202.07304), unless AttnLRP is asked for, which halves the relevance at both products of
attention and follows the softmax (Achtibat et al. 2024, arXiv:2402.05602, sec. 3.3). A gate may be reshaped, scaled and
shifted on its way. What an operation without a rule makes stands beside the flow: hooks may store it, gates may be
computed from it; it is refused, by name, where it would join the flow (:mod:`zsu.relevance.outside`: and what was not
seen made).

A `TorchFunctionMode` sees each torch function that the model calls. No hook is registered and no module replaced,
so reused modules, functional calls and in-place calls are right, and nothing is left behind after an exception.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ZsuError
from . import attention, operations
from .channels import Numbers, along, channel_axis, joined, numbered, zero_at_zero
from .checks import Side, refusal, unrelated
from .layers import Layer, Replay, Share, Step, Tap
from .operations import Call, as_list, name_of, tensors_in
from .origins import Front, Origin, origins_after, shared_axis
from .outside import Outside, hidden, leads_to
from .result import Relevance
from .steps import Addition, Meter, Norm, Normalisation, Ratio
from .sums import Axes, along_channels, at_least_float32, inner
from .weighted import Affine, Conv, FollowRule, Linear, Weighted


class Tape(TorchFunctionMode):
    """Records the forward pass of `model` on one batch; see the module's docstring.

    Attributes
    ----------
    layers : list of Layer
        What paths lead through, in the order of the forward pass: the input, weighted layers, norms and additions.
    rows : list of Layer
        What keeps a share of the relevance: the same, and besides them softmax and constants.
    steps : dict of Layer to Step
        What keeps its output for the backward pass; the graph of autograd keeps it alive.
    taps : dict of Layer to Tap
        The outputs of `layers`; they keep all of the graph alive, so that they are there only for who asks for them.
    constants : list of (Tensor, Layer)
        Leaves that do not depend on the input but join the flow (class token, position embeddings), and the rows that
        their share constant * gradient belongs to.
    """

    def __init__(self, model: nn.Module, edges: bool, attention: str, taps: bool = False):
        super().__init__()
        self.model, self.edges, self.attention, self.keeps_taps = model, edges, attention, taps
        self.taps: dict[Layer, Tap] = {}
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.names = dict(self.parameters)  # and slices of parameters, which `parts` keeps alive
        self.parts: list[Tensor] = []
        self.origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of Tensor to Origin
        self.sides: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of Tensor to Side
        self.steps: WeakValueDictionary[Layer, Step] = WeakValueDictionary()
        self.numbers = Numbers()
        self.layers = self.numbers.layers
        self.rows: list[Layer] = []
        self.constants: list[tuple[Tensor, Layer]] = []

    def record(self, x: Tensor, forward: Callable[[Tensor], Tensor], nonnegative: bool) -> Tensor:
        """The logits of x (N, C, ...), with all that is needed to replay the way to them."""
        self.input = x.detach().clone().requires_grad_()
        self.outside = Outside(self.model, self.input)
        first = self.input.clone()  # so that the model may change its input in place
        self.replay = Replay(self.input.detach(), self.edges)
        step = Step(Layer("input", "input"), (0, 1), self.replay)
        self.layer_output(step, first, nonnegative=nonnegative, front=Front())
        with self:
            self.logits = forward(first)
        if self.logits in self.sides:
            raise refusal(self.sides[self.logits])
        return self.logits

    def check_flow(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Refuse logits that the input reaches in ways that the tape has not followed."""
        if self.logits not in self.origins or not self.logits.requires_grad:
            if self.logits.grad_fn is not None and leads_to(self.logits.grad_fn, self.input):
                raise hidden(self.logits, "the output")
            raise unrelated(self.outside.reads)
        if self.outside.reads:
            again = Tape(self.model, False, self.attention)
            shrink = torch.linspace(1, 0.97, self.input.numel(), device=self.input.device)
            again.record(self.input * shrink.view_as(self.input).to(self.input), forward, False)
            self.outside.check(again.outside)

    # -- replay

    def backward(self, weights: Tensor, last: bool = True) -> Relevance:
        """Hand logits * weights back to the input. No pass can follow the last one."""
        self.replay.begin(last)
        first, others = self.gradients(weights, retain=not last)
        for (constant, layer), grad in zip(self.constants, others, strict=True):
            if grad is not None:
                share = self.replay.share(layer)
                share.constant = share.constant + inner(constant.detach(), grad)
        relevance = self.at_input(first)
        whole = self.replay.share(self.layers[0])  # (N, C, ...) -> (N, C)
        whole.relevance = relevance.flatten(2).sum(2) if relevance.dim() > 2 else relevance
        reached = self.reached()
        for share in reached.values():
            if share.kind == "softmax":  # not linear: what its linear part does not explain stays there
                share.bias = share.out - share.into
        sources = self.origins[self.logits].sources
        both = self.layers, self.numbers.layers_of(sources)
        layers, tops = ([reached[layer] for layer in some if layer in reached] for some in both)
        head = tops[0] if tops and self.numbers.are_all(along(sources, 1, self.logits.shape[1])) else None
        logits, rows = self.logits.detach(), list(reached.values())
        return Relevance(relevance, logits, logits * weights, layers, head, rows, tops)

    def reached(self) -> dict[Layer, Share]:
        """What the pass has found, where relevance came by: with unique names (conv, conv#2), numbered without gaps."""
        shares = self.replay.shares
        reached = {row: shares[row] for row in self.rows if row in shares and shares[row].relevance is not None}
        number = self.numbers.without_gaps(reached)
        seen: Counter[str] = Counter()
        for layer, share in reached.items():
            seen[layer.name] += 1
            name = layer.name if seen[layer.name] == 1 else f"{layer.name}#{seen[layer.name]}"
            sources = [None if of is None else number[of] for of in layer.sources]
            share.layer = replace(layer, name=name, sources=sources)
        return reached

    def along(self, path: Sequence[tuple[Layer, int]], weights: Tensor) -> Tensor:
        """Input relevance of one path: from each channel on to the next, with all other layers closed."""
        edge, grad = get_gradient_edge(self.logits), weights
        open: tuple[Layer, ...] = ()
        for layer, channel in path:
            tap = self.taps[layer]
            self.replay.begin(last=False, open=open)
            (grad,) = torch.autograd.grad(edge, tap.edge, grad, retain_graph=True, allow_unused=True)
            if grad is None:
                what = f"nothing leads to {layer.name}"
                raise ZsuError(what, where="explain_paths", remedy="pass what find_paths found")
            only = F.one_hot(torch.tensor(channel), grad.shape[tap.axes[1]]).to(grad)  # (K,)
            only = along_channels(only, grad, tap.axes)
            edge, grad, open = tap.edge, grad * only, (layer,)
        return self.at_input(grad, only)

    def at_input(self, grad: Tensor, only: Tensor | float = 1.0) -> Tensor:
        """Relevance of the input values, from their gradient and what rules of the input layer gave directly."""
        relevance = at_least_float32(self.input.detach()) * grad
        for direct in reversed(self.replay.direct):  # in the order of the forward pass
            relevance = relevance + only * direct.reshape(relevance.shape)
        return relevance

    def gradients(self, weights: Tensor, retain: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Of the input and the constants; what a change in place makes impossible is said with a remedy."""
        leaves = [self.input, *(constant for constant, _ in self.constants)]
        try:
            found = torch.autograd.grad(self.logits, leaves, weights, allow_unused=True, retain_graph=retain)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            what, remedy = "a tensor that the backward pass needs is changed in place", "use the out-of-place function"
            raise ZsuError(what, where="explain", remedy=f"{remedy} in the model") from error
        if found[0] is None:
            raise unrelated([])
        return found[0], found[1:]

    # -- forward

    def __torch_function__(self, func, types, args=(), kwargs=None):
        call = Call(func, name_of(func), args, kwargs or {})
        tensors = tensors_in((*args, *call.kwargs.values()))
        tensors = tensors[:1] if call.name in operations.LIKE else tensors
        flow = [t for t in tensors if t in self.origins]
        sides = [t for t in tensors if t in self.sides]
        if not (flow or sides) or (call.name in operations.FRESH and len(tensors) == 1):
            return self.outside.compute(call, [] if flow or sides else tensors)
        if call.name in operations.READS and tensors[0] is args[0]:
            return self.read(call)
        if call.name == "grad_fn":  # there is none where the model runs by itself; hooks on it would change relevance
            return None
        if flow and not call.asks:
            call = call.positional()
            self.check(call, flow)
        for t in flow:
            self.origins[t].only_relus &= call.asks or call.name in operations.RELU
        if len(tensors) > len(flow) + len(sides) or self.outside.reads:
            self.outside.meet(call, [t for t in tensors if t not in self.origins and t not in self.sides])
        if sides:
            return self.beside(call, flow, sides)
        if not torch.is_grad_enabled():
            return self.aside(call.run(), None, gate=False)
        origins = [self.origins[t] for t in flow]
        try:
            return self.dispatch(call, flow)
        finally:
            for origin in origins:
                origin.read = True

    def dispatch(self, call: Call, flow: list[Tensor]) -> Any:
        """What the model gets for the call."""
        func, name, args, kwargs = call = call.in_known_words()
        if name in operations.CONV or name in operations.CONV_TRANSPOSE:
            return self.convolution(call, *args, **kwargs)
        if name in ("linear", "batch_norm", "layer_norm", "group_norm"):
            return getattr(self, name)(func, *args, **kwargs)
        if name in operations.ATTENTION:
            return getattr(attention, name)(self, *args, **kwargs)
        if name in operations.ADD:
            return self.add(*args, in_place=call.in_place, **kwargs)
        if name in operations.SUBTRACT:
            return self.subtract(*args, in_place=call.in_place, **kwargs)
        if name in ("rsub", "__rsub__"):
            return self.subtract(args[1], args[0], **kwargs)
        if name in ("cat", "concat", "concatenate", "stack"):
            kwargs = {"dim" if key == "axis" else key: value for key, value in kwargs.items()}
            return (self.stack if name == "stack" else self.cat)(*args, **kwargs)
        if name in ("maximum", "minimum") and flow[0] is args[1]:
            call = call._replace(args=args[::-1])
        if name in operations.BENDING and len(flow) == 1 and flow[0] is call.args[0]:
            return self.bending(call)
        if name in operations.GATES_AND_MASKS:
            return self.gate(call)
        if len(flow) > 1 and name in operations.PRODUCTS:
            return self.product(call)
        return self.other(call, flow)

    def check(self, call: Call, flow: list[Tensor]) -> None:
        """Refuse what the tape would follow wrongly."""
        name = call.name
        if any(self.origins[t].version != t._version for t in flow):
            what = f"{name!r} reads a tensor that was changed in place by way of a view of it"
            raise ZsuError(what, where="explain", remedy="use the out-of-place function in the model")
        if call.kwargs.get("out") is not None:
            raise ZsuError(f"{name!r} writes into out=", where="explain", remedy="use what it returns")
        if name in operations.WITH_WEIGHTS and any(t is not call.args[0] for t in flow):
            what = f"weights of {name!r} depend on the input"
            raise ZsuError(what, where="explain", remedy="explain a model without it")

    def note(self, out: Tensor, axes: Axes, sources: Tensor | None, nonnegative=False, **more) -> Tensor:
        """`out`, as a tensor that relevance flows through."""
        self.origins[out] = Origin(axes, sources, nonnegative, out._version, **more)
        return out

    def note_like(self, x: Tensor, out: Tensor, by: str) -> Tensor:
        """`out`, which the operation `by` made of x, whose values have the signs, and stand at the places, of x's."""
        origin = self.origins[x]
        front = origin.front and origin.front.then(by, None)
        return self.note(out, origin.axes, origin.sources, origin.nonnegative, front=front)

    def row(self, kind: str, axes: Axes, name: str | None = None) -> Step:
        """A step that keeps a share of the relevance and that no path leads through."""
        step = Step(Layer(kind, name or kind), axes, self.replay)
        self.rows.append(step.layer)
        return step

    def layer_output(self, step: Step, out: Tensor, known: bool = True, **more) -> Tensor:
        """The output of a new layer, whose channels, one without an axis, are sources of what reads it where known."""
        self.rows.append(step.layer)
        batch, channel = step.axes
        if self.keeps_taps and channel is not None:
            self.taps[step.layer] = Tap(get_gradient_edge(out), (batch, channel), out.detach().clone())
        begin = self.numbers.add(step.layer, 1 if channel is None else out.shape[channel])
        sources = numbered(begin, out, channel) if known else None
        return self.note(out, step.axes, sources, layer=step.layer, **more)

    # -- weighted layers

    def convolution(self, call: Call, input, weight, bias=None, stride=1, padding=0, *rest, **kwargs) -> Tensor:
        name = call.name
        transposed = name in operations.CONV_TRANSPOSE
        dim = int(name[-2])  # conv2d: 2
        keys = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        options = {"dilation": 1, "groups": 1, "output_padding": 0} | dict(zip(keys, rest, strict=False)) | kwargs
        groups = options["groups"]
        wanted = weight.shape[0] if transposed else weight.shape[1] * groups
        where = self.where(weight, name)
        if input.dim() != dim + 2 or input.shape[1] != wanted:
            shape = ", ".join(["N", str(wanted), *"DHW"[-dim:]])
            what = f"its input has shape {tuple(input.shape)}, it wants ({shape})"
            raise ZsuError(what, where=where, remedy="pass a batch with that number of channels")
        value = self.value(call.func, where, input, weight, bias, stride, padding, *rest, **kwargs)
        stride, dilation = as_list(stride, dim), as_list(options["dilation"], dim)
        if padding == "same":
            padding = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]  # both sides together
            if any(p % 2 for p in padding):  # torch puts the odd pixel behind
                sides = [s for p in reversed(padding) for s in (p // 2, p - p // 2)]
                input, padding = self.note_like(input, F.pad(input, sides), "pad"), [0] * dim
            padding = [p // 2 for p in padding]
        padding = as_list(0 if padding == "valid" else padding, dim)
        op = Conv(stride, padding, dilation, transposed, as_list(options["output_padding"], dim), groups)
        return self.weighted(name, where, op, input, weight, bias, value)

    def linear(self, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        where = self.where(weight, "linear")
        if input.shape[-1] != weight.shape[1]:
            what = f"its input has shape {tuple(input.shape)}, it wants (..., {weight.shape[1]})"
            raise ZsuError(what, where=where, remedy="pass images of the size that the model was built for")
        value = self.value(func, where, input, weight, bias)
        return self.weighted("linear", where, Linear(), input, weight, bias, value)

    def batch_norm(
        self, func, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ) -> Tensor:
        """y = s x + t. Right after a convolution or a Linear on (N, J): one weighted layer (w s, b s + t); elsewhere an
        affine layer of its own.
        """
        where = self.where(weight, "batch_norm")
        if training or running_mean is None:
            remedy = "call model.eval(); BatchNorm without running statistics cannot be explained"
            raise ZsuError("BatchNorm computes the statistics of the batch", where=where, remedy=remedy)
        with torch.no_grad():
            s = torch.rsqrt(at_least_float32(running_var) + eps)
            s = s if weight is None else s * weight
            t = -running_mean * s if bias is None else bias - running_mean * s
        value = self.value(func, "batch_norm", input, running_mean, running_var, weight, bias, False, momentum, eps)
        step = self.steps.get(self.origins[input].layer)
        if not isinstance(step, Weighted) or not step.takes_in_batch_norm:
            return self.weighted("batch_norm", where, Affine(), input, s, t, value)
        with torch.no_grad():
            b = t if step.b is None else step.b * s + t
            s = s if step.s is None else step.s * s
        return self.follow(replace(step, layer=replace(step.layer), z=value, s=s, b=b))

    def value(self, func: Callable, where: str, *args, **kwargs) -> Tensor:
        """The layer's own output; what torch refuses is said with the layer's name."""
        try:
            with torch.no_grad():
                return func(*args, **kwargs)
        except RuntimeError as error:
            remedy = "give images of the model's dtype, device and size"
            raise ZsuError(str(error).splitlines()[0], where=where, remedy=remedy) from error

    def weighted(
        self, kind: str, name: str, op: Conv | Linear | Affine, x: Tensor, w: Tensor, b: Tensor | None, value: Tensor
    ) -> Tensor:
        """The output of op(x) with weights w and bias b, which is `value`, as a layer of that name."""
        if value.dtype != x.dtype:
            what = f"it takes {x.dtype} and gives {value.dtype}, as under autocast"
            raise ZsuError(what, where=name, remedy="take autocast out of the model's forward")
        origin, channel = self.origins[x], x.dim() - 1 if isinstance(op, Linear) else 1
        batch = None if origin.axes[0] == channel else origin.axes[0]
        sources = along(origin.sources, channel, x.shape[channel])
        layer = Layer(kind, name, self.parameters.get(id(w)), op.groups, [sources])
        w, b = w.detach(), None if b is None else b.detach()
        return self.follow(Weighted(layer, (batch, channel), self.replay, op=op, x=x, origin=origin, z=value, w=w, b=b))

    def follow(self, step: Weighted) -> Tensor:
        """The output of a weighted layer."""
        self.steps[step.layer] = step
        out = self.layer_output(step, FollowRule.apply(step.x, step))
        step.read_by = self.origins[out]
        return out

    def where(self, parameter: Tensor | None, kind: str) -> str:
        """The name of its parameter, or of what that is computed from, without the last part; else the kind."""
        name = self.names.get(id(parameter)) or self.outside.name(parameter) or ""
        parts = name.partition(".parametrizations.") if ".parametrizations." in name else name.rpartition(".")
        return parts[0] or kind

    # -- norms and activations

    def layer_norm(self, func, input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
        shape = list(normalized_shape)
        grouped = [*input.shape[: input.dim() - len(shape)], *shape]
        w, b = (None if p is None else p.detach() for p in (weight, bias))
        how = Normalisation("layer_norm", grouped, len(shape), w, b, eps)
        channel = self.origins[input].axes[1]
        known = channel is not None and channel >= input.dim() - len(shape)
        return self.norm(self.where(weight, "layer_norm"), input, how, known)

    def group_norm(self, func, input, num_groups, weight=None, bias=None, eps=1e-5) -> Tensor:
        n, channels, *positions = input.shape
        grouped = [n, num_groups, channels // num_groups, *positions]
        shape = [-1] + [1] * len(positions)  # (C,) -> (C, 1, ...)
        w, b = (None if p is None else p.detach().reshape(shape) for p in (weight, bias))
        how = Normalisation("group_norm", grouped, len(grouped) - 2, w, b, eps)
        known = self.origins[input].axes[1] == 1
        return self.norm(self.where(weight, "group_norm"), input, how, known, num_groups)

    def norm(self, name: str, x: Tensor, how: Normalisation, known: bool, groups: int = 1) -> Tensor:
        """x normalised; `known`: its channels are the ones that this mixes."""
        origin = self.origins[x]
        sources = along(origin.sources, origin.axes[1], x.shape[origin.axes[1]]) if known else None
        step = Step(Layer(how.kind, name, None, groups, [sources]), origin.axes, self.replay)
        return self.layer_output(step, Norm.apply(x, step, how, self.edges and known), known)

    def bending(self, call: Call) -> Tensor:
        x, *rest = call.args
        bounds = tensors_in((*rest, *call.kwargs.values()))
        if torch.broadcast_shapes(x.shape, *(t.shape for t in bounds)) != x.shape:
            return self.unknown(call)
        if not zero_at_zero(call, x.dtype):
            raise ZsuError(f"{call.name!r} is not 0 at 0", where="explain", remedy="use an activation with f(0) = 0")
        if call.in_place:
            self.protect(x)
        return self.note_like(x, Ratio.apply(x, lambda t: call.func(t, *rest, **call.kwargs), call.in_place), call.name)

    # -- additions

    def add(self, a: Any, b: Any, *, alpha: float = 1, in_place: bool = False) -> Tensor:
        if alpha != 1:
            raise ZsuError("addition with alpha", where="add", remedy="explain a model without it")
        if a not in self.origins or b not in self.origins:
            return self.add_constant(a, b, in_place)
        if a.shape != b.shape:
            raise ZsuError(f"adds {tuple(a.shape)} and {tuple(b.shape)}", where="add", remedy="use equal shapes")
        if in_place:
            self.protect(a)
        of_a, of_b = self.origins[a], self.origins[b]
        batch = of_a.axes[0] if of_a.axes[0] == of_b.axes[0] else None
        channel = shared_axis(of_a, of_b)
        sources = [along(of.sources, channel, 1 if channel is None else a.shape[channel]) for of in (of_a, of_b)]
        step = Step(Layer("add", "add", sources=sources), (batch, channel), self.replay)
        self.steps[step.layer] = step
        nonnegative = of_a.nonnegative and of_b.nonnegative
        known = channel is not None or all(of is not None for of in sources)
        return self.layer_output(step, Addition.apply(a, b, step, in_place), known, nonnegative=nonnegative)

    def subtract(self, a: Any, b: Any, *, alpha: float = 1, in_place: bool = False) -> Tensor:
        """a - b as a + (-b)."""
        minus = self.other(Call(torch.mul, "mul", (b, -1.0), {}), [b]) if b in self.origins else -b
        return self.add(a, minus, alpha=alpha, in_place=in_place)

    def add_constant(self, a: Any, b: Any, in_place: bool) -> Tensor:
        x, constant = (a, b) if a in self.origins else (b, a)
        if in_place and x is not a:
            raise ZsuError("adds the input's flow to a fixed tensor in place", where="add_", remedy="use a + b")
        if in_place:
            self.protect(a)
        if isinstance(constant, Number):
            constant = x.detach().new_full((), constant)
        constant = torch.as_tensor(constant, dtype=x.dtype, device=x.device)
        origin = self.origins[x]
        step = self.row("constant", origin.axes, self.names.get(id(constant)))
        out = Meter.apply(x.clone() if in_place else x, step, "into") + self.leaf(constant, step)
        more = out.dim() - x.dim()  # x may have been broadcast
        batch, channel = (None if i is None else i + more for i in origin.axes)
        out = Meter.apply(out, replace(step, axes=(batch, channel)), "out")
        if in_place:
            out = a.copy_(out)
        change = None if out.shape != x.shape else lambda t: t + constant
        front = origin.front and origin.front.then("add", change)
        sources = None if origin.sources is None else origin.sources[(None,) * more]
        return self.note(out, (batch, channel), sources, front=front)

    def leaf(self, constant: Tensor, step: Step) -> Tensor:
        """The constant as a leaf, whose share of the relevance belongs to that step."""
        leaf = constant.detach().requires_grad_()
        self.constants.append((leaf, step.layer))
        return leaf

    def cat(self, tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
        flows = [t for t in tensors if t in self.origins]
        origins = [self.origins[t] for t in flows]
        axes, sources = origins[0].axes, None
        if any(o.axes != axes for o in origins):
            axes = (axes[0] if all(o.axes[0] == axes[0] for o in origins) else None, None)
        dim, complete = dim % flows[0].dim(), len(flows) == len(tensors)
        if complete:
            out = torch.cat(tensors, dim)
        else:
            step = self.row("constant", axes, "cat")
            parts = [Meter.apply(t, step, "into") if t in self.origins else self.leaf(t, step) for t in tensors]
            out = Meter.apply(torch.cat(parts, dim), step, "out")
        if all(o.sources is not None for o in origins):
            there = [t for t in tensors if t.dim() == out.dim()]  # torch lets an empty vector pass
            parts = [self.origins[t].sources if t in self.origins else None for t in there]
            sources = joined(parts, [t.shape[dim] for t in there], dim, axes[1])
            axes = (axes[0], channel_axis(sources, axes[1]))
        axes = (None, axes[1]) if dim == axes[0] else axes
        front = next((o.front.then("cat", None) for o in origins if o.front), None)
        return self.note(out, axes, sources, complete and all(o.nonnegative for o in origins), front=front)

    def stack(self, tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
        dim %= tensors[0].dim() + 1
        with self:  # recorded as if the model did it
            return torch.cat([t.unsqueeze(dim) for t in tensors], dim)

    # -- products: gates, attention

    def beside(self, call: Call, flow: list[Tensor], sides: list[Tensor]) -> Any:
        """An operation on tensors that depend on the input outside the flow, alone or together with the flow."""
        name, gates = call.name, all(self.sides[t].gate for t in sides)
        if flow and gates and (name in operations.PRODUCTS or name == "einsum"):
            return self.other(call, flow)
        if flow and name in operations.ATTENTION:
            return getattr(attention, name)(self, *call.args, **call.kwargs)
        side = next((self.sides[t] for t in sides if not self.sides[t].gate), self.sides[sides[0]])
        if flow and not call.asks:
            side = Side(side.by, False, side.joins or name)
            self.check_unchanged(call, side)
        with torch.no_grad():
            out = call.run()
        stays = gates and not flow and name in operations.STAYS_GATE
        side = Side(name, True) if name in operations.GATES_AND_MASKS else side._replace(gate=stays)
        return self.aside(call.args[0] if name in operations.SETTING else out, *side)

    def aside(self, out: Any, by: str | None, gate: bool, joins: str | None = None) -> Any:
        """`out`, as what depends on the input outside the flow."""
        for t in tensors_in((out,)):
            if t not in self.origins or t._version != self.origins[t].version:  # else .contiguous() of what is so
                self.origins.pop(t, None)
                self.sides[t] = Side(by, gate, joins)
        return out

    def read(self, call: Call) -> Any:
        """What takes values out of a tensor: a number, a list, an array, a place in memory."""
        self.outside.reads.append(call.name)
        return self.aside(call.on(call.args[0].detach()), call.name, gate=False)

    def check_unchanged(self, call: Call, side: Side) -> None:
        """Refuse what changes the flow in place and has no rule."""
        if any(t in self.origins and call.changes(t) for t in tensors_in(call.args[:1])):
            raise refusal(side)

    def gate(self, call: Call) -> Tensor:
        if call.name == "softmax" and self.attention == "attnlrp":
            x, *rest = call.args
            step = self.row("softmax", self.origins[x].axes)
            out = Meter.apply(call.func(Meter.apply(x, step, "into"), *rest, **call.kwargs), step, "out")
            return self.note(out, step.axes, None, nonnegative=True)
        if call.in_place:
            self.protect(call.args[0])
        with torch.no_grad():
            return self.aside(call.run(), call.name, gate=True)

    def product(self, call: Call) -> Tensor:
        """Of two tensors in the flow."""
        a, b = call.args
        if self.attention == "attnlrp" and call.name in operations.MATMUL:
            out = (call.func(a, b.detach()) + call.func(a.detach(), b)) / 2  # each gets half
            batch = self.origins[a].axes[0]
            return self.note(out, (batch if batch is not None and batch < out.dim() - 2 else None, None), None)
        with torch.no_grad():
            return self.aside(call.run(), call.name, gate=False)

    # -- everything else

    def other(self, call: Call, flow: list[Tensor]) -> Any:
        x, name, args, kwargs = flow[0], call.name, call.args, call.kwargs
        if kwargs.get("rounding_mode") is not None:
            return self.unknown(call._replace(name=f"rounding {name}"))
        if len(flow) > 1:
            return self.unknown(call)
        by_matrix = name in operations.MATMUL and x is args[0] and args[1] not in self.sides and args[1].dim() == 2
        if by_matrix:  # a Linear by hand
            value = self.value(call.func, name, *args)
            return self.weighted("linear", "linear", Linear(), x, args[1].T, None, value)
        scaled = len(flow) == 1 and name in operations.PRODUCTS and ("div" not in name or args[0] is x)
        scaled |= name == "einsum" and any(t in self.sides for t in tensors_in(args))  # with a gate
        if not (scaled or name in operations.PLAIN):
            return self.unknown(call)
        if "dropout" in name and call.argument(2, "training", kwargs.get("train", True)):
            raise ZsuError("dropout is active", where=name, remedy="call model.eval(), or pass training=False")
        if name == "pad" and call.argument(3, "value"):
            raise ZsuError("pads with a value other than 0", where="pad", remedy="use another model")
        alone = name.startswith("relu") and not self.origins[x].read
        if call.in_place and not alone:
            self.protect(x)  # a ReLU in place that reads x first zeroes only what gets no relevance
        out = call.run()
        outs = [t for t in tensors_in((out,)) if t is not x or call.in_place]  # not .to() of what is there
        made = [t for t in outs if t.is_floating_point()]
        found = origins_after(call, self.origins[x], x, made, self.replay.samples) if made else []
        self.origins.update(zip(made, found, strict=True))
        for t in outs:
            if not t.is_floating_point():
                self.aside(t, name, gate=False)
        return out

    def unknown(self, call: Call) -> Any:
        """An operation without a rule: a question, or its result leaves the flow, and is refused if it comes back."""
        self.check_unchanged(call, Side(call.name, False))
        if call.name in operations.BACKWARD:
            return call.on(call.args[0].detach().requires_grad_())
        with torch.no_grad():
            out = call.run()
        return self.aside(call.args[0] if call.name in operations.SETTING else out, call.name, gate=False)

    def weighted_steps(self) -> list[Weighted]:
        return [step for step in self.steps.values() if isinstance(step, Weighted)]

    def protect(self, t: Tensor) -> None:
        """Before t changes in place: give each step whose output shares t's memory a copy of that output."""
        for step in self.steps.values():
            if step.z is not None and step.z.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                step.z = step.z.clone()
