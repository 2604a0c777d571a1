"""check(): is this machine ready for the course? In about ten seconds, with what to do where it is not."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

MEMORY, DISK = 4, 1  # GB
SECONDS = 60  # that a chapter may take


class Finding(NamedTuple):
    """One line of `check`: what was looked at, whether it will do, what was found, and what to do about it."""

    what: str
    ok: bool
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n       -> {self.remedy}" if not self.ok else ""
        return f"{'ok' if self.ok else 'FIX':<4} {self.what}: {self.found}{remedy}"


def check() -> list[Finding]:
    """Look at Python, the packages, memory, disk, the bundled data and models, speed, and notebooks.

    Returns
    -------
    list of Finding
        Each ``.ok`` or with a ``.remedy``. Nothing is installed or changed; what raises is a finding too.
    """
    return [examine(look) for look in (python, packages, memory, disk, course, notebooks)]


def examine(look: Callable[[], Finding]) -> Finding:
    """What one of the functions below finds, or what it raises."""
    try:
        return look()
    except Exception as error:  # whatever a broken installation raises
        remedy = "install the package anew; for disk: make room, or set TMPDIR"
        return Finding(look.__name__, False, f"{type(error).__name__}: {error}", remedy)


def python() -> Finding:
    """Python itself."""
    wanted = Requirement(f"python{importlib.metadata.metadata('zsu')['Requires-Python']}")
    found = platform.python_version()
    return Finding("python", Version(found) in wanted.specifier, found, f"install {wanted}")


def packages() -> Finding:
    """What the kernel needs, by its own metadata."""
    every = map(Requirement, importlib.metadata.requires("zsu") or [])
    needs = [need for need in every if need.marker is None]  # no extras
    wrong = [str(need) for need in needs if not is_installed(need)]
    if not wrong:  # do they work?
        for module in ("plots", "widgets", "relevance.comparison"):
            import_module(f"zsu.{module}")
    found = f"missing or too old: {', '.join(wrong)}" if wrong else f"{len(needs)} as needed"
    return Finding("packages", not wrong, found, "pip install " + " ".join(f'"{name}"' for name in wrong))


def is_installed(need: Requirement) -> bool:
    """Whether the package is there in a version that will do."""
    try:
        return Version(importlib.metadata.version(need.name)) in need.specifier
    except importlib.metadata.PackageNotFoundError:
        return False


def memory() -> Finding:
    """Main memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding("memory", True, "not known on this system")
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return Finding("memory", found >= MEMORY, f"{found:.0f} GB", f"use a machine with {MEMORY} GB, or Colab")


def disk() -> Finding:
    """Room for what chapters write."""
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile():
        free = shutil.disk_usage(folder).free / 1e9
    return Finding("disk", free >= DISK, f"{free:.0f} GB free in {folder}", f"make room for {DISK} GB, or set TMPDIR")


def course() -> Finding:
    """Forget a class with the bundled data and models: right result, and fast enough?"""
    import torch

    from . import data, models
    from .forgetting import forget
    from .scale import scoreboard

    begin = time.perf_counter()
    test = data.load().test
    model, *_ = [models.bundled(kind, seed) for kind in models.BUNDLED_FILES for seed in range(models.BUNDLED_SEEDS)]
    scoreboard.load()
    target = data.class_index(test, "Trouser")
    x = data.samples(test, target)
    edited = forget(model, x, target, "mask").model
    with torch.no_grad():
        before, after = ((m(x).argmax(1) == target).double().mean() for m in (model, edited))
    start = time.perf_counter()
    forget(model, x, target, "lra-npp")
    explained = time.perf_counter() - start
    device = f"GPU: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU, which is fine"
    found = f"trousers recognised {before:.0%} before, {after:.0%} after a mask; relevance and cut in "
    found += f"{explained:.1f} s; {torch.get_num_threads()} threads, {device}"
    if not (before > 0.9 and after == 0):
        return Finding("course", False, found, "the bundled data or model are not what they were: install zsu anew")
    fast = time.perf_counter() - begin < SECONDS
    return Finding("course", fast, found, "too slow: close other programs, or work in Colab")


def notebooks() -> Finding:
    """A program that opens notebooks, here or in the browser."""
    there = [name for name in ("jupyterlab", "notebook", "google.colab") if is_there(name)]
    return Finding("notebooks", bool(there), ", ".join(there) or "none", "pip install jupyterlab, or work in Colab")


def is_there(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False
