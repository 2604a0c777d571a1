"""What several files test with: the bundled model and data, 36 unseen trousers, a small data set, and a browser."""

import gzip
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import zsu.data
import zsu.models


@pytest.fixture(scope="session")
def assets():
    """benchmarks/assets.py, which makes what ships."""
    spec = spec_from_file_location("assets", Path(__file__).parents[1] / "benchmarks" / "assets.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    return module


@pytest.fixture(scope="session")
def original():
    return zsu.models.bundled("original")


@pytest.fixture(scope="session")
def splits():
    return zsu.data.load("fashion-mini")


@pytest.fixture(scope="session")
def x(splits):
    return zsu.data.samples(splits.test, "Trouser")


@pytest.fixture(scope="session")
def idx(tmp_path_factory):
    """60 + 20 images a class of Fashion-MNIST, as IDX files."""
    folder = tmp_path_factory.mktemp("idx")
    for part, prefix, number in zip(zsu.data.load("fashion-mini"), ("train", "t10k"), (60, 20), strict=True):
        chosen = np.concatenate([np.flatnonzero(part.targets.numpy() == c)[:number] for c in range(10)])
        arrays = {"images-idx3": part.data[chosen, 0].numpy(), "labels-idx1": part.targets[chosen].byte().numpy()}
        for name, a in arrays.items():
            head = bytes([0, 0, 8, a.ndim]) + b"".join(n.to_bytes(4, "big") for n in a.shape)
            with gzip.open(folder / f"{prefix}-{name}-ubyte.gz", "wb") as file:
                file.write(head + a.tobytes())
    return folder


@pytest.fixture(scope="module")
def browser():
    """Chromium without a network."""
    from playwright.sync_api import sync_playwright  # where nothing needs a browser, none has to be there

    from release import CHROMIUM

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*flags, "--host-resolver-rules=MAP * ~NOTFOUND"]
        )
        yield browser
        browser.close()
