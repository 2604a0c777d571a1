"""pyproject.toml, environment.yml and Colab agree."""

import importlib.metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import zsu

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]

# What Colab's CPU runtime had preinstalled in August 2026, from its own `pip freeze`.
COLAB_PYTHON = "3.13"
COLAB = {
    "filelock": "3.32.3",
    "ipywidgets": "7.7.1",
    "joblib": "1.5.3",
    "matplotlib": "3.10.0",
    "numba": "0.61.2",
    "numpy": "2.1.3",
    "packaging": "26.3",
    "pandas": "2.2.3",
    "safetensors": "0.8.0",
    "scikit-learn": "1.6.1",
    "scipy": "1.16.3",
    "seaborn": "0.13.2",
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "tqdm": "4.67.3",
    "typer": "0.27.1",
}
INSTALLED_IN_COLAB = {"captum"}  # by the first cell of each notebook, without its dependencies
CONDA_NAMES = {"pytorch": "torch", "python-build": "build"}  # conda-forge's name -> PyPI's


def conda_requirements() -> list[Requirement]:
    """The packages of environment.yml under their names on PyPI, without Python, pip and the project itself."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    lines = [entry for entry in entries if isinstance(entry, str)] + entries[-1]["pip"]
    named = [Requirement(line) for line in lines if not line.startswith(("python>", "-e "))]
    for requirement in named:
        requirement.name = CONDA_NAMES.get(requirement.name, requirement.name)
    return [requirement for requirement in named if requirement.name != "pip"]


def as_dict(requirements: list[Requirement]) -> dict[str, str]:
    return {requirement.name: str(requirement.specifier) for requirement in requirements}


def test_conda_and_pip_install_the_same():
    assert as_dict(conda_requirements()) == as_dict(CORE + EXTRAS)


def test_conda_channels():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


@pytest.mark.parametrize("requirement", CORE, ids=lambda requirement: requirement.name)
def test_the_kernel_has_lower_bounds_only(requirement):
    assert [specifier.operator for specifier in requirement.specifier] == [">="]


@pytest.mark.parametrize(
    "requirement", [r for r in CORE if r.name not in INSTALLED_IN_COLAB], ids=lambda requirement: requirement.name
)
def test_colab_has_what_the_kernel_needs(requirement):
    assert Version(COLAB[requirement.name]) in requirement.specifier


def test_what_is_installed_in_colab_finds_its_dependencies_there():
    for package in INSTALLED_IN_COLAB:
        for requirement in map(Requirement, importlib.metadata.requires(package)):
            if requirement.marker is None:  # no extra
                assert Version(COLAB[requirement.name]) in requirement.specifier, f"{package} needs {requirement}"


def test_python_of_colab():
    assert Version(COLAB_PYTHON) in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_addresses_and_version_are_everywhere_the_same():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    urls = PROJECT["urls"]
    assert urls["Source"] == citation["repository-code"] == config["repository"]["url"]
    assert urls["Homepage"] == citation["url"] == config["sphinx"]["config"]["html_baseurl"]
    assert urls["Documentation"].startswith(urls["Homepage"])
    assert urls["Changelog"].startswith(urls["Source"])
    assert citation["version"] == zsu.__version__ == importlib.metadata.version("zsu")
    assert f"## [{zsu.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
