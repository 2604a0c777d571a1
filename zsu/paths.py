"""find_paths(): the k most probable neuronal paths, exactly.

One sweep from the input upwards gives every node the log probability of its best completion. Best-first search then
pops the best open path, walks its best completion down, and offers, at each node on the way, the next best sibling.
Every path is offered exactly once and never before a better one (Eppstein 1998 calls such a change a sidetrack).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numba import njit

from .errors import ZsuError
from .graph import PathGraph, build_graph
from .relevance import Relevance


@dataclass(eq=False)
class Paths:
    """The k most probable paths, most probable first.

    Attributes
    ----------
    nodes : int64 array (k, length)
        Nodes of each path from the logit to the input, numbered as in `graph`; -1 behind the end of a path that
        skips layers.
    probability : float64 array (k,)
        Share of the positive relevance that flows along each path; all paths of the graph together have 1.
    graph : PathGraph
    """

    nodes: np.ndarray
    probability: np.ndarray
    graph: PathGraph

    def __repr__(self) -> str:
        return f"Paths({len(self):,} paths, {self.probability.sum():.1%} of the positive relevance)"

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, i: int) -> list[tuple[str, int]]:
        """Path i as [(layer, channel), ...] from the logit to the input."""
        return [self.graph.locate(n) for n in self.nodes[i] if n >= 0]

    def __iter__(self) -> Iterator[list[tuple[str, int]]]:
        return (self[i] for i in range(len(self)))

    @property
    def share(self) -> np.ndarray:
        """float64 (k,): share of the positive relevance that the first 1, 2, ... k paths carry."""
        return np.cumsum(self.probability)


def find_paths(relevance: Relevance, k: int) -> Paths:
    """The k most probable paths of the relevance graph, exactly and in order.

    A path is a trajectory of the chain p(j|k) = max(R[k, j], 0) / sum_j max(R[k, j], 0) from the explained logit to
    an input channel; its probability is the product of the p along it. Where the graph has fewer than k paths, all
    of them are returned.

    Parameters
    ----------
    relevance : Relevance
        From `zsu.explain` with edges.
    k : int
        How many paths, at least 1. Memory grows with k times the depth of the model.

    Returns
    -------
    Paths

    Raises
    ------
    ZsuError
        k < 1, and what `zsu.graph.build_graph` refuses.
    """
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise ZsuError(f"k is {k!r}", where="find_paths", remedy="ask for at least one path, an integer")
    graph = build_graph(relevance)
    arrays = graph.probability, graph.run_of, graph.run_begin, graph.run_length, graph.run_source
    best = completions(*arrays, len(relevance.layers[0].relevance[0]))
    nodes, score = search(*arrays, best, int(k), len(graph.layers) + 1)
    return Paths(nodes[:, 1:], np.exp(score), graph)  # without the node above the logits


def best_through(graph: PathGraph, inputs: int) -> np.ndarray:
    """Log probability of the most probable path through each edge, float64 (edges,); -inf where there is none.

    In the order of these values the search for the most probable paths reaches the edges, however many paths it takes.
    """
    arrays = graph.probability, graph.run_of, graph.run_begin, graph.run_length, graph.run_source
    return through(*arrays, completions(*arrays, inputs))


@njit(cache=True, nogil=True)
def completions(p, run_of, run_begin, run_length, run_source, inputs):
    """Log probability of the best way from each node to the input; -inf where there is none."""
    nodes = len(run_of) - 1
    best = np.full(nodes, -np.inf)
    best[:inputs] = 0.0
    for k in range(inputs, nodes):
        for r in range(run_of[k], run_of[k + 1]):
            for m in range(run_length[r]):
                edge = p[run_begin[r] + m]
                if edge > 0:
                    best[k] = max(best[k], np.log(edge) + best[run_source[r] + m])
    return best


@njit(cache=True, nogil=True)
def through(p, run_of, run_begin, run_length, run_source, best):
    """Best way down to each edge's target + log p + best way from its source to the input."""
    nodes = len(run_of) - 1
    down = np.full(nodes, -np.inf)
    down[nodes - 1] = 0.0
    score = np.full(len(p), -np.inf)
    for k in range(nodes - 1, -1, -1):
        for r in range(run_of[k], run_of[k + 1]):
            for m in range(run_length[r]):
                edge = p[run_begin[r] + m]
                if edge > 0:
                    reached = down[k] + np.log(edge)
                    source = run_source[r] + m
                    down[source] = max(down[source], reached)
                    score[run_begin[r] + m] = reached + best[source]
    return score


@njit(cache=True, nogil=True)
def sorted_children(node, p, run_of, run_begin, run_length, run_source, best):
    """Sources of a node, best completion first (ties: lower number first), with log p and log p + best."""
    count = 0
    for r in range(run_of[node], run_of[node + 1]):
        count += np.sum(p[run_begin[r] : run_begin[r] + run_length[r]] > 0)
    child, step, score = np.empty(count, np.int64), np.empty(count), np.empty(count)
    n = 0
    for r in range(run_of[node], run_of[node + 1]):
        for m in range(run_length[r]):
            edge = p[run_begin[r] + m]
            if edge > 0:
                child[n] = run_source[r] + m
                step[n] = np.log(edge)
                score[n] = step[n] + best[child[n]]
                n += 1
    order = np.argsort(-score, kind="mergesort")
    return child[order], step[order], score[order]


@njit(cache=True, nogil=True)
def search(p, run_of, run_begin, run_length, run_source, best, k, depth):
    """Nodes (paths, depth) and log probabilities of the k best paths from the last node down."""
    start = len(run_of) - 2
    known = np.full(start + 1, -1, np.int64)  # node -> its entry in the lists of sorted children
    child0, step0, score0 = sorted_children(start, p, run_of, run_begin, run_length, run_source, best)
    children, steps, scores = [child0], [step0], [score0]
    known[start] = 0
    nodes = np.full((min(k, 1024), depth), -1, np.int64)
    prefix = np.zeros((min(k, 1024), depth))  # log probability from the start to that node
    result = np.empty(min(k, 1024))
    # an open path: (-score, serial, parent path, position that deviates, rank of the child taken there)
    heap = [(-score0[0], 0, 0, 0, 0)]
    nodes[0, 0] = start
    serial, found = 1, 0
    while found < k and len(heap) > 0:
        score, _, parent, position, rank = heappop(heap)
        if found == len(nodes):
            size = min(k, 2 * found)
            nodes, old = np.full((size, depth), -1, np.int64), nodes
            nodes[:found] = old
            prefix, old_prefix = np.zeros((size, depth)), prefix
            prefix[:found] = old_prefix
            result, old_result = np.empty(size), result
            result[:found] = old_result
        nodes[found, : position + 1] = nodes[parent, : position + 1]
        prefix[found, : position + 1] = prefix[parent, : position + 1]
        result[found] = -score
        at = position
        while True:
            entry = known[nodes[found, at]]
            if entry < 0:
                c, t, s = sorted_children(nodes[found, at], p, run_of, run_begin, run_length, run_source, best)
                entry = len(children)
                known[nodes[found, at]] = entry
                children.append(c)
                steps.append(t)
                scores.append(s)
            if len(children[entry]) == 0:  # an input channel
                break
            if rank + 1 < len(children[entry]):
                sibling = prefix[found, at] + scores[entry][rank + 1]
                heappush(heap, (-sibling, serial, found, at, rank + 1))
                serial += 1
            nodes[found, at + 1] = children[entry][rank]
            prefix[found, at + 1] = prefix[found, at] + steps[entry][rank]
            at += 1
            rank = 0
        found += 1
    return nodes[:found], result[:found]
