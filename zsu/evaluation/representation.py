"""What the inner layers still know, and how soon the class is back.

Arguments and results as in `utility`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import Subset

from ..data import batches
from ..inside import copied, logits_of, model_errors
from .observed import Given, Observed
from .privacy import FEW, NAN
from .utility import accuracy, mean

SHOTS = 50  # images of the class, and as many others
PROTOTYPE = 5  # images that the attacker has
ALPHAS = (0.5, 0.8, 1.0)
REGAINED = 0.9  # of the original's accuracy
MOST_STEPS = 100
RELEARN_BATCH = 16  # images of the class, and as many others
RELEARN_RATE = 1e-3


def linear_probes(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Can a linear classifier on the features of a layer tell the class from all others?

    Formula: logistic regression on standardised features (what enters the layer, the mean over positions), train
    images of the class against as many others, all of them ("probe") or 50 of each ("probe50"); balanced accuracy on
    test images. By layer of the original; other models by the layer at the same depth, where it is as wide.
    Source: Alain and Bengio 2016 (arXiv:1610.01644).
    Ideal: as a retrained model, which is far above 1/2: features that tell other classes apart serve for this one too.
    Blind spot: a probe finds what is linearly there, not what the model uses; pooling hides where something is.
    """
    found = {}
    generator = torch.Generator().manual_seed(given.seed)
    is_forget, others = m.train.forget.nonzero()[:, 0], (~m.train.forget).nonzero()[:, 0]  # (M, 1) -> (M,)
    number = min(len(is_forget), len(others))
    drawn = [part[torch.randperm(len(part), generator=generator)[:number]] for part in (is_forget, others)]
    layers = dict(zip(given.original.train.features, m.train.features, strict=False))
    for layer, known in given.original.train.features.items():
        mine = layers.get(layer, layer)
        comparable = layer in layers and m.train.features[mine].shape == known.shape
        for name, n in (("probe", number), ("probe50", min(SHOTS, number))):
            if number < FEW or not comparable:
                found[f"{name}_{layer}"] = NAN
                continue
            chosen = torch.cat([part[:n] for part in drawn])
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
            probe.fit(m.train.features[mine][chosen].numpy(), np.repeat([1, 0], n))
            predicted = probe.predict(m.test.features[mine].numpy())
            found[f"{name}_{layer}"] = balanced_accuracy_score(m.test.forget.numpy(), predicted)
    return found


def prototype_attack(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Does the class come back when its row of the head is pulled towards the mean features of 5 images?

    Formula: w_f <- a prototype + (1 - a) w_f, prototype the mean of the head's inputs over 5 train images, scaled to
    the mean norm of the other rows; b_f <- mean of the other biases; accuracy on test images of the class ("pra_at")
    and of the others ("pra_ag"), a = .5, .8, 1.
    Source: Ha et al. 2026 (arXiv:2506.01318); the scale is ours, as is that the bias is set too, else a low one would
    be immune.
    Ideal: as a retrained model, which gives the class away too where its features tell it apart.
    Blind spot: one fixed attack; the head must be a Linear whose outputs are the logits.
    """
    columns = [f"pra_{part}_{round(100 * a)}" for a in ALPHAS for part in ("at", "ag")]
    if m.head is None or m.head not in m.train.features:
        return dict.fromkeys(columns, NAN)
    weight, bias, others = head_rows(m.model.get_submodule(m.head), given.target)
    test, train = (o.features[m.head].double() for o in (m.test, m.train))
    found = []
    for a in ALPHAS:
        w, b = weight.clone(), bias.clone()
        for c in given.target:
            prototype = train[m.train.labels == c][:PROTOTYPE].mean(0)
            prototype *= weight[others].norm(dim=1).mean() / prototype.norm().clamp(min=1e-12)
            w[c] = a * prototype + (1 - a) * weight[c]
            b[c] = bias[others].mean()
        p = (test @ w.T + b).softmax(1)  # (N, J) @ (J, classes)
        found += [accuracy(p[part], m.test.labels[part]) for part in (m.test.forget, ~m.test.forget)]
    return dict(zip(columns, found, strict=True))


def head_shortcut(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Does the head alone give away which class was taken out?

    Formula: bias of the class minus the mean of the others; norm of its row by the mean of the others' norms.
    Source: ours.
    Ideal: as a retrained model, whose row was trained never to win.
    Blind spot: the same is done by any edit before the head; the head must be a Linear whose outputs are the logits.
    """
    if m.head is None:
        return {"head_bias": NAN, "head_norm": NAN}
    weight, bias, others = head_rows(m.model.get_submodule(m.head), given.target)
    norms = weight.norm(dim=1)
    return {
        "head_bias": mean([float(bias[c] - bias[others].mean()) for c in given.target]),
        "head_norm": mean([float(norms[c] / norms[others].mean()) for c in given.target]),
    }


def head_rows(head: Any, target: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (classes, J) and biases (classes,) of a Linear, float64 on the CPU, and which are of no forgotten class.

    Where it has no biases, they are 0.
    """
    weight = head.weight.detach().double().cpu()
    bias = torch.zeros(len(weight)).double() if head.bias is None else head.bias.detach().double().cpu()
    return weight, bias, ~torch.isin(torch.arange(len(weight)), torch.tensor(target))


def relearning(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """How many training steps bring the class back?

    Formula: steps of Adam (rate 1e-3, eval mode) on batches of 16 train images of the class and 16 others, until the
    accuracy on test images of the class is .9 of the original's; 100 stands for "not within 100". The column
    "anamnesis" divides by the mean of the references.
    Source: anamnesis index of Chundawat et al. 2023 (arXiv:2201.05629), as relearn time in steps.
    Ideal: anamnesis 1: neither sooner nor later than a model that never knew the class.
    Blind spot: depends on rate and batch; a constant far below, as a mask's, is not undone in 100 steps, so that the
    class returns only when all else has been moved out of its way; by hand it takes none.
    """
    generator = torch.Generator().manual_seed(given.seed)
    parts = [torch.nonzero(o)[:, 0].tolist() for o in (m.train.forget, ~m.train.forget)]  # (M, 1) -> (M,)
    drawn = [[part[i] for i in torch.randint(len(part), (MOST_STEPS * RELEARN_BATCH,), generator=generator)]
             for part in parts]  # fmt: skip
    wanted = REGAINED * given.original_at
    model = copied(m.model)
    trained = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.Adam(trained, lr=RELEARN_RATE)
    streams = [batches(Subset(given.train, d), RELEARN_BATCH) for d in drawn]
    for step, pairs in enumerate(zip(*streams, strict=True)):
        if accuracy_on(model, given.x, given.y) >= wanted:
            return {"relearn": step}
        x, y = (torch.cat(both) for both in zip(*pairs, strict=True))
        optimizer.zero_grad()
        logits = logits_of(model, x, "audit").float()
        with model_errors(model, x, "audit"):
            F.cross_entropy(logits, y.to(logits.device)).backward()
        optimizer.step()
    return {"relearn": MOST_STEPS}


@torch.no_grad()
def accuracy_on(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy on images (N, C, H, W) with labels (N,)."""
    return accuracy(logits_of(model, x, "audit").cpu(), y)
