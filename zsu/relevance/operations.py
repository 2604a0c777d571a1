"""Which functions of torch do what with relevance, by name, and how their arguments are read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

CONV = {"conv1d", "conv2d", "conv3d"}
CONV_TRANSPOSE = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
WITH_WEIGHTS = CONV | CONV_TRANSPOSE | set("linear batch_norm layer_norm group_norm prelu".split())
ADD = set("add add_ __add__ __radd__ __iadd__".split())
# f(x) = a(x) * x with a(x) constant around x, or linear in x, channel by channel: gradient times input is exact.
PER_CHANNEL = set(
    "relu relu_ leaky_relu leaky_relu_ prelu rrelu dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout "
    "contiguous clone interpolate max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
# f(0) = 0, bending elsewhere: R goes through whole.
BENDING = set("relu6 hardtanh hardtanh_ gelu silu elu elu_ selu selu_ celu celu_ mish hardswish tanh tanh_".split())
BENDING |= set("softsign tanhshrink hardshrink softshrink".split())
# Values stay, axes move.
RESHAPING = set("flatten reshape view unflatten squeeze unsqueeze view_as reshape_as".split())
PERMUTING = set("permute transpose movedim moveaxis swapaxes swapdims".split())
ALONG_AXES = PERMUTING | set("roll flip repeat tile".split())
MOVING = ALONG_AXES | set(
    "expand expand_as broadcast_to chunk split tensor_split unbind select narrow index_select __getitem__ pad "
    "repeat_interleave channel_shuffle pixel_shuffle pixel_unshuffle".split()
)
REDUCING = {"mean", "sum"}
PLAIN = PER_CHANNEL | RESHAPING | MOVING | REDUCING
# Return no tensor, and yet what follows depends on the input.
HIDING = set("item tolist numpy __array__ __float__ __int__ __setitem__ __set__".split())
FRESH = set("new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like".split())
SCALING = set(
    "mul mul_ multiply div div_ divide __mul__ __rmul__ __imul__ __truediv__ __itruediv__ neg negative __neg__".split()
)
MATMUL = set("matmul bmm __matmul__ __rmatmul__".split())
PRODUCTS = SCALING | MATMUL
MAY_TURN_NEGATIVE = PRODUCTS | {"pad", "interpolate"}
GATES = set("sigmoid hardsigmoid softmax".split())

signature = functools.lru_cache(maxsize=256)(inspect.signature)


class Call(NamedTuple):
    """A call of a function of torch."""

    func: Callable
    name: str
    args: tuple
    kwargs: dict[str, Any]

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at that position, or of that name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def positional(self) -> Call:
        """torch.add(input=a, other=b) as torch.add(a, b)."""
        kwargs = dict(self.kwargs)
        first, second = ((kwargs.pop(name),) if name in kwargs else () for name in ("input", "other"))
        return self._replace(args=(*first, *self.args, *second), kwargs=kwargs)

    def spelled_out(self) -> Call:
        """The property x.mT as the function it stands for."""
        name = getattr(getattr(self.func, "__self__", None), "__name__", "") if self.name == "__get__" else ""
        if name == "mT" or (name == "T" and self.args[0].dim() == 2):
            return Call(Tensor.transpose, "transpose", (self.args[0], -2, -1), {})
        return self

    @property
    def in_place(self) -> bool:
        """relu_(x), x *= 2, relu(x, inplace=True) or relu(x, True)."""
        if (self.name.endswith("_") and not self.name.endswith("__")) or self.name.startswith("__i"):
            return True
        if not inspect.isfunction(self.func):  # built-in functions have no argument `inplace`
            return False
        found = signature(self.func)
        return bool(found.bind(*self.args, **self.kwargs).arguments.get("inplace"))


def tensors_in(values: Iterable) -> list[Tensor]:
    """Tensors among the values and, one level deep, in their lists and tuples."""
    flat = (v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,)))
    return [v for v in flat if isinstance(v, Tensor)]


def as_list(value: int | tuple[int, ...] | list[int], dim: int) -> list[int]:
    """2 -> [2, 2]; (2, 3) -> [2, 3]."""
    value = list(value) if isinstance(value, (tuple, list)) else [value]
    return value * dim if len(value) == 1 else value
