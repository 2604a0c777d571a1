"""forget(): remove one class from a trained classifier, from a few unseen samples of it."""

from __future__ import annotations

import copy
import math
import time
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .errors import ZsuError
from .graph import build_graph
from .paths import best_through
from .perturb import Change, Patch, model_hash, perturb
from .relevance import Relevance, explain
from .selection import a_tenth, best, check_k, frequency, incoming_weights, joined, select_neurons, weight_blocks

METHODS = ("paths", "lra-npp", "head-npp", "mask", "random")
MASKED_LOGIT = -1e4  # small enough for probability 0 in float16, float32 and float64


class Forgotten(NamedTuple):
    """What `forget` returns.

    Attributes
    ----------
    model : nn.Module
        The edited copy.
    patch : Patch
        The edit; ``patch.revert(model)`` gives the original back bit for bit.
    cut : pandas.DataFrame
        What was perturbed, one row each: layer, channel, source (the source channel of a cut edge; <NA> where the
        whole neuron was perturbed, and where the layer is the name of a bias that was lowered).
    """

    model: nn.Module
    patch: Patch
    cut: pd.DataFrame


def forget(
    model: nn.Module,
    x: Tensor,
    target: int,
    method: str = "paths",
    perturbation: str = "zero",
    *,
    k: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Forgotten:
    """Make a copy of the model forget a class, from a few samples of it that it was not trained on.

    Parameters
    ----------
    model : nn.Module
        Classifier in eval mode with logits (N, classes) as output; it is not changed.
    x : Tensor (N, C, H, W)
        Samples of the class, of the dtype and on the device of the model.
    target : int
        Index of the class to forget.
    method : str
        * ``"paths"``: cut edges of the most probable paths, those that serve this class more than all others
          together, in the order of their most probable path, as few as bring the class to chance on
          every sample; where all of them are not enough, the class's bias is lowered by what is missing.
        * ``"lra-npp"``: in every weighted layer but the last, perturb the incoming weights of the neurons that are
          most often among a sample's k most relevant (Chang et al. 2024, as described in the paper).
        * ``"head-npp"``: the same at the input of the last layer only, for the *predicted* class; the 2 k most
          frequent neurons lose their columns of the head (what the authors' public code does for ResNets).
        * ``"mask"``: control; the class's logit becomes a constant far below all others.
        * ``"random"``: control; as many random neurons per layer as ``"lra-npp"`` takes.
    perturbation : {"zero", "gaussian", "laplace"}
        See `zsu.perturb.perturb`; ``"mask"`` knows only zero.
    k : int, optional
        ``"paths"``: cut at most that many edges (default 10,000). Else: neurons per sample and layer (default a
        tenth of the layer).
    scale : float
        Of the noise, in standard deviations of the weight tensor.
    seed : int
        Of the noise and of the random control.

    Returns
    -------
    Forgotten

    Raises
    ------
    ZsuError
        Unknown method or perturbation, k < 1 or more neurons than a layer has, target no integer, and what
        `explain` refuses.

    Warns
    -----
    UserWarning
        The model recognises none of the samples as the class; the edit changes no weight; or ``"paths"`` did not
        reach chance.
    """
    if method not in METHODS:
        raise ZsuError(f"unknown method {method!r}", where="forget", remedy=f"use one of {', '.join(METHODS)}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1):
        raise ZsuError(f"k is {k!r}", where="forget", remedy="use an integer of at least 1")
    if method == "mask" and perturbation != "zero":
        raise ZsuError("the mask adds no noise", where="forget", remedy="leave perturbation at 'zero'")
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)):
        raise ZsuError(f"target is {target!r}", where="forget", remedy="pass the index of one class")
    started = time.perf_counter()
    relevance = explain(model, x, target)
    if not (relevance.logits.argmax(1) == target).any():
        warnings.warn(f"the model takes none of the {len(x)} samples for class {target}", stacklevel=2)
    noise = {"perturbation": perturbation, "scale": scale, "seed": seed}
    if method == "paths":
        patch, cut = cut_paths(model, x, target, relevance, k or 10_000, noise)
    elif method == "mask":
        patch, cut = mask(model, relevance, target)
    else:
        neurons = {"lra-npp": frequent_neurons, "random": random_neurons, "head-npp": head_neurons}[method]
        cut, selection = neurons(model, x, relevance, k, seed)
        patch = perturb(model, selection, **noise)
    if patch.weights_changed == 0:
        warnings.warn("the edit has no effect: no weight changes", stacklevel=2)
    edited = patch.apply(copy.deepcopy(model))
    patch.metadata |= {
        "target": str(target),
        "method": method,
        "samples": str(len(x)),
        "seed": str(seed),
        "seconds": f"{time.perf_counter() - started:.4f}",
        "parent": model_hash(model),
        "torch": torch.__version__,
    }
    return Forgotten(edited, patch, cut)


# --- paths ----------------------------------------------------------------------------------------------------


def cut_paths(
    model: nn.Module, x: Tensor, target: int, relevance: Relevance, k: int, noise: dict
) -> tuple[Patch, pd.DataFrame]:
    """The fewest class-specific edges, in the order of their most probable path, that bring the class to chance on x.

    Flows are those of the z+ rule from a relevance of 1 at each logit, so that every class counts alike, whatever the
    size and sign of its logit.
    """
    one = torch.zeros_like(relevance.logits)
    one[:, target] = 1
    own, others = (explain(model, x, seed, "z+") for seed in (one, 1 - one))
    edges = specific_edges(own, others).head(k)
    if edges.empty:
        raise ZsuError("no edge serves this class more than the others", where="forget", remedy="use another method")
    blocks = list(weight_blocks(model, relevance, edges))
    chance = 1 / relevance.logits.shape[1]
    trial = copy.deepcopy(model)

    def worst(n: int) -> tuple[float, Patch]:
        """Largest probability of the class on the samples when the first n edges are cut."""
        patch = perturb(model, joined((name, flat[rank < n]) for name, rank, flat in blocks), **noise)
        patch.apply(trial)
        with torch.no_grad():
            p = float(trial(x).softmax(1)[:, target].max())
        patch.revert(trial)
        return p, patch

    low, high = 0, len(edges)  # cutting `low` edges is too little, cutting `high` is enough
    p, patch = worst(high)
    if p > chance:
        return lower_bias(model, x, target, relevance, patch, edges[["layer", "channel", "source"]])
    while high - low > 1:
        middle = (low + high) // 2
        p, fewer = worst(middle)
        if p > chance:
            low = middle
        else:
            high, patch = middle, fewer
    return patch, edges.loc[: high - 1, ["layer", "channel", "source"]]


def lower_bias(
    model: nn.Module, x: Tensor, target: int, relevance: Relevance, patch: Patch, cut: pd.DataFrame
) -> tuple[Patch, pd.DataFrame]:
    """After all class-specific edges are cut: lower the class's bias by the least that brings it to chance on x.

    Some classes are told by the lack of evidence for the others; then the bias alone decides for them.
    """
    head = relevance.layers[-1]
    bias = head.weight.removesuffix("weight") + "bias" if head.weight else ""
    parameters = dict(model.named_parameters())
    if head.kind != "linear" or bias not in parameters:
        warnings.warn(
            f"cutting all of {len(cut)} edges does not bring the class to chance on the samples", stacklevel=4
        )
        return patch, cut
    with torch.no_grad():
        logits = patch.apply(copy.deepcopy(model))(x).double()
    others = logits.clone()
    others[:, target] = -torch.inf
    allowed = others.logsumexp(1) - math.log(logits.shape[1] - 1)  # the logit with probability 1 / classes
    old = parameters[bias].detach()[target : target + 1].cpu()
    new = (old.double() - float((logits[:, target] - allowed).max()) - 1e-3).to(old.dtype)  # 1e-3: rounding
    patch.changes[bias] = Change(torch.tensor([target]), old, new)
    lowered = pd.DataFrame({"layer": [bias], "channel": [target], "source": pd.NA})
    return patch, pd.concat([cut, lowered], ignore_index=True)


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


def frequent_neurons(model: nn.Module, x: Tensor, relevance: Relevance, k: int | None, seed: int):
    """lra-npp: in each weighted layer below the logits the neurons most often among a sample's k most relevant."""
    neurons = select_neurons(relevance, "frequency", k)
    return listed(neurons), incoming_weights(model, relevance, neurons)


def random_neurons(model: nn.Module, x: Tensor, relevance: Relevance, k: int | None, seed: int):
    """Control: as many random neurons in each layer."""
    generator = torch.Generator().manual_seed(seed)
    neurons = {
        name: torch.randperm(relevance.nodes[name].shape[1], generator=generator)[: len(chosen)]
        for name, chosen in select_neurons(relevance, "frequency", k).items()
    }
    return listed(neurons), incoming_weights(model, relevance, neurons)


def listed(neurons: dict[str, Tensor]) -> pd.DataFrame:
    """One row a neuron, as in `Forgotten.cut`."""
    frames = (pd.DataFrame({"layer": name, "channel": n.numpy(), "source": pd.NA}) for name, n in neurons.items())
    return pd.concat(frames, ignore_index=True)


def head_neurons(model: nn.Module, x: Tensor, relevance: Relevance, k: int | None, seed: int):
    """head-npp: columns of the head that belong to the 2 k neurons most often relevant for the predicted class."""
    predicted = explain(model, x, relevance.logits.argmax(1), "epsilon")
    head = predicted.layers[-1]
    if head.kind != "linear" or not head.weight or not head.sources[0] or len(head.sources[0]) > 1:
        raise ZsuError("not a Linear on one layer's output", where=head.name, remedy="use another method")
    (source,) = head.sources[0]
    below = predicted.layers[source.node]
    k = a_tenth(below) if k is None else k
    check_k(below, k)
    neurons = best(frequency(below, k), 2 * k)
    rows, columns = model.get_parameter(head.weight).shape
    column = (neurons[:, None] * source.group + torch.arange(source.group)).flatten()  # (n, group) -> (n group,)
    flat = (torch.arange(rows)[:, None] * columns + column).flatten()  # (rows, n group) -> flat indices
    cut = pd.DataFrame({"layer": below.name, "channel": neurons.numpy(), "source": pd.NA})
    return cut, {head.weight: flat}


# --- the mask -------------------------------------------------------------------------------------------------


def mask(model: nn.Module, relevance: Relevance, target: int) -> tuple[Patch, pd.DataFrame]:
    """The class's row of the head becomes 0 and its bias a constant far below every logit."""
    head = relevance.layers[-1]
    parameters = dict(model.named_parameters())
    bias = head.weight.removesuffix("weight") + "bias" if head.weight else None
    if head.kind != "linear" or bias not in parameters:
        raise ZsuError("the last layer is not a Linear with bias", where=head.name, remedy="use another method")
    width = parameters[head.weight].shape[1]
    patch = perturb(model, {head.weight: target * width + torch.arange(width), bias: torch.tensor([target])})
    change = patch.changes[bias]
    patch.changes[bias] = Change(change.index, change.old, torch.full_like(change.old, MASKED_LOGIT))
    return patch, pd.DataFrame({"layer": [head.name], "channel": [target], "source": pd.NA})
