"""forget() and patches: what they do, what they leave alone, and what they refuse."""

import copy
import warnings

import pandas as pd
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import zsu.data
import zsu.evaluation
import zsu.models
from zsu import Patch, ZsuError, explain, find_paths, forget
from zsu.forgetting import METHODS
from zsu.perturb import perturb, standard_noise
from zsu.selection import best, frequency, incoming_weights, select_neurons, weight_blocks
from zsu.tape import Node

TROUSER = 1


@pytest.fixture(scope="module")
def original():
    return zsu.models.bundled("original")


@pytest.fixture(scope="module")
def splits():
    return zsu.data.load("fashion-mini")


@pytest.fixture(scope="module")
def x(splits):
    return zsu.data.samples(splits.test, TROUSER)


@pytest.fixture(scope="module")
def outputs(splits):
    """(softmax, labels) of a model on the test images that the edits did not see."""
    test = zsu.data.without_samples(splits.test, TROUSER)
    return lambda model: zsu.evaluation.predict(model, test)


@pytest.fixture(scope="module")
def edited(original, x):
    """The result of each method."""
    return {method: forget(original, x, TROUSER, method) for method in METHODS}


def bits(model):
    return {n: t.detach().clone().contiguous().view(torch.uint8) for n, t in model.state_dict().items() if t.dim()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- patches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_original_untouched_and_restored_bit_for_bit(original, x, method):
    before = bits(original)
    result = forget(original, x, TROUSER, method)
    assert same_bits(before, bits(original))
    assert not same_bits(before, bits(result.model))
    assert not result.model.training
    result.patch.revert(result.model)
    assert same_bits(before, bits(result.model))


@pytest.mark.parametrize("perturbation", ["gaussian", "laplace"])
@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "random"])
def test_noise_is_undone_bit_for_bit(original, x, method, perturbation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise on the paths need not bring the class to chance
        result = forget(original, x, TROUSER, method, perturbation)
    assert result.patch.weights_changed > 0
    assert same_bits(bits(original), bits(result.patch.revert(result.model)))


@pytest.mark.parametrize("method", METHODS)
def test_patch_counts_exactly_the_weights_that_differ(original, edited, method):
    differing = sum(
        int((a != b).sum()) for a, b in zip(original.parameters(), edited[method].model.parameters(), strict=True)
    )
    assert edited[method].patch.weights_changed == differing > 0


@pytest.mark.parametrize("method", METHODS)
def test_patch_survives_a_file(original, edited, method, tmp_path):
    patch = edited[method].patch
    patch.save(tmp_path / "a.safetensors")
    loaded = Patch.load(tmp_path / "a.safetensors")
    assert loaded.metadata == patch.metadata
    assert loaded.metadata["method"] == method
    assert loaded.metadata["target"] == "1"
    assert loaded.changes.keys() == patch.changes.keys()
    for name, change in patch.changes.items():
        for ours, theirs in zip(change, loaded.changes[name], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    again = loaded.apply(copy.deepcopy(original))
    assert same_bits(bits(again), bits(edited[method].model))
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_patch_applied_twice_or_to_another_model_is_refused_and_changes_nothing(original, edited):
    patch = edited["paths"].patch
    others = {
        "does not hold the old values": [edited["paths"].model, zsu.models.bundled("original", seed=1)],
        "the model has": [torchvision.models.squeezenet1_1().eval(), copy.deepcopy(original).double()],
    }
    for message, models in others.items():
        for model in models:
            before = bits(model)
            with pytest.raises(ZsuError, match=f"{message}.*use the model that the patch was made for"):
                patch.apply(model)
            assert same_bits(before, bits(model))
    before = bits(original)
    with pytest.raises(ZsuError, match="does not hold the new values"):
        patch.revert(original)
    assert same_bits(before, bits(original))


def test_a_model_that_differs_in_the_last_parameter_only_is_not_half_edited(original):
    patch = perturb(original, {"conv1.weight": torch.arange(5), "head.bias": torch.tensor([3])})
    model = copy.deepcopy(original)
    model.head.bias.data[3] += 1
    before = bits(model)
    with pytest.raises(ZsuError, match="head.bias"):
        patch.apply(model)
    assert same_bits(before, bits(model))


def test_damaged_foreign_and_missing_patch_files_are_refused(edited, original, tmp_path):
    path = tmp_path / "patch.safetensors"
    edited["paths"].patch.save(path)
    content = path.read_bytes()
    for n in (0, 4, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(ZsuError, match="not a patch.*pass a file that Patch.save wrote"):
            Patch.load(path)
    path.write_text("not a patch at all")
    zsu.models.save(original, tmp_path / "model.safetensors")
    safetensors.torch.save_file({"a:index": torch.ones(1)}, tmp_path / "half.safetensors", {"zsu_patch": "{}"})
    for name in ("patch.safetensors", "model.safetensors", "half.safetensors", "missing.safetensors"):
        with pytest.raises(ZsuError, match=f"{name}: not a patch"):
            Patch.load(tmp_path / name)


def test_unwritable_folder_is_refused_and_nothing_is_left(edited, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ZsuError, match="cannot write.*writable folder"):
        edited["mask"].patch.save(tmp_path / "file" / "patch.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ZsuError, match="cannot write"):
        edited["mask"].patch.save(tmp_path / "folder")  # the name of a folder
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_two_requests_stack_and_are_undone_in_reverse(original, splits):
    first = forget(original, zsu.data.samples(splits.test, 3), 3, "mask")
    second = forget(first.model, zsu.data.samples(splits.test, 7), 7, "mask")
    p, _ = zsu.evaluation.predict(second.model, splits.test)
    assert float(p[:, [3, 7]].max()) == 0
    model = first.patch.revert(second.patch.revert(second.model))
    assert same_bits(bits(original), bits(model))


# --- what the methods do --------------------------------------------------------------------------------------


def test_paths_forget_trousers_and_keep_the_rest(original, edited, outputs):
    p, y = outputs(edited["paths"].model)
    before, _ = outputs(original)
    forgotten = y == TROUSER
    accuracy = zsu.evaluation.accuracy
    assert accuracy(p[forgotten], y[forgotten]) <= 0.01
    assert abs(accuracy(p[~forgotten], y[~forgotten]) - accuracy(before[~forgotten], y[~forgotten])) <= 0.005
    assert accuracy(before[forgotten], y[forgotten]) > 0.9


def test_paths_reach_chance_on_the_samples(edited, x):
    with torch.no_grad():
        assert float(edited["paths"].model(x).softmax(1)[:, TROUSER].max()) <= 0.1


@pytest.mark.parametrize("target", range(10))
def test_paths_reach_chance_for_every_class(original, splits, target):
    x = zsu.data.samples(splits.test, target)
    result = forget(original, x, target)
    with torch.no_grad():
        assert float(result.model(x).softmax(1)[:, target].max()) <= 0.1


@pytest.mark.parametrize("target", [0, 4, 7, 8])
def test_paths_cut_the_fewest_edges_that_reach_chance_and_no_more_than_k(original, splits, target):
    """For these classes edges alone are enough; with one edge less the bias has to do the rest."""
    x = zsu.data.samples(splits.test, target)
    full = forget(original, x, target)
    assert not full.cut["layer"].str.endswith("bias").any()
    fewer = forget(original, x, target, k=len(full.cut) - 1)
    assert fewer.cut["layer"].tolist() == [*full.cut["layer"][:-1], "head.bias"]
    assert fewer.cut["source"].tolist()[:-1] == full.cut["source"].tolist()[:-1]  # the same edges, best path first
    with torch.no_grad():
        worst = float(fewer.model(x).softmax(1)[:, target].max())
    assert 0.099 < worst <= 0.1  # no lower than needed


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
    assert same_bits(bits(model), bits(result.patch.revert(result.model)))


# --- noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "deviation", "kurtosis"), [("gaussian", 1.0, 3.0), ("laplace", 2**0.5, 6.0)])
def test_noise_has_the_moments_of_its_distribution(kind, deviation, kurtosis):
    """Gaussian: standard deviation = scale x that of the weights; Laplace: diversity b, deviation sqrt(2) b."""
    model = nn.Linear(1000, 400, bias=False)
    selection = {"weight": torch.arange(400_000)}
    change = perturb(model, selection, kind, scale=0.5, seed=3).changes["weight"]
    noise = (change.new.double() - change.old.double()) / (0.5 * float(model.weight.detach().double().std()))
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(deviation, rel=0.01)
    assert float(((noise / noise.std()) ** 4).mean()) == pytest.approx(kurtosis, rel=0.05)
    if kind == "laplace":
        assert float(noise.abs().mean()) == pytest.approx(1, rel=0.01)  # E|x| = b


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_is_reproducible_and_leaves_the_global_generator_alone(original, x, kind):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, same, other = (forget(original, x, TROUSER, "lra-npp", kind, seed=s) for s in (0, 0, 1))
    forget(original, x, TROUSER, "random")
    assert torch.equal(state, torch.random.get_rng_state())
    assert same_bits(bits(first.model), bits(same.model))
    assert not same_bits(bits(first.model), bits(other.model))


def test_noise_is_in_deviations_of_the_whole_tensor_and_differs_between_tensors():
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(50, 40))
    model[1].weight.data = model[0].weight.data.clone()
    model[0].weight.data[20:] *= 10
    index = torch.arange(1000)  # the first 20 rows, which are equal in both
    patch = perturb(model, {"0.weight": index, "1.weight": index}, "gaussian")
    noise = {name: (c.new - c.old) / model.get_parameter(name).std(correction=0) for name, c in patch.changes.items()}
    for n in noise.values():
        assert float(n.std()) == pytest.approx(1, abs=0.1)
    assert abs(float(torch.corrcoef(torch.stack([*noise.values()]))[0, 1])) < 0.15


def test_a_weight_named_twice_is_perturbed_once(original):
    patch = perturb(original, {"head.weight": torch.tensor([3, 3, 1, 3])}, "laplace")
    assert patch.changes["head.weight"].index.tolist() == [1, 3]


def test_head_npp_asks_for_the_predicted_class(original, splits):
    """Of bags under the name of trousers it cuts what bags use."""
    bags = zsu.data.samples(splits.test, "Bag")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that none is taken for trousers
        named = forget(original, bags, TROUSER, "head-npp")
    pd.testing.assert_frame_equal(named.cut, forget(original, bags, 8, "head-npp").cut)


def test_noise_on_a_single_weight_and_in_float64():
    one = nn.Linear(1, 1)
    assert perturb(one, {"weight": torch.tensor([0])}, "gaussian").changes["weight"].new.isfinite().all()
    model = nn.Linear(30, 30).double()
    change = perturb(model, {"weight": torch.arange(900)}, "gaussian", scale=0.0).changes["weight"]
    assert torch.equal(change.new, change.old)


def test_standard_noise_draws_the_number_asked_for():
    for kind in ("gaussian", "laplace"):
        assert standard_noise(kind, 0, torch.Generator()).shape == (0,)
        assert standard_noise(kind, 7, torch.Generator()).shape == (7,)


# --- worked out by hand ---------------------------------------------------------------------------------------


def most_frequent(relevance, k, number):
    return best(frequency(Node("linear", "fc", relevance=torch.tensor(relevance)), k), number).tolist()


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
        ({"k": 0}, "k is 0. use an integer of at least 1"),
        ({"k": 1.5, "by": "marginal"}, "k is 1.5. use an integer"),
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


def test_paths_cut_reports_exactly_what_was_zeroed(edited, original):
    """The frame `cut` names the edges whose weights are 0 in the edited model."""
    cut, model = edited["paths"].cut, edited["paths"].model
    for name, rows in cut[cut["source"].notna()].groupby("layer"):
        zero = model.get_parameter(f"{name}.weight").flatten(2) if name != "fc" and name != "head" else None
        if zero is None:
            weight = model.get_parameter(f"{name}.weight")
            zero = weight.reshape(weight.shape[0], 64 if name == "fc" else 32, -1)  # (K, J P) -> (K, J, P)
        dead = {tuple(e) for e in (zero == 0).all(2).nonzero().tolist()}
        assert dead == set(zip(rows["channel"], rows["source"], strict=True))


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "magic"}, "unknown method 'magic'. use one of paths, lra-npp"),
        ({"perturbation": "uniform"}, "perturbation 'uniform'. use zero, gaussian or laplace"),
        ({"k": 0}, "k is 0. use an integer of at least 1"),
        ({"k": 1.5}, "k is 1.5"),
        ({"k": True}, "k is True"),
        ({"method": "lra-npp", "k": 17}, "conv1: k is 17, the layer has 16 neurons. use a smaller k"),
        ({"method": "random", "k": 17}, "conv1: k is 17, the layer has 16 neurons"),
        ({"method": "head-npp", "k": 33}, "fc: k is 33, the layer has 32 neurons"),
        ({"method": "mask", "perturbation": "gaussian"}, "the mask adds no noise"),
        ({"method": "lra-npp", "perturbation": "gaussian", "scale": -1.0}, "scale is -1.0"),
        ({"target": 10}, "target: class 10 of 10. use 0 to 9"),
        ({"target": -1}, "target: class -1 of 10. use 0 to 9"),
        ({"target": "Trouser"}, "target is 'Trouser'. pass the index"),
        ({"target": True}, "target is True"),
        ({"x": torch.rand(3, 1, 28, 28).double()}, r"x is torch.float64 on cpu, the model is torch.float32"),
        ({"x": torch.randint(0, 255, (3, 1, 28, 28))}, "x is torch.int64. pass a floating-point tensor"),
        ({"x": torch.rand(3, 3, 28, 28)}, r"conv1: .*\(3, 3, 28, 28\), it wants \(N, 1, H, W\)"),
        ({"x": torch.rand(1, 28, 28)}, r"conv1: .*it wants \(N, 1, H, W\)"),
        ({"x": torch.rand(0, 1, 28, 28)}, "N >= 1"),
        ({"x": torch.full((2, 1, 28, 28), torch.nan)}, "NaN or infinity"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(original, x, arguments, match):
    before = bits(original)
    with pytest.raises(ZsuError, match=match):
        forget(original, **{"x": x, "target": TROUSER} | arguments)
    assert same_bits(before, bits(original))


def test_train_mode_is_refused(original, x):
    with pytest.raises(ZsuError, match=r"train mode. call model.eval\(\)"):
        forget(copy.deepcopy(original).train(), x, TROUSER)


def test_perturb_refuses_unknown_parameters(original):
    with pytest.raises(ZsuError, match="no parameter 'conv9.weight'. use one of conv1.weight"):
        perturb(original, {"conv9.weight": torch.tensor([0])})


def test_samples_of_another_class_are_warned_about(original, splits):
    sandals = zsu.data.samples(splits.test, "Sandal")
    with pytest.warns(UserWarning, match="takes none of the 36 samples for class 1"):
        forget(original, sandals, TROUSER, "mask")


def test_an_edit_without_effect_is_warned_about(original, x):
    with pytest.warns(UserWarning, match="the edit has no effect"):
        forget(original, x, TROUSER, "lra-npp", "gaussian", scale=0.0)


def test_one_sample_and_images_of_one_channel_are_enough(original, x):
    for method in METHODS:
        assert forget(original, x[:1], TROUSER, method).patch.weights_changed > 0


def test_models_that_a_method_does_not_know_are_refused_by_name():
    x = torch.rand(2, 1, 4, 4)
    upward = nn.Sequential(nn.ConvTranspose2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(75, 2)).eval()
    convolutional = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten()).eval()
    for p in (*upward.parameters(), *convolutional.parameters()):
        p.data.abs_()
    for model, method, match in [
        (upward, "lra-npp", "0: a transposed convolution"),
        (convolutional, "head-npp", "2: not a Linear on one layer's output"),
        (convolutional, "mask", "2: the last layer is not a Linear with bias"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), "lra-npp", "no hidden layer with weights"),
    ]:
        target = int(model(x).mean(0).argmax())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ZsuError, match=match):
                forget(model, x, target, method)


def test_a_bare_linear_layer_can_be_masked():
    model, x = nn.Linear(4, 3).eval(), torch.rand(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class need not be recognised
        result = forget(model, x, 2, "mask")
    assert float(result.model(x).detach().softmax(1)[:, 2].max()) == 0
