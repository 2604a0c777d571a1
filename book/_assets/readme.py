"""The picture of the README: `make picture`. Six trousers, their heat maps, and the paths of the class."""

from pathlib import Path

import matplotlib.pyplot as plt

import zsu
from zsu import data, models, plots

test = data.load("fashion-mini").test
trouser = data.class_index(test, "Trouser")
x = data.samples(test, "Trouser", n=36)
model = models.bundled("original")
relevance = zsu.explain(model, x, trouser, rules="gamma")

parts = [
    plots.heatmaps(x[:6], zsu.explain(model, x[:6], trouser, rules="gamma")),
    plots.paths(zsu.find_paths(relevance, k=30)),
]
figure, axes = plt.subplots(2, 1, figsize=(8, 6.6), height_ratios=[3.3, 4], layout="constrained")
for axis, part in zip(axes, parts, strict=True):
    part.set_dpi(120)
    part.canvas.draw()
    axis.imshow(part.canvas.buffer_rgba())
    axis.axis("off")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
