"""forget(): what it does with which data, what it leaves alone, and what it refuses."""

import copy
import hashlib
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import Subset
from torchvision import transforms

import zsu.data
import zsu.evaluation
import zsu.models
from zsu import Patch, ZsuError, explain, explain_each, find_paths, forget
from zsu.forgetting.perturb import model_hash, perturb, undo
from zsu.forgetting.request import METHODS, TIERS, affordable, disturbed, specific_edges
from zsu.forgetting.selection import best, frequency, incoming_weights, select_neurons, weight_blocks
from zsu.relevance.layers import Layer, Share

TROUSER = 1
pytestmark = pytest.mark.filterwarnings("ignore:3 samples are few")
NEED_RETAINED = [m for m in METHODS if TIERS[m] in ("T3", "T4")]


@pytest.fixture(scope="module")
def samples(splits):
    return lambda cls: zsu.data.samples(splits.test, cls)


@pytest.fixture(scope="module")
def without(splits):
    """Training images without some classes, n of each other."""
    y = zsu.data.targets(splits.train)

    def few(*left_out, n=20):
        kept = [(y == c).nonzero()[:n, 0] for c in range(10) if c not in left_out]
        return Subset(splits.train, torch.cat(kept).tolist())

    return few


@pytest.fixture(scope="module")
def outputs(splits):
    """(softmax, labels) of a model on the test images that the edits did not see."""
    test = zsu.data.without_samples(splits.test, TROUSER)
    return lambda model: zsu.evaluation.predict(model, test)


@pytest.fixture(scope="module")
def by_class(splits):
    """A model's accuracy on the test images of each class that `samples` did not draw, (10,)."""
    held_out = splits.test
    for c in range(10):
        seen = zsu.data.without_samples(splits.test, c).indices
        held_out = Subset(held_out, seen) if c == 0 else Subset(splits.test, sorted({*held_out.indices} & {*seen}))
    assert len(held_out) == 10 * (200 - 36)

    def accuracies(model):
        p, y = zsu.evaluation.predict(model, held_out)
        return np.array([zsu.evaluation.accuracy(p[y == c], y[y == c]) for c in range(10)])

    return accuracies


@pytest.fixture(scope="module")
def before(original, by_class):
    """What the original has of each class."""
    return by_class(original)


@pytest.fixture(scope="module")
def edited(original, x, without):
    """The result of each method."""
    return {m: forget(original, x, TROUSER, m, **({"retained": without(1)} if m in NEED_RETAINED else {}))
            for m in METHODS}  # fmt: skip


@pytest.fixture(scope="module")
def each_class(original, samples):
    """What `paths` makes of each class."""
    return [forget(original, samples(c), c) for c in range(10)]


def bits(model):
    return {
        n: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()
    }


def largest(model, x, target):
    """The largest probability of the class."""
    with torch.no_grad():
        return float(model(x).double().softmax(1)[:, target].max())


# --- every method ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_original_untouched_and_restored_bit_for_bit(original, edited, method):
    assert bits(original) == bits(zsu.models.bundled("original"))
    model = copy.deepcopy(edited[method].model)
    assert bits(original) != bits(model)
    assert not model.training
    edited[method].patch.revert(model)
    assert bits(original) == bits(model)
    assert bits(edited[method].patch.apply(model)) == bits(edited[method].model)


@pytest.mark.parametrize("perturbation", ["gaussian", "laplace"])
@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "random"])
def test_noise_is_undone_bit_for_bit(original, x, method, perturbation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise on the neurons need not bring the class to chance
        result = forget(original, x, TROUSER, method, perturbation)
    assert result.patch.weights_changed > 0
    assert bits(original) == bits(result.patch.revert(result.model))


@pytest.mark.parametrize("method", METHODS)
def test_patch_counts_exactly_the_weights_that_differ(original, edited, method):
    differing = sum(
        int((a != b).sum()) for a, b in zip(original.parameters(), edited[method].model.parameters(), strict=True)
    )
    assert edited[method].patch.weights_changed == differing > 0


@pytest.mark.parametrize("method", METHODS)
def test_metadata_say_what_was_done_and_survive_a_file(original, edited, x, method, tmp_path):
    metadata = edited[method].patch.metadata
    expected = {
        "target": "1", "method": method, "tier": TIERS[method], "perturbation": "zero", "scale": "1.0",
        "absolute": "False", "samples": "36", "seed": "0", "unrecognised": "1", "zsu": zsu.__version__,
        "torch": torch.__version__, "parent": model_hash(zsu.models.bundled("original")),
        "samples_sha256": hashlib.sha256(x.numpy().tobytes()).hexdigest(),
        "k": "None", "perturbed": "None", "layers": "None",
    }  # fmt: skip
    assert metadata.keys() == expected.keys() | {"budget", "seconds", "retained"}
    assert (metadata["retained"] == "0") == (method not in NEED_RETAINED)
    assert {k: metadata[k] for k in expected} == expected
    assert 0 < float(metadata["seconds"]) < 60
    with torch.no_grad():
        assert int((original(x).argmax(1) != TROUSER).sum()) == 1
    edited[method].patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").metadata == metadata


def test_metadata_of_several_classes(original, samples):
    a, b = samples(3), samples(7)[:30]
    metadata = forget(
        original, [b, a], [7, 3], "lra-npp", "laplace", scale=2.5, absolute=True, k=2, seed=9
    ).patch.metadata
    assert metadata["target"] == "3,7"
    assert metadata["samples"] == "36,30"
    assert (metadata["scale"], metadata["absolute"], metadata["seed"]) == ("2.5", "True", "9")
    assert metadata["budget"] == "k = 2; k = 2"
    assert metadata["k"] == "2"
    assert metadata["samples_sha256"] == hashlib.sha256(torch.cat([a, b]).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_is_enough_and_is_warned_about(original, x, without, method):
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = forget(original, x[:1], TROUSER, method, **more)
    assert any("1 samples are few" in str(w.message) for w in told)
    assert result.patch.weights_changed > 0


def test_five_samples_are_not_few_and_half_of_them_may_be_mistaken(original, x, samples):
    with torch.no_grad():
        x = x[original(x).argmax(1) == TROUSER]
    sandals = samples("Sandal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forget(original, x[:5], TROUSER, "mask")
        forget(original, torch.cat([x[:3], sandals[:3]]), TROUSER, "mask")
    with pytest.warns(UserWarning, match="4 samples are few"):
        forget(original, x[:4], TROUSER, "mask")
    with pytest.warns(UserWarning, match="the model does not take 4 of 7 samples for class 1"):
        assert forget(original, torch.cat([x[:3], sandals[:4]]), TROUSER).patch.metadata["unrecognised"] == "4"


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_no_sample_shows_is_refused(original, samples, without, method):
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    before = bits(original)
    with pytest.raises(ZsuError, match="the model takes none of the 36 samples for class 1. pass samples of the class"):
        forget(original, samples("Sandal"), TROUSER, method, **more)
    assert bits(original) == before


def test_no_sample_of_a_class_in_the_data_is_refused(splits):
    data = Subset(splits.test, [i for i, c in enumerate(splits.test.targets) if int(c) != TROUSER])
    with pytest.raises(ZsuError, match="'Trouser' were asked for, the data has 0.*Trouser 0, Pullover 200"):
        zsu.data.samples(data, TROUSER)


# --- data tiers -----------------------------------------------------------------------------------------------


class Counting(torch.utils.data.Dataset):
    """A data set that counts how often an image or the labels are read."""

    def __init__(self, data):
        self.data, self.reads, self.classes = data, 0, zsu.data.classes(data)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.reads += 1
        return self.data[i]

    @property
    def targets(self):
        self.reads += 1
        return zsu.data.targets(self.data)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in NEED_RETAINED and m != "paths"])
def test_retained_data_is_refused_unread_by_methods_that_must_not_see_it(original, x, without, method):
    data = Counting(without(1))
    with pytest.raises(ZsuError, match=f"'{method}' is of tier {TIERS[method]}: no retained data.*or use 'paths'"):
        forget(original, x, TROUSER, method, retained=data)
    assert data.reads == 0


@pytest.mark.parametrize("method", [m for m in METHODS if m not in NEED_RETAINED])
def test_without_retained_data_no_data_set_is_read(original, x, method, monkeypatch):
    def refuse(*_):
        raise AssertionError("read")

    for cls in (zsu.data.Images, Subset):
        monkeypatch.setattr(cls, "__getitem__", refuse)
    monkeypatch.setattr(zsu.data, "batches", refuse)
    monkeypatch.setattr(zsu.rerouting, "batches", refuse)
    assert forget(original, x, TROUSER, method).patch.weights_changed > 0


@pytest.mark.parametrize("method", NEED_RETAINED)
def test_methods_that_need_retained_data_say_so(original, x, method):
    with pytest.raises(ZsuError, match=rf"'{method}' needs retained samples \({TIERS[method]}\). pass retained="):
        forget(original, x, TROUSER, method)


@pytest.mark.parametrize("method", ["paths", *NEED_RETAINED])
def test_retained_data_with_the_class_is_refused(original, samples, without, method):
    with pytest.raises(ZsuError, match="holds the class to forget.*Trouser 20, Pullover 20.*leave out Trouser"):
        forget(original, samples(1), TROUSER, method, retained=without(3))
    with pytest.raises(ZsuError, match="holds the class to forget.*leave out Trouser, Dress"):
        forget(original, [samples(1), samples(3)], [1, 3], method, retained=without(1))


@pytest.mark.parametrize("kind", ["empty", "unknown class", "colour"])
@pytest.mark.parametrize("method", ["paths", *NEED_RETAINED])
def test_retained_data_that_does_not_fit_is_refused(original, x, without, method, kind):
    grey, colour = (torch.zeros(20, n, 28, 28, dtype=torch.uint8) for n in (1, 3))
    data = {
        "empty": Subset(without(1), []),
        "unknown class": zsu.data.Images(grey, torch.full((20,), 11), [*"abcdefghijkl"]),  # of a model that knows ten
        "colour": zsu.data.Images(colour, torch.full((20,), 3), [*"abcdefghij"]),
    }[kind]
    with pytest.raises(ZsuError):
        forget(original, x, TROUSER, method, retained=data)


# --- paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", range(10))
def test_paths_forget_each_class_and_keep_the_rest(each_class, before, by_class, target):
    after = by_class(each_class[target].model)
    others = np.arange(10) != target
    assert before[target] > 0.5
    assert after[target] <= 0.01
    assert (before - after)[others].mean() <= 0.005
    assert each_class[target].patch.weights_changed <= 0.01 * 42_090


@pytest.mark.parametrize("target", range(10))
def test_paths_leave_a_thousandth_on_the_samples_with_and_without_noise(each_class, samples, target):
    x = samples(target)
    left = [largest(each_class[target].model, seen, target) for seen in (x, disturbed(x, 0))]
    assert max(left) == pytest.approx(0.001, rel=1e-4)  # and no less than that: the bias falls no further than needed


def test_input_noise_is_a_tenth_of_the_standard_deviation(x):
    noise = disturbed(x, 0) - x
    assert float(noise.std()) == pytest.approx(0.1 * float(x.std()), rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.001)
    assert torch.equal(disturbed(x, 0), disturbed(x, 0))
    assert not torch.equal(disturbed(x, 0), disturbed(x, 1))


def cut_by_hand(original, edges):
    """A copy of the model with the weights of these edges set to 0, one by one."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer, channel, source in edges[["layer", "channel", "source"]].itertuples(index=False):
            weight = model.get_parameter(f"{layer}.weight")
            weight.reshape(len(weight), {"fc": 64, "head": 32}.get(layer, weight.shape[1]), -1)[channel, source] = 0
    return model


@pytest.mark.parametrize("target", range(10))
def test_paths_cut_the_fewest_edges_that_reach_chance(original, each_class, samples, target):
    x = samples(target)
    seen = torch.cat([x, disturbed(x, 0)])
    cut = each_class[target].cut
    edges = cut[cut["source"].notna()]
    budget = each_class[target].patch.metadata["budget"]
    number, available = (int(n) for n in budget.partition(" edges")[0].split(" of "))
    assert number == len(edges)
    one = torch.zeros(len(x), 10)
    one[:, target] = 1
    every = specific_edges(*explain_each(original, x, [one, 1 - one], "z+")).head(available)
    # Where all of them do not reach chance, the fewest that come as far; the head and its bias do the rest.
    goal = max(0.1, largest(cut_by_hand(original, every), seen, target) + 0.01)
    assert largest(cut_by_hand(original, edges), seen, target) <= goal
    assert largest(cut_by_hand(original, edges[:-1]), seen, target) > goal


def test_no_more_edges_than_a_share_of_the_weights(original):
    blocks = [
        ("fc.weight", torch.tensor([0, 2]), torch.zeros(2, 60)),
        ("head.weight", torch.tensor([1]), torch.zeros(1, 1)),
    ]
    assert affordable(original, 3, blocks) == 2  # 0.2 % of 42,090 weights are 84: 60, 61, but not 121
    assert affordable(original, 1, [("fc.weight", torch.tensor([0]), torch.zeros(1, 999))]) == 1


def test_for_some_classes_edges_alone_reach_chance_with_some_left(each_class):
    numbers = [r.patch.metadata["budget"].partition(" edges")[0].split(" of ") for r in each_class]
    assert sum(int(n) < int(available) for n, available in numbers) >= 4


@pytest.mark.parametrize("target", [0, 6])
def test_a_larger_k_cuts_no_more_than_needed_and_a_smaller_one_k(original, each_class, samples, target):
    full = each_class[target]
    needed = int(full.cut["source"].notna().sum())
    for k in (needed, needed + 1, 5000):
        result = forget(original, samples(target), target, k=k)
        pd.testing.assert_frame_equal(result.cut, full.cut)
        assert bits(result.model) == bits(full.model)
    fewer = forget(original, samples(target), target, k=needed - 1)
    edges = fewer.cut[fewer.cut["source"].notna()].reset_index(drop=True)
    pd.testing.assert_frame_equal(edges, full.cut[: needed - 1])  # the same, best path first
    assert largest(fewer.model, samples(target), target) <= 0.001 * (1 + 1e-4)


@pytest.mark.parametrize("target", range(10))
def test_paths_change_cut_edges_some_rows_of_the_head_and_nothing_else(original, each_class, target):
    result = each_class[target]
    changed = {n for n, p in original.named_parameters() if not torch.equal(p, result.model.get_parameter(n))}
    cut_layers = {f"{n}.weight" for n in result.cut.loc[result.cut["source"].notna(), "layer"]}
    assert changed == cut_layers | {"head.weight", "head.bias"} == set(result.patch.changes)
    by_hand = cut_by_hand(original, result.cut[result.cut["source"].notna()])
    for name, p in by_hand.named_parameters():
        q = result.model.get_parameter(name)
        if not name.startswith("head"):
            assert torch.equal(p, q), name  # exactly those edges
    rerouted = result.patch.metadata["budget"].partition("rerouted to [")[2].partition("]")[0]
    receiving = {int(c) for c in rerouted.split(", ")}
    assert target not in receiving
    rows = (by_hand.head.weight != result.model.head.weight).any(1).nonzero().flatten().tolist()
    assert set(rows) == receiving
    moved = {c for c in range(10) if original.head.bias[c] != result.model.head.bias[c]}
    assert moved <= receiving | {target}
    assert result.model.head.bias[target] < original.head.bias[target]
    lowered = result.cut[result.cut["source"].isna()]
    assert lowered[["layer", "channel"]].to_numpy().tolist() == [["head.bias", target]]


@pytest.fixture(scope="module")
def distance(outputs):
    """Mean divergence from the models retrained without trousers, on unseen trousers."""
    references = [outputs(zsu.models.bundled("retrained", s)) for s in range(8)]

    def mean(model):
        p, y = outputs(model)
        return np.mean([zsu.evaluation.jensen_shannon(p[y == 1], q[y == 1]) for q, _ in references])

    return mean


def test_paths_answer_more_like_a_retrained_model_than_the_mask(original, edited, distance):
    assert distance(edited["paths"].model) < 0.9 * distance(edited["mask"].model)
    assert distance(edited["mask"].model) < distance(original)


def test_retained_samples_bring_paths_nearer_to_a_retrained_model(original, x, edited, distance, without):
    data = Counting(without(1))
    result = forget(original, x, TROUSER, retained=data)
    assert data.reads > 180
    assert result.patch.metadata["tier"] == "T3"
    assert distance(result.model) < distance(edited["paths"].model) < distance(edited["mask"].model)
    assert largest(result.model, x, TROUSER) <= 0.001 * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["paths", "mask", "lra-npp"])
def test_other_precisions(original, x, method, dtype):
    model = copy.deepcopy(original).to(dtype)
    start = bits(model)
    result = forget(model, x.to(dtype), TROUSER, method)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    if method == "mask":
        assert largest(result.model, x.to(dtype), TROUSER) == 0
    elif method == "paths":
        assert largest(result.model, x.to(dtype), TROUSER) <= (0.001 * 1.1 if dtype != torch.float64 else 0.001 + 1e-9)
    else:
        with torch.no_grad():
            assert (result.model(x.to(dtype)).argmax(1) != TROUSER).all()
    assert bits(model) == start == bits(result.patch.revert(result.model))


@pytest.mark.parametrize("method", [m for m in METHODS if m in ("boundary-shrink", *NEED_RETAINED)])
def test_peers_on_a_bfloat16_model_work_or_are_refused(original, x, without, method):
    model = copy.deepcopy(original).bfloat16()
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    try:
        result = forget(model, x.bfloat16(), TROUSER, method, **more)
    except ZsuError:
        return
    assert result.patch.weights_changed > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_works_or_is_refused(original, x, without, method):
    model = copy.deepcopy(original).requires_grad_(False)
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    try:
        result = forget(model, x, TROUSER, method, **more)
    except ZsuError:
        return
    assert result.patch.weights_changed > 0


def test_a_head_without_bias_is_warned_about_and_says_what_is_left(original, x):
    model = copy.deepcopy(original)
    model.head.bias = None
    with pytest.warns(UserWarning, match="the head has no bias: probability up to 0.9[0-9] is left"):
        result = forget(model, x, TROUSER)
    assert "0 bias lowered" in result.patch.metadata["budget"]
    assert bits(model) == bits(result.patch.revert(result.model))


def test_features_that_are_all_dead_are_refused():
    """The bias alone decides for the class; nothing leads to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    model[1].bias.data -= 50
    model[3].bias.data = torch.tensor([5.0, 0, 0])
    with pytest.raises(ZsuError):
        forget(model, torch.rand(6, 1, 2, 2), 0)


# --- which classes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(original, samples):
    return forget(original, [samples(3), samples(7)], [3, 7])


def test_two_classes_go_and_the_others_stay(each_class, both, before, by_class):
    one, two = by_class(each_class[3].model), by_class(both.model)
    assert one[3] <= 0.01
    assert two[[3, 7]].max() <= 0.01
    assert one[7] >= before[7] - 0.02
    others = [c for c in range(10) if c not in (3, 7)]
    assert (before - two)[others].max() <= 0.08
    assert (before - two)[others].mean() <= 0.01
    assert set(both.cut.loc[both.cut["source"].isna(), "channel"]) == {3, 7}
    assert both.patch.metadata["target"] == "3,7"


def test_the_order_of_a_list_does_not_matter(original, samples, both):
    for classes in ([7, 3], (7, 3), np.array([7, 3])):
        other = forget(original, [samples(7), samples(3)], classes)
        assert bits(other.model) == bits(both.model)
        pd.testing.assert_frame_equal(other.cut, both.cut)
        kept = ("target", "budget", "samples_sha256", "parent")
        assert {k: other.patch.metadata[k] for k in kept} == {k: both.patch.metadata[k] for k in kept}


def test_a_list_of_one_is_that_class(original, samples, each_class):
    result = forget(original, [samples(3)], [3])
    assert bits(result.model) == bits(each_class[3].model)
    assert result.patch.metadata["target"] == "3"


def test_one_after_the_other_is_the_list_in_order(each_class, samples, both, original):
    second = forget(each_class[3].model, samples(7), 7)
    assert bits(second.model) == bits(both.model)
    assert bits(both.patch.revert(copy.deepcopy(both.model))) == bits(original)


@pytest.mark.parametrize("order", [(3, 7), (7, 3)])
def test_undo_the_first_of_two_requests(original, each_class, samples, before, by_class, order):
    first = each_class[order[0]]
    second = forget(first.model, samples(order[1]), order[1])
    model = second.model
    assert second.patch.metadata["parent"] == model_hash(first.model)
    assert by_class(model)[list(order)].max() <= 0.01
    rest = undo(model, [first.patch, second.patch], 0)
    after = by_class(model)
    assert after[order[0]] >= before[order[0]] - 0.02
    assert after[order[1]] <= 0.01
    others = [c for c in range(10) if c != order[1]]
    assert (before - after)[others].mean() <= 0.01
    assert undo(model, rest, 0) == []
    assert bits(model) == bits(original)


def test_undo_the_second_of_two_requests(original, each_class, samples):
    second = forget(each_class[3].model, samples(7), 7)
    rest = undo(second.model, [each_class[3].patch, second.patch], 1)
    assert bits(second.model) == bits(each_class[3].model)
    assert rest == [each_class[3].patch]
    undo(second.model, rest, 0)
    assert bits(second.model) == bits(original)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_several_classes(original, samples, without, method):
    """One after the other; what the first takes from the second is not an error."""
    more = {"retained": without(3, 7)} if method in NEED_RETAINED else {}
    result = forget(original, [samples(3), samples(7)], [3, 7], method, **more)
    assert result.patch.metadata["target"] == "3,7"
    assert bits(original) == bits(result.patch.revert(result.model))


def test_fine_tuning_forgets_several_classes_with_much_retained_data(original, samples, without, by_class):
    """Training without both lets both fade, so that there is nothing left to do for the second."""
    x = [samples(c) for c in (3, 7)]
    result = forget(original, x, [3, 7], "fine-tune", retained=without(3, 7, n=400))
    assert by_class(result.model)[[3, 7]].max() <= 0.1


def test_classes_that_look_alike(original, samples, each_class, before, by_class):
    """Shirts are taken for T-shirts and pullovers: the search for a budget ends, and the edit can be taken back."""
    for target in (0, 6):
        others = np.arange(10) != target
        result = forget(original, samples(target), target, "lra-npp")
        after = by_class(result.model)
        assert after[target] <= 0.05
        kept = by_class(each_class[target].model)
        assert (before - kept)[others].mean() <= 0.005 < (before - after)[others].mean()
        assert bits(result.patch.revert(result.model)) == bits(original)
    result = forget(original, [samples(0), samples(6)], [0, 6])
    assert by_class(result.model)[[0, 6]].max() <= 0.01
    assert bits(result.patch.revert(result.model)) == bits(original)


def test_a_budget_that_no_share_reaches_ends_and_is_told(original, samples):
    """Noise this small changes weights, but no answer."""
    with pytest.warns(UserWarning, match="samples are still taken for the class"):
        result = forget(original, samples(6), 6, "lra-npp", "gaussian", scale=1e-5)
    with torch.no_grad():
        left = int((result.model(samples(6)).argmax(1) == 6).sum())
    assert f"{left} of 36 samples left" in result.patch.metadata["budget"]
    assert left > 0
    assert result.patch.weights_changed > 0
    assert bits(original) == bits(result.patch.revert(result.model))


def test_a_request_to_forget_single_samples_is_refused(original, samples):
    x = samples(1)[:3]
    for x_, target, match in (
        (x, [1, 1, 1], "named twice: whole classes are forgotten here, not single samples"),
        ([*x], [1, 1, 1], "named twice"),
        (x, np.array([1, 1, 1]), "named twice"),
        (x, torch.tensor([1, 1, 1]), "target is tensor"),
        (x, [1, 3, 7], "3 tensors of samples for 3 classes"),
        ([x], [1, 3], "1 tensors of samples for 2 classes"),
        ([x, x, x], [1, 3], "3 tensors of samples for 2 classes"),
        ([], [], "0 tensors of samples for 0 classes"),
        ([x], 1, "x is list"),
        ([x, x], [1, True], "target is"),
        ([x, x], [1, 3.0], "target is"),
        ([x, x], ["1", "3"], "target is"),
        ([x, x], {1, 3}, "target is"),
        ([x, x], [1, 10], "class 10 of 10"),
    ):
        before = bits(original)
        with pytest.raises(ZsuError, match=match):
            forget(original, x_, target)
        assert bits(original) == before


def test_classes_whose_names_are_numbers(original, splits, tmp_path):
    """Folders 3, 7 and 42, sorted as text, of bags, sandals and trousers: asked for and reported by name."""
    to_image, y = transforms.ToPILImage(), zsu.data.targets(splits.test)
    folders = {"3": 8, "42": 1, "7": 5}
    for part in ("train", "test"):
        for name, c in folders.items():
            (tmp_path / part / name).mkdir(parents=True)
            for i in (y == c).nonzero()[:12, 0].tolist():
                to_image(splits.test.data[i]).save(tmp_path / part / name / f"{i}.png")
    grey = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    data = zsu.data.load(tmp_path, transform=grey)
    assert data.test.classes == ["3", "42", "7"]
    model = copy.deepcopy(original)
    model.head = nn.Linear(32, 3)
    with torch.no_grad():
        model.head.weight.copy_(original.head.weight[[*folders.values()]])
        model.head.bias.copy_(original.head.bias[[*folders.values()]])
    p, labels = zsu.evaluation.predict(model.eval(), data.test)
    assert zsu.evaluation.accuracy(p, labels) > 0.9
    for name, index in (("3", 0), ("42", 1), ("7", 2)):
        assert zsu.data.class_index(data.test, name) == index
        samples = zsu.data.samples(data.test, name, 10)
        result = forget(model, samples, zsu.data.class_index(data.test, name))
        assert data.test.classes[int(result.patch.metadata["target"])] == name
        p, labels = zsu.evaluation.predict(result.model, data.test)
        assert zsu.evaluation.accuracy(p[labels == index], labels[labels == index]) == 0
        assert zsu.evaluation.accuracy(p[labels != index], labels[labels != index]) > 0.9
        with pytest.raises(ZsuError, match=f"3 12, 42 12, 7 12. leave out {name}"):
            forget(model, samples, index, retained=data.train)
    for wrong in (42, "1", 7):
        with pytest.raises(ZsuError, match="there is no class .*choose by index or name: 0 3, 1 42, 2 7"):
            zsu.data.class_index(data.test, wrong)


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask", "boundary-shrink"])
@pytest.mark.parametrize("target", [0, 1])
def test_samples_that_are_no_finite_images_of_the_model_are_refused(original, x, method, target):
    for bad in (x.double(), (255 * x).to(torch.uint8), x.expand(-1, 3, -1, -1), x[0], x[:0], x * torch.nan):
        with pytest.raises(ZsuError):
            forget(original, bad, target, method)


# --- devices and shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask", "boundary-shrink"])
def test_samples_on_another_device_are_refused(original, x, method):
    for model, samples in ((original, x.to("meta")), (copy.deepcopy(original).to("meta"), x)):
        with pytest.raises(ZsuError, match="on meta"):
            forget(model, samples, TROUSER, method)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(original, x, without, method):
    model = copy.deepcopy(original).cuda()
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    with pytest.raises(ZsuError, match="cpu"):
        forget(model, x, TROUSER, method, **more)
    result = forget(model, x.cuda(), TROUSER, method, **more)
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    assert bits(original) == bits(result.patch.revert(result.model).cpu())


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask"])
def test_grey_images_and_a_last_convolution_of_one_channel(x, method):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
        ).eval()  # fmt: skip
    with torch.no_grad():
        target = int(model(x).argmax(1).mode().values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network of noise need not reach the goal
        result = forget(model, x, target, method)
    changed = set(result.patch.changes)
    if method == "lra-npp":
        assert changed == {"0.weight", "2.weight"}
        assert (result.model[2].weight == 0).all()  # the only neuron of its layer
    elif method == "head-npp":
        assert changed == {"5.weight"}
        assert (result.model[5].weight == 0).all()  # and all that it leads to
    else:
        assert largest(result.model, x, target) <= (0 if method == "mask" else 0.001 * (1 + 1e-4))
    assert bits(model) == bits(result.patch.revert(result.model))


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask"])
def test_colour_images_and_a_network_of_torchvision(method):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = torchvision.models.resnet18(num_classes=5).eval(), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        target = int(model(x).argmax(1).mode().values)
        x = x[model(x).argmax(1) == target].repeat(5, 1, 1, 1)
    start = bits(model)
    result = forget(model, x, target, method)
    if method in ("paths", "mask"):
        assert largest(result.model, x, target) <= (0 if method == "mask" else 0.001 * (1 + 1e-4))
    if method == "lra-npp":
        with torch.no_grad():
            assert (result.model(x).argmax(1) != target).all()
    for (n, b), c in zip(model.named_buffers(), result.model.buffers(), strict=True):
        assert torch.equal(b, c), n  # running statistics are not touched
    assert bits(model) == start == bits(result.patch.revert(result.model))


# --- neurons: budgets and options -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1, 5])
def test_lra_npp_takes_the_least_share_that_leaves_no_sample(original, samples, target):
    """In steps of 2 %; here in one layer, so that k can say every smaller share by itself."""
    x = samples(target)

    def left(result):
        with torch.no_grad():
            return int((result.model(x).argmax(1) == target).sum())

    result = forget(original, x, target, "lra-npp", layers=["conv3"])
    share = int(result.patch.metadata["budget"].split(" %")[0])
    assert result.patch.metadata["budget"] == f"{share} % of each layer"
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
        score = frequency(next(n for n in explain(original, x, TROUSER).layers if n.name == layer), 4)
        assert b == best(score, 6).tolist()
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


# --- what the methods do --------------------------------------------------------------------------------------


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


# --- noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_is_reproducible_and_leaves_the_global_generator_alone(original, x, kind):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, same, other = (forget(original, x, TROUSER, "lra-npp", kind, seed=s) for s in (0, 0, 1))
    forget(original, x, TROUSER, "random")
    assert torch.equal(state, torch.random.get_rng_state())
    assert bits(first.model) == bits(same.model)
    assert bits(first.model) != bits(other.model)


# --- worked out by hand ---------------------------------------------------------------------------------------


def most_frequent(relevance, k, number):
    return best(frequency(Share(Layer("linear", "fc"), torch.tensor(relevance)), k), number).tolist()


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
        ({"method": "mask", "perturbation": "gaussian"}, "'mask' adds no noise"),
        ({"method": "lra-npp", "perturbation": "gaussian", "scale": -1.0}, "scale is -1.0"),
        ({"method": "lra-npp", "k": 2, "perturbed": 17}, "conv1: k is 17, the layer has 16 neurons"),
        ({"method": "head-npp", "k": 2, "perturbed": 33}, "fc: k is 33, the layer has 32 neurons"),
        ({"method": "lra-npp", "perturbed": 3}, "perturbed without k. give both"),
        ({"method": "lra-npp", "k": 3, "perturbed": 0}, "perturbed is 0. use an integer of at least 1"),
        ({"perturbed": 3, "k": 3}, "'paths' takes no perturbed. use one of lra-npp, head-npp"),
        ({"method": "random", "perturbed": 3, "k": 3}, "'random' takes no perturbed"),
        ({"method": "boundary-shrink", "k": 3}, "'boundary-shrink' takes no k. use one of paths"),
        ({"method": "mask", "k": 3}, "'mask' takes no k"),
        ({"method": "boundary-shrink", "perturbation": "laplace"}, "'boundary-shrink' adds no noise"),
        ({"layers": ["conv1"]}, "'paths' takes no layers. use one of lra-npp, random"),
        ({"method": "lra-npp", "layers": ["conv9"]}, r"called \['conv9'\]. use some of conv1, conv2, conv3, fc"),
        ({"method": "lra-npp", "layers": ["conv1", "head"]}, r"called \['head'\]"),
        ({"method": "lra-npp", "layers": []}, "use some of conv1"),
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
)
def test_bad_arguments_are_refused(original, x, arguments, match):
    before = bits(original)
    with pytest.raises(ZsuError, match=match):
        forget(original, **{"x": x, "target": TROUSER} | arguments)
    assert before == bits(original)


def test_train_mode_is_refused(original, x):
    with pytest.raises(ZsuError, match=r"train mode. call model.eval\(\)"):
        forget(copy.deepcopy(original).train(), x, TROUSER)


def test_an_edit_without_effect_is_warned_about(original, x):
    with pytest.warns(UserWarning, match="the edit has no effect"):
        forget(original, x, TROUSER, "lra-npp", "gaussian", scale=0.0)


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


def test_a_head_whose_outputs_are_not_the_logits_is_left_where_it_is(original, x):
    """A change of the head would arrive doubled; edges are still cut."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(original)

        def forward(self, x):
            return 2 * self.net(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the edges alone need not be enough
        result = forget(Scaled().eval(), x, TROUSER)
    assert "rerouted" not in result.patch.metadata["budget"]
    assert result.cut["source"].notna().all()
    assert result.patch.weights_changed == sum(len(c.index) for c in result.patch.changes.values()) > 0


class Turned(nn.Module):
    """The last layer's outputs are not the logits: of the other sign, or in another order."""

    def __init__(self, model, how):
        super().__init__()
        self.net, self.how = model, how

    def forward(self, x):
        return -self.net(x) if self.how == "sign" else self.net(x).flip(1)


@pytest.mark.parametrize("how", ["sign", "order"])
@pytest.mark.parametrize("method", ["mask", "bias-shift"])
def test_a_mask_of_the_wrong_row_is_refused(original, x, method, how):
    model = Turned(copy.deepcopy(original), how).eval()
    with torch.no_grad():
        target = int(model(x).argmax(1).mode().values)
    before = bits(model)
    with pytest.raises(ZsuError, match="are not the logits in their order"):
        forget(model, x, target, method)
    assert bits(model) == before


def test_no_gradient_reaches_the_callers_samples(original, x):
    seen = x.clone().requires_grad_()
    forget(original, seen, TROUSER, "boundary-shrink")
    assert seen.grad is None
    forget(original, seen * 1.0, TROUSER, "boundary-shrink")  # nor is its graph used


@pytest.mark.parametrize("target", [torch.tensor(1), np.array(1)])
def test_a_class_in_a_tensor_is_refused_in_one_line(original, x, target):
    with pytest.raises(ZsuError, match="pass the index of one class"):
        forget(original, x, target)


def test_heads_and_layers_that_are_not_called_as_modules(original, x, without):
    """By F.linear, or with a named argument; and one that is not used at all."""

    class Functional(nn.Module):
        def __init__(self, named):
            super().__init__()
            self.net, self.named = copy.deepcopy(original), named
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            net = self.net
            h = net.relu3(net.conv3(net.pool2(net.relu2(net.conv2(net.pool1(net.relu1(net.conv1(x))))))))
            h = net.relu4(net.fc(net.fit(net.pool3(h)).flatten(1)))
            return net.head(input=h) if self.named else nn.functional.linear(h, net.head.weight, net.head.bias)

    named, functional = Functional(True).eval(), Functional(False).eval()
    assert "rerouted" in forget(named, x, TROUSER).patch.metadata["budget"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the edges alone are not enough
        assert "rerouted" not in forget(functional, x, TROUSER).patch.metadata["budget"]
    assert forget(functional, x, TROUSER, "mask").patch.weights_changed == 33
    for model in (named, functional):
        assert forget(model, x, TROUSER, "svd", retained=without(1)).patch.weights_changed > 0
