"""Relevance against explicit messages, other libraries, unrolled twins, and inputs that broke such code elsewhere."""

import copy
import gc

import captum.attr
import pytest
import torch
import torchvision
import zennit.composites
import zennit.rules
import zennit.types
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers import Net
from zsu import ZsuError, explain, explain_each
from zsu.models import SmallCNN
from zsu.relevance.rules import AlphaBeta, Box, Epsilon, Flat, Gamma, WSquare

RULES = ["epsilon", "gamma", "z+", "alpha-beta"]


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(make, seed=0):
    """A module from `make` in float64 and eval mode, BatchNorm statistics included in what is random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double().eval()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.1)
    return model


def difference(a, b):
    """Largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def same(a, b, tolerance=1e-10):
    assert difference(a, b) <= tolerance


# --- explicit messages ----------------------------------------------------------------------------------------


def stab(z, epsilon):
    return torch.where(z < 0, z - epsilon, z + epsilon)


def epsilon_messages(x, M, b, R, e):
    """Messages (K, J) from output k to input j of z = M x + b, by Bach et al. (2015), eq. 58."""
    z = M * x
    return z * (R / stab(z.sum(1) + b, e))[:, None]


def gamma_messages(x, M, b, R, e, gamma=0.25):
    z = M @ x + b
    up, down = M + gamma * M.clamp(min=0), M + gamma * M.clamp(max=0)
    above = x.clamp(min=0) * up + x.clamp(max=0) * down
    below = x.clamp(min=0) * down + x.clamp(max=0) * up
    total_above = above.sum(1) + b + gamma * b.clamp(min=0)
    total_below = below.sum(1) + b + gamma * b.clamp(max=0)
    above, below = (m * (R / stab(t, e))[:, None] for m, t in ((above, total_above), (below, total_below)))
    return torch.where((z > 0)[:, None], above, below)


def alpha_beta_messages(x, M, b, R, e, alpha=2.0, beta=1.0):
    plus, minus = (M * x).clamp(min=0), (M * x).clamp(max=0)
    to_plus = plus * (R / stab(plus.sum(1) + b.clamp(min=0), e))[:, None]
    to_minus = minus * (R / stab(minus.sum(1) + b.clamp(max=0), e))[:, None]
    return alpha * to_plus - beta * to_minus


def box_messages(x, M, b, R, e, low=-4.0, high=5.0):
    z = M * x - low * M.clamp(min=0) - high * M.clamp(max=0)
    return z * (R / stab(z.sum(1), e))[:, None]


def w2_messages(x, M, b, R, e):
    return M**2 * (R / stab((M**2).sum(1) + b**2, e))[:, None]


def flat_messages(x, M, b, R, e):
    reach = (M != 0).double()
    return reach * (R / stab(reach.sum(1), e))[:, None]


REFERENCES = {
    "epsilon": (Epsilon(epsilon=0.01), epsilon_messages),
    "gamma": (Gamma(0.25, epsilon=0.01), gamma_messages),
    "z+": (AlphaBeta(1, 0, epsilon=0.01), lambda *a: alpha_beta_messages(*a, alpha=1, beta=0)),
    "alpha-beta": (AlphaBeta(2, 1, epsilon=0.01), alpha_beta_messages),
}
INPUT_REFERENCES = {
    "box": (Box(-4.0, 5.0, epsilon=0.01), box_messages),
    "w2": (WSquare(epsilon=0.01), w2_messages),
    "flat": (Flat(epsilon=0.01), flat_messages),
}


def matrix(f, shape):
    """Matrix (outputs, inputs) of a linear f: what it makes of the unit vectors."""
    inputs = torch.Size(shape).numel()
    return f(torch.eye(inputs, dtype=torch.float64).reshape(inputs, *shape)).flatten(1).T


LAYERS = {
    "conv2d": (lambda b: nn.Conv2d(2, 3, 3, padding=1, bias=b), (2, 5, 6)),
    "stride 2, odd": (lambda b: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=b), (2, 7, 7)),
    "stride 2, even": (lambda b: nn.Conv2d(2, 3, 3, stride=2, bias=b), (2, 8, 8)),
    "asymmetric": (lambda b: nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 2), bias=b), (2, 5, 6)),
    "dilation": (lambda b: nn.Conv2d(2, 3, 3, dilation=(2, 1), bias=b), (2, 7, 6)),
    "groups": (lambda b: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=b), (4, 5, 5)),
    "depthwise": (lambda b: nn.Conv2d(4, 8, 3, groups=4, bias=b), (4, 5, 5)),
    "same": (lambda b: nn.Conv2d(2, 3, (3, 5), padding="same", bias=b), (2, 6, 5)),
    "same, even kernel": (lambda b: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2), bias=b), (2, 6, 5)),
    "valid": (lambda b: nn.Conv2d(2, 3, 3, padding="valid", bias=b), (2, 5, 5)),
    "reflect": (lambda b: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", bias=b), (2, 5, 5)),
    "circular": (lambda b: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular", bias=b), (2, 5, 5)),
    "replicate": (lambda b: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="replicate", bias=b), (2, 5, 5)),
    "conv1d": (lambda b: nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=b), (2, 9)),
    "conv3d": (lambda b: nn.Conv3d(2, 3, 2, padding=(1, 0, 1), bias=b), (2, 3, 4, 3)),
    "transposed": (lambda b: nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1, bias=b), (2, 4, 3)),
    "transposed, groups": (lambda b: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2, bias=b), (4, 3, 3)),
    "linear": (lambda b: nn.Linear(7, 5, bias=b), (7,)),
}


@torch.no_grad()
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", REFERENCES | INPUT_REFERENCES)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_layer_equals_explicit_messages(layer, name, bias, nonnegative):
    pads_first = layer in ("reflect", "circular", "replicate", "same, even kernel")
    make, shape = LAYERS[layer]
    layer = seeded(lambda: make(bias))
    x = rand(2, *shape, seed=1)
    x = x.abs() if nonnegative else x
    rule, messages = (REFERENCES | INPUT_REFERENCES)[name]
    z = layer(x)
    if name in INPUT_REFERENCES and pads_first:  # such a layer reads the padded input
        with pytest.raises(ZsuError, match=f"^0: {type(rule).__name__} is a rule for layers that read"):
            explain(nn.Sequential(layer, nn.Flatten()).eval(), x, rand(*z.flatten(1).shape, seed=2), rule)
        return
    result = explain(nn.Sequential(layer, nn.Flatten()).eval(), x, rand(*z.flatten(1).shape, seed=2), rule)

    mode = getattr(layer, "padding_mode", "zeros")
    sides = [side for side in reversed(getattr(layer, "padding", ())) for _ in range(2)] if mode != "zeros" else []
    pad = (lambda t: F.pad(t, sides, mode)) if sides else (lambda t: t)
    plain = copy.deepcopy(layer)
    if bias:
        plain.bias = None
    if sides:
        plain.padding_mode, plain.padding = "zeros", (0, 0)
    M, P = matrix(plain, pad(x).shape[1:]), matrix(pad, shape)
    b = (z[0] - (M @ pad(x)[0].flatten()).reshape(z[0].shape)).flatten()
    R = [messages(pad(s).flatten(), M, b, r, rule.epsilon) for s, r in zip(x, result.seed, strict=True)]
    same(result.input, torch.stack([(m.sum(0) @ P).reshape(shape) for m in R]))

    channels, sources = z.shape[1], x.shape[1]
    whole = sum(R).reshape(channels, -1, sources, M.shape[1] // sources).sum((1, 3))  # (K Q, J P) -> (K, J)
    groups = getattr(layer, "groups", 1)
    own = [w.chunk(groups, 1)[g] for g, w in enumerate(whole.chunk(groups))]  # of each group only its own sources
    (edges,) = result.edges.values()
    same(edges, torch.cat(own))
    same(torch.cat(own).abs().sum(), whole.abs().sum())  # nothing flows between groups


# --- the ledger -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg11():
    """torchvision's VGG-11 with 64 hidden units instead of 4,096, to be quick in float64."""

    def make():
        model = torchvision.models.vgg11(num_classes=10)
        model.classifier[0], model.classifier[3] = nn.Linear(512 * 7 * 7, 64), nn.Linear(64, 64)
        model.classifier[6] = nn.Linear(64, 10)
        return model

    return seeded(make)


@pytest.fixture(scope="module")
def resnet18():
    return seeded(lambda: torchvision.models.resnet18(num_classes=10))


@pytest.fixture(scope="module")
def small():
    return seeded(SmallCNN)


SIZES = {"small": (2, 1, 28, 28), "vgg11": (2, 3, 32, 32), "resnet18": (2, 3, 32, 32)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SIZES)
def test_ledger_and_edges_close(name, rule, request):
    """Each layer and the whole model: what arrives = what goes on + bias + stabiliser."""
    model = request.getfixturevalue(name)
    result = explain(model, rand(*SIZES[name], seed=1), 3, rule)
    ledger = result.ledger.set_index("layer")
    scale = ledger[["out", "into", "bias", "stabiliser"]].abs().max(axis=1)
    assert (ledger["gap"].abs() <= 1e-9 * scale).all(), ledger
    assert ledger.loc["all", "out"] == pytest.approx(float(result.logits[:, 3].sum()), rel=1e-12)
    assert ledger.loc["all", "into"] == pytest.approx(float(result.input.sum()), rel=1e-12)
    for layer, edges in result.edges.items():
        row = ledger.loc[layer]
        assert float(result.nodes[layer].sum()) == pytest.approx(row["out"], rel=1e-9, abs=1e-12)
        assert float(edges.sum()) == pytest.approx(row["out"] - row["bias"] - row["stabiliser"], rel=1e-7, abs=1e-10)


def test_without_bias_each_target_keeps_its_relevance(small):
    """sum_j edges[k, j] = R_k for every k, and R_j = sum_k edges[k, j] for every j one layer below."""
    model = copy.deepcopy(small)
    for m in model.modules():
        if getattr(m, "bias", None) is not None:
            m.bias.data.zero_()
    result = explain(model, rand(3, 1, 28, 28), 2, Epsilon(epsilon=1e-12))
    for name in ("head", "fc", "conv3", "conv2", "conv1"):
        same(result.edges[name].sum(1), result.nodes[name].sum(0), 1e-8)
    for name, below in (("head", "fc"), ("conv3", "conv2"), ("conv2", "conv1"), ("conv1", "input")):
        same(result.edges[name].sum(0), result.nodes[below].sum(0), 1e-8)
    same(result.edges["fc"].sum(0).reshape(64, 9).sum(1), result.nodes["conv3"].sum(0), 1e-8)


# --- other libraries ------------------------------------------------------------------------------------------


def test_captum_on_vgg(vgg11):
    x = rand(2, 3, 32, 32, seed=1)
    separate = copy.deepcopy(vgg11)
    for m in separate.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
            m.rule = EpsilonRule(epsilon=1e-12)
    theirs = captum.attr.LRP(separate).attribute(x.clone(), target=5).detach()
    same(explain(vgg11, x, 5, Epsilon(epsilon=1e-12)).input, theirs, 1e-7)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Epsilon(epsilon=1e-6), zennit.rules.Epsilon(1e-6)),
        (Gamma(0.25, epsilon=1e-6), zennit.rules.Gamma(0.25, stabilizer=1e-6)),
        (AlphaBeta(1, 0, epsilon=1e-6), zennit.rules.ZPlus(stabilizer=1e-6)),
        (AlphaBeta(2, 1, epsilon=1e-6), zennit.rules.AlphaBeta(2, 1, stabilizer=1e-6)),
    ],
    ids=RULES,
)
def test_zennit_on_a_small_network(ours, theirs):
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding=1, groups=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 5),
        )
    )  # fmt: skip
    x = rand(3, 2, 14, 14, seed=1).requires_grad_()
    one = torch.eye(5, dtype=torch.float64)[2]
    composite = zennit.composites.LayerMapComposite(
        [(zennit.types.Activation, zennit.rules.Pass()), (zennit.types.Linear, theirs)]
    )
    with composite.context(copy.deepcopy(model)) as hooked:
        out = hooked(x)
        (expected,) = torch.autograd.grad(out, x, out.detach() * one)
    same(explain(model, x, 2, ours).input, expected, 1e-9)


# --- twins ----------------------------------------------------------------------------------------------------


def agrees(model, twin, x, rules=RULES, tolerance=1e-10):
    """Two ways to write one model give one relevance of the input."""
    same(model(x), twin(x), 1e-12)
    for rule in rules:
        same(explain(model, x, 1, rule).input, explain(twin, x, 1, rule).input, tolerance)


def head(features, classes=3):
    return seeded(lambda: nn.Linear(features, classes), seed=9)


def test_one_conv_applied_twice_equals_two_copies():
    conv = seeded(lambda: nn.Conv2d(2, 2, 3, padding=1))
    model = Net(lambda m, x: m.head(m.conv(m.conv(x).relu()).relu().flatten(1)), conv=conv, head=head(50)).eval()
    twin = nn.Sequential(conv, nn.ReLU(), copy.deepcopy(conv), nn.ReLU(), nn.Flatten(), head(50)).eval()
    agrees(model, twin, rand(2, 2, 5, 5))
    assert list(explain(model, rand(2, 2, 5, 5), 1).edges) == ["conv", "conv#2", "head"]


def test_one_pool_and_one_relu_object_used_twice_equal_copies():
    first, second = (seeded(lambda: nn.Conv2d(2, 2, 3, padding=1), seed) for seed in (1, 2))
    pool, relu = nn.MaxPool2d(2), nn.ReLU()
    model = nn.Sequential(first, relu, pool, second, relu, pool, nn.Flatten(), head(8)).eval()
    twin = nn.Sequential(
        first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), head(8)
    ).eval()
    agrees(model, twin, rand(2, 2, 8, 8))


@pytest.mark.parametrize("rule", REFERENCES)
def test_residual_without_bias_equals_explicit_messages(rule):
    """x + conv(x): the addition shares in proportion, and the sum of relevance is the logit."""
    conv = seeded(lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False))
    model = Net(lambda m, x: (x + m.conv(x)).flatten(1), conv=conv).eval()
    x = rand(2, 2, 3, 3)
    rule, messages = REFERENCES[rule]
    result = explain(model, x, rand(2, 18, seed=3), rule)
    M = matrix(conv, (2, 3, 3)).detach()
    for sample, R, found in zip(x.flatten(1), result.seed, result.input, strict=True):
        g = R / (sample + M @ sample)
        same(found.flatten(), sample * g + messages(sample, M, torch.zeros(18), M @ sample * g, rule.epsilon).sum(0))
    exact = explain(model, x, 4, Epsilon(epsilon=1e-12))
    assert float(exact.input.sum()) == pytest.approx(float(exact.logits[:, 4].sum()), rel=1e-9)


# (what becomes of a = conv(x), b = conv(x) in place, the same out of place)
IN_PLACE = {
    "relu after conv": (lambda a, b: F.relu(a, inplace=True), lambda a, b: a.relu()),
    "leaky relu": (lambda a, b: F.leaky_relu(a, 0.2, inplace=True), lambda a, b: F.leaky_relu(a, 0.2)),
    "+=": (lambda a, b: iadd(a, b), lambda a, b: a + b),
    "statement a.add_(b)": (lambda a, b: add_(a, b), lambda a, b: a + b),
    "relu after add": (lambda a, b: (a + b).relu_(), lambda a, b: (a + b).relu()),
    "a.relu_() += b.relu_()": (lambda a, b: iadd(a.relu_() * 1, b.relu_()).relu_(), lambda a, b: a.relu() + b.relu()),
    "mul_ and div_": (lambda a, b: a.mul_(-3.0).div_(2), lambda a, b: a * -1.5),
    "+= of a constant": (lambda a, b: iadd(a, torch.ones(5).double()), lambda a, b: a + torch.ones(5).double()),
}


def iadd(a, b):
    a += b
    return a


def add_(a, b):
    a.add_(b)
    return a


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_equals_out_of_place(name, rule):
    a, b = (seeded(lambda: nn.Conv2d(2, 2, 3, padding=1), seed) for seed in (1, 2))
    model, twin = (
        Net(lambda m, x, op=op: m.head(op(m.a(x), m.b(x)).flatten(1)), a=a, b=b, head=head(50)).eval()
        for op in IN_PLACE[name]
    )
    x = rand(2, 2, 5, 5)
    same(explain(model, x, 1, rule).input, explain(twin, x, 1, rule).input)
    same(
        torch.cat([n.sum(0) for n in explain(model, x, 1, rule).nodes.values()][1:3]),
        torch.cat([n.sum(0) for n in explain(twin, x, 1, rule).nodes.values()][1:3]),
    )


def test_relu_in_place_after_another_read():
    """h * 1 has read the negative value before it becomes 0."""
    a, fc = neuron((-1.0,)), neuron((-1.0, 1.0))

    def run(m, x):
        h = m.a(x)
        y = h * 1
        return m.fc(torch.cat([y, F.relu(h, inplace=True)], 1))

    result = explain(Net(run, a=a, fc=fc).eval(), torch.tensor([[2.0]]).double(), 0)
    torch.testing.assert_close(result.input, torch.tensor([[2.0]]).double(), atol=1e-5, rtol=0)
    assert float(result.nodes["a"].sum()) == pytest.approx(2, abs=1e-5)


def test_relu_in_place_on_the_input_and_on_the_logits():
    conv, x = seeded(lambda: nn.Conv2d(2, 2, 3)), rand(2, 2, 5, 5)
    kept = x.clone()
    model = Net(lambda m, x: m.conv(x.relu_()).flatten(1).relu_(), conv=conv).eval()
    twin = Net(lambda m, x: m.conv(x.relu()).flatten(1).relu(), conv=conv).eval()
    seed = torch.ones(2, 18).double()
    for rule in RULES:
        same(explain(model, x, seed, rule).input, explain(twin, x, seed, rule).input)
    assert torch.equal(x, kept)


def test_input_changed_after_a_layer_read_it_is_refused():
    conv = seeded(lambda: nn.Conv2d(2, 2, 3, padding=1))

    def run(m, x):
        y = m.conv(x)
        z = m.conv(y)
        y.mul_(2)
        return z.flatten(1)

    with pytest.raises(ZsuError, match="conv: .*changed in place.*out-of-place"):
        explain(Net(run, conv=conv).eval(), rand(1, 2, 3, 3), 0)


def folded(conv, bn):
    """The convolution or linear layer that conv and then bn compute, by hand."""
    out = copy.deepcopy(conv)
    s = bn.weight / (bn.running_var + bn.eps).sqrt()
    out.weight.data = conv.weight.data * s.reshape(-1, *[1] * (conv.weight.dim() - 1))
    bias = conv.bias.data if conv.bias is not None else 0
    out.bias = nn.Parameter((bias - bn.running_mean) * s + bn.bias)
    return out


@pytest.mark.parametrize("eps", [1e-3, 0.0])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_and_batchnorm_equal_the_folded_conv(bias, eps):
    conv = seeded(lambda: nn.Conv2d(2, 4, 3, groups=2, bias=bias))
    bn = seeded(lambda: nn.BatchNorm2d(4, eps=eps))
    model = nn.Sequential(conv, bn, nn.ReLU(inplace=True), nn.Flatten(), head(36)).eval()
    agrees(model, nn.Sequential(folded(conv, bn), nn.ReLU(), nn.Flatten(), head(36)).eval(), rand(2, 2, 5, 5))


def test_linear_and_batchnorm1d_equal_the_folded_linear():
    linear, bn = seeded(lambda: nn.Linear(6, 4)), seeded(lambda: nn.BatchNorm1d(4))
    model = nn.Sequential(linear, bn, nn.ReLU(), head(4)).eval()
    agrees(model, nn.Sequential(folded(linear, bn), nn.ReLU(), head(4)).eval(), rand(3, 6))


@pytest.mark.parametrize("rule", REFERENCES)
def test_batchnorm_before_conv_as_in_densenet_is_a_diagonal_layer(rule):
    bn, conv = seeded(lambda: nn.BatchNorm2d(2)), seeded(lambda: nn.Conv2d(2, 3, 2))
    model = nn.Sequential(bn, nn.ReLU(), conv, nn.Flatten()).eval()
    x = rand(1, 2, 3, 3)
    rule, messages = REFERENCES[rule]
    result = explain(model, x, 2, rule)
    with torch.no_grad():
        M = matrix(lambda t: F.conv2d(t, conv.weight), (2, 3, 3))
        b = conv.bias.repeat_interleave(4)
        R = messages(bn(x).relu().flatten(), M, b, result.seed[0], rule.epsilon).sum(0)
        shift = bn(torch.zeros(1, 2, 3, 3, dtype=torch.float64)).flatten()
        M = matrix(lambda t: bn(t), (2, 3, 3)) - shift[:, None]
        R = messages(x.flatten(), M, shift, R, rule.epsilon).sum(0)
    same(result.input.flatten(), R)


def test_resnet18_equals_its_folded_twin(resnet18):
    """BatchNorm merged by the tape = folded by hand; additions and in-place ReLUs = written out of place."""

    def block(b, x):
        y = b.conv2(b.conv1(x).relu())
        return ((b.downsample(x) if b.downsample is not None else x) + y).relu()

    def run(m, x):
        x = m.net.maxpool(m.net.conv1(x).relu())
        for stage in (m.net.layer1, m.net.layer2, m.net.layer3, m.net.layer4):
            for b in stage:
                x = block(b, x)
        return m.net.fc(x.mean((2, 3)))

    net = copy.deepcopy(resnet18)
    net.conv1 = folded(net.conv1, net.bn1)
    for m in net.modules():
        if isinstance(m, torchvision.models.resnet.BasicBlock):
            m.conv1, m.conv2 = folded(m.conv1, m.bn1), folded(m.conv2, m.bn2)
            m.downsample = folded(*m.downsample) if m.downsample is not None else None
    agrees(resnet18, Net(run, net=net).eval(), rand(1, 3, 32, 32), ["epsilon", "gamma"], 1e-6)


# --- inputs that broke such code elsewhere, worked out by hand ------------------------------------------------


def neuron(w, b=None):
    """A single neuron z = w x + b."""
    layer = nn.Linear(len(w), 1, bias=b is not None).double()
    layer.weight.data[:] = torch.tensor(w)
    if b is not None:
        layer.bias.data[:] = b
    return layer.eval()


BY_HAND = {
    "z+ ignores the sign of inputs": ((1, -1), None, (1, -2), "z+", (1, 2)),
    "z+ of a negative output": ((1, -1), -1.0, (1, 1), "z+", (-1, 0)),
    "alpha-beta of a negative output": ((1, -1), -1.0, (1, 1), "alpha-beta", (-2, 0.5)),
    "gamma": ((1, -0.5), None, (1, 1), Gamma(0.2), (0.5 * 1.2 / 0.7, -0.5 * 0.5 / 0.7)),
    "gamma of one weight": ((1,), None, (1,), Gamma(0.2), (1,)),
    "gamma of a negative output": ((0.5, -1), None, (1, 1), Gamma(0.2), (-0.5 * 0.5 / -0.7, -0.5 * -1.2 / -0.7)),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_one_neuron_by_hand(case):
    w, b, x, rule, expected = BY_HAND[case]
    found = explain(neuron(w, b), torch.tensor([x], dtype=torch.float64), 0, rule).input
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("image", ["zeros", "a row of zeros"])
def test_zeros_stay_finite_and_the_ledger_closes(small, image, rule):
    x = torch.zeros(2, 1, 28, 28, dtype=torch.float64)
    if image == "a row of zeros":
        x[1] = rand(1, 28, 28)
    result = explain(small, x, 1, rule)
    assert result.input.isfinite().all()
    assert all(e.isfinite().all() for e in result.edges.values())
    assert (result.ledger["gap"].abs() < 1e-9 * result.ledger[["out", "into"]].abs().max(axis=None)).all()


@pytest.mark.parametrize("rule", RULES)
def test_z_of_exactly_minus_epsilon_and_zero_rows_stay_finite(rule):
    x = torch.tensor([[1e-6], [0.0], [-1e-6]], dtype=torch.float64)
    result = explain(nn.Sequential(neuron((-1.0,)), neuron((1.0,))).eval(), x, torch.ones(3, 1).double(), rule)
    assert result.input.isfinite().all()


def test_a_module_with_two_inputs_gives_both_their_share():
    class Add(nn.Module):
        def forward(self, a, b):
            return a + b

    a, b = neuron((2.0, 0.0)), neuron((0.0, 3.0))
    model = Net(lambda m, x: m.add(m.a(x), m.b(x)), a=a, b=b, add=Add()).eval()
    result = explain(model, torch.tensor([[1.0, 1.0]], dtype=torch.float64), 0)
    torch.testing.assert_close(result.input, torch.tensor([[2.0, 3.0]], dtype=torch.float64), atol=1e-5, rtol=0)
    (add,) = [n for n in result.layers if n.kind == "add"]
    torch.testing.assert_close(torch.cat(add.edges), torch.tensor([2.0, 3.0]).double(), atol=1e-5, rtol=0)


def test_output_of_one_logit_has_target_0_and_no_other():
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert float(explain(neuron((1.0, 1.0)), x, 0).input.sum()) == pytest.approx(3, rel=1e-5)
    for target in (1, -1):
        with pytest.raises(ZsuError, match=f"class {target} of 1. use 0 to 0"):
            explain(neuron((1.0, 1.0)), x, target)


KINDS = {
    "Identity": lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(64, 3)),
    "Upsample": lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.Upsample(scale_factor=2), nn.Flatten(), nn.Linear(32, 3)),
    "Dropout": lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.Dropout2d(), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)),
    "Conv1d, BatchNorm1d": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(70, 3)
    ),
    "overlapping max-pool": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(16, 3)),
    "average pools": lambda: nn.Sequential(
        nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_keep_relevance(kind, rule):
    model = seeded(KINDS[kind])
    ledger = explain(model, rand(2, 4, 4, 4), 1, rule).ledger
    assert (ledger["gap"].abs() < 1e-10 * ledger["out"].abs().max()).all()


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 3, 2]])
@pytest.mark.parametrize("rule", RULES)
def test_batches_do_not_matter(small, rule, sizes):
    x = rand(8, 1, 28, 28)
    whole = explain(small, x, 4, rule)
    parts = [explain(small, part, 4, rule) for part in x.split(sizes)]
    same(torch.cat([p.input for p in parts]), whole.input, 1e-12)
    for name, edges in whole.edges.items():
        same(sum(p.edges[name] for p in parts), edges, 1e-9)


def test_a_seed_tensor_is_accepted_and_is_linear(small):
    x = rand(2, 1, 28, 28)
    logits = small(x).detach()
    contrast = torch.zeros_like(logits)
    contrast[:, 3], contrast[:, 5] = logits[:, 3], -logits[:, 5]
    rule = Epsilon(epsilon=1e-12)
    expected = explain(small, x, 3, rule).input - explain(small, x, 5, rule).input
    same(explain(small, x, contrast, rule).input, expected, 1e-6)


def test_one_target_a_sample(small):
    x = rand(3, 1, 28, 28)
    result = explain(small, x, torch.tensor([1, 4, 4]))
    same(result.input[:1], explain(small, x[:1], 1).input, 1e-12)
    same(result.input[1:], explain(small, x[1:], 4).input, 1e-12)


def test_resnet50_unmodified():
    model = seeded(lambda: torchvision.models.resnet50(num_classes=4))
    ledger = explain(model, rand(1, 3, 32, 32), 0).ledger
    assert (ledger["gap"].abs() < 1e-9 * ledger[["out", "into", "bias"]].abs().max(axis=1)).all()


# --- nothing is left behind -----------------------------------------------------------------------------------


def snapshot(model):
    """All that a module holds, apart from its submodules, by name; tensors by value."""
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    attributes = {
        n: {k: v if isinstance(v, (bool, int, str, type(None))) else repr(v) for k, v in m.__dict__.items()}
        for n, m in model.named_modules()
    }
    return state, flags, attributes


def unchanged(before, after):
    (state, *rest), (state_after, *rest_after) = before, after
    assert rest == rest_after
    assert list(state) == list(state_after)
    assert all(torch.equal(state[n], state_after[n]) for n in state)


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_the_model_stays_as_it_is(name, request):
    model = request.getfixturevalue(name)
    before = snapshot(model)
    explain(model, rand(*SIZES[name]), 1)
    unchanged(before, snapshot(model))


def test_the_same_error_twice_and_nothing_left_behind():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sigmoid(), nn.Linear(4, 2)))
    before = snapshot(model)
    messages = []
    for _ in range(2):
        with pytest.raises(ZsuError, match="'sigmoid' has no relevance rule") as error:
            explain(model, rand(2, 3), 0)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    unchanged(before, snapshot(model))


def test_a_plain_model_used_afterwards_is_unaffected(small):
    """After an explanation and after a failed one torch differentiates as ever."""
    layer = seeded(lambda: nn.Conv2d(1, 2, 3))
    x = rand(1, 1, 5, 5).requires_grad_()
    (before,) = torch.autograd.grad(layer(x).sum(), x)
    functions = {n: getattr(F, n) for n in ("relu", "conv2d", "linear", "batch_norm")}
    explain(small, rand(1, 1, 28, 28), 1)
    with pytest.raises(ZsuError, match="'sigmoid' has no relevance rule"):
        explain(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()).double().eval(), rand(2, 3), 0)
    (after,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(before, after)
    assert functions == {n: getattr(F, n) for n in functions}


def test_results_carry_no_graph_and_memory_does_not_grow(small):
    def tensors():
        gc.collect()
        return sum(torch.is_tensor(o) for o in gc.get_objects())

    x = rand(1, 1, 28, 28)
    result = explain(small, x, 1)
    held = [result.input, result.logits, result.seed, *result.nodes.values(), *result.edges.values()]
    assert not any(t.requires_grad or t.grad_fn for t in held)
    del held, result
    before = tensors()
    for _ in range(50):
        result = explain(small, x, 1)
        assert result.nodes
        assert result.edges
    del result
    assert tensors() <= before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_called_under_no_grad_and_inference_mode(small, mode):
    x = rand(2, 1, 28, 28)
    expected = explain(small, x, 1, "gamma").input
    with mode():
        same(explain(small, x.clone(), 1, "gamma").input, expected, 1e-12)


def test_channels_last_and_frozen_parameters(resnet18):
    x = rand(2, 3, 32, 32)
    expected = explain(resnet18, x, 1, "gamma")
    frozen = copy.deepcopy(resnet18).requires_grad_(False).to(memory_format=torch.channels_last)
    result = explain(frozen, x.to(memory_format=torch.channels_last), 1, "gamma")
    same(result.input, expected.input, 1e-7)
    same(result.edges["layer4.0.conv1"], expected.edges["layer4.0.conv1"], 1e-7)


def test_a_rule_object_and_a_map_of_rules_called_twice_give_the_same(small):
    x = rand(2, 1, 28, 28)
    for rules in (Gamma(0.1), {"conv*": Gamma(0.1), "fc": "z+"}):
        before = repr(rules)
        assert torch.equal(explain(small, x, 1, rules).input, explain(small, x, 1, rules).input)
        assert repr(rules) == before


def test_edges_false_gives_the_same_relevance_and_ledger(small):
    x = rand(2, 1, 28, 28)
    whole, quick = explain(small, x, 1, "gamma"), explain(small, x, 1, "gamma", edges=False)
    assert torch.equal(whole.input, quick.input)
    assert quick.edges == {}
    assert (quick.ledger["gap"].abs() < 1e-9 * quick.ledger["out"].abs()).all()


# --- bad input ------------------------------------------------------------------------------------------------

IMAGE = rand(2, 1, 28, 28)


@pytest.mark.parametrize(
    ("x", "target", "rules", "match"),
    [
        (IMAGE[:, 0], 1, "epsilon", r"conv1: its input has shape \(2, 28, 28\), it wants \(N, 1, H, W\)"),
        (IMAGE[0], 1, "epsilon", r"conv1: its input has shape \(1, 28, 28\), it wants \(N, 1, H, W\)"),
        (IMAGE.expand(2, 3, 28, 28), 1, "epsilon", r"conv1: .*\(2, 3, 28, 28\), it wants \(N, 1, H, W\)"),
        (IMAGE.float(), 1, "epsilon", r"x is torch.float32 on cpu, the model is torch.float64.*\.to\("),
        (IMAGE.long(), 1, "epsilon", "x: x is torch.int64. pass a floating-point tensor"),
        (IMAGE.numpy(), 1, "epsilon", "x: x is ndarray. pass a floating-point tensor"),
        (IMAGE[:0], 1, "epsilon", r"x has shape \(0, 1, 28, 28\).*N >= 1"),
        (IMAGE / 0, 1, "epsilon", "NaN or infinity"),
        (IMAGE.to_sparse(), 1, "epsilon", "x is torch.sparse_coo"),
        (IMAGE.to("meta"), 1, "epsilon", "x is "),
        (IMAGE, torch.ones(2, 10, dtype=torch.complex128), "epsilon", "target is torch.complex128"),
        (IMAGE, 1, {0: "gamma"}, "names are {0: 'gamma'}. map names of layers"),
        (IMAGE, -1, "epsilon", "target: class -1 of 10. use 0 to 9"),
        (IMAGE, 10, "epsilon", "target: class 10 of 10. use 0 to 9"),
        (IMAGE, torch.tensor([0, 1, 2]), "epsilon", r"target is torch.int64 \(3,\)"),
        (IMAGE, 1.0, "epsilon", "target is torch.float32"),
        (IMAGE, True, "epsilon", "target is torch.bool"),
        (IMAGE, "Trouser", "epsilon", "target is 'Trouser'. pass the index"),
        (IMAGE, 1, "lrp", "unknown rule 'lrp'. use one of epsilon, gamma"),
        (IMAGE, 1, None, "unknown rule None"),
    ],
)
def test_bad_arguments_are_refused(small, x, target, rules, match):
    with pytest.raises(ZsuError, match=match):
        explain(small, x, target, rules)


def test_bad_rules_are_refused():
    for make, match in (
        (lambda: Epsilon(epsilon=0), "Epsilon: epsilon is 0. use a finite number above 0"),
        (lambda: AlphaBeta(1, 1), "alpha=1, beta=1 do not keep the sum"),
        (lambda: AlphaBeta(1.5, 0.501), "do not keep the sum"),
        (lambda: AlphaBeta(0.5, -0.5), "choose beta >= 0"),
        (lambda: Gamma(-1), "Gamma: gamma is -1. use a finite number of at least 0"),
        (lambda: Gamma(float("inf")), "gamma is inf"),
        (lambda: Epsilon(epsilon=float("inf")), "epsilon is inf"),
        (lambda: AlphaBeta(float("nan"), 1), "alpha=nan"),
        (lambda: AlphaBeta(float("inf"), float("inf")), "alpha=inf"),
    ):
        with pytest.raises(ZsuError, match=match):
            make()


def test_gamma_of_0_is_the_epsilon_rule(small):
    x = rand(2, 1, 28, 28)
    same(explain(small, x, 1, Gamma(0.0)).input, explain(small, x, 1).input, 1e-9)


MAY_TURN_NEGATIVE = {
    "divided": lambda x: x / -2,
    "multiplied": lambda x: x * -1.5,
    "overshooting": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "joined by its negative": lambda x: torch.cat([x, x * -1], 1),
    "joined by a constant": lambda x: torch.cat([x, torch.full_like(x, -1)], 1),
    "plus its negative": lambda x: x + x * -2,
    "plus a constant": lambda x: x + -0.5,
    "less a constant": lambda x: x - 0.5,
    "slightly negative": lambda x: x,
}


@pytest.mark.parametrize("rule", ["gamma", "z+", "alpha-beta"])
@pytest.mark.parametrize("name", MAY_TURN_NEGATIVE)
def test_what_was_nonnegative_is_not_taken_for_it_ever_after(name, rule):
    """The layer behind gives the edges that it gives when it is all of the model."""
    change = MAY_TURN_NEGATIVE[name]
    x = rand(2, 2, 4, 4).abs()
    if name == "slightly negative":
        x[1, 1, 3, 3] = -0.01
    alone = nn.Sequential(nn.Flatten(), head(change(x).flatten(1).shape[1]))
    model = Net(lambda m, x: m.alone(change(x)), alone=alone)
    assert (change(x) < 0).any()
    same(explain(model.eval(), x, 1, rule).edges["alone.1"], explain(alone.eval(), change(x), 1, rule).edges["1"], 1e-9)


def test_batchnorm_over_tokens_does_not_merge_with_the_linear_before_it():
    """On (N, tokens, features) a BatchNorm1d normalises tokens, the Linear's channels are the features."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 2)))
    result = explain(model, rand(2, 4, 3), 1)
    assert list(result.nodes) == ["input", "0", "1", "3"]
    assert (result.ledger["gap"].abs() < 1e-9).all()


SOURCES = {  # of 16 features, of a layer with the channels 1 and 2
    "mean over channels": (lambda m, x: m.fc(m.conv(x).mean(1).flatten(1)), None),
    "one channel taken": (lambda m, x: m.fc(m.conv(x)[:, 1].flatten(1)), [2] * 16),
    "positions first": (lambda m, x: m.fc(m.conv(x).permute(0, 2, 3, 1).flatten(1)[:, :16]), [1, 2] * 8),
}


@pytest.mark.parametrize("name", SOURCES)
def test_where_each_feature_comes_from(name):
    run, expected = SOURCES[name]
    model = Net(run, conv=seeded(lambda: nn.Conv2d(1, 2, 1)), fc=head(16)).eval()
    (sources,) = explain(model, rand(2, 1, 4, 4), 1).layers[-1].sources
    assert (sources if sources is None else sources.tolist()) == expected


BAD_MODELS = {
    "softmax head": (lambda m, x: F.softmax(m.fc(x), 1), "'softmax' has no relevance rule.*remove the last softmax"),
    "log_softmax head": (lambda m, x: m.fc(x).log_softmax(1), "'log_softmax' .*remove the last softmax"),
    "sigmoid head": (lambda m, x: m.fc(x).sigmoid(), "'sigmoid' .*explain the logits"),
    "output not (N, C)": (lambda m, x: m.fc(x)[:, :, None], r"output is \(2, 4, 1\). return logits"),
    "output is a tuple": (lambda m, x: (m.fc(x), x), "output is tuple. return logits"),
    "unknown operation": (lambda m, x: m.fc(x.exp()), "'exp' has no relevance rule. replace it"),
    "detached": (lambda m, x: m.fc(x.detach()), "'detach' has no relevance rule"),
    "by way of numpy": (lambda m, x: m.fc(torch.as_tensor(x.numpy())), "numpy"),
    "by way of a number": (lambda m, x: m.fc(x) * float(x.mean()), "__float__"),
    "assignment to a slice": (lambda m, x: m.fc(assigned(x)), "__setitem__"),
    "under no_grad": (lambda m, x: torch.no_grad()(m.fc)(x), "runs under torch.no_grad.*take no_grad out"),
    "constant": (lambda m, x: torch.ones(2, 4, dtype=x.dtype), "does not depend on the input"),
    "constant parameter": (lambda m, x: m.fc.bias.expand(2, 4), "does not depend on the input"),
    "padded with ones": (lambda m, x: m.fc(F.pad(x[:, 1:], (1, 0), value=1.0)), "pads with a value other than 0"),
    "wrong size": (lambda m, x: m.fc(x[:, 1:]), r"fc: its input has shape \(2, 2\), it wants \(..., 3\)"),
    "NaN in the weights": (lambda m, x: F.linear(x, m.fc.weight / 0), "logits are not finite"),
    "active dropout": (lambda m, x: F.dropout(m.fc(x)), "dropout is active"),
    "changed in place": (lambda m, x: m.fc(add_(x.relu(), x)), "changed in place. use the out-of-place function"),
    "partly under no_grad": (lambda m, x: m.fc(x + torch.no_grad()(F.relu)(x)), "runs under torch.no_grad"),
    "a layer under no_grad": (lambda m, x: m.fc(x + torch.no_grad()(m.fc)(x)[:, :3]), "runs under torch.no_grad"),
    "changed through a view": (lambda m, x: m.fc(through_a_view(x * 2, lambda v: v.mul_(0.5))), "by way of a view"),
    "partly changed": (lambda m, x: m.fc(through_a_view(x * 2, lambda v: v[:, :1].add_(1.0))), "by way of a view"),
    "weights from the input": (lambda m, x: F.linear(x, x.expand(4, 2, 3)[:, 0]), "weights of 'linear' depend"),
    "bias from the input": (lambda m, x: F.linear(x, m.fc.weight, x[0, :1].expand(4)), "weights of 'linear' depend"),
    "prelu from the input": (lambda m, x: m.fc(F.prelu(x, x[0])), "weights of 'prelu' depend on the input"),
    "checkpoint": (lambda m, x: checkpoint(lambda t: F.relu(m.fc(t)), x, use_reentrant=False), "cannot follow checkpo"),
    "reentrant checkpoint": (lambda m, x: checkpoint(m.fc, x, use_reentrant=True), "no_grad|checkpoint"),
    "writes into out": (lambda m, x: m.fc(torch.mul(x, 2, out=torch.empty(2, 3, dtype=x.dtype))), "writes into out="),
    "shapes that do not fit": (lambda m, x: m.fc(x).view(3, 5), r"Net: shape .* size 8 \(x is \(2, 3\)\). pass a"),
    "adds with alpha": (lambda m, x: m.fc(torch.add(x, x, alpha=2)), "addition with alpha"),
}


def through_a_view(x, change):
    change(x.view(2, 3))
    return x


def assigned(x):
    x[:, 0] = 0
    return x


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_cannot_be_explained_are_refused(name):
    run, match = BAD_MODELS[name]
    with pytest.raises(ZsuError, match=match):
        explain(Net(run, fc=nn.Linear(3, 4)).double().eval(), rand(2, 3), 1)


SPELLINGS = {
    "keywords": (lambda m, x: m.fc(torch.add(input=x, other=m.a(x))), lambda m, x: m.fc(x + m.a(x))),
    "a negative": (lambda m, x: m.fc(x + -m.a(x)), lambda m, x: m.fc(x + m.a(x) * -1)),
    "1 - x": (lambda m, x: m.fc(1 - m.a(x)), lambda m, x: m.fc(m.a(x) * -1 + 1)),
    "constant, then in place": (lambda m, x: m.fc((m.a(x) + 1.0).relu_()), lambda m, x: m.fc((m.a(x) + 1.0).relu())),
    "cat of a constant, then in place": (
        lambda m, x: m.fc(torch.cat([m.a(x)[:, :2], torch.ones(2, 1).double()], 1).add_(x)),
        lambda m, x: m.fc(torch.cat([m.a(x)[:, :2], torch.ones(2, 1).double()], 1) + x),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_same_model_written_in_another_way(name):
    layers = {"fc": seeded(lambda: nn.Linear(3, 4)), "a": seeded(lambda: nn.Linear(3, 3), 1)}
    one, other = (explain(Net(run, **layers).eval(), rand(2, 3), 1, "gamma") for run in SPELLINGS[name])
    same(one.input, other.input)
    assert one.ledger["gap"].abs().max() < 1e-9


def test_a_model_without_layers_and_targets_that_are_none():
    mean = Net(lambda m, x: x.mean((2, 3))).eval()
    x = rand(2, 3, 4, 4)
    same(explain(mean, x, 1).input.sum((1, 2, 3)), mean(x)[:, 1])
    for targets in (None, [], 1):
        with pytest.raises(ZsuError, match="pass a list of targets"):
            explain_each(mean, x, targets)
    with pytest.raises(ZsuError, match="the model is a function. pass an nn.Module"):
        explain(lambda x: x, x, 1)


def test_train_mode_is_refused_and_buffers_stay():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout()))
    model[1].train()
    before = snapshot(model)
    with pytest.raises(ZsuError, match=r"^1: the model is in train mode. call model.eval\(\)"):
        explain(model, rand(2, 1, 5, 5), 0)
    unchanged(before, snapshot(model))


def test_batchnorm_without_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    with pytest.raises(ZsuError, match="^1: BatchNorm computes the statistics of the batch"):
        explain(model.double().eval(), rand(2, 1, 5, 5), 0)
