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
from numba import njit

from .errors import ZsuError
from .relevance import Relevance
from .tape import Node


@dataclass(eq=False)
class PathGraph:
    """Nodes are numbered from the input channels up to the logits; the last node, `start`, stands above the logits.

    Attributes
    ----------
    layers : list of str
        Names of the layers, input first.
    first : int64 array (layers + 1,)
        Number of each layer's first node; the last entry is `start`.
    probability : float64 array (edges,)
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

    def __repr__(self) -> str:
        return f"PathGraph({len(self.layers)} layers, {self.start:,} channels, {len(self.probability):,} edges)"

    @property
    def start(self) -> int:
        return int(self.first[-1])

    def locate(self, node: int) -> tuple[str, int]:
        """(layer, channel) of a node."""
        layer = int(np.searchsorted(self.first, node, side="right")) - 1
        return self.layers[layer], int(node - self.first[layer])

    def flow(self) -> np.ndarray:
        """float64 (edges,): share of all paths that use each edge."""
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
        for edges, targets, below, sources in runs_of(node):
            k, length = edges.shape
            begin = size + np.arange(k) * length
            blocks.append((first[number] + targets, begin, np.full(k, length), first[below] + sources))
            values.append(edges.double().cpu().numpy().ravel())  # (k, length) -> (k * length,)
            size += edges.numel()
    seed = logits_layer(relevance).relevance.sum(0)  # (classes,): the walk starts at the logits explained
    blocks.append(([first[-1]], [size], [len(seed)], [first[-2]]))
    values.append(seed.double().cpu().numpy())
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
            remedy="explain samples with a positive logit, or hand a positive seed (N, classes) to explain",
        )
    return graph


def logits_layer(relevance: Relevance) -> Node:
    """The layer whose nodes are the logits: the last one."""
    top = relevance.layers[-1]
    if top.relevance.shape[1] != relevance.logits.shape[1]:
        raise ZsuError("the last layer does not compute the logits", where=top.name, remedy="end the model in a layer")
    return top


def runs_of(node: Node):
    """Yield (edges (k, length), target channels (k,), layer below, first source channels (k,)) for each stretch of
    sources of a node: row i holds the edges from a target to `length` consecutive source channels.
    """
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
        if node.groups > 1 and len(sources) > 1:
            raise ZsuError("a grouped convolution over a concatenation", where=node.name, remedy="not supported yet")
        one_to_one = node.kind == "add" or node.groups == 0
        targets = np.arange(len(edges))
        offset = 0
        for source in sources:
            width = source.channels * source.group
            if one_to_one:  # target offset + i sees channel i // group
                mine = slice(offset, offset + width)
                yield edges[mine].reshape(-1, 1), targets[mine], source.node, np.arange(width) // source.group
            elif node.groups == 1:
                part = edges[:, offset : offset + width].unflatten(1, (source.channels, source.group))
                yield part.sum(2), targets, source.node, np.zeros_like(targets)  # (K, C, group) -> (K, C)
            else:  # target k sees the J / groups channels of its own group
                per_group = len(edges) // node.groups
                yield edges, targets, source.node, targets // per_group * edges.shape[1]
            offset += width


@njit(cache=True, nogil=True)
def normalise(value, run_of, run_begin, run_length, run_source, inputs):
    """In place: edge relevance -> p(j|k); returns which nodes reach the input."""
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
    flow = np.zeros(len(p))
    for k in range(nodes - 1, -1, -1):
        for r in range(run_of[k], run_of[k + 1]):
            for m in range(run_length[r]):
                flow[run_begin[r] + m] = visits[k] * p[run_begin[r] + m]
                visits[run_source[r] + m] += visits[k] * p[run_begin[r] + m]
    return flow
