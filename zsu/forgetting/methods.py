"""Methods of forgetting as data: what each needs of the data, its options, and the edit that it makes.

A method is a frozen class below `Method`, as a relevance rule is one below `Rule`: its name, its tier, its options with
their defaults, and

    edit(model, x, target, retained, seed)  ->  Edit(cut, budget)

which changes `model`, a copy in eval mode, in place so that it forgets the class `target`. `x` are samples (N, C, H, W)
that `forget` has checked, `retained` is a data set without the class, or None, and `seed` decides all that is random.
To add a method, write such a class; ten lines are enough (see `Zeroed`). `forget` takes ``Yours()`` as it takes a name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import ZsuError, check_count, warn
from ..inside import logit_layer
from ..relevance import Relevance, explain, explain_each
from .perturb import Patch, Selection, check_noise, perturb
from .rerouting import module_of, reroute, wanted_outputs
from .selection import (
    a_tenth,
    check_k,
    count_affordable,
    count_in_top,
    find_specific_edges,
    hidden_layers,
    highest,
    incoming_weights,
    layer_read,
    merge_by_parameter,
    rows_of_neurons,
    weight_blocks,
)

MASKED_LOGIT = -1e4  # small enough for probability 0 in float16, float32 and float64
NOISE = 0.1  # of the inputs, in their standard deviations: under it too the class has to stay at chance
MOST = 0.002  # share of the weights that may be cut
AS_GOOD = 0.01  # a probability within so much of the best that can be reached counts as reached
GONE = 1e-3  # probability of the class on the samples, after `paths`


def no_rows() -> pd.DataFrame:
    """A `Forgotten.cut` of nothing."""
    return pd.DataFrame({"layer": [], "channel": [], "source": []}, dtype=object)


class Edit(NamedTuple):
    """What an edit did: `Forgotten.cut` for one class, and the budget that was found, by name (as JSON can hold it)."""

    cut: pd.DataFrame
    budget: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods share. An option is a field of the class.

    Attributes
    ----------
    name : str
        What `zsu.forget` and tables call it.
    tier : str
        By the data that it needs: T0 nothing but weights, T1 a few unseen samples of the class, T2 its training images,
        T3 also some retained samples, T4 all of them.
    """

    name = ""
    tier = "T0"

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """See the module's docstring."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Perturbing(Method):
    """A method that sets weights to 0 or adds noise to them.

    Parameters
    ----------
    k : int, optional
        How much: see the method.
    perturbation : {"zero", "gaussian", "laplace"}
    scale : float
    absolute : bool
        See `zsu.forgetting.perturb.perturb`.
    """

    perturbation: str = "zero"
    scale: float = 1.0
    absolute: bool = False
    k: int | None = None

    def __post_init__(self):
        check_noise(self.perturbation, self.scale)
        for option in ("k", "perturbed"):  # which some have
            if getattr(self, option, None) is not None:
                check_count(option, getattr(self, option), self.name)
        if getattr(self, "perturbed", None) is not None and self.k is None:
            raise ZsuError("perturbed without k", where=self.name, remedy="give both")

    def patch(self, model: nn.Module, selection: Selection, seed: int) -> Patch:
        """The selected weights, perturbed."""
        return perturb(model, selection, self.perturbation, scale=self.scale, absolute=self.absolute, seed=seed)


# --- paths ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CutPaths(Perturbing):
    """Cut class-specific edges, move the head so that the evidence goes where it is wanted, lower the class's bias.

    Cut are edges of the most probable paths, those that serve this class more than all others together, in the order of
    their most probable path, as few as bring the class to chance on every sample, with and without small input noise,
    or, where all do not, as come as far. Where the evidence goes: `zsu.forgetting.rerouting`. The bias falls by what is
    missing to a probability of 0.001.

    The budget: edges (that were cut), available, edges_enough (whether they alone bring the class to chance), and where
    the head is a Linear: receiving (classes whose rows moved, largest share first), lowered (biases).

    Parameters
    ----------
    k : int, optional
        Cut at most that many edges (default: as many as have 0.2 % of the weights).
    retained : bool
        Also look at retained samples, for where the evidence should go: tier T3 instead of T1. `forget` sets it where
        it is given some.
    """

    name = "paths"
    retained: bool = False

    @property
    def tier(self) -> str:  # type: ignore[override]
        """T1, or with retained samples T3."""
        return "T3" if self.retained else "T1"

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """The three steps, in their order."""
        wanted = wanted_outputs(model, x, target, explain(model, x, target, edges=False), retained)
        seen = torch.cat([x, add_noise(x, seed)])
        cut, budget = self.cut_edges(model, x, seen, target, seed)
        head = logit_layer(model, x)
        if head is None:
            p, chance = highest_probability(model, seen, target), 1 / wanted.shape[1]
            if p > chance:
                warn(f"{len(cut)} edges are cut, and the class keeps a probability of up to {p:.2f} on the samples")
            return Edit(cut, budget)
        receiving = reroute(model, head, x, wanted, target, retained)
        lowered = lower_bias(model, seen, target, f"{head}.bias")
        if not lowered.empty:
            cut = pd.concat([cut, lowered], ignore_index=True)
        return Edit(cut, {**budget, "receiving": receiving, "lowered": len(lowered)})

    def cut_edges(self, model: nn.Module, x: Tensor, seen: Tensor, target: int, seed: int) -> Edit:
        """Cut the fewest class-specific edges, in the order of their most probable path, that bring the class to chance
        on what is seen; where all of them do not, the fewest that come as far.

        Flows are those of the z+ rule from a relevance of 1 at each logit, so that every class counts alike, whatever
        the size and sign of its logit.
        """
        one = torch.zeros_like(model(x))
        one[:, target] = 1
        own, others = explain_each(model, x, [one, 1 - one], "z+")
        edges = find_specific_edges(own, others)
        if edges.empty:
            what = "no edge serves this class more than the others"
            raise ZsuError(what, where="forget", remedy="use another method")
        blocks = list(weight_blocks(model, own, edges))
        edges = edges.head(self.k or count_affordable(model, len(edges), blocks, MOST))

        def patch(n: int) -> Patch:
            chosen = ((name, flat[rank < n]) for name, rank, flat in blocks)
            return self.patch(model, merge_by_parameter(chosen), seed)

        def left(n: int) -> float:
            """The largest probability of the class when n edges are cut."""
            return try_out(model, patch(n), lambda: highest_probability(model, seen, target))

        low, high = 0, len(edges)  # cutting `low` edges is too little, cutting `high` is enough
        chance = 1 / one.shape[1]
        goal = max(chance, left(high) + AS_GOOD)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if left(middle) <= goal else (middle, high)
        patch(high).apply(model)
        budget = {"edges": high, "available": len(edges), "edges_enough": goal == chance}
        return Edit(edges.loc[: high - 1, ["layer", "channel", "source"]], budget)


def add_noise(x: Tensor, seed: int) -> Tensor:
    """x with Gaussian noise of `NOISE` standard deviations."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return x + NOISE * x.float().std(correction=0).to(x) * noise


@torch.no_grad()
def highest_probability(model: nn.Module, x: Tensor, target: int) -> float:
    """Of the class, on the samples."""
    return float(model(x).float().softmax(1)[:, target].max())


def try_out(model: nn.Module, patch: Patch, measure: Callable[[], float]) -> float:
    """What is measured while the model holds the patch."""
    patch.apply(model)
    try:
        return measure()
    finally:
        patch.revert(model)


@torch.no_grad()
def lower_bias(model: nn.Module, x: Tensor, target: int, name: str) -> pd.DataFrame:
    """Lower the class's bias by the least that makes its probability at most `GONE` on x; what was lowered.

    Some classes are told by the lack of evidence for the others; then the bias alone decides for them.
    """
    bias = dict(model.named_parameters()).get(name)
    if bias is None:
        p = highest_probability(model, x, target)
        warn(f"the head has no bias: probability up to {p:.2f} is left")
        return no_rows()
    logits = model(x).double()
    others = logits.clone()
    others[:, target] = -torch.inf
    allowed = others.logsumexp(1) + math.log(GONE / (1 - GONE))  # the logit with probability GONE
    excess = float((logits[:, target] - allowed).max())
    bias[target] -= max(0.0, excess)
    return pd.DataFrame({"layer": [name], "channel": [target], "source": pd.NA}).head(int(excess > 0))


# --- neurons --------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Neurons by layer; how many samples are taken for the class without them, where that was asked; the budget."""

    neurons: dict[str, Tensor]
    left: int
    budget: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class LraNpp(Perturbing):
    """In every weighted layer but the last, perturb the incoming weights of the neurons that are most often among a
    sample's k most relevant (Chang et al. 2024, arXiv:2410.23693, as described in the paper).

    Parameters
    ----------
    k : int, optional
        Neurons per sample and layer. Default: the smallest share of each layer, in steps of 2 %, for which the edited
        model takes no sample for the class; where none does it, the one that leaves the fewest.
    perturbed : int, optional
        How many of the most frequent neurons are perturbed, in each layer (default k); only with k.
    layers : sequence of str, optional
        Only in these layers, by `explain`'s names.
    """

    name = "lra-npp"
    tier = "T1"
    perturbed: int | None = None
    layers: Sequence[str] | None = None

    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Perturb what `choose` finds."""
        relevance = explain(model, x, target, edges=False)
        neurons, left, budget = self.choose(model, x, target, relevance, seed)
        if left:
            warn(f"{budget['percent']} % of each layer: {left} of {len(x)} samples are still taken for the class")
        self.patch(model, incoming_weights(model, relevance, neurons), seed).apply(model)
        return Edit(rows_of_neurons(neurons), budget)

    @torch.no_grad()
    def choose(self, model: nn.Module, x: Tensor, target: int, relevance: Relevance, seed: int) -> Choice:
        """The most frequent neurons of each layer: k, or the least share that is enough."""
        nodes = hidden_layers(relevance, self.layers)

        def most_frequent(sizes: dict[str, int]) -> dict[str, Tensor]:
            return {n.name: highest(count_in_top(n, sizes[n.name]), self.perturbed or sizes[n.name]) for n in nodes}

        def count_left(neurons: dict[str, Tensor]) -> int:
            patch = self.patch(model, incoming_weights(model, relevance, neurons), seed)
            return int(try_out(model, patch, lambda: int((model(x).argmax(1) == target).sum())))

        if self.k is not None:
            for node in nodes:
                check_k(node, self.k)
                check_k(node, self.perturbed or 0, "perturbed")
            return Choice(most_frequent({n.name: self.k for n in nodes}), 0, {"k": int(self.k)})
        best = Choice({}, len(x) + 1, {})
        for percent in range(2, 101, 2):
            neurons = most_frequent({n.name: max(1, round(percent * n.relevance.shape[1] / 100)) for n in nodes})
            left = count_left(neurons)
            if left < best.left:
                best = Choice(neurons, left, {"percent": percent, "left": left})
            if left == 0:
                break
        return best


@dataclass(frozen=True, kw_only=True)
class Random(LraNpp):
    """Control: as many neurons of each layer as `LraNpp` takes, whichever; k and layers as there."""

    name = "random"
    perturbed: None = field(default=None, init=False)

    def choose(self, model: nn.Module, x: Tensor, target: int, relevance: Relevance, seed: int) -> Choice:
        """As many, whichever, and however many samples are left."""
        choice = super().choose(model, x, target, relevance, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, most_relevant in choice.neurons.items():
            order = torch.randperm(relevance.nodes[name].shape[1], generator=generator)
            choice.neurons[name] = order[: len(most_relevant)]
        return Choice(choice.neurons, 0, {name: n for name, n in choice.budget.items() if name != "left"})


@dataclass(frozen=True, kw_only=True)
class HeadNpp(Perturbing):
    """At the input of the last layer only, for the *predicted* class: the most frequent neurons lose their columns of
    the head (what the public code of Chang et al. does for ResNets).

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
        """Perturb the columns."""
        relevance = explain(model, x, model(x).argmax(1), "epsilon")  # of the predicted class
        head = relevance.layers[-1]
        below, channel = layer_read(relevance, head)
        if head.kind != "linear" or not head.weight or below is None:
            raise ZsuError("not a Linear on one layer's output", where=head.name, remedy="use another method")
        k = self.k or a_tenth(below)
        check_k(below, k)
        check_k(below, self.perturbed or 0, "perturbed")
        neurons = highest(count_in_top(below, k), self.perturbed or 2 * k)
        rows, columns = model.get_parameter(head.weight).shape
        column = torch.isin(torch.from_numpy(channel), neurons).nonzero().flatten()
        flat = (torch.arange(rows)[:, None] * columns + column).flatten()  # (rows, columns) -> flat indices
        self.patch(model, {head.weight: flat}, seed).apply(model)
        return Edit(rows_of_neurons({below.name: neurons}), {"k": int(k), "neurons": len(neurons)})


# --- controls -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BiasShift(Method):
    """Control: the class's bias becomes a constant far below every logit."""

    name = "bias-shift"
    row = False  # whether the class's row of the head becomes 0

    @torch.no_grad()
    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Checked on x: the class is gone, and the other logits are what they were."""
        before = model(x)
        head = explain(model, x[:1], target, edges=False).layers[-1]
        held = dict(model.named_parameters())
        bias = module_of(head.weight) + ".bias" if head.weight else None
        if head.kind != "linear" or bias not in held:
            raise ZsuError("the last layer is not a Linear with bias", where=head.name, remedy="use another method")
        others = torch.arange(before.shape[1], device=x.device) != target
        if target < len(held[bias]):
            if self.row:
                held[head.weight][target] = 0
            held[bias][target] = MASKED_LOGIT
        after = model(x)
        same = torch.allclose(after[:, others], before[:, others], rtol=1e-3, atol=1e-3)
        if not same or after.float().softmax(1)[:, target].max() > 1e-6:
            what = "the outputs of the last layer are not the logits in their order"
            raise ZsuError(what, where=head.name, remedy="use another method")
        return Edit(pd.DataFrame({"layer": [head.name], "channel": [target], "source": pd.NA}), {})


@dataclass(frozen=True, kw_only=True)
class Mask(BiasShift):
    """Control: the class's logit becomes a constant far below all others, whatever the input."""

    name = "mask"
    row = True


@dataclass(frozen=True, kw_only=True)
class Zeroed(Method):
    """Control: all weights are 0."""

    name = "zeroed"

    @torch.no_grad()
    def edit(self, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> Edit:
        """Whatever the class."""
        for p in model.parameters():
            p.zero_()
        return Edit(no_rows(), {})
