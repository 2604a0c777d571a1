"""The examples of README.md and CONTRIBUTING.md run as printed."""

import re
from pathlib import Path

import pytest

import zsu
from zsu.evaluation import MEASURES

README = Path(__file__).parents[2] / "README.md"


def run_examples(path):
    """The names after all Python code of a page has run."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
        exec(code, names)
    return names


@pytest.mark.large  # a whole audit beside eight references
def test_the_python_examples_run_and_forget(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_examples(README)
    assert "paths" in capsys.readouterr().out
    before, after = names["model"].state_dict(), names["forgotten"].model.state_dict()
    assert all(before[key].equal(after[key]) for key in before)  # the example ends in revert
    assert names["forgotten"].patch.weights_changed > 0
    assert (len(names["paths"]), names["maps"].shape) == (100, (1, *names["x"].shape))
    assert {len(n) for n in names["ranked"].values()} == {5}


def test_the_commands_of_the_readme_exist():
    text = README.read_text()
    targets = set(re.findall(r"^(\w+):", (README.parent / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^    make (\w+)", text, flags=re.MULTILINE)) == {"book", "test"} <= targets


def test_what_contributing_adds_works(monkeypatch):
    monkeypatch.setitem(MEASURES, "confidence", None)  # so that it is gone afterwards
    names = run_examples(README.with_name("CONTRIBUTING.md"))
    assert names["relevance"].ledger["gap"].abs().max() < 1e-4
    forgotten = names["forgotten"]
    assert (forgotten.patch.metadata["method"], list(forgotten.cut["channel"])) == ("shrink", [1])
    model = names["model"]
    before, after = (m.state_dict()["head.weight"][1] for m in (model, forgotten.model))
    assert after.equal(before / 2)
    train, test = zsu.data.load("fashion-mini")
    others = zsu.data.without_samples(test, 1, n=36)
    found = zsu.audit(model, {}, train, others, 1, measures=["confidence"]).frame["confidence"]
    assert 1 / 10 < found["original"] <= 1
