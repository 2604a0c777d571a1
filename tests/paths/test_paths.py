"""The path search against full enumeration, on graphs of real networks and on random ones."""

import itertools
import math

import matplotlib.pyplot as plt
import networkx
import numpy as np
import pandas as pd
import pytest
import scipy.sparse.csgraph
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from torch import nn
from torch.nn import functional as F

from zsu import Composite, ZsuError, explain, explain_paths, find_paths, plots
from zsu.models import SmallCNN
from zsu.paths.graph import assemble, build_graph
from zsu.paths.search import Paths, best_through
from zsu.relevance import activations
from zsu.relevance.rules import Epsilon

TINY = Epsilon(epsilon=1e-12)


def enumerate_paths(graph):
    """All (nodes, probability) below `start`, each edge once, most probable first."""
    edges = {}
    for node in range(len(graph.run_of) - 1):
        edges[node] = [
            (int(graph.run_source[r] + m), float(graph.weight[graph.run_begin[r] + m] / max(graph.total[node], 1e-300)))
            for r in range(graph.run_of[node], graph.run_of[node + 1])
            for m in range(graph.run_length[r])
        ]
    found, open_paths = [], [((graph.start,), 1.0)]
    while open_paths:
        nodes, p = open_paths.pop()
        if nodes[-1] < graph.first[1]:
            found.append((nodes[1:], p))
        open_paths += [((*nodes, source), p * q) for source, q in edges[nodes[-1]] if q > 0]
    return sorted(found, key=lambda path: -path[1])


def numbered(paths):
    """[(nodes, probability)] of Paths."""
    return [
        (tuple(int(n) for n in nodes if n >= 0), p) for nodes, p in zip(paths.nodes, paths.probability, strict=True)
    ]


def same_paths(found, expected):
    """The same paths, probabilities and order; within a tie any order."""
    assert len(found) == len(expected)
    assert np.allclose([p for _, p in found], [p for _, p in expected], rtol=1e-9, atol=0)
    assert len({n for n, _ in found}) == len(found)
    truth = dict(expected)
    assert all(truth[nodes] == pytest.approx(p, rel=1e-9) for nodes, p in found)
    assert all(a >= b * (1 - 1e-12) for (_, a), (_, b) in itertools.pairwise(found))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(3 * 4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.a(x)).relu()
        x = self.b(x).add_(x)
        return self.fc(x.flatten(1))


class Concatenation(nn.Module):
    """DenseNet and Inception in small: BatchNorm, a convolution, and an addition over concatenations."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(5, 5, 1)
        self.bn, self.last, self.fc = nn.BatchNorm2d(5), nn.Conv2d(5, 2, 2), nn.Linear(2, 3)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        return self.fc(self.last(x + self.c(self.bn(x).relu())).flatten(1))


NETS = {
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3, 3)
    ),
    "flatten": lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3)),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 3)
    ),
    "BatchNorm1d after flatten": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    ),
    "residual": Residual,
    "concatenation": Concatenation,
}


def block_diagonal(edges, groups):
    """Edges (K, J / groups) of a grouped convolution as a matrix (K, J)."""
    return torch.block_diag(*edges.chunk(groups))


def at(rows, matrix, n):
    """The matrix in those rows of n, zeros in the others."""
    out = torch.zeros(n, matrix.shape[1], dtype=matrix.dtype)
    out[rows] = matrix
    return out


def structure(name, r):
    """What the network is, written by hand: (target layer, source layer, edge relevance (K, J)) for each connection."""
    e, diag = r.edges, torch.diag
    add = [n.edges for n in r.layers if n.kind == "add"]
    return {
        "sequential": lambda: [("5", "2", e["5"]), ("2", "0", e["2"]), ("0", "input", e["0"])],
        "flatten": lambda: [
            ("4", "3", e["4"]), ("3", "0", e["3"].reshape(5, 4, 9).sum(2)), ("0", "input", e["0"])
        ],
        "groups": lambda: [
            ("4", "2", e["4"]), ("2", "0", block_diagonal(e["2"], 2)), ("0", "input", block_diagonal(e["0"], 2))
        ],
        "BatchNorm1d after flatten": lambda: [
            ("5", "3", e["5"]),
            ("3", "0", torch.eye(3).double().repeat_interleave(4, 0) * e["3"]),
            ("0", "input", e["0"]),
        ],
        "residual": lambda: [
            ("fc", "add#2", e["fc"].reshape(3, 3, 4).sum(2)),
            ("add#2", "b", diag(add[1][0])), ("add#2", "add", diag(add[1][1])), ("b", "add", e["b"]),
            ("add", "stem", diag(add[0][0])), ("add", "a", diag(add[0][1])), ("a", "stem", e["a"]),
            ("stem", "input", e["stem"]),
        ],
        "concatenation": lambda: [
            ("fc", "last", e["fc"]), ("last", "add", e["last"]),
            ("add", "a", at([0, 1, 2], diag(add[0][0][:3]), 5)), ("add", "b", at([3, 4], diag(add[0][0][3:]), 5)),
            ("add", "c", diag(add[0][1])), ("c", "bn", e["c"]),
            ("bn", "a", at([0, 1, 2], diag(e["bn"][:3, 0]), 5)), ("bn", "b", at([3, 4], diag(e["bn"][3:, 0]), 5)),
            ("a", "input", e["a"]), ("b", "input", e["b"]),
        ],
    }[name]()  # fmt: skip


def enumerate_by_hand(name, r):
    """All ([(layer, channel), ...], probability) from the edges of an explanation, most probable first."""
    weights = {}  # (layer, channel) -> {(layer, channel) below: positive relevance}
    for target, source, matrix in structure(name, r):
        for k, row in enumerate(matrix.tolist()):
            below = weights.setdefault((target, k), {})
            below |= {(source, j): value for j, value in enumerate(row) if value > 0}

    def completions_of(node):
        """[(path, probability)] from a node, over edges that lead to the input only."""
        if node[0] == "input":
            return [((node,), 1.0)]
        rest = {below: completions_of(below) for below in weights[node]}
        total = sum(weights[node][below] for below in rest if rest[below])
        return [((node, *path), weights[node][below] / total * p) for below in rest for path, p in rest[below]]

    top = r.layers[-1]
    weights["start", 0] = {(top.name, k): v for k, v in enumerate(top.relevance.sum(0).tolist()) if v > 0}
    return sorted([(path[1:], p) for path, p in completions_of(("start", 0))], key=lambda path: -path[1])


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def explained(name, rule="z+"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = NETS[name]().double().eval()
        for p in model.parameters():
            p.data += 0.1  # so that many edges are positive
        x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    return explain(model, x, torch.ones(5, 3).double(), rule)


# --- real networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["epsilon", "z+"])
@pytest.mark.parametrize("name", NETS)
def test_all_paths_of_a_network_equal_enumeration(name, rule):
    result = explained(name, rule)
    expected = enumerate_by_hand(name, result)
    assert len(expected) > 20
    paths = find_paths(result, min_probability=1e-300)
    same_paths([(tuple(path), p) for path, p in zip(paths, paths.probability, strict=True)], expected)
    assert paths.probability.sum() == pytest.approx(1, abs=1e-9)
    assert paths.share[-1] == pytest.approx(1, abs=1e-9)
    assert len(paths) == len(expected)
    for k in (1, 7, len(expected) - 1):
        fewer = find_paths(result, k)
        assert len(fewer) == k
        assert np.array_equal(fewer.nodes, paths.nodes[:k])
        assert np.array_equal(fewer.probability, paths.probability[:k])


def test_paths_are_deterministic_and_the_relevance_is_left_alone():
    result = explained("residual")
    edges = {name: e.clone() for name, e in result.edges.items()}
    first, second = find_paths(result, 50), find_paths(result, 50)
    assert np.array_equal(first.nodes, second.nodes)
    assert np.array_equal(first.probability, second.probability)
    assert all(torch.equal(e, edges[name]) for name, e in result.edges.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unmodified_resnet18_and_small_cnn(dtype):
    """Long paths and skips: the first of 2,000 paths are the first of 100, each is a chain of the graph."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = torchvision.models.resnet18(num_classes=5), SmallCNN(5, 3)
        x = torch.randn(2, 3, 32, 32, dtype=dtype)
    for net in nets:
        result = explain(net.to(dtype).eval(), x, torch.ones(2, 5, dtype=dtype), "z+")
        graph = build_graph(result)
        paths = find_paths(graph, 2000)
        assert np.array_equal(find_paths(result, 100).nodes, paths.nodes[:100])
        targets, sources = graph.ends(np.arange(len(graph.weight)))
        assert graph.weight.dtype == (np.float32 if dtype == torch.float32 else np.float64)
        probability = {
            (int(k), int(j)): w / graph.total[k]
            for k, j, w in zip(targets, sources, graph.weight, strict=True)
            if w > 0
        }
        for nodes, p in list(zip(paths.nodes, paths.probability, strict=True))[::100]:
            nodes = [graph.start, *nodes[nodes >= 0].tolist()]
            steps = [probability[edge] for edge in itertools.pairwise(nodes)]
            assert np.prod(steps) == pytest.approx(p, rel=1e-9)
            assert nodes[-1] < graph.first[1]


def test_unmodified_vit_and_densenet():
    """Norms, attention and the residual stream; concatenations of dozens of parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = torchvision.models.VisionTransformer(16, 8, 2, 2, 12, 24, num_classes=5)
        torch.nn.init.normal_(vit.heads.head.weight)
        densenet = torchvision.models.densenet121(num_classes=5)
        x = torch.randn(2, 3, 32, 32)
    vit_paths = find_paths(explain(vit.eval(), x[:, :, :16, :16], torch.ones(2, 5)), 500)
    names = {layer for path in vit_paths for layer, _ in path}
    block = "encoder.layers.encoder_layer_1."
    wanted = {"input", "conv_proj", "add", "encoder.ln", block + "ln_2", block + "mlp.3", block + "self_attention.v"}
    assert wanted <= names
    paths = find_paths(explain(densenet.eval(), x, torch.ones(2, 5), "epsilon-plus"), 500)
    assert (np.diff(paths.probability) <= 0).all()
    assert {path[-1][0] for path in paths} == {"input"}


@pytest.mark.parametrize("name", ["sequential", "residual", "concatenation"])
def test_visits_are_the_relevance_of_channels_where_all_of_it_is_positive(name):
    """z+ on positive inputs and a positive seed, without bias: nothing is lost, nothing negative."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = NETS[name]().double().eval()
    for key, p in model.named_parameters():
        p.data = p.data.abs()
        if key.endswith("bias"):
            p.data.zero_()
    result = explain(model, rand(4, 2, 4, 4).abs(), 1, "z+")
    graph = build_graph(result)
    whole = float(result.seed.sum())
    for layer, visits in graph.visits_by_layer().items():
        assert np.allclose(visits, result.nodes[layer].sum(0) / whole, atol=1e-5)
    assert (graph.ledger[["dead end", "negative"]] == 0).all(axis=None)
    assert np.allclose(graph.ledger["kept"] / whole, 0, atol=1e-5)


MOVED = {
    "pooled channels": (lambda m, x: m.one(F.max_pool3d(m.a(x)[:, None], (3, 1, 1))[:, 0]).mean((2, 3)), "one"),
    "mixed by a matrix": (lambda m, x: m.c(torch.matmul(m.mixing, m.a(x).flatten(2))).mean(2), "c"),
    "two heads": (lambda m, x: two_heads(m.b(m.a(x)), m.b(x[:, :1].expand(-1, 3, -1, -1))), "b"),
}
KEPT = {
    "padded channels": lambda m, x: m.four(F.pad(m.a(x), (0, 0, 0, 0, 1, 0))).mean((2, 3)),
    "rolled": lambda m, x: m.b(torch.roll(m.a(x), 1, 1)).mean((2, 3)),
    "flipped": lambda m, x: m.b(m.a(x).flip(1)).mean((2, 3)),
    "padded positions": lambda m, x: m.b(F.pad(m.a(x), (1, 0, 0, 2))).mean((2, 3)),
    "rolled positions": lambda m, x: m.b(torch.roll(m.a(x), 1, 2)).mean((2, 3)),
    "expanded": lambda m, x: m.five(torch.cat([m.one_out(x).expand(-1, 2, -1, -1), m.a(x)], 1)).mean((2, 3)),
    "broadcast": lambda m, x: m.b(m.bn(m.one_out(x) * m.scale)).mean((2, 3)),
    "one position": lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True)).flatten(1),
}


def two_heads(a, b):
    return torch.cat([a.mean((2, 3)).unsqueeze(2), b.mean((2, 3)).unsqueeze(2)], 2).mean(2)


class Moves(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.mixing, self.scale = run, torch.rand(3, 3).double(), torch.rand(3, 1, 1).double()
        self.a, self.one_out, self.bn = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 1, 1), nn.BatchNorm2d(3)
        self.five = nn.Conv2d(5, 2, 1)
        self.b, self.four, self.one, self.c = (
            nn.Conv2d(3, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv1d(3, 2, 1)
        )  # fmt: skip

    def forward(self, x):
        return self.run(self, x)


def positive(run):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Moves(run).double().eval()
    for key, p in model.named_parameters():
        p.data = p.data.abs()
        if key.endswith("bias"):
            p.data.zero_()
    return model


@pytest.mark.parametrize("name", MOVED)
def test_what_mixes_channels_is_explained_but_has_no_paths(name):
    run, layer = MOVED[name]
    result = explain(positive(run), rand(2, 2, 4, 4).abs(), 1)
    assert float(result.input.sum()) == pytest.approx(float(result.seed.sum()), rel=1e-4)
    with pytest.raises(ZsuError, match=f"^{layer}.*: (an operation before|the last layer does not)"):
        build_graph(result)


@pytest.mark.parametrize("name", KEPT)
def test_what_leaves_moves_or_repeats_channels_has_the_right_visits(name):
    result = explain(positive(KEPT[name]), rand(2, 2, 4, 4).abs(), 1, "z+")
    for layer, visits in build_graph(result).visits_by_layer().items():
        assert np.allclose(visits, result.nodes[layer].sum(0) / result.seed.sum(), atol=1e-4)


def test_one_sample_and_one_channel_are_told_apart():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().eval()
    (sources,) = explain(model, rand(1, 1, 4, 4), 1).layers[1].sources
    assert sources.tolist() == [0] * 16


def test_an_auxiliary_head_after_the_logits_is_no_layer():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc, self.aux = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            x = self.a(x).relu()
            logits = self.fc(x)
            self.aux(x)
            return logits

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Auxiliary().double().eval()
    x = rand(3, 4)
    result = explain(model, x, torch.ones(3, 2).double())
    paths = find_paths(result, min_probability=1e-300)
    assert paths[0][0][0] == "fc"
    assert explain_paths(model, x, 1, [paths[0]]).shape == (1, 3, 4)


def test_ledger_of_the_graph_says_what_is_not_walked():
    result = explained("sequential", "epsilon")
    graph = build_graph(result)
    for row in graph.ledger.itertuples(index=False):
        edges = result.edges[row.layer]
        assert row.walked + row[2] == pytest.approx(float(edges.clamp(min=0).sum()))
        assert row.negative == pytest.approx(float(edges.clamp(max=0).sum()))
        kept = result.ledger.set_index("layer").loc[row.layer, ["bias", "stabiliser", "constant"]].sum()
        assert row.kept == pytest.approx(kept)


def test_channels_read_twice_by_one_layer_are_one_edge():
    """x + x, and a convolution over cat([x, x]): no two paths have the same nodes."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(2, 3, 1), nn.Conv2d(6, 2, 1), nn.Linear(2, 2)

        def forward(self, x):
            x = self.a(x).relu()
            x = x + x
            return self.fc(self.b(torch.cat([x, x], 1)).relu().mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Twice().double().eval()
    for p in model.parameters():
        p.data = p.data.abs()
    result = explain(model, rand(2, 2, 3, 3).abs(), torch.ones(2, 2).double(), "z+")
    paths = find_paths(result, min_probability=1e-300)
    assert len({tuple(n) for n in paths.nodes}) == len(paths) > 3
    assert paths.probability.sum() == pytest.approx(1, abs=1e-9)
    b = result.edges["b"]
    fc, start = result.edges["fc"], result.seed.sum(0) / result.seed.sum()
    expected = start @ (fc / fc.sum(1, keepdim=True)) @ ((b[:, :3] + b[:, 3:]) / b.sum(1, keepdim=True))
    assert np.allclose(build_graph(result).visits_by_layer()["add"], expected, atol=1e-9)


def walks(result):
    """Every path from a logit to the input, over edges of either sign, as [(layer, channel), ...]."""
    below, channels = {}, [(layer.name, c) for layer in result.layers for c in range(layer.relevance.shape[1])]
    for node in result.layers[1:]:
        for sources in node.sources:
            width = node.relevance.shape[1]
            for k in range(width):
                read = sources[[k]] if node.kind == "add" or node.groups == 0 else sources
                if node.groups > 1:
                    read = np.split(sources, node.groups)[k // (width // node.groups)]
                below.setdefault((node.name, k), []).extend(channels[n] for n in read if n >= 0)
    done, open_walks = [], [[(result.layers[-1].name, k)] for k in range(result.logits.shape[1])]
    while open_walks:
        walk = open_walks.pop()
        if walk[-1][0] == "input":
            done.append(walk)
        open_walks += [[*walk, b] for b in dict.fromkeys(below.get(walk[-1], []))]
    return done


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "flat first"])
@pytest.mark.parametrize("name", ["sequential", "groups", "residual", "concatenation"])
def test_maps_of_all_paths_sum_to_the_input_relevance(name, rule):
    rules = Composite(conv="gamma", first="flat") if rule == "flat first" else rule
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = NETS[name]().double().eval()
    x, seed = rand(2, 2, 4, 4), torch.ones(2, 3).double()
    result = explain(model, x, seed, rules)
    maps = explain_paths(model, x, seed, walks(result), rules)
    assert torch.allclose(maps.sum(0), result.input, atol=1e-9 * float(result.input.abs().max()))
    assert (maps.abs().sum((1, 2, 3, 4)) > 0).sum() > 10


def test_map_of_one_path_by_hand():
    """x -> (a, b) -> fc: by way of channel 1 of the first layer and input 0 goes w2[1] w1[1, 0] x[0]."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double().eval()
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double()
    model[1].weight.data = torch.tensor([[1.0, 2.0]]).double()
    x = torch.tensor([[2.0, 1.0]]).double()
    maps = explain_paths(model, x, 0, [[("1", 0), ("0", 1), ("input", 0)], [("1", 0), ("0", 0), ("input", 1)]], TINY)
    assert torch.allclose(maps, torch.tensor([[[12.0, 0.0]], [[0.0, 2.0]]]).double(), atol=1e-9)


def test_maps_through_a_vit_and_of_paths_that_are_none():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 4, 6, num_classes=2).double().eval()
        torch.nn.init.normal_(vit.heads.head.weight)
    x = rand(2, 3, 16, 16)
    result = explain(vit, x, 1)
    every = [walk for walk in walks(result) if walk[0] == ("heads.head", 1) and walk[-1][1] == 0]
    skipping = [walk for walk in every if len(walk) == 6]
    attending = [walk for walk in every if len(walk) == 9 and walk[5][0].endswith("self_attention.v")]
    assert explain_paths(vit, x, 1, skipping).abs().max() == 0  # the class token alone gets to the head that way
    maps = explain_paths(vit, x, 1, attending[:50])
    assert maps[:, :, 1:].abs().max() == 0 < maps.abs().max()
    path = attending[0]
    for wrong, match in (
        (path[1:], "not from the logits to the input"),
        ([*path[:-1]], "not from the logits to the input"),
        ([path[0], ("nowhere", 1), path[-1]], "no layer is called 'nowhere'"),
        ([path[0], (path[1][0], 9), *path[2:]], "channel 9 of 4"),
        ([path[0], path[-1]], "nothing leads to input"),
        (("heads.head", 1), "is no path. pass a list of paths"),
    ):
        with pytest.raises(ZsuError, match=match):
            explain_paths(vit, x, 1, [wrong])
    assert explain_paths(vit, x, 1, []).shape == (0, 2, 3, 16, 16)


def test_activations_are_what_the_modules_put_out():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallCNN(5, 3).double().eval()
    x = rand(4, 3, 32, 32)
    channels = [("head", 2), ("conv2", 3), ("input", 1)]
    found = activations(model, x, channels)
    seen = {}
    for name in ("conv2", "head"):
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    model(x)
    expected = [seen["head"][:, 2], seen["conv2"][:, 3].mean((1, 2)), x[:, 1].mean((1, 2))]
    assert torch.allclose(found, torch.stack(expected, 1))
    for channel, match in ((("conv9", 0), "no layer is called 'conv9'"), (("conv2", 99), "conv2: channel 99 of")):
        with pytest.raises(ZsuError, match=match):
            activations(model, x, [channel])
    norm = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1), nn.Flatten()
    )
    norm, expected = norm.double().eval(), norm[:2].double()(x).mean((2, 3))
    assert torch.allclose(activations(norm, x, [("1", c) for c in range(4)]), expected)


def test_figures_of_paths_show_the_numbers():
    result = explained("residual", "epsilon")
    graph, found = build_graph(result), find_paths(result, 40)
    figure = plots.paths(found, 40)
    (lines,) = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    steps = {e for nodes, _ in numbered(found) for e in itertools.pairwise(nodes)}
    assert len(lines.get_segments()) == len(steps)
    assert "40 most probable" in figure.axes[0].get_title()
    bars = plots.walked(graph).axes[0].containers
    walked = [bar.get_width() for bar in bars[0]]
    whole = graph.ledger[["walked", "dead end", "negative", "kept"]].abs().sum(axis=1)
    assert walked == pytest.approx((100 * graph.ledger["walked"] / whole).tolist())
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 2) / 5
    score = torch.tensor([[0.0, 9], [1, 8], [2, 7], [3, 6], [4, 5]])
    axes = plots.activating(images, score, [("fc", 1), ("a", 2)], 2).axes
    assert [float(a.images[0].get_array()[0, 0]) for a in axes] == pytest.approx([0.8, 0.6, 0, 0.2])
    plt.close("all")


def test_to_frame_save_and_load(tmp_path):
    paths = find_paths(explained("residual"), 40)
    frame = paths.to_frame()
    for path, (_, row) in zip(paths, frame.iterrows(), strict=True):
        assert {layer: row[layer] for layer in paths.layers if row[layer] is not pd.NA} == dict(path)
    assert frame["share"].iloc[-1] == pytest.approx(paths.probability.sum())
    paths.save(tmp_path / "paths.npz")
    loaded = Paths.load(tmp_path / "paths.npz")
    assert list(loaded) == list(paths)
    assert np.array_equal(loaded.probability, paths.probability)
    assert list(paths[3:5]) == [paths[3], paths[4]]
    (tmp_path / "other.npz").write_bytes(b"no paths")
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    (tmp_path / "array.npz.npy").rename(tmp_path / "array.npz")
    for name in ("other.npz", "missing.npz", "array.npz"):
        with pytest.raises(ZsuError, match=f"{name}: no file of paths"):
            Paths.load(tmp_path / name)


# --- random graphs --------------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """A layered graph with skips, as `assemble` takes it: each node sees a few runs of nodes in layers below; some
    edges are negative, some 0, some tie.
    """
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    first = np.concatenate([[0], np.cumsum(sizes)])
    value = st.sampled_from([-1.0, 0.0, 1.0, 1.0, 2.0]) | st.floats(0.01, 5)
    blocks, values = [], []
    for layer in range(1, len(sizes) + 1):
        for node in range(sizes[layer] if layer < len(sizes) else 1):  # the last node is `start`
            below = draw(st.sets(st.integers(0, layer - 1), min_size=1))
            for b in sorted(below):
                row = draw(st.lists(value, min_size=sizes[b], max_size=sizes[b]))
                blocks.append(([first[layer] + node], [len(values)], [len(row)], [first[b]]))
                values += row
    return [str(n) for n in range(len(sizes))], first, np.array(values), blocks, [0.0] * len(sizes)


def chain(layers, first, values, blocks, _):
    """{node: {source: p}} in plain Python; empty where nothing leads to the input."""
    below = {k: {} for k in range(first[-1] + 1)}
    for k, begin, length, source in (run for block in blocks for run in zip(*block, strict=True)):
        below[k] |= {int(source) + m: max(float(values[begin + m]), 0) for m in range(length)}
    for k in range(first[1], first[-1] + 1):
        walked = {j: w for j, w in below[k].items() if w > 0 and (j < first[1] or below[j])}
        below[k] = {j: w / sum(walked.values()) for j, w in walked.items()}
    return below


def all_paths(below, node, inputs):
    """All (nodes, probability) from a node down."""
    if node < inputs:
        return [((), 1.0)]
    return [((j, *path), p * q) for j, p in below[node].items() for path, q in all_paths(below, j, inputs)]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(graphs(), st.integers(1, 40), st.data())
def test_search_equals_enumeration_on_random_graphs(parts, k, data):
    layers, first, *_ = parts
    below = chain(*parts)
    expected = sorted(all_paths(below, int(first[-1]), first[1]), key=lambda path: -path[1])
    if not expected:
        with pytest.raises(ZsuError, match="no positive relevance"):
            assemble(layers, first, parts[2].copy(), *parts[3:])
        return
    graph = assemble(layers, first, parts[2].copy(), *parts[3:])
    every = find_paths(graph, min_probability=1e-300)
    same_paths(numbered(every), expected)
    assert every.probability.sum() == pytest.approx(1, abs=1e-9)
    k = min(k, len(expected))
    assert np.array_equal(find_paths(graph, k).nodes, every.nodes[:k])

    p = data.draw(st.sampled_from([p for _, p in expected])) * (1 - 1e-9)
    assert len(find_paths(graph, min_probability=p)) == sum(q >= p for _, q in expected)
    coverage = data.draw(st.floats(0.01, 0.99))
    enough = find_paths(graph, coverage=coverage)
    assert enough.share[-1] >= coverage
    assert len(enough) == 1 or enough.share[-2] < coverage

    node = data.draw(st.integers(0, int(first[-1]) - 1))
    layer = int(np.searchsorted(first, node, side="right")) - 1
    channel = layers[layer], int(node - first[layer])
    for chosen, options in (
        ([e for e in expected if node in e[0]], {"through": channel}),
        ([e for e in expected if node not in e[0]], {"avoid": [channel]}),
    ):
        if chosen:
            same_paths(numbered(find_paths(graph, len(chosen), **options)), chosen)
            with pytest.warns(UserWarning, match=f"there are only {len(chosen)} paths"):
                find_paths(graph, len(chosen) + 1, **options)
        else:
            with pytest.raises(ZsuError, match="no path is left"):
                find_paths(graph, 1, **options)

    edges = {}
    for nodes, q in expected:
        for edge in zip((graph.start, *nodes), nodes, strict=False):
            edges.setdefault(edge, []).append(q)
    ends = list(zip(*(e.tolist() for e in graph.ends(np.arange(len(graph.weight)))), strict=True))
    assert np.allclose(graph.flow(), [sum(edges.get(e, [])) for e in ends], atol=1e-12)
    visited = [sum(q for nodes, q in expected if n in nodes) for n in range(graph.start)]
    assert np.allclose(graph.visits(), [*visited, 1], atol=1e-12)
    used = graph.flow() > 0
    most = np.array([max(edges.get(e, [0])) for e in ends])
    assert np.allclose(np.exp(best_through(graph))[used], most[used], rtol=1e-9)


def wide(sizes, seed, ties=False):
    """A graph with all channels joined to all of the next layer, as `assemble` takes it."""
    rng = np.random.default_rng(seed)
    first = np.concatenate([[0], np.cumsum(sizes)])
    values, blocks, size = [], [], 0
    for n, (j, k) in enumerate(zip(sizes, [*sizes[1:], 1], strict=True), start=1):
        values.append(rng.integers(1, 4, k * j).astype(float) if ties else rng.lognormal(0, 2, k * j))
        blocks.append((first[n] + np.arange(k), size + np.arange(k) * j, np.full(k, j), np.full(k, first[n - 1])))
        size += k * j
    return [str(n) for n in range(len(sizes))], first, np.concatenate(values), blocks, [0.0] * len(sizes)


@pytest.mark.parametrize("ties", [False, True])
def test_hundreds_of_children_are_all_found_and_in_order(ties):
    """More than are sorted at first, with an open list that is cut back on the way."""
    parts = wide([2, 300, 4, 3], 0, ties)
    graph = assemble(*parts[:2], parts[2].copy(), *parts[3:])
    every = find_paths(graph, min_probability=1e-300)
    same_paths(numbered(every), sorted(all_paths(chain(*parts), graph.start, 2), key=lambda path: -path[1]))
    assert len(every) == 2 * 300 * 4 * 3
    for k in (1, 50, 3000, 7200):
        assert np.array_equal(find_paths(graph, k).nodes, every.nodes[:k])


def test_networkx_and_scipy_find_the_same_probabilities():
    parts = wide([1, 16, 32, 24, 10], 1)
    graph = assemble(*parts[:2], parts[2].copy(), *parts[3:])
    below, sink = chain(*parts), graph.start + 1
    net = networkx.DiGraph()
    net.add_weighted_edges_from((k, j, -math.log(p)) for k, row in below.items() for j, p in row.items())
    net.add_edge(0, sink, weight=1e-15)
    ours = find_paths(graph, 200)
    found = list(itertools.islice(networkx.shortest_simple_paths(net, graph.start, sink, "weight"), 200))
    assert [path[1:-1] for path in found] == [list(nodes) for nodes, _ in numbered(ours)]
    matrix = networkx.to_scipy_sparse_array(net, nodelist=range(sink + 1), dtype=float)
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
    costs = scipy.sparse.csgraph.yen(matrix, graph.start, sink, 200)
    assert np.allclose(np.exp(-costs), ours.probability, rtol=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(graphs(), st.integers(0, 2**31))
def test_contrast_is_the_chain_of_what_goes_beyond_the_reference(parts, seed):
    layers, first, values, blocks, kept = parts
    other = values * np.random.default_rng(seed).choice([0.2, 1.0, 3.0], len(values))
    if not all(chain(layers, first, v, blocks, kept)[int(first[-1])] for v in (values, other)):
        return
    own, reference = (assemble(layers, first, v.copy(), blocks, kept) for v in (values, other))
    beyond = own.flow() - reference.flow()
    if not chain(layers, first, beyond, blocks, kept)[int(first[-1])]:
        return
    below = chain(layers, first, beyond, blocks, kept)
    expected = sorted(all_paths(below, int(first[-1]), first[1]), key=lambda path: -path[1])
    same_paths(numbered(find_paths(own, min_probability=1e-300, against=reference)), expected)


@pytest.mark.parametrize("name", NETS)
def test_flow_is_the_sum_over_the_paths_through_an_edge(name):
    graph = build_graph(explained(name))
    paths = find_paths(graph, min_probability=1e-300)
    flow = np.zeros(len(graph.weight))
    targets, sources = graph.ends(np.arange(len(flow)))
    index = {(int(t), int(s)): e for e, (t, s) in enumerate(zip(targets, sources, strict=True))}
    assert len(index) == len(flow)
    for nodes, p in numbered(paths):
        for edge in zip((graph.start, *nodes), nodes, strict=False):
            flow[index[edge]] += p
    assert np.allclose(graph.flow(), flow, atol=1e-12)


def test_layers_and_channels_have_numbers():
    graph = build_graph(explained("residual"))
    assert graph.layers == ["input", "stem", "a", "add", "b", "add#2", "fc"]
    assert [graph.number(*c) for c in (("input", 0), ("stem", 0), ("fc", 2))] == [0, 2, graph.start - 1]
    for channel, match in ((("conv9", 0), "no layer is called 'conv9'. use one of"), (("fc", 3), "fc: channel 3 of 3")):
        with pytest.raises(ZsuError, match=match):
            find_paths(graph, 3, through=channel)
        with pytest.raises(ZsuError, match=match):
            find_paths(graph, 3, avoid=[channel])


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 3, "through": ("fc",)}, "is no channel. pass"),
        ({"k": 3, "through": "fc"}, "is no channel. pass"),
        ({"k": 3, "through": ("fc", "0")}, "fc: channel '0' of 3"),
        ({"k": 3, "through": ("fc", 1.5)}, "fc: channel 1.5 of 3"),
        ({"k": 3, "avoid": ("fc", 0)}, "'fc' is no channel"),
        ({"k": 3, "avoid": [("fc", -1)]}, "fc: channel -1 of 3"),
        ({"min_probability": None}, "min_probability is None"),
        ({"coverage": "half"}, "coverage is 'half'"),
        ({"coverage": 0.0}, "coverage is 0.0"),
        ({"min_probability": 2}, "min_probability is 2"),
        ({"k": 3, "against": explained("residual")}, "with this reference: no positive relevance"),
        ({"k": 3, "against": "runner-up"}, "with this reference: a str. explain the same model"),
    ],
)
def test_options_that_are_refused(options, match):
    with pytest.raises(ZsuError, match=match):
        find_paths(explained("residual"), **options)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None, "3"])
def test_k_that_is_no_number_of_paths_is_refused(k):
    with pytest.raises(ZsuError, match="no limit. give k" if k is None else f"k is {k!r}. pass an integer k >= 1"):
        find_paths(explained("sequential"), k)


def test_explanation_without_edges_is_refused():
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with pytest.raises(ZsuError, match=r"0: edges were not computed. call explain\(..., edges=True\)"):
        find_paths(explain(model, torch.ones(1, 3), 0, edges=False), 5)


def test_cycles_and_disconnected_graphs_are_refused():
    layers, first, values, blocks, kept = wide([2, 3, 2], 0)
    upwards = [*blocks[:1], (*blocks[1][:3], blocks[1][3] + 3), *blocks[2:]]  # layer 2 reads itself
    with pytest.raises(ZsuError, match="a layer has a source that is not below it. take out the cycle"):
        assemble(layers, first, values.copy(), upwards, kept)
    values[6:12] = 0  # between the layers 1 and 2
    with pytest.raises(ZsuError, match="no positive relevance leads from the logit to the input"):
        assemble(layers, first, values.copy(), blocks, kept)
    values[0] = np.nan
    with pytest.raises(ZsuError, match="not finite"):
        assemble(layers, first, values.copy(), blocks, kept)
    small, large = (assemble(*wide([2, width], 0)) for width in (3, 4))
    with pytest.raises(ZsuError, match="with this reference: the graphs are of different models"):
        find_paths(small, 3, against=large)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_edges_that_are_not_finite_are_refused(value):
    result = explained("sequential")
    result.edges["2"][0, 0] = value
    with pytest.raises(ZsuError, match="not finite"):
        find_paths(result, 5)


def test_class_without_positive_relevance_is_refused():
    model = nn.Linear(2, 2, bias=False).eval()
    model.weight.data[:] = -1
    with pytest.raises(ZsuError, match="no positive relevance leads from the logit to the input. explain samples"):
        find_paths(explain(model, torch.ones(3, 2), 0), 5)


class MixesPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv1d(1, 9, 1), nn.Linear(9, 9), nn.Linear(9, 2)

    def forward(self, x):
        return self.fc(self.mix(self.conv(x.flatten(2))).mean(2))


def test_layers_whose_sources_are_unknown_are_refused_by_name():
    result = explain(MixesPositions().eval(), torch.rand(2, 1, 3, 3), 0)
    with pytest.raises(ZsuError, match="mix: an operation before this layer mixes or rearranges channels"):
        find_paths(result, 5)
