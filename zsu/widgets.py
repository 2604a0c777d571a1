"""Sliders that work with a kernel, in Colab, and on a page that has none."""

import base64
import html
from collections.abc import Mapping, Sequence

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import plots
from .errors import ZsuError
from .evaluation import Report
from .paths.graph import build_graph
from .paths.search import find_paths
from .relevance import explain_contrast, explain_each
from .relevance.composites import Rules

SMALL = {"dpi": 72, "bbox_inches": "tight"}  # pictures, of which a page holds many
# With the slider the bar of tabs says nothing new. (p- is what ipywidgets 7 calls it, lm- what 8 does.)
HIDE_TABS = "<style>.zsu-frames > .p-TabBar, .zsu-frames > .lm-TabBar { display: none !important }</style>"


def slider(frames: Sequence[tuple[str, Figure | bytes | ipywidgets.Widget, str]], description: str) -> ipywidgets.VBox:
    """Show one of several pictures, picked by a slider.

    Parameters
    ----------
    frames : list of (label, picture, alt)
        `label` is what the slider reads, `picture` a matplotlib figure, the bytes of a PNG file or another
        widget, such as a slider, and `alt` says in words what the picture shows. Figures are closed, so that a
        notebook does not show them a second time.
    description : str
        The name of the slider.

    Returns
    -------
    ipywidgets.VBox
        The slider above the picture. All pictures are in it, and the browser alone moves the slider.

    Raises
    ------
    ZsuError
        Without frames, or for a frame without alt text.
    """
    if not frames:
        raise ZsuError("no frames", where="slider", remedy="Give at least one (label, picture, alt text)")
    for label, _, alt in frames:
        if not alt.strip():
            raise ZsuError(f"the frame {label!r} has no alt text", where="slider", remedy="Describe the picture")
    choice = ipywidgets.SelectionSlider(options=[(label, i) for i, (label, _, _) in enumerate(frames)])
    choice.description = description
    pictures = ipywidgets.Tab(
        [p if isinstance(p, ipywidgets.Widget) else ipywidgets.HTML(image_tag(p, alt)) for _, p, alt in frames]
    )
    pictures.add_class("zsu-frames")
    for i, (label, _, _) in enumerate(frames):
        pictures.set_title(i, label)
    pictures.selected_index = 0
    ipywidgets.jslink((choice, "index"), (pictures, "selected_index"))
    return ipywidgets.VBox([ipywidgets.HTML(HIDE_TABS), choice, pictures])


def relevance_explorer(
    model: nn.Module, x: Tensor, names: Sequence[str], rules: Mapping[str, Rules], classes: Sequence[int]
) -> ipywidgets.VBox:
    """Heat maps of one image: one slider for the rule, one for the class that is asked about.

    Parameters
    ----------
    model : nn.Module
    x : Tensor (1, C, H, W)
        The image.
    names : sequence of str
        Of all classes.
    rules : mapping of str to rules
        What `zsu.explain` takes as rules, by the name to show.
    classes : sequence of int
        Whose logits to explain.

    Raises
    ------
    ZsuError
        Not one image, or too few names; and what `explain` refuses.
    """
    if len(x) != 1 or len(names) <= max(classes, default=0):
        what = f"{len(x)} images, and {len(names)} names for classes {list(classes)}"
        remedy = "pass one image (1, C, H, W), and the names of all classes"
        raise ZsuError(what, where="relevance_explorer", remedy=remedy)
    outer = []
    for label, rule in rules.items():
        frames = []
        for c, heat in zip(classes, explain_each(model, x, list(classes), rule, edges=False), strict=True):
            logit, total, size = float(heat.logits[0, c]), float(heat.input.sum()), float(heat.input.abs().sum())
            figure = plots.heatmaps(x, heat)
            figure.set_size_inches(2.6, 4)
            alt = f"Heat map by the rule {label} for the class {names[c]}, whose logit is {logit:.1f}: "
            alt += f"relevance adds up to {total:.1f}, its size to {size:.1f}."
            frames.append((names[c], plots.png(figure, **SMALL), alt))
        outer.append((label, slider(frames, "class"), f"heat maps by the rule {label}"))
    return slider(outer, "rule")


def budget_explorer(frame: pd.DataFrame, what: str) -> ipywidgets.VBox:
    """Accuracies and divergence against the budget of an edit, by a slider for the budget.

    Parameters
    ----------
    frame : DataFrame
        As `zsu.plots.budget` takes it.
    what : str
        What a budget counts, for the alt text.
    """
    frames = []
    for budget, row in frame.iterrows():
        divergence, null = ("n/a" if pd.isna(v) else f"{v:.3f}" for v in (row["js_forget"], row["null"]))
        alt = f"With {budget} {what}, At is {100 * row['at_test']:.1f} %, Ag {100 * row['ag_test']:.1f} %, and the "
        alt += f"divergence from retrained models {divergence} nats, of the null {null}."
        frames.append((f"{budget}", plots.png(plots.budget(frame, budget), **SMALL), alt))
    return slider(frames, "budget")


def band_explorer(report: Report) -> ipywidgets.VBox:
    """Each number of an audit that has a null band, one picture a number, by a slider for the number.

    Raises
    ------
    ZsuError
        No number has a band.
    """
    frames, tidy = [], report.tidy()
    for column in report.measure_of:
        low, high = report.null.loc[column, ["low", "high"]]
        if not low < high:  # no band
            continue
        states = {model: report.inside(model, column) for model in report.frame.index}
        inside, outside = ([m for m, state in states.items() if state is wanted] for wanted in (True, False))
        alt = f"{column}: the null band is {low:.3g} to {high:.3g}. Inside: {', '.join(inside) or 'none'}. "
        alt += f"Outside: {', '.join(outside) or 'none'}."
        frames.append((column, plots.png(plots.band(tidy, column), **SMALL), alt))
    if not frames:
        remedy = "audit with at least two references, three for measures that compare pairs"
        raise ZsuError("no number of this audit has a band", where="band_explorer", remedy=remedy)
    return slider(frames, "number")


def path_explorer(
    model: nn.Module, samples: Mapping[int, Tensor], names: Sequence[str], numbers: Sequence[int] = (30, 1000)
) -> ipywidgets.VBox:
    """Walk the paths of each class: one slider for the class, one for how many paths, of all of its flow or of what
    goes beyond the runner-up's. All pictures are made at once, by the z+ rule from a relevance of 1 at the logits.

    Parameters
    ----------
    model : nn.Module
    samples : mapping of int to Tensor (N, C, H, W)
        Of each class to show, by its index.
    names : sequence of str
        Of all classes.
    numbers : sequence of int
        How many paths to show.
    """
    classes = []
    for c, x in samples.items():
        name, (whole, runner_up) = names[c], map(build_graph, explain_contrast(model, x, c))
        frames = []
        for label, against in (("", None), (", contrast", runner_up)):
            for k in numbers:
                found = find_paths(whole, k, against=against)
                layers = ", ".join(f"{layer} {channel}" for layer, channel in found[0])
                alt = f"The {len(found):,} most probable paths of {name}{label}: {100 * found.share[-1]:.3g} % of the "
                alt += f"flow. The first leads from {layers}."
                figure = plots.paths(found, k)
                figure.set_size_inches(7, 3.5)
                figure.axes[0].set_title(
                    f"{name}{label}: {len(found):,} paths, {100 * found.share[-1]:.3g} %", parse_math=False
                )
                frames.append((f"{k:,}{label}", plots.png(figure, **SMALL), alt))
        classes.append((name, slider(frames, "paths"), f"paths of {name}"))
    return slider(classes, "class")


def image_tag(picture: Figure | bytes, alt: str) -> str:
    """The picture as an <img> that holds its own data."""
    picture = plots.png(picture, bbox_inches="tight") if isinstance(picture, Figure) else picture
    data = base64.b64encode(picture).decode("ascii")
    return f'<img alt="{html.escape(alt)}" style="max-width: 100%" src="data:image/png;base64,{data}">'
