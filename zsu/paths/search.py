"""find_paths(): the k most probable neuronal paths, exactly.

One sweep from the input upwards gives every node the log probability of its best completion. Best-first search then
pops the best open path, walks its best completion down, and offers, at each node on the way, the next best sibling.
Every path is offered exactly once and never before a better one (Eppstein 1998 calls such a change a sidetrack). Of
equally probable paths the one that was offered first comes first; siblings go by the number of their channel.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
import pandas as pd
from numba import njit

from ..errors import ZsuError, check_count, warn
from ..files import write_atomically
from ..relevance.explanation import Relevance
from ..relevance.sums import ONE_PASS
from .graph import PathGraph, build_graph, contrast

Channel = tuple[str, int]  # name of the layer, number of the channel
FIRST, MANY = 16, 128  # children of a node: how many are sorted at first, and beyond how many all are


@dataclass(eq=False)
class Paths:
    """The most probable paths, most probable first.

    Attributes
    ----------
    nodes : int32 array (k, length)
        Nodes of each path from the logit to the input, numbered as in `PathGraph`; -1 behind the end of a path that
        skips layers.
    probability : float64 array (k,)
        Share of the positive relevance that flows along each path; all paths of the graph together have 1.
    layers : list of str
        Names of the layers, input first.
    first : int64 array (layers + 1,)
        Number of each layer's first node.
    """

    nodes: np.ndarray
    probability: np.ndarray
    layers: list[str]
    first: np.ndarray

    def __repr__(self) -> str:
        return f"Paths({len(self):,} paths, {100 * self.probability.sum():.3g} % of the positive relevance)"

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, i: int | slice) -> list[Channel] | Paths:
        """Path i as [(layer, channel), ...] from the logit to the input; of a slice the `Paths`."""
        if isinstance(i, slice):
            return Paths(self.nodes[i], self.probability[i], self.layers, self.first)
        nodes = self.nodes[i][self.nodes[i] >= 0].astype(np.int64)
        layer = np.searchsorted(self.first, nodes, side="right") - 1
        return [(self.layers[n], int(c)) for n, c in zip(layer, nodes - self.first[layer], strict=True)]

    def __iter__(self) -> Iterator[list[Channel]]:
        return (self[i] for i in range(len(self)))

    @property
    def share(self) -> np.ndarray:
        """float64 (k,): share of the positive relevance that the first 1, 2, ... k paths carry."""
        return np.cumsum(self.probability)

    def to_frame(self) -> pd.DataFrame:
        """One row a path: ``probability``, ``share`` of it and those before, and the channel in each layer, from the
        logit to the input; <NA> in layers that the path skips.
        """
        frame = pd.DataFrame({"probability": self.probability, "share": self.share})
        for n in reversed(range(len(self.layers))):
            here = (self.nodes >= self.first[n]) & (self.nodes < self.first[n + 1])
            channel = pd.array(np.where(here, self.nodes - self.first[n], 0).sum(1), dtype="Int64")
            channel[~here.any(1)] = pd.NA
            frame[self.layers[n]] = channel
        return frame

    def save(self, path: str | Path) -> None:
        """Write one npz file."""
        buffer = io.BytesIO()
        arrays = {"nodes": self.nodes, "probability": self.probability, "first": self.first}
        np.savez_compressed(buffer, layers=np.array(self.layers), **arrays)
        write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))

    @staticmethod
    def load(path: str | Path) -> Paths:
        """Read what `save` wrote; `ZsuError` for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return Paths(file["nodes"], file["probability"], file["layers"].tolist(), file["first"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ZsuError("no file of paths", where=str(path), remedy="pass what Paths.save wrote") from error


def find_paths(
    relevance: Relevance | PathGraph,
    k: int | None = None,
    *,
    min_probability: float = 0.0,
    coverage: float = 1.0,
    through: Channel | None = None,
    avoid: Iterable[Channel] = (),
    against: Relevance | PathGraph | None = None,
) -> Paths:
    """The most probable paths of the relevance graph, exactly and in order.

    A path is a trajectory of the chain p(j|k) = max(R[k, j], 0) / sum_j max(R[k, j], 0) from the explained logit to
    an input channel; its probability is the product of the p along it. No two paths have the same nodes.

    Parameters
    ----------
    relevance : Relevance or PathGraph
        From `zsu.explain` with edges, or `zsu.graph.build_graph` of it, which saves time when asked more than once.
    k : int, optional
        At most that many, at least 1. Memory grows with k times the depth of the model (some 25 bytes each). All there
        are, with a warning, where the graph has fewer.
    min_probability : float
        Only paths with at least this probability.
    coverage : float
        As many as together carry this share of the positive relevance, such as 0.5.
    through : (layer, channel), optional
        Only paths through this channel.
    avoid : iterable of (layer, channel)
        Only paths through none of these.
    against : Relevance or PathGraph, optional
        Paths of what goes beyond this reference's flow, `zsu.graph.contrast`: an explanation of the same model for
        images of other classes, or for the runner-up on the same images (`Relevance.runner_up`). Logits of either sign
        compare with seeds of 1 and a rule of positive contributions, such as z+.

    Returns
    -------
    Paths

    Raises
    ------
    ZsuError
        No limit is given, k < 1, shares outside 0 to 1, no such channel, no path there, and what
        `zsu.graph.build_graph` refuses.
    """
    check_limits(k, min_probability, coverage)
    graph = as_graph(relevance)
    if against is not None:
        try:
            graph = contrast(graph, as_graph(against))
        except ZsuError as error:
            remedy = "explain the same model; for logits of either sign with seeds of 1 and the rule 'z+'"
            raise ZsuError(f"with this reference: {error.what}", where="find_paths", remedy=remedy) from error
    closed = np.zeros(graph.start + 1, np.bool_)
    for channel in avoid:
        closed[graph.number(*as_channel(channel))] = True
    via = -1 if through is None else graph.number(*as_channel(through))
    best, scaled, scale = completions(*graph.arrays, graph.first, closed, via)
    if best[-1] == -np.inf:
        raise ZsuError("no path is left", where="find_paths", remedy="avoid fewer channels, or go through another one")
    least = math.log(min_probability) if min_probability else -np.inf
    limit = 2**62 if k is None else min(int(k), 2**62)
    depth = len(graph.layers) + 1
    enough = float(coverage) if coverage < 1 else np.inf
    nodes, score = search(*graph.arrays, best, scaled, scale, via, limit, depth, least, enough)
    if k is not None and len(nodes) < k and coverage == 1 and not min_probability:
        warn(f"there are only {len(nodes):,} paths")
    return Paths(nodes[:, 1:], np.exp(score), graph.layers, graph.first)  # without the node above the logits


def as_graph(relevance: Relevance | PathGraph) -> PathGraph:
    """The graph of an explanation, or the graph itself."""
    if isinstance(relevance, PathGraph):
        return relevance
    if isinstance(relevance, Relevance):
        return build_graph(relevance)
    raise ZsuError(f"a {type(relevance).__name__}", where="find_paths", remedy="pass what zsu.explain returns")


def as_channel(channel: Channel) -> Channel:
    """(layer, channel), after a check."""
    if not isinstance(channel, (tuple, list)) or len(channel) != 2:
        raise ZsuError(f"{channel!r} is no channel", where="find_paths", remedy="pass (name of the layer, number)")
    return tuple(channel)


def check_limits(k: int | None, min_probability: float, coverage: float) -> None:
    """Refuse limits that are none."""
    if k is not None:
        check_count("k", k, "find_paths")
    for name, value in (("min_probability", min_probability), ("coverage", coverage)):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise ZsuError(f"{name} is {value!r}", where="find_paths", remedy="use a number from 0 to 1")
    if not 0 <= min_probability <= 1:
        raise ZsuError(f"min_probability is {min_probability}", where="find_paths", remedy="use a number from 0 to 1")
    if not 0 < coverage <= 1:
        raise ZsuError(f"coverage is {coverage}", where="find_paths", remedy="use a share above 0, at most 1")
    if k is None and not min_probability and coverage == 1:
        raise ZsuError("no limit", where="find_paths", remedy="give k, min_probability or coverage")


def best_through(graph: PathGraph) -> np.ndarray:
    """Log probability of the most probable path through each edge, float64 (edges,); -inf where there is none."""
    best, _, _ = completions(*graph.arrays, graph.first, np.zeros(graph.start + 1, np.bool_), -1)
    return through_edges(*graph.arrays, best)


@ONE_PASS
def completions(weight, total, run_of, run_begin, run_length, run_source, first, closed, via):
    """Log probability of the best way from each node to the input (-inf: none) that keeps out of closed nodes and, from
    above it, leads through the node `via` (-1: no such demand).

    Also the same without the log, relative to the best of the layer, and log of that best by node: products of weight
    and `scaled` compare the sources of a run without a logarithm each.
    """
    nodes = len(run_of) - 1
    best, scaled, scale = np.full(nodes, -np.inf), np.zeros(nodes), np.zeros(nodes)
    for layer in range(len(first)):
        begin, end = first[layer], first[layer + 1] if layer + 1 < len(first) else nodes
        for k in range(begin, end):
            if closed[k]:
                continue
            if layer == 0:
                best[k] = 0.0 if via < 0 or k <= via else -np.inf
                continue
            if total[k] == 0:
                continue
            for r in range(run_of[k], run_of[k + 1]):
                skip = max(0, via - run_source[r]) if k > via else 0
                row = weight[run_begin[r] + skip : run_begin[r] + run_length[r]]
                below = scaled[run_source[r] + skip : run_source[r] + run_length[r]]
                most = 0.0
                for m in range(len(row)):
                    along = row[m] * below[m]
                    most = along if along > most else most
                if most > 0:
                    best[k] = max(best[k], np.log(most) + scale[run_source[r]])
                else:  # nothing there, or too small for a number that is not a logarithm
                    for m in range(len(row)):
                        if row[m] > 0:
                            best[k] = max(best[k], np.log(row[m]) + best[run_source[r] + skip + m])
            best[k] -= np.log(total[k])
        highest = np.max(best[begin:end])
        if highest > -np.inf:
            scale[begin:end] = highest
            scaled[begin:end] = np.exp(best[begin:end] - highest)
    return best, scaled, scale


@njit(cache=True, nogil=True)
def through_edges(weight, total, run_of, run_begin, run_length, run_source, best):
    """Best way down to each edge's target + log p + best way from its source to the input."""
    nodes = len(run_of) - 1
    down = np.full(nodes, -np.inf)
    down[nodes - 1] = 0.0
    score = np.full(len(weight), -np.inf)
    for k in range(nodes - 1, -1, -1):
        for r in range(run_of[k], run_of[k + 1]):
            for m in range(run_length[r]):
                edge = weight[run_begin[r] + m]
                if edge > 0:
                    reached = down[k] + np.log(edge / total[k])
                    source = run_source[r] + m
                    down[source] = max(down[source], reached)
                    score[run_begin[r] + m] = reached + best[source]
    return score


@ONE_PASS
def best_children(node, number, weight, total, run_of, run_begin, run_length, run_source, best, scaled, scale, via):
    """The `number` best sources of a node, all if that is more than MANY: best completion first (ties: lower number
    first), with log p and log p + best; and whether these are all there are.
    """
    size, reference = 0, -np.inf
    for r in range(run_of[node], run_of[node + 1]):
        size += run_length[r]
        reference = max(reference, scale[run_source[r]])
    size = size if number > MANY else min(number, size)
    child, step, value = np.empty(size, np.int64), np.empty(size), np.empty(size)
    there = 0
    for r in range(run_of[node], run_of[node + 1]):
        unit = np.exp(scale[run_source[r]] - reference)
        for m in range(max(0, via - run_source[r]) if node > via else 0, run_length[r]):
            edge, source = weight[run_begin[r] + m], run_source[r] + m
            if edge > 0 and best[source] > -np.inf:
                along = edge * scaled[source] * unit
                at = min(there, size - 1)
                there += 1
                if there > size and along <= value[at]:
                    continue
                while number <= MANY and at > 0 and value[at - 1] < along:  # the better ones come first
                    child[at], step[at], value[at] = child[at - 1], step[at - 1], value[at - 1]
                    at -= 1
                child[at], step[at], value[at] = source, edge, along
    kept = min(there, size)
    child, step, value = child[:kept], step[:kept], value[:kept]
    if number > MANY:
        order = np.argsort(-value, kind="mergesort")
        child, step = child[order], step[order]
    for i in range(kept):
        step[i] = np.log(step[i] / total[node])
        value[i] = step[i] + best[child[i]]
    return child, step, value, there == kept


@njit(cache=True, nogil=True)
def grown(a, size, fill):
    """The array with that many rows, new ones filled."""
    b = np.full((size, *a.shape[1:]), fill, a.dtype)
    b[: len(a)] = a
    return b


@njit(cache=True, nogil=True)
def search(
    weight, total, run_of, run_begin, run_length, run_source, best, scaled, scale, via, k, depth, least, coverage
):
    """Nodes (paths, depth) and log probabilities of the best paths from the last node down: at most k, none below
    `least`, no more than carry `coverage` together.
    """
    start = len(run_of) - 2
    # sorted children of the nodes seen so far, one behind the other: begin, number, and whether these are all
    child, step, value, used = np.empty(4096, np.int64), np.empty(4096), np.empty(4096), 0
    begin, count, whole = np.zeros(start + 1, np.int64), np.zeros(start + 1, np.int64), np.zeros(start + 1, np.bool_)
    size = min(k, 1024)
    nodes = np.full((size, depth), -1, np.int32)
    prefix = np.zeros((size, depth))  # log probability from the start to that node
    result = np.empty(size)
    nodes[0, 0] = start
    # an open path: (-score, serial, parent path, position that deviates, rank of the child taken there)
    heap = [(-best[start], 0, 0, 0, 0)]
    worst, crowded = np.inf, 2 * min(k, 2**40) + 1024  # of what may still be needed; when to look again
    serial, found, carried = 1, 0, 0.0
    while found < k and carried < coverage and len(heap) > 0:
        score, _, parent, position, rank = heappop(heap)
        if -score < least:
            break
        if found == len(nodes):
            size = min(k, 2 * found)
            nodes, prefix, result = grown(nodes, size, -1), grown(prefix, size, 0.0), grown(result, size, 0.0)
        nodes[found, : position + 1] = nodes[parent, : position + 1]
        prefix[found, : position + 1] = prefix[parent, : position + 1]
        at = position
        while True:
            node = nodes[found, at]
            if rank + 1 >= count[node] and not whole[node]:
                c, t, s, whole[node] = best_children(
                    node, max(FIRST, 8 * count[node]),
                    weight, total, run_of, run_begin, run_length, run_source, best, scaled, scale, via,
                )  # fmt: skip
                if used + len(c) > len(child):
                    size = 2 * (used + len(c))
                    child, step, value = grown(child, size, 0), grown(step, size, 0.0), grown(value, size, 0.0)
                begin[node], count[node] = used, len(c)
                child[used : used + len(c)], step[used : used + len(c)], value[used : used + len(c)] = c, t, s
                used += len(c)
            if count[node] == 0:  # an input channel
                break
            here = begin[node] + rank
            if rank + 1 < count[node]:
                sibling = -(prefix[found, at] + value[here + 1])
                if sibling < worst and -sibling >= least:
                    heappush(heap, (sibling, serial, found, at, rank + 1))
                    serial += 1
            nodes[found, at + 1] = child[here]
            prefix[found, at + 1] = prefix[found, at] + step[here]
            at += 1
            rank = 0
        result[found] = prefix[found, at]
        carried += np.exp(result[found])
        found += 1
        if found < k and len(heap) > crowded:  # keep the best that are still needed; a sorted list is a heap
            heap.sort()
            heap = heap[: k - found]
            worst = heap[-1][0]
            crowded = 2 * len(heap) + 1024
    return nodes[:found], result[:found]
