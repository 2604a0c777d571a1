"""LRP rules as data: how one weighted layer hands the relevance of its outputs to its inputs.

A weighted layer computes z_k = sum_j x_j w_jk + b_k. A rule splits the outgoing relevance R (the shape of z)
into portions, and says for each portion along which modified layer it flows:

    rule(R, z, w, b)  ->  yields (portion, terms),  terms = [(part, w_m, b_m), ...]

``part`` names the share of the input a term sees: ``"x"`` all of it, ``"+"`` max(x, 0), ``"-"`` min(x, 0).
The engine (:mod:`zsu.tape`) computes, for every portion, zr = sum_m x_m w_m + b_m and hands

    R_j <- sum_k sum_m x_m,j w_m,jk  portion_k / (zr_k + sign(zr_k) epsilon).

To add a rule, write a class with an ``epsilon`` and a ``__call__`` that yields such pairs.

Sources: Bach et al. (2015), PLOS ONE 10(7), eqs. 58 and 60; Montavon et al. (2019), LNCS 11700, sec. 10.2; for
inputs of both signs the generalised gamma rule of Anders et al. (2021), arXiv:2106.13200.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import ZsuError

Portions = Iterator[tuple[Tensor, list[tuple[str, Tensor, Tensor | None]]]]


def positive(t: Tensor | None) -> Tensor | None:
    """max(t, 0); None stays None."""
    return None if t is None else t.clamp(min=0)


def negative(t: Tensor | None) -> Tensor | None:
    """min(t, 0); None stays None."""
    return None if t is None else t.clamp(max=0)


@dataclass(frozen=True)
class Rule:
    """What all rules share: the stabiliser.

    Parameters
    ----------
    epsilon : float
        Added to every denominator with the denominator's own sign; the relevance it swallows is the ledger's
        ``stabiliser`` column. In float16 it is raised to the smallest normal number of that type.
    """

    epsilon: float = field(default=1e-6, kw_only=True)

    def __post_init__(self):
        if not self.epsilon > 0:
            raise ZsuError(f"epsilon is {self.epsilon}", where=type(self).__name__, remedy="use a number above 0")


@dataclass(frozen=True)
class Epsilon(Rule):
    """R_j = sum_k x_j w_jk R_k / (z_k + sign(z_k) epsilon). Bach et al. (2015), eq. 58."""

    def __call__(self, R: Tensor, z: Tensor, w: Tensor, b: Tensor | None) -> Portions:
        yield R, [("x", w, b)]


@dataclass(frozen=True)
class Gamma(Rule):
    """Favours what supports the output: w + gamma w+ where z > 0, w + gamma w- where z < 0.

    Montavon et al. (2019), sec. 10.2.3, in the generalised form for inputs of both signs.

    Parameters
    ----------
    gamma : float
        0 is the epsilon rule; towards infinity it becomes z+ (for positive inputs).
    """

    gamma: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        if not self.gamma >= 0:
            raise ZsuError(f"gamma is {self.gamma}", where="Gamma", remedy="use a number of at least 0")

    def __call__(self, R: Tensor, z: Tensor, w: Tensor, b: Tensor | None) -> Portions:
        favoured = (positive, negative), (negative, positive)
        for on, (toward, against) in zip((z > 0, z < 0), favoured, strict=True):
            portion = torch.where(on, R, 0)
            if portion.any():  # below a ReLU no relevance arrives where z < 0
                yield (
                    portion,
                    [
                        ("+", w + self.gamma * toward(w), None if b is None else b + self.gamma * toward(b)),
                        ("-", w + self.gamma * against(w), None),
                    ],
                )


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
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ZsuError(
                f"alpha={self.alpha}, beta={self.beta} do not keep the sum of relevance",
                where="AlphaBeta",
                remedy="choose beta >= 0 and alpha = 1 + beta",
            )

    def __call__(self, R: Tensor, z: Tensor, w: Tensor, b: Tensor | None) -> Portions:
        yield self.alpha * R, [("+", positive(w), positive(b)), ("-", negative(w), None)]
        if self.beta:
            yield -self.beta * R, [("+", negative(w), negative(b)), ("-", positive(w), None)]


RULES = {"epsilon": Epsilon(), "gamma": Gamma(), "z+": AlphaBeta(alpha=1.0, beta=0.0), "alpha-beta": AlphaBeta()}


def as_rule(rule: str | Rule) -> Rule:
    """The rule of that name, or the rule itself; `ZsuError` with the known names otherwise."""
    if isinstance(rule, str) and rule in RULES:
        return RULES[rule]
    if isinstance(rule, Rule):
        return rule
    raise ZsuError(f"unknown rule {rule!r}", where="rules", remedy=f"use one of {', '.join(RULES)}, or a Rule")
