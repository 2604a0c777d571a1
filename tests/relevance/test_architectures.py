"""Unmodified models of torchvision, composites, attention, gates, number formats.

The epsilon rule with a vanishing epsilon is gradient x input of a model whose non-linear factors are held constant. So
the twin here is plain autograd on the same model, with the functions of torch.nn.functional replaced by such ones.
"""

import contextlib
import copy
import math
import warnings
from unittest import mock

import matplotlib.pyplot as plt
import pytest
import torch
import torchvision
import zennit.composites
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig

from zsu import Composite, ZsuError, compare, data, explain, explain_each, plots
from zsu.models import SmallCNN, bundled
from zsu.relevance.rules import AlphaBeta, Box, Epsilon, Flat, Gamma, Rule, WSquare, same
from zsu.relevance.tape import Tape

TINY = Epsilon(epsilon=1e-30)
EXPLAINED = {  # one of each family, and the others, which `make large` runs
    "alexnet": 64, "small vgg": 32, "resnet18": 32, "densenet121": 32, "googlenet": 32, "squeezenet1_0": 32,
    "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "shufflenet_v2_x1_0": 32,
    "small vit": 32, "small swin": 32, "small convnext": 32,
}  # fmt: skip
LARGE = {
    "vgg11": 32, "vgg11_bn": 32, "vgg16": 32, "resnet50": 32, "mobilenet_v2": 32, "efficientnet_b0": 32,
    "regnet_x_400mf": 32, "inception_v3": 80, "convnext_tiny": 32, "vit_b_16": 32, "swin_t": 64, "swin_v2_t": 64,
    "maxvit_t": 224,
}  # fmt: skip


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_vgg(size, classes):
    """VGG-11 with 64 hidden units instead of 4,096."""
    model = torchvision.models.vgg11_bn(num_classes=classes)
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, classes))
    return model


SMALL = {  # torchvision's classes with fewer and narrower layers
    "small vgg": small_vgg,
    "small vit": lambda size, classes: torchvision.models.VisionTransformer(size, 8, 2, 2, 16, 32, num_classes=classes),
    "small swin": lambda size, classes: torchvision.models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=classes
    ),
    "small convnext": lambda size, classes: torchvision.models.ConvNeXt(
        [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=classes
    ),
}


def pretrained_like(name, size, classes=7, dtype=torch.float64):
    """The model with random weights, norms and heads that are not at their neutral start."""
    options = (
        {"image_size": size}
        if name.startswith("vit")
        else {"input_size": (size, size)}
        if "maxvit" in name
        else {"init_weights": True}
        if "gle" in name
        else {}
    )
    if name == "inception_v3":
        options = {"init_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in SMALL:
            model = SMALL[name](size, classes).to(dtype).eval()
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=classes, **options).to(dtype).eval()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
            if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.1)
            if isinstance(m, nn.Linear) and m.out_features == classes:
                m.weight.data.normal_(0, 0.1)
    return model


def constant_factor(f):
    """f(x) as x * (f(x) / x), the factor held constant."""

    def g(x, *args, **kwargs):
        kwargs.pop("inplace", None)
        args = tuple(a for a in args if not isinstance(a, bool))
        y = f(x, *args, **kwargs).detach()
        return x * torch.where(x == 0, 0, y / x).detach()

    return g


def constant(f):
    return lambda *args, **kwargs: f(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    axes = list(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    y = centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt().detach()
    return y if weight is None else y * weight + bias


def attention(query, key, value, embed, heads, in_w, in_b, bk, bv, zero, p, out_w, out_b, **options):
    q, k, v = F.linear(query, in_w, in_b).chunk(3, -1)  # (L, N, E) each
    q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
    weights = torch.einsum("qnhd,knhd->nhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1).detach()
    return F.linear(torch.einsum("nhqk,knhd->qnhd", weights, v).flatten(2), out_w, out_b), None


def frozen_factors():
    """Functions of torch that the twin uses."""
    stack = contextlib.ExitStack()
    for name in ("gelu", "silu", "hardswish", "hardtanh", "relu6"):
        stack.enter_context(mock.patch.object(F, name, constant_factor(getattr(F, name))))
    for name in ("hardsigmoid", "softmax"):
        stack.enter_context(mock.patch.object(F, name, constant(getattr(F, name))))
    stack.enter_context(mock.patch.object(torch, "sigmoid", constant(torch.sigmoid)))
    stack.enter_context(mock.patch.object(torch, "tanh", constant_factor(torch.tanh)))
    stack.enter_context(mock.patch.object(F, "layer_norm", layer_norm))
    stack.enter_context(mock.patch.object(F, "multi_head_attention_forward", attention))
    return stack


def gradient_times_input(model, x, target):
    x = x.clone().requires_grad_()
    with frozen_factors():
        logits = model(x)
    (grad,) = torch.autograd.grad(logits[:, target].sum(), x)
    return (x * grad).detach(), logits.detach()


def closes(result, tolerance=1e-9):
    """Every row, in units of the relevance that passes there, and the whole."""
    ledger = result.ledger
    scale = ledger["out"].abs() + ledger["into"].abs() + ledger["amplification"] * float(result.seed.abs().sum())
    assert (ledger["gap"].abs() <= tolerance * scale.fillna(0) + 1e-300).all()


@pytest.mark.parametrize("name", [*EXPLAINED, *(pytest.param(name, marks=pytest.mark.large) for name in LARGE)])
def test_torchvision_unmodified_equals_gradient_times_input_with_constant_factors(name):
    size = (EXPLAINED | LARGE)[name]
    model = pretrained_like(name, size)
    x = rand(2, 3, size, size, seed=1)
    expected, logits = gradient_times_input(model, x, 3)
    result = explain(model, x, 3, TINY, edges=False)
    assert (result.logits - logits).abs().max() <= 1e-9 * logits.abs().max()
    assert (result.input - expected).abs().max() <= 1e-7 * expected.abs().max()
    closes(result)
    for rule in ("gamma", "epsilon-plus"):
        result = explain(model, x, 3, rule, edges=rule == "epsilon-plus")
        closes(result)
        assert result.input.isfinite().all()
        for layer in result.layers[1:]:
            assert layer.relevance.shape[0] in (1, 2)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small vit", 32), ("small swin", 32), ("small convnext", 32),
        pytest.param("vit_b_16", 32, marks=pytest.mark.large), pytest.param("swin_t", 64, marks=pytest.mark.large),
        pytest.param("convnext_tiny", 64, marks=pytest.mark.large),
    ],
)  # fmt: skip
def test_samples_are_told_apart_where_the_batch_axis_moves(name, size):
    """ViT puts tokens first, Swin spreads windows over the batch axis: each sample's share must stay its own."""
    model = pretrained_like(name, size)
    x = rand(3, 3, size, size, seed=2)
    both = explain(model, x, 1)
    for i in range(3):
        one = explain(model, x[i : i + 1], 1)
        assert (one.input[0] - both.input[i]).abs().max() <= 1e-9 * both.input.abs().max()
        for layer, alone in zip(both.layers, one.layers, strict=True):
            if len(layer.relevance) == 3:
                scale = layer.relevance.abs().max()
                assert (layer.relevance[i] - alone.relevance[0]).abs().max() <= 1e-9 * scale
    per_sample = [len(layer.relevance) == 3 for layer in both.layers]
    assert sum(per_sample) > 0.9 * len(per_sample)


# --- composites and the rules of the input layer ------------------------------------------------------------------


def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return SmallCNN().double().eval()


THEIRS = {
    "epsilon-gamma-box": lambda: zennit.composites.EpsilonGammaBox(low=0.0, high=1.0),
    "epsilon-plus": zennit.composites.EpsilonPlus,
    "epsilon-plus-flat": zennit.composites.EpsilonPlusFlat,
    "epsilon-alpha2-beta1": zennit.composites.EpsilonAlpha2Beta1,
}


@pytest.mark.parametrize("name", THEIRS)
def test_zennit_composites(name):
    """zennit has a rule of its own for average pools, so the network has none."""
    model = small()
    model.fit = nn.Identity().eval()
    x = rand(2, 1, 28, 28).abs().clamp(max=1)
    composite = THEIRS[name]()
    with composite.context(copy.deepcopy(model)) as hooked:
        leaf = x.clone().requires_grad_()
        out = hooked(leaf)
        seed = torch.zeros_like(out)
        seed[:, 4] = out.detach()[:, 4]
        (expected,) = torch.autograd.grad(out, leaf, seed)
    found = explain(model, x, 4, name).input
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_composite_chooses_by_name_then_place_then_kind():
    model, x = small(), rand(2, 1, 28, 28).abs()
    layers = {"conv1": Flat(), "conv2": Gamma(0.5), "conv3": AlphaBeta(2, 1), "fc": Epsilon(), "head": Epsilon(0.1)}
    by_name = explain(model, x, 1, layers)
    names = {"conv2": Gamma(0.5), "conv[3-9]": "alpha-beta"}
    mixed = Composite(conv="gamma", first="flat", last=Epsilon(0.1), names=names)
    for again in (explain(model, x, 1, mixed), explain(model, x, 1, mixed)):  # a composite keeps no state
        assert torch.equal(again.input, by_name.input)
    assert not torch.equal(by_name.input, explain(model, x, 1, Composite(first="flat")).input)
    last_wins = explain(model, x, 1, {"conv*": "gamma", "conv2": "epsilon"})
    assert torch.equal(last_wins.input, explain(model, x, 1, dict.fromkeys(("conv1", "conv3"), "gamma")).input)


def test_bad_composites_are_refused():
    model, x = small(), rand(2, 1, 28, 28)
    with pytest.raises(ZsuError, match=r"no layer is called convv1. use one of conv1, conv2, conv3, fc, head"):
        explain(model, x, 1, {"convv1": "gamma"})
    with pytest.raises(ZsuError, match="unknown rule 'gama'"):
        explain(model, x, 1, {"conv1": "gama"})
    with pytest.raises(ZsuError, match=r"^conv3: WSquare is a rule for layers that read the model's input"):
        explain(model, x, 1, {"conv3": WSquare()})
    with pytest.raises(ZsuError, match=r"^Box: inputs from -.* leave the box. give the least"):
        explain(model, x, 1, "epsilon-gamma-box")
    with pytest.raises(ZsuError, match="attention 'x'"):
        explain(model, x, 1, attention="x")


def test_a_box_for_each_channel():
    conv = nn.Conv2d(3, 2, 3).double()
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(18, 4)).double().eval()
    x = rand(2, 3, 5, 5)
    low, high = (t.reshape(1, 3, 1, 1) for t in (torch.tensor([-5.0, -6, -7]), torch.tensor([5.0, 6, 7])))
    result = explain(model, x, 1, Composite(first=Box(low, high)))
    closes(result)
    with pytest.raises(ZsuError, match="leave the box"):
        explain(model, x, 1, Composite(first=Box(low, high / 100)))


def test_a_rule_of_ones_own_in_ten_lines():
    class Absolute(Rule):
        """R_j = sum_k |x_j w_jk| R_k / sum_i |x_i w_ik|."""

        def __call__(self, R, z, b, signs):
            return [("|x|", torch.abs)], [(R, [1.0], None)]

    x, w = torch.tensor([[3.0, -1.0]]).double(), torch.tensor([[2.0, 4.0]]).double()
    model = nn.Linear(2, 1, bias=False).double().eval()
    model.weight.data = w
    assert explain(model, x, 0, Absolute()).input.tolist() == [pytest.approx([1.2, 0.8])]  # 2 (6, 4) / 10
    closes(explain(small(), rand(2, 1, 28, 28), 1, Absolute()))
    assert same(w) is w


# --- attention, gates, norms, activations -------------------------------------------------------------------------


class TinyViT(nn.Module):
    """Patches, class token, positions, one block of attention and a multilayer perceptron, head."""

    def __init__(self, need_weights=False):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)
        self.need_weights = need_weights

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)  # (N, 8, 2, 2) -> (N, 4, 8)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=self.need_weights)[0]
        x = x + self.mlp(x)
        return self.head(x[:, 0])


def tiny_vit(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TinyViT(**options).double().eval()


@pytest.mark.parametrize("how", ["cp-lrp", "attnlrp"])
@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_ledger_of_a_tiny_vit_closes_with_class_token_and_positions(how, rule):
    result = explain(tiny_vit(), rand(2, 1, 8, 8), 2, rule, attention=how)
    closes(result)
    ledger = result.ledger
    assert (ledger["constant"] != 0).sum() == 3  # token, positions, and the whole
    assert result.ledger.iloc[-1]["gap"] == pytest.approx(0, abs=1e-9 * ledger["out"].abs().max())


def test_attention_that_also_returns_its_weights():
    x = rand(2, 1, 8, 8)
    assert torch.equal(explain(tiny_vit(need_weights=True), x, 1).input, explain(tiny_vit(), x, 1).input)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attnlrp_equals_its_formulas_by_automatic_differentiation(batch_first, causal):
    """A product hands half to each factor, softmax its gradient x input (Achtibat et al. 2024, sec. 3.3)."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(6, 2, batch_first=batch_first).double().eval()
    mask = torch.zeros(4, 4).double().masked_fill(~torch.ones(4, 4).tril().bool(), -1e4) if causal else None

    def halves(a, b):
        return (a @ b.detach() + a.detach() @ b) / 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha, self.head = mha, nn.Linear(24, 3).double()

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            y = self.mha(x, x, x, need_weights=False, attn_mask=mask)[0]
            return self.head((y if batch_first else y.transpose(0, 1)).flatten(1))

        def twin(self, x):
            q, k, v = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, -1)
            q, k, v = (t.unflatten(2, (2, 3)).transpose(1, 2) for t in (q, k, v))  # (N, heads, L, d)
            scores = halves(q / math.sqrt(3), k.transpose(-2, -1)) + (0 if mask is None else mask)
            y = halves(scores.softmax(-1), v).transpose(1, 2).flatten(2)
            return self.head(mha.out_proj(y).flatten(1))

    net = Net().eval()
    x = rand(2, 4, 6)
    leaf = x.clone().requires_grad_()
    logits = net.twin(leaf)
    expected = leaf * torch.autograd.grad(logits[:, 1].sum(), leaf)[0]
    found = explain(net, x, 1, TINY, attention="attnlrp").input
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (explain(net, x, 1, TINY).input - expected).abs().max() > 1e-3 * expected.abs().max()


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def net(run, **modules):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, x):
            return run(self, x)

    return Net().double().eval()


def test_a_gate_is_a_constant_factor_and_all_relevance_goes_to_what_it_gates():
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5), "head": nn.Linear(5, 3)}
    model = net(lambda m, x: m.head(m.a(x) * m.b(x).sigmoid()), **layers)
    x = rand(2, 4)
    leaf = x.clone().requires_grad_()
    logits = model.head(model.a(leaf) * model.b(leaf).sigmoid().detach())
    expected = leaf * torch.autograd.grad(logits[:, 1].sum(), leaf)[0]
    result = explain(model, x, 1, TINY)
    assert (result.input - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert "b" not in result.edges


REFUSED_PRODUCTS = {
    "product of two": (lambda m, x: m.head(m.a(x) * m.b(x)), "'mul' has no relevance rule"),
    "square": (lambda m, x: m.head(m.a(x) + m.b(x) * m.b(x)), "'add' joins the output of 'mul'"),
    "gate that is added": (lambda m, x: m.head(m.a(x) + m.b(x).sigmoid()), "'add' joins the output of 'sigmoid'"),
    "sigmoid inside": (lambda m, x: m.head(m.a(x).sigmoid()), "'sigmoid' has no relevance rule. replace it"),
    "layer on a gate": (
        lambda m, x: m.head(m.a(x) * F.linear(m.b(x).sigmoid(), torch.eye(5).double())),
        "'mul' joins the output of 'sigmoid'",
    ),
    "softmax head": (lambda m, x: m.head(m.a(x)).softmax(1), "'softmax' .*remove the last softmax"),
    "division by the flow": (lambda m, x: m.head(1 / m.a(x)), "has no relevance rule"),
    "not 0 at 0": (lambda m, x: m.head(F.hardtanh(m.a(x), 0.5, 2.0)), "'hardtanh' is not 0 at 0"),
}


@pytest.mark.parametrize("name", REFUSED_PRODUCTS)
def test_products_that_are_refused(name):
    run, match = REFUSED_PRODUCTS[name]
    model = net(run, a=nn.Linear(4, 5), b=nn.Linear(4, 5), head=nn.Linear(5, 3))
    for _ in range(2):
        with pytest.raises(ZsuError, match=match):
            explain(model, rand(2, 4), 1)


BENDING = {
    "relu6": F.relu6, "hardtanh": F.hardtanh, "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu, "elu": F.elu, "selu": F.selu, "celu": F.celu, "mish": F.mish, "hardswish": F.hardswish,
    "tanh": torch.tanh, "softsign": F.softsign, "softshrink": F.softshrink,
}  # fmt: skip
IN_PLACE = {
    "relu6": lambda x: F.relu6(x, True), "hardtanh": lambda x: F.hardtanh(x, -1.0, 1.0, True), "elu": F.elu_,
    "silu": lambda x: F.silu(x, inplace=True), "hardswish": lambda x: F.hardswish(x, inplace=True),
    "mish": lambda x: F.mish(x, True), "selu": lambda x: x.data.new_zeros(0) if x is None else F.selu_(x),
    "celu": F.celu_, "tanh": torch.tanh_,
}  # fmt: skip


@pytest.mark.parametrize("name", BENDING)
def test_bending_activations_hand_on_what_they_get(name):
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(2, 4, 3), "head": nn.Linear(36, 3)}
    x = 3 * rand(2, 2, 5, 5)
    x[:, :, 0] = 0
    model = net(lambda m, t: m.head(BENDING[name](m.a(t)).flatten(1)), **layers)
    result = explain(model, x, 1)
    closes(result)
    z = layers["a"](x)
    expected = result.nodes["a"]
    y = BENDING[name](z)
    grad = torch.zeros_like(y) + layers["head"].weight[1].reshape(1, 4, 3, 3)
    assert (expected - (y * grad).sum((2, 3))).abs().max() <= 1e-4  # epsilon of the head
    if name in IN_PLACE:
        twin = net(lambda m, t: (lambda z: (IN_PLACE[name](z), m.head(z.flatten(1)))[1])(m.a(t)), **layers)
        assert torch.equal(explain(twin, x, 1).input, result.input)


def test_group_norm_equals_gradient_times_input_with_a_constant_deviation():
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    model = net(lambda m, x: m.head(m.norm(m.a(x)).flatten(1)), a=nn.Conv2d(2, 4, 3), norm=norm, head=nn.Linear(36, 3))
    x = rand(2, 2, 5, 5)
    leaf = x.clone().requires_grad_()
    z = model.a(leaf)
    grouped = z.reshape(2, 2, 2, 3, 3)
    centred = grouped - grouped.mean((2, 3, 4), keepdim=True)
    y = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + norm.eps).sqrt().detach()).reshape(z.shape)
    y = y * norm.weight.reshape(1, 4, 1, 1) + norm.bias.reshape(1, 4, 1, 1)
    expected = leaf * torch.autograd.grad(model.head(y.flatten(1))[:, 1].sum(), leaf)[0]
    result = explain(model, x, 1, TINY)
    assert (result.input - expected).abs().max() <= 1e-10 * expected.abs().max()
    closes(result)


NORMS = {
    "LayerNorm over features of tokens": (nn.LayerNorm(6), (3, 4, 6), 2),
    "LayerNorm over all": (nn.LayerNorm((4, 3, 2)), (3, 4, 3, 2), 1),
    "LayerNorm without weights": (nn.LayerNorm(6, elementwise_affine=False), (3, 6), 1),
    "GroupNorm": (nn.GroupNorm(2, 4), (3, 4, 3, 2), 1),
    "GroupNorm on vectors": (nn.GroupNorm(2, 4), (3, 4), 1),
}


@pytest.mark.parametrize("name", NORMS)
def test_edges_of_norms_are_those_of_the_linear_map_that_they_are(name):
    layer, shape, channel = NORMS[name]
    layer = copy.deepcopy(layer).double()
    for p in layer.parameters():
        p.data = rand(*p.shape, seed=4)
    x, channels = rand(*shape), shape[channel]
    tokens = channel == 2
    model = net(lambda m, x: m.layer(x.transpose(1, 2) if tokens else x).flatten(1), layer=layer)
    result = explain(model, x.transpose(1, 2) if tokens else x, rand(3, x[0].numel(), seed=3), TINY)
    g = (result.seed / result.logits).view(shape)

    axes = list(range(2, 2 + len(shape) - 1)) if "Group" in name else list(range(-len(layer.normalized_shape), 0))
    grouped = (3, 2, 2, *shape[2:]) if "Group" in name else shape
    deviation = (x.view(grouped).var(axes, keepdim=True, unbiased=False) + layer.eps).sqrt()
    weight = getattr(layer, "weight", None)
    weight = torch.ones(()) if weight is None else weight.detach()
    weight = weight.view(-1, *[1] * (len(shape) - 2)) if "Group" in name else weight

    def linear_part(x):
        centred = x.view(grouped) - x.view(grouped).mean(axes, keepdim=True)
        return (centred / deviation).view(shape) * weight

    def over_channels(t):
        return t.movedim(channel, 0).flatten(1).sum(1)  # (channels,)

    leaf = x.clone().requires_grad_()
    out = (linear_part(leaf) * g).movedim(channel, 0).flatten(1).sum(1)
    whole = torch.stack([over_channels(x * torch.autograd.grad(o, leaf, retain_graph=True)[0]) for o in out])
    (edges,) = result.edges.values()
    expected = torch.cat([whole[:2, :2], whole[2:, 2:]]) if "Group" in name else whole
    assert edges.shape == (channels, expected.shape[1])
    assert (edges - expected).abs().max() <= 1e-9 * expected.abs().max()
    closes(result)


def test_numbers_added_and_subtracted_are_constants():
    model = net(lambda m, x: m.head((m.a(x) - 0.5) / 0.25 + 1 - m.a(x)), a=nn.Linear(4, 5), head=nn.Linear(5, 3))
    result = explain(model, rand(2, 4), 1)
    closes(result)
    assert result.ledger.iloc[-1]["constant"] != 0


# --- one forward pass, several targets; number formats; surroundings ----------------------------------------------


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "epsilon-plus-flat"])
def test_several_classes_from_one_forward_pass_equal_single_runs(rule):
    model, x = small(), rand(2, 1, 28, 28).abs()
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    results = explain_each(model, x, range(10), rule)
    assert len(calls) == 1
    for c, result in enumerate(results):
        alone = explain(model, x, c, rule)
        assert torch.equal(result.input, alone.input)
        assert all(torch.equal(result.edges[name], alone.edges[name]) for name in alone.edges)
        assert result.ledger.equals(alone.ledger)


def edges_differ(a, b):
    return max(float((a.edges[n] - b.edges[n]).abs().max() / b.edges[n].abs().max()) for n in b.edges)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z+", "epsilon-plus"])
def test_half_precision_is_finite_and_close_to_float32(dtype, rule, monkeypatch):
    """Rounding changes which pixel wins a max-pool; what follows from that is compared at the same winners."""
    x = data.samples(data.load().test, "Trouser", 16).to(dtype)
    model = bundled().to(dtype)
    found = explain(model, x, 1, rule)
    assert found.input.isfinite().all()
    closes(found, 1e-2)
    wide = copy.deepcopy(model).float()
    if rule in ("gamma", "z+"):
        assert edges_differ(found, explain(wide, x.float(), 1, rule)) <= 1e-2
    value = Tape.value
    monkeypatch.setattr(Tape, "value", lambda *a, **k: value(*a, **k).to(dtype).float())
    expected = explain(wide, x.float(), 1, rule)
    assert edges_differ(found, expected) <= 1e-2
    maps = found.input.flatten(1), expected.input.flatten(1)
    assert ((maps[0] - maps[1]).norm(dim=1) <= 1e-2 * maps[1].norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z+", "alpha-beta"])
def test_half_precision_with_batchnorm(dtype, rule):
    """Merged into its convolution, and on its own; what is noted is float32."""
    model = net(lambda m, x: m.fc(m.own(m.bn(m.conv(x)).relu()).mean((2, 3))), conv=nn.Conv2d(3, 4, 3),
                bn=nn.BatchNorm2d(4), own=nn.BatchNorm2d(4), fc=nn.Linear(4, 2))  # fmt: skip
    for bn in (model.bn, model.own):
        bn.running_var.uniform_(0.5, 2)
    model, x = model.to(dtype), rand(2, 3, 6, 6, dtype=torch.float32).to(dtype)
    half, full = explain(model, x, 1, rule), explain(copy.deepcopy(model).float(), x.float(), 1, rule)
    tensors = [half.input, *half.nodes.values(), *half.edges.values()]
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)
    assert (half.input - full.input).abs().max() <= 0.05 * full.input.abs().max()


def test_in_float16_nothing_times_infinity_stays_nothing():
    model = linear([[-1.0, -2.0]]).half().eval()
    x = torch.ones(1, 2).half()
    assert explain(model, x, 0, "z+").input.tolist() == [[0, 0]]
    assert explain(model, x, 0, "alpha-beta").input.tolist() == [[1, 2]]


def test_a_mask_for_each_sample_and_head():
    mha = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    mask = rand(4, 3, 3, seed=5)
    x = rand(2, 3, 4)
    whole = explain(net(lambda m, x: m.mha(x, x, x, attn_mask=mask)[0].flatten(1), mha=mha), x, 1).input
    for n in range(2):
        mine = mask[2 * n : 2 * n + 2]
        model = net(lambda m, x, mine=mine: m.mha(x, x, x, attn_mask=mine)[0].flatten(1), mha=mha)
        assert torch.allclose(whole[n], explain(model, x[n : n + 1], 1).input[0])


def test_under_autocast_and_beside_another_mode():
    model, x = bundled(), rand(2, 1, 28, 28, dtype=torch.float32)
    expected = explain(model, x, 1)
    seen = []

    class Log(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(explain(model, x, 1).input, expected.input)
    with Log():
        assert torch.equal(explain(model, x, 1).input, expected.input)
    assert seen


def test_a_compiled_model_is_unwrapped():
    model, x = bundled(), rand(2, 1, 28, 28, dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert torch.equal(explain(compiled, x, 1).input, explain(model, x, 1).input)


def test_nan_in_a_parameter_is_named():
    model = bundled()
    model.conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ZsuError, match=r"the logits are not finite. conv2.weight holds NaN or infinity"):
        explain(model, rand(2, 1, 28, 28, dtype=torch.float32), 1)


def test_interrupted_in_the_middle_leaves_nothing_behind():
    model, x = small(), rand(2, 1, 28, 28)
    expected = explain(model, x, 1).input
    handle = model.conv3.register_forward_hook(mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        explain(model, x, 1)
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(explain(model, x, 1).input, expected)


def test_a_model_of_two_inputs_is_refused():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    with pytest.raises(ZsuError, match=r"^Two: forward does not take one input \(missing a required argument: 'b'\)"):
        explain(Two().eval(), rand(2, 3), 1)


def test_an_explanation_inside_a_model_that_is_explained_is_refused():
    inner = nn.Linear(3, 3).double().eval()
    model = net(lambda m, x: m.head(x + explain(inner, x, 1).input), head=nn.Linear(3, 2))
    with pytest.raises(ZsuError, match="an explanation inside a model that is explained"):
        explain(model, rand(2, 3), 1)
    assert not torch.overrides._get_current_function_mode_stack()


def test_exploding_relevance_is_said():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double().eval()
    model[0].weight.data = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6]]).double()
    model[1].weight.data = torch.tensor([[1.0, -1.0]]).double()
    model[0].bias.data.zero_()
    model[1].bias.data.zero_()
    with pytest.warns(UserWarning, match=r"relevance explodes: at 0, sum \|R\| is .* times that of the outputs; use"):
        result = explain(model, torch.ones(1, 2).double(), 0, Epsilon(epsilon=1e-12))
    assert result.ledger["amplification"].max() > 1e5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(small(), rand(2, 1, 28, 28), 1, "gamma")


def test_a_stabiliser_that_keeps_the_relevance_is_said():
    with pytest.warns(UserWarning, match="the stabilisers keep 50 % of the relevance; use a smaller epsilon"):
        explain(linear([[1.0]]).double().eval(), torch.tensor([[1e-6]]).double(), 0)


def test_a_rule_derived_from_epsilon_is_asked_and_not_taken_for_it():
    class Bare(Epsilon):
        """Without the bias in the denominator."""

        def __call__(self, R, z, b, signs):
            return [("x", same)], [(R, [1.0], None)]

    model = nn.Linear(1, 1).double().eval()
    model.weight.data, model.bias.data = torch.tensor([[2.0]]).double(), torch.tensor([1.0]).double()
    x = torch.ones(1, 1).double()  # z = 2 + 1
    assert [float(explain(model, x, 0, rule(1e-12)).input) for rule in (Epsilon, Bare)] == pytest.approx([2, 3])


@pytest.mark.parametrize(
    ("bases", "coefficients", "match"),
    [
        ([("abs", torch.abs)], [1.0], "0: the rule has a part 'abs'. use the parts x,"),
        ([("x", torch.abs)], [1.0, 2.0], "0: a portion of the rule has not one coefficient a base"),
    ],
)
def test_rules_of_ones_own_that_are_refused(bases, coefficients, match):
    class Own(Rule):
        def __call__(self, R, z, b, signs):
            return bases, [(R, coefficients, None)]

    with pytest.raises(ZsuError, match=match):
        explain(nn.Sequential(nn.Linear(2, 3)).double().eval(), rand(2, 2), 1, Own())


def test_a_rule_of_negative_inputs_alone_where_there_are_none():
    class Own(Rule):
        def __call__(self, R, z, b, signs):
            return [("-", torch.abs)], [(R, [1.0], None)]

    assert explain(nn.Sequential(nn.Linear(2, 3)).double().eval(), rand(2, 2).abs(), 1, Own()).input.abs().max() == 0


def test_amplification_by_hand():
    """(3, 0) + (0, -1) summed to the logit 2: |3| + |-1| is twice that, at the addition and wherever else."""
    model = net(lambda m, x: m.top(m.a(x) + m.b(x)), a=linear([[3.0], [0.0]]), b=linear([[0.0], [-1.0]]),
                top=linear([[1.0, 1.0]]))  # fmt: skip
    ledger = explain(model, torch.ones(1, 1).double(), 0).ledger.set_index("layer")["amplification"]
    assert ledger.to_dict() == pytest.approx({"top": 1, "add": 2, "a": 1.5, "b": 0.5, "all": 1}, rel=1e-5)


def test_compare_agrees_with_captum_where_both_compute_the_same_and_says_what_captum_cannot():
    model, x = small(), rand(2, 1, 28, 28).abs()
    maps = compare(model, x, 1, Epsilon(1e-9))
    plt.close(plots.comparison(x[:1], maps))
    assert list(maps) == ["LRP", "Integrated Gradients", "DeepLIFT", "LRP (captum)"]
    assert (maps["LRP"] - maps["LRP (captum)"]).abs().max() <= 1e-4 * maps["LRP"].abs().max()
    relu = nn.ReLU()
    twice = nn.Sequential(nn.Conv2d(1, 2, 3), relu, nn.Conv2d(2, 2, 3), relu, nn.Flatten(), nn.Linear(1152, 3))
    with pytest.warns(UserWarning, match="captum's DeepLIFT does not run"):
        maps = compare(twice.double().eval(), x, 1)
    assert "LRP" in maps


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z+", "alpha-beta", "epsilon-plus-flat"])
@pytest.mark.parametrize("name", ["small", "resnet18", "tiny vit"])
def test_one_pass_over_memory_gives_what_torch_gives(name, rule, monkeypatch):
    model, x = {
        "small": lambda: (small(), rand(3, 1, 28, 28).abs()),
        "resnet18": lambda: (pretrained_like("resnet18", 32), rand(3, 3, 32, 32)),
        "tiny vit": lambda: (tiny_vit(), rand(3, 1, 8, 8)),
    }[name]()
    fast = explain(model, x, 1, rule)
    monkeypatch.setattr("zsu.relevance.sums.fits", lambda *_: False)
    plain = explain(model, x, 1, rule)
    assert (fast.input - plain.input).abs().max() <= 1e-10 * plain.input.abs().max()
    assert edges_differ(fast, plain) <= 1e-10
    columns = ["out", "into", "bias", "stabiliser", "constant", "amplification"]
    assert fast.ledger[columns].to_numpy() == pytest.approx(
        plain.ledger[columns].to_numpy(), rel=1e-9, abs=1e-9, nan_ok=True
    )
