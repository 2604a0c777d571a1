"""lra-npp, head-npp and the controls: budgets, options, what they cut."""

import copy

import pandas as pd
import pytest
import torch
import torchvision
from torch import nn

import zsu.data
import zsu.evaluation
import zsu.models
from helpers import TROUSER, bits, largest
from zsu import explain, forget
from zsu.forgetting.neurons import first_that_leaves_none
from zsu.forgetting.selection import a_tenth, count_in_top, highest

pytestmark = pytest.mark.filterwarnings("ignore:3 samples are few")


# --- neurons: budgets and options -------------------------------------------------------------------------------------


def left_without(model, x, target, neurons):
    """How many samples a model takes for the class when the incoming weights of these neurons are 0."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for layer, channels in neurons.items():
            edited.get_parameter(f"{layer}.weight")[channels] = 0
        return int((edited(x).argmax(1) == target).sum())


def by_layer(cut):
    return {layer: rows["channel"].tolist() for layer, rows in cut.groupby("layer", sort=False)}


@pytest.mark.parametrize("target", range(10))
def test_lra_npp_takes_the_fewest_neurons_from_the_last_layer_backwards(original, samples, target):
    x = samples(target)
    result = forget(original, x, target, "lra-npp")
    assert result.patch.metadata["budget"] == [{"neurons": len(result.cut), "left": 0}]
    assert left_without(original, x, target, by_layer(result.cut)) == 0
    fewer = (by_layer(result.cut[:n]) for n in range(1, len(result.cut)))
    assert all(left_without(original, x, target, neurons) > 0 for neurons in fewer)
    hidden = [n for n in explain(original, x, target, edges=False).layers[::-1] if n.weight][1:]
    frequent = {n.name: highest(count_in_top(n, a_tenth(n)), n.relevance.shape[1]).tolist() for n in hidden}
    order = [(layer, j) for layer, neurons in frequent.items() for j in neurons]  # fc, conv3, conv2, conv1
    assert list(zip(result.cut["layer"], result.cut["channel"], strict=True)) == order[: len(result.cut)]


@pytest.mark.parametrize("target", [1, 5])
def test_lra_npp_in_every_layer_takes_the_least_share_that_leaves_no_sample(original, samples, target):
    """In steps of 2 %."""
    x = samples(target)
    result = forget(original, x, target, "lra-npp", layers="all")
    (budget,) = result.patch.metadata["budget"]
    hidden = [n for n in explain(original, x, target, edges=False).layers[:-1] if n.weight]

    def share(percent):
        sizes = {n.name: max(1, round(percent * n.relevance.shape[1] / 100)) for n in hidden}
        return {n.name: highest(count_in_top(n, sizes[n.name]), sizes[n.name]).tolist() for n in hidden}

    assert by_layer(result.cut) == share(budget["percent"])
    assert set(by_layer(result.cut)) == {"conv1", "conv2", "conv3", "fc"}
    assert left_without(original, x, target, share(budget["percent"])) == budget["left"] == 0
    assert budget["percent"] > 2
    assert all(left_without(original, x, target, share(p)) > 0 for p in range(2, budget["percent"], 2))


@pytest.mark.parametrize("method", ["lra-npp", "random"])
def test_layers_restrict_what_is_cut(original, x, method):
    result = forget(original, x, TROUSER, method, layers=["conv2", "fc"], k=3)
    assert set(result.cut["layer"]) == set(result.patch.diff().index.str.removesuffix(".weight")) == {"conv2", "fc"}
    assert result.cut["layer"].value_counts().to_dict() == {"conv2": 3, "fc": 3}
    everywhere = forget(original, x, TROUSER, method, k=3)
    assert set(everywhere.cut["layer"]) == {"conv1", "conv2", "conv3", "fc"}
    if method == "lra-npp":
        same = everywhere.cut[everywhere.cut["layer"].isin(["conv2", "fc"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(result.cut, same)


def test_perturbed_says_how_many_of_the_most_frequent(original, x):
    few, many = (forget(original, x, TROUSER, "lra-npp", k=4, perturbed=n).cut for n in (2, 6))
    for layer in ("conv1", "conv2", "conv3", "fc"):
        a, b = (c.loc[c["layer"] == layer, "channel"].tolist() for c in (few, many))
        score = count_in_top(next(n for n in explain(original, x, TROUSER).layers if n.name == layer), 4)
        assert b == highest(score, 6).tolist()
        assert a == b[:2]
    head = forget(original, x, TROUSER, "head-npp", k=4, perturbed=5)
    assert len(head.cut) == 5
    assert len(forget(original, x, TROUSER, "head-npp", k=4).cut) == 8  # twice k
    assert head.patch.weights_changed == 5 * 577  # a row of the hidden Linear, and V[f, n]


def test_absolute_noise(original, x):
    def noise(absolute):
        patch = forget(original, x, TROUSER, "lra-npp", "gaussian", scale=0.5, absolute=absolute, k=16).patch
        change = patch.changes["conv2.weight"]
        return change.new - change.old

    deviation = float(original.conv2.weight.detach().std(correction=0))
    assert float(noise(True).std()) == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close(noise(False), noise(True) * deviation, atol=1e-5, rtol=1e-3)


def test_head_npp_asks_for_the_predicted_class(original, samples):
    """Of bags and trousers it cuts the same under either name."""
    x = torch.cat([samples("Bag")[:20], samples("Trouser")[:20]])
    named, other = (forget(original, x, c, "head-npp").cut for c in (TROUSER, 8))
    pd.testing.assert_frame_equal(named, other)
    assert not named.equals(forget(original, x[20:], TROUSER, "head-npp").cut)


def test_controls(original, edited, x):
    shift, zeroed = edited["bias-shift"], edited["zeroed"]
    assert shift.patch.weights_changed == 1
    assert list(shift.patch.changes) == ["head.bias"]
    assert largest(shift.model, x, TROUSER) == 0
    assert all((p == 0).all() for p in zeroed.model.parameters())
    assert zeroed.cut.empty


# --- what the methods do ----------------------------------------------------------------------------------------------


def test_mask_gives_probability_0_and_keeps_the_others_in_proportion(original, edited, outputs):
    p, _ = outputs(edited["mask"].model)
    before, _ = outputs(original)
    assert float(p[:, TROUSER].max()) == 0
    others = [c for c in range(10) if c != TROUSER]
    renormalised = before[:, others] / before[:, others].sum(1, keepdim=True)
    torch.testing.assert_close(p[:, others], renormalised, atol=1e-12, rtol=1e-12)


NETWORKS = {
    "small": lambda: zsu.models.SmallCNN(5, 3),
    "vgg11": lambda: torchvision.models.vgg11(num_classes=5),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """(random network, images, class that it takes them for)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = NETWORKS[request.param]()
        if request.param == "vgg11":  # 16 hidden units instead of 4,096: quick
            model.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))
        images = torch.rand(3, 3, 32, 32)
    model.eval()
    return model, images, int(model(images)[0].argmax())


def changed(model, edited):
    return {
        n: (p != q)
        for (n, p), q in zip(model.named_parameters(), edited.parameters(), strict=True)
        if not torch.equal(p, q)
    }


def weighted_layers(model):
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def test_lra_npp_cuts_whole_neurons_in_every_weighted_layer_but_the_last(network):
    model, x, target = network
    result = forget(model, x, target, "lra-npp", layers="all")
    layers = weighted_layers(model)
    assert set(result.cut["layer"]) == set(layers[:-1])
    assert set(changed(model, result.model)) == {f"{n}.weight" for n in layers[:-1]}
    for name, rows in result.cut.groupby("layer"):
        weight = result.model.get_parameter(f"{name}.weight")
        dead = (weight.flatten(1) == 0).all(1).nonzero()[:, 0].tolist()
        assert sorted(rows["channel"]) == dead
        assert rows["source"].isna().all()


def test_random_takes_as_many_neurons_in_each_layer_as_lra_npp(network):
    model, x, target = network
    random, most_relevant = (forget(model, x, target, m).cut for m in ("random", "lra-npp"))
    assert random["layer"].value_counts().to_dict() == most_relevant["layer"].value_counts().to_dict()
    assert not random["channel"].equals(most_relevant["channel"])
    assert random.equals(forget(model, x, target, "random").cut)
    assert not random.equals(forget(model, x, target, "random", seed=1).cut)


def test_head_npp_does_what_the_authors_did_for_what_feeds_the_head(network):
    """Behind a hidden Linear its rows without their bias, and the class's row of the head there; behind a ResNet's
    pooled convolutions all rows of the head.
    """
    model, x, target = network
    result = forget(model, x, target, "head-npp", k=2)
    *_, below, head = weighted_layers(model)
    neurons = result.cut["channel"].tolist()
    assert 2 <= len(neurons) <= 4
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        weight = by_hand.get_submodule(head).weight
        if isinstance(model.get_submodule(below), nn.Linear):
            by_hand.get_submodule(below).weight[neurons] = 0
            weight[target, neurons] = 0
            assert set(result.cut["layer"]) == {below}
        else:
            weight[:, neurons] = 0
    assert bits(by_hand) == bits(result.model)


def test_head_npp_takes_the_class_s_row_alone_behind_a_norm_of_tokens():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=4).eval()
        nn.init.normal_(model.heads.head.weight)
        x = torch.rand(3, 3, 16, 16)
    target = int(model(x)[0].argmax())
    result = forget(model, x, target, "head-npp", k=2)
    (change,) = result.patch.changes.values()
    assert list(result.patch.changes) == ["heads.head.weight"]
    assert sorted(change.index.tolist()) == sorted(target * 8 + n for n in result.cut["channel"])
    assert (change.new == 0).all()


def test_paths_run_on_unmodified_networks(network):
    model, x, target = network
    result = forget(model, x, target)
    with torch.no_grad():
        assert float(result.model(x).softmax(1)[:, target].max()) <= 1 / 5
    assert bits(model) == bits(result.patch.revert(result.model))


def test_the_fewest_are_found_where_more_neurons_leave_samples_again():
    """Samples left by 1, 2, 3, ... neurons: 4 are enough although 5 to 7 are not."""
    rows = (
        [1, 1, 1, 0],
        [1, 0, 0, 1],
        [0, 0, 1, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
    )
    still = torch.tensor(rows)
    asked = []

    def left(n, among=slice(None)):
        asked.append(len(still[n - 1][among]))
        return still[n - 1][among].bool()

    assert first_that_leaves_none(left, 8) == 4
    assert asked == [4, 3, 3, 3, 4]  # all, then those that were left, and all of the first without any


@pytest.mark.filterwarnings("ignore")
def test_a_network_without_relevant_neurons(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    nn.init.zeros_(model[3].weight)
    model[3].bias.data = torch.tensor([0.0, 0.0, 3.0])
    for method in ("lra-npp", "random"):
        result = forget(model, x, 2, method)
        assert result.patch.weights_changed == 0
        assert result.patch.metadata["budget"][0]["neurons"] == 0
