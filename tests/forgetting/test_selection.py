"""Which neurons and connections: worked out by hand."""

import copy
import warnings

import pandas as pd
import pytest
import torch
from torch import nn

from zsu import ZsuError, explain, find_paths, forget
from zsu.forgetting.perturb import perturb
from zsu.forgetting.selection import (
    count_in_top,
    hidden_layers,
    highest,
    incoming_weights,
    logit_layers,
    select_neurons,
    weight_blocks,
)
from zsu.relevance.layers import Layer, Share

pytestmark = pytest.mark.filterwarnings("ignore:3 samples are few")


def most_frequent(relevance, k, number):
    return highest(count_in_top(Share(Layer("linear", "fc"), torch.tensor(relevance)), k), number).tolist()


def test_most_frequent_by_hand():
    """Three samples, five neurons, k = 2: neuron 4 is in three lists, 0 in two, 2 in one; 1 and 3 in none."""
    relevance = [[3.0, 0, 0, 1, 4], [5, 1, 0, 0, 2], [0, -1, 1, 0, 9]]
    assert most_frequent(relevance, 2, 2) == [4, 0]
    assert most_frequent(relevance, 2, 4) == [4, 0, 2]  # nobody's choice is never taken
    assert most_frequent(relevance, 1, 1) == [4]


def test_most_frequent_breaks_ties_by_relevance_and_ignores_what_is_not_positive():
    relevance = [[1.0, 0, 0], [0, 0, 2], [-1, -2, -3]]
    assert most_frequent(relevance, 1, 1) == [2]
    assert most_frequent(relevance, 3, 6) == [2, 0]
    assert most_frequent([[-1.0, -1, -1]], 1, 1) == []
    assert most_frequent([[1.0, 1, 1, 1]], 2, 4) == [0, 1]  # of equals the first are counted


@pytest.mark.parametrize("by", ["frequency", "marginal", "path", "contrast"])
def test_neurons_selected_by_enumeration(by):
    """All paths of a small network, listed; k neurons of each hidden layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    for p in model.parameters():
        p.data.abs_()
    x = torch.rand(6, 4).double()
    own, other = (explain(model, x, target, "z+") for target in (1, 2))
    paths, others = (find_paths(r, min_probability=1e-300) for r in (own, other))

    def score(channel):
        through = [sum(p for path, p in zip(f, f.probability, strict=True) if channel in path) for f in (paths, others)]
        return {
            "frequency": lambda: (
                own.nodes[channel[0]].topk(2).indices.eq(channel[1]).sum().item()
                + own.nodes[channel[0]][:, channel[1]].sum().item() / 1e3
            ),
            "marginal": lambda: through[0],
            "path": lambda: max(p for path, p in zip(paths, paths.probability, strict=True) if channel in path),
            "contrast": lambda: through[0] - through[1],
        }[by]()

    neurons = select_neurons(own, by, 2, **({"against": other} if by == "contrast" else {}))
    assert list(neurons) == ["0", "2"]
    for name, chosen in neurons.items():
        scores = {c: score((name, c)) for c in range(own.nodes[name].shape[1])}
        expected = sorted((c for c in scores if scores[c] > 0), key=lambda c: -scores[c])[:2]
        assert chosen.tolist() == expected
    selection = incoming_weights(model, own, neurons)
    patch = perturb(model, selection)
    patch.apply(model)
    assert set(selection) == {"0.weight", "2.weight"}
    zero = [(model[int(name)].weight == 0).all(1).nonzero().flatten().tolist() for name in neurons]
    assert zero == [sorted(n.tolist()) for n in neurons.values()]


def test_selections_that_are_refused():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).eval(), torch.rand(2, 4)
    result = explain(model, x, torch.ones(2, 3))
    for options, match in (
        ({"by": "size"}, "selection by 'size'. use 'frequency'"),
        ({"by": "contrast"}, "by 'contrast' needs a reference"),
        ({"by": "path", "against": result}, "by 'path' takes no reference"),
        ({"k": 6}, "0: k is 6, the layer has 5 neurons"),
        ({"k": 6, "by": "path"}, "0: k is 6, the layer has 5 neurons"),
        ({"k": 0}, "k is 0. pass an integer k >= 1"),
        ({"k": 1.5, "by": "marginal"}, "k is 1.5. pass an integer"),
    ):
        with pytest.raises(ZsuError, match=match):
            select_neurons(result, **options)
    for neurons, match in (({"2": [0]}, "no layer with weights is called '2'"), ({"0": [9]}, "0: channel 9 of 5")):
        with pytest.raises(ZsuError, match=match):
            incoming_weights(model, result, neurons)


class Mixed(nn.Module):
    """Groups, a residual addition, a concatenation and a flatten with 4 positions, every weight positive."""

    def __init__(self):
        super().__init__()
        self.stem, self.groups = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.a, self.b = nn.Conv2d(4, 3, 2), nn.Conv2d(4, 2, 2)
        self.join, self.fc = nn.Conv2d(5, 3, 1), nn.Linear(12, 3)
        for p in self.parameters():
            p.data.abs_()

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.groups(x)
        return self.fc(self.join(torch.cat([self.a(x), self.b(x)], 1)).flatten(1))


def test_flat_indices_are_exactly_the_weights_between_two_channels():
    """Zero the weights of an edge: its relevance becomes 0, and that of no other edge of the layer does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Mixed().double().eval(), torch.rand(2, 2, 4, 4, dtype=torch.float64)
    result = explain(model, x, 1)
    edges = all_edges(result)
    checked = 0
    for name, ranks, flat in weight_blocks(model, result, edges):
        for rank, indices in zip(ranks.tolist(), flat, strict=True):
            row = edges.loc[rank]
            assert name == f"{row['layer']}.weight"
            cut = perturb(model, {name: indices}).apply(copy.deepcopy(model))
            after = channel_edges(explain(cut, x, 1))[row["layer"], row["below_name"]]
            target, source = int(row["channel"]), int(row["source"])
            assert after[target, source] == 0
            after[target, source] = channel_edges(result)[row["layer"], row["below_name"]][target, source]
            structural = channel_edges(result)[row["layer"], row["below_name"]] == 0
            assert torch.equal(after == 0, structural)
            checked += 1
    assert checked == len(edges) == 4 * 2 + 4 * 2 + 3 * 4 + 2 * 4 + 3 * 5 + 1 * 3  # one logit is explained


def channel_edges(r):
    """{(layer, layer below): relevance (K, J)}, channel to channel, written by hand for `Mixed`."""
    e = r.edges
    return {
        ("stem", "input"): e["stem"].clone(),
        ("groups", "stem"): torch.block_diag(*e["groups"].chunk(2)),
        ("a", "add"): e["a"].clone(),
        ("b", "add"): e["b"].clone(),
        ("join", "a"): e["join"][:, :3].clone(),
        ("join", "b"): e["join"][:, 3:].clone(),
        ("fc", "join"): e["fc"].reshape(3, 3, 4).sum(2),  # (K, J P) -> (K, J, P) -> (K, J)
    }


def all_edges(r):
    """A frame as `weight_blocks` takes it, with every edge of every weighted layer of `Mixed`."""
    names = [n.name for n in r.layers]
    rows = [
        (names.index(layer), names.index(below), k, j, layer, below)
        for (layer, below), matrix in channel_edges(r).items()
        for k, j in matrix.nonzero().tolist()
    ]
    frame = pd.DataFrame(rows, columns=["number", "below", "channel", "source", "layer", "below_name"])
    return frame.assign(rank=frame.index)


# --- several layers that give the logits ----------------------------------------------------------------------


class Heads(nn.Module):
    """A body of one Linear, and two more that the logits are made of, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.body, self.norm = how, nn.Linear(6, 8), nn.BatchNorm1d(4)
        width = 2 if how == "concatenated" else 4
        self.a, self.b = nn.Linear(8, width), nn.Linear(8, width)
        self.small, self.large = nn.Linear(8, 3, bias=False), nn.Linear(3, 4, bias=False)

    def forward(self, x):
        h = self.body(x).relu()
        if self.how == "averaged":
            return (self.a(h) + self.b(h)) / 2
        if self.how == "normed":
            return self.norm(self.a(h) + self.b(h).relu())
        if self.how == "low rank":
            return self.a(h) + self.large(self.small(h))
        return torch.cat([self.a(h), self.b(h)], 1)


@pytest.mark.parametrize(
    ("how", "heads", "hidden"),
    [
        ("averaged", {"a", "b"}, {"body"}),
        ("normed", {"a", "b"}, {"body"}),
        ("concatenated", {"a", "b"}, {"body"}),
        ("low rank", {"a", "large"}, {"body", "small"}),
    ],
)
def test_none_of_several_layers_that_give_the_logits_is_hidden(how, heads, hidden):
    model, x = Heads(how).double().eval(), torch.rand(8, 6).double()
    target = int(model(x).argmax(1).mode().values)
    relevance = explain(model, x, target)
    assert {n.name for n in logit_layers(relevance)} & {"a", "b", "large", "small", "body"} == heads
    assert {n.name for n in hidden_layers(relevance)} == hidden
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in ("lra-npp", "random"):
            result = forget(model, x, target, method, layers="all")
            assert set(result.cut["layer"]) == hidden
            assert {name.partition(".")[0] for name in result.patch.changes} <= hidden
        with pytest.raises(
            ZsuError, match=f"a and {'large' if how == 'low rank' else 'b'} compute the logits|not a Lin"
        ):
            forget(model, x, target, "head-npp")
        for method in ("mask", "bias-shift"):
            with pytest.raises(
                ZsuError, match="the last layer is not a Linear with bias|not the logits in their order"
            ):
                forget(model, x, target, method)


def test_a_hidden_layer_that_shares_its_weights_with_the_head_is_none():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.again(self.again(self.first(x).relu()).relu())

    torch.manual_seed(0)
    assert [n.name for n in hidden_layers(explain(Twice().eval(), torch.rand(3, 6), 1))] == ["first"]
