"""Where the evidence goes: each part by hand on small tensors, and the whole on the bundled model."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import zsu.data
import zsu.models
from helpers import bits
from zsu import explain, forget, rerouting
from zsu.forgetting.rerouting import (
    entering_inputs,
    features,
    neighbours,
    receivers,
    reroute,
    ridge_regression,
    typical_inputs,
    wanted_outputs,
    with_bias,
    without,
    without_evidence,
)

TROUSER = 1


class Points(torch.utils.data.Dataset):
    def __init__(self, x, y, classes):
        self.x, self.targets, self.classes = torch.tensor(x), torch.tensor(y), [str(c) for c in range(classes)]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.targets[i])


@pytest.fixture(scope="module")
def retained(splits):
    y = zsu.data.targets(splits.train)
    few = torch.cat([(y == c).nonzero()[:20, 0] for c in range(10) if c != TROUSER])
    return Subset(splits.train, few.tolist())


# --- the wanted outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_without_renormalises_the_other_classes(dtype):
    logits = torch.tensor([[7.0, math.log(2), math.log(3)], [0.0, 0.0, 50.0]]).to(dtype)
    before = logits.clone()
    p = without(logits, 0).exp()
    assert p.dtype == torch.float64
    expected = torch.tensor([[1e-12, 0.4, 0.6], [1e-12, 1e-12, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(p, expected, atol=1e-3 if dtype == torch.float16 else 1e-6, rtol=0)
    assert float(p.min()) >= 0.999e-12  # its logarithm stays finite
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("size", "reach"), [(10, 1), (36, 2)])
def test_all_pixels_are_blurred_but_those_that_speak_against_the_class(size, reach):
    generator = torch.Generator().manual_seed(0)
    x, relevance = torch.rand(2, 3, 2, size, size, generator=generator)
    relevance -= 0.5
    relevance[:, :, 0] = 0  # a pixel without relevance is blurred
    blurred = without_evidence(x, relevance)
    for image, after, r in zip(x, blurred, relevance.sum(1), strict=True):
        chosen = r >= 0
        assert torch.equal((after != image).all(0), chosen)  # both channels of a pixel
        assert torch.equal((after != image).any(0), chosen)
        for i, j in chosen.nonzero().tolist():
            rows, columns = (
                [min(max(c + d, 0), size - 1) for d in range(-reach, reach + 1)] for c in (i, j)
            )  # the border is repeated
            window = image[:, rows][:, :, columns]
            torch.testing.assert_close(after[:, i, j], window.mean((1, 2)))


def flat_model():
    """Two weighted layers, the middle one is the first: its inputs are the points themselves."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 4, bias=False))
    model[0].weight.data = torch.eye(2)
    model[2].weight.data = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 1]])
    return model.eval()


def test_neighbours_by_hand_and_a_class_without_images_is_far():
    model, x = flat_model(), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    kept = Points([[1.0, 0.0], [0.0, 5.0], [0.6, 0.8]], [0, 0, 2], 4)
    logits = neighbours(model, x, explain(model, x, 3), kept)
    # cosines of the first sample: 1 and 0 to class 0, 0.6 to class 2; of the second: 0 and 1, and 0.8
    both = math.log(math.exp(20) + 1)
    expected = torch.tensor([[both, 12.0, 12.0, 12.0], [both, 16.0, 16.0, 16.0]])
    torch.testing.assert_close(logits, expected)


def test_neighbours_do_not_depend_on_the_size_of_the_inputs():
    model, x = flat_model(), torch.tensor([[3.0, 1.0]])
    kept = Points([[1.0, 0.0], [0.6, 0.8]], [0, 2], 4)
    large = Points([[10.0, 0.0], [6.0, 8.0]], [0, 2], 4)
    relevance = explain(model, x, 3)
    torch.testing.assert_close(neighbours(model, x, relevance, kept), neighbours(model, 7 * x, relevance, large))


def test_features_have_length_1_and_are_pooled(original, x):
    for name, width in (("conv1", 1 * 8 * 8), ("conv2", 16 * 8 * 8), ("conv3", 32 * 7 * 7), ("head", 32)):
        f = features(original, x[:3], name)
        assert f.shape == (3, width)
        torch.testing.assert_close(f.norm(dim=1), torch.ones(3))
        assert not original.get_submodule(name)._forward_pre_hooks


def test_entering_inputs_are_those_of_the_forward_pass(original, x):
    with torch.no_grad():
        torch.testing.assert_close(original.head(entering_inputs(original, x, "head")), original(x))


def test_wanted_outputs_are_the_geometric_mean_of_both_answers(original, x):
    relevance = explain(original, x, TROUSER)
    wanted = wanted_outputs(original, x, TROUSER, relevance)
    others = [c for c in range(10) if c != TROUSER]
    with torch.no_grad():
        answers = [original(images)[:, others].double().softmax(1)
                   for images in (x, without_evidence(x, relevance.input))]  # fmt: skip
    product = (answers[0] * answers[1]).sqrt()
    torch.testing.assert_close(wanted[:, others].exp(), product / product.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert float(wanted[:, TROUSER].exp().max()) < 1e-11
    torch.testing.assert_close(wanted.exp().sum(1), torch.ones(36, dtype=torch.float64))


def test_with_retained_samples_the_neighbours_have_a_say_of_three_tenths(original, x, retained):
    relevance = explain(original, x, TROUSER)
    alone, together = (wanted_outputs(original, x, TROUSER, relevance, r) for r in (None, retained))
    near = without(neighbours(original, x, relevance, retained), TROUSER)
    torch.testing.assert_close(together, without(0.7 * alone + 0.3 * near, TROUSER))
    assert float((together - alone).abs().max()) > 0.1


# --- the head -------------------------------------------------------------------------------------------------


def test_typical_inputs_by_hand():
    """Rows minus their mean, which is (0, 0); cut off at 0 behind a ReLU; as long as the samples' are."""
    weight = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    behind = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # mean square of the length: 12.5
    length = 12.5**0.5
    torch.testing.assert_close(typical_inputs(weight, 0, behind), torch.tensor([[0, length], [0, 0]]).double())
    torch.testing.assert_close(typical_inputs(weight, 1, behind), length * torch.tensor([[0.8**0.5, 0.2**0.5],
                                                                                         [0, 0]]).double())  # fmt: skip
    signed = -behind
    rows = torch.tensor([[-(0.5**0.5), 0.5**0.5], [-(0.2**0.5), -(0.8**0.5)]], dtype=torch.float64)
    torch.testing.assert_close(typical_inputs(weight + 5, 0, signed), length * rows)  # the mean is left out


def problem(one=1.0):
    generator = torch.Generator().manual_seed(3)
    h, v = (torch.rand(n, 5, generator=generator, dtype=torch.float64) for n in (12, 4))
    return with_bias(h, one), torch.randn(12, 3, generator=generator, dtype=torch.float64), with_bias(v, one)


@pytest.mark.parametrize("one", [1.0, 0.0])
def test_ridge_regression_is_the_least_of_what_its_docstring_says(one):
    h, d, v = problem(one)
    ridge = 0.07
    solved = ridge_regression(h, d, v, ridge)
    small = ridge * rerouting.RIDGE * h[:, :-1].square().mean()  # the ridge on the weights themselves
    rows = torch.cat([h / len(h) ** 0.5, (ridge / len(v)) ** 0.5 * v, small**0.5 * torch.eye(6).double()])
    expected = torch.linalg.lstsq(rows, torch.cat([d / len(h) ** 0.5, torch.zeros(10, 3).double()])).solution
    torch.testing.assert_close(solved, expected)
    if one == 0:
        assert torch.equal(solved[-1], torch.zeros(3).double())  # no bias to change


def test_a_smaller_ridge_fits_better_and_disturbs_more():
    h, d, v = problem()
    solved = [ridge_regression(h, d, v, ridge) for ridge in (1e-9, 0.1, 10.0)]
    misfit = [float((d - h @ s).square().sum()) for s in solved]
    disturbance = [float((v @ s).square().sum()) for s in solved]
    assert misfit == sorted(misfit)
    assert disturbance == sorted(disturbance, reverse=True)
    assert misfit[0] < misfit[2]
    assert disturbance[2] < disturbance[0]


def small_network(bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5, bias=bias)).eval()
        model[2].weight.data *= 3
        x, move = torch.rand(500, 3), torch.randn(8, 5).double()
    return model, x, move


@pytest.mark.parametrize("bias", [True, False])
def test_many_samples_and_a_small_ridge_give_exactly_the_wanted_outputs(bias, monkeypatch):
    """Wanted is what a head with other weights answers, so that some head can give it."""
    monkeypatch.setattr(rerouting, "RIDGE", 1e-7)
    monkeypatch.setattr(rerouting, "RECEIVING", 1.0)
    model, x, move = small_network(bias)
    with torch.no_grad():
        wanted = without(model(x) + entering_inputs(model, x, "2").double() @ move, 4)
        before = without(model(x), 4)
        reroute(model, "2", entering_inputs(model, x, "2"), wanted, 4)
        after = without(model(x), 4)
    others = slice(0, 4)
    assert float((before - wanted)[:, others].abs().max()) > 0.5
    torch.testing.assert_close(after[:, others], wanted[:, others], atol=2e-3, rtol=0)


def divergence(p, q):
    """Mean KL of log-probabilities."""
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("bias", [True, False])
def test_the_outputs_come_nearer_to_the_wanted_ones(bias):
    model, x, move = small_network(bias)
    with torch.no_grad():
        wanted = without(model(x) + entering_inputs(model, x, "2").double() @ move, 4)
        before = divergence(wanted, without(model(x), 4))
        reroute(model, "2", entering_inputs(model, x, "2"), wanted, 4)
        assert divergence(wanted, without(model(x), 4)) < 0.5 * before


@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_receive_nothing_stay_bit_for_bit(bias):
    """Half of the samples want class 0 and half want class 2; class 1 gets a thousandth."""
    model, x, _ = small_network(bias)
    with torch.no_grad():
        model[2].weight[1] = -model[2].weight.abs().max() * 3  # class 1 has no probability now
        model[2].weight[3] = -model[2].weight.abs().max() * 3
    wanted = torch.full((500, 5), 1e-12, dtype=torch.float64)
    wanted[:250, 0] = wanted[250:, 2] = 0.999
    wanted[:, 1] = 0.001
    before = copy.deepcopy(model)
    assert sorted(reroute(model, "2", entering_inputs(model, x, "2"), wanted.log(), 4)) == [0, 2]
    for name, p in before.named_parameters():
        q = model.get_parameter(name)
        if not name.startswith("2"):
            assert torch.equal(p, q), name
        else:
            assert torch.equal(p[[1, 3, 4]], q[[1, 3, 4]]), name
            assert (p[[0, 2]] != q[[0, 2]]).any(), name


def test_receivers_by_hand():
    now, wanted = (
        torch.tensor([[0.6, 0.3, 0.1, 0, 0], [0.4, 0.5, 0.1, 0, 0]]),
        torch.tensor([[0.1, 0.3, 0.596, 0, 0.004]]),
    )
    # mean moves .4, .1, .496, 0, .004: the last but one is not needed, nor is the last for 99 % of 1.0
    assert receivers(now, wanted, 1000).tolist() == [2, 0, 1]
    even, moved = torch.full((1, 99), 1 / 99), torch.eye(99)[:1]
    assert len(receivers(even, moved, 100_000)) == 98  # the 99th is not needed: it loses 1/99 of 98/99
    assert len(receivers(even, moved, 2000)) == 30  # of 2,000 rows 1.5 %
    assert len(receivers(even, moved, 200)) == 10  # so many always


def test_a_thousand_classes_make_a_patch_smaller_than_the_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 1000)
        model, x = nn.Sequential(*layers).eval(), torch.rand(36, 1, 16, 16)
    target = int(model(x).argmax(1).mode().values)
    patch = forget(model, x, target).patch
    weights = sum(p.numel() for p in model.parameters())
    assert 0 < patch.weights_changed <= 0.02 * weights
    assert patch.nbytes <= 0.02 * weights * 12  # places, old and new values of four bytes
    edited = patch.apply(copy.deepcopy(model))
    assert not (edited(x).argmax(1) == target).any()
    assert bits(patch.revert(edited)) == bits(model)


def test_the_receiving_classes_come_largest_first(original, x):
    model = copy.deepcopy(original)
    wanted = wanted_outputs(model, x, TROUSER, explain(model, x, TROUSER))
    with torch.no_grad():
        moves = (without(model(x), TROUSER).exp() - wanted.exp()).abs().mean(0)
    receiving = reroute(model, "head", entering_inputs(model, x, "head"), wanted, TROUSER)
    assert receiving == moves.argsort(descending=True)[: len(receiving)].tolist()
    assert float(moves[receiving].sum()) >= 0.99 * float(moves.sum()) > float(moves[receiving[:-1]].sum())
    assert TROUSER not in receiving
    assert [n for n, p in original.named_parameters() if not torch.equal(p, model.get_parameter(n))] == [
        "head.weight",
        "head.bias",
    ]
    kept = [c for c in range(10) if c not in receiving]
    assert kept
    assert torch.equal(original.head.weight[kept], model.head.weight[kept])
    assert torch.equal(original.head.bias[kept], model.head.bias[kept])


def test_retained_samples_are_answered_as_before(original, x, retained):
    """Their mean Kullback-Leibler divergence without the class is at most 0.01, less than with guessed inputs."""
    left, disturbed = {}, {}
    kept = torch.stack([image for image, _ in retained])
    for name, data in (("guessed", None), ("known", retained)):
        model = copy.deepcopy(original)
        wanted = wanted_outputs(model, x, TROUSER, explain(model, x, TROUSER), retained)
        reroute(model, "head", entering_inputs(model, x, "head"), wanted, TROUSER, data)
        with torch.no_grad():
            left[name] = divergence(wanted, without(model(x), TROUSER))
            disturbed[name] = divergence(*(without(m(kept), TROUSER) for m in (original, model)))
    with torch.no_grad():
        before = divergence(wanted, without(original(x), TROUSER))
    assert 0 < disturbed["known"] <= 0.01
    assert disturbed["known"] < disturbed["guessed"]
    assert max(left.values()) < before / 2
