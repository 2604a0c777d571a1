"""What tests of several parts say: random numbers from a seed, the bits of a model, and which method needs what."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from zsu.data import classes, targets
from zsu.forgetting import METHODS as ALL
from zsu.relevance import explanation
from zsu.relevance.composites import Composite
from zsu.relevance.tape import Tape

TROUSER = 1
METHODS = [name for name in ALL if name != "paths+retained"]  # which is "paths" with retained samples
NEED_RETAINED = [name for name in METHODS if ALL[name].tier in ("T3", "T4")]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(model: nn.Module | dict[str, Tensor]) -> dict[str, bytes]:
    """The bytes of each tensor of a model or state dict: equal where not a bit differs, NaN and -0 included."""
    state = model if isinstance(model, dict) else model.state_dict()
    return {n: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in state.items()}


@torch.no_grad()
def largest(model: nn.Module, x: Tensor, target: int) -> float:
    """The largest probability of the class."""
    return float(model(x).double().softmax(1)[:, target].max())


def wrap_explanation(monkeypatch, wrap):
    """Wrap all that `explain` does between the checks at its entry and its result."""
    parts = [(Tape, name) for name in ("record", "backward", "check_flow")] + [(Composite, "assign")]
    for home, name in (*parts, (explanation, "check_logits"), (explanation, "output_weights")):
        monkeypatch.setattr(home, name, wrap(getattr(home, name)))


class Net(nn.Module):
    """Modules as attributes and a forward pass given as a function: `Net(lambda m, x: m.a(x), a=...)`."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


class Counting(Dataset):
    """A data set that counts how often an image or the labels are read."""

    def __init__(self, data):
        self.data, self.reads, self.classes = data, 0, classes(data)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.reads += 1
        return self.data[i]

    @property
    def targets(self):
        self.reads += 1
        return targets(self.data)


class Changed(Dataset):
    """A data set whose items are changed, with the labels and classes of the one it is made of."""

    def __init__(self, data, change):
        self.data, self.change, self.targets, self.classes = data, change, targets(data), classes(data)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.change(*self.data[i])


# Items that data sets give where (image, label) is read, or labels that are not those of `.targets`.
NO_PAIRS = [
    lambda x, y: (x, y, 7), lambda x, y: None, lambda x, y: {"image": x, "label": y}, lambda x, y: (x, torch.eye(3)[0]),
    lambda x, y: (x, None), lambda x, y: (x, -1), lambda x, y: (x, y + 0.7), lambda x, y: (x, (y + 1) % 3),
    lambda x, y: (255 * x).byte(), lambda x, y: 1 / 0,
]  # fmt: skip


class Block(nn.Module):
    """Of a ResNet for CIFAR: where channels grow, the shortcut takes every second pixel and pads channels with zeros
    ("option A"), or it is a strided 1x1 convolution with fixed weights that does the same.
    """

    def __init__(self, before, after, fixed):
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.pad, self.fixed = (after - before) // 2, fixed
        same = F.pad(torch.eye(before), (0, 0, self.pad, self.pad))[:, :, None, None]  # (after, before, 1, 1)
        self.register_buffer("same", same, persistent=False)

    def shortcut(self, x):
        if not self.pad:
            return x
        if self.fixed:
            return F.conv2d(x, self.same, stride=2)
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet20(nn.Module):
    def __init__(self, classes=3, fixed=False):
        super().__init__()
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(a, b, fixed) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.blocks(self.bn(self.conv(x)).relu()).mean((2, 3)))
