"""LRP rules as data: how one weighted layer hands the relevance of its outputs to its inputs.

A weighted layer computes z_k = sum_j x_j w_jk + b_k. A rule names modified copies of the layer, its *bases*, and splits
the outgoing relevance R (the shape of z) into *portions* that flow along sums of them:

    rule(R, z, b, signs)  ->  bases, portions
    bases    = [(part, change), ...]              part: what a base sees of the input, change(w): its weights
    portions = [(share of R, [coefficient of each base], bias), ...]

``part`` is ``"x"``, ``"|x|"``, ``"+"`` for max(x, 0), ``"-"`` for min(x, 0), or a constant (number or tensor) that
stands in for the input; ``signs`` is what the layer's place says of signs. The engine (:mod:`zsu.relevance.weighted`)
computes zr = sum_m coefficient_m (part_m change_m(w)) + bias for every portion, and hands

    R_j <- sum_k sum_m coefficient_m part_m,j change_m(w)_jk  share_k / (zr_k + sign(zr_k) epsilon).

To add a rule, write such a function into a class below `Rule`; ten lines are enough (see `WSquare`).

Sources: Bach et al. (2015), PLOS ONE 10(7), eqs. 58 and 60; Montavon et al. (2017), Pattern Recognition 65, sec. 4;
Montavon et al. (2019), LNCS 11700, sec. 10.2; Lapuschkin et al. (2019), Nature Communications 10, supplement (flat);
for inputs of both signs the generalised gamma rule of Anders et al. (2021), arXiv:2106.13200.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ZsuError, is_number

Part = str | float | Tensor
Base = tuple[Part, Callable[[Tensor], Tensor]]
Portion = tuple[Tensor, list[float], Tensor | None]
Split = tuple[list[Base], list[Portion]]


class Signs(NamedTuple):
    """What is known of the signs at a layer from what stands around it, without a look at values."""

    positive_inputs: bool  # no x is below 0
    rectified: bool  # a ReLU alone reads z, so that no relevance arrives where z is below 0


def same(w: Tensor) -> Tensor:
    """w: the layer as it is."""
    return w


def like(x: Tensor, value: float | Tensor) -> Tensor:
    """The value in the shape of x, on its device and of its dtype; a number is not sent there."""
    t = value.to(x) if isinstance(value, Tensor) else x.new_full((), value)
    return t.expand_as(x)


def positive(t: Tensor) -> Tensor:
    """max(t, 0)."""
    return t.clamp(min=0)


def negative(t: Tensor) -> Tensor:
    """min(t, 0)."""
    return t.clamp(max=0)


@dataclass(frozen=True)
class Rule:
    """What all rules share: the stabiliser.

    Parameters
    ----------
    epsilon : float
        Added to every denominator with the denominator's own sign; the relevance it swallows is the ledger's
        ``stabiliser`` column. Denominators of float16 and bfloat16 models are float32.
    """

    epsilon: float = field(default=1e-6, kw_only=True)

    def __post_init__(self):
        if not is_number(self.epsilon) or self.epsilon <= 0:
            what, remedy = f"epsilon is {self.epsilon!r}", "use a finite number above 0"
            raise ZsuError(what, where=type(self).__name__, remedy=remedy)

    def __call__(self, R: Tensor, z: Tensor, b: Tensor | None, signs: Signs) -> Split:
        """Bases and portions, see the module's docstring."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """`ZsuError` for inputs of the model that the rule is not made for."""

    def behind(self, front: Callable[[Tensor], Tensor], x: Tensor) -> "Rule":
        """The rule for a layer that reads front(x) instead of the model's input x, with each value changed alone."""
        return self


@dataclass(frozen=True)
class Epsilon(Rule):
    """R_j = sum_k x_j w_jk R_k / (z_k + sign(z_k) epsilon). Bach et al. (2015), eq. 58."""

    epsilon: float = 1e-6

    def __call__(self, R: Tensor, z: Tensor, b: Tensor | None, signs: Signs) -> Split:
        return [("x", same)], [(R, [1.0], b)]


@dataclass(frozen=True)
class Gamma(Rule):
    """Favours what supports the output: w + gamma w+ where z > 0, w + gamma w- where z < 0.

    Montavon et al. (2019), sec. 10.2.3, in the generalised form for inputs of both signs, which adds gamma times the
    contributions of z's own sign. As x w + |x w| is twice the positive contribution, two bases do for all signs.

    Parameters
    ----------
    gamma : float
        0 is the epsilon rule; towards infinity it becomes z+ (for positive inputs).
    """

    gamma: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        if not is_number(self.gamma) or self.gamma < 0:
            raise ZsuError(f"gamma is {self.gamma!r}", where="Gamma", remedy="use a finite number of at least 0")

    def __call__(self, R: Tensor, z: Tensor, b: Tensor | None, signs: Signs) -> Split:
        gamma, half = self.gamma, self.gamma / 2
        above_bias, below_bias = (None if b is None else b + gamma * clip(b) for clip in (positive, negative))
        if signs == (True, True):  # w + gamma w+ is 1 + gamma times a leaky ReLU of w
            return [("x", lambda w: F.leaky_relu(w, 1 / (1 + gamma)))], [(R, [1 + gamma], above_bias)]
        portions = [(R if signs.rectified else torch.where(z > 0, R, 0), [1 + half, half], above_bias)]
        if not signs.rectified:
            portions.append((torch.where(z < 0, R, 0), [1 + half, -half], below_bias))
        return [("x", same), ("|x|", torch.abs)], portions


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """alpha times the positive contributions minus beta times the negative ones. Bach et al. (2015), eq. 60.

    Parameters
    ----------
    alpha, beta : float
        alpha - beta = 1 keeps the sum. ``AlphaBeta(1, 0)`` is the z+ rule.
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        numbers = is_number(self.alpha) and is_number(self.beta)
        if not numbers or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            what = f"alpha={self.alpha!r}, beta={self.beta!r} do not keep the sum of relevance"
            raise ZsuError(what, where="AlphaBeta", remedy="choose beta >= 0 and alpha = 1 + beta")

    def __call__(self, R: Tensor, z: Tensor, b: Tensor | None, signs: Signs) -> Split:
        up_bias, down_bias = (None, None) if b is None else (positive(b), negative(b))
        up = (self.alpha * R, [1.0, 1.0, 0.0, 0.0], up_bias)
        down = (-self.beta * R, [0.0, 0.0, 1.0, 1.0], down_bias)
        bases: list[Base] = [("+", positive), ("-", negative), ("+", negative), ("-", positive)]
        return bases, [up, down] if self.beta else [up]


@dataclass(frozen=True)
class Box(Rule):
    """z^B, for inputs that lie in a box: R_j = sum_k (x_j w_jk - l_j w+_jk - h_j w-_jk) R_k / z_k.

    Montavon et al. (2017), sec. 4.2. Only for layers that read the model's input, as are `WSquare` and `Flat`.

    Parameters
    ----------
    low, high : float or Tensor
        The least and the greatest input value there can be, such as 0 and 1; for normalised images tensors of shape
        (1, C, 1, 1). Where the model itself normalises, by arithmetic with constants, the box is that of its input.
    """

    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def check(self, x: Tensor) -> None:
        """`ZsuError` for inputs outside the box."""
        low, high = self.ends(x)
        if not ((low <= x) & (x <= high)).all():
            remedy = "give the least and the greatest value that inputs can have as Box(low, high)"
            what = f"inputs from {float(x.min()):.4g} to {float(x.max()):.4g} leave the box"
            raise ZsuError(what, where="Box", remedy=remedy)

    def ends(self, x: Tensor) -> list[Tensor]:
        """The least and the greatest value for each of the inputs x, like it."""
        try:
            return [like(x, t) for t in (self.low, self.high)]
        except (TypeError, ValueError, RuntimeError) as error:
            what, remedy = f"from {self.low!r} to {self.high!r}", "pass numbers, or tensors of shape (1, C, 1, 1)"
            raise ZsuError(what, where="Box", remedy=remedy) from error

    def behind(self, front: Callable[[Tensor], Tensor], x: Tensor) -> "Box":
        """The box that the changed inputs lie in."""
        ends = [front(end) for end in self.ends(x)]
        return replace(self, low=torch.minimum(*ends), high=torch.maximum(*ends))

    def __call__(self, R: Tensor, z: Tensor, b: Tensor | None, signs: Signs) -> Split:
        return [("x", same), (self.low, positive), (self.high, negative)], [(R, [1.0, -1.0, -1.0], None)]


@dataclass(frozen=True)
class WSquare(Rule):
    """w^2, for inputs without bounds: R_j = sum_k w_jk^2 R_k / (sum_i w_ik^2 + b_k^2). Montavon et al. (2017), 4.1."""

    def __call__(self, R: Tensor, z: Tensor, b: Tensor | None, signs: Signs) -> Split:
        return [(1.0, torch.square)], [(R, [1.0], None if b is None else b**2)]


@dataclass(frozen=True)
class Flat(Rule):
    """Every input in reach gets the same. Lapuschkin et al. (2019), supplement."""

    def __call__(self, R: Tensor, z: Tensor, b: Tensor | None, signs: Signs) -> Split:
        return [(1.0, torch.ones_like)], [(R, [1.0], None)]


RULES = {
    "epsilon": Epsilon(),
    "gamma": Gamma(),
    "z+": AlphaBeta(alpha=1.0, beta=0.0),
    "alpha-beta": AlphaBeta(),
    "box": Box(),
    "w2": WSquare(),
    "flat": Flat(),
}


def as_rule(rule: str | Rule) -> Rule:
    """The rule of that name, or the rule itself; `ZsuError` with the known names otherwise."""
    if isinstance(rule, str) and rule in RULES:
        return RULES[rule]
    if isinstance(rule, Rule):
        return rule
    raise ZsuError(f"unknown rule {rule!r}", where="rules", remedy=f"use one of {', '.join(RULES)}, or a Rule")
