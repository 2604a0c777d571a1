"""Relevance against explicit messages, other libraries, unrolled twins, and inputs that broke such code elsewhere."""

import copy

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

from zsu import explain
from zsu.models import SmallCNN
from zsu.rules import AlphaBeta, Epsilon, Gamma

RULES = ["epsilon", "gamma", "z+", "alpha-beta"]


class Net(nn.Module):
    """Modules as attributes and a forward pass given as a function: `Net(lambda m, x: m.a(x), a=...)`."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


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


REFERENCES = {
    "epsilon": (Epsilon(epsilon=0.01), epsilon_messages),
    "gamma": (Gamma(0.25, epsilon=0.01), gamma_messages),
    "z+": (AlphaBeta(1, 0, epsilon=0.01), lambda *a: alpha_beta_messages(*a, alpha=1, beta=0)),
    "alpha-beta": (AlphaBeta(2, 1, epsilon=0.01), alpha_beta_messages),
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
    "conv1d": (lambda b: nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=b), (2, 9)),
    "conv3d": (lambda b: nn.Conv3d(2, 3, 2, padding=(1, 0, 1), bias=b), (2, 3, 4, 3)),
    "transposed": (lambda b: nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1, bias=b), (2, 4, 3)),
    "transposed, groups": (lambda b: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2, bias=b), (4, 3, 3)),
    "linear": (lambda b: nn.Linear(7, 5, bias=b), (7,)),
}


@torch.no_grad()
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_layer_equals_explicit_messages(layer, name, bias, nonnegative):
    make, shape = LAYERS[layer]
    layer = seeded(lambda: make(bias))
    x = rand(2, *shape, seed=1)
    x = x.abs() if nonnegative else x
    rule, messages = REFERENCES[name]
    z = layer(x)
    result = explain(nn.Sequential(layer, nn.Flatten()).eval(), x, rand(*z.flatten(1).shape, seed=2), rule)

    side = getattr(layer, "padding", 0)
    reflect = getattr(layer, "padding_mode", "zeros") == "reflect"
    pad = (lambda t: F.pad(t, [side[0]] * 4, "reflect")) if reflect else (lambda t: t)
    plain = copy.deepcopy(layer)
    if bias:
        plain.bias = None
    if reflect:
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
