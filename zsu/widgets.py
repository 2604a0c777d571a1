"""A slider that works with a kernel, in Colab, and on a page that has none."""

import base64
import html
import io

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .errors import ZsuError

# With the slider the bar of tabs says nothing new. (p- is what ipywidgets 7 calls it, lm- what 8 does.)
HIDE_TABS = "<style>.zsu-frames > .p-TabBar, .zsu-frames > .lm-TabBar { display: none !important }</style>"


def slider(frames: list[tuple[str, Figure | bytes, str]], description: str) -> ipywidgets.VBox:
    """Show one of several pictures, picked by a slider.

    Parameters
    ----------
    frames : list of (label, picture, alt)
        `label` is what the slider reads, `picture` a matplotlib figure or the bytes of a PNG file, and
        `alt` says in words what the picture shows. Figures are closed, so that a notebook does not show
        them a second time.
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
    pictures = ipywidgets.Tab([ipywidgets.HTML(image_tag(picture, alt)) for _, picture, alt in frames])
    pictures.add_class("zsu-frames")
    for i, (label, _, _) in enumerate(frames):
        pictures.set_title(i, label)
    pictures.selected_index = 0
    ipywidgets.jslink((choice, "index"), (pictures, "selected_index"))
    return ipywidgets.VBox([ipywidgets.HTML(HIDE_TABS), choice, pictures])


def image_tag(picture: Figure | bytes, alt: str) -> str:
    """The picture as an <img> that holds its own data."""
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", bbox_inches="tight")
        plt.close(picture)
        picture = buffer.getvalue()
    data = base64.b64encode(picture).decode("ascii")
    return f'<img alt="{html.escape(alt)}" style="max-width: 100%" src="data:image/png;base64,{data}">'
