"""A ResNet whose shortcuts pad channels is edited and audited as its twin, in which a fixed convolution does that."""

import copy
import warnings

import pandas as pd
import pytest
import timm
import torch
from torch import nn
from torchvision.models import get_model

from helpers import ResNet20
from zsu import audit, explain, find_paths, forget
from zsu.data import Images, samples
from zsu.evaluation import BASIC
from zsu.forgetting.selection import find_specific_edges, merge_by_parameter, weight_blocks
from zsu.relevance.rules import AlphaBeta

TARGET = 1


def colours(n, seed):
    """Images of three classes: mostly red, green or blue."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 120, (n, 3, 16, 16), generator=generator)
    images[torch.arange(n), labels] += 100
    return Images(images.to(torch.uint8), labels, ["red", "green", "blue"])


@pytest.fixture(scope="module")
def twins():
    """Random layers, norms with statistics of the images, and a head fitted to what comes out."""
    train = colours(120, 0)
    x = torch.stack([image for image, _ in train])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet20()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None  # the mean over all batches
        with torch.no_grad():
            model.train()(x)
    model.eval()
    features = []
    with torch.no_grad(), model.head.register_forward_pre_hook(lambda _, args: features.append(args[0])):
        model(x)
    inputs = torch.cat([features[0], torch.ones(len(x), 1)], 1).double()
    wanted = 5 * nn.functional.one_hot(torch.arange(120) % 3, 3).double()
    ridge = torch.linalg.solve(inputs.T @ inputs + torch.eye(65).double(), inputs.T @ wanted)
    model.head.weight.data, model.head.bias.data = ridge[:-1].T.float().contiguous(), ridge[-1].float()
    twin = ResNet20(fixed=True).eval()
    twin.load_state_dict(model.state_dict())
    return model, twin, train


def test_the_same_patch_and_the_same_audit(twins):
    model, twin, train = twins
    x = samples(train, TARGET, n=12)
    own, fixed = (forget(m, x, TARGET, "paths") for m in (model, twin))
    assert own.cut[["layer", "channel", "source"]].equals(fixed.cut[["layer", "channel", "source"]])
    for name, p in own.model.state_dict().items():
        assert torch.allclose(p, fixed.model.state_dict()[name], rtol=1e-5, atol=1e-6), name
    test = colours(60, 1)
    options = {"measures": BASIC, "controls": False, "progress": False}
    frames = [audit(m, {"paths": f}, train, test, TARGET, **options).frame for m, f in ((model, own), (twin, fixed))]
    columns = ["at_test", "ag_test", "at_train", "ag_train", "weights_changed"]
    assert frames[0][columns].to_numpy() == pytest.approx(frames[1][columns].to_numpy(), nan_ok=True)
    assert frames[0].loc["paths", "at_test"] < 0.05 < 0.9 < frames[0].loc["original", "ag_test"]


def test_the_same_edges_serve_the_class_and_the_same_weights_are_theirs(twins):
    found = []
    for model in twins[:2]:
        model, x = copy.deepcopy(model).double(), samples(twins[2], TARGET, n=12).double()
        one = nn.functional.one_hot(torch.full((12,), TARGET), 3).double()
        own, others = (explain(model, x, seed, AlphaBeta(1, 0, epsilon=1e-30)) for seed in (one, 1 - one))
        edges = find_specific_edges(own, others)
        weights = merge_by_parameter((name, flat) for name, _, flat in weight_blocks(model, own, edges))
        found.append((set(edges[["layer", "channel", "source"]].itertuples(index=False, name=None)), weights))
    (edges, weights), (of_twin, weights_of_twin) = found
    assert edges == of_twin
    assert len(edges) > 1000
    assert weights.keys() == weights_of_twin.keys()
    assert all(torch.equal(flat, weights_of_twin[name]) for name, flat in weights.items())


def test_weights_of_an_edge_are_those_of_its_channel_behind_a_shuffle_and_groups():
    """Set to 0, they leave the layer without what comes from that channel, and change nothing else."""

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(2, 6, 1), nn.Conv2d(8, 4, 3, groups=2), nn.Linear(16, 3)

        def read(self, y):
            y = y.view(len(y), 2, 3, 4, 4).transpose(1, 2).flatten(1, 2)
            return self.b(torch.cat([y, y[:, 4:5], y[:, 4:5]], 1))  # of the channels 0 3 1 4 and 2 5 2 2

        def forward(self, x):
            return self.fc(self.read(self.a(x).relu()).relu().flatten(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Shuffled().double().eval()
        x = torch.rand(4, 2, 4, 4).double()
        y = torch.rand(4, 6, 4, 4).double()
    pairs = [(k, j) for k in range(4) for j in ((0, 3, 1, 4) if k < 2 else (2, 5))]
    edges = pd.DataFrame(pairs, columns=["channel", "source"]).assign(number=2, below=1)
    edges["rank"] = edges.index
    blocks = list(weight_blocks(model, explain(model, x, 1), edges))
    assert sorted(flat.shape for _, _, flat in blocks) == [(2, 27), (10, 9)]
    before = model.b.weight.data.clone()
    for name, rank, flat in blocks:
        assert name == "b.weight"
        for edge, weights in zip(rank.tolist(), flat, strict=True):
            channel, source = edges.loc[edge, ["channel", "source"]]
            model.b.weight.data = before.clone()
            expected = model.read(y).detach()
            without = y.clone()
            without[:, source] = 0
            expected[:, channel] = model.read(without).detach()[:, channel]
            model.b.weight.data.view(-1)[weights] = 0
            assert torch.allclose(model.read(y), expected)


@pytest.mark.large
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "swin_t", "vit_tiny_patch16_224"])
def test_models_of_torchvision_and_timm_have_paths_and_forget(name):
    """Shuffled channels, shifted windows, and attention written out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        timm.layers.set_fused_attn(False)
        try:
            of_timm = name.startswith("vit")
            model = timm.create_model(name, num_classes=5, img_size=64) if of_timm else get_model(name, num_classes=5)
        finally:
            timm.layers.set_fused_attn(True)
        x = torch.rand(6, 3, 64, 64)
    target = int(model.eval()(x).argmax(1).mode().values)
    found = find_paths(explain(model, x, target, edges=True), 50)
    assert len(found) == 50
    assert {path[-1][0] for path in found} == {"input"}
    for method in ("paths", "lra-npp", "head-npp", "mask"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a network of noise need not forget
            result = forget(model, x, target, method)
        assert result.patch.weights_changed > 0
        if method in ("paths", "mask"):
            assert not (result.model(x).argmax(1) == target).any()
