"""Sphinx extension: what the build computed for the text goes into book/values.json, and the notebooks into the site.

`make notebooks` fills the values of that file into the notebooks, so that it needs no built site.
"""

import ast
import json
import re
from pathlib import Path

from sphinx.errors import ExtensionError

from notebooks import notebooks


def shown_values(page: Path, glued: dict) -> dict[str, str]:
    """The values that a page asks for, by name, as it shows them."""
    asked = set(re.findall(r"\{glue:text\}`([^`]*)`", page.read_text(encoding="utf-8")))
    if not asked <= glued.keys():
        raise ExtensionError(f"{page.name}: no cell has computed {', '.join(sorted(asked - glued.keys()))}")
    return {name: ast.literal_eval(glued[name]["data"]["text/plain"]) for name in asked}  # repr of a str


def write_values(app, exception):
    if exception or app.builder.format != "html":
        return
    book, site = Path(app.srcdir) / "book", Path(app.outdir)
    values = {}
    for file in sorted((site.parent / "jupyter_execute" / "book").glob("*.glue.json")):
        stem = file.name.removesuffix(".glue.json")
        values[stem] = shown_values(book / f"{stem}.md", json.loads(file.read_text(encoding="utf-8")))
    text = json.dumps(values, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (book / "values.json").write_text(text, encoding="utf-8")
    (site / "notebooks" / "exercises").mkdir(parents=True, exist_ok=True)
    for name, notebook in notebooks(Path(app.srcdir)).items():
        (site / "notebooks" / name).write_text(notebook, encoding="utf-8")


def setup(app):
    app.connect("build-finished", write_values)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
