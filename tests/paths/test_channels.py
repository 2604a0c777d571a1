"""Paths through what moves channels about, against twins in which a fixed convolution does it; real architectures."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from helpers import ResNet20, rand
from zsu import ZsuError, explain, explain_paths, find_paths
from zsu.paths.graph import build_graph, fetch, reduced, runs_of
from zsu.relevance.rules import AlphaBeta, Epsilon

TINY, POSITIVE = Epsilon(1e-30), AlphaBeta(1, 0, epsilon=1e-30)  # the last is "z+"


def seeded(make):
    """A model with random weights, in float64, whose norms are not at their neutral start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make().double().eval()
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)):
                m.weight.data.uniform_(0.5, 1.5)
                m.bias.data.normal_(0, 0.1)
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
    return model


# Of six channels: what is done, and which channel then stands where; None: zeros.
MOVED = {
    "option A": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)), [None, 0, 1, 2, 3, 4, 5, None]),
    "padded before": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 0)), [None, None, 0, 1, 2, 3, 4, 5]),
    "cropped by padding": (lambda x: F.pad(x, (0, 0, 0, 0, -2, 2)), [2, 3, 4, 5, None, None]),
    "zeros joined": (lambda x: torch.cat([x, x.new_zeros(2, 2, 4, 4)], 1), [0, 1, 2, 3, 4, 5, None, None]),
    "sliced": (lambda x: x[:, 1:5], [1, 2, 3, 4]),
    "every second": (lambda x: x[:, ::2], [0, 2, 4]),
    "narrowed": (lambda x: x.narrow(1, 2, 4), [2, 3, 4, 5]),
    "chunks swapped": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), [3, 4, 5, 0, 1, 2]),
    "splits swapped": (lambda x: torch.cat(x.split([2, 4], dim=1)[::-1], 1), [2, 3, 4, 5, 0, 1]),
    "unbound and stacked": (lambda x: torch.stack(x.unbind(1)[:0:-1], 1), [5, 4, 3, 2, 1]),
    "one selected": (lambda x: x.select(1, 4).unsqueeze(1), [4]),
    "selected and joined": (lambda x: torch.cat([x[:, 4, None], x[:, :1]], 1), [4, 0]),
    "by a list": (lambda x: x[:, [5, 0, 3, 3]], [5, 0, 3, 3]),
    "by a tensor": (lambda x: x[:, torch.tensor([4, 1, 0, 2, 5, 3])], [4, 1, 0, 2, 5, 3]),
    "by a mask": (lambda x: x[:, torch.tensor([True, False, True, True, False, True])], [0, 2, 3, 5]),
    "index_select": (lambda x: torch.index_select(x, 1, torch.tensor([1, 1, 5])), [1, 1, 5]),
    "rolled": (lambda x: x.roll((1, 2), (1, 2)), [5, 0, 1, 2, 3, 4]),
    "flipped": (lambda x: torch.flip(x, (1, 3)), [5, 4, 3, 2, 1, 0]),
    "shuffled": (lambda x: x.view(2, 2, 3, 4, 4).transpose(1, 2).reshape(2, 6, 4, 4), [0, 3, 1, 4, 2, 5]),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 3), [0, 2, 4, 1, 3, 5]),
    "shuffled by unflatten": (lambda x: x.unflatten(1, (3, 2)).movedim(2, 1).flatten(1, 2), [0, 2, 4, 1, 3, 5]),
    "repeated": (lambda x: x.repeat(1, 2, 1, 1), [0, 1, 2, 3, 4, 5] * 2),
    "tiled": (lambda x: x[:, :2].tile(1, 2, 1, 1), [0, 1, 0, 1]),
    "each repeated": (lambda x: x.repeat_interleave(2, 1), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "each expanded": (lambda x: x[:, :, None].expand(2, 6, 2, 4, 4).flatten(1, 2), [n // 2 for n in range(12)]),
    "one expanded": (lambda x: x[:, 2:3].expand(-1, 4, -1, -1), [2] * 4),
    "first of two axes": (lambda x: x.permute(2, 3, 0, 1).flip(3).permute(2, 3, 0, 1), [5, 4, 3, 2, 1, 0]),
    "channels beside samples": (lambda x: x.reshape(12, 1, 4, 4).roll(1, 2).reshape(2, 6, 4, 4), [0, 1, 2, 3, 4, 5]),
}


class Moves(nn.Module):
    """A layer, channels moved about, and a layer that reads them: the ones or twos by turns, all, or one each."""

    def __init__(self, move, channels, reader, fixed):
        super().__init__()
        self.move, self.reader, self.fixed = move, reader, fixed
        same = [[float(c == source) for c in range(6)] for source in channels]
        self.same = torch.tensor(same).double()[:, :, None, None]  # (channels, 6, 1, 1)
        width = len(channels)
        self.a, self.b, self.bn = nn.Conv2d(2, 6, 1), nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.groups = nn.Conv2d(width, 2 * width, 1, groups=2 if width % 2 == 0 else width)
        self.fc = nn.Linear(2 * width if reader == "groups" else width, 3)

    def forward(self, x):
        x = self.a(x).relu()
        y = F.conv2d(x, self.same, stride=x.shape[2] // self.move(x).shape[2]) if self.fixed else self.move(x)
        if self.reader == "addition":
            y = (y + self.b(y).relu()).relu()
        else:
            y = {"all": self.b, "groups": self.groups, "each": self.bn}[self.reader](y).relu()
        return self.fc(y.mean((2, 3)))


def rows(paths, without=()):
    """[(path, probability)] without the channels of some layers, best first, those that tie by their channels."""
    found = {}
    for path, p in zip(paths, paths.probability, strict=True):
        path = tuple(c for c in path if c[0] not in without)
        found[path] = found.get(path, 0) + p
    return sorted(found.items(), key=lambda row: (-round(row[1], 12), row[0]))


def same_rows(found, expected):
    assert [path for path, _ in found] == [path for path, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], rel=1e-9)


@pytest.mark.parametrize("reader", ["all", "groups", "each", "addition"])
@pytest.mark.parametrize("name", MOVED)
def test_paths_are_those_of_a_twin_in_which_a_fixed_convolution_moves_the_channels(name, reader):
    """All relevance is positive, so that no channel of the fixed convolution is a dead end."""
    own, twin = (seeded(lambda: Moves(*MOVED[name], reader, fixed)) for fixed in (False, True))  # noqa: B023
    for parameter, p in [*own.named_parameters(), *twin.named_parameters()]:
        p.data = torch.zeros_like(p) if parameter.endswith("bias") else p.abs().detach()
    for m in (own, twin):
        m.bn.running_mean.zero_()
    x, seed = rand(2, 2, 4, 4).abs(), torch.ones(2, 3).double()
    result = explain(own, x, seed, POSITIVE)
    without = ["conv2d", "bn"]  # the convolution takes the BatchNorm in
    same_rows(
        rows(find_paths(result, min_probability=1e-300), without),
        rows(find_paths(explain(twin, x, seed, POSITIVE), min_probability=1e-300), without),
    )
    assert len(result.layers[-2].relevance) == 2  # samples are told apart
    ledger = build_graph(result).ledger.set_index("layer")
    expected = [float(result.nodes[layer].sum()) for layer in ledger.index]
    assert ledger.sum(1).to_numpy() == pytest.approx(expected, abs=1e-9)


def test_what_a_constant_gets_is_kept_in_the_ledger():
    model = seeded(Constant)
    result = explain(model, rand(2, 2, 4, 4), torch.ones(2, 2).double(), POSITIVE)
    row = build_graph(result).ledger.set_index("layer").loc["b"]
    edges = result.edges["b"]
    assert row["kept"] == pytest.approx(float(edges[:, 3].sum() + result.ledger.set_index("layer").loc["b", "bias"]))
    assert row["walked"] + row["dead end"] == pytest.approx(float(edges[:, :3].clamp(min=0).sum()))


class Constant(nn.Module):
    """A map of coordinates as one channel more."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 3, 1), nn.Conv2d(4, 3, 1), nn.Linear(3, 2)

    def forward(self, x):
        where = torch.linspace(1, 2, 4).double().expand(len(x), 1, 4, 4)
        return self.fc(self.b(torch.cat([self.a(x).relu(), where], 1)).relu().mean((2, 3)))


FEATURES = {
    "positions first": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "space to depth": lambda x: F.pixel_unshuffle(x, 2).flatten(1),
    "patches": lambda x: x.reshape(2, 6, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 96),
    "rows taken": lambda x: torch.cat([x[:, :, ::2].flatten(1), x[:, :, 1::2].flatten(1)], 1),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_in_any_order_are_those_of_their_channels(name):
    """A Linear whose columns are moved in the same way as the features is the one on flattened channels."""

    class Flat(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.features, self.a, self.fc = features, nn.Conv2d(2, 6, 1), nn.Linear(96, 3)

        def forward(self, x):
            return self.fc(self.features(self.a(x).relu()))

    own, twin = seeded(lambda: Flat(FEATURES[name])), seeded(lambda: Flat(lambda x: x.flatten(1)))
    place = FEATURES[name](torch.arange(96).view(1, 6, 4, 4).repeat(2, 1, 1, 1).double())[0].long()
    own.fc.weight.data = twin.fc.weight.data[:, place]
    x = rand(2, 2, 4, 4)
    found, expected = (find_paths(explain(m, x, 1, TINY), min_probability=1e-300) for m in (own, twin))
    same_rows(rows(found), rows(expected))


def test_two_channels_taken_one_by_one_are_one_channel_when_added():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Conv2d(2, 3, 1), nn.Linear(16, 2)

        def forward(self, x):
            x = self.a(x)
            return self.fc((x[:, 0] + x[:, 2]).flatten(1))

    result = explain(seeded(Difference), rand(2, 2, 4, 4), torch.ones(2, 2).double(), TINY)
    assert [layer.sources for layer in result.layers if layer.name == "add"] == [[[2], [4]]]
    assert result.nodes["add"].shape == (2, 1)
    assert {path[1] for path in find_paths(result, min_probability=1e-300)} == {("add", 0)}


# --- real architectures -----------------------------------------------------------------------------------------------


def test_resnet20_with_option_a_has_the_paths_of_its_twin():
    own, twin = (seeded(lambda: ResNet20(fixed=fixed)) for fixed in (False, True))  # noqa: B023
    x, seed = rand(2, 3, 16, 16), torch.ones(2, 3).double()
    of_own, of_twin = (find_paths(explain(m, x, seed, TINY), 2000) for m in (own, twin))
    same_rows(rows(of_own)[:1500], rows(of_twin, without=["blocks.3", "blocks.6"])[:1500])
    maps = [explain_paths(m, x, seed, [p[0], p[9]], TINY) for m, p in ((own, of_own), (twin, of_twin))]
    assert torch.allclose(*maps, rtol=1e-9, atol=1e-12)


def plain_vit(fused):
    model = timm.models.VisionTransformer(16, 8, embed_dim=12, depth=2, num_heads=2, num_classes=5)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


ARCHITECTURES = {
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 32, "fc"),
    "swin": (lambda: torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 4], [2, 2], num_classes=5), 32, "head"),
    "vit with written attention": (lambda: plain_vit(False), 16, "head"),
    "vit with fused attention": (lambda: plain_vit(True), 16, "head"),
    "resnet20": (lambda: ResNet20(5), 16, "head"),
    "resnext": (lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 5, groups=4,
                                                  width_per_group=8), 32, "fc"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_edges_bring_to_a_channel_is_its_relevance(name):
    """Between the layers nothing is lost and nothing changes channels: only constants get a share of their own."""
    make, size, head = ARCHITECTURES[name]
    model = seeded(make)
    nn.init.normal_(model.get_submodule(head).weight, generator=torch.Generator().manual_seed(0))
    result = explain(model, rand(2, 3, size, size), torch.ones(2, 5).double(), TINY)
    graph = build_graph(result)
    assert len(find_paths(graph, 200)) == 200
    brought = np.zeros(graph.start)
    for layer in fetch(map(reduced, result.layers)):
        for edges, _, source in runs_of(layer, graph.first):
            np.add.at(brought, source[:, None] + np.arange(edges.shape[1]), edges)
    for layer, here in zip(result.layers, np.split(brought, graph.first[1:-1]), strict=True):
        if layer.name not in (head, "patch_embed.proj"):  # which class token and position embeddings join
            expected = layer.relevance.sum(0).numpy()
            assert np.allclose(here, expected, rtol=0, atol=1e-9 * np.abs(expected).max()), layer.name


def test_written_and_fused_attention_have_the_same_paths():
    x, seed = rand(2, 3, 16, 16), torch.ones(2, 5).double()
    written, fused = (find_paths(explain(seeded(lambda: plain_vit(f)), x, seed, TINY), 300) for f in (False, True))  # noqa: B023
    same_rows(rows(written)[:250], rows(fused)[:250])
    assert "blocks.0.attn.qkv" in {layer for path in written for layer, _ in path}


def test_a_channel_that_differs_by_position_is_refused_by_name():
    class Upscales(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(2, 8, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(self.b(F.pixel_shuffle(self.a(x), 2)).mean((2, 3)))

    result = explain(seeded(Upscales), rand(2, 2, 4, 4), 1)
    with pytest.raises(ZsuError, match="^b: an operation before this layer mixes or rearranges channels"):
        find_paths(result, 3)
