"""What outputs tell about membership: were samples of the class trained on, was the class there at all?

Arguments and results as in `utility`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from .observed import Given, Observed, Outputs
from .utility import mean

SHUFFLES = 10
FEW = 5  # samples of the class in a split: below, nothing is fitted
SHADOWS = 1000  # members, and as many others, that an attack is fitted on
PER_REFERENCE = 200  # samples of each of two classes, of every reference
CLIP = 1e-6  # of probabilities, before their logarithm
NAN = float("nan")


def forget_rate(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Fr: share of the class's training images that no longer look like members.

    Formula: a linear SVM (balanced) is fitted on the original's softmax vectors, train images of the class against
    its test images; Fr = 1 - share of the model's vectors of the train images that it calls members.
    Source: Chang et al. 2024 (arXiv:2410.23693).
    Ideal: as a retrained model.
    Blind spot: vectors that were merely moved elsewhere are no members, so a destroyed model scores well, and the
    original itself scores about 1/2 where train and test images look alike.
    """
    p, q = given.original.train.part(True)[0].numpy(), given.original.test.part(True)[0].numpy()
    if min(len(p), len(q)) < FEW:
        return {"fr": NAN}
    svm = LinearSVC(class_weight="balanced", random_state=given.seed)
    svm.fit(np.concatenate([p, q]), np.repeat([1, 0], [len(p), len(q)]))
    return {"fr": 1 - float(svm.predict(m.train.part(True)[0].numpy()).mean())}


def forgetting_score(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Fs: can the loss tell train images of the class from its test images?

    Formula: |1/2 - accuracy| of logistic regression on the cross-entropy (clipped at that of p = 1e-6), train against
    test images of the class, both kinds weighing the same; mean accuracy over 10 stratified shuffles, half held out.
    Source: Chang et al. 2024 (arXiv:2410.23693), after the attack of the NeurIPS 2023 unlearning challenge.
    Ideal: 0, as a retrained model.
    Blind spot: a destroyed model, and a mask, have the same loss everywhere and score 0.
    """
    losses = [-true_probability(o, True).log() for o in (m.train, m.test)]
    if min(map(len, losses)) < FEW:
        return {"fs": NAN}
    x = torch.cat(losses).numpy()[:, None]  # (N, 1)
    y = np.repeat([1, 0], [len(losses[0]), len(losses[1])])
    shuffles = StratifiedShuffleSplit(SHUFFLES, test_size=0.5, random_state=given.seed)
    attack = LogisticRegression(class_weight="balanced")
    return {"fs": abs(0.5 - mean(cross_val_score(attack, x, y, scoring="balanced_accuracy", cv=shuffles)))}


def membership_inference(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """Share of the class's training images that an attack on the model calls members.

    Formula: an SVM (RBF) is fitted on retained train images against retained test images, at most 1,000 each, and
    asked about the train images of the class. It sees the confidence in the label, the entropy, or five features:
    whether the prediction is right, confidence, greatest probability, entropy, modified entropy.
    Source: Song and Mittal 2021 (arXiv:2003.10595); the SVM as in Fan et al. 2024 (arXiv:2310.12508).
    Ideal: as a retrained model; that need not be 0 or 1/2.
    Blind spot: weak on models that hardly overfit; whatever is unlike the retained images counts as no member.
    """
    fits = [m.train.part(False), m.test.part(False)]
    number = min(SHADOWS, *(len(y) for _, y in fits))
    forget = five_features(*m.train.part(True))
    if number < FEW or len(forget) < FEW:
        return dict.fromkeys(("mia_confidence", "mia_entropy", "mia_five"), NAN)
    generator = torch.Generator().manual_seed(given.seed)
    drawn = [(p, y, torch.randperm(len(y), generator=generator)[:number]) for p, y in fits]
    x = np.concatenate([five_features(p[chosen], y[chosen]) for p, y, chosen in drawn])
    member = np.repeat([1, 0], number)
    found = {}
    for name, columns in (("mia_confidence", [1]), ("mia_entropy", [3]), ("mia_five", slice(None))):
        attack = make_pipeline(StandardScaler(), SVC()).fit(x[:, columns], member)
        found[name] = float(attack.predict(forget[:, columns]).mean())
    return found


def five_features(p: Tensor, labels: Tensor) -> np.ndarray:
    """(N, 5): right or not, p of the label, greatest p, entropy, modified entropy (Song and Mittal 2021, eq. 8)."""
    mine = p.gather(1, labels[:, None])[:, 0]  # (N, 1) -> (N,)
    log, log_not = p.clamp(min=CLIP).log(), (1 - p).clamp(min=CLIP).log()
    other = torch.ones_like(p).scatter(1, labels[:, None], 0.0)
    modified = -(1 - mine) * mine.clamp(min=CLIP).log() - (other * p * log_not).sum(1)
    columns = [(p.argmax(1) == labels).double(), mine, p.max(1).values, -(p * log).sum(1), modified]
    return torch.stack(columns, 1).numpy()


def likelihood_ratio(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """U-LiRA: can an attacker who owns models of both kinds tell this model from a retrained one, sample by sample?

    Formula: phi = log p_y - log(1 - p_y), from the logits, clipped to [-30, 30]. For each train image of the class,
    Normals with the mean of phi over N unlearned and over N retrained models, their variance pooled over the images, as
    the models are few. One model of each kind is held out: AUC of their log-likelihood ratios; the mean over pairs.
    Source: Hayes et al. 2024 (arXiv:2403.01218); pooled variance: Carlini et al. 2022 (arXiv:2112.03570), VI.C.
    Ideal: 1/2. Below 1/2 tells as much as above.
    Blind spot: sees the class's own probability only; needs 2 siblings (the same edit of other originals) and 3
    references, and with so few the ratio is coarse. A mask has the same probability everywhere: it is found easily.
    """
    if len(m.siblings) < 2 or len(references) < 3:
        return {"ulira": NAN}
    unlearned, retrained = (torch.stack([margin(o.train) for o in models]) for models in ([m, *m.siblings], references))
    pairs = range(min(len(unlearned), len(retrained)))
    return {"ulira": mean([held_out_auc(unlearned, retrained, i) for i in pairs])}


def held_out_auc(unlearned: Tensor, retrained: Tensor, i: int) -> float:
    """AUC of the likelihood ratio between the i-th models of either kind, of phi (models, N); the others are fitted."""
    others = [torch.cat([kind[:i], kind[i + 1 :]]) for kind in (unlearned, retrained)]
    scores = [ratio(kind[i], *others) for kind in (unlearned, retrained)]
    truth = np.repeat([1, 0], [len(score) for score in scores])
    return float(roc_auc_score(truth, torch.cat(scores).numpy()))


def ratio(x: Tensor, unlearned: Tensor, retrained: Tensor) -> Tensor:
    """log N(x; unlearned) - log N(x; retrained), (N,), of values (models, N) with pooled variances."""
    return pooled_normal(unlearned, CLIP).log_prob(x) - pooled_normal(retrained, CLIP).log_prob(x)


def pooled_normal(values: Tensor, least: float) -> Normal:
    """Of values (models, N): for each sample its mean, and one deviation of at least so much for all."""
    return Normal(values.mean(0), values.var(0).mean().sqrt().clamp(min=least))


def margins_kl(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """KLOM: how far are the margins of unlearned models from those of retrained ones, sample by sample?

    Formula: margin = logit of the label - logsumexp of the others, which is phi of U-LiRA; for each test image of the
    class KL(N_unlearned, N_retrained) of Normals fitted over the models, with variances pooled over the images; the
    mean.
    Source: Georgiev et al. 2024 (arXiv:2410.23232), who have 100 models of each kind and bin them; with few models
    we fit Normals.
    Ideal: as a retrained model.
    Blind spot: needs 2 siblings and 2 references; a constant logit makes one Normal very narrow.
    """
    if len(m.siblings) < 2 or len(references) < 2:
        return {"klom": NAN}
    kinds = [torch.stack([margin(o.test) for o in models]) for models in ([m, *m.siblings], references)]  # (models, N)
    unlearned, retrained = (pooled_normal(values, 1e-3) for values in kinds)
    return {"klom": float(kl_divergence(unlearned, retrained).mean())}


def margin(outputs: Outputs) -> Tensor:
    """Logit of the label minus logsumexp of the others, the log-odds of the label (N,), on the forgotten class."""
    logits, y = outputs.logits[outputs.forget], outputs.labels[outputs.forget][:, None]
    mine = logits.gather(1, y)[:, 0]  # (N, 1) -> (N,)
    return (mine - logits.scatter(1, y, -torch.inf).logsumexp(1)).clamp(-30, 30)


def class_membership(m: Observed, given: Given, references: Sequence[Observed]) -> dict[str, float]:
    """CMIA: does a test image of the class look, by the scores of the other classes, as it does to a retrained model?

    Formula: the neighbour is the retained class that references predict most often for train images of the class. A
    linear SVM learns on the references' logits of the retained classes (their mean subtracted) to tell train images of
    the class from those of the neighbour, 200 of each a reference; the share of test images of the class that it
    recognises by the model's logits.
    Source: Ebrahimpour-Boroojeny et al. 2026 (arXiv:2506.20893); without the logit of the class itself, which an edit
    can set at will.
    Ideal: that of a held-out retrained model; above and below tell the same.
    Blind spot: sees the neighbouring class only.
    """
    return {"cmia": mean([of_neighbour(m, c, given, references) for c in given.target])}


def of_neighbour(m: Observed, c: int, given: Given, references: Sequence[Observed]) -> float:
    """`class_membership` for one forgotten class."""
    kept = [k for k in range(m.test.logits.shape[1]) if k not in given.target]
    counts = sum(r.train.p[r.train.labels == c][:, kept].argmax(1).bincount(minlength=len(kept)) for r in references)
    if not references or (m.test.labels == c).sum() == 0:
        return NAN
    neighbour = kept[int(counts.argmax())]
    x = [centred_logits(r.train, cls, kept)[:PER_REFERENCE] for r in references for cls in (c, neighbour)]
    y = np.repeat([1, 0] * len(references), [len(logits) for logits in x])
    if len(set(y)) < 2:
        return NAN
    svm = make_pipeline(StandardScaler(), LinearSVC(class_weight="balanced", random_state=given.seed))
    svm.fit(np.concatenate(x), y)
    return float(svm.predict(centred_logits(m.test, c, kept)).mean())


def centred_logits(outputs: Outputs, cls: int, kept: list[int]) -> np.ndarray:
    """Logits (N, kept) of the samples of a class, each row minus its mean."""
    logits = outputs.logits[outputs.labels == cls][:, kept]
    return (logits - logits.mean(1, keepdim=True)).numpy()


def true_probability(outputs: Outputs, forget: bool) -> Tensor:
    """p of the label (N,), at least 1e-6."""
    p, y = outputs.part(forget)
    return p.gather(1, y[:, None])[:, 0].clamp(min=CLIP)  # (N, 1) -> (N,)
