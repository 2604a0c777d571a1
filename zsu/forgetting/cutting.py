"""The method of paths: cut class-specific edges, move the head, lower the class's bias."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import ZsuError, warn
from ..inside import logit_layer
from ..relevance import explain, explain_each
from .methods import Edit, Perturbing, no_rows, try_out
from .perturb import Patch
from .rerouting import entering_inputs, reroute, wanted_outputs
from .selection import count_affordable, find_specific_edges, merge_by_parameter, weight_blocks

NOISE = 0.1  # of the inputs, in their standard deviations: under it too the class has to stay at chance
MOST = 0.002  # share of the weights that may be cut
AS_GOOD = 0.01  # a probability within so much of the best that can be reached counts as reached
GONE = 1e-3  # probability of the class on the samples, after `paths`
HARDEST = 4  # samples that are asked first whether a cut is enough


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
        relevance = explain(model, x, target, edges=False)
        wanted = wanted_outputs(model, x, target, relevance, retained)
        seen = torch.cat([x, add_noise(x, seed)])
        head = logit_layer(model, x[:1])
        h = before_head(model, head, seen)
        edges, patch, shallow = self.edges(model, head, x, relevance.logits, target, seed)

        def left(n: int, among: Tensor | slice = slice(None)) -> Tensor:
            """Probability of the class on some of what is seen, when n edges are cut."""
            return try_out(model, patch(n), lambda: probability(model, head, h_of(n, among), target))

        def h_of(n: int, among: Tensor | slice = slice(None)) -> Tensor:
            """What enters the head when n edges are cut; where all of them lie in it, nothing changes there."""
            return h[among] if n <= shallow else before_head(model, head, seen[among])

        n, reached = fewest_cuts(left, shallow, len(edges), 1 / wanted.shape[1])
        patch(n).apply(model)
        cut, h = edges.loc[: n - 1, ["layer", "channel", "source"]], h_of(n)
        budget = {"edges": n, "available": len(edges), "edges_enough": reached}
        if head is None:
            if not reached:
                p = float(probability(model, head, h, target).max())
                warn(f"{n} edges are cut, and the class keeps a probability of up to {p:.2f} on the samples")
            return Edit(cut, budget)
        receiving = reroute(model, head, h[: len(x)], wanted, target, retained)
        lowered = lower_bias(model, head, h, target)
        if not lowered.empty:
            cut = pd.concat([cut, lowered], ignore_index=True)
        return Edit(cut, {**budget, "receiving": receiving, "lowered": len(lowered)})

    def edges(
        self, model: nn.Module, head: str | None, x: Tensor, logits: Tensor, target: int, seed: int
    ) -> tuple[pd.DataFrame, Callable[[int], Patch], int]:
        """The class-specific edges in the order of their most probable path, as many as may be cut; the patch that cuts
        the first n of them; and how many of the first lie in the head alone.

        Flows are those of the z+ rule from a relevance of 1 at each logit, so that every class counts alike, whatever
        the size and sign of its logit.
        """
        one = torch.zeros_like(logits)
        one[:, target] = 1
        own, others = explain_each(model, x, [one, 1 - one], "z+")
        try:
            edges = find_specific_edges(own, others)
        except ZsuError as error:
            if error.where != "find_paths":
                raise
            raise ZsuError(error.what, where="forget", remedy="use another method") from error
        if edges.empty:
            what = "no edge serves this class more than the others"
            raise ZsuError(what, where="forget", remedy="use another method")
        blocks = list(weight_blocks(model, own, edges))
        edges = edges.head(self.k or count_affordable(model, len(edges), blocks, MOST))

        def patch(n: int) -> Patch:
            chosen = ((name, flat[rank < n]) for name, rank, flat in blocks)
            return self.patch(model, merge_by_parameter(chosen), seed)

        in_head = {f"{head}.weight"} if sum(n.weight == f"{head}.weight" for n in own.layers) == 1 else set()
        deep = [int(rank.min()) for name, rank, _ in blocks if name not in in_head and len(rank)]
        return edges, patch, min([len(edges), *deep])


def add_noise(x: Tensor, seed: int) -> Tensor:
    """x with Gaussian noise of `NOISE` standard deviations."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return x + NOISE * x.float().std(correction=0).to(x) * noise


@torch.no_grad()
def before_head(model: nn.Module, head: str | None, x: Tensor) -> Tensor:
    """What enters the head (N, J); where the logits are no Linear's, they themselves."""
    return model(x) if head is None else entering_inputs(model, x, head)


@torch.no_grad()
def probability(model: nn.Module, head: str | None, h: Tensor, target: int) -> Tensor:
    """Of the class (N,), from what `before_head` gives."""
    logits = h if head is None else model.get_submodule(head)(h)
    return logits.float().softmax(1)[:, target]


def fewest_cuts(left: Callable[..., Tensor], shallow: int, number: int, chance: float) -> tuple[int, bool]:
    """How few of the edges bring the class to chance on all samples, else as far as all of them; and whether to chance.

    Parameters
    ----------
    left : function of n and, where only some samples are asked, their indices
        The class's probability on the samples when n edges are cut.
    shallow : int
        So many edges lie in the head, where `left` is cheap.
    number : int
        Of all edges.
    chance : float
    """
    in_head = left(shallow)
    p = in_head if in_head.max() <= chance else left(number)
    reached = bool(p.max() <= chance)
    goal = chance if reached else float(p.max()) + AS_GOOD
    if shallow and in_head.max() <= goal:
        return fewest(lambda n: bool(left(n).max() <= goal), 0, shallow), reached
    low, hard = shallow, p.new_empty(0, dtype=torch.int64)
    while True:  # ask the hardest samples, then all of them, then with those that were found wanting
        hard = torch.cat([hard, p.topk(min(HARDEST, len(p))).indices]).unique()
        n = fewest(lambda n: bool(left(n, hard).max() <= goal), low, number)  # noqa: B023
        p = left(n)
        if n == number or p.max() <= goal:
            return n, reached
        low = n


def fewest(enough: Callable[[int], bool], low: int, high: int) -> int:
    """By halving, an n that is enough while n - 1 is not: `low` is too little, `high` is enough."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@torch.no_grad()
def lower_bias(model: nn.Module, head: str, h: Tensor, target: int) -> pd.DataFrame:
    """Lower the class's bias by the least that makes its probability at most `GONE`; what was lowered.

    Some classes are told by the lack of evidence for the others; then the bias alone decides for them.
    """
    name = f"{head}.bias"
    bias = dict(model.named_parameters()).get(name)
    if bias is None:
        p = float(probability(model, head, h, target).max())
        warn(f"the head has no bias: probability up to {p:.2f} is left")
        return no_rows()
    logits = model.get_submodule(head)(h).double()
    others = logits.clone()
    others[:, target] = -torch.inf
    allowed = others.logsumexp(1) + math.log(GONE / (1 - GONE))  # the logit with probability GONE
    excess = float((logits[:, target] - allowed).max())
    bias[target] -= max(0.0, excess)
    return pd.DataFrame({"layer": [name], "channel": [target], "source": pd.NA}).head(int(excess > 0))
