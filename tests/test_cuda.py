"""What needs a graphics card: the same numbers as on the CPU, nobody waits, half precision, other layouts in memory."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from helpers import TROUSER, bits, wrap_explanation
from zsu import explain, explain_each, find_paths, forget
from zsu.evaluation.observed import predict
from zsu.forgetting.perturb import perturb
from zsu.paths.graph import build_graph

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:relevance explodes", "ignore:the stabilisers", "ignore:the rule of the input"),
]
NETWORKS = ["resnet18", "vgg11_bn", "mobilenet_v3_small", "densenet121", "vit_b_16", "convnext_tiny"]
RULES = ["epsilon", "gamma", "z+", "alpha-beta", "epsilon-plus-flat"]


def network(name, size=64):
    torch.manual_seed(0)
    options = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    for m in model.modules():
        if isinstance(m, nn.Linear) and m.out_features == 10:
            nn.init.normal_(m.weight, std=0.05)  # a ViT's starts at 0
    return model.eval()


def images(n=3, size=64):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def largest_gap(found, expected):
    """Of maps, edges and channels, relative to the largest value of each."""
    pairs = [(found.input, expected.input), *((found.edges[n], e) for n, e in expected.edges.items())]
    pairs += [(found.nodes[n], r) for n, r in expected.nodes.items()]
    return max(float((a.cpu() - b.cpu()).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_float64_is_as_on_the_cpu(name, rule):
    model, x = network(name).double(), images(2).double()
    expected = explain(model, x, 1, rule)
    found = explain(model.cuda(), x.cuda(), 1, rule)
    assert largest_gap(found, expected) <= 1e-6
    assert found.ledger["gap"].abs().max() <= 1e-6 * max(1, found.ledger["amplification"].max())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z+"])
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_the_kernels_give_what_torch_gives(name, rule, layout, monkeypatch):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model, x = network(name).cuda().to(memory_format=layout), images().cuda().contiguous(memory_format=layout)
    fast = explain(model, x, 1, rule)
    monkeypatch.setattr("zsu.relevance.sums.on_card", lambda *_: False)
    assert largest_gap(fast, explain(model, x, 1, rule)) <= 1e-3


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z+"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype, rule):
    model, x = network("resnet18"), images()
    expected = explain(model, x, 1, rule).input
    found = explain(model.cuda().to(dtype), x.cuda().to(dtype), 1, rule).input.cpu()
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1).double(), expected.flatten(1).double())
    assert cosine.min() > (0.9 if dtype == torch.bfloat16 else 0.99)  # the activations differ too


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mobilenet_v3_small"])
def test_nobody_waits_between_the_checks_and_the_result(name, rule, monkeypatch):
    def without_waiting(function):
        def run(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    model, x = network(name).cuda(), images().cuda()
    target = torch.tensor([1, 2, 3], device="cuda")
    explain(model, x, target, rule)  # loads and compiles
    wrap_explanation(monkeypatch, without_waiting)
    explain_each(model, x, [target, torch.rand(3, 10, device="cuda")], rule)


@pytest.mark.parametrize("kind", ["zero", "gaussian"])
def test_a_perturbation_waits_for_nothing(original, kind):
    model, selection = copy.deepcopy(original).cuda(), {"fc.weight": torch.tensor([5, 3, 3])}
    perturb(model, selection, kind)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = perturb(model, selection, kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = perturb(original, selection, kind)
    assert torch.allclose(found.changes["fc.weight"].new.cpu(), expected.changes["fc.weight"].new)


def test_graph_and_paths_are_as_on_the_cpu(original, x):
    model, images = copy.deepcopy(original).double(), x.double()
    expected = explain(model, images, TROUSER)
    found = explain(model.cuda(), images.cuda(), TROUSER)
    assert build_graph(found).weight == pytest.approx(build_graph(expected).weight, rel=1e-6, abs=1e-9)
    ours, theirs = find_paths(found, 100), find_paths(expected, 100)
    assert ours.probability == pytest.approx(theirs.probability, rel=1e-6)


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask"])
def test_the_patch_of_a_card_fits_the_model_on_the_cpu_and_back(original, x, method):
    model = copy.deepcopy(original).cuda()
    forgotten = forget(model, x.cuda(), TROUSER, method)
    here = forgotten.patch.apply(copy.deepcopy(original))
    assert bits(here) == bits(forgotten.model.cpu())
    assert bits(forgotten.patch.revert(here)) == bits(original)


def test_predictions_are_as_on_the_cpu(original, splits):
    p, labels = predict(copy.deepcopy(original).cuda(), splits.test)
    expected, same = predict(original, splits.test)
    assert torch.equal(labels, same)
    assert (p - expected).abs().max() <= 1e-3
