"""Methods of forgetting as data: what each needs of the data, its options, and the edit that it makes.

A method is a frozen class below `Method`, as a relevance rule is one below `Rule`: its name, its tier, its options with
their defaults, and

    edit(model, x, target, retained, seed)  ->  Edit(cut, budget)

which changes `model`, a copy in eval mode, in place so that it forgets the class `target`. `x` are samples (N, C, H, W)
that `forget` has checked, `retained` is a data set without the class, or None, and `seed` decides all that is random.
To add a method, write such a class; ten lines are enough (see `Zeroed`). `forget` takes ``Yours()`` as it takes a name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import ZsuError, check_count
from ..relevance import explain
from .perturb import Patch, Selection, check_noise, parameters, perturb, write
from .rerouting import module_of

T = TypeVar("T")
MASKED_LOGIT = -1e4  # small enough for probability 0 in float16, float32 and float64


def no_rows() -> pd.DataFrame:
    """A `Forgotten.cut` of nothing."""
    return pd.DataFrame({"layer": [], "channel": [], "source": []}, dtype=object)


class Edit(NamedTuple):
    """What an edit did: `Forgotten.cut` for one class, and the budget that was found, by name (as JSON can hold it)."""

    cut: pd.DataFrame
    budget: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods share. An option is a field of the class.

    Attributes
    ----------
    name : str
        What `zsu.forget` and tables call it.
    tier : str
        By the data that it needs: T0 nothing but weights, T1 a few unseen samples of the class, T2 its training images,
        T3 also some retained samples, T4 all of them.
    """

    name = ""
    tier = "T0"

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """See the module's docstring."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Perturbing(Method):
    """A method that sets weights to 0 or adds noise to them.

    Parameters
    ----------
    k : int, optional
        How much: see the method.
    perturbation : {"zero", "gaussian", "laplace"}
    scale : float
    absolute : bool
        See `zsu.forgetting.perturb.perturb`.
    """

    perturbation: str = "zero"
    scale: float = 1.0
    absolute: bool = False
    k: int | None = None

    def __post_init__(self):
        check_noise(self.perturbation, self.scale, self.absolute)
        object.__setattr__(self, "scale", float(self.scale))  # of whatever kind the number was
        for option in ("k", "perturbed"):  # which some have
            if getattr(self, option, None) is not None:
                check_count(option, getattr(self, option), self.name)
        if getattr(self, "perturbed", None) is not None and self.k is None:
            raise ZsuError("perturbed without k", where=self.name, remedy="give both")

    def patch(self, model: nn.Module, selection: Selection, seed: int) -> Patch:
        """The selected weights, perturbed."""
        return perturb(model, selection, self.perturbation, scale=self.scale, absolute=self.absolute, seed=seed)


def try_out(model: nn.Module, patch: Patch, measure: Callable[[], T]) -> T:
    """What is measured while the model holds the patch, which was made for it just now."""
    held = parameters(model)
    try:
        for name, change in patch.changes.items():
            write(held[name], change.index, change.new)
        return measure()
    finally:
        for name, change in patch.changes.items():
            write(held[name], change.index, change.old)


# --- controls -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BiasShift(Method):
    """Control: the class's bias becomes a constant far below every logit."""

    name = "bias-shift"
    row = False  # whether the class's row of the head becomes 0

    @torch.no_grad()
    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Checked on x: the class is gone, and the other logits are what they were."""
        before = model(x)
        head = explain(model, x[:1], target, edges=False).layers[-1]
        held = dict(model.named_parameters())
        bias = module_of(head.weight) + ".bias" if head.weight else None
        if head.kind != "linear" or bias not in held:
            raise ZsuError("the last layer is not a Linear with bias", where=head.name, remedy="use another method")
        others = torch.arange(before.shape[1], device=x.device) != target
        if target < len(held[bias]):
            if self.row:
                held[head.weight][target] = 0
            held[bias][target] = MASKED_LOGIT
        after = model(x)
        same = torch.allclose(after[:, others], before[:, others], rtol=1e-3, atol=1e-3)
        if not same or after.float().softmax(1)[:, target].max() > 1e-6:
            what = "the outputs of the last layer are not the logits in their order"
            raise ZsuError(what, where=head.name, remedy="use another method")
        return Edit(pd.DataFrame({"layer": [head.name], "channel": [target], "source": pd.NA}), {})


@dataclass(frozen=True, kw_only=True)
class Mask(BiasShift):
    """Control: the class's logit becomes a constant far below all others, whatever the input."""

    name = "mask"
    row = True


@dataclass(frozen=True, kw_only=True)
class Zeroed(Method):
    """Control: all weights are 0."""

    name = "zeroed"

    @torch.no_grad()
    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Whatever the class."""
        for p in model.parameters():
            p.zero_()
        return Edit(no_rows(), {})
