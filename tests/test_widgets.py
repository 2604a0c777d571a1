"""The slider, as far as it needs no browser; tests/test_site.py moves it in one."""

import base64
import io

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from zsu import data, models
from zsu.errors import ZsuError
from zsu.widgets import path_explorer, slider


@pytest.fixture
def figure():
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    yield figure
    plt.close(figure)


def parts(widget):
    _, choice, pictures = widget.children
    return choice, pictures


def test_every_frame_is_in_the_widget_with_its_alt_text(figure):
    png = io.BytesIO()
    figure.savefig(png, format="png")
    choice, pictures = parts(slider([("a", figure, "first <one>"), ("b", png.getvalue(), 'second "one"')], "rate"))
    assert isinstance(choice, ipywidgets.SelectionSlider)
    assert (choice.description, [label for label, _ in choice.options]) == ("rate", ["a", "b"])
    assert 'alt="first &lt;one&gt;"' in pictures.children[0].value
    assert 'alt="second &quot;one&quot;"' in pictures.children[1].value
    assert base64.b64encode(png.getvalue()).decode() in pictures.children[1].value


def test_the_figures_are_closed(figure):
    slider([("a", figure, "a line")], "rate")
    assert not plt.fignum_exists(figure.number)


def test_no_frames():
    with pytest.raises(ZsuError, match="no frames"):
        slider([], "rate")


def test_no_alt_text(figure):
    with pytest.raises(ZsuError, match="'a' has no alt text"):
        slider([("a", figure, " ")], "rate")


def test_the_path_explorer_has_a_picture_for_each_state_and_says_what_it_shows():
    test = data.load().test
    model = models.bundled()
    widget = path_explorer(model, {c: data.samples(test, c, 4) for c in (1, 8)}, test.classes, (5, 20))
    choice, classes = parts(widget)
    assert [label for label, _ in choice.options] == ["Trouser", "Bag"]
    for name, inner in zip(("Trouser", "Bag"), classes.children, strict=True):
        number, pictures = parts(inner)
        assert [label for label, _ in number.options] == ["5", "20", "5, contrast", "20, contrast"]
        alts = [html.value.split('alt="')[1].split('"')[0] for html in pictures.children]
        assert len(set(alts)) == 4
        assert alts[0].startswith(f"The 5 most probable paths of {name}: ")
        assert f"The first leads from head {test.classes.index(name)}, fc " in alts[0]
