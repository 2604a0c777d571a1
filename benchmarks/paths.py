"""Path search against other libraries, and in passes over the edges: `python benchmarks/paths.py --help`.

Peers find the k cheapest paths of the same graph with costs -log p(j|k): scipy.sparse.csgraph.yen, networkx
shortest_simple_paths, and igraph get_k_shortest_paths where it is installed. Each must give the same probabilities.
"""

import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import networkx
import numpy as np
import scipy.sparse
import torch
import torchvision
import typer

from zsu import explain
from zsu.paths import find_paths
from zsu.paths.graph import PathGraph, assemble, build_graph

try:
    import igraph
except ImportError:
    igraph = None

SMALL = [1, 16, 32, 64, 128, 10]
VGG16 = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 4096, 4096, 1000]


def layered(sizes: list[int], seed: int = 0) -> PathGraph:
    """All channels of a layer joined to all of the next, relevance as spread out as it is in networks."""
    rng = np.random.default_rng(seed)
    first = np.concatenate([[0], np.cumsum(sizes)])
    values, blocks, size = [], [], 0
    for n in range(1, len(sizes)):
        k, j = sizes[n], sizes[n - 1]
        values.append(rng.lognormal(0, 2, k * j).astype(np.float32))
        blocks.append((first[n] + np.arange(k), size + np.arange(k) * j, np.full(k, j), np.full(k, first[n - 1])))
        size += k * j
    logit = np.zeros(sizes[-1], np.float32)
    logit[1] = 1
    blocks.append(([first[-1]], [size], [sizes[-1]], [first[-2]]))
    names = [str(n) for n in range(len(sizes))]
    return assemble(names, first, np.concatenate([*values, logit]), blocks, [0] * len(sizes))


def costs(graph: PathGraph) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(target, source, -log p) of the edges, and one node more: the sink behind all inputs."""
    edges = np.flatnonzero(graph.weight)
    target, source = graph.ends(edges)
    sink, inputs = graph.start + 1, np.arange(graph.first[1])
    cost = -np.log(graph.weight[edges] / graph.total[target]) + 1e-12  # scipy takes 0 for no edge
    target, source = np.concatenate([target, inputs]), np.concatenate([source, np.full(len(inputs), sink)])
    return target, source, np.concatenate([cost, np.full(len(inputs), 1e-12)]), sink


def scipy_yen(graph, k):
    target, source, cost, sink = costs(graph)
    matrix = scipy.sparse.csr_array(
        (cost, (target.astype(np.int32), source.astype(np.int32))), shape=(sink + 1, sink + 1)
    )
    return lambda: np.exp(-scipy.sparse.csgraph.yen(matrix, graph.start, sink, k))


def networkx_paths(graph, k):
    target, source, cost, sink = costs(graph)
    net = networkx.DiGraph()
    net.add_weighted_edges_from(zip(target.tolist(), source.tolist(), cost.tolist(), strict=True))

    def search():
        found = itertools.islice(networkx.shortest_simple_paths(net, graph.start, sink, "weight"), k)
        return np.exp([-networkx.path_weight(net, path, "weight") for path in found])

    return search


def igraph_paths(graph, k):
    target, source, cost, sink = costs(graph)
    net = igraph.Graph(sink + 1, list(zip(target.tolist(), source.tolist(), strict=True)), directed=True)

    def search():
        found = net.get_k_shortest_paths(graph.start, sink, k=k, weights=cost.tolist(), output="epath")
        return np.exp([-cost[path].sum() for path in found])

    return search


PEERS = {"scipy yen": (scipy_yen, 100), "networkx": (networkx_paths, 100), "igraph": (igraph_paths, 1000)}


def timed(search, rounds: int) -> tuple[list[float], np.ndarray]:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        found = search()
        seconds.append(time.perf_counter() - started)
    return seconds, found


def line(name: str, seconds: list[float], more: str = "") -> None:
    ms = [1e3 * s for s in seconds]
    print(f"{name:<42} {statistics.median(ms):10.2f} ms ({min(ms):.2f} to {max(ms):.2f})  {more}", flush=True)


def against_peers(rounds: int) -> None:
    graph = layered(SMALL)
    print(f"\n{'-'.join(map(str, SMALL))}: {len(graph.weight):,} edges")
    for name, (peer, most) in PEERS.items():
        if name == "igraph" and igraph is None:
            print("igraph is not installed")
            continue
        for k in (k for k in (100, 1000) if k <= most):
            ours, mine = timed(lambda k=k: find_paths(graph, k).probability, 20)
            theirs, same = timed(peer(graph, k), rounds)
            assert np.allclose(mine, same, rtol=1e-5), name
            ratio = statistics.median(theirs) / statistics.median(ours)
            line(f"zsu, k = {k}", ours)
            line(f"{name}, k = {k}", theirs, f"{ratio:,.0f} x zsu")


def in_passes(rounds: int) -> tuple[list[int], list[float]]:
    """Time against k on a graph of VGG-16's size, in units of one sum over its edges."""
    graph = layered(VGG16)
    one_pass, _ = timed(graph.weight.sum, rounds)
    unit = statistics.median(one_pass)
    print(f"\nVGG-16's layers: {len(graph.weight):,} edges")
    line("one pass: the sum of all edges", one_pass)
    numbers, times = [100, 1_000, 10_000, 100_000], []
    for k in numbers:
        seconds, _ = timed(lambda k=k: find_paths(graph, k), rounds)
        times.append(statistics.median(seconds))
        line(f"zsu, k = {k:,}", seconds, f"{times[-1] / unit:.1f} passes")
    return numbers, times


def with_edges(rounds: int) -> tuple[list[int], list[float]]:
    print("\nk = 1,000 on wider and wider layers")
    numbers, times = [], []
    for width in (32, 64, 128, 256, 512, 1024, 2048):
        graph = layered([3, *[width] * 5, 10])
        seconds, _ = timed(lambda graph=graph: find_paths(graph, 1000), rounds)
        numbers.append(len(graph.weight))
        times.append(statistics.median(seconds))
        line(f"{numbers[-1]:,} edges", seconds)
    return numbers, times


def building(rounds: int) -> None:
    """The graph of an explanation, beside the explanation itself: batch 8 of 64 x 64."""
    print()
    for name in ("resnet50", "vgg16"):
        model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
        x, seed = torch.rand(8, 3, 64, 64), torch.ones(8, 10)
        relevance = explain(model, x, seed)
        explaining, _ = timed(lambda model=model, x=x, seed=seed: explain(model, x, seed), rounds)
        graphs, graph = timed(lambda relevance=relevance: build_graph(relevance), rounds)
        line(f"explain {name}, with edges", explaining)
        ratio = statistics.median(graphs) / statistics.median(explaining)
        line(f"its graph, {len(graph.weight):,} edges", graphs, f"{ratio:.2f} x explain")


def first_call() -> None:
    """In a fresh process, with numba's cache filled by what ran before."""
    code = "import time; t = time.perf_counter(); import sys; sys.path.insert(0, sys.argv[1]); import paths as p; "
    code += "g = p.layered(p.SMALL); t = time.perf_counter(); p.find_paths(g, 100); print(time.perf_counter() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True).stdout)
        for _ in range(3)
    ]
    print()
    line("first call after import, warm cache", seconds)


def draw(by_k, by_edges, out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    titles = ["VGG-16's graph", "k = 1,000"]
    labels = ["number of paths k", "number of edges"]
    for axis, (numbers, times), title, label in zip(axes, (by_k, by_edges), titles, labels, strict=True):
        axis.loglog(numbers, [1e3 * t for t in times], "o-")
        axis.set(title=title, xlabel=label, ylabel="find_paths (ms, median)")
        axis.grid(alpha=0.4)
    figure.savefig(out, dpi=120)


def main(
    rounds: int = 10,
    out: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path(__file__).parent / "results" / "paths.png",
):
    against_peers(rounds)
    by_k, by_edges = in_passes(rounds), with_edges(rounds)
    building(rounds)
    first_call()
    out.parent.mkdir(exist_ok=True)
    draw(by_k, by_edges, out)


if __name__ == "__main__":
    typer.run(main)
