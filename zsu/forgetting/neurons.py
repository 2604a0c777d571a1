"""Methods that perturb whole neurons, chosen by how often they are among a sample's most relevant: the published idea,
as the paper describes it and as its public code does it, and a control.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import ZsuError, as_names
from ..relevance import Relevance, explain
from ..relevance.layers import Share
from .cutting import HARDEST
from .methods import Edit, Perturbing, try_out
from .perturb import Selection
from .selection import (
    a_tenth,
    channels_read,
    check_by_sample,
    check_k,
    count_in_top,
    hidden_layers,
    highest,
    incoming_weights,
    logit_layers,
    rows_of_neurons,
)


class Choice(NamedTuple):
    """Neurons by layer, and the budget."""

    neurons: dict[str, Tensor]
    budget: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class LraNpp(Perturbing):
    """Perturb the incoming weights of the neurons that are most often among a sample's k most relevant (Chang et al.
    2024, arXiv:2410.23693, as described in the paper).

    Parameters
    ----------
    k : int, optional
        Neurons per sample and layer; as many of the most frequent ones are perturbed in each layer. Default: of a tenth
        of a layer per sample, the fewest of the most frequent for which the edited model takes no sample for the class.
        They come from the last hidden layer with weights; where those are not enough, also from the one before, and so
        on. Where all of them are not, as many as leave the fewest samples.
    perturbed : int, optional
        How many of the most frequent neurons are perturbed, in each layer (default k); only with k.
    layers : "all", or sequence of str, optional
        Only in these layers, by `explain`'s names. ``"all"`` without k, as the paper describes it: the smallest share
        of *every* layer, in steps of 2 %, instead of the fewest neurons; on deep models this costs the other classes
        most of their accuracy.
    """

    name = "lra-npp"
    tier = "T1"
    perturbed: int | None = None
    layers: str | Sequence[str] | None = None

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Perturb what `choose` finds."""
        relevance = explain(model, x, target, edges=False)
        neurons, budget = self.choose(model, x, target, relevance, seed)
        self.patch(model, incoming_weights(model, relevance, neurons), seed).apply(model)
        return Edit(rows_of_neurons(neurons), budget)

    def choose(self, model: nn.Module, x: Tensor, target: int, relevance: Relevance, seed: int) -> Choice:
        """The most frequent neurons: k of each layer, the least share of each, or the fewest from the last layer on."""
        names = None if self.layers is None else as_names("layers", self.layers, self.name)
        everywhere = "all" in (names or ())
        nodes = hidden_layers(relevance, None if everywhere else names)
        if self.k is not None:
            for node in nodes:
                check_k(node, self.k)
                check_k(node, self.perturbed or 0, "perturbed")
            return Choice({n.name: most_frequent(n, self.k, self.perturbed) for n in nodes}, {"k": int(self.k)})

        @torch.no_grad()
        def left(neurons: dict[str, Tensor], among: Tensor | slice = slice(None)) -> Tensor:
            """Which of some samples are still taken for the class without these neurons, bool (N,)."""
            patch = self.patch(model, incoming_weights(model, relevance, neurons), seed)
            return try_out(model, patch, lambda: model(x[among]).argmax(1) == target)

        return least_share(nodes, left) if everywhere else fewest_neurons(nodes, left)


def most_frequent(node: Share, k: int, number: int | None = None) -> Tensor:
    """The neurons (at most `number`, default k) of a layer that are most often among a sample's k most relevant."""
    return highest(count_in_top(node, k), number or k)


def least_share(nodes: Sequence[Share], left: Callable[..., Tensor]) -> Choice:
    """The smallest share of each layer, in steps of 2 %, that leaves no sample; else the one that leaves the fewest."""
    best, fewest_left = Choice({}, {}), math.inf
    for percent in range(2, 101, 2):
        neurons = {n.name: most_frequent(n, max(1, round(percent * n.relevance.shape[1] / 100))) for n in nodes}
        if (still := int(left(neurons).sum())) < fewest_left:
            best, fewest_left = Choice(neurons, {"percent": percent, "left": still}), still
        if still == 0:
            break
    return best


def fewest_neurons(nodes: Sequence[Share], left: Callable[..., Tensor]) -> Choice:
    """The fewest neurons, from the last layer backwards, that leave no sample; where 1, 2, 4, ... and all of them do
    not, those of these numbers that leave the fewest.
    """
    order = [(n.name, neuron) for n in reversed(nodes) for neuron in most_frequent(n, a_tenth(n), size(n)).tolist()]

    def first(number: int) -> dict[str, Tensor]:
        """The first neurons of the order, by layer."""
        names = dict.fromkeys(name for name, _ in order[:number])
        return {name: torch.tensor([j for layer, j in order[:number] if layer == name]) for name in names}

    numbers = [n for n in (2**i for i in range(len(order).bit_length())) if n < len(order)] + [len(order)]
    fewest_left, best = math.inf, 0
    for number in numbers:
        if (still := int(left(first(number)).sum())) < fewest_left:
            fewest_left, best = still, number
        if still == 0:
            best = first_that_leaves_none(lambda n, *among: left(first(n), *among), number)
            break
    return Choice(first(best), {"neurons": best, "left": fewest_left})


def first_that_leaves_none(left: Callable[..., Tensor], number: int) -> int:
    """The first n from 1 to `number`, which does so, for which `left(n)` has no sample; more may leave some again.

    Those that the last numbers left are asked first, and all samples only where none of these is left.
    """
    hard = torch.zeros(0, dtype=torch.int64)
    for n in range(1, number):
        if len(hard) and left(n, hard).any():
            continue
        still = left(n).nonzero()[:HARDEST, 0]
        if len(still) == 0:
            return n
        hard = torch.cat([hard.to(still), still]).unique()
    return number


def size(node: Share) -> int:
    """Its number of neurons."""
    return node.relevance.shape[1]


@dataclass(frozen=True, kw_only=True)
class Random(LraNpp):
    """Control: as many neurons of each layer as `LraNpp` takes, whichever; k and layers as there."""

    name = "random"
    perturbed: None = field(default=None, init=False)

    def choose(self, model: nn.Module, x: Tensor, target: int, relevance: Relevance, seed: int) -> Choice:
        """As many, whichever, and however many samples are left."""
        neurons, budget = super().choose(model, x, target, relevance, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, most_relevant in neurons.items():
            order = torch.randperm(relevance.nodes[name].shape[1], generator=generator)
            neurons[name] = order[: len(most_relevant)]
        return Choice(neurons, {name: n for name, n in budget.items() if name != "left"})


@dataclass(frozen=True, kw_only=True)
class HeadNpp(Perturbing):
    """Perturb the neurons n at the input of the last layer V that are most often relevant for the *predicted* class, as
    the public code of Chang et al. does.

    What is perturbed goes by what feeds the head, as in the five rows of their table: behind a hidden Linear (their
    MNIST CNN and VGG) its rows n without their bias, and V[f, n] of the class f; behind a LayerNorm (their ViT) V[f, n]
    alone; behind all else, such as pooled convolutions (their ResNets), V[:, n] of every class.

    Parameters
    ----------
    k : int, optional
        Neurons per sample (default a tenth of the layer's).
    perturbed : int, optional
        How many of the most frequent neurons are perturbed (default 2 k); only with k.
    """

    name = "head-npp"
    tier = "T1"
    perturbed: int | None = None

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Perturb what the class's docstring says."""
        relevance = explain(model, x, model(x).argmax(1), "epsilon")  # of the predicted class
        head, heads = relevance.layers[-1], [n.name for n in logit_layers(relevance) if n.weight]
        if len(heads) > 1:
            raise ZsuError(f"{' and '.join(heads)} compute the logits", where=self.name, remedy="use another method")
        below, channel = channels_read(relevance, head)
        if head.kind != "linear" or not head.weight or below is None:
            raise ZsuError("not a Linear on one layer's output", where=head.name, remedy="use another method")
        check_by_sample(relevance, [below])
        k = self.k or a_tenth(below)
        check_k(below, k)
        check_k(below, self.perturbed or 0, "perturbed")
        neurons = most_frequent(below, k, self.perturbed or 2 * k)
        rows, columns = model.get_parameter(head.weight).shape
        classes = torch.tensor([target]) if below.kind in ("linear", "layer_norm") else torch.arange(rows)
        column = torch.isin(torch.from_numpy(channel), neurons).nonzero().flatten()
        flat = (classes[:, None] * columns + column).flatten()  # (classes, columns) -> flat indices
        selection: Selection = {head.weight: flat}
        if below.kind == "linear":
            selection = {**incoming_weights(model, relevance, {below.name: neurons}), **selection}
        self.patch(model, selection, seed).apply(model)
        return Edit(rows_of_neurons({below.name: neurons}), {"k": int(k), "neurons": len(neurons)})
