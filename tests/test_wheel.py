"""What is published: a wheel that works where nothing of this folder is, and a source archive."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both, from a copy of the sources, and nothing else."""
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "zsu", source / "zsu", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    return file


def test_every_module_and_asset_is_in_the_wheel(wheel):
    there = {
        str(p.relative_to(ROOT)) for p in (ROOT / "zsu").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    with zipfile.ZipFile(wheel) as file:
        assert there == {name for name in file.namelist() if name.startswith("zsu/")}


def test_the_index_would_take_both(built):
    files = sorted(map(str, built.iterdir()))
    assert [Path(file).suffix for file in files] == [".whl", ".gz"]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True, capture_output=True)


@pytest.mark.large
def test_it_runs_installed_elsewhere(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "site", wheel], check=True)
    elsewhere = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = "import zsu, zsu.models; print(zsu.__file__); zsu.models.bundled()"
    options = {"cwd": tmp_path, "env": elsewhere, "check": True, "capture_output": True, "text": True}
    assert subprocess.run([sys.executable, "-c", code], **options).stdout == f"{tmp_path / 'site/zsu/__init__.py'}\n"
    subprocess.run([sys.executable, "-m", "zsu", "forget", "--class", "Bag"], **options)
    assert (tmp_path / "forget-bag-paths.safetensors").exists()
