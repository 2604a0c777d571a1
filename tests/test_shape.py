"""The shape of the package: what it shows, how light it is to import, and how long its parts may be."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zsu

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "zsu").rglob("*.py"))
LONGER = {"tape.py", "data.py", "cli.py"}  # modules that may have 620 lines instead of 450
# Their parameters are those of the torch function of that name.
MIRRORS = {"batch_norm", "convolution", "multi_head_attention_forward", "scaled_dot_product_attention"}
MIRRORS |= {"_sweep"}  # a kernel, which takes pointers and strides


def functions(path):
    """All functions and methods of a module."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_lines(node, text):
    """Lines of a function without its docstring, blank lines and comments."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    first = body[0].lineno if body else node.end_lineno + 1
    lines = text.splitlines()
    chosen = [*lines[node.lineno - 1 : node.body[0].lineno - 1], *lines[first - 1 : node.end_lineno]]
    chosen = [line.strip() for line in chosen]
    return len([line for line in chosen if line and not line.startswith("#")])


def parameters(node):
    """How many a function has; self and cls do not count."""
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg is not None]
    return len([name for name in names if name not in ("self", "cls")])


def is_public(node, path):
    """Whether the reference has it, or it is a command."""
    listed = rf"^\.\. autofunction:: zsu\.(\w+\.)*{node.name}$"
    is_command = path.name == "cli.py" and any("command" in ast.unparse(d) for d in node.decorator_list)
    return is_command or re.search(listed, (ROOT / "book" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_tab_shows_the_public_names_and_the_parts():
    names = ["Composite", "Forgotten", "Patch", "Paths", "Relevance", "ZsuError", "audit", "compare", "explain"]
    names += ["explain_each", "explain_paths", "find_paths", "forget", "select_neurons"]
    parts = ["data", "doctor", "evaluation", "forgetting", "models", "paths", "plots", "relevance", "scale"]
    parts += ["training", "widgets"]
    assert dir(zsu) == sorted([*names, *parts, "__version__"])
    assert all(getattr(zsu, name) is not None for name in dir(zsu))
    assert not hasattr(zsu, "nothing")


@pytest.mark.parametrize("name", zsu.HOMES)
def test_what_moved_into_a_wing_is_reached_by_its_short_name(name):
    found = getattr(zsu, name)
    assert found is getattr(getattr(zsu, zsu.HOMES[name]), name)
    if name not in zsu.__all__:
        own = found.__spec__
        assert importlib.import_module(f"zsu.{name}") is found
        assert found.__spec__ is own
        assert own.name == found.__name__ == f"zsu.{zsu.HOMES[name]}.{name}"


def test_a_module_that_there_is_not_is_missed_as_usual():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'zsu\.rule'"):
        importlib.import_module("zsu.rule")


@pytest.mark.parametrize("words", ["--help", "forget --help"])
def test_help_does_not_wait_for_torch(words):
    code = "import sys, zsu.cli\ntry:\n    zsu.cli.main()\nfinally:\n    assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *words.split()], check=True, capture_output=True)


def test_no_module_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {p.name: n for p, n in lengths.items() if n > (620 if p.name in LONGER else 450)} == {}


def test_no_function_is_long():
    texts = {path: path.read_text(encoding="utf-8") for path in MODULES}
    sizes = {f"{p.name}:{f.name}": code_lines(f, text) for p, text in texts.items() for f in functions(p)}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def test_only_public_functions_and_those_of_torch_have_many_parameters():
    many = {(path, f.name): f for path in MODULES for f in functions(path) if parameters(f) > 7}
    assert [f"{p.name}:{name}" for (p, name), f in many.items() if name not in MIRRORS and not is_public(f, p)] == []


def test_lengths_are_counted_without_words():
    text = 'def f(\n    self, a, *b, c=1, **d\n):\n    """Doc\n    string."""\n    # comment\n\n'
    text += "    return [\n        a\n    ]\n"
    node = ast.parse(text).body[0]
    assert (code_lines(node, text), parameters(node)) == (6, 4)
