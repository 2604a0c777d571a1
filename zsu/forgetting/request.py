"""forget(): remove classes from a trained classifier, from a few unseen samples of them or with more data."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches, classes, histogram, targets
from ..errors import ZsuError, check_count, is_integer, warn
from ..paths.graph import build_graph
from ..paths.search import best_through
from ..relevance.checks import check_input, check_logits, check_model, forward, output_weights
from ..relevance.explanation import Relevance, explain, explain_each
from ..relevance.layers import Share as Node
from .peers import PEERS
from .peers import TIERS as PEER_TIERS
from .perturb import Patch, model_hash, perturb
from .rerouting import entering_inputs, module_of, reroute, wanted_outputs
from .selection import (
    a_tenth,
    best,
    check_k,
    frequency,
    hidden_layers,
    incoming_weights,
    joined,
    weight_blocks,
)

TIERS = {
    "paths": "T1", "lra-npp": "T1", "head-npp": "T1",
    "mask": "T0", "bias-shift": "T0", "random": "T1", "zeroed": "T0",
    **PEER_TIERS,
}  # fmt: skip
METHODS = tuple(TIERS)
MASKED_LOGIT = -1e4  # small enough for probability 0 in float16, float32 and float64
NOISE = 0.1  # of the inputs, in their standard deviations: under it too the class has to stay at chance
MOST = 0.002  # of the weights are cut
AS_GOOD = 0.01  # probability
GONE = 1e-3  # probability of the class on the samples, after `paths`
FEW = 5  # samples


class Options(NamedTuple):
    """What `forget` was asked for, besides the method; see there."""

    k: int | None
    perturbed: int | None
    layers: Sequence[str] | None
    retained: Dataset | None
    noise: dict  # keywords of `perturb`
    seed: int


class Forgotten(NamedTuple):
    """What `forget` returns.

    Attributes
    ----------
    model : nn.Module
        The edited copy.
    patch : Patch
        The edit; ``patch.revert(model)`` gives the original back bit for bit, ``patch.diff(model)`` says what it
        changes in each layer.
    cut : pandas.DataFrame
        What was perturbed, one row each: layer, channel, source (the source channel of a cut edge; <NA> where the
        whole neuron was perturbed, and where the layer is the name of a bias that was lowered). Empty for methods that
        train.
    """

    model: nn.Module
    patch: Patch
    cut: pd.DataFrame


def forget(
    model: nn.Module,
    x: Tensor | Sequence[Tensor],
    target: int | Sequence[int],
    method: str = "paths",
    perturbation: str = "zero",
    *,
    k: int | None = None,
    perturbed: int | None = None,
    layers: Sequence[str] | None = None,
    retained: Dataset | None = None,
    scale: float = 1.0,
    absolute: bool = False,
    seed: int = 0,
) -> Forgotten:
    """Make a copy of the model forget classes, from a few samples of them that it was not trained on.

    Parameters
    ----------
    model : nn.Module
        Classifier in eval mode with logits (N, classes) as output; it is not changed.
    x : Tensor (N, C, H, W), or a list of them
        Samples of the class, of the dtype and on the device of the model; for several classes one tensor each. The
        methods of tier T2 and above want all training images of the class.
    target : int, or a list of them
        Index of the class to forget. Several are forgotten one after the other in the order of their indices, whatever
        the order of the list, and make one patch; a later one can raise the probability of an earlier one a little.
    method : str
        By the data that it needs: T0 nothing but weights, T1 a few samples of the class, T2 its training images, T3
        also some retained samples, T4 all of them.

        * ``"paths"`` (T1): cut edges of the most probable paths, those that serve this class more than all others
          together, in the order of their most probable path, as few as bring the class to chance on every sample, with
          and without small input noise, or, where all do not, as come as far; move the head so that the evidence goes
          where `zsu.rerouting` says (with `retained`: T3); and lower the class's bias by what is missing to a
          probability of 0.001.
        * ``"lra-npp"`` (T1): in every weighted layer but the last, perturb the incoming weights of the neurons that
          are most often among a sample's k most relevant (Chang et al. 2024, as described in the paper).
        * ``"head-npp"`` (T1): the same at the input of the last layer only, for the *predicted* class; the most
          frequent neurons lose their columns of the head (what the authors' public code does for ResNets).
        * ``"mask"``, ``"bias-shift"`` (T0): controls; the class's logit becomes a constant far below all others, or its
          bias alone falls that far.
        * ``"random"``: control; as many random neurons per layer as ``"lra-npp"`` takes.
        * ``"zeroed"`` (T0): control; all weights are 0.
        * ``"boundary-shrink"`` (T2), ``"ssd"``, ``"svd"`` (T3), ``"fine-tune"``, ``"negative-gradient"`` (T4): see
          `zsu.peers`.
    perturbation : {"zero", "gaussian", "laplace"}
        See `zsu.perturb.perturb`; only for ``"paths"``, ``"lra-npp"``, ``"head-npp"`` and ``"random"``.
    k : int, optional
        ``"paths"``: cut at most that many edges (default: as many as 0.2 % of the weights have). ``"lra-npp"``,
        ``"random"``: neurons per sample and layer (default: the smallest share of each layer for which the edited model
        takes no sample for the class). ``"head-npp"``: neurons per sample (default a tenth).
    perturbed : int, optional
        ``"lra-npp"``, ``"head-npp"``: how many of the most frequent neurons are perturbed, in each layer (default k,
        and 2 k for ``"head-npp"``).
    layers : sequence of str, optional
        ``"lra-npp"``, ``"random"``: only in these layers, by `explain`'s names.
    retained : Dataset, optional
        Samples of the other classes, with ``.targets`` and ``.classes``: for ``"paths"`` if you have some, and for the
        methods of T3 and T4. Refused by all others, which do not look at it.
    scale, absolute :
        Of the noise, see `zsu.perturb.perturb`.
    seed : int
        Of the noise, of the random control and of training.

    Returns
    -------
    Forgotten

    Raises
    ------
    ZsuError
        Unknown method or perturbation; k < 1 or more neurons than a layer has; target no integer; a model that takes no
        sample for the class; retained data that is missing, not asked for, or holds the class; and what `explain`
        refuses.

    Warns
    -----
    UserWarning
        The model does not recognise half of the samples; fewer than 5 samples; the edit changes no weight; or
        ``"paths"`` or ``"lra-npp"`` did not reach their goal: then the best that was reached is returned, and
        ``patch.metadata["budget"]`` says so.
    """
    several = several_classes(x, target)
    noise = {"perturbation": perturbation, "scale": scale, "absolute": absolute, "seed": seed}
    options = Options(k, perturbed, layers, retained, noise, seed)
    check_options(method, options, [c for _, c in several])
    started = time.perf_counter()
    if method in PEERS:
        unrecognised = sum(recognised(predicted(model, samples), c) for samples, c in several)
    else:
        relevances = [explain(model, samples, c, edges=False) for samples, c in several]
        unrecognised = sum(recognised(r.logits, c) for r, (_, c) in zip(relevances, several, strict=True))
    check_retained(model, retained)
    edited, cuts, budgets = copy.deepcopy(model), [nothing()], []
    for i, (samples, c) in enumerate(several):
        if method in PEERS:
            train_all(PEERS[method], edited, samples, c, retained, seed)
            continue
        relevance = explain(edited, samples, c, edges=False) if i else relevances[0]
        budget, cut = edit(edited, samples, c, relevance, method, options)
        budgets.append(budget)
        cuts.append(cut)
    if method == "zeroed":
        for p in edited.parameters():
            p.detach().zero_()
    patch = Patch.between(model, edited)
    if patch.weights_changed == 0:
        warn("the edit has no effect: no weight changes")
    patch.metadata = {
        "target": ",".join(str(c) for _, c in several),
        "method": method,
        "tier": "T3" if method == "paths" and retained is not None else TIERS[method],
        "perturbation": perturbation,
        "scale": str(scale),
        "absolute": str(absolute),
        "k": str(k),
        "perturbed": str(perturbed),
        "layers": str(layers if layers is None else list(layers)),
        "retained": str(0 if retained is None else len(retained)),
        "budget": "; ".join(b for b in budgets if b),
        "samples": ",".join(str(len(s)) for s, _ in several),
        "samples_sha256": samples_hash([s for s, _ in several]),
        "unrecognised": str(unrecognised),
        "seed": str(seed),
        "seconds": f"{time.perf_counter() - started:.4f}",
        "parent": model_hash(model),
        "zsu": version("zsu"),
        "torch": torch.__version__,
    }
    return Forgotten(edited, patch, pd.concat(cuts, ignore_index=True))


# --- what was asked for ---------------------------------------------------------------------------------------


def several_classes(x: Tensor | Sequence[Tensor], target: int | Sequence[int]) -> list[tuple[Tensor, int]]:
    """(samples, class) in the order of the classes."""
    if is_integer(target):
        return [(detached(x), int(target))]
    remedy = "pass the index of one class, or a list of indices and a list of as many tensors of samples"
    wrong = isinstance(target, (str, bytes)) or not isinstance(target, (Sequence, np.ndarray))
    wrong = wrong or (isinstance(target, np.ndarray) and target.ndim != 1)
    if wrong or not all(map(is_integer, target)):
        raise ZsuError(f"target is {target!r}", where="forget", remedy=remedy)
    if len(set(target)) < len(target):
        what = "a class is named twice: whole classes are forgotten here, not single samples"
        raise ZsuError(what, where="forget", remedy=remedy)
    if not isinstance(x, Sequence) or len(x) != len(target) or not len(target):
        number = len(x) if isinstance(x, (Sequence, Tensor)) else "no"
        raise ZsuError(f"{number} tensors of samples for {len(target)} classes", where="forget", remedy=remedy)
    return sorted(((detached(s), int(c)) for s, c in zip(x, target, strict=True)), key=lambda pair: pair[1])


def detached(x: Tensor) -> Tensor:
    """Without a graph, so that no gradient reaches the caller's tensor; what is no tensor is refused later."""
    return x.detach() if isinstance(x, Tensor) else x


def check_options(method: str, options: Options, forgotten: list[int]) -> None:
    """Refuse what does not go together, before anything is computed."""
    if method not in METHODS:
        raise ZsuError(f"unknown method {method!r}", where="forget", remedy=f"use one of {', '.join(METHODS)}")
    noisy = ("paths", "lra-npp", "head-npp", "random")
    if options.noise["perturbation"] != "zero" and method not in noisy:
        raise ZsuError(f"{method!r} adds no noise", where="forget", remedy="leave perturbation at 'zero'")
    for name, users in {"k": noisy, "perturbed": ("lra-npp", "head-npp"), "layers": ("lra-npp", "random")}.items():
        value = getattr(options, name)
        if value is not None and method not in users:
            raise ZsuError(f"{method!r} takes no {name}", where="forget", remedy=f"use one of {', '.join(users)}")
    for name in ("k", "perturbed"):
        value = getattr(options, name)
        if value is not None:
            check_count(name, value, "forget")
    if options.perturbed is not None and options.k is None:
        raise ZsuError("perturbed without k", where="forget", remedy="give both")
    retained = options.retained
    if retained is None and TIERS[method] in ("T3", "T4"):
        remedy = "pass retained=, a data set of the other classes"
        raise ZsuError(f"{method!r} needs retained samples ({TIERS[method]})", where="forget", remedy=remedy)
    if retained is not None and method != "paths" and TIERS[method] not in ("T3", "T4"):
        remedy = "leave retained out, or use 'paths', which then is of tier T3"
        raise ZsuError(f"{method!r} is of tier {TIERS[method]}: no retained data", where="forget", remedy=remedy)
    if retained is not None and np.isin(targets(retained).numpy(), forgotten).any():
        raise ZsuError(
            f"the retained data holds the class to forget: {histogram(retained)}",
            where="forget",
            remedy=f"leave out {', '.join(classes(retained)[c] for c in forgotten)}",
        )


def check_retained(model: nn.Module, retained: Dataset | None) -> None:
    """Refuse retained data that the model does not fit, by one image of it."""
    if retained is None:
        return
    remedy = "pass images as the model was trained on"
    if len(retained) == 0:
        raise ZsuError("the retained data is empty", where="forget", remedy=remedy)
    like = next(model.parameters())
    x, _ = next(batches(retained, 1))
    try:
        with torch.no_grad():
            outputs = model(x.to(like.device, like.dtype)).shape[1]
    except RuntimeError as error:
        what = f"the model refuses retained images {tuple(x.shape)}: {error}"
        raise ZsuError(what, where="forget", remedy=remedy) from error
    if int(targets(retained).max()) >= outputs:
        what = f"the retained data has label {int(targets(retained).max())}, the model {outputs} classes"
        raise ZsuError(what, where="forget", remedy=remedy)


@torch.no_grad()
def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, in batches of 100."""
    check_model(model)
    check_input(model, x)
    logits = torch.cat([forward(model, part) for part in x.split(100)])
    check_logits(model, logits)
    return logits


def recognised(logits: Tensor, target: int) -> int:
    """Number of samples that the model does not take for the class; `ZsuError` where that is all of them."""
    output_weights(logits, target)  # refuses a target that is no class
    n = len(logits)
    wrong = int((logits.argmax(1) != target).sum())
    if wrong == n:
        raise ZsuError(
            f"the model takes none of the {n} samples for class {target}",
            where="forget",
            remedy="pass samples of the class that is named; what a model cannot predict it cannot forget",
        )
    if 2 * wrong > n:
        warn(f"the model does not take {wrong} of {n} samples for class {target}")
    if n < FEW:
        warn(f"{n} samples are few: what is found need not hold for the class")
    return wrong


def train_all(peer: Callable, model: nn.Module, x: Tensor, target: int, retained: Dataset | None, seed: int) -> None:
    """A method of `zsu.peers`, for which frozen parameters are trained too."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
    peer(model, x, target, retained, seed)
    for p in frozen:
        p.requires_grad_(False)


def samples_hash(samples: list[Tensor]) -> str:
    """sha256 over the bytes of the samples, as float32."""
    digest = hashlib.sha256()
    for x in samples:
        digest.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def edit(
    model: nn.Module, x: Tensor, target: int, relevance: Relevance, method: str, options: Options
) -> tuple[str, pd.DataFrame]:
    """Edit the model in place; (what the budget was, what was cut)."""
    if method == "paths":
        return cut_paths(model, x, target, relevance, options)
    if method in ("lra-npp", "random"):
        return cut_neurons(model, x, target, relevance, options, method == "random")
    if method == "head-npp":
        return cut_columns(model, x, relevance, options)
    if method in ("mask", "bias-shift"):
        return "", mask(model, x, relevance, target, row=method == "mask")
    return "", nothing()  # "zeroed"


def nothing() -> pd.DataFrame:
    """A `Forgotten.cut` without rows."""
    return pd.DataFrame({"layer": [], "channel": [], "source": []}, dtype=object)


# --- paths ----------------------------------------------------------------------------------------------------


def cut_paths(
    model: nn.Module, x: Tensor, target: int, relevance: Relevance, options: Options
) -> tuple[str, pd.DataFrame]:
    """Cut class-specific edges, move the head so that the evidence goes where it is wanted, lower the class's bias."""
    wanted = wanted_outputs(model, x, target, relevance, options.retained)
    seen = torch.cat([x, disturbed(x, options.seed)])
    budget, cut = cut_edges(model, x, seen, target, relevance, options)
    head = relevance.head
    if head is None or head.kind != "linear" or not head.weight or not gives_logits(model, head.weight, x):
        p = worst(model, seen, target)
        if p > 1 / relevance.logits.shape[1]:
            warn(f"{budget}: the class keeps a probability of up to {p:.2f} on the samples")
        return budget, cut
    receiving = reroute(model, module_of(head.weight), x, wanted, target, options.retained)
    lowered = lower_bias(model, seen, target, module_of(head.weight) + ".bias")
    if not lowered.empty:
        cut = pd.concat([cut, lowered], ignore_index=True)
    return f"{budget}; rerouted to {receiving}; {len(lowered)} bias lowered", cut


@torch.no_grad()
def gives_logits(model: nn.Module, weight: str, x: Tensor) -> bool:
    """Whether the layer is a Linear on inputs (N, J) whose outputs are the logits as they are."""
    layer = model.get_submodule(module_of(weight))
    h = entering_inputs(model, x, module_of(weight)) if isinstance(layer, nn.Linear) else None  # None too if not called
    return h is not None and h.dim() == 2 and torch.allclose(layer(h), model(x), rtol=1e-3, atol=1e-3)


def disturbed(x: Tensor, seed: int) -> Tensor:
    """x with Gaussian noise of `NOISE` standard deviations."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return x + NOISE * x.float().std(correction=0).to(x) * noise


@torch.no_grad()
def worst(model: nn.Module, x: Tensor, target: int) -> float:
    """Largest probability of the class on the samples."""
    return float(model(x).float().softmax(1)[:, target].max())


def cut_edges(
    model: nn.Module, x: Tensor, seen: Tensor, target: int, relevance: Relevance, options: Options
) -> tuple[str, pd.DataFrame]:
    """Cut the fewest class-specific edges, in the order of their most probable path, that bring the class to chance on
    what is seen; where all of them do not, the fewest that come as far.

    Flows are those of the z+ rule from a relevance of 1 at each logit, so that every class counts alike, whatever the
    size and sign of its logit.
    """
    one = torch.zeros_like(relevance.logits)
    one[:, target] = 1
    own, others = explain_each(model, x, [one, 1 - one], "z+")
    edges = specific_edges(own, others)
    if edges.empty:
        raise ZsuError("no edge serves this class more than the others", where="forget", remedy="use another method")
    blocks = list(weight_blocks(model, own, edges))
    edges = edges.head(options.k or affordable(model, len(edges), blocks))

    def patch(n: int) -> Patch:
        return perturb(model, joined((name, flat[rank < n]) for name, rank, flat in blocks), **options.noise)

    def left(n: int) -> float:
        """The largest probability of the class when n edges are cut."""
        trial = patch(n)
        trial.apply(model)
        try:
            return worst(model, seen, target)
        finally:
            trial.revert(model)

    low, high = 0, len(edges)  # cutting `low` edges is too little, cutting `high` is enough
    chance = 1 / relevance.logits.shape[1]
    goal = max(chance, left(high) + AS_GOOD)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= goal else (middle, high)
    patch(high).apply(model)
    alone = "" if goal == chance else " (not enough alone)"
    return f"{high} of {len(edges)} edges{alone}", edges.loc[: high - 1, ["layer", "channel", "source"]]


def affordable(model: nn.Module, edges: int, blocks: list) -> int:
    """How many edges, in their order, have at most a share of `MOST` of the model's weights; at least one."""
    weights = np.zeros(edges)
    for _, rank, flat in blocks:
        weights[rank.numpy()] = flat.shape[1]
    return max(1, int((weights.cumsum() <= MOST * sum(p.numel() for p in model.parameters())).sum()))


@torch.no_grad()
def lower_bias(model: nn.Module, x: Tensor, target: int, name: str) -> pd.DataFrame:
    """Lower the class's bias by the least that makes its probability at most `GONE` on x; what was lowered.

    Some classes are told by the lack of evidence for the others; then the bias alone decides for them.
    """
    bias = dict(model.named_parameters()).get(name)
    if bias is None:
        warn(f"the head has no bias: probability up to {worst(model, x, target):.2f} is left")
        return nothing()
    logits = model(x).double()
    others = logits.clone()
    others[:, target] = -torch.inf
    allowed = others.logsumexp(1) + math.log(GONE / (1 - GONE))  # the logit with probability GONE
    excess = float((logits[:, target] - allowed).max())
    bias[target] -= max(0.0, excess)
    return pd.DataFrame({"layer": [name], "channel": [target], "source": pd.NA}).head(int(excess > 0))


def specific_edges(own: Relevance, others: Relevance) -> pd.DataFrame:
    """Edges with weights that carry more of this class's flow than of all other classes' together, best path first.

    Columns: rank, node (number of the source), number and name (`layer`) of the target's layer, number of the
    source's layer (`below`), channel and source (the ends within their layers).
    """
    graph = build_graph(own)
    n_others = own.logits.shape[1] - 1
    specific = np.flatnonzero(graph.flow() > n_others * build_graph(others).flow())
    score = best_through(graph)[specific]
    specific = specific[np.argsort(-score, kind="stable")]
    target, node = graph.ends(specific)
    number, below = (np.searchsorted(graph.first, ends, side="right") - 1 for ends in (target, node))
    frame = pd.DataFrame({"node": node, "number": number, "below": below})
    frame = frame.assign(channel=target - graph.first[number], source=node - graph.first[below])
    weighted = np.array([bool(n.weight) for n in own.layers] + [False])[number]
    frame = frame[weighted].reset_index(drop=True)
    return frame.assign(rank=frame.index, layer=np.array([*graph.layers])[frame["number"]])


# --- neurons --------------------------------------------------------------------------------------------------


def cut_neurons(
    model: nn.Module, x: Tensor, target: int, relevance: Relevance, options: Options, random: bool
) -> tuple[str, pd.DataFrame]:
    """lra-npp: in each weighted layer below the logits perturb the neurons most often among a sample's k most relevant.

    Without a k: the smallest share of each layer, in steps of 2 %, for which no sample is taken for the class any more;
    where none does it, the one that leaves the fewest. With `random`, as many neurons of each layer, whichever.
    """
    nodes = chosen_layers(relevance, options.layers)

    def patch(neurons: dict[str, Tensor]) -> Patch:
        return perturb(model, incoming_weights(model, relevance, neurons), **options.noise)

    def most_frequent(sizes: dict[str, int]) -> dict[str, Tensor]:
        return {n.name: best(frequency(n, sizes[n.name]), options.perturbed or sizes[n.name]) for n in nodes}

    if options.k is not None:
        for node in nodes:
            check_k(node, max(options.k, options.perturbed or 0))
        budget, neurons = f"k = {options.k}", most_frequent({n.name: options.k for n in nodes})
    else:
        budget, neurons = least_share(model, x, target, nodes, most_frequent, patch, quiet=random)
    if random:
        budget = f"as many as lra-npp: {budget}"
        generator = torch.Generator().manual_seed(options.seed)
        for node in nodes:
            order = torch.randperm(node.relevance.shape[1], generator=generator)
            neurons[node.name] = order[: len(neurons[node.name])]
    patch(neurons).apply(model)
    return budget, listed(neurons)


def chosen_layers(relevance: Relevance, layers: Sequence[str] | None) -> list[Node]:
    """The hidden layers with weights, or those of them that are named."""
    nodes = hidden_layers(relevance)
    if layers is None:
        return nodes
    layers = [layers] if isinstance(layers, str) else layers
    unknown = [name for name in layers if name not in {n.name for n in nodes}]
    if unknown or not layers:
        remedy = f"use some of {', '.join(n.name for n in nodes)}"
        raise ZsuError(f"no hidden layer with weights is called {unknown}", where="forget", remedy=remedy)
    return [n for n in nodes if n.name in layers]


@torch.no_grad()
def least_share(
    model: nn.Module, x: Tensor, target: int, nodes: list[Node], most_frequent: Callable, patch: Callable, quiet: bool
) -> tuple[str, dict[str, Tensor]]:
    """The budget of `cut_neurons` without a k, and its neurons."""
    fewest = len(x) + 1
    for percent in range(2, 101, 2):
        neurons = most_frequent({n.name: max(1, round(percent * n.relevance.shape[1] / 100)) for n in nodes})
        trial = patch(neurons)
        trial.apply(model)
        left = int((model(x).argmax(1) == target).sum())
        trial.revert(model)
        if left < fewest:
            fewest, budget, found = left, f"{percent} % of each layer", neurons
        if left == 0:
            return budget, found
    if not quiet:
        warn(f"{budget}: {fewest} of {len(x)} samples are still taken for the class")
    return f"{budget}, {fewest} of {len(x)} samples left", found


def listed(neurons: dict[str, Tensor]) -> pd.DataFrame:
    """One row a neuron, as in `Forgotten.cut`."""
    frames = (pd.DataFrame({"layer": name, "channel": n.numpy(), "source": pd.NA}) for name, n in neurons.items())
    return pd.concat(frames, ignore_index=True)


def cut_columns(model: nn.Module, x: Tensor, relevance: Relevance, options: Options) -> tuple[str, pd.DataFrame]:
    """head-npp: columns of the head that belong to the neurons most often relevant for the predicted class."""
    of_predicted = explain(model, x, relevance.logits.argmax(1), "epsilon")
    head = of_predicted.layers[-1]
    if head.kind != "linear" or not head.weight or not head.sources[0] or len(head.sources[0]) > 1:
        raise ZsuError("not a Linear on one layer's output", where=head.name, remedy="use another method")
    (source,) = head.sources[0]
    below = of_predicted.layers[source.layer]
    k = options.k or a_tenth(below)
    number = options.perturbed or 2 * k
    check_k(below, max(k, options.perturbed or 0))
    neurons = best(frequency(below, k), number)
    rows, columns = model.get_parameter(head.weight).shape
    column = (neurons[:, None] * source.group + torch.arange(source.group)).flatten()  # (n, group) -> (n group,)
    flat = (torch.arange(rows)[:, None] * columns + column).flatten()  # (rows, n group) -> flat indices
    perturb(model, {head.weight: flat}, **options.noise).apply(model)
    cut = pd.DataFrame({"layer": below.name, "channel": neurons.numpy(), "source": pd.NA})
    return f"k = {k}, {len(neurons)} neurons", cut


# --- the mask -------------------------------------------------------------------------------------------------


@torch.no_grad()
def mask(model: nn.Module, x: Tensor, relevance: Relevance, target: int, row: bool) -> pd.DataFrame:
    """The class's bias becomes a constant far below every logit, and with `row` its row of the head 0.

    Checked on x: the class is gone, and the other logits are what they were.
    """
    head = relevance.layers[-1]
    held = dict(model.named_parameters())
    bias = module_of(head.weight) + ".bias" if head.weight else None
    if head.kind != "linear" or bias not in held:
        raise ZsuError("the last layer is not a Linear with bias", where=head.name, remedy="use another method")
    others = torch.arange(relevance.logits.shape[1], device=x.device) != target
    if target < len(held[bias]):
        if row:
            held[head.weight][target] = 0
        held[bias][target] = MASKED_LOGIT
    after = model(x)
    same = torch.allclose(after[:, others], relevance.logits[:, others], rtol=1e-3, atol=1e-3)
    if not same or after.float().softmax(1)[:, target].max() > 1e-6:
        what = "the outputs of the last layer are not the logits in their order"
        raise ZsuError(what, where=head.name, remedy="use another method")
    return pd.DataFrame({"layer": [head.name], "channel": [target], "source": pd.NA})
