"""Each measure of the audit against a value worked out by hand, and what is observed of a model."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Subset
from toys import Fixed, images

from zsu import ZsuError
from zsu.data import Images
from zsu.evaluation import accuracy, jensen_shannon, predict, privacy, representation, robustness, utility
from zsu.evaluation.audits import interval
from zsu.evaluation.observed import Given, Observed, Outputs, observe, spread_layers
from zsu.inside import logit_layer

NONE = torch.zeros(0, 1, 1, 1)


def outputs(probabilities, labels, target=0, features=None):
    """Outputs of given probabilities; class 0 is to be forgotten."""
    p, labels = torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels)
    return Outputs(p.log(), labels, labels == target, features or {})


def of_logits(logits, labels, target=0):
    logits, labels = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    return Outputs(logits, labels, labels == target)


def given(original=None, target=(0,), **rest):
    values = {"train": None, "x": NONE, "y": NONE, "beside": NONE, "original_at": 1.0, "seed": 0}
    return Given(original, list(target), **values | rest)


def model(train, test=None, siblings=()):
    return Observed(None, train, test or train, siblings=list(siblings))


# --- by hand --------------------------------------------------------------------------------------------------


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_jensen_shannon_of_equal_and_disjoint_outputs():
    p = rows([0.2, 0.8], [1, 0])
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(rows([1, 0]), rows([0, 1])) == pytest.approx(math.log(2), rel=1e-12)
    assert jensen_shannon(rows([0.5, 0.5, 0]), rows([0, 0, 1])) == pytest.approx(math.log(2), rel=1e-12)


def test_jensen_shannon_by_hand():
    """p = (1, 0), q = (1/2, 1/2): m = (3/4, 1/4), KL(p, m) = ln 4/3, KL(q, m) = (ln 2/3 + ln 2) / 2."""
    expected = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert jensen_shannon(rows([1, 0]), rows([0.5, 0.5])) == pytest.approx(expected, rel=1e-12)
    assert jensen_shannon(rows([0.5, 0.5]), rows([1, 0])) == pytest.approx(expected, rel=1e-12)
    two = jensen_shannon(rows([1, 0], [0.3, 0.7]), rows([0.5, 0.5], [0.3, 0.7]))  # the mean over samples
    assert two == pytest.approx(expected / 2, rel=1e-12)


def test_jensen_shannon_refuses_other_shapes():
    with pytest.raises(ZsuError, match=r"outputs of shape \(1, 2\) and \(1, 3\).*the same classes"):
        jensen_shannon(rows([1, 0]), rows([1, 0, 0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_jensen_shannon_refuses_what_is_no_probability(bad):
    with pytest.raises(ZsuError, match="q has values that are no probabilities"):
        jensen_shannon(torch.ones(1, 2) / 2, torch.tensor([[bad, 0.5]]))


def test_jensen_shannon_of_the_smallest_numbers():
    p, q = torch.tensor([[5e-324, 1.0]]).double(), torch.tensor([[0, 1.0]]).double()
    assert jensen_shannon(p, q) == jensen_shannon(q, p) == pytest.approx(0, abs=1e-12)


def test_accuracy_by_hand():
    p = rows([0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2])
    assert accuracy(p, torch.tensor([0, 1, 0, 0])) == 0.75
    assert accuracy(p[:1], torch.tensor([1])) == 0


def test_predict_gives_softmax_and_labels_and_no_graph():
    p, y = predict(Fixed([0.0, math.log(3.0)]).eval(), images([1, 0], 2))
    torch.testing.assert_close(p, rows([0.25, 0.75], [0.25, 0.75]), atol=1e-7, rtol=0)
    assert y.tolist() == [1, 0]
    assert p.dtype == torch.float64
    assert not p.requires_grad


def test_agreement():
    """Of three forget inputs two are predicted alike, of one retained input none."""
    m = model(outputs([[0.1, 0.9, 0], [0, 0.2, 0.8], [0, 0.6, 0.4], [0, 1, 0]], [0, 0, 0, 1]))
    r = model(outputs([[0.1, 0.8, 0.1], [0, 0.1, 0.9], [0, 0.4, 0.6], [0, 0, 1]], [0, 0, 0, 1]))
    assert utility.agreement(m, given(), [r]) == {"agree_forget": pytest.approx(2 / 3), "agree_retained": 0}
    assert utility.agreement(m, given(), [m, r])["agree_forget"] == pytest.approx((1 + 2 / 3) / 2)


def test_routing():
    """Mean (0, .5, .5) against (0, 1, 0): half of (0 + .5 + .5)."""
    m = model(outputs([[0, 1, 0], [0, 0, 1], [0, 1, 0]], [0, 0, 1]))
    r = model(outputs([[0, 1, 0], [0, 1, 0], [1, 0, 0]], [0, 0, 1]))
    assert utility.routing(m, given(), [r])["routing"] == pytest.approx(0.5)
    assert utility.routing(m, given(), [m])["routing"] == 0


def test_calibration():
    """.9 and right, .8 and wrong, in two bins: (|1 - .9| + |0 - .8|) / 2; in one bin the gaps add up before."""
    p = torch.tensor([[0.1, 0.9, 0], [0, 0.8, 0.2]], dtype=torch.float64)
    assert utility.calibration_error(p, torch.tensor([1, 2])) == pytest.approx(0.45)
    p = torch.tensor([[0.1, 0.9, 0], [0, 0.9, 0.1]], dtype=torch.float64)
    assert utility.calibration_error(p, torch.tensor([1, 2])) == pytest.approx(0.4)  # |.5 - .9|
    assert utility.calibration_error(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0])) == 0


def test_forget_rate():
    """The original tells members (.9, .1) from others (.1, .9); half of the model's vectors look like others."""
    original = model(outputs([[0.9, 0.1]] * 6, [0] * 6), outputs([[0.1, 0.9]] * 6, [0] * 6))
    half = model(outputs([[0.9, 0.1]] * 3 + [[0.1, 0.9]] * 3, [0] * 6))
    assert privacy.forget_rate(half, given(original), []) == {"fr": 0.5}
    assert privacy.forget_rate(original, given(original), []) == {"fr": 0}
    few = model(outputs([[0.9, 0.1]] * 4, [0] * 4))
    assert math.isnan(privacy.forget_rate(half, given(few), [])["fr"])


def test_forgetting_score():
    """Losses that tell everything, and losses that tell nothing."""
    known = model(outputs([[0.99, 0.01]] * 10, [0] * 10), outputs([[0.01, 0.99]] * 10, [0] * 10))
    assert privacy.forgetting_score(known, given(), []) == {"fs": 0.5}
    same = model(outputs([[0.0, 1.0]] * 10, [0] * 10))
    assert privacy.forgetting_score(same, given(), []) == {"fs": 0}


def test_five_features():
    """p = (.75, .25) of label 0: right, .75, .75, entropy, and the modified entropy of eq. 8."""
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    modified = -0.25 * math.log(0.75) - 0.25 * math.log(0.75)  # (1 - p_y) log p_y, and p log(1 - p) of the other
    assert privacy.five_features(p, torch.tensor([0]))[0].tolist() == pytest.approx([1, 0.75, 0.75, entropy, modified])
    wrong = privacy.five_features(p, torch.tensor([1]))[0]
    assert wrong.tolist()[:3] == [0, 0.25, 0.75]
    assert wrong[4] == pytest.approx(-0.75 * math.log(0.25) - 0.75 * math.log(0.25))


def test_membership_inference():
    """Members are sure and right, others are not: half of the forget images look like members."""
    sure, unsure = [0.01, 0.98, 0.01], [0.4, 0.3, 0.3]
    train = outputs([sure] * 20 + [[0.98, 0.01, 0.01]] * 5 + [[0.3, 0.4, 0.3]] * 5, [1] * 20 + [0] * 10)
    test = outputs([unsure] * 20 + [[0, 1, 0]] * 5, [1] * 20 + [0] * 5)
    found = privacy.membership_inference(model(train, test), given(), [])
    assert found == {"mia_confidence": 0.5, "mia_entropy": 0.5, "mia_five": 0.5}


def test_likelihood_ratio():
    """Two models of a kind with log-odds 0 and 2, and 4 and 6: means 1 and 5, variance 2 each."""
    unlearned, retrained = (torch.tensor(v, dtype=torch.float64) for v in ([[0.0], [2.0]], [[4.0], [6.0]]))
    x = torch.tensor([1.0], dtype=torch.float64)
    assert privacy.ratio(x, unlearned, retrained).tolist() == pytest.approx([16 / 4])
    assert privacy.ratio(x + 2, unlearned, retrained).tolist() == pytest.approx([0])  # in the middle


def shifted(by, noise):
    return of_logits([[by + n, 0.0] for n in noise], [0] * len(noise))


def test_u_lira_of_disjoint_and_of_equal_kinds():
    noises = ([0.0, 0.1, 0.2], [0.1, 0.3, 0.0], [0.2, 0.0, 0.1])
    low, high = ([model(shifted(by, n)) for n in noises] for by in (0, 8))
    first = model(low[0].train, siblings=low[1:])
    assert privacy.likelihood_ratio(first, given(), high) == {"ulira": 1}
    assert privacy.likelihood_ratio(first, given(), low) == {"ulira": 0.5}
    assert math.isnan(privacy.likelihood_ratio(model(low[0].train, siblings=low[1:2]), given(), high)["ulira"])
    assert math.isnan(privacy.likelihood_ratio(first, given(), high[:2])["ulira"])


def test_klom():
    """Margins 0, 1, 2 (mean 1, variance 1) and 4, 5, 6: KL = (5 - 1)^2 / 2."""
    a, b = ([model(shifted(0, [k])) for k in ks] for ks in ((0.0, 1.0, 2.0), (4.0, 5.0, 6.0)))
    first = model(a[0].train, siblings=a[1:])
    assert privacy.margins_kl(first, given(), b)["klom"] == pytest.approx(8)
    assert privacy.margins_kl(first, given(), a)["klom"] == pytest.approx(0)
    wide = [model(shifted(0, [k])) for k in (-1.0, 1.0, 3.0)]  # mean 1, variance 4
    assert privacy.margins_kl(first, given(), wide)["klom"] == pytest.approx(math.log(2) + 1 / 8 - 1 / 2)


def test_margins_are_clipped():
    assert privacy.margin(of_logits([[-1e4, 0.0], [1e4, 0.0]], [0, 0])).tolist() == [-30, 30]


def test_class_membership():
    """References send class 0 to class 1 (never to 2), but with less margin than they give class 1 itself."""
    of_class, of_neighbour = [-9.0, 2.0, 0.0], [-9.0, 9.0, 0.0]
    train = of_logits([of_class] * 6 + [of_neighbour] * 6 + [[-9.0, 0.0, 9.0]] * 6, [0] * 6 + [1] * 6 + [2] * 6)
    reference = model(train)
    for rows, share in (([of_class] * 4, 1), ([of_neighbour] * 4, 0), ([of_class] * 3 + [of_neighbour], 0.75)):
        assert privacy.class_membership(model(of_logits(rows, [0] * 4)), given(), [reference]) == {"cmia": share}
    masked = model(of_logits([[-1e4, 2.0, 0.0]] * 4, [0] * 4))  # the class's own logit does not count
    assert privacy.class_membership(masked, given(), [reference]) == {"cmia": 1}
    assert math.isnan(privacy.class_membership(masked, given(), [])["cmia"])


class Head(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.head = nn.Linear(2, len(bias))
        self.head.weight.data, self.head.bias.data = torch.tensor(weight), torch.tensor(bias)

    def forward(self, x):
        return self.head(x.flatten(1))


def with_features(features, labels, weight, bias):
    net = Head(weight, bias).eval()
    h = torch.tensor(features)
    labels = torch.tensor(labels)
    both = Outputs(net(h).detach().double(), labels, labels == 0, {"head": h})
    return Observed(net, both, both, head="head")


def test_head_shortcut():
    """Bias -3 against a mean of 1; norm 5 against a mean of 2."""
    m = with_features([[1.0, 0.0]], [0], [[3.0, 4.0], [2.0, 0.0], [0.0, 2.0]], [-3.0, 0.0, 2.0])
    assert representation.head_shortcut(m, given(), []) == {"head_bias": -4, "head_norm": 2.5}
    m.head = None
    assert all(map(math.isnan, representation.head_shortcut(m, given(), []).values()))


def test_prototype_attack():
    """Class 0 lies along (1, 1); its row is 0 and its bias -99. With a = 1 its row is (1, 1), of norm sqrt 2 as the
    others' mean, its bias 0: an image (4, 4) gets 8 for class 0 and 4 sqrt 2 for each other."""
    root = math.sqrt(2)
    m = with_features([[4.0, 4.0]] * 5 + [[4.0, 0.0], [0.0, 4.0]], [0] * 5 + [1, 2],
                      [[0.0, 0.0], [root, 0.0], [0.0, root]], [-99.0, 0.0, 0.0])  # fmt: skip
    found = representation.prototype_attack(m, given(), [])
    assert (found["pra_at_100"], found["pra_ag_100"]) == (1, 1)  # 4 sqrt 2 beats 4
    assert found["pra_at_50"] == 0  # 4 does not beat 4 sqrt 2
    assert found["pra_at_80"] == 1  # 6.4 does


def test_linear_probes():
    """One layer shows the class, the other is the same for all."""
    labels = torch.tensor([0] * 8 + [1] * 8)
    shows, blank = torch.where(labels == 0, 1.0, -1.0)[:, None], torch.zeros(16, 1)
    both = Outputs(torch.zeros(16, 2).double(), labels, labels == 0, {"early": blank, "late": shows})
    found = representation.linear_probes(model(both), given(model(both)), [])
    assert found == {"probe_early": 0.5, "probe50_early": 0.5, "probe_late": 1, "probe50_late": 1}
    other = Outputs(torch.zeros(16, 2).double(), labels, labels == 0, {"0.early": shows, "0.late": torch.ones(16, 2)})
    found = representation.linear_probes(model(other), given(model(both)), [])
    assert (found["probe_early"], math.isnan(found["probe_late"])) == (1, True)  # by depth; one is of another width


def pixels(values, labels):
    x = torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return Images(x, torch.tensor(labels), ["f", "g"])


def test_relearning_counts_steps():
    """Who knows the class needs no step; who cannot learn gets the most; steps depend on the seed only."""
    data = pixels([255, 0] * 8, [0, 1] * 8)
    x, y = torch.ones(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)

    def steps(weight, bias, learns=True):
        net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
        net[1].weight.data, net[1].bias.data = torch.tensor([[w] for w in weight]), torch.tensor(bias)
        if not learns:
            net.append(nn.Threshold(1e9, 0.0)).eval()
        before = [p.clone() for p in net.parameters()]
        m = Observed(
            net, *(Outputs(net(t).detach().double(), v, v == 0) for t, v in ((data.data / 255, data.targets),) * 2)
        )
        found = representation.relearning(m, given(train=data, x=x, y=y), [])["relearn"]
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        return found

    assert steps([1.0, 0.0], [0.0, 0.0]) == 0
    assert 0 < steps([0.0, 0.0], [-0.02, 0.0]) < steps([0.0, 0.0], [-0.05, 0.0]) < 100
    assert steps([0.0, 0.0], [-1e4, 0.0]) == representation.MOST_STEPS


def test_to_int8_and_float16():
    w = torch.tensor([[127.0, 64.4, -1.2]])
    assert robustness.to_int8(w).tolist() == [[127, 64, -1]]
    assert robustness.to_int8(torch.zeros(1, 2)).tolist() == [[0, 0]]
    assert robustness.to_int8(torch.tensor([-1e4, 0.3])).tolist() == pytest.approx([-1e4, 0.3])  # a bias stays
    net = nn.Linear(1, 1)
    net.weight.data.fill_(1 + 2**-12)
    assert robustness.with_weights(net, lambda v: v.half().to(v.dtype)).weight.item() == 1
    assert net.weight.item() != 1


def test_robustness_finds_a_class_that_comes_back_in_the_dark():
    """Predicts class 0 below a brightness of .8 only."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    net[1].weight.data, net[1].bias.data = torch.tensor([[-1.0], [0.0]]), torch.tensor([0.8, 0.0])
    x, y = torch.ones(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64)
    found = robustness.robustness(Observed(net, None, None), given(x=x, y=y), [])
    assert found["at_brightness"] == 1
    assert found["at_float16"] == found["at_crop"] == 0


def test_images_beside_the_class_have_just_crossed():
    """Class 0 above .5: images at .52 cross within .1 of the range, those at .9 cannot."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    net[1].weight.data, net[1].bias.data = torch.tensor([[1.0], [0.0]]), torch.tensor([-0.5, 0.0])
    x = torch.tensor([0.52, 0.9, 0.0, 1.0]).reshape(4, 1, 1, 1)
    found = robustness.images_beside(net, x, torch.tensor([0, 0, 1, 0]))
    assert len(found) == 1
    assert 0.42 <= found.item() <= 0.5


def test_over_unlearning():
    """A mask changes nothing beside the class; a model that says the opposite changes as much as can be."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(1, 3)).eval() for _ in range(3)]
    for net, bias in zip(nets, ([5.0, 0.0, -90.0], [-1e4, 0.0, -90.0], [0.0, -90.0, 90.0]), strict=True):
        net[1].weight.data.zero_()
        net[1].bias.data = torch.tensor(bias)
    seen = [Observed(net, None, None) for net in nets]
    about = given(seen[0], beside=torch.zeros(2, 1, 1, 1))
    assert robustness.over_unlearning(seen[1], about, []) == {"ou": pytest.approx(0, abs=1e-12)}
    assert robustness.over_unlearning(seen[2], about, [])["ou"] == pytest.approx(math.log(2))
    assert math.isnan(robustness.over_unlearning(seen[1], given(seen[0]), [])["ou"])


def test_interval_of_two_values():
    """1 and 3: mean 2, sd sqrt 2, t(.975, 1) = 12.706; half-width t sd sqrt(1 + 1/2)."""
    found = interval([1.0, 3.0, math.nan])
    assert (found["mean"], found["references"]) == (2, 2)
    assert found["high"] - 2 == 2 - found["low"] == pytest.approx(12.7062 * math.sqrt(3), rel=1e-5)
    assert interval([0.3] * 3) == {"mean": pytest.approx(0.3), "low": pytest.approx(0.3), "high": pytest.approx(0.3),
                                   "references": 3}  # fmt: skip
    assert math.isnan(interval([1.0])["low"])
    assert math.isnan(interval([])["mean"])


# --- outputs --------------------------------------------------------------------------------------------------


def test_layers_kept_are_spread_and_the_head_is_found(original, splits):
    assert list(spread_layers(original, 4)) == ["conv2", "conv3", "fc", "head"]
    assert list(spread_layers(original, 2)) == ["conv2", "head"]
    assert list(spread_layers(original, 1)) == ["head"]
    assert logit_layer(original, splits.test[0][0][None]) == "head"
    scaled = nn.Sequential(original, nn.Softplus()).eval()
    assert logit_layer(scaled, splits.test[0][0][None]) is None


def test_features_are_what_enters_the_layers(original, splits):
    few = Subset(splits.test, range(3))
    found = observe(original, few, [1], depths=4)
    x = torch.stack([splits.test[i][0] for i in range(3)])
    with torch.no_grad():
        h = original.pool1(original.relu1(original.conv1(x)))
        logits = original(x)
    torch.testing.assert_close(found.features["conv2"], h.mean((2, 3)))
    torch.testing.assert_close(found.logits.float(), logits)
    assert found.features["head"].shape == (3, 32)
    assert not original._forward_pre_hooks
    assert all(not m._forward_pre_hooks for m in original.modules())
