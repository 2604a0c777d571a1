"""Measures on the softmax outputs of a model; every model is run once per data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches
from ..errors import ZsuError


@torch.inference_mode()
def predict(model: nn.Module, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Softmax outputs (N, classes), float64, and labels (N,), both on the CPU.

    Raises
    ------
    ZsuError
        The model is in train mode; the outputs are not finite or not (N, classes); the data set is empty; or images
        and model do not fit together.
    """
    if any(m.training for m in model.modules()):
        raise ZsuError("the model is in train mode", where="audit", remedy="call model.eval()")
    if len(dataset) == 0:
        raise ZsuError("the data set is empty", where="audit", remedy="pass one with samples of every class")
    like = next(model.parameters())
    outputs, labels = [], []
    for x, y in batches(dataset):
        try:
            logits = model(x.to(like.device, like.dtype)).double()
        except RuntimeError as error:
            remedy = "load the data in the shape that the model was built for"
            raise ZsuError(
                f"the model refuses images {tuple(x.shape)}: {error}", where="audit", remedy=remedy
            ) from error
        if logits.dim() != 2:
            remedy = "audit a model whose output is (N, classes)"
            raise ZsuError(f"the outputs have shape {tuple(logits.shape)}", where="audit", remedy=remedy)
        outputs.append(logits.softmax(1).cpu())
        labels.append(y)
    p, y = torch.cat(outputs), torch.cat(labels)
    if not p.isfinite().all():
        raise ZsuError("the outputs are not finite", where="audit", remedy="check the model's parameters for NaN")
    if y.max() >= p.shape[1]:
        raise ZsuError(f"label {int(y.max())}, but the model knows {p.shape[1]} classes", where="audit")
    return p, y


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


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Mean over samples of JS(p, q) = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, in nats; 0 to ln 2.

    Source: Lin (1991), IEEE Transactions on Information Theory 37(1), eq. 4.1 with weights 1/2.

    Parameters
    ----------
    p, q : Tensor (N, classes)
        Probabilities.

    Raises
    ------
    ZsuError
        p and q differ in shape.
    """
    if p.shape != q.shape:
        raise ZsuError(
            f"outputs of shape {tuple(p.shape)} and {tuple(q.shape)}",
            where="jensen_shannon",
            remedy="compare models with the same classes on the same samples",
        )
    m = (p + q) / 2
    divergence = torch.special.xlogy(p, p / m).nan_to_num() + torch.special.xlogy(q, q / m).nan_to_num()
    return float(divergence.sum(1).mean() / 2)
