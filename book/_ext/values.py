"""Sphinx extension: what the build computed for the text goes into book/values.json, and the notebooks into the site.

`make notebooks` fills the values of that file into the notebooks, so that it needs no built site.
"""

import ast
import json
import re
from pathlib import Path

from sphinx.errors import ExtensionError

from notebooks import notebooks
from zsu.files import write_atomically

MARKUP = re.compile(r"[$*`|<>\[\]\\]")  # would be read as such in a notebook, and not on a page


def shown_values(page: Path, glue_file: Path) -> dict[str, str]:
    """The values that a page asks for, by name, as it shows them."""
    asked = sorted(set(re.findall(r"\{glue:text\}`([^`]*)`", page.read_text(encoding="utf-8"))))
    glued = json.loads(glue_file.read_text(encoding="utf-8")) if glue_file.exists() else {}
    values = {name: glued.get(name, {"data": {}})["data"].get("text/plain", "") for name in asked}
    for name, text in values.items():
        if not re.fullmatch(r"'.+'|\".+\"", text) or MARKUP.search(text):
            raise ExtensionError(f"{page.name}: the value {name!r} is {text or 'missing'}; glue a str without markup")
    return {name: ast.literal_eval(text) for name, text in values.items()}  # the repr of a str


def write_values(app, exception):
    if exception or app.builder.format != "html":
        return
    root, site = Path(app.srcdir), Path(app.outdir)
    executed = site.parent / "jupyter_execute" / "book"
    pages = [page for page in (root / "book").glob("*.md") if "{glue:text}" in page.read_text(encoding="utf-8")]
    values = {page.stem: shown_values(page, executed / f"{page.stem}.glue.json") for page in pages}
    made = notebooks(root, values)
    text = json.dumps(values, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(root / "book" / "values.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    (site / "notebooks" / "exercises").mkdir(parents=True, exist_ok=True)
    for name, notebook in made.items():
        (site / "notebooks" / name).write_text(notebook, encoding="utf-8")


def setup(app):
    app.connect("build-finished", write_values)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
