"""Sphinx extension: write the seconds of each chapter's code to _build/seconds.txt, and fail above the limits.

The limits are for two quiet cores like those that trained the bundled models. A machine that is slower, or busy, has
more time in proportion: before and after the chapters it trains the same network for an epoch, and the shorter counts.
"""

import time
from pathlib import Path

from sphinx.errors import ExtensionError

from zsu import data, models, training

CHAPTER, BOOK = 60, 360  # seconds


def pace() -> float:
    """How many times as long as that machine this one takes for an epoch of training."""
    about = models.metadata(models.bundled_path())
    images = data.load("fashion-mini").train
    begin = time.perf_counter()
    training.train(models.SmallCNN, images, epochs=1, progress=False)
    return (time.perf_counter() - begin) * about["epochs"] / about["seconds"]


def pace_before(app, env, docnames):
    app.pace_before = pace()


def write_seconds(app, exception):
    if exception or app.builder.format != "html":
        return
    runtimes = {
        doc: about["exec_data"]["runtime"] for doc, about in app.env.nb_metadata.items() if about.get("exec_data")
    }
    slower = max(1.0, min(app.pace_before, pace()))
    lines = [f"{seconds:7.1f} s  {doc}" for doc, seconds in sorted(runtimes.items())]
    lines.append(f"{sum(runtimes.values()):7.1f} s  all chapters")
    lines.append(f"{slower:7.1f} times the seconds of the machine that the limits are for")
    Path(app.outdir).with_name("seconds.txt").write_text("\n".join(lines) + "\n")
    slow = [doc for doc, seconds in runtimes.items() if seconds > CHAPTER * slower]
    total = sum(runtimes.values())
    if slow or total > BOOK * slower:
        what = f"over {CHAPTER} s: {', '.join(slow) or 'no chapter'}; all: {total:.0f} s of {BOOK}"
        raise ExtensionError(f"{what}, on a machine that takes {slower:.1f} times the seconds")


def setup(app):
    app.connect("env-before-read-docs", pace_before)
    app.connect("build-finished", write_seconds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
