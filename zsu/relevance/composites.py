"""Composites: which rule goes where in a model.

Sources: Montavon et al. (2019), LNCS 11700, sec. 10.3; Kohlbrenner et al. (2020), arXiv:1910.09840.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from torch import Tensor

from ..errors import ZsuError, warn
from .layers import Step
from .rules import RULES, AlphaBeta, Box, Flat, Gamma, Rule, as_rule
from .weighted import Weighted


@dataclass(frozen=True)
class Composite:
    """A rule for every layer with weights: by name, else by place, else by kind.

    Parameters
    ----------
    conv, linear, norm : Rule or str
        For convolutions (a BatchNorm right behind counts as part of one), Linears, and BatchNorms of their own.
    first, last : Rule or str, optional
        For the layers that read the model's input, also by way of a normalisation (arithmetic with constants), and for
        the one that computes the logits. `ZsuError` where there is none.
    names : mapping of str to Rule or str
        By name of the layer, with ``*`` for any text: ``{"features.*": "gamma", "classifier.0": Epsilon(0.1)}``.
    """

    conv: Rule | str = "epsilon"
    linear: Rule | str = "epsilon"
    norm: Rule | str = "epsilon"
    first: Rule | str | None = None
    last: Rule | str | None = None
    names: Mapping[str, Rule | str] = field(default_factory=dict)

    def check(self, x: Tensor) -> None:
        """`ZsuError` for what names no layers, unknown rules, and inputs of the model that a rule does not take."""
        if not isinstance(self.names, Mapping) or not all(isinstance(name, str) for name in self.names):
            raise ZsuError(f"names are {self.names!r}", where="Composite", remedy="map names of layers to rules")
        for rule in (self.conv, self.linear, self.norm, self.first, self.last, *self.names.values()):
            if rule is not None:
                as_rule(rule).check(x)

    def assign(self, steps: Sequence[Weighted], last: Step | None) -> None:
        """Give each layer its rule; `ZsuError` for a name that no layer has."""
        unused = dict(self.names)
        for step in steps:
            rule = self.norm if step.op.groups == 0 else self.linear if step.layer.kind == "linear" else self.conv
            if self.last is not None and step is last:
                rule = self.last
            if self.first is not None and step.origin.is_input:
                rule = self.first
            for pattern in self.names:
                if fnmatch(step.layer.name, pattern):
                    rule = self.names[pattern]
                    unused.pop(pattern, None)
            step.rule = as_rule(rule)
            if step.origin.front and step.origin.is_input:
                step.rule = step.rule.behind(step.origin.front.of, step.replay.input)
        self.check_places(steps, last)
        if unused:
            known = ", ".join(step.layer.name for step in steps)
            raise ZsuError(f"no layer is called {', '.join(unused)}", where="Composite", remedy=f"use one of {known}")

    def check_places(self, steps: Sequence[Weighted], last: Step | None) -> None:
        """Say where a rule of a place has no layer there."""
        if self.last is not None and last not in steps:
            remedy = "name the layer instead, as Composite(names={...})"
            raise ZsuError("no layer computes the logits themselves", where="Composite(last=...)", remedy=remedy)
        if self.first is None:
            return
        taken = any(step.origin.is_input for step in steps)
        fronts = {step.layer.name: step.origin.front for step in steps if not step.origin.is_input}
        behind = [f"{name} reads it behind {front.by!r}" for name, front in fronts.items() if front]
        if taken and behind:
            warn(f"the rule of the input is not that of all layers that read the input: {', '.join(behind)}")
        if not taken:
            what = ": ".join(["no layer reads the model's input itself", *behind[:1]])
            remedy = "explain the part of the model behind that, or use a composite without `first`"
            raise ZsuError(what, where="Composite(first=...)", remedy=remedy)


COMPOSITES = {
    "epsilon-gamma-box": Composite(conv=Gamma(), first=Box()),
    "epsilon-plus": Composite(conv=AlphaBeta(1.0, 0.0)),
    "epsilon-plus-flat": Composite(conv=AlphaBeta(1.0, 0.0), first=Flat()),
    "epsilon-alpha2-beta1": Composite(conv=AlphaBeta(2.0, 1.0)),
}

Rules = str | Rule | Composite | Mapping[str, str | Rule]


def as_composite(rules: Rules) -> Composite:
    """A composite by name, or of one rule for all layers, or of rules by layer name with epsilon for the others."""
    if isinstance(rules, Composite):
        return rules
    if isinstance(rules, Mapping):
        return Composite(names=rules)
    if isinstance(rules, str) and rules in COMPOSITES:
        return COMPOSITES[rules]
    if not isinstance(rules, Rule) and not (isinstance(rules, str) and rules in RULES):
        known = ", ".join([*RULES, *COMPOSITES])
        raise ZsuError(f"unknown rule {rules!r}", where="rules", remedy=f"use one of {known}, a Rule or a Composite")
    return Composite(conv=rules, linear=rules, norm=rules)
