"""Which functions of torch do what with relevance, by name, and how their arguments are read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from ..errors import is_integer

CONV = {"conv1d", "conv2d", "conv3d"}
CONV_TRANSPOSE = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
WITH_WEIGHTS = CONV | CONV_TRANSPOSE | set("linear batch_norm layer_norm group_norm prelu".split())
ADD = set("add add_ __add__ __radd__ __iadd__".split())
SUBTRACT = set("sub sub_ __sub__ __isub__ subtract subtract_".split())
RELU = {"relu", "relu_"}
# f(x) = a(x) * x with a(x) constant around x, or linear in x, channel by channel: gradient times input is exact.
PER_CHANNEL = set(
    "relu relu_ leaky_relu leaky_relu_ prelu rrelu dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout "
    "contiguous clone to float double half bfloat16 type type_as cpu cuda "
    "interpolate max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
# f(0) = 0, bending elsewhere: R goes through whole.
BENDING = set("relu6 hardtanh hardtanh_ gelu silu elu elu_ selu selu_ celu celu_ mish hardswish tanh tanh_".split())
BENDING |= set(
    "softsign tanhshrink hardshrink softshrink threshold _threshold threshold_ maximum minimum nan_to_num".split()
)
BENDING |= set("clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_".split())
# Values stay, axes move.
RESHAPING = set("flatten ravel reshape view unflatten squeeze unsqueeze view_as reshape_as".split())
PERMUTING = set("permute transpose movedim moveaxis swapaxes swapdims".split())
ALONG_AXES = PERMUTING | set("roll flip repeat tile".split())
MOVING = ALONG_AXES | set(
    "expand expand_as broadcast_to chunk split tensor_split unbind select narrow index_select __getitem__ pad "
    "repeat_interleave channel_shuffle pixel_shuffle pixel_unshuffle".split()
)
REDUCING = {"mean", "sum", "amax"}
PLAIN = PER_CHANNEL | RESHAPING | MOVING | REDUCING
# The second tensor gives its shape or type alone.
LIKE = {"view_as", "reshape_as", "expand_as", "type_as", "to"}
# Values leave the tensors, and what follows may depend on them.
READS = set("item tolist numpy __array__ __float__ __int__ __complex__ __index__ __dlpack__ __deepcopy__".split())
READS |= set("storage untyped_storage _typed_storage data_ptr __format__ __repr__".split())
# Make tensors of what may be values that were read somewhere.
FROM_PYTHON = {"tensor", "as_tensor", "asarray", "frombuffer"}
SETTING = {"__setitem__", "__set__"}
# What the gradient passes would go on to the model's own hooks, which may change it; relevance does not.
BACKWARD = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
FRESH = set("new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like".split())
SCALING = set(
    "mul mul_ multiply div div_ divide __mul__ __rmul__ __imul__ __truediv__ __itruediv__ neg negative __neg__".split()
)
MATMUL = set("matmul bmm __matmul__ __rmatmul__".split())
PRODUCTS = SCALING | MATMUL
ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
MAY_TURN_NEGATIVE = PRODUCTS | {"einsum", "pad", "interpolate"}
GATES = set("sigmoid sigmoid_ hardsigmoid softmax".split())
# Constant around almost every x, so that they may multiply as gates do.
MASKS = set("gt ge lt le eq ne __gt__ __ge__ __lt__ __le__ __eq__ __ne__ greater less isnan isinf isfinite".split())
GATES_AND_MASKS = GATES | MASKS
# What they may go through and stay gates.
JOINING = {"cat", "concat", "concatenate", "hstack", "vstack"}
STAYS_GATE = PLAIN | SCALING | ADD | SUBTRACT | JOINING
STAYS_GATE |= {"rsub", "__rsub__", "stack", "logical_not", "bool", "t", "T", "mT", "maximum", "minimum", "clamp"}

signature = functools.lru_cache(maxsize=256)(inspect.signature)


class Call(NamedTuple):
    """A call of a function of torch."""

    func: Callable
    name: str
    args: tuple
    kwargs: dict[str, Any]

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    def on(self, x: Tensor) -> Any:
        """What the call gives with x in the place of its first argument."""
        return self.func(x, *self.args[1:], **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at that position, or of that name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def positional(self) -> Call:
        """torch.add(input=a, other=b) as torch.add(a, b)."""
        kwargs = dict(self.kwargs)
        first = tuple(kwargs.pop(name) for name in ("input", "tensors") if name in kwargs)
        second = tuple(kwargs.pop(name) for name in ("other", "mat2") if name in kwargs)
        return self._replace(args=(*first, *self.args, *second), kwargs=kwargs)

    def in_known_words(self) -> Call:
        """By a name that has a rule: x.t() as a transpose, x.max(1) and pools that tell the places too as others."""
        if (self.name in ("t", "T", "mT") and self.args[0].dim() == 2) or self.name == "mT":
            return Call(torch.transpose, "transpose", (self.args[0], -2, -1), {})
        if self.name in ("t", "T") and self.args[0].dim() < 2:
            return Call(torch.clone, "clone", self.args[:1], {})
        if self.name in ("hstack", "vstack") and self.args[0][0].dim() > 1:
            return Call(torch.cat, "cat", (self.args[0], int(self.name == "hstack")), {})
        if self.name == "max" and is_integer(self.argument(1, "dim")):
            return self._replace(name="amax")
        if self.name in ("max", "min") and isinstance(self.argument(1, "other"), Tensor):
            return self._replace(name=f"{self.name}imum")
        if self.name.endswith("_with_indices"):
            return self._replace(name=self.name.removesuffix("_with_indices"))
        return self

    def changes(self, t: Tensor) -> bool:
        """Whether it changes t in place."""
        return len(self.args) > 0 and t is self.args[0] and (self.in_place or self.name in SETTING)

    @property
    def asks(self) -> bool:
        """Whether it reads an attribute, such as shape or dtype."""
        return getattr(self.func, "__name__", None) == "__get__"

    @property
    def in_place(self) -> bool:
        """relu_(x), x *= 2, relu(x, inplace=True) or relu(x, True)."""
        if (self.name.endswith("_") and not self.name.endswith("__")) or self.name.startswith("__i"):
            return True
        if not inspect.isfunction(self.func):  # built-in functions have no argument `inplace`
            return False
        found = signature(self.func, follow_wrapped=False)  # Tensor.__pow__ wraps a built-in that has none
        return bool(found.bind(*self.args, **self.kwargs).arguments.get("inplace"))


def name_of(func: Callable) -> str:
    """A function's name; that of the attribute that is read or set, and with its library for one of torch.ops."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return func.__self__.__name__  # type: ignore[attr-defined]
    return str(func) if isinstance(func, OpOverloadPacket) and not str(func).startswith("aten.") else name


def flat(values: Iterable) -> Iterator:
    """The values and, one level deep, those in their lists and tuples."""
    return (v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,)))


def tensors_in(values: Iterable) -> list[Tensor]:
    """Tensors among the values and, one level deep, in their lists and tuples."""
    return [v for v in flat(values) if isinstance(v, Tensor)]


def as_list(value: int | tuple[int, ...] | list[int], dim: int) -> list[int]:
    """2 -> [2, 2]; (2, 3) -> [2, 3]."""
    value = list(value) if isinstance(value, (tuple, list)) else [value]
    return value * dim if len(value) == 1 else value
