"""What every chapter has: read from the sources, so that no built site is needed."""

import re
from pathlib import Path
from types import SimpleNamespace

import jupytext
import pytest
import yaml

import seconds
import zsu

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))
PAGES = sorted((ROOT / "book").glob("*.md"))
COLUMNS = 84  # of code, that a page shows beside its sidebars
INTERACTIVE = {
    "03_rules_and_composites": "relevance_explorer",
    "04_paths": "path_explorer",
    "05_perturbing_paths": "budget_explorer",
    "07_privacy": "band_explorer",
}


def cells(path, kind):
    return [cell.source for cell in jupytext.read(path, fmt="md:myst").cells if cell.cell_type == kind]


def prose(path):
    """Words of the text: without code, captions, directives' lines and targets."""
    text = re.sub(r"^(`{3,}|:{3,}|:\w+:).*$", "", "\n".join(cells(path, "markdown")), flags=re.MULTILINE)
    return re.findall(r"[^\W_][\w'’-]*", re.sub(r"\{[\w:-]+\}`[^`]*`|\$\$?[^$]*\$\$?", " x ", text))


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    return request.param


def test_ten_chapters_and_all_pages_are_in_the_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"]] + [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    assert len(CHAPTERS) == 10
    assert sorted(listed) == [f"book/{path.stem}" for path in PAGES]
    assert [f for f in listed if re.match(r"book/\d", f)] == [f"book/{path.stem}" for path in CHAPTERS]


def test_length(chapter):
    assert 1200 <= len(prose(chapter)) <= 3000


def test_length_of_the_welcome():
    assert 1000 <= len(prose(ROOT / "book" / "intro.md")) <= 3000


def test_objectives_prerequisites_prediction_and_end(chapter):
    text = chapter.read_text(encoding="utf-8")
    front = re.search(r":::\{admonition\} In this chapter\n:class: tip\n(.*?)\n:::", text, re.DOTALL)[1]
    assert front.startswith("**You will** ")
    assert "\n**You need** " in front
    assert text.count(":::{admonition} Predict\n:class: hint\n") >= 1
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[-1] == "What you can now do"


def test_first_cell_is_a_check_point(chapter):
    assert "# Check-point" in "".join(cells(chapter, "code")[: 4 if chapter.stem.startswith("10") else 1])


def test_two_exercises_with_solutions_that_are_run_and_asserted(chapter):
    text = chapter.read_text(encoding="utf-8")
    exercises = re.findall(r"^```\{exercise\}.*\n:label: (.*)$", text, re.MULTILINE)
    solutions = re.findall(
        r"^```\{solution-start\} ([\w-]+)\n:class: dropdown\n```\n(.*?)^```\{solution-end\}", text, re.M | re.S
    )
    assert len(exercises) == 2
    assert [label for label, _ in solutions] == exercises
    for label, body in solutions:
        code = "\n".join(re.findall(r"^```\{code-cell\}.*?\n(.*?)^```$", body, re.M | re.S))
        assert re.search(r"^ *assert ", code, re.MULTILINE), label


def test_the_numbers_in_the_text_are_computed_and_asserted(chapter):
    text, code = chapter.read_text(encoding="utf-8"), "\n".join(cells(chapter, "code"))
    used = set(re.findall(r"\{glue:text\}`([^`]*)`", text))
    glued = re.findall(r'glue\(f?"([^"]*)"', code)
    patterns = [re.sub(r"\\\{.*?\\\}", ".+", re.escape(name)) for name in glued]
    for name in used:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), f"{name} is not computed"
    if not chapter.stem.startswith("10"):
        assert used
    assert len(re.findall(r"^ *assert ", code, re.MULTILINE)) >= 5


def code_lines(text):
    """The lines of all fences of a page that hold code, whatever its language, also inside of directives."""
    opened = []  # (fence, what stands behind it)
    for line in re.sub(r"^---\n.*?^---$", "", text, flags=re.MULTILINE | re.DOTALL).split("\n"):
        fence = re.match(r" *(`{3,}|~{3,}) *(.*?) *$", line)
        in_code = opened and not re.match(r"\{(?!code)", opened[-1][1])
        if fence and opened and not fence[2] and fence[1].startswith(opened[-1][0]):
            opened.pop()
        elif in_code:
            yield line
        elif fence:
            opened.append((fence[1], fence[2]))
    assert not opened


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_is_as_narrow_as_its_column(page):
    lines = list(code_lines(page.read_text(encoding="utf-8")))
    assert [line for line in lines if len(line) > COLUMNS] == []


def test_all_code_of_a_page_is_looked_at():
    page = "---\na: b\n---\n````{exercise}\n```python\n1\n```\n````\nno\n```{code-cell} i\n---\na: b\n---\n2\n```\n"
    page += "- no\n\n  ```\n  3\n  ```\n```{note}\nno\n```\n~~~text\n4\n~~~ \n"
    assert [line.strip() for line in code_lines(page) if line] == list("1234")


def test_every_figure_of_a_cell_has_alt_text(chapter):
    text = chapter.read_text(encoding="utf-8")
    for block in re.findall(r"^```\{code-cell\}.*?\n(.*?)^```$", text, re.M | re.S):
        if re.search(r"^plots\.\w+\(.*;$", block, re.MULTILINE):
            options = yaml.safe_load(re.match(r"---\n(.*?)\n---", block, re.DOTALL)[1])["mystnb"]
            assert len(options["image"]["alt"].split()) >= 10
            assert options["figure"]["caption"].strip()


@pytest.mark.parametrize(("stem", "widget"), INTERACTIVE.items())
def test_interactive(stem, widget):
    assert f"widgets.{widget}(" in (ROOT / "book" / f"{stem}.md").read_text(encoding="utf-8")


def test_errors_on_purpose():
    """A wrong class name and a model in train mode meet the kernel's error, once each."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in CHAPTERS)
    assert text.count(":::{admonition} It should fail\n") == 2
    assert '"Trousers"' in text
    assert ".train(), x, f)" in text


def test_every_source_is_cited_and_every_citation_is_there():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    cited = {key.strip() for keys in re.findall(r"\{cite:[pt]\}`([^`]*)`", text) for key in keys.split(",")}
    listed = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.M))
    assert cited == listed


def test_the_reference_has_all_public_names():
    text = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    for name in zsu.__all__:
        assert re.search(rf"^\.\. auto\w+:: zsu\.{name}$", text, re.MULTILINE), name


def test_no_absolute_path_of_a_machine_is_in_the_book():
    for path in PAGES:
        assert not re.search(r"/(home|root|work|Users)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    ("runtimes", "pace", "message"),
    [
        ({"a": 59.0, "b": 1.0}, 0.5, None),
        ({"a": 61.0}, 0.5, "over 60 s: a;"),
        (dict.fromkeys("abcdefg", 55.0), 1.0, "385 s of 360"),
        (dict.fromkeys("abcdefg", 80.0), 2.0, None),
        ({"a": 121.0, "b": 1.0}, 2.0, "over 60 s: a;.* 2.0 times"),
    ],
)
def test_the_build_fails_where_a_chapter_or_the_book_takes_too_long(runtimes, pace, message, tmp_path, monkeypatch):
    """On a machine as fast as that of the bundled models, and in proportion on a slower one."""
    monkeypatch.setattr(seconds, "pace", lambda: pace)
    metadata = {doc: {"exec_data": {"runtime": taken}} for doc, taken in runtimes.items()} | {"plain": {}}
    app = SimpleNamespace(
        builder=SimpleNamespace(format="html"), env=SimpleNamespace(nb_metadata=metadata), outdir=tmp_path / "html"
    )
    seconds.pace_before(app, None, [])
    if message is None:
        seconds.write_seconds(app, None)
    else:
        with pytest.raises(seconds.ExtensionError, match=message):
            seconds.write_seconds(app, None)
    assert f"{runtimes['a']:7.1f} s  a\n" in (tmp_path / "seconds.txt").read_text()
