"""Relevance -> PathGraph: the layered graph of channels that relevance flows through, as a Markov chain.

The positive relevance of the edges, normalised over the sources j of each target k, is a chain that walks from the
logit down to the input:  p(j|k) = max(R[k, j], 0) / sum_j max(R[k, j], 0).  Edges with negative relevance are not
walked, and neither are channels from which no positive edge leads on to the input.

All edges lie in one flat array. The sources of a node are a few *runs*: a stretch of that array whose m-th value
belongs to node `source + m`. A convolution row is one run, a concatenation several, an addition one of length 1 for
each summand. No array of source indices is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from .errors import ZsuError
from .relevance import Relevance
from .tape import Node, Source


@dataclass(eq=False)
class PathGraph:
    """Nodes are numbered from the input channels up to the logits; the last node, `start`, stands above the logits.

    Attributes
    ----------
    layers : list of str
        Names of the layers, input first.
    first : int64 array (layers + 1,)
        Number of each layer's first node; the last entry is `start`.
    probability : float32 array (edges,)
        p(j|k), 0 where no path leads on.
    run_of, run_begin, run_length, run_source : int64 arrays
        Node k owns the runs run_of[k] to run_of[k + 1]; see the module's docstring.
    """

    layers: list[str]
    first: np.ndarray
    probability: np.ndarray
    run_of: np.ndarray
    run_begin: np.ndarray
    run_length: np.ndarray
    run_source: np.ndarray

    @property
    def start(self) -> int:
        return int(self.first[-1])

    def locate(self, node: int) -> tuple[str, int]:
        """(layer, channel) of a node."""
        layer = int(np.searchsorted(self.first, node, side="right")) - 1
        return self.layers[layer], int(node - self.first[layer])

    def flow(self) -> np.ndarray:
        """float32 (edges,): share of all paths that use each edge."""
        return flows(self.probability, self.run_of, self.run_begin, self.run_length, self.run_source)

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
    sizes = [n.relevance.shape[1] for n in layers]
    first = np.concatenate([[0], np.cumsum(sizes)])
    blocks, values, size = [], [], 0
    for number, node in enumerate(layers):
        for edges, begin, source in runs_of(node):
            k = len(edges)
            rows = np.arange(k)
            target = first[number] + rows
            from_node = first[source.node] + begin(rows)
            blocks.append((target, size + rows * edges.shape[1], np.full(k, edges.shape[1]), from_node))
            values.append(edges.detach().float().cpu().numpy().ravel())  # (K, J) -> (K * J,)
            size += edges.numel()
    seed = relevance.layers[-1].relevance.sum(0)  # (classes,): the walk starts at the logits explained
    top = number_of_logits(relevance)
    blocks.append(([first[-1]], [size], [len(seed)], [first[top]]))
    values.append(seed.detach().float().cpu().numpy())
    target, run_begin, run_length, run_source = (np.concatenate(c).astype(np.int64) for c in zip(*blocks, strict=True))
    order = np.argsort(target, kind="stable")
    run_of = np.searchsorted(target[order], np.arange(first[-1] + 2))
    graph = PathGraph(
        [n.name for n in layers],
        first,
        np.concatenate(values),
        run_of,
        run_begin[order],
        run_length[order],
        run_source[order],
    )
    if not np.isfinite(graph.probability).all():
        raise ZsuError(
            "relevance of an edge is not finite", where="find_paths", remedy="check the explanation's ledger"
        )
    alive = normalise(graph.probability, run_of, graph.run_begin, graph.run_length, graph.run_source, sizes[0])
    if not alive[-1]:
        raise ZsuError(
            "no positive relevance leads from the logit to the input",
            where="find_paths",
            remedy="explain samples that the model recognises as this class",
        )
    return graph


def number_of_logits(relevance: Relevance) -> int:
    """Index of the layer whose nodes are the logits: the last one."""
    top = relevance.layers[-1]
    if top.relevance.shape[1] != relevance.logits.shape[1]:
        raise ZsuError("the last layer does not compute the logits", where=top.name, remedy="end the model in a layer")
    return len(relevance.layers) - 1


def runs_of(node: Node):
    """Yield (edges (K, channels), first channel of row k, Source) for each stretch of sources of a node."""
    if node.kind == "input":
        return
    if not node.edges:
        raise ZsuError("edges were not computed", where=node.name, remedy="call explain(..., edges=True)")
    for edges, sources in zip(node.edges, node.sources, strict=True):
        if sources is None:
            raise ZsuError(
                "an operation before this layer rearranges channels, so its sources are unknown",
                where=node.name,
                remedy="paths follow convolutions, linear layers, additions, concatenations, pools and flatten",
            )
        one_to_one = node.kind == "add" or node.groups == 0
        offset = 0
        for source in sources:
            n = source.channels
            if one_to_one:
                yield edges[offset : offset + n].reshape(-1, 1), identity, source  # (K,) -> (K, 1)
            elif node.groups == 1:
                part = edges[:, offset : offset + n * source.group]
                yield (
                    part.unflatten(1, (n, source.group)).sum(2),
                    first_channel,
                    source,
                )  # (K, J) -> (K, C, P) -> (K, C)
            else:
                yield edges, grouped(node, sources, edges), source
            offset += n * source.group


def identity(rows: np.ndarray) -> np.ndarray:
    return rows


def first_channel(rows: np.ndarray) -> np.ndarray:
    return np.zeros_like(rows)


def grouped(node: Node, sources: tuple[Source, ...], edges: torch.Tensor):
    """Row k of a grouped convolution sees the J / groups channels of its own group."""
    if len(sources) > 1:
        raise ZsuError("a grouped convolution over a concatenation", where=node.name, remedy="not supported yet")
    per_group = len(edges) // node.groups
    return lambda rows: rows // per_group * edges.shape[1]


@njit(cache=True, nogil=True)
def normalise(value, run_of, run_begin, run_length, run_source, inputs):
    """In place: edge relevance -> p(j|k); returns which nodes reach the input (float sums in float64)."""
    nodes = len(run_of) - 1
    alive = np.zeros(nodes, np.bool_)
    alive[:inputs] = True
    for k in range(inputs, nodes):
        total = 0.0
        for r in range(run_of[k], run_of[k + 1]):
            begin, source = run_begin[r], run_source[r]
            for m in range(run_length[r]):
                if value[begin + m] <= 0 or not alive[source + m]:
                    value[begin + m] = 0
                total += value[begin + m]
        if total > 0:
            alive[k] = True
            for r in range(run_of[k], run_of[k + 1]):
                for e in range(run_begin[r], run_begin[r] + run_length[r]):
                    value[e] /= total
    return alive


@njit(cache=True, nogil=True)
def flows(p, run_of, run_begin, run_length, run_source):
    """Share of the walks from the top that use each edge: m(k) p(j|k), m the share that visits node k. (edges,)"""
    nodes = len(run_of) - 1
    visits = np.zeros(nodes)
    visits[nodes - 1] = 1.0
    flow = np.zeros(len(p), np.float32)
    for k in range(nodes - 1, -1, -1):
        for r in range(run_of[k], run_of[k + 1]):
            for m in range(run_length[r]):
                flow[run_begin[r] + m] = visits[k] * p[run_begin[r] + m]
                visits[run_source[r] + m] += visits[k] * p[run_begin[r] + m]
    return flow
