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
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd

from ..errors import ZsuError, check_count, is_number, warn
from ..files import write_atomically
from ..relevance import Relevance
from .compiled import completions, search, through_edges
from .graph import PathGraph, build_graph, contrast

Channel = tuple[str, int]  # name of the layer, number of the channel


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

    @overload
    def __getitem__(self, i: int) -> list[Channel]: ...

    @overload
    def __getitem__(self, i: slice) -> Paths: ...

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
        np.savez_compressed(buffer, **vars(self))
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
    for channel in as_list(avoid):
        closed[node_of(channel, graph)] = True
    via = -1 if through is None else node_of(through, graph)
    completed = completions(graph.chain, graph.first, closed, via)
    if completed.best[-1] == -np.inf:
        raise ZsuError("no path is left", where="find_paths", remedy="avoid fewer channels, or go through another one")
    least = math.log(min_probability) if min_probability else -np.inf
    limit = 2**62 if k is None else min(int(k), 2**62)
    enough = float(coverage) if coverage < 1 else np.inf
    nodes, score = search(graph.chain, completed, via, limit, len(graph.layers) + 1, least, enough)
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


def as_list(avoid: Iterable[Channel]) -> list[Channel]:
    """Several channels; `ZsuError` for what cannot be gone through."""
    try:
        return list(avoid)
    except TypeError as error:
        remedy = "pass a list of (name of the layer, number)"
        raise ZsuError(f"avoid is {avoid!r}", where="find_paths", remedy=remedy) from error


def node_of(channel: Channel, graph: PathGraph) -> int:
    """The node of a (layer, channel), after a check."""
    if not isinstance(channel, (tuple, list)) or len(channel) != 2:
        raise ZsuError(f"{channel!r} is no channel", where="find_paths", remedy="pass (name of the layer, number)")
    return graph.number(*channel)


def check_limits(k: int | None, min_probability: float, coverage: float) -> None:
    """Refuse limits that are none."""
    if k is not None:
        check_count("k", k, "find_paths")
    for name, value in (("min_probability", min_probability), ("coverage", coverage)):
        if not is_number(value) or not 0 <= value <= 1:
            raise ZsuError(f"{name} is {value!r}", where="find_paths", remedy="use a number from 0 to 1")
    if coverage == 0:
        raise ZsuError(f"coverage is {coverage}", where="find_paths", remedy="use a share above 0, at most 1")
    if k is None and not min_probability and coverage == 1:
        raise ZsuError("no limit", where="find_paths", remedy="give k, min_probability or coverage")


def best_through(graph: PathGraph) -> np.ndarray:
    """Log probability of the most probable path through each edge, float64 (edges,); -inf where there is none."""
    completed = completions(graph.chain, graph.first, np.zeros(graph.start + 1, np.bool_), -1)
    return through_edges(graph.chain, completed.best)
