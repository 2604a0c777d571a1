"""Models of which the answer is known, images of one pixel, and an audit of them."""

import torch
from torch import nn

from zsu import audit
from zsu.data import Images
from zsu.evaluation import BASIC

ACCURACIES = ["at_test", "ag_test", "all_test", "at_train", "ag_train", "all_train"]
COMPARED = ["js_forget", "js_retained", "js_forget_ratio"]


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def images(labels, classes=3):
    """Images of one pixel, which is the label."""
    labels = torch.tensor(labels)
    return Images(labels.to(torch.uint8).reshape(-1, 1, 1, 1), labels, [f"c{i}" for i in range(classes)])


class Reads(nn.Module):
    """Knows every label of `images` but those it takes for class 0."""

    def __init__(self, classes=3, blind=()):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.classes, self.blind = classes, blind

    def forward(self, x):
        label = (x.flatten() * 255).round().long()
        for b in self.blind:
            label = torch.where(label == b, 0, label)
        return self.scale * nn.functional.one_hot(label, self.classes).float()


TEST, TRAIN = images([0, 0, 1, 1, 1, 1, 1, 2]), images([0, 1, 1, 1, 1, 1, 2, 2])


def report(forgotten, references=(), original=None, test=TEST, train=TRAIN, target=1, **options):
    """Accuracy and divergence, without controls."""
    options = {"measures": BASIC, "controls": False, "progress": False} | options
    original = Reads().eval() if original is None else original
    return audit(original, forgotten, train, test, target, references, **options)


def run(*args, **options):
    return report(*args, **options).frame
