"""What the tests of forgetting share: samples, retained data, each method's edit, each class's edit."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import zsu.data
import zsu.evaluation
from helpers import METHODS, NEED_RETAINED, TROUSER
from zsu import forget


@pytest.fixture(scope="session")
def samples(splits):
    return lambda cls: zsu.data.samples(splits.test, cls)


@pytest.fixture(scope="session")
def without(splits):
    """Training images without some classes, n of each other."""
    y = zsu.data.targets(splits.train)

    def few(*left_out, n=20):
        kept = [(y == c).nonzero()[:n, 0] for c in range(10) if c not in left_out]
        return Subset(splits.train, torch.cat(kept).tolist())

    return few


@pytest.fixture(scope="session")
def outputs(splits):
    """(softmax, labels) of a model on the test images that the edits did not see."""
    test = zsu.data.without_samples(splits.test, TROUSER)
    return lambda model: zsu.evaluation.predict(model, test)


@pytest.fixture(scope="session")
def by_class(splits):
    """A model's accuracy on the test images of each class that `samples` did not draw, (10,)."""
    held_out = splits.test
    for c in range(10):
        seen = zsu.data.without_samples(splits.test, c).indices
        held_out = Subset(held_out, seen) if c == 0 else Subset(splits.test, sorted({*held_out.indices} & {*seen}))
    assert len(held_out) == 10 * (200 - 36)

    def accuracies(model):
        p, y = zsu.evaluation.predict(model, held_out)
        return np.array([zsu.evaluation.accuracy(p[y == c], y[y == c]) for c in range(10)])

    return accuracies


@pytest.fixture(scope="session")
def before(original, by_class):
    """What the original has of each class."""
    return by_class(original)


@pytest.fixture(scope="session")
def edited(original, x, without):
    """The result of each method."""
    return {m: forget(original, x, TROUSER, m, **({"retained": without(1)} if m in NEED_RETAINED else {}))
            for m in METHODS}  # fmt: skip


@pytest.fixture(scope="session")
def each_class(original, samples):
    """What `paths` makes of each class."""
    return [forget(original, samples(c), c) for c in range(10)]
