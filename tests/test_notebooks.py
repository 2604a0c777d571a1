"""notebooks/ is made from book/, says the same, and runs where only the package is installed."""

import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from notebooks import Chapter, ChapterError, notebooks  # noqa: E402

MADE = notebooks()
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
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert committed.keys() == MADE.keys(), "run `make notebooks`"
    for file, text in MADE.items():
        assert committed[file] == text, f"notebooks/{file} is not what book/ says; run `make notebooks`"


def test_valid_and_without_outputs(notebook):
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_same_code_as_jupytext_reads(name, notebook):
    chapter = jupytext.read(ROOT / "book" / name.replace(".ipynb", ".md"), fmt="md:myst")
    theirs = [cell.source for cell in chapter.cells if cell.cell_type == "code"]
    ours = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]  # without the install cell
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        if "myst_nb" not in yours:
            assert re.sub(r"\A#@title .*\n", "", mine) == yours


def test_no_myst_is_left(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^[> ]*(`{3,})[^`{]*\n.*?^[> ]*\1", "", cell.source, flags=re.DOTALL | re.MULTILINE)
            myst = r"(?<!`)\{[\w:-]+\}`|^ *[`:]{3,}\{|^\([\w-]+\)=|^\+\+\+|^% |\[\^"
            assert not re.search(myst, text, re.MULTILINE), text


def test_first_code_installs_in_colab_without_replacing_anything(notebook):
    assert notebook.cells[0].source.startswith("# ")
    install = notebook.cells[1]
    assert install.cell_type == "code"
    assert 'if "google.colab" in sys.modules:' in install.source
    pip = r'%pip install --quiet --no-deps "captum>=[\d.]+" "git\+https://github\.com/[\w./-]+"'
    assert re.search(pip, install.source)


def test_runs(notebook, tmp_path):
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import sys; sys.path.append({str(ROOT)!r})"))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()


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


def test_glue_prints_where_there_is_no_myst_nb(tmp_path, capsys):
    cell = '```{code-cell}\nfrom myst_nb import glue\nglue("end", 3)\n```\n'
    title, code = convert(tmp_path, f"{{glue:text}}`end`\n\n{cell}")
    assert title == "# Title\n\n`end`"
    exec(code, {})
    assert capsys.readouterr().out == "end = 3\n"


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
    ],
)
def test_what_no_notebook_can_show_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ChapterError, match=message):
        convert(tmp_path, text)
