"""Relevance -> PathGraph: the layered graph of channels that relevance flows through, as a Markov chain.

The positive relevance of the edges, normalised over the sources j of each target k, is a chain that walks from the
logit down to the input:  p(j|k) = max(R[k, j], 0) / sum_j max(R[k, j], 0).  Edges with negative relevance are not
walked, and neither are channels from which no positive edge leads on to the input. What bias, stabiliser and constants
kept goes no further, so it is in no path either. `PathGraph.ledger` says how much each of these is.

Nodes are the channels of the input, of weighted layers, of norms, and of additions, where branch and skip meet: an
addition has one edge to each summand's same channel. What only moves channels (concatenations, slices, permutations,
reshapes, padding) has no nodes; who reads it sees the channels where they come from, and nothing in padding. Attention,
its weights held constant, mixes positions only, so channels of the output projection see channels of the values; a
LayerNorm mixes channels by its mean.

All edges lie in one flat array. The sources of a node are a few *runs*: a stretch of that array whose m-th value
belongs to node `source + m`. A convolution row is one run, over a concatenation one for each layer, with 0 for channels
that were left out; an addition has one of length 1 for each summand. No array of source indices is stored. Two edges
from a node to the same source are one, so that a path is known by the set of its nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from ..errors import ZsuError
from ..relevance.channels import NOTHING
from ..relevance.checks import check_channel
from ..relevance.layers import Share
from ..relevance.result import SHARES, Relevance
from ..relevance.sums import on_host
from .compiled import Chain, marginals, normalise


class Edges(NamedTuple):
    """Of a layer: edges (K,) and sources (K,) by summand where each channel sees one channel of each, else edges
    (K, J / groups) and sources (groups, J / groups); none of the input.
    """

    values: list
    sources: list[np.ndarray]


Run = tuple[np.ndarray, np.ndarray, np.ndarray]  # edges (k, length), their targets (k,), the first source of each (k,)


@dataclass(eq=False)
class PathGraph:
    """Nodes are numbered from the input channels up to the logits; the last node, `start`, stands above the logits.

    Attributes
    ----------
    layers : list of str
        Names of the layers, input first.
    first : int64 array (layers + 1,)
        Number of each layer's first node; the last entry is `start`.
    weight : float32 or float64 array (edges,), as the relevance was
        Relevance of the edge where it is positive and leads on to the input, else 0.
    total : float64 array (nodes,)
        Sum of the weights to a node's sources: p(j|k) = weight / total[k]. 0 where nothing leads on.
    run_of, run_begin, run_length, run_source : int64 arrays
        Node k owns the runs run_of[k] to run_of[k + 1]; see the module's docstring.
    ledger : DataFrame
        By layer, relevance summed over samples: ``walked`` by paths, on edges to channels that are a ``dead end``,
        ``negative``, and ``kept`` by bias, stabiliser and constants.
    """

    layers: list[str]
    first: np.ndarray
    weight: np.ndarray
    total: np.ndarray
    run_of: np.ndarray
    run_begin: np.ndarray
    run_length: np.ndarray
    run_source: np.ndarray
    ledger: pd.DataFrame

    def __repr__(self) -> str:
        return f"PathGraph({len(self.layers)} layers, {self.start:,} channels, {len(self.weight):,} edges)"

    @property
    def start(self) -> int:
        return int(self.first[-1])

    @property
    def chain(self) -> Chain:
        """What the compiled functions take."""
        return Chain(self.weight, self.total, self.run_of, self.run_begin, self.run_length, self.run_source)

    def number(self, layer: str, channel: int) -> int:
        """The node of a layer's channel; `ZsuError` where there is none."""
        if layer not in self.layers:
            raise ZsuError(f"no layer is called {layer!r}", where="PathGraph", remedy=f"use one of {self.layers}")
        n = self.layers.index(layer)
        check_channel(layer, channel, int(self.first[n + 1] - self.first[n]))
        return int(self.first[n]) + int(channel)

    def visits(self) -> np.ndarray:
        """float64 (nodes,): share of all paths that lead through each node; the last is `start`, with 1."""
        return marginals(self.chain)[0]

    def flow(self) -> np.ndarray:
        """float64 (edges,): share of all paths that use each edge."""
        return marginals(self.chain)[1]

    def visits_by_layer(self) -> dict[str, np.ndarray]:
        """`visits` (channels,) by the name of the layer."""
        parts = np.split(self.visits()[: self.start], self.first[1:-1])
        return dict(zip(self.layers, parts, strict=True))

    def ends(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(targets, sources): the nodes at the ends of edges, given by their positions in the flat array."""
        order = np.argsort(self.run_begin)
        run = order[np.searchsorted(self.run_begin[order], edges, side="right") - 1]
        target = np.searchsorted(self.run_of, run, side="right") - 1
        return target, self.run_source[run] + edges - self.run_begin[run]


def build_graph(relevance: Relevance) -> PathGraph:
    """The Markov chain of positive relevance; see the module's docstring.

    Raises
    ------
    ZsuError
        Edges were not computed, an operation hides where its channels come from, edges are not finite, or no
        positive relevance leads from the logit to the input.
    """
    layers = relevance.layers
    sizes = [layer.relevance.shape[1] for layer in layers]
    first = np.concatenate([[0], np.cumsum(sizes)])
    blocks, values, size = [], [], 0
    summed = fetch(map(reduced, layers))
    for number, layer in enumerate(summed):
        for edges, targets, sources in runs_of(layer, first):
            k, length = edges.shape
            begin = size + np.arange(k) * length
            blocks.append((first[number] + targets, begin, np.full(k, length), sources))
            values.append(edges.ravel())  # (k, length) -> (k * length,)
            size += edges.size
    top = layers[-1]
    if top is not relevance.head:
        what, remedy = "the last layer does not compute the logits", "end the model in a layer"
        if len(relevance.tops) > 1:
            what = f"{len(relevance.tops)} layers, or calls of one, compute the logits"
            remedy = "end the model in one layer that takes the whole batch"
        raise ZsuError(what, where=top.name, remedy=remedy)
    seed = top.relevance.sum(0).cpu().numpy()  # (classes,): the walk starts at the logits explained
    start = [first[-1]], [size], [len(seed)], [first[-2]]
    kept = np.reshape(on_host([getattr(layer, share) for layer in layers for share in SHARES[1:]]), (len(layers), -1))
    kept = kept.sum(1) + [to_nothing(layer) for layer in summed]
    value = np.concatenate([*values, seed])
    return assemble([layer.name for layer in layers], first, value, [*blocks, start], kept)


def assemble(
    layers: list[str], first: np.ndarray, value: np.ndarray, blocks: Iterable[tuple], kept: Sequence[float]
) -> PathGraph:
    """A graph from the relevance of its edges and blocks of runs (targets, begins, lengths, sources); uses up `value`.

    Raises
    ------
    ZsuError
        As `build_graph`; and a run of sources that is not below its target: a cycle.
    """
    target, begin, length, source = (np.concatenate(c).astype(np.int64) for c in zip(*blocks, strict=True))
    layer_of = np.searchsorted(first, target, side="right") - 1
    if (source + length > first[layer_of]).any():
        raise ZsuError("a layer has a source that is not below it", where="PathGraph", remedy="take out the cycle")
    order = np.argsort(target, kind="stable")
    run_of = np.searchsorted(target[order], np.arange(first[-1] + 2))
    runs = run_of, begin[order], length[order], source[order]
    total, dead, negative = normalise(value, *runs, first[1])
    sums = {"walked": total, "dead end": dead, "negative": negative}
    by_layer = {name: np.add.reduceat(of_node[:-1], first[1:-1]) for name, of_node in sums.items()}
    ledger = pd.DataFrame({"layer": layers[1:], **by_layer, "kept": kept[1:]})
    if not np.isfinite(total + dead + negative).all():
        what, remedy = "relevance of an edge is not finite", "check the explanation's ledger"
        raise ZsuError(what, where="find_paths", remedy=remedy)
    if not total[-1] > 0:
        remedy = "explain samples with a positive logit, or hand a positive seed (N, classes) to explain"
        what = "no positive relevance leads from the logit to the input"
        raise ZsuError(what, where="find_paths", remedy=remedy)
    return PathGraph(layers, first, value, total, *runs, ledger[::-1].reset_index(drop=True))


def contrast(graph: PathGraph, reference: PathGraph) -> PathGraph:
    """What of the flow goes beyond that of a reference: the chain of max(flow - reference flow, 0).

    The reference is an explanation of the same model: of other images, or of another class on the same ones.
    """
    same = graph.layers == reference.layers and np.array_equal(graph.first, reference.first)
    if not (same and np.array_equal(graph.run_begin, reference.run_begin)):
        raise ZsuError("the graphs are of different models", where="contrast", remedy="explain the same model twice")
    owner = np.repeat(np.arange(len(graph.run_of) - 1), np.diff(graph.run_of))
    runs = owner, graph.run_begin, graph.run_length, graph.run_source
    nothing = [0.0] * len(graph.layers)
    return assemble(graph.layers, graph.first, graph.flow() - reference.flow(), [runs], nothing)


def reduced(layer: Share) -> Edges:
    """The edges of a layer and their sources, after a check; those to positions of one channel are summed on the device
    where they follow each other, as behind a flatten.
    """
    if layer.kind == "input":
        return Edges([], [])
    if any(sources is None for sources in layer.sources):
        what = "an operation before this layer mixes or rearranges channels, so its sources are unknown"
        remedy = "paths follow what gives each channel of a layer one channel at all positions, and attention with "
        raise ZsuError(what, where=layer.name, remedy=remedy + "attention='cp-lrp'; or use a method without paths")
    if not layer.edges:
        raise ZsuError("edges were not computed", where=layer.name, remedy="call explain(..., edges=True)")
    if layer.kind == "add" or layer.groups == 0:  # an addition, or a BatchNorm of its own
        return Edges([e.flatten() for e in layer.edges], layer.sources)  # (K,) or (K, 1) -> (K,)
    edges, sources = layer.edges[0], layer.sources[0]
    begin = np.flatnonzero(np.diff(sources, prepend=NOTHING - 1))  # of the stretches with one source
    length = np.diff(begin, append=len(sources))
    if layer.groups == 1 and length[0] > 1 and (length == length[0]).all():
        edges, sources = edges.unflatten(1, (-1, int(length[0]))).sum(2), sources[begin]  # (K, C P) -> (K, C)
    return Edges([edges], [sources.reshape(layer.groups, -1)])  # (J,) -> (groups, J / groups)


def fetch(layers: Iterable[Edges]) -> list[Edges]:
    """The same with the edges on the host: all of them are on their way before anybody waits."""
    there = list(layers)
    arrived = [[on_its_way(t) for t in layer.values] for layer in there]
    if any(t.is_cuda for layer in there for t in layer.values):
        torch.cuda.current_stream().synchronize()
    return [layer._replace(values=[t.numpy() for t in own]) for layer, own in zip(there, arrived, strict=True)]


def on_its_way(t: torch.Tensor) -> torch.Tensor:
    """On the host, from a card as soon as its stream has been waited for."""
    if not t.is_cuda:
        return t.cpu()
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)


def runs_of(layer: Edges, first: np.ndarray) -> list[Run]:
    """The runs of a layer's channels; edges to one source are summed."""
    if not layer.values:
        return []
    if layer.values[0].ndim == 1:
        return one_to_one(layer.values, layer.sources)
    return in_groups(layer.values[0], layer.sources[0], first)


def one_to_one(edges: list[np.ndarray], sources: list[np.ndarray]) -> list[Run]:
    """Each channel sees one source in each summand, from edges (K,) and sources (K,) by summand."""
    runs = []
    for n, (own, source) in enumerate(zip(edges, sources, strict=True)):
        seen = [other == source for other in sources[:n]]  # in a summand before
        targets = np.flatnonzero(~np.any([source < 0, *seen], 0))
        again = [np.where(other == source, e, 0) for e, other in zip(edges[n + 1 :], sources[n + 1 :], strict=True)]
        runs.append((sum(again, own)[targets, None], targets, source[targets]))
    return runs


def in_groups(edges: np.ndarray, sources: np.ndarray, first: np.ndarray) -> list[Run]:
    """Each channel sees all sources of its group, from edges (K, J / groups) and sources (groups, J / groups)."""
    per_group = len(edges) // len(sources)  # channels
    layer = np.searchsorted(first, sources[:, [0, -1]], side="right")  # of a group's first and last source
    follow = (np.diff(sources) == 1).all(1) & (layer[:, 0] == layer[:, 1]) & (sources[:, 0] >= 0)
    targets = np.flatnonzero(np.repeat(follow, per_group))
    runs = [(edges if follow.all() else edges[targets], targets, sources[targets // per_group, 0])]
    for group in np.flatnonzero(~follow):
        begin, end = group * per_group, (group + 1) * per_group
        runs += scattered(edges[begin:end], np.arange(begin, end), sources[group], first)
    return [run for run in runs if run[0].size]


def scattered(edges: np.ndarray, targets: np.ndarray, sources: np.ndarray, first: np.ndarray) -> list[Run]:
    """All targets (k,) see the same sources (J,), in any order and some perhaps more than once, from edges (k, J)."""
    if (np.diff(sources) < 0).any():
        order = np.argsort(sources, kind="stable")
        edges, sources = edges[:, order], sources[order]
    found, begin, count = np.unique(sources, return_index=True, return_counts=True)
    if count[0] > 1 and (count == count[0]).all():  # one channel's positions: quick with torch
        edges = torch.from_numpy(edges).unflatten(1, (-1, int(count[0]))).sum(2).numpy()  # (k, J) -> (k, found)
    elif len(found) < len(sources):
        edges = np.add.reduceat(edges, begin, axis=1)  # (k, J) -> (k, found)
    layer = np.searchsorted(first, found, side="right")  # 0 where nothing is
    runs = []
    for below in np.unique(layer[layer > 0]):
        here = np.flatnonzero(layer == below)
        lowest, highest = found[here[[0, -1]]]
        part = edges[:, here[0] : here[-1] + 1]
        if part.shape[1] <= highest - lowest:  # some channels of that layer are left out
            whole = np.zeros((len(edges), highest - lowest + 1), edges.dtype)
            whole[:, found[here] - lowest] = part
            part = whole
        runs.append((part, targets, np.full(len(targets), lowest)))
    return runs


def to_nothing(layer: Edges) -> float:
    """Relevance of the edges to padded channels and constants."""
    total = 0.0
    for edges, sources in zip(layer.values, layer.sources, strict=True):
        if (sources < 0).any():
            to_source = edges.reshape(len(sources), -1, sources.shape[-1]).sum(1) if edges.ndim > 1 else edges
            total += float(to_source[sources < 0].sum())  # (groups, J / groups), or (K,)
    return total
