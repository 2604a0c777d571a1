"""Where the evidence goes when a class is forgotten: the outputs wanted for its samples, and the head that gives them.

Whoever only hides a class leaves its samples to the classes that the rest of the network happens to prefer, which is
not what a model answers that never saw the class.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches, targets
from ..errors import ZsuError
from ..inside import watch_inputs
from ..relevance import Relevance

TEMPERATURE = 0.05  # of the cosine between features of neighbours
NEIGHBOURS = 0.3  # their weight in the geometric mean
RECEIVING = 0.99  # of the probability that moves goes to the classes whose rows of the head may change
MOST = 0.015  # share of the weights that those rows may have,
FEW = 10  # where they are more than so many
RIDGE = 0.3
SMALLER = (0.003, 0.01, 0.03, 0.1)  # ridges that retained samples may allow
DISTURBED = 0.01  # nats by which the answers on the retained samples may change
FLOOR = 1e-12  # of a probability, before its logarithm


def wanted_outputs(
    model: nn.Module, x: Tensor, target: int, relevance: Relevance, retained: Dataset | None = None
) -> Tensor:
    """Log-probabilities that samples of the class should get once it is forgotten.

    The geometric mean of the model's own answers without the class, and of its answers where the picture is blurred but
    for the pixels that speak against the class: a counterfactual "as if it were not of this class" (data tier T1). With
    retained samples (T3), the middle of the network has a say too: it still knows which classes look alike, while the
    head has been trained to tell them apart.

    Parameters
    ----------
    model : nn.Module
    x : Tensor (N, C, H, W)
        Samples of the class.
    target : int
    relevance : Relevance
        ``explain(model, x, target)``.
    retained : Dataset, optional
        Some samples of the other classes.

    Returns
    -------
    Tensor (N, classes), float64
        The target's is the logarithm of about 0.
    """
    with torch.no_grad():
        wanted = without(relevance.logits, target)
        if x.dim() == 4:
            wanted = (wanted + without(model(without_evidence(x, relevance.input)), target)) / 2
    if retained is not None:
        near = without(neighbours(model, x, relevance, retained), target)
        wanted = (1 - NEIGHBOURS) * wanted + NEIGHBOURS * near
    return without(wanted, target)


def without(logits: Tensor, target: int) -> Tensor:
    """Log-probabilities, float64, when the target is left out; none is below log(FLOOR)."""
    logits = logits.double().clone()
    logits[:, target] = -torch.inf
    return logits.softmax(1).clamp(min=FLOOR).log()


def without_evidence(x: Tensor, relevance: Tensor) -> Tensor:
    """Images (N, C, H, W), blurred but for the pixels that speak against the class."""
    by_pixel = relevance.sum(1, keepdim=True)  # (N, C, H, W) -> (N, 1, H, W)
    reach = max(1, x.shape[-1] // 18)  # 1 pixel of 28, 12 of 224
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return torch.where(by_pixel < 0, x, F.avg_pool2d(padded, 2 * reach + 1, 1))


def neighbours(model: nn.Module, x: Tensor, relevance: Relevance, retained: Dataset) -> Tensor:
    """How near the samples (N) are to each class, as logits (N, classes): over the retained images of the class, the
    log of the sum of exp(cosine / TEMPERATURE) of what enters the layer in the middle of the network.
    """
    weighted = [n for n in relevance.layers if n.weight]
    middle = module_of(weighted[(len(weighted) - 1) // 2].weight)
    theirs = torch.cat([features(model, images.to(x), middle) for images, _ in batches(retained)])
    cosine = features(model, x, middle) @ theirs.T  # (N, D) (D, M) -> (N, M)
    label = targets(retained).to(x.device)
    present = label.unique()
    near = torch.stack([(cosine[:, label == c] / TEMPERATURE).logsumexp(1) for c in present], 1)
    farthest = near.min(1, keepdim=True).values  # for classes without images
    logits = farthest.repeat(1, relevance.logits.shape[1])
    logits[:, present] = near
    return logits


def features(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """What enters a layer, (N, D) with length 1; images of more than 8 x 8 positions are pooled to that."""
    entering = entering_inputs(model, x, name).float()
    if entering.dim() == 4 and entering.shape[-1] > 8:
        entering = F.adaptive_avg_pool2d(entering, 8)
    return F.normalize(entering.flatten(1))  # (N, ...) -> (N, D)


@torch.no_grad()
def entering_inputs(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """What enters the layer of that name in the forward pass of x; `ZsuError` where it is not called as a module."""
    seen: list[Tensor] = []
    with watch_inputs([model.get_submodule(name)], lambda _, entering: seen.append(entering)):
        model(x)
    if not seen:
        raise ZsuError("not called as a module", where=name, remedy="call paths without retained samples")
    if len(seen) > 1 or len(seen[0]) != len(x):
        what, remedy = f"called {len(seen)} times for {len(x)} samples", "let the model call it once for its batch"
        raise ZsuError(what, where=name, remedy=remedy)
    return seen[0]


def module_of(parameter: str) -> str:
    """conv1.weight -> conv1"""
    return parameter.rpartition(".")[0]


@torch.no_grad()
def reroute(
    model: nn.Module, head: str, entering: Tensor, wanted: Tensor, target: int, retained: Dataset | None = None
) -> list[int]:
    """Move the head's rows of the classes that receive the evidence, so that the samples get the wanted outputs.

    One ridge regression: min_D mean |d - h D|^2 + ridge (mean |v D|^2 + RIDGE mean(h^2) |D|^2) over the samples' inputs
    h (with a 1 for the bias) and the wanted changes d of the log-probabilities, centred over the receiving classes. v
    is what must not be disturbed: inputs of the head for the other classes. With retained samples they are known, and
    the ridge is the smallest of a few that changes the answers on them by at most DISTURBED (mean Kullback-Leibler
    divergence). Without, they are guessed from the weights: after long training, the mean input of a class has the
    direction of its row of the head minus the mean row ("neural collapse"; Papyan, Han and Donoho 2020, PNAS 117(40),
    property NC3), here cut off at 0 where the inputs are.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    head : str
        Name of its last layer, an `nn.Linear` on inputs (N, J).
    entering : Tensor (N, J)
        What enters it for the samples.
    wanted, target, retained
        As in `wanted_outputs`.

    Returns
    -------
    list of int
        The receiving classes, largest first.
    """
    layer: Any = model.get_submodule(head)
    one = float(layer.bias is not None)
    h = with_bias(entering, one)  # (N, J + 1)
    now, wanted = without(layer(entering), target).cpu(), wanted.cpu()
    receiving = receivers(now.exp(), wanted.exp(), sum(p.numel() for p in model.parameters()) // h.shape[1])
    change = (wanted - now)[:, receiving]
    change -= change.mean(1, keepdim=True)
    if retained is None:
        v = typical_inputs(layer.weight.cpu().double(), target, h[:, :-1])
        solved = ridge_regression(h, change, with_bias(v, one), RIDGE)
    else:
        v = torch.cat([entering_inputs(model, images.to(entering), head) for images, _ in batches(retained)])
        before, v = without(layer(v), target).cpu(), with_bias(v, one)
        for ridge in (*SMALLER, RIDGE):
            solved = ridge_regression(h, change, v, ridge)
            after = before.clone()
            after[:, receiving] += v @ solved
            if (before.exp() * (before - without(after, target))).sum(1).mean() <= DISTURBED:
                break
    layer.weight[receiving] += solved[:-1].T.to(layer.weight)
    if layer.bias is not None:
        layer.bias[receiving] += solved[-1].to(layer.bias)
    return receiving.tolist()


def receivers(now: Tensor, wanted: Tensor, rows: int) -> Tensor:
    """The fewest classes, most first, that get all but a hundredth of the probability that moves between (N, classes);
    at most as many as have `MOST` of the weights, but always `FEW`; the model's weights are so many rows' of the head.
    """
    moves = (wanted - now).abs().mean(0)
    order = moves.argsort(descending=True)
    enough = int((moves[order].cumsum(0) < RECEIVING * moves.sum()).sum()) + 1
    return order[: min(enough, max(FEW, int(MOST * rows)))]


def ridge_regression(h: Tensor, change: Tensor, v: Tensor, ridge: float) -> Tensor:
    """The D (J + 1, receiving) of `reroute`."""
    keep = v.T @ v / len(v) + RIDGE * h[:, :-1].square().mean() * torch.eye(h.shape[1], dtype=h.dtype)
    return torch.linalg.solve(h.T @ h / len(h) + ridge * keep, h.T @ change / len(h))


def with_bias(h: Tensor, one: float) -> Tensor:
    """(N, J) -> (N, J + 1), float64 on the CPU: a 1 for the bias, or 0 where there is none."""
    return F.pad(h.double().cpu(), (0, 1), value=one)


def typical_inputs(weight: Tensor, target: int, h: Tensor) -> Tensor:
    """One input of the head for each other class, (classes - 1, J), as long as the samples' are on average."""
    direction = weight - weight.mean(0)
    if (h >= 0).all():  # behind a ReLU
        direction = direction.clamp(min=0)
    others = torch.cat([direction[:target], direction[target + 1 :]])
    return F.normalize(others) * h.square().sum(1).mean().sqrt()
