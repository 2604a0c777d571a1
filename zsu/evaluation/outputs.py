"""What a model gives on a data set, observed in one pass and shared by all measures."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches
from ..errors import ZsuError

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


def observe(
    model: nn.Module, dataset: Dataset, target: list[int], depths: int = 0, name: str = "", digest=None
) -> Outputs:
    """One pass over a data set, with the inputs of `depths` layers; a hashlib digest takes the data in.

    Errors as `predict`, naming the model.
    """
    where = f"audit of {name!r}" if name else "audit"
    logits, labels, features = run(model, dataset, tapped(model, depths), where, digest)
    return Outputs(logits, labels, torch.isin(labels, torch.tensor(target)), features)


def tapped(model: nn.Module, depths: int) -> dict[str, nn.Module]:
    """Up to `depths` of the convolutions and Linears beyond the first, evenly spread, the last one among them."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    found = found[1:]  # what enters the first is the image
    if depths == 0 or not found:
        return {}
    count = min(depths, len(found))
    return dict(found[len(found) - 1 - round(i * (len(found) - 1) / max(1, count - 1))] for i in reversed(range(count)))


@torch.no_grad()  # not inference mode: a model may keep what it computes
def run(
    model: nn.Module, dataset: Dataset, layers: dict[str, nn.Module], where: str, digest=None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits (N, classes), labels (N,), and what enters the layers, pooled to (N, J)."""
    if any(m.training for m in model.modules()):
        raise ZsuError("the model is in train mode", where=where, remedy="call model.eval()")
    if len(dataset) == 0:
        raise ZsuError("the data set is empty", where=where, remedy="pass one with samples of every class")
    outputs, labels, entering = [], [], {name: [] for name in layers}

    def keep(layer, args, kwargs, name):
        entering[name].append(pooled(args[0] if args else kwargs["input"], layer))

    hooks = [
        layer.register_forward_pre_hook(functools.partial(keep, name=name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        for x, y in batches(dataset):
            outputs.append(logits_of(model, x, where))
            labels.append(y)
            if digest is not None:
                digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    finally:
        for hook in hooks:
            hook.remove()
    logits, y = torch.cat(outputs), torch.cat(labels)
    if not logits.isfinite().all():
        raise ZsuError("the outputs are not finite", where=where, remedy="check the model's parameters for NaN")
    if y.max() >= logits.shape[1]:
        raise ZsuError(f"label {int(y.max())}, but the model knows {logits.shape[1]} classes", where=where)
    # A layer that is used more than once, or not at all, has no inputs (N, J).
    features = {name: torch.cat(parts) for name, parts in entering.items() if parts}
    return logits, y, {name: t for name, t in features.items() if len(t) == len(y)}


def logits_of(model: nn.Module, x: Tensor, where: str = "audit") -> Tensor:
    """Outputs (N, classes), float64 on the CPU; `ZsuError` where images and model do not fit together."""
    try:
        logits = model(placed(x, model)).double().cpu()
    except RuntimeError as error:
        remedy = "load the data in the shape that the model was built for"
        raise ZsuError(f"the model refuses images {tuple(x.shape)}: {error}", where=where, remedy=remedy) from error
    if logits.dim() != 2:
        remedy = "audit a model whose output is (N, classes)"
        raise ZsuError(f"the outputs have shape {tuple(logits.shape)}", where=where, remedy=remedy)
    return logits


def placed(x: Tensor, model: nn.Module) -> Tensor:
    """Images on the device and in the dtype of the model."""
    like = next(model.parameters(), x)
    return x.to(like.device, like.dtype)


def pooled(t: Tensor, layer: nn.Module) -> Tensor:
    """What enters a layer, averaged over positions or tokens: (N, J), float32 on the CPU."""
    channel = t.dim() - 1 if isinstance(layer, nn.Linear) else 1  # (N, tokens, J), or (N, J, H, W)
    others = [d for d in range(1, t.dim()) if d != channel]
    return (t.mean(others) if others else t).float().cpu()


def logit_layer(model: nn.Module, x: Tensor) -> str | None:
    """Name of the Linear whose outputs, as they are, are the logits (N, classes); None where there is none."""
    seen = {}
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out})) for name, m in linears]
    try:
        with torch.no_grad():
            logits = model(placed(x, model))
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, out in seen.items() if out is logits or torch.equal(out, logits)), None)


def predict(model: nn.Module, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Softmax outputs (N, classes), float64, and labels (N,), both on the CPU.

    Raises
    ------
    ZsuError
        The model is in train mode; the outputs are not finite or not (N, classes); the data set is empty; or images
        and model do not fit together.
    """
    logits, labels, _ = run(model, dataset, {}, "audit")
    return logits.softmax(1), labels
