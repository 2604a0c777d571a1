"""The method `paths`: what it cuts and moves, one class and several."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision import transforms

import zsu.data
import zsu.evaluation
import zsu.models
from helpers import METHODS, NEED_RETAINED, TROUSER, Counting, bits, largest
from zsu import ZsuError, explain_each, forget
from zsu.forgetting.cutting import add_noise
from zsu.forgetting.perturb import model_hash, undo
from zsu.forgetting.selection import (
    count_affordable,
    find_specific_edges,
)

pytestmark = pytest.mark.filterwarnings("ignore:3 samples are few")


# --- paths ------------------------------------------------------------------------------------------------------------


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
    left = [largest(each_class[target].model, seen, target) for seen in (x, add_noise(x, 0))]
    assert max(left) == pytest.approx(0.001, rel=1e-4)  # and no less than that: the bias falls no further than needed


def test_input_noise_is_a_tenth_of_the_standard_deviation(x):
    noise = add_noise(x, 0) - x
    assert float(noise.std()) == pytest.approx(0.1 * float(x.std()), rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.001)
    assert torch.equal(add_noise(x, 0), add_noise(x, 0))
    assert not torch.equal(add_noise(x, 0), add_noise(x, 1))


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
    seen = torch.cat([x, add_noise(x, 0)])
    cut = each_class[target].cut
    edges = cut[cut["source"].notna()]
    (budget,) = each_class[target].patch.metadata["budget"]
    assert budget["edges"] == len(edges)
    one = torch.zeros(len(x), 10)
    one[:, target] = 1
    every = find_specific_edges(*explain_each(original, x, [one, 1 - one], "z+")).head(budget["available"])
    # Where all of them do not reach chance, the fewest that come as far; the head and its bias do the rest.
    best = largest(cut_by_hand(original, every), seen, target)
    assert budget["edges_enough"] == (best <= 0.1)
    goal = 0.1 if best <= 0.1 else best + 0.01
    assert largest(cut_by_hand(original, edges), seen, target) <= goal
    assert largest(cut_by_hand(original, edges[:-1]), seen, target) > goal


def test_no_more_edges_than_a_share_of_the_weights(original):
    blocks = [
        ("fc.weight", torch.tensor([0, 2]), torch.zeros(2, 60)),
        ("head.weight", torch.tensor([1]), torch.zeros(1, 1)),
    ]
    assert count_affordable(original, 3, blocks, 0.002) == 2  # 0.2 % of 42,090 weights are 84: 60, 61, but not 121
    assert count_affordable(original, 1, [("fc.weight", torch.tensor([0]), torch.zeros(1, 999))], 0.002) == 1


def test_for_some_classes_edges_alone_reach_chance_with_some_left(each_class):
    budgets = [r.patch.metadata["budget"][0] for r in each_class]
    assert sum(b["edges"] < b["available"] for b in budgets) >= 4


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
    receiving = set(result.patch.metadata["budget"][0]["receiving"])
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


def test_a_head_without_bias_is_warned_about_and_says_what_is_left(original, x):
    model = copy.deepcopy(original)
    model.head.bias = None
    with pytest.warns(UserWarning, match="the head has no bias: probability up to 0.9[0-9] is left"):
        result = forget(model, x, TROUSER)
    assert result.patch.metadata["budget"][0]["lowered"] == 0
    assert bits(model) == bits(result.patch.revert(result.model))


def test_features_that_are_all_dead_are_refused():
    """The bias alone decides for the class; nothing leads to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    model[1].bias.data -= 50
    model[3].bias.data = torch.tensor([5.0, 0, 0])
    with pytest.raises(ZsuError):
        forget(model, torch.rand(6, 1, 2, 2), 0)


# --- which classes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(original, samples):
    return forget(original, [samples(3), samples(7)], [3, 7])


def test_two_heads_that_cancel_are_refused_with_what_helps():
    body, heads = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()), [nn.Linear(8, 3), nn.Linear(8, 3)]
    with torch.no_grad():
        heads[0].weight.copy_(-heads[1].weight.abs())
        heads[1].weight.copy_(-heads[1].weight.abs())
        heads[1].bias.copy_(torch.tensor([0.0, 99.0, 0.0]))

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = body, *heads

        def forward(self, x):
            h = self.body(x)
            return self.one(h) + self.two(h)

    with pytest.raises(ZsuError, match="use another method"):
        forget(Sum().eval(), torch.rand(8, 1, 4, 4), 1)


def test_a_class_that_nothing_speaks_for_is_refused_with_what_helps():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[3].weight[1] = -1.0  # its bias alone makes it win
        model[3].bias.copy_(torch.tensor([-99.0, 99.0, -99.0]))
    with pytest.raises(ZsuError, match="no positive relevance leads from the logit to the input. use another method"):
        forget(model, torch.rand(8, 1, 4, 4), 1)


def test_two_classes_go_and_the_others_stay(each_class, both, before, by_class):
    one, two = by_class(each_class[3].model), by_class(both.model)
    assert one[3] <= 0.01
    assert two[[3, 7]].max() <= 0.01
    assert one[7] >= before[7] - 0.02
    others = [c for c in range(10) if c not in (3, 7)]
    assert (before - two)[others].max() <= 0.08
    assert (before - two)[others].mean() <= 0.01
    assert set(both.cut.loc[both.cut["source"].isna(), "channel"]) == {3, 7}
    assert both.patch.metadata["target"] == [3, 7]


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
    assert result.patch.metadata["target"] == [3]


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
    assert result.patch.metadata["target"] == [3, 7]
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
    assert result.patch.metadata["budget"][0]["left"] == left
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
        assert [data.test.classes[c] for c in result.patch.metadata["target"]] == [name]
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
