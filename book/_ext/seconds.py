"""Sphinx extension: write the seconds of each chapter's code to _build/seconds.txt, and fail above the limits."""

from pathlib import Path

from sphinx.errors import ExtensionError

CHAPTER, BOOK = 60, 360  # seconds


def write_seconds(app, exception):
    if exception or app.builder.format != "html":
        return
    runtimes = {
        doc: data["exec_data"]["runtime"]
        for doc, data in app.env.nb_metadata.items()
        if data.get("exec_data")
    }
    lines = [f"{seconds:7.1f} s  {doc}" for doc, seconds in sorted(runtimes.items())]
    lines.append(f"{sum(runtimes.values()):7.1f} s  all chapters")
    Path(app.outdir).with_name("seconds.txt").write_text("\n".join(lines) + "\n")
    slow = [doc for doc, seconds in runtimes.items() if seconds > CHAPTER]
    total = sum(runtimes.values())
    if slow or total > BOOK:
        raise ExtensionError(f"over {CHAPTER} s: {', '.join(slow) or 'no chapter'}; all: {total:.0f} s of {BOOK}")


def setup(app):
    app.connect("build-finished", write_seconds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
