"""Figures: images with their heat maps, the share of the top paths, what a class turned into.

Each function draws into axes that it makes, or is given, and returns the figure; showing it is up to the caller.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from .errors import ZsuError
from .paths import Paths
from .relevance import Relevance

HEAT = "RdBu_r"  # red speaks for the class, blue against it, white is 0
ORANGE, BLUE, GREY = "#b34700", "#20639b", "#767676"  # also told apart without colour vision


def heatmaps(x: Tensor, relevance: Relevance, titles: list[str] | None = None) -> Figure:
    """Images above their input relevance, each map on its own symmetric scale.

    Parameters
    ----------
    x : Tensor (N, C, H, W)
        Images in [0, 1], C 1 or 3; up to a dozen are readable.
    relevance : Relevance
        Of the same samples.
    titles : list of str, optional
        One for each image.
    """
    if len(x) != len(relevance.input):
        raise ZsuError(
            f"{len(x)} images, relevance of {len(relevance.input)}", where="heatmaps", remedy="pass the same"
        )
    figure, axes = plt.subplots(2, len(x), figsize=(1.5 * len(x), 3.3), squeeze=False, layout="constrained")
    for i, (image, heat) in enumerate(zip(x.cpu(), relevance.input.sum(1).cpu(), strict=True)):  # (H, W) each
        top, bottom = axes[:, i]
        top.imshow(image.permute(1, 2, 0).squeeze(-1), cmap="gray_r", vmin=0, vmax=1)  # (C, H, W) -> (H, W[, C])
        limit = float(heat.abs().max()) or 1.0
        bottom.imshow(heat, cmap=HEAT, vmin=-limit, vmax=limit)
        if titles:
            top.set_title(titles[i], fontsize="medium")
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("relevance")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def comparison(x: Tensor, maps: dict[str, Tensor]) -> Figure:
    """An image above its attributions by several methods, each on its own symmetric scale.

    Parameters
    ----------
    x : Tensor (1, C, H, W)
        One image in [0, 1].
    maps : dict of str to Tensor (1, C, H, W)
        From `zsu.compare`.
    """
    figure, axes = plt.subplots(1, 1 + len(maps), figsize=(2.1 * (1 + len(maps)), 2.5), layout="constrained")
    axes[0].imshow(x[0].cpu().permute(1, 2, 0).squeeze(-1), cmap="gray_r", vmin=0, vmax=1)  # (C, H, W) -> (H, W[, C])
    axes[0].set_title("image", fontsize="medium")
    for axis, (name, heat) in zip(axes[1:], maps.items(), strict=True):
        heat = heat[0].sum(0).cpu()  # (C, H, W) -> (H, W)
        limit = float(heat.abs().max()) or 1.0
        axis.imshow(heat, cmap=HEAT, vmin=-limit, vmax=limit)
        axis.set_title(name, fontsize="medium")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return figure


def ledger(relevance: Relevance) -> Figure:
    """Where relevance stays on its way from the logit (top) to the input, and where it is amplified.

    Left: what each layer keeps, in % of the logits' relevance. Right: sum |R| over its outputs, in units of theirs.
    """
    frame = relevance.ledger.iloc[:-1].set_index("layer")
    height = 0.3 * len(frame) + 1.2
    figure, (kept, amplified) = plt.subplots(1, 2, figsize=(8, height), sharey=True, layout="constrained")
    rows = np.arange(len(frame))
    percent = 100 * frame[["bias", "stabiliser", "constant"]] / float(relevance.seed.sum())
    percent = percent.loc[:, percent.abs().max() > 0.05]  # what would be seen
    for i, share in enumerate(percent):
        colour = {"bias": BLUE, "stabiliser": ORANGE, "constant": GREY}[share]
        kept.barh(rows + 0.27 * (i - (percent.shape[1] - 1) / 2), percent[share], 0.27, color=colour, label=share)
    kept.set(xlabel="kept (% of the logits' relevance)", yticks=rows, yticklabels=frame.index)
    if len(percent.columns):
        kept.legend(frameon=False)
    amplified.scatter(frame["amplification"], rows, color=BLUE)
    wide = frame["amplification"].max() > 10
    amplified.set(xlabel="amplification: sum |R|", xscale="log" if wide else "linear", xlim=None if wide else (0, None))
    amplified.grid(axis="x", alpha=0.4)
    kept.invert_yaxis()
    sns.despine(figure)
    return figure


def paths(found: Paths, relevance: Relevance, show: int = 30) -> Figure:
    """The most probable paths, layer by layer from the input (left) to the logit (right).

    A dot is a channel, placed by its number; the thickness and darkness of a line grow with the probability of the
    paths through it. Additions are left out where a path passes them on the same channel.
    """
    graph, count = found.graph, min(show, len(found))
    sizes = np.diff(graph.first)
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for number, size in enumerate(sizes):
        axis.scatter(np.full(size, number), (np.arange(size) + 0.5) / size, s=6, color="#c9c9c9", zorder=1)
    flow: dict[tuple[int, int], float] = {}
    for nodes, probability in zip(found.nodes[:count], found.probability, strict=False):
        walk = nodes[nodes >= 0]
        for ends in zip(walk[:-1].tolist(), walk[1:].tolist(), strict=True):
            flow[ends] = flow.get(ends, 0.0) + float(probability)
    most = max(flow.values())
    for ends, share in flow.items():
        number = np.searchsorted(graph.first, ends, side="right") - 1
        height = (np.array(ends) - graph.first[number] + 0.5) / sizes[number]
        strength = share / most
        axis.plot(number, height, color=ORANGE, linewidth=0.5 + 5 * strength, alpha=0.25 + 0.7 * strength, zorder=2)
    axis.set_xticks(range(len(sizes)), [f"{name}\n{n}" for name, n in zip(graph.layers, sizes, strict=True)])
    axis.set(xlabel="layer, and its number of channels", ylabel="channel", yticks=[])
    axis.set_title(f"The {count} most probable paths carry {found.share[count - 1]:.1%} of the positive relevance")
    sns.despine(ax=axis, left=True)
    return figure


def coverage(found: Paths) -> Figure:
    """Share of the positive relevance that the first k paths carry, against k."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    sns.lineplot(x=np.arange(1, len(found) + 1), y=100 * found.share, ax=axis, color=BLUE, linewidth=2)
    axis.set(xscale="log", xlabel="number of paths", ylabel="share of positive relevance (%)", ylim=(0, None))
    sns.despine(ax=axis)
    return figure


def audit(frame: pd.DataFrame) -> Figure:
    """Accuracy on the forgotten class and on the others, and the divergence from retrained models, by model."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 0.45 * len(frame) + 1.2), sharey=True, layout="constrained")
    columns = {
        "at_test": "At: accuracy on the\nforgotten class (%)",
        "ag_test": "Ag: accuracy on\nthe others (%)",
        "js_forget": "JS to retrained models\n(nats)",
    }
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        scale = 1 if column == "js_forget" else 100
        colours = [GREY if name in ("original", "retrain") else BLUE for name in frame.index]
        axis.barh(frame.index, scale * frame[column].fillna(0), color=colours)
        for row, value in enumerate(frame[column]):
            text = "n/a" if np.isnan(value) else f"{scale * value:.3f}" if scale == 1 else f"{scale * value:.1f}"
            axis.annotate(
                text, (0 if np.isnan(value) else scale * value, row), (3, 0), textcoords="offset points", va="center"
            )
        axis.set(xlabel=label)
        axis.margins(x=0.25)
        sns.despine(ax=axis)
    retrain = frame.loc["retrain", "js_forget"]
    if not np.isnan(retrain):
        axes[2].axvline(retrain, color=ORANGE, linestyle="--", linewidth=1.5)
    axes[0].invert_yaxis()
    return figure
