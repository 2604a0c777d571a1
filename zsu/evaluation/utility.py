"""What the model still knows, and where inputs of the forgotten class go.

Every measure takes `m`, the model that is measured; `given`, what the audit is about; and `references`, models
retrained without the class. It returns numbers by column; NaN where it has nothing to compare with.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ZsuError
from .observed import Given, Observed

BINS = 15  # of the calibration error


def accuracies(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """At, accuracy on the forgotten class; Ag, on all others; and on everything; test and train, never mixed.

    Formula: share of samples whose greatest logit is that of their label.
    Source: Chang et al. 2024 (arXiv:2410.23693), who call them At and Ag.
    Ideal: as a retrained model, which is 0 for At.
    Blind spot: a constant in place of the class's logit reaches At = 0 and forgets nothing inside.
    """
    found = {}
    for split, outputs in (("test", m.test), ("train", m.train)):
        found[f"at_{split}"] = accuracy(*outputs.part(True))
        found[f"ag_{split}"] = accuracy(*outputs.part(False))
        found[f"all_{split}"] = accuracy(outputs.p, outputs.labels)
    return found


def divergence(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Divergence of the test outputs from those of retrained models, on the forgotten class and on the others.

    Formula: mean over samples and references of JS(p, q) = (KL(p, m) + KL(q, m)) / 2, m = (p + q) / 2; nats, <= ln 2.
    Source: Lin 1991, IEEE Transactions on Information Theory 37(1), eq. 4.1 with weights 1/2.
    Ideal: that between two retrained models, the null.
    Blind spot: sees outputs only; what inner layers still know does not count.
    """
    found = {}
    for part, forget in (("forget", True), ("retained", False)):
        p, _ = m.test.part(forget)
        found[f"js_{part}"] = mean([jensen_shannon(p, r.test.part(forget)[0]) for r in references])
    return found


def agreement(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Share of test samples for which the model and a retrained one predict the same class.

    Formula: mean over samples and references of [argmax p = argmax q].
    Source: as "agreement" in Golatkar et al. 2020 (arXiv:1911.04933) and later work.
    Ideal: that between two retrained models.
    Blind spot: how sure the predictions are does not count.
    """
    found = {}
    for part, forget in (("forget", True), ("retained", False)):
        mine = m.test.part(forget)[0].argmax(1)
        same = [float((mine == r.test.part(forget)[0].argmax(1)).double().mean()) for r in references]
        found[f"agree_{part}"] = mean(same)
    return found


def routing(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Do test inputs of the forgotten class end in the same classes as in retrained models?

    Formula: total variation, half the sum over classes of |mean p - mean q|, p of the model, q of a reference; the
    mean over references. The means themselves are `Report.routing`.
    Source: ours; the distance is in any textbook.
    Ideal: that between two retrained models.
    Blind spot: says where the class as a whole goes, not which sample goes where.
    """
    mine = m.test.part(True)[0].mean(0)  # (N, classes) -> (classes,)
    distances = [float((mine - r.test.part(True)[0].mean(0)).abs().sum() / 2) for r in references]
    return {"routing": mean(distances)}


def calibration(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Calibration error on the retained classes, test split.

    Formula: sum over 15 equal bins of confidence of (share of samples) |accuracy - mean confidence|.
    Source: Guo et al. 2017 (arXiv:1706.04599), eq. 3.
    Ideal: as a retrained model.
    Blind spot: a model that answers every input with the class frequencies is perfectly calibrated.
    """
    return {"ece_retained": calibration_error(*m.test.part(False))}


def calibration_error(p: Tensor, labels: Tensor) -> float:
    """Expected calibration error of probabilities (N, classes)."""
    confidence, predicted = p.max(1)
    right = (predicted == labels).double()
    index = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, index, right - confidence)
    return float(gaps.abs().sum() / len(p))


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of samples whose most probable class is their label.

    Parameters
    ----------
    p : Tensor (N, classes)
        Probabilities.
    y : Tensor (N,) int64
        Labels.
    """
    return float((p.argmax(1) == y).double().mean())


def balanced_accuracy(p: Tensor, y: Tensor) -> float:
    """Mean over the classes that there are of the `accuracy` on each."""
    return mean([accuracy(p[y == c], y[y == c]) for c in y.unique()])


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Mean over samples of JS(p, q) = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, in nats; 0 to ln 2.

    scipy's ``jensenshannon`` is inf for the smallest numbers and NaN for many rows that hardly differ.

    Source: Lin (1991), IEEE Transactions on Information Theory 37(1), eq. 4.1 with weights 1/2.

    Parameters
    ----------
    p, q : Tensor (N, classes)
        Probabilities.

    Raises
    ------
    ZsuError
        p and q differ in shape, or a value is negative or not finite.
    """
    if p.shape != q.shape:
        what = f"outputs of shape {tuple(p.shape)} and {tuple(q.shape)}"
        remedy = "compare models with the same classes on the same samples"
        raise ZsuError(what, where="jensen_shannon", remedy=remedy)
    p, q = p.double(), q.double()
    for name, values in (("p", p), ("q", q)):
        if not (values.isfinite().all() and (values >= 0).all()):
            remedy = "check the model's parameters for NaN, and pass softmax outputs, not logits"
            raise ZsuError(f"{name} has values that are no probabilities", where="jensen_shannon", remedy=remedy)
    both = (p + q).clamp(min=torch.finfo(torch.float64).tiny)  # 0 log(0 / 0) = 0
    divergence = torch.special.xlogy(p, 2 * p / both) + torch.special.xlogy(q, 2 * q / both)
    return float(divergence.sum(1).mean() / 2)


def mean(values: Sequence[float]) -> float:
    """Mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
