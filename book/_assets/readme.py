"""The picture of the README, and the card of link previews: `make picture`. Six trousers, their heat maps, the paths."""

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
for part in parts:
    part.set_dpi(120)
    part.canvas.draw()


def save(name: str, width: float, height: float, dpi: int) -> None:
    """Both parts, one above the other."""
    figure, axes = plt.subplots(2, 1, figsize=(width, height), height_ratios=[3.3, 4], layout="constrained")
    for axis, part in zip(axes, parts, strict=True):
        axis.imshow(part.canvas.buffer_rgba())
        axis.axis("off")
    figure.savefig(Path(__file__).with_name(name), dpi=dpi)


save("readme.png", 8, 6.6, 110)
save("card.png", 12, 6.3, 100)  # 1200 x 630 pixels
