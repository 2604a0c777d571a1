"""Turn the chapters book/NN_name.md into notebooks/NN_name.ipynb for Colab: python book/_ext/notebooks.py

Beside them notebooks/exercises/NN_name.ipynb, for workshops, has an empty cell in place of each solution.

A notebook knows nothing of MyST, so each directive and each role that a chapter uses is put into plain
Markdown here. One that is not known raises, with its file and line, instead of slipping through. What a build of
the book computes for the text stands in book/values.json, which `make book` writes.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import yaml
from pybtex.database import parse_file
from pybtex.richtext import Text

ROOT = Path(__file__).resolve().parents[2]
ADMONITIONS = {"admonition", "note", "tip", "hint", "important", "warning", "caution", "seealso"}

GLUE_IMPORT = "from myst_nb import glue\n"  # for the cells of the build, which stay in the book

FENCE = re.compile(r"^( *)(`{3,}|:{3,}) *(?:\{([\w:-]+)\})? *(.*)$")
INLINE = re.compile(
    r"""
    \$\$ (?P<math>.+?) \$\$ (?: [ ]* \( (?P<label>[\w:.-]+) \) )?
  | (?P<keep> \$[^$\n]+\$ | (?<!`)(?P<ticks>`+)(?!`) .+? (?<!`)(?P=ticks)(?!`) )
  | \{ (?P<role>[\w:-]+) \} (?P<roleticks>`+) (?P<content>.+?) (?P=roleticks)
  | \[\^ (?P<footnote>\w+) \] (?P<definition>:[ ]*)?
  | ^\( (?P<target>[\w-]+) \)= [ ]*\n
  | ^% [^\n]* \n?
  | \]\( (?P<url>[^)\s]*)
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


class ChapterError(ValueError):
    """What a chapter holds that no notebook can show."""


@dataclass
class Block:
    """A piece of a chapter: plain text (name None), or a directive with its options."""

    name: str | None
    line: int
    body: list[str]
    argument: str = ""
    options: dict = field(default_factory=dict)


def blocks(lines: list[str], line: int, path: Path) -> list[Block]:
    """Cut lines, the first of them number `line` of the file, into text and directives."""
    found, text, i = [], [], 0
    while i < len(lines):
        match = FENCE.match(lines[i])
        if not match:
            text.append(lines[i])
            i += 1
            continue
        indent, fence, name, argument = match.groups()
        closing = re.compile(rf"^ *{fence[0]}{{{len(fence)},}} *$")
        end = next((j for j in range(i + 1, len(lines)) if closing.match(lines[j])), None)
        if end is None:
            raise ChapterError(f"{path}:{line + i}: this fence is never closed")
        if name and indent:
            raise ChapterError(f"{path}:{line + i}: the directive {name!r} is indented; put it at the margin")
        if text:
            found.append(Block(None, line + i - len(text), text))
            text = []
        if name:
            options, skip = read_options(lines[i + 1 : end])
            found.append(Block(name, line + i, lines[i + 1 + skip : end], argument.strip(), options))
        else:
            found.append(Block("verbatim", line + i, lines[i : end + 1]))
        i = end + 1
    return found + ([Block(None, line + i - len(text), text)] if text else [])


def read_options(body: list[str]) -> tuple[dict, int]:
    """The options of a directive, as `:key: value` lines or between `---`, and how many lines they take."""
    if body and body[0] == "---":
        end = body.index("---", 1)
        return yaml.safe_load("\n".join(body[1:end])) or {}, end + 1
    count = next((i for i, line in enumerate(body) if not re.match(r"^:[\w-]+:", line)), len(body))
    pairs = (re.match(r"^:([\w-]+): *(.*)$", line).groups() for line in body[:count])
    return {key: yaml.safe_load(value) for key, value in pairs}, count + (body[count : count + 1] == [""])


class Chapter:
    """One chapter on its way into cells.

    `labels` maps every label of the book to what the text calls it; a first pass over all chapters (with
    `strict` off) fills it, a second one uses it. `values` are what the build computed for the text of this chapter.
    """

    def __init__(
        self,
        path: Path,
        labels: dict[str, str],
        bibliography: dict,
        repository: str,
        strict: bool,
        solved: bool = True,
        values: dict[str, str] | None = None,
    ):
        self.path, self.labels, self.bibliography, self.values = path, labels, bibliography, values or {}
        self.repository, self.strict, self.solved = repository, strict, solved
        self.number = int(path.name[:2])
        self.counts = {"equation": 0, "figure": 0, "exercise": 0}
        self.footnotes, self.cells, self.solution, self.line = {}, [], None, 1

    def error(self, message: str) -> ChapterError:
        return ChapterError(f"{self.path}:{self.line}: {message}")

    def check_options(self, block: Block, known: set[str]) -> None:
        for option in block.options.keys() - known:
            raise self.error(f"no notebook can show the option {option!r} of {block.name!r}")

    def next_number(self, kind: str) -> str:
        self.counts[kind] += 1
        return f"{self.number}.{self.counts[kind]}"

    def name(self, label: str | None, shown: str) -> None:
        if label:
            self.labels[label] = shown

    def look_up(self, label: str) -> str:
        if label not in self.labels and self.strict:
            raise self.error(f"nothing is labelled {label!r}")
        return self.labels.get(label, "")

    # -- cells ---------------------------------------------------------------------------------------------

    def convert(self) -> list[dict]:
        """The cells of the chapter, in order."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        start = lines.index("---", 1) + 1  # behind the header
        for block in blocks(lines[start:], start + 1, self.path):
            self.line = block.line
            if block.name == "solution-start":
                self.solution = self.solution_title(block)
                if not self.solved:
                    self.add_code(Block("code-cell", block.line, [f"# {self.solution}: yours"]))
            elif block.name == "solution-end":
                self.solution = None
            elif not self.solved and (self.solution or block.name == "solution"):
                continue
            elif block.name == "code-cell":
                self.add_code(block)
            else:
                text = self.markdown(block)
                self.add_text(folded(self.solution, text) if self.solution and text.strip() else text)
        if self.solution:
            raise self.error(f"{self.solution!r} is never ended")
        return [cell for cell in self.cells if cell["source"]]

    def add_text(self, text: str) -> None:
        """Add Markdown, in the running cell or, at a heading or behind code, in a new one."""
        for i, part in enumerate(re.split(r"^\+\+\+.*$|^(?=#{1,6} )", text, flags=re.MULTILINE)):
            part = part.strip("\n").rstrip()
            if i > 0 or not self.cells or self.cells[-1]["cell_type"] == "code":
                self.cells.append({"cell_type": "markdown", "source": part, "metadata": {}})
            else:
                self.cells[-1]["source"] = (self.cells[-1]["source"] + "\n\n" + part).strip("\n")

    def add_code(self, block: Block) -> None:
        """Add a code cell and, below it, the caption of its figure."""
        self.check_options(block, {"tags", "mystnb"})
        tags = block.options.get("tags") or []
        if "remove-cell" in tags:  # checks and values of the build, which a reader's edits would break
            return
        source = ("\n".join(block.body) + "\n").replace(GLUE_IMPORT, "").strip("\n")
        if re.search(r"\bmyst_nb\b|\bglue\(", source):
            raise self.error(f"glue belongs into a cell tagged remove-cell, {GLUE_IMPORT.strip()!r} on its own line")
        metadata = {"tags": tags} if tags else {}
        if self.solution and self.solved:  # folded, in Colab and in Jupyter
            source = f"#@title {self.solution}\n{source}"
            metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
        self.cells.append({"cell_type": "code", "source": source, "metadata": metadata})
        figure = block.options.get("mystnb", {}).get("figure", {})
        if "caption" in figure:
            name = f"Fig. {self.next_number('figure')}"
            self.name(figure.get("name"), name)
            self.add_text(f"*{name}:* {self.inline(figure['caption'].strip())}")

    # -- Markdown ------------------------------------------------------------------------------------------

    def text(self, lines: list[str], line: int) -> str:
        """Plain Markdown for lines that may hold directives."""
        parts = [self.markdown(block).strip("\n") for block in blocks(lines, line, self.path)]
        return "\n\n".join(part for part in parts if part)

    def markdown(self, block: Block) -> str:
        """Plain Markdown for one piece of a chapter."""
        self.line = block.line
        self.check_options(block, {"label", "class"})
        body = "\n".join(block.body).strip("\n")
        if block.name is None:
            return self.inline("\n".join(block.body))
        if block.name == "verbatim":
            return body
        if block.name == "math":
            return self.equation(body, block.options.get("label"))
        dropdown = "dropdown" in str(block.options.get("class", ""))
        if block.name == "exercise":
            title = self.exercise_title(block)
        elif block.name == "solution":
            title = self.solution_title(block)
        elif block.name in ADMONITIONS:
            title = block.name.capitalize() if block.name != "admonition" else self.inline(block.argument)
        else:
            raise self.error(f"no notebook can show the directive {block.name!r}")
        content = self.text(block.body, block.line + 1)
        if dropdown:
            return folded(title, content)
        return "\n".join(f"> {line}".rstrip() for line in f"**{title}**\n\n{content}".split("\n"))

    def exercise_title(self, block: Block) -> str:
        name = f"Exercise {self.next_number('exercise')}"
        self.name(block.options.get("label"), name)
        return f"{name} ({self.inline(block.argument)})" if block.argument else name

    def solution_title(self, block: Block) -> str:
        return f"Solution to {self.look_up(block.argument)}"

    def equation(self, body: str, label: str | None) -> str:
        if not label:
            return f"$$\n{body.strip()}\n$$"
        number = self.next_number("equation")
        self.name(label, f"({number})")
        return f"$$\n{body.strip()}\n\\tag{{{number}}}\n$$"

    def inline(self, text: str) -> str:
        """Plain Markdown for text without directives."""
        first = self.line

        def replace(match: re.Match) -> str:
            self.line = first + text.count("\n", 0, match.start())
            if match["math"]:
                return self.equation(match["math"], match["label"])
            if match["role"]:
                return self.role(match["role"], match["content"])
            if match["footnote"]:
                number = self.footnotes.setdefault(match["footnote"], len(self.footnotes) + 1)
                return f"<sup>{number}</sup>" + (" " if match["definition"] else "")
            if match["target"]:
                heading = re.match(r"\s*#+ (.*)", text[match.end() :])
                self.labels[match["target"]] = f"*{heading[1]}*" if heading else match["target"]
                return ""
            if match[0].startswith("%"):  # a comment
                return ""
            if match["url"] is not None and not re.match(r"https?://", match["url"]):
                raise self.error(f"the link {match['url']!r} leads nowhere in a notebook; use {{doc}} or {{ref}}")
            return match[0]

        text = INLINE.sub(replace, text)
        self.line = first
        return text

    # -- roles ---------------------------------------------------------------------------------------------

    def role(self, role: str, content: str) -> str:
        shown, label = re.fullmatch(r"(?:(.*?) *<)?(.*?)>?", content, re.DOTALL).groups()
        if role == "eq":
            return self.look_up(label)
        if role == "numref":
            return shown.replace("%s", self.look_up(label).rpartition(" ")[2]) if shown else self.look_up(label)
        if role == "ref":
            return shown or self.look_up(label)
        if role == "doc":
            return self.document_link(shown, label)
        if role == "term":
            return shown or label
        if role == "glue:text":
            if label not in self.values and self.strict:
                raise self.error(f"book/values.json has no {label!r}; `make book` writes it")
            return self.values.get(label, "")
        if role in ("cite:p", "cite", "cite:t"):
            entries = [self.citation(key.strip(), role == "cite:t") for key in content.split(",")]
            return ", ".join(entries) if role == "cite:t" else f"[{', '.join(entries)}]"
        raise self.error(f"no notebook can show the role {role!r}")

    def document_link(self, shown: str | None, name: str) -> str:
        """A link to another chapter's notebook in Colab, or to the page's source."""
        path = (self.path.parent / f"{name}.md").resolve()
        if not path.exists():
            raise self.error(f"there is no page {name!r}")
        shown = shown or re.search(r"^# (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)[1]
        if is_chapter(path):
            return f"[{shown}]({colab_url(self.repository, path)})"
        return f"[{shown}]({self.repository}/blob/main/book/{path.name})"

    def citation(self, key: str, textual: bool) -> str:
        """Author and year, with a link where the bibliography has one."""
        if key not in self.bibliography:
            raise self.error(f"the bibliography has no {key!r}")
        entry = self.bibliography[key]
        names = [str(Text.from_latex(" ".join(person.last_names))) for person in entry.persons["author"]]
        authors = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        year, fields = entry.fields["year"], entry.fields
        shown = f"{authors} ({year})" if textual else f"{authors}, {year}"
        if "doi" in fields:
            return f"[{shown}](https://doi.org/{fields['doi']})"
        return f"[{shown}](https://arxiv.org/abs/{fields['eprint']})" if "eprint" in fields else shown


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text.strip()}\n\n</details>"


def is_chapter(path: Path) -> bool:
    """Whether a page of the book is a chapter with code."""
    return bool(re.match(r"\d\d_", path.name)) and "{code-cell}" in path.read_text(encoding="utf-8")


def colab_url(repository: str, path: Path, folder: str = "notebooks") -> str:
    """Where Colab opens the notebook of a chapter."""
    name = repository.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{name}/blob/main/{folder}/{path.stem}.ipynb"


INSTALL = """\
# @title Set-up: run this cell first. Where everything is there, it installs nothing.
REPO = "{repository}"  # @param {{type: "string"}}

import importlib.util
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads do not spin; before torch is imported


def there(name):
    importlib.invalidate_caches()
    return importlib.util.find_spec(name) is not None


if "google.colab" in sys.modules:
    if not there("captum"):
        %pip install --quiet --no-deps "{captum}"
    if not there("zsu"):
        %pip install --quiet --no-deps "git+{{REPO}}"
if not there("zsu"):
    raise ModuleNotFoundError(
        f"zsu is not installed, and {{REPO}} did not give it. In Colab, put the address of your copy of the "
        "repository into REPO above and run this cell again. On your own machine, open the notebook with "
        ".venv/bin/jupyter lab, after `make book`."
    )"""


def install_cell(repository: str, project: str) -> str:
    """Code that installs in Colab what is missing there, and moves nothing that Colab has."""
    return INSTALL.format(repository=repository, captum=re.search(r'"(captum[^"]*)"', project)[1])


def notebook(path: Path, cells: list[dict], install: str) -> nbformat.NotebookNode:
    """The notebook: title, the cell that installs, and the rest, with ids that depend on content alone."""
    title, _, rest = cells[0]["source"].partition("\n")
    cells = [
        {"cell_type": "markdown", "source": title, "metadata": {}},
        {"cell_type": "code", "source": install, "metadata": {}},
        {**cells[0], "source": rest.strip()},
        *cells[1:],
    ]
    cells, seen = [cell for cell in cells if cell["source"]], {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell['cell_type']}\n{cell['source']}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
    metadata = {
        "colab": {"provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "zsu": f"Made from book/{path.name} by `make notebooks`; change that file, not this one.",
    }
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def notebooks(root: Path = ROOT, values: dict | None = None) -> dict[str, str]:
    """The notebooks of all chapters under root/book, and those without solutions, as file name -> text.

    With `values` by chapter and name, or those of book/values.json.
    """
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    install = install_cell(repository, (root / "pyproject.toml").read_text(encoding="utf-8"))
    bibliography = parse_file(str(root / "book" / "references.bib")).entries
    if values is None:
        values = json.loads((root / "book" / "values.json").read_text(encoding="utf-8"))
    paths = [path for path in sorted((root / "book").glob("*.md")) if is_chapter(path)]
    labels = {}
    for path in paths:
        Chapter(path, labels, bibliography, repository, strict=False).convert()
    made = {}
    for path in paths:
        for solved, name in ((True, f"{path.stem}.ipynb"), (False, f"exercises/{path.stem}.ipynb")):
            chapter = Chapter(path, dict(labels), bibliography, repository, True, solved, values.get(path.stem))
            cells = chapter.convert()
            made[name] = nbformat.writes(notebook(path, cells, install)) + "\n"
    return made


def main() -> int:
    folder = ROOT / "notebooks"
    (folder / "exercises").mkdir(parents=True, exist_ok=True)
    made = notebooks()
    for old in folder.rglob("*.ipynb"):
        if str(old.relative_to(folder)) not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(made)} notebooks to notebooks/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
