"""Figures show the numbers that they are given, and refuse what they cannot draw."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from torch import nn

from zsu import Relevance, ZsuError, data, explain, find_paths, plots

ODD = "$\\x$_^{}"  # as a formula this is an error


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


def board(**columns):
    """Of the scoreboard: two methods and the original, of one class and seed each."""
    numbers = {"js_forget": [0.5, 0.1, 0.2], "js_forget_ratio": [5.0, 1, 2], "null_low": 0.05, "null_high": 0.15}
    return pd.DataFrame({"method": ["original", ODD, "b"], **numbers, "at_test": 0.5, "ag_drop": 0.1} | columns)


def audit_frame(**columns):
    numbers = {"js_forget": [0.5, 0.1, 0.2], "at_test": [0.9, 0, 0.1], "ag_test": 0.8, "broken": False}
    return pd.DataFrame(numbers | columns, index=["original", "retrain", ODD])


def odd_model():
    """A convolution and a Linear with names that hold dollars and backslashes; relevance of a positive logit."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in ((ODD, nn.Conv2d(1, 3, 3)), ("r", nn.ReLU()), ("f", nn.Flatten()), ("$\\y$", nn.Linear(108, 4))):
        model.add_module(name, layer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    return explain(model.eval(), torch.rand(2, 1, 8, 8), 1)


# Everything that a figure may name, with names that are no formulas
FIGURES = {
    "images": lambda x, r: plots.images(x, [ODD, "b"]),
    "heatmaps": lambda x, r: plots.heatmaps(x, r, [ODD, "b"]),
    "comparison": lambda x, r: plots.comparison(x[:1], {ODD: x[:1]}),
    "activating": lambda x, r: plots.activating(x, torch.rand(2, 1), [(ODD, 1)]),
    "ledger": lambda x, r: plots.ledger(r),
    "walked": lambda x, r: plots.walked(r),
    "paths": lambda x, r: plots.paths(find_paths(r, 3)),
    "audit": lambda x, r: plots.audit(audit_frame()),
    "band": lambda x, r: plots.band(audited(model=[ODD], value=[2.5], column=ODD), ODD),
    "gaps": lambda x, r: plots.gaps(audited(model=[ODD], value=[2.5], column=ODD)),
    "routing": lambda x, r: plots.routing(pd.DataFrame([[0.5, 0.5]], index=[ODD], columns=[ODD, "b"])),
    "scoreboard": lambda x, r: plots.scoreboard(board()),
    "scoreboard without bands": lambda x, r: plots.scoreboard(board(null_high=0.05)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_names_are_written_as_they_are(name):
    relevance = odd_model()
    figure = FIGURES[name](torch.rand(2, 1, 8, 8), relevance)
    plots.png(figure)
    assert any(ODD in text.get_text() for text in figure.findobj(Text))


def test_images_of_any_precision_are_the_same_picture():
    x = data.samples(data.load().test, "Trouser", 2)
    expected = [axis.images[0].get_array() for axis in plots.heatmaps(x, x).axes]
    for other in (x.double(), x.clone().requires_grad_(), nn.Parameter(x.clone()), (255 * x).round().byte()):
        found = [axis.images[0].get_array() for axis in plots.heatmaps(other, other).axes]
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    for half in (x.half(), x.bfloat16()):
        assert np.array_equal(plots.images(half).axes[0].images[0].get_array(), half[0, 0].float())


def test_series_are_lines_above_a_strip():
    x, relevance = torch.rand(2, 3, 16), torch.randn(2, 3, 16)
    figure = plots.heatmaps(x, relevance, ["a", "b"])
    top, bottom = figure.axes[1], figure.axes[3]
    assert np.array_equal([line.get_ydata() for line in top.lines], x[1])
    assert np.allclose(bottom.images[0].get_array(), relevance[1].sum(0)[None])
    plots.png(figure)
    plots.png(plots.comparison(x[:1], {"a": relevance[:1]}))
    plots.png(plots.activating(x, torch.rand(2, 1), [("a", 0)]))


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(2, 2, 8, 8), torch.rand(2, 4, 8, 8), torch.rand(2, 8), torch.rand(2, 1, 4, 4, 4), torch.tensor(1.0),
        torch.rand(0, 1, 8, 8), torch.rand(2, 1, 0, 8), torch.full((2, 1, 8, 8), torch.nan), np.zeros((2, 1, 8, 8)),
        torch.zeros(2, 1, 8, 8, dtype=torch.complex64), [1, 2], None,
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(x):
    for draw in (
        plots.images,
        lambda t: plots.heatmaps(t, torch.zeros(2, 1, 8, 8)),
        lambda t: plots.comparison(t, {"a": torch.zeros(1, 1, 8, 8)}),
        lambda t: plots.activating(t, torch.zeros(2, 1), [("a", 0)]),
    ):
        with pytest.raises(ZsuError):
            draw(x)


def test_relevance_of_other_samples_or_without_numbers_is_refused():
    x = torch.rand(2, 1, 8, 8)
    for maps in (x[:1], x * torch.nan, "relevance", None, x[0, 0]):
        with pytest.raises(ZsuError):
            plots.heatmaps(x, maps)
    for one, maps in ((x[:1], {}), (x[:1], None), (x[:1], {"a": x * torch.nan}), (x, {"a": x})):
        with pytest.raises(ZsuError):
            plots.comparison(one, maps)
    for activation, path, top in ((x, [("a", 0)], 8), (torch.rand(2, 1), [], 8), (torch.rand(2, 1), [("a", 0)], 0)):
        with pytest.raises(ZsuError):
            plots.activating(x, activation, path, top)
    assert not plt.get_fignums()


def test_what_is_no_relevance_and_no_paths_is_refused():
    relevance = odd_model()
    found = find_paths(relevance, 3)
    wrong_paths = [(draw, wrong) for draw in (plots.paths, plots.coverage) for wrong in (relevance, found[:0], None)]
    for draw, wrong in ((plots.ledger, found), (plots.ledger, None), (plots.walked, found), *wrong_paths):
        with pytest.raises(ZsuError, match=r"pass (a graph, or )?what zsu\.|there is nothing to draw"):
            draw(wrong)
    with pytest.raises(ZsuError, match="show is 0"):
        plots.paths(found, 0)
    cancels = Relevance(
        relevance.input, relevance.logits, torch.tensor([[1.0, -1]]), relevance.layers, None, relevance.rows
    )
    with pytest.raises(ZsuError, match="adds up to 0"):
        plots.ledger(cancels)


@pytest.mark.parametrize("name", ["audit", "gaps", "routing", "scoreboard", "band", "budget"])
def test_what_is_no_frame_of_its_kind_is_refused(name):
    good = {"audit": audit_frame(), "scoreboard": board(), "routing": pd.DataFrame({"a": [0.5]})}
    good = good.get(name, audited(model=["a"], value=[2.5]))
    more = {"band": ["js"], "budget": [1]}.get(name, [])
    for wrong in (None, "report", {}, pd.DataFrame(), good[:0], good.astype(str)):
        with pytest.raises(ZsuError, match=f"{name}: .*pass "):
            getattr(plots, name)(wrong, *more)
    assert not plt.get_fignums()


def test_frames_in_which_nothing_is_left_to_draw():
    with pytest.raises(ZsuError, match="no number of a model has a band"):
        plots.gaps(audited(model=["a"], value=[2.0], null_low=2.0, null_high=2.0))
    with pytest.raises(ZsuError, match="no model has a number 'js'"):
        plots.band(audited(model=["a"], value=[np.nan]), "js")
    for frame in (board()[:1], board(js_forget=np.nan)):
        with pytest.raises(ZsuError, match="no method has all three numbers"):
            plots.scoreboard(frame)


def test_routing_to_a_thousand_classes_shows_the_greatest():
    means = pd.DataFrame(np.zeros((2, 1000)), columns=[f"c{i}" for i in range(1000)])
    means.iloc[0, 777], means.iloc[1, 3] = 0.9, 0.8
    axis = plots.routing(means).axes[0]
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert len(names) == 30
    assert {"c3", "c777"} <= set(names)
    assert axis.texts[names.index("c777")].get_text() == "90"
