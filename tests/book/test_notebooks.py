"""notebooks/ is made from book/, says the same, and runs where only the package is installed."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
import venv
from pathlib import Path

import jupytext
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from notebooks import Chapter, ChapterError, notebooks
from test_environment import COLAB, INSTALLED_IN_COLAB

ROOT = Path(__file__).parents[2]
MADE = notebooks()
SOLVED = [name for name in MADE if not name.startswith("exercises/")]
VALUES = json.loads((ROOT / "book" / "values.json").read_text(encoding="utf-8"))
CLASSES = [path.stem for path in sorted((ROOT / "book").glob("*.md")) if "\nCLASS, SEED = " in path.read_text("utf-8")]
WIDGETS = [path.stem for path in sorted((ROOT / "book").glob("0*.md")) if "widgets." in path.read_text("utf-8")]
HEADER = "---\nkernelspec:\n  name: python3\n---\n# Title\n\n"


@pytest.fixture(params=MADE)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return nbformat.reads(MADE[name], as_version=4)


def convert(tmp_path, text):
    """The source of the cells of a chapter number 3 that holds this text."""
    path = tmp_path / "03_chapter.md"
    path.write_text(HEADER + text, encoding="utf-8")
    labels = {}
    Chapter(path, labels, {}, "https://github.com/example/zsu", strict=False).convert()
    return [cell["source"] for cell in Chapter(path, labels, {}, "", strict=True).convert()]


# -- the notebooks of this repository ------------------------------------------------------------------------


def test_in_step_with_the_book():
    folder = ROOT / "notebooks"
    committed = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.ipynb")}
    assert committed.keys() == MADE.keys(), "run `make notebooks`"
    for file, text in MADE.items():
        assert committed[file] == text, f"notebooks/{file} is not what book/ says; run `make notebooks`"


def test_valid_and_without_outputs(notebook):
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("name", SOLVED)
def test_same_code_as_jupytext_reads(name, notebook):
    chapter = jupytext.read(ROOT / "book" / name.replace(".ipynb", ".md"), fmt="md:myst")
    theirs = [
        cell.source.replace("from myst_nb import glue\n", "")
        for cell in chapter.cells
        if cell.cell_type == "code" and "remove-cell" not in cell.metadata.get("tags", [])
    ]
    ours = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]  # without the set-up cell
    assert [re.sub(r"\A#@title .*\n", "", source) for source in ours] == theirs


def test_cells_and_names_of_the_build_are_left_out(name, notebook):
    """The values are in the text, and no cell of the build or name of a value is."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert not re.search(r"\bglue\b|myst_nb", code)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    page = (ROOT / "book" / Path(name).with_suffix(".md").name).read_text(encoding="utf-8")
    values = VALUES.get(Path(name).stem, {})
    assert values.keys() == set(re.findall(r"\{glue:text\}`([^`]*)`", page))
    for value_name, value in values.items():
        assert value
        assert f"`{value_name}`" not in text.replace(f"`{value}`", "")
    if not name.startswith("exercises/"):
        assert all(value in text for value in values.values())


def test_a_note_for_developers_is_in_the_metadata(name, notebook):
    assert f"Made from book/{Path(name).with_suffix('.md').name} by `make notebooks`" in notebook.metadata["zsu"]
    assert not any("make notebooks" in cell.source for cell in notebook.cells)


def test_no_myst_is_left(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^[> ]*(`{3,})[^`{]*\n.*?^[> ]*\1", "", cell.source, flags=re.DOTALL | re.MULTILINE)
            myst = r"(?<!`)\{[\w:-]+\}`|^ *[`:]{3,}\{|^\([\w-]+\)=|^\+\+\+|^% |\[\^"
            assert not re.search(myst, text, re.MULTILINE), text


def set_up_cell(notebook):
    return next(cell for cell in notebook.cells if cell.cell_type == "code").source


def test_every_notebook_begins_with_the_same_set_up(notebook):
    assert notebook.cells[0].source.startswith("# ")
    source = set_up_cell(notebook)
    assert source == set_up_cell(nbformat.reads(MADE[SOLVED[0]], as_version=4))
    assert re.search(r'^REPO = "https://github\.com/[\w./-]+"  # ?@param', source, re.MULTILINE)
    assert "torch" not in re.sub("#.*", "", source)  # the environment is set before it is imported


def run_set_up(monkeypatch, there, colab, address_is_right=True):
    """Run the set-up cell where only `there` is installed; what pip was asked for, and the result."""
    there, asked = set(there), []

    def pip(line):
        asked.append(line)
        there.update(["captum"] if "captum" in line else ["zsu"] if address_is_right else [])

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in {"captum", "zsu"} - there else find(name)
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    shell = InteractiveShell()
    shell.register_magic_function(pip, magic_name="pip")
    result = shell.run_cell(set_up_cell(nbformat.reads(MADE[SOLVED[0]], as_version=4)))
    return asked, result


@pytest.mark.parametrize(("there", "colab"), [(["captum", "zsu"], True), (["captum", "zsu"], False)])
def test_set_up_installs_nothing_that_is_there(monkeypatch, there, colab):
    asked, result = run_set_up(monkeypatch, there, colab)
    assert result.success
    assert asked == []
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_set_up_installs_in_colab_what_is_missing_and_replaces_nothing(monkeypatch):
    asked, result = run_set_up(monkeypatch, [], colab=True)
    assert result.success
    assert all(line.startswith("install --quiet --no-deps ") for line in asked)
    assert re.search(r'"captum>=[\d.]+"$', asked[0])
    assert re.search(r'"git\+https://github\.com/[\w./-]+"$', asked[1])
    asked, result = run_set_up(monkeypatch, ["captum"], colab=True)
    assert len(asked) == 1
    assert "git+" in asked[0]


@pytest.mark.parametrize("colab", [True, False])
def test_set_up_says_what_to_do_where_the_package_is_not_found(monkeypatch, capsys, colab):
    _, result = run_set_up(monkeypatch, [], colab, address_is_right=False)
    said = str(result.error_in_exec)
    assert "https://github.com/" in said
    assert "REPO" in said
    assert "make book" in said


@pytest.mark.parametrize("name", SOLVED)
def test_without_solutions(name):
    """The exercises are there, their solutions are not, and no later cell needs what a solution defines."""
    solved, unsolved = (nbformat.reads(MADE[n], as_version=4).cells for n in (name, f"exercises/{name}"))
    shown = [cell.source for cell in unsolved]
    assert not any("<summary>Solution" in text or "#@title" in text for text in shown)
    solutions = [cell.source for cell in solved if cell.source.startswith("#@title Solution to ")]
    assert len([text for text in shown if text.startswith("# Solution to ")]) == len(solutions) == 2
    assert sum("**Exercise " in text for text in shown) == 2
    stays = [cell.source for cell in unsolved if cell.cell_type == "code" and "%pip" not in cell.source]
    there = {node.id for text in stays for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    only_in_solutions = set().union(*map(defined, solutions)) - set().union(*map(defined, stays))
    assert not only_in_solutions & there


def defined(code):
    """Names that code binds, at any depth."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return names | {
        (a.asname or a.name).split(".")[0] for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }


@pytest.fixture(scope="session")
def colab_widgets(tmp_path_factory):
    """A folder with the ipywidgets that Colab has."""
    folder = tmp_path_factory.mktemp("colab")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [*pip, "--target", folder, f"ipywidgets=={COLAB['ipywidgets']}", "ipython_genutils==0.2.0"], check=True
    )
    return folder


def execute(notebook, folder):
    """Run all cells there; an error or a word on stderr fails. The outputs as text."""
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.large
@pytest.mark.parametrize("name", [name for name in SOLVED if name[:-6] in WIDGETS or name[:-6] not in CLASSES])
def test_runs_with_the_widgets_of_colab(notebook, tmp_path, colab_widgets, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(colab_widgets), str(ROOT)]))
    check = f"import ipywidgets; assert ipywidgets.__version__ == {COLAB['ipywidgets']!r}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(check))
    execute(notebook, tmp_path)


@pytest.mark.large
@pytest.mark.parametrize(
    ("name", "cls", "seed"),
    [(f"{stem}.ipynb", "Sneaker", 0) for stem in CLASSES]
    + [(f"{stem}.ipynb", "Trouser", 1) for stem in CLASSES if stem[:2] in ("01", "03", "04", "05", "06")],
)
def test_a_reader_may_change_the_class_and_the_seed(notebook, name, cls, seed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    changed = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, found = re.subn(r'^CLASS, SEED = "Trouser", 0', f'CLASS, SEED = "{cls}", {seed}', cell.source,
                                         flags=re.MULTILINE)  # fmt: skip
            changed += found
    assert changed == 1
    said = execute(notebook, tmp_path)
    if cls != "Trouser" and re.search(r"models\.references\(CLASS\)", MADE[name]):
        assert f"n/a: `zsu references --class '{cls}'`" in said


def test_eight_chapters_have_a_class_to_change():
    assert [stem[:2] for stem in CLASSES] == ["01", "02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.parametrize("stem", CLASSES)
def test_the_class_and_the_seed_stand_in_one_place(stem):
    notebook = nbformat.reads(MADE[f"{stem}.ipynb"], as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert re.findall(r'^.*"Trouser".*$', code, re.MULTILINE) == re.findall(r"^CLASS, SEED = .*$", code, re.MULTILINE)
    assert 'bundled("retrained"' not in code  # which saw every class but one


def test_pip_would_replace_nothing_in_colab(tmp_path):
    """pip, asked in an environment that claims to have what Colab has, would install captum and this package alone."""
    venv.create(tmp_path / "colab", with_pip=False)
    site = next((tmp_path / "colab").rglob("site-packages"))
    for name, version in COLAB.items():
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    set_up = set_up_cell(nbformat.reads(MADE[SOLVED[0]], as_version=4))
    captum = re.search(r'"(captum>[^"]*)"', set_up)[1]
    for no_deps in (["--no-deps"], []):  # as the notebook does, and as pip would do by itself
        command = [sys.executable, "-m", "pip", "--python", str(tmp_path / "colab"), "install", "--dry-run", "--quiet"]
        command += [*no_deps, "--report", str(tmp_path / "report.json"), captum, str(ROOT)]
        subprocess.run(command, check=True, capture_output=True)
        report = json.loads((tmp_path / "report.json").read_text())
        assert {item["metadata"]["name"] for item in report["install"]} == INSTALLED_IN_COLAB | {"zsu"}


# -- the conversion ------------------------------------------------------------------------------------------


def test_numbers_follow_the_order_of_the_chapter(tmp_path):
    cells = convert(tmp_path, "See {eq}`b` and {eq}`a`.\n\n$$ x $$ (a)\n\n```{math}\n:label: b\ny\n```\n\n$$ z $$\n")
    assert cells == ["# Title\n\nSee (3.2) and (3.1).\n\n$$\nx\n\\tag{3.1}\n$$\n\n$$\ny\n\\tag{3.2}\n$$\n\n$$\nz\n$$"]


def test_figure_has_its_caption_below(tmp_path):
    cell = "```{code-cell}\n---\nmystnb:\n  figure:\n    name: f\n    caption: A curve.\ntags: [t]\n---\n1\n```\n"
    assert convert(tmp_path, f"{{numref}}`f`, {{numref}}`picture %s <f>`\n\n{cell}\nText\n") == [
        "# Title\n\nFig. 3.1, picture 3.1",
        "1",
        "*Fig. 3.1:* A curve.\n\nText",
    ]


def test_exercise_and_solution(tmp_path):
    exercise = "````{exercise} Sum\n:label: e\n\nShow.\n\n```python\nx = 1\n```\n````\n\n"
    solution = "```{solution} e\n:class: dropdown\n\nDone.\n```\n"
    assert convert(tmp_path, exercise + solution) == [
        "# Title\n\n> **Exercise 3.1 (Sum)**\n>\n> Show.\n>\n> ```python\n> x = 1\n> ```\n\n"
        "<details><summary>Solution to Exercise 3.1</summary>\n\nDone.\n\n</details>"
    ]


def test_code_of_a_solution_is_folded(tmp_path):
    path = tmp_path / "03_chapter.md"
    path.write_text(
        HEADER + "```{exercise}\n:label: e\n\nDo.\n```\n\n```{solution-start} e\n:class: dropdown\n```\n\nSo.\n\n"
        "```{code-cell}\n1\n```\n\n```{solution-end}\n```\n\n```{code-cell}\n2\n```\n",
        encoding="utf-8",
    )
    cells = Chapter(path, {}, {}, "", strict=True).convert()
    assert [cell["source"] for cell in cells[1:]] == ["#@title Solution to Exercise 3.1\n1", "2"]
    assert cells[0]["source"].endswith("<details><summary>Solution to Exercise 3.1</summary>\n\nSo.\n\n</details>")
    assert cells[1]["metadata"] == {"cellView": "form", "jupyter": {"source_hidden": True}}
    assert cells[2]["metadata"] == {}


def test_admonitions(tmp_path):
    text = ":::{note}\nA\n:::\n\n:::{admonition} Hint for $x$\n:class: dropdown\nB\n:::\n"
    assert convert(tmp_path, text) == [
        "# Title\n\n> **Note**\n>\n> A\n\n<details><summary>Hint for $x$</summary>\n\nB\n\n</details>"
    ]


def test_footnotes_targets_comments_and_breaks(tmp_path):
    text = "One[^x], {ref}`sec`, {ref}`there <sec>`, {term}`path`.\n\n[^x]: Note.\n\n% gone\n\n"
    text += "(sec)=\n## Two\n\na\n+++\nb\n"
    assert convert(tmp_path, text) == [
        "# Title\n\nOne<sup>1</sup>, *Two*, there, path.\n\n<sup>1</sup> Note.",
        "## Two\n\na",
        "b",
    ]


def test_code_and_math_are_left_alone(tmp_path):
    text = "`{eq}` and ``{eq}`x` `` and $a_{b}^{c}$\n\n```text\n{eq}`x` [^1]\n(target)=\n```\n\n"
    text += "- list\n\n  ```python\n  1\n  ```"
    assert convert(tmp_path, text) == [f"# Title\n\n{text}"]


def test_values_of_the_build_stand_in_the_text_and_its_cells_are_left_out(tmp_path):
    text = "```{code-cell}\nimport zsu\nfrom myst_nb import glue\n\n1\n```\n\nIt is {glue:text}`end`.\n\n"
    text += '```{code-cell}\n:tags: [remove-cell]\n\nglue("end", "3 %")\n```\n'
    path = tmp_path / "03_chapter.md"
    path.write_text(HEADER + text, encoding="utf-8")
    cells = Chapter(path, {}, {}, "", strict=True, values={"end": "3 %"}).convert()
    assert [cell["source"] for cell in cells] == ["# Title", "import zsu\n\n1", "It is 3 %."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\n```{mermaid}\nb\n```\n", r"03_chapter\.md:9: .*directive 'mermaid'"),
        (":::{note}\nfine\n\n{rot13}`x`\n:::\n", r"03_chapter\.md:10: .*role 'rot13'"),
        ("a\nb {eq}`none`\n", r"03_chapter\.md:8: nothing is labelled 'none'"),
        ("{cite:p}`nobody2000`\n", r"03_chapter\.md:7: the bibliography has no 'nobody2000'"),
        ("{doc}`nowhere`\n", r"03_chapter\.md:7: there is no page 'nowhere'"),
        ("![a](picture.png)\n", r"03_chapter\.md:7: the link 'picture\.png'"),
        ("```python\n1\n", r"03_chapter\.md:7: this fence is never closed"),
        ("- a\n\n  ```{note}\n  b\n  ```\n", r"03_chapter\.md:9: the directive 'note' is indented"),
        ("```{note}\n:width: 3\n\nb\n```\n", r"03_chapter\.md:7: .*option 'width' of 'note'"),
        ("```{code-cell}\nimport myst_nb\n```\n", r"03_chapter\.md:7: .*myst_nb"),
        ('```{code-cell}\nglue("end", 3)\n```\n', r"03_chapter\.md:7: glue belongs into a cell tagged"),
        ("a {glue:text}`end`\n", r"03_chapter\.md:7: book/values\.json has no 'end'; `make book`"),
        (
            "```{exercise}\n:label: e\n\nDo.\n```\n\n```{solution-start} e\n```\n\nSo.\n",
            r"'Solution to Exercise 3\.1' is never ended",
        ),
    ],
)
def test_what_no_notebook_can_show_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ChapterError, match=message):
        convert(tmp_path, text)
