"""The measures by name, and what an audit has to know about them and their columns."""

from collections.abc import Callable, Sequence

from . import privacy, representation, robustness, utility
from .observed import Given, Observed

MEASURES: dict[str, Callable[[Observed, Given, Sequence[Observed]], dict[str, float]]] = {
    "accuracy": utility.accuracies,
    "divergence": utility.divergence,
    "agreement": utility.agreement,
    "routing": utility.routing,
    "calibration": utility.calibration,
    "forget rate": privacy.forget_rate,
    "forgetting score": privacy.forgetting_score,
    "membership": privacy.membership_inference,
    "u-lira": privacy.likelihood_ratio,
    "klom": privacy.margins_kl,
    "cmia": privacy.class_membership,
    "over-unlearning": robustness.over_unlearning,
    "prototype": representation.prototype_attack,
    "probes": representation.linear_probes,
    "relearning": representation.relearning,
    "head": representation.head_shortcut,
    "robustness": robustness.robustness,
}
BASIC = ("accuracy", "divergence")
OF_MANY = ("u-lira", "klom")  # compare many models of a kind
OF_PAIRS = ("divergence", "agreement", "routing")  # two references are one pair, which has no spread
CONTROLS = ("mask", "bias-shift", "random", "zeroed")
UTILITY = {"ag_test", "all_test", "ag_train", "all_train", "ag_drop", "js_retained", "agree_retained", "ece_retained"}
UTILITY |= {f"pra_ag_{round(100 * a)}" for a in representation.ALPHAS}  # columns about the other classes
