"""The README's example runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_examples_run_and_forget(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL):
        exec(code, names)
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
