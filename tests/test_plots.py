"""Figures show the numbers that they are given, and refuse what they cannot draw."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from zsu import ZsuError, data, plots


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def audited(**columns):
    """Of an audit, as `Report.tidy` gives it: a number whose band is 1 to 3, of models that are not broken."""
    tidy = {"column": "js", "gap": 0.0, "null_mean": 2.0, "null_low": 1.0, "null_high": 3.0, "inside": True}
    return pd.DataFrame(tidy | {"broken": False, "void": False} | columns).astype({"inside": "boolean"})


def test_figure_of_a_band_marks_who_is_outside_and_leaves_out_what_is_void():
    tidy = audited(model=["a$b", "c", "lost"], value=[2.5, 9.0, 4.0], inside=[True, False, False],
                   void=[False, False, True])  # fmt: skip
    axis = plots.band(tidy, "js").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a$b", "c"]
    assert [text.get_text() for text in axis.texts] == ["2.5", "9"]
    assert len(axis.collections[0].get_facecolors()) == 1
    assert (axis.collections[0].get_facecolors() != axis.collections[1].get_facecolors()).any()
    assert axis.patches[0].get_extents().transformed(axis.transData.inverted()).intervalx.tolist() == [
        pytest.approx(1),
        pytest.approx(3),
    ]
    with pytest.raises(ZsuError, match="no number 'ag'. use one of js"):
        plots.band(tidy, "ag")


def test_figure_of_gaps_counts_in_half_widths_and_ends_at_the_farthest():
    tidy = audited(model=["retrain", "a", "b", "lost"], value=[2.0, 2.5, 99.0, 5.0], gap=[0.0, 0.5, 97.0, 3.0],
                   broken=[False, False, False, True])  # fmt: skip
    flat = audited(model=["a"], value=[2.0], column="flat", null_low=2.0, null_high=2.0)
    axis = plots.gaps(pd.concat([tidy, flat])).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["js"]
    dots = [x for dots in axis.collections for x in dots.get_offsets()[:, 0].tolist()]
    assert sorted(dots) == [0.5, 8]


def test_figure_of_a_budget_marks_it():
    frame = pd.DataFrame({"at_test": [0.5, 0.0], "ag_test": [0.9, 0.8], "js_forget": [0.3, 0.1], "null": [0.05, 0.05]})
    frame.index = pd.Index([1, 4], name="neurons")
    accuracy, divergence = plots.budget(frame, 4).axes
    assert [line.get_label() for line in accuracy.lines[:2]] == ["Ag", "At"]
    assert accuracy.lines[1].get_ydata().tolist() == [50, 0]
    assert divergence.lines[0].get_ydata().tolist() == [0.3, 0.1]
    assert [axis.lines[-1].get_xdata()[0] for axis in (accuracy, divergence)] == [4, 4]


def test_figure_of_images():
    axes = plots.images(data.load().test.data[:12], [str(i) for i in range(12)]).axes
    assert len(axes) == 20
    assert [axis.get_title() for axis in axes[:12]] == [str(i) for i in range(12)]
    assert sum(len(axis.images) for axis in axes) == 12


def test_figures_refuse_what_they_cannot_draw():
    x = data.samples(data.load().test, "Trouser", 2)
    for images, titles in ((x[:0], None), (x[0], None), (x.expand(2, 2, 28, 28), None), (x, ["one"])):
        with pytest.raises(ZsuError, match="images of shape"):
            plots.images(images, titles)
    with pytest.raises(ZsuError, match="no column ag_test, js_forget, null"):
        plots.budget(pd.DataFrame({"at_test": [1.0]}), 0)
