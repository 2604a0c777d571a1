"""What several files test with: the bundled model, the bundled data, and 36 unseen trousers."""

import pytest

import zsu.data
import zsu.models


@pytest.fixture(scope="module")
def original():
    return zsu.models.bundled("original")


@pytest.fixture(scope="module")
def splits():
    return zsu.data.load("fashion-mini")


@pytest.fixture(scope="module")
def x(splits):
    return zsu.data.samples(splits.test, "Trouser")
