"""What a model gives on a data set, observed in one pass and shared by all measures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches
from ..errors import ZsuError
from ..inside import check_eval, check_plain, logits_of, watch_inputs

DEPTHS = 4  # layers whose inputs are kept, the last Linear's among them


@dataclass
class Outputs:
    """A model on one split, everything on the CPU.

    Attributes
    ----------
    logits : Tensor (N, classes), float64
    labels : Tensor (N,), int64
    forget : Tensor (N,), bool
        Which samples are of the forgotten class.
    features : dict of str to Tensor (N, J), float32
        By layer, what enters it, the mean over positions or tokens; the deepest last.
    """

    logits: Tensor
    labels: Tensor
    forget: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.p = self.logits.softmax(1)  # (N, classes)

    def part(self, forget: bool) -> tuple[Tensor, Tensor]:
        """(softmax outputs, labels) of the forgotten class, or of all others."""
        chosen = self.forget if forget else ~self.forget
        return self.p[chosen], self.labels[chosen]


@dataclass
class Observed:
    """A model with its outputs on the train and the test split.

    `siblings` are the same edit of other originals, on the forgotten class only; `head` is the name of the Linear
    whose outputs are the logits, or None.
    """

    model: nn.Module
    train: Outputs
    test: Outputs
    head: str | None = None
    siblings: list[Observed] = field(default_factory=list)


class Given(NamedTuple):
    """What all measures of an audit share.

    `x` (M, C, H, W) and `y` (M,): up to 250 test images of the class, and their labels; `beside`: images just beyond
    the class's boundary (see `robustness.over_unlearning`); `original_at`: accuracy of the original on x.
    """

    original: Observed
    target: list[int]
    train: Dataset
    x: Tensor
    y: Tensor
    beside: Tensor
    original_at: float
    seed: int


@torch.no_grad()  # not inference mode: a model may keep what it computes
def observe(
    model: nn.Module,
    dataset: Dataset,
    target: list[int],
    depths: int = 0,
    where: str = "audit",
    digest: hashlib._Hash | None = None,
) -> Outputs:
    """One pass over a data set, with the inputs of `depths` layers; a digest takes the data in. Errors as `predict`."""
    check_plain(model)
    check_eval(model, where)
    layers = spread_layers(model, depths)
    pooled: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers.values()}
    outputs, targets = [], []
    with watch_inputs(pooled, lambda layer, t: pooled[layer].append(pool(t, layer))):
        for x, y in batches(dataset):
            outputs.append(logits_of(model, x, where))
            targets.append(y)
            if digest is not None:
                digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    if not outputs:
        raise ZsuError("the data set is empty", where=where, remedy="pass one with samples of every class")
    logits, labels = torch.cat(outputs).cpu().double(), torch.cat(targets)
    if not logits.isfinite().all():
        raise ZsuError("the outputs are not finite", where=where, remedy="check images and parameters for NaN")
    if labels.max() >= logits.shape[1]:
        raise ZsuError(f"label {int(labels.max())}, but the model knows {logits.shape[1]} classes", where=where)
    # A layer that is used more than once, or not at all, has no inputs (N, J).
    found = {name: torch.cat(pooled[layer]) for name, layer in layers.items() if pooled[layer]}
    features = {name: t for name, t in found.items() if len(t) == len(labels)}
    return Outputs(logits, labels, torch.isin(labels, torch.tensor(target)), features)


def spread_layers(model: nn.Module, depths: int) -> dict[str, nn.Module]:
    """Up to `depths` of the convolutions and Linears beyond the first, evenly spread, the last one among them."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    found = found[1:]  # what enters the first is the image
    count, last = min(depths, len(found)), len(found) - 1
    return dict(found[last - round(i * last / max(1, count - 1))] for i in reversed(range(count)))


def pool(t: Tensor, layer: nn.Module) -> Tensor:
    """What enters a layer, averaged over positions or tokens: (N, J), float32 on the CPU."""
    channel = t.dim() - 1 if isinstance(layer, nn.Linear) else 1  # (N, tokens, J), or (N, J, H, W)
    others = [d for d in range(1, t.dim()) if d != channel]
    return (t.mean(others) if others else t).float().cpu()


def predict(model: nn.Module, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Softmax outputs (N, classes), float64, and labels (N,), both on the CPU.

    Raises
    ------
    ZsuError
        The model is in train mode; the outputs are not finite or not (N, classes); the data set is empty; or images
        and model do not fit together.
    """
    outputs = observe(model, dataset, [])
    return outputs.p, outputs.labels
