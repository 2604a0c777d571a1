"""Figures: images with their heat maps, the share of the top paths, what a class turned into.

Each function draws into axes that it makes, or is given, and returns the figure; showing it is up to the caller.
"""

import io
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import check_frame, check_type, draw_heat, draw_image, drawable, grid, name_rows, readable, title_texts
from .errors import ZsuError, check_count
from .paths.graph import PathGraph, build_graph
from .paths.search import Paths
from .relevance import Relevance

ORANGE, BLUE, GREY = "#b34700", "#20639b", "#767676"  # also told apart without colour vision


def images(x: Tensor, titles: list[str] | None = None) -> Figure:
    """Images side by side, at most 10 in a row.

    Parameters
    ----------
    x : Tensor (N, C, H, W)
        Images in [0, 1], C 1 or 3.
    titles : list of str, optional
        One for each image.

    Raises
    ------
    ZsuError
        No images, images of another shape, or another number of titles.
    """
    shown, names = drawable(x, "images"), title_texts(titles, x, "images")
    if x.ndim != 4:
        raise ZsuError(f"images of shape {tuple(x.shape)}", where="images", remedy="pass (N, 1 or 3, H, W)")
    figure, axes = grid(-(-len(x) // 10), min(10, len(x)), 1.35, 1.1)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, name in zip(axes.flat, shown, names, strict=False):
        draw_image(axis, image)
        axis.set_title(name, fontsize="small", parse_math=False)
    return figure


def heatmaps(x: Tensor, relevance: Relevance | Tensor, titles: list[str] | None = None) -> Figure:
    """Images above their input relevance, each map on its own symmetric scale.

    Parameters
    ----------
    x : Tensor (N, C, H, W) or (N, C, L)
        Images in [0, 1], C 1 or 3, or series; up to a dozen are readable.
    relevance : Relevance or Tensor, as x
        Of the same samples; a tensor such as one of the maps of `zsu.explain_paths`.
    titles : list of str, optional
        One for each image.

    Raises
    ------
    ZsuError
        No images or series, relevance of others or not finite, another number of titles.
    """
    shown, names = drawable(x, "heatmaps"), title_texts(titles, x, "heatmaps")
    maps = drawable(relevance.input if isinstance(relevance, Relevance) else relevance, "heatmaps", any_channels=True)
    if len(shown) != len(maps):
        raise ZsuError(f"{len(shown)} images, relevance of {len(maps)}", where="heatmaps", remedy="pass the same")
    figure, axes = grid(2, len(shown), 1.65, 1.5)
    for (top, bottom), image, heat, name in zip(axes.T, shown, maps, names, strict=True):
        draw_image(top, image)
        draw_heat(bottom, heat)
        top.set_title(name, fontsize="medium", parse_math=False)
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("relevance")
    return figure


def comparison(x: Tensor, maps: dict[str, Tensor]) -> Figure:
    """An image above its attributions by several methods, each on its own symmetric scale.

    Parameters
    ----------
    x : Tensor (1, C, H, W) or (1, C, L)
        One image in [0, 1], or one series.
    maps : dict of str to Tensor, as x
        From `zsu.compare`; of maps of several samples the first is drawn.

    Raises
    ------
    ZsuError
        Not one image, no maps, or maps that are none.
    """
    check_type(maps, Mapping, "comparison", "what zsu.compare returns")
    shown = {"image": drawable(x, "comparison")}
    shown |= {name: drawable(heat, "comparison", any_channels=True) for name, heat in maps.items()}
    if len(x) != 1:
        raise ZsuError(f"{len(x)} images", where="comparison", remedy="pass one, such as x[:1], and maps of it")
    figure, axes = grid(1, len(shown), 2.5, 2.1)
    for axis, (name, t) in zip(axes[0], shown.items(), strict=True):
        (draw_image if t is shown["image"] else draw_heat)(axis, t[0])
        axis.set_title(name, fontsize="medium", parse_math=False)
    return figure


def ledger(relevance: Relevance) -> Figure:
    """Where relevance stays on its way from the logit (top) to the input, and where it is amplified.

    Left: what each layer keeps, in % of the logits' relevance. Right: sum |R| over its outputs, in units of theirs.
    """
    check_type(relevance, Relevance, "ledger", "what zsu.explain returns")
    frame, whole = relevance.ledger.iloc[:-1].set_index("layer"), float(relevance.seed.sum())
    if whole == 0:
        raise ZsuError("the logits' relevance adds up to 0", where="ledger", remedy="explain one class")
    height = 0.3 * len(frame) + 1.2
    figure, (kept, amplified) = plt.subplots(1, 2, figsize=(8, height), sharey=True, layout="constrained")
    rows = np.arange(len(frame))
    percent = 100 * frame[["bias", "stabiliser", "constant"]] / whole
    percent = percent.loc[:, percent.abs().max() > 0.05]  # what would be seen
    for i, share in enumerate(percent):
        colour = {"bias": BLUE, "stabiliser": ORANGE, "constant": GREY}[share]
        kept.barh(rows + 0.27 * (i - (percent.shape[1] - 1) / 2), percent[share], 0.27, color=colour, label=share)
    kept.set(xlabel="kept (% of the logits' relevance)")
    name_rows(kept, frame.index)
    if len(percent.columns):
        kept.legend(frameon=False)
    amplified.scatter(frame["amplification"], rows, color=BLUE)
    wide = frame["amplification"].max() > 10
    amplified.set(xlabel="amplification: sum |R|", xscale="log" if wide else "linear", xlim=None if wide else (0, None))
    amplified.grid(axis="x", alpha=0.4)
    kept.invert_yaxis()
    sns.despine(figure)
    return figure


def paths(found: Paths, show: int = 1000) -> Figure:
    """The most probable paths, layer by layer from the input (left) to the logit (right).

    A dot is a channel, placed by its number: grey, or orange where a path leads through it. The thickness and darkness
    of a line grow with the probability of the paths along it.
    """
    check_type(found, Paths, "paths", "what zsu.find_paths returns")
    check_count("show", show, "paths")
    count = min(show, len(found))
    sizes = np.diff(found.first)
    deep = len(sizes) > 12
    figure, axis = plt.subplots(figsize=(np.clip(0.22 * len(sizes), 8, 14), 6 if deep else 4), layout="constrained")
    walks = found.nodes[:count].astype(np.int64)
    ends = np.stack([walks[:, :-1], walks[:, 1:]], 2)  # (paths, steps, 2)
    along = np.broadcast_to(found.probability[:count, None], ends.shape[:2])[ends[:, :, 1] >= 0]
    lines, line = np.unique(ends[ends[:, :, 1] >= 0], axis=0, return_inverse=True)
    strength = np.bincount(line.ravel(), along) / np.bincount(line.ravel(), along).max()
    number = np.searchsorted(found.first, lines, side="right") - 1
    height = (lines - found.first[number] + 0.5) / sizes[number]
    order = np.argsort(strength)
    segments = np.stack([number, height], 2)[order]  # (lines, ends, x and y)
    width, alpha = 0.4 + 5 * strength[order], 0.12 + 0.8 * strength[order]
    axis.add_collection(LineCollection(list(segments), colors=ORANGE, linewidths=width, alpha=alpha, zorder=2))
    for layer, size in enumerate(sizes):
        axis.scatter(np.full(size, layer), (np.arange(size) + 0.5) / size, s=6, color="#c9c9c9", zorder=1)
    axis.scatter(number, height, s=6, color=ORANGE, zorder=3)
    labels = [f"{name} ({n})" if deep else f"{name}\n{n}" for name, n in zip(found.layers, sizes, strict=True)]
    every = -(-len(sizes) // 60)  # of very deep models not all labels
    style = {"rotation": 90, "fontsize": "x-small"} if deep else {}
    axis.set_xticks(range(0, len(sizes), every), labels[::every], parse_math=False, **style)
    axis.set(xlabel="layer, and its number of channels", ylabel="channel", yticks=[], ylim=(0, 1))
    share = 100 * found.share[count - 1]
    axis.set_title(f"The {count:,} most probable paths carry {share:.3g} % of the positive relevance")
    sns.despine(ax=axis, left=True)
    return figure


def walked(graph: PathGraph | Relevance) -> Figure:
    """By layer, from the logit (top) to the input: what paths walk, and what they leave, in % of |relevance|."""
    graph = build_graph(graph) if isinstance(graph, Relevance) else graph
    check_type(graph, PathGraph, "walked", "a graph, or what zsu.explain returns")
    frame = graph.ledger.set_index("layer")
    colours = {"walked": BLUE, "dead end": "#c9c9c9", "kept": GREY, "negative": ORANGE}
    percent = 100 * frame.div(frame.abs().sum(axis=1), axis=0)[list(colours)]
    figure, axis = plt.subplots(figsize=(6, 0.3 * len(frame) + 1.4), layout="constrained")
    percent.plot.barh(stacked=True, color=colours, width=0.8, legend=False, ax=axis)
    axis.set(xlabel="share of the layer's |relevance| (%)", ylabel="layer")
    name_rows(axis, frame.index)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    sns.despine(ax=axis)
    return figure


def activating(x: Tensor, activation: Tensor, path: list[tuple[str, int]], top: int = 8) -> Figure:
    """For each channel of a path, from the logit (top) to the input, the images that activate it most.

    Parameters
    ----------
    x : Tensor (N, C, H, W) or (N, C, L)
        Images in [0, 1], C 1 or 3, or series.
    activation : Tensor (N, channels of the path)
        From `zsu.relevance.activations` for the same images and path.
    path : list of (layer, channel)
    top : int
        How many images a channel.

    Raises
    ------
    ZsuError
        Activations of other images or channels.
    """
    shown = drawable(x, "activating")
    check_count("top", top, "activating")
    check_type(activation, Tensor, "activating", "what zsu.relevance.activations returns")
    if not path or activation.shape != (len(x), len(path)):
        what = f"activations {tuple(activation.shape)} of {len(x)} images and {len(path)} channels"
        raise ZsuError(what, where="activating", remedy="pass those of the same images and path")
    figure, axes = grid(len(path), top, 0.8, 0.8 + 1 / top)
    for row, (layer, channel) in enumerate(path):
        for axis, n in zip(axes[row], activation[:, row].argsort(descending=True).tolist(), strict=False):
            draw_image(axis, shown[n])
        axes[row, 0].set_ylabel(f"{layer}\n{channel}", rotation=0, ha="right", va="center", parse_math=False)
    return figure


def coverage(found: Paths) -> Figure:
    """Share of the positive relevance that the first k paths carry, against k."""
    check_type(found, Paths, "coverage", "what zsu.find_paths returns")
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    sns.lineplot(x=np.arange(1, len(found) + 1), y=100 * found.share, ax=axis, color=BLUE, linewidth=2)
    axis.set(xscale="log", xlabel="number of paths", ylabel="share of positive relevance (%)", ylim=(0, None))
    sns.despine(ax=axis)
    return figure


def audit(frame: pd.DataFrame) -> Figure:
    """Of an audit: the divergence from retrained models, accuracy on the forgotten class and on the others, by model.

    A value that is NaN is shown as n/a, the divergence of a broken model as "broken".
    """
    numbers = ("js_forget", "broken", "at_test", "ag_test")
    check_frame(frame, numbers, (), "audit", "the .frame of a report with measures accuracy and divergence")
    shown = {
        "JS to retrained models\n(nats)": frame["js_forget"].mask(frame["broken"].eq(True)),  # of these it says nothing
        "At: accuracy on the\nforgotten class (%)": 100 * frame["at_test"],
        "Ag: accuracy on\nthe others (%)": 100 * frame["ag_test"],
    }
    colours = [GREY if name in ("original", "retrain") else BLUE for name in frame.index]
    figure, axes = plt.subplots(1, 3, figsize=(9, 0.45 * len(frame) + 1.2), sharey=True, layout="constrained")
    for axis, digits, (label, values) in zip(axes, (3, 1, 1), shown.items(), strict=True):
        axis.barh(range(len(frame)), values.fillna(0), color=colours)
        for row, value in enumerate(values):
            missing = "broken" if frame["broken"].iloc[row] == 1 else "n/a"
            text = missing if np.isnan(value) else f"{value:.{digits}f}"
            axis.annotate(text, (np.nan_to_num(value), row), (3, 0), textcoords="offset points", va="center")
        axis.set(xlabel=label)
        axis.margins(x=0.25)
        if not values.any():  # no bar, and nothing to take the ends of the axis from
            axis.set(xlim=(0, 1), xticks=[0])
        sns.despine(ax=axis)
    for retrain in frame.loc[frame.index == "retrain", "js_forget"].dropna():
        axes[0].axvline(retrain, color=ORANGE, linestyle="--", linewidth=1.5)
    name_rows(axes[0], frame.index)
    axes[0].invert_yaxis()
    return figure


def budget(frame: pd.DataFrame, at: float) -> Figure:
    """What an edit does as its budget grows: accuracies (left) and divergence (right), one budget marked.

    Parameters
    ----------
    frame : DataFrame
        One row a budget, its index; columns at_test, ag_test, js_forget, and null, the divergence of retrained models.
        Where there are none both divergences are NaN, and n/a is shown.
    at : number
        The budget to mark.

    Raises
    ------
    ZsuError
        A column is missing.
    """
    check_frame(frame, ("at_test", "ag_test", "js_forget", "null"), (), "budget", "a frame of one row a budget")
    figure, (accuracy, divergence) = plt.subplots(1, 2, sharex=True, figsize=(8, 3), layout="constrained")
    for column, colour, marker, label in (("ag_test", BLUE, "o", "Ag"), ("at_test", ORANGE, "s", "At")):
        accuracy.plot(frame.index, 100 * frame[column], color=colour, marker=marker, markersize=4, label=label)
    if frame["js_forget"].notna().any():
        divergence.plot(frame.index, frame["js_forget"], color=BLUE, marker="o", markersize=4, label="edited model")
        if frame["null"].notna().any():
            divergence.plot(frame.index, frame["null"], color=ORANGE, linestyle="--", label="null")
        divergence.legend(frameon=False)
    else:
        divergence.text(0.5, 0.5, "n/a", transform=divergence.transAxes, ha="center")
        divergence.set(yticks=[])
    accuracy.legend(frameon=False)
    accuracy.set(ylabel="accuracy (%)", ylim=(-4, 104))
    divergence.set(ylabel="JS to retrained models (nats)", ylim=(0, None))
    for axis in (accuracy, divergence):
        axis.axvline(at, color=GREY, linewidth=6, alpha=0.3)
        axis.set_xlabel(frame.index.name, parse_math=False)
        sns.despine(ax=axis)
    return figure


def band(tidy: pd.DataFrame, column: str) -> Figure:
    """Of an audit: one number of every model, beside the band in which one more retrained model would lie.

    Parameters
    ----------
    tidy : DataFrame
        From `zsu.evaluation.Report.tidy`.
    column : str
        The number, such as "js_forget".

    Raises
    ------
    ZsuError
        The audit has no such number.
    """
    numbers = ["value", "null_low", "null_high", "null_mean", "inside", "void"]
    check_frame(tidy, numbers, ("column", "model"), "band", "the tidy() of a report")
    rows = tidy[tidy["column"] == column]
    if rows.empty:
        known = ", ".join(tidy["column"].unique())
        raise ZsuError(f"the audit has no number {column!r}", where="band", remedy=f"use one of {known}")
    low, high, mean = rows[["null_low", "null_high", "null_mean"]].iloc[0]
    rows = rows[rows["void"].ne(True) & rows["value"].notna()]
    if rows.empty:
        raise ZsuError(f"no model has a number {column!r}", where="band", remedy="choose another")
    figure, axis = plt.subplots(figsize=(6.5, 0.34 * len(rows) + 1.1))
    if low < high:
        axis.axvspan(low, high, color=GREY, alpha=0.3, linewidth=0, label="null band")
    axis.axvline(mean, color=GREY, linestyle="--", linewidth=1, label="mean of retrained models")
    for i, (value, outside) in enumerate(zip(rows["value"], rows["inside"].eq(False).fillna(False), strict=True)):
        axis.scatter(value, i, color=ORANGE if outside else BLUE, marker="D" if outside else "o", zorder=3)
        axis.annotate(f"{value:.3g}", (value, i), (7, 0), textcoords="offset points", va="center")
    axis.set_xlabel(column, parse_math=False)
    name_rows(axis, rows["model"])
    axis.set(ylim=(len(rows) - 0.5, -0.5))
    axis.margins(x=0.15)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    sns.despine(ax=axis)
    return figure


def gaps(tidy: pd.DataFrame, farthest: float = 8) -> Figure:
    """Of an audit: the gap of every number to the mean of retrained models, in half-widths of the null band.

    Parameters
    ----------
    tidy : DataFrame
        From `zsu.evaluation.Report.tidy`.
    farthest : float
        What lies beyond is drawn there.

    Raises
    ------
    ZsuError
        No number has a band.
    """
    check_frame(tidy, ("gap", "null_low", "null_high", "broken"), ("column", "model"), "gaps", "the tidy() of a report")
    half = (tidy["null_high"] - tidy["null_low"]) / 2
    shown = tidy.assign(gap=(tidy["gap"] / half).clip(-farthest, farthest))
    shown = shown[(half > 1e-9) & (tidy["model"] != "retrain") & tidy["broken"].ne(True)]
    if shown["gap"].isna().all():
        raise ZsuError("no number of a model has a band", where="gaps", remedy="audit with more references")
    order = shown["column"].unique()
    figure, axis = plt.subplots(figsize=(8, 0.24 * len(order) + 1.4), layout="constrained")
    axis.axvspan(-1, 1, color=GREY, alpha=0.4, linewidth=0)
    style = {"jitter": False, "dodge": True, "size": 4, "legend": "full"}
    sns.stripplot(shown, x="gap", y="column", hue="model", order=order, **style, ax=axis)
    axis.set(xlabel="gap to retrained models / half-width of the band", ylabel="")
    axis.set(xlim=(-farthest - 0.5, farthest + 0.5))
    name_rows(axis, order)
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1, 1), title="", frameon=False)
    for text in axis.get_legend().get_texts():
        text.set_parse_math(False)
    sns.despine(ax=axis)
    return figure


def routing(means: pd.DataFrame) -> Figure:
    """Of an audit: the mean probability (%) of each class on test inputs of the forgotten class, by model.

    Of more than 30 classes, those that some model gives most to.
    """
    check_frame(means, getattr(means, "columns", ()), (), "routing", "the .routing of a report")
    means = means.iloc[:, np.sort(np.argsort(-means.max().to_numpy(), kind="stable")[:30])]
    figure, axis = plt.subplots(figsize=(0.8 * means.shape[1] + 2, 0.4 * len(means) + 1.6), layout="constrained")
    options = {"cmap": "Greys", "vmin": 0, "vmax": 100, "cbar": False, "xticklabels": False, "yticklabels": False}
    sns.heatmap(100 * means, annot=True, fmt=".0f", ax=axis, **options)
    name_rows(axis, means.index, 0.5)
    axis.set_xticks(np.arange(means.shape[1]) + 0.5, map(readable, means.columns), rotation=45, parse_math=False)
    axis.set(xlabel="mean probability of the class (%)", ylabel="")
    return figure


def scoreboard(board: pd.DataFrame) -> Figure:
    """Of a table of `zsu.scoreboard.bench`: by method the divergence from retrained models and the two accuracies, one
    dot a class and seed, a bar at the median; sorted by the median divergence.

    The divergence is counted from the middle of the null band of the dot's own class and seed, in half-widths of that
    band, so that every band reaches from -1 to 1. Two references have no band: then it is the ratio to the null.
    """
    numbers = ("js_forget", "js_forget_ratio", "null_high", "null_low", "at_test", "ag_drop")
    check_frame(board, numbers, ["method"], "scoreboard", "what zsu.scoreboard.bench returns")
    middle, half = (board["null_high"] + board["null_low"]) / 2, (board["null_high"] - board["null_low"]) / 2
    banded = (half > 0).all()
    shown = pd.DataFrame({
        "method": board["method"],
        "divergence": (board["js_forget"] - middle) / half if banded else board["js_forget_ratio"],
        "at": 100 * board["at_test"],
        "drop": 100 * board["ag_drop"],
    })[~board["method"].isin(["original", "retrain"])]  # fmt: skip
    if shown.isna().all().any():  # of no row all is NaN
        raise ZsuError("no method has all three numbers", where="scoreboard", remedy="bench with references")
    medians = shown.groupby("method").median().sort_values("divergence")
    unit = ", in half-widths\nfrom the middle of its own null band" if banded else "\n/ the null"
    labels = {
        "divergence": f"JS to retrained models{unit}",
        "at": "At: accuracy on the\nforgotten class (%)",
        "drop": "Drop of Ag, the accuracy\non the others (points)",
    }
    size = (10, 0.42 * len(medians) + 1.4)
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, width_ratios=(1.5, 1, 1), layout="constrained")
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        sns.stripplot(shown, x=column, y="method", order=medians.index, color=BLUE, size=3, alpha=0.5, ax=axis)
        axis.scatter(medians[column], range(len(medians)), marker="|", s=150, color=ORANGE, linewidth=2.5, zorder=3)
        axis.set(xlabel=label, ylabel="")
        sns.despine(ax=axis)
    name_rows(axes[0], medians.index)
    if banded:
        axes[0].axvspan(-1, 1, color=GREY, alpha=0.3, linewidth=0)
        axes[0].set_xscale("symlog", linthresh=1, linscale=0.5)  # linear within the band
    else:
        axes[0].set_xscale("log")
    axes[0].xaxis.set_major_formatter("{x:g}")
    return figure


def png(figure: Figure, **options) -> bytes:
    """The figure as a file, with what `savefig` takes; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    plt.close(figure)
    return buffer.getvalue()
