"""Which neurons or connections to perturb: what a relevance or a graph says, as indices into the model's weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numba import njit
from torch import Tensor, nn

from ..errors import ZsuError, check_count
from ..paths.graph import build_graph
from ..paths.search import best_through
from ..relevance import Relevance
from ..relevance.checks import check_channel
from ..relevance.layers import Share
from .perturb import Selection

# --- neurons --------------------------------------------------------------------------------------------------


def select_neurons(
    relevance: Relevance, by: str = "frequency", k: int | None = None, *, against: Relevance | None = None
) -> dict[str, Tensor]:
    """The k neurons of every hidden layer with weights that matter most for what was explained.

    Parameters
    ----------
    relevance : Relevance
        From `zsu.explain`, with edges unless `by` is ``"frequency"``.
    by : str
        * ``"frequency"``: how many samples have the neuron among their k most (positively) relevant; ties go to the
          larger relevance over all samples (Chang et al. 2024, arXiv:2410.23693, sec. 4).
        * ``"marginal"``: the share of all paths that lead through it, `PathGraph.visits`.
        * ``"path"``: the probability of the best path through it.
        * ``"contrast"``: by how much its share of all paths exceeds that in `against`, an explanation of the same model
          for something else.
    k : int, optional
        Neurons a layer (default: a tenth of the layer). Fewer where fewer have a score above 0.

    Returns
    -------
    dict of str to int64 Tensor
        By name of the layer, best first. `incoming_weights` turns it into what `zsu.perturb.perturb` takes.

    Raises
    ------
    ZsuError
        Another `by`, a reference that is missing or not asked for, more neurons than a layer has, no hidden layer with
        weights, and what `zsu.graph.build_graph` refuses.
    """
    if not isinstance(by, str) or by not in ("frequency", "marginal", "path", "contrast"):
        remedy = "use 'frequency', 'marginal', 'path' or 'contrast'"
        raise ZsuError(f"selection by {by!r}", where="select_neurons", remedy=remedy)
    if (by == "contrast") != (against is not None):
        raise ZsuError(
            f"selection by {by!r} {'needs a' if by == 'contrast' else 'takes no'} reference",
            where="select_neurons",
            remedy="pass against=explain(...) with by='contrast', and only then",
        )
    if k is not None:
        check_count("k", k, "select_neurons")
    layers = hidden_layers(relevance)
    sizes = {n.name: a_tenth(n) if k is None else k for n in layers}
    for node in layers:
        check_k(node, sizes[node.name])
    if by == "frequency":
        return {n.name: highest(count_in_top(n, sizes[n.name]), sizes[n.name]) for n in layers}
    graph = build_graph(relevance)
    if by == "path":
        _, source = graph.ends(np.arange(len(graph.weight)))
        score = np.full(graph.start + 1, -np.inf)
        np.maximum.at(score, source, best_through(graph))
        score = np.exp(score)
    else:
        score = graph.visits() - (build_graph(against).visits() if against else 0)
    by_layer = dict(zip(graph.layers, np.split(score[: graph.start], graph.first[1:-1]), strict=True))
    return {name: highest(by_layer[name], size) for name, size in sizes.items()}


def incoming_weights(model: nn.Module, relevance: Relevance, neurons: Mapping[str, Tensor]) -> Selection:
    """All incoming weights of the neurons of each layer."""
    weight = {n.name: n.weight for n in relevance.layers if n.weight}
    parts = []
    for name, chosen in neurons.items():
        if name not in weight:
            remedy = f"use one of {list(weight)}"
            raise ZsuError(f"no layer with weights is called {name!r}", where="incoming_weights", remedy=remedy)
        chosen = torch.as_tensor(chosen, dtype=torch.int64)
        for neuron in chosen.tolist():
            check_channel(name, neuron, len(model.get_parameter(weight[name])))
        width = model.get_parameter(weight[name])[0].numel()
        parts.append((weight[name], chosen[:, None] * width + torch.arange(width)))  # (n, width)
    return merge_by_parameter(parts)


def hidden_layers(relevance: Relevance, names: Sequence[str] | None = None) -> list[Share]:
    """Layers with a weight parameter, without those that compute the logits; only those named, where some are."""
    heads = logit_layers(relevance)
    shared = {n.weight for n in heads}  # a weight that a head has too
    hidden = {n.name: n for n in relevance.layers if n.weight and n not in heads and n.weight not in shared}
    for node in hidden.values():
        refuse_transposed(node)
    check_by_sample(relevance, hidden.values())
    if not hidden:
        remedy = "edit its head alone, as zsu.forget(..., 'mask') does"
        raise ZsuError("there is no hidden layer with weights", where="the model", remedy=remedy)
    names = list(hidden) if names is None else names
    unknown = [name for name in names if name not in hidden]
    if unknown or not names:
        what = f"no hidden layer with weights is called {unknown}"
        raise ZsuError(what, where="forget", remedy=f"use some of {', '.join(hidden)}")
    return [n for name, n in hidden.items() if name in names]


def check_by_sample(relevance: Relevance, layers: Iterable[Share]) -> None:
    """Refuse layers of which it is not known which sample uses which neuron, as in a model that splits its batch."""
    for layer in layers:
        if len(layer.relevance) != len(relevance.logits):
            what = f"the relevance of {len(relevance.logits)} samples comes in {len(layer.relevance)} rows"
            raise ZsuError(what, where=layer.name, remedy="let the model take its batch at once, samples on axis 0")


def logit_layers(relevance: Relevance) -> list[Share]:
    """The layers from which no way to the logits leads through another convolution or linear layer.

    Several, where logits are added, averaged or concatenated. A sum or a norm of logits is one of them, and so are its
    sources.
    """
    layers, classes = relevance.layers, relevance.logits.shape[1]
    found = list(relevance.tops)
    if not found:  # not known: the last one, and others that no layer reads and that are as wide
        read = [below for layer in layers for below in layers_read(relevance, layer)]
        wide = [n for n in layers if n not in read and n.relevance.shape[1] == classes]
        found = [n for n in layers if n in wide or n is layers[-1]]
    for layer in found:  # which grows
        if layer.kind in ("add", "layer_norm", "group_norm") or layer.groups == 0:
            found += [n for n in layers_read(relevance, layer) if n not in found]
    return found


def layers_read(relevance: Relevance, node: Share) -> list[Share]:
    """The layers that a layer reads, where that is known."""
    first = first_nodes(relevance)
    sources = np.concatenate([np.zeros(0, np.int64), *(run for run in node.sources if run is not None)])
    return [relevance.layers[n] for n in np.unique(np.searchsorted(first, sources, side="right")) - 1 if n >= 0]


def refuse_transposed(node: Share) -> None:
    """Weights (J, K, ...) instead of (K, J, ...) are not taken apart here."""
    if node.kind.startswith("conv_transpose"):
        remedy = "edit the head alone, as zsu.forget(..., 'head-npp') or 'mask' does"
        raise ZsuError("a transposed convolution", where=node.name, remedy=remedy)


def check_k(node: Share, k: int, name: str = "k") -> None:
    """Refuse more neurons than the layer has."""
    neurons = node.relevance.shape[1]
    if k > neurons:
        raise ZsuError(f"{name} is {k}, the layer has {neurons} neurons", where=node.name, remedy="use less")


def a_tenth(node: Share) -> int:
    """Of the node's neurons, at least 1."""
    return max(1, round(node.relevance.shape[1] / 10))


def highest(score: np.ndarray, number: int) -> Tensor:
    """Indices of the largest scores above 0, at most that many, best first; ties go to the lower index."""
    order = np.argsort(-score, kind="stable")[:number]
    return torch.from_numpy(order[score[order] > 0])


def count_in_top(node: Share, k: int) -> np.ndarray:
    """For each neuron the number of samples that have it among their k most relevant, plus a fraction for its share of
    the positive relevance, which breaks ties; 0 where no sample has it. float64 (K,)
    """
    relevance = node.relevance.double().cpu().numpy()  # (N, K)
    count = count_most(relevance, k)
    strength = relevance.clip(min=0).sum(0)
    return np.where(count > 0, count + strength / (strength.sum() + 1), 0)


@njit(cache=True, nogil=True)
def count_most(relevance, k):
    """How many rows of (N, K) have each column among their k largest positive values; ties go to the lower column."""
    count = np.zeros(relevance.shape[1], np.int64)
    for row in relevance:
        least = np.partition(row, len(row) - k)[len(row) - k]
        at_least = k - np.sum(row > least)  # how many of those that tie are taken
        for j in range(len(row)):
            if row[j] > 0 and (row[j] > least or (row[j] == least and at_least > 0)):
                count[j] += 1
                at_least -= row[j] == least
    return count


def rows_of_neurons(neurons: dict[str, Tensor]) -> pd.DataFrame:
    """One row a neuron, as in `Forgotten.cut`."""
    layers = [name for name, chosen in neurons.items() for _ in chosen]
    channels = [number for chosen in neurons.values() for number in chosen.tolist()]
    return pd.DataFrame({"layer": layers, "channel": channels, "source": pd.NA})


# --- connections ----------------------------------------------------------------------------------------------


def find_specific_edges(own: Relevance, others: Relevance) -> pd.DataFrame:
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


def count_affordable(model: nn.Module, edges: int, blocks: Iterable[tuple[str, Tensor, Tensor]], share: float) -> int:
    """How many edges, in their order, have at most a share of `share` of the model's weights; at least one."""
    weights = np.zeros(edges)
    for _, rank, flat in blocks:
        weights[rank.numpy()] = flat.shape[1]
    return max(1, int((weights.cumsum() <= share * sum(p.numel() for p in model.parameters())).sum()))


def weight_blocks(model: nn.Module, relevance: Relevance, edges: pd.DataFrame):
    """Yield (parameter, rank (n,), flat indices (n, width)) of the edges, by layer and number of weights."""
    first = first_nodes(relevance)
    for number, rows in edges.groupby("number"):
        node = relevance.layers[number]
        if node.weight is None:  # an addition, or a BatchNorm of its own: nothing to cut
            continue
        refuse_transposed(node)
        k, j, *window = model.get_parameter(node.weight).shape
        size = int(np.prod(window, initial=1))
        channel = rows["channel"].to_numpy()
        source = first[rows["below"]] + rows["source"].to_numpy()
        for here, column in columns_of(node, channel // (k // node.groups), source):
            begin = (channel[here, None] * j + column) * size
            flat = torch.from_numpy(begin)[:, :, None] + torch.arange(size)  # (n, columns, size)
            yield node.weight, torch.tensor(rows["rank"].to_numpy()[here]), flat.flatten(1)


def first_nodes(relevance: Relevance) -> np.ndarray:
    """The number of each layer's first channel, as `PathGraph.first`."""
    return np.cumsum([0, *(layer.relevance.shape[1] for layer in relevance.layers)])


def columns_of(node: Share, group: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns of the weights, within a group, that read a source: more than one for a flattened channel, or one that is
    read twice. Yields which of the pairs (group, source) have a number of columns, and these (pairs, number).
    """
    sources = node.sources[0]  # (groups J / groups,)
    per_group = len(sources) // node.groups
    apart = sources.max() + 2  # so that no two groups share a key, nor -1 with another group's last
    key = np.arange(len(sources)) // per_group * apart + sources
    order = np.argsort(key, kind="stable")
    begin, end = (np.searchsorted(key[order], group * apart + source, side) for side in ("left", "right"))
    for number in np.unique(end - begin):
        here = np.flatnonzero(end - begin == number)
        yield here, order[begin[here, None] + np.arange(number)] - group[here, None] * per_group


def channels_read(relevance: Relevance, node: Share) -> tuple[Share | None, np.ndarray]:
    """The only layer that a layer reads, and which of its channels each column reads (J,); None for any other."""
    below, sources = layers_read(relevance, node), node.sources[0]
    if len(below) != 1 or sources is None or (sources < 0).any():
        return None, np.zeros(0, np.int64)
    return below[0], sources - first_nodes(relevance)[relevance.layers.index(below[0])]


def merge_by_parameter(parts: Iterable[tuple[str, Tensor]]) -> Selection:
    """One tensor of flat indices for each parameter name."""
    selection: dict[str, list[Tensor]] = {}
    for name, flat in parts:
        selection.setdefault(name, []).append(flat.flatten())  # (n, width) -> (n width,)
    return {name: torch.cat(indices).unique() for name, indices in selection.items()}
