"""lra-npp, head-npp and the controls: budgets, options, what they cut."""

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
from zsu.forgetting.selection import (
    count_in_top,
    highest,
)

pytestmark = pytest.mark.filterwarnings("ignore:3 samples are few")


# --- neurons: budgets and options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1, 5])
def test_lra_npp_takes_the_least_share_that_leaves_no_sample(original, samples, target):
    """In steps of 2 %; here in one layer, so that k can say every smaller share by itself."""
    x = samples(target)

    def left(result):
        with torch.no_grad():
            return int((result.model(x).argmax(1) == target).sum())

    result = forget(original, x, target, "lra-npp", layers=["conv3"])
    share = result.patch.metadata["budget"][0]["percent"]
    assert result.patch.metadata["budget"] == [{"percent": share, "left": 0}]
    assert left(result) == 0
    assert len(result.cut) <= max(1, round(share * 64 / 100))
    smaller = [max(1, round(p * 64 / 100)) for p in range(2, share, 2)]
    for k in smaller:
        assert left(forget(original, x, target, "lra-npp", layers=["conv3"], k=k)) > 0
    assert smaller


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
    assert head.patch.weights_changed == 5 * 10


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
    result = forget(model, x, target, "lra-npp")
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


def test_head_npp_cuts_columns_of_the_head_only(network):
    model, x, target = network
    result = forget(model, x, target, "head-npp", k=2)
    head = weighted_layers(model)[-1]
    changes = changed(model, result.model)
    assert set(changes) == {f"{head}.weight"}
    (mask,) = changes.values()
    columns = mask.any(0)
    assert torch.equal(mask, columns.expand_as(mask))
    assert 2 <= int(columns.sum()) <= 4
    assert sorted(result.cut["channel"]) == columns.nonzero()[:, 0].tolist()


def test_paths_run_on_unmodified_networks(network):
    model, x, target = network
    result = forget(model, x, target)
    with torch.no_grad():
        assert float(result.model(x).softmax(1)[:, target].max()) <= 1 / 5
    assert bits(model) == bits(result.patch.revert(result.model))
