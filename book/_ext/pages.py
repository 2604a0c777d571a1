"""Sphinx extension: the last touches to each page."""


def colab_opens_notebook(app, pagename, templatename, context, doctree):
    """The Colab button of book/X.md opens notebooks/X.ipynb."""
    notebook = f"notebooks/{pagename.rpartition('/')[2]}.ipynb"
    for group in context.get("header_buttons", []):
        if group.get("label") == "launch-buttons":
            for button in group["buttons"]:
                button["url"] = button["url"].replace(f"{pagename}.md", notebook)


def references_are_list_items(app, pagename, templatename, context, doctree):
    """Docutils puts entries with a role that ARIA has withdrawn into a list that allows only list items."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.connect("html-page-context", colab_opens_notebook, priority=900)  # after the theme has made the buttons
    app.connect("html-page-context", references_are_list_items)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
