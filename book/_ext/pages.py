"""Sphinx extension: the last touches to each page."""

import os
import re
from pathlib import Path

from docutils import nodes

from notebooks import colab_url, is_chapter

WORDS_A_MINUTE = 150  # of a text with formulas


def buttons_lead_to_notebooks(app, pagename, templatename, context, doctree):
    """The rocket opens notebooks/X.ipynb in Colab, with solutions and without; the download menu has the same files."""
    page, groups = Path(app.srcdir) / f"{pagename}.md", context.get("header_buttons", [])
    by_label = {group.get("label"): group for group in groups}
    chapter = page.exists() and is_chapter(page)
    if chapter:
        launch, repository = by_label["launch-buttons"], app.config.html_theme_options["repository_url"]
        launch["buttons"] = [
            launch["buttons"][0] | {"text": text, "url": colab_url(repository, page, folder)}
            for text, folder in (("Colab", "notebooks"), ("Exercises in Colab", "notebooks/exercises"))
        ]
    if "download-buttons" in by_label:
        menu = by_label["download-buttons"]
        pdf = [button for button in menu["buttons"] if button["label"] == "download-pdf-button"]
        files = (("Notebook", "notebooks"), ("Exercises", "notebooks/exercises")) if chapter else ()
        menu["buttons"] = [
            {
                "type": "link",
                "text": f"{text} (.ipynb)",
                "tooltip": f"Download {folder}/{page.stem}.ipynb",
                "url": context["pathto"](f"{folder}/{page.stem}.ipynb", 1),
                "icon": "fas fa-code",
                "label": "download-notebook-button",
            }
            for text, folder in files
        ] + pdf


def references_are_list_items(app, pagename, templatename, context, doctree):
    """Docutils puts entries with a role that ARIA has withdrawn into a list that allows only list items."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def minutes_in_front(app, pagename, templatename, context, doctree):
    """Below the title of a page with code: minutes to read, from its words, and the seconds that its code took."""
    seconds = (app.env.nb_metadata.get(pagename, {}).get("exec_data") or {}).get("runtime")
    if seconds is None or doctree is None:
        return
    paragraphs = (p.astext() for p in doctree.findall(nodes.paragraph))
    minutes = round(sum(len(text.split()) for text in paragraphs) / WORDS_A_MINUTE)
    line = f"About {minutes} minutes to read, without the exercises. "
    line += f"The code took {seconds:.0f} s on {os.cpu_count()} cores when this page was built."
    context["body"] = context["body"].replace("</h1>", f'</h1>\n<p class="minutes">{line}</p>', 1)


def plain_bars_and_stars(app, what, name, obj, options, lines):
    """In docstrings, outside ``code``, |R| is an absolute value and CLASS/* a pattern, not markup."""
    bar_or_star = re.compile(r"(``.*?``|^ *\* |\*\*)|([|*])")
    lines[:] = [bar_or_star.sub(lambda m: m[1] or "\\" + m[2], line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", plain_bars_and_stars, priority=400)  # before napoleon
    app.connect("html-page-context", buttons_lead_to_notebooks, priority=900)  # after the theme has made the buttons
    app.connect("html-page-context", references_are_list_items)
    app.connect("html-page-context", minutes_in_front)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
