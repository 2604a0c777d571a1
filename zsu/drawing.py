"""What figures are drawn of and with: images, series and heat maps on axes; what is none of these is refused."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, uint8

from .errors import ZsuError

HEAT = "RdBu_r"  # red speaks for the class, blue against it, white is 0


def check_type(value: object, kind: type, where: str, source: str) -> None:
    """`ZsuError` unless a value is of this kind, and has something in it."""
    if not isinstance(value, kind):
        raise ZsuError(f"a {type(value).__name__} cannot be drawn here", where=where, remedy=f"pass {source}")
    if hasattr(value, "__len__") and len(value) == 0:
        raise ZsuError("there is nothing to draw", where=where, remedy=f"pass {source}")


def check_frame(frame: pd.DataFrame, numbers: Iterable[str], names: Iterable[str], where: str, source: str) -> None:
    """`ZsuError` unless it is a frame with rows, and with columns of these numbers and names."""
    check_type(frame, pd.DataFrame, where, source)
    missing = sorted({*numbers, *names} - set(frame.columns))
    if missing:
        raise ZsuError(f"no column {', '.join(missing)}", where=where, remedy=f"pass {source}")
    wrong = [str(column) for column in numbers if not pd.api.types.is_numeric_dtype(frame[column])]
    if wrong:
        raise ZsuError(f"no numbers in {', '.join(wrong)}", where=where, remedy=f"pass {source}")


def drawable(x: object, where: str, any_channels: bool = False) -> Tensor:
    """Images (N, C, H, W) or series (N, C, L) as float32 on the CPU, without a graph; bytes become 0 to 1."""
    remedy = "pass images (N, 1 or 3, H, W) or series (N, C, L), and relevance of the same form"
    if not isinstance(x, Tensor):
        raise ZsuError(f"a {type(x).__name__} is no tensor of images", where=where, remedy=remedy)
    channels = any_channels or x.ndim == 3 or x.shape[1:2] in ((1,), (3,))
    if x.ndim not in (3, 4) or not x.numel() or not channels or x.is_complex():
        raise ZsuError(f"images of shape {tuple(x.shape)}", where=where, remedy=remedy)
    t = x.detach().cpu().float()
    if not t.isfinite().all():
        raise ZsuError("images or relevance that are not finite", where=where, remedy="look for NaN in data and model")
    return t / 255 if x.dtype == uint8 else t


def title_texts(titles: Sequence[str] | None, x: Tensor, where: str) -> list[str]:
    """A title for each image, empty where there are none."""
    texts = [] if titles is None else [readable(title) for title in titles]
    if texts and len(texts) != len(x):
        what = f"images of shape {tuple(x.shape)} and {len(texts)} titles"
        raise ZsuError(what, where=where, remedy="pass a title for each or none")
    return texts or [""] * len(x)


def readable(name: object) -> str:
    """A name as a font can write it: what Python makes of a file's name that is not UTF-8 becomes question marks."""
    return str(name).encode("utf-8", "replace").decode()


def name_rows(axis: Axes, names: Iterable, offset: float = 0) -> None:
    """Names along y, as they are: a dollar begins no formula."""
    texts = [readable(name) for name in names]
    axis.set_yticks(np.arange(len(texts)) + offset, texts, parse_math=False)


def grid(rows: int, columns: int, height: float, width: float) -> tuple[Figure, np.ndarray]:
    """A figure with axes (rows, columns) without ticks, each so many inches high and wide."""
    size, bare = (columns * width, rows * height), {"xticks": (), "yticks": ()}
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", subplot_kw=bare)


def draw_image(axis: Axes, image: Tensor) -> None:
    """An image (C, H, W) in [0, 1], C 1 or 3, or the lines of a series (C, L)."""
    if image.ndim == 2:
        axis.plot(image.T.numpy(), linewidth=1)  # (C, L) -> (L, C)
    else:
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)  # -> (H, W[, C])


def draw_heat(axis: Axes, relevance: Tensor) -> None:
    """The relevance (C, H, W) of an image, or (C, L) of a series, on its own symmetric scale."""
    heat = np.atleast_2d(relevance.double().sum(0).numpy())  # (C, H, W) -> (H, W), (C, L) -> (1, L)
    limit = float(abs(heat).max()) or 1.0
    axis.imshow(heat, cmap=HEAT, vmin=-limit, vmax=limit, aspect="auto" if relevance.ndim == 2 else "equal")
