"""Sphinx extension: write the seconds that each chapter's code took to _build/seconds.txt."""

from pathlib import Path


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


def setup(app):
    app.connect("build-finished", write_seconds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
