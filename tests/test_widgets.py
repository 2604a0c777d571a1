"""The slider, as far as it needs no browser; tests/test_site.py moves it in one."""

import base64
import io

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from zsu import data, explain, models, plots
from zsu.errors import ZsuError
from zsu.evaluation import Report
from zsu.widgets import band_explorer, budget_explorer, path_explorer, relevance_explorer, slider


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


def test_the_relevance_explorer_has_each_rule_and_class_with_the_sum_of_the_map():
    test = data.load().test
    model, x = models.bundled(), data.samples(test, "Trouser", 1)
    choice, rules = parts(relevance_explorer(model, x, test.classes, {"eps": "epsilon", "gamma": "gamma"}, (1, 8)))
    assert [label for label, _ in choice.options] == ["eps", "gamma"]
    for rule, inner in zip(("epsilon", "gamma"), rules.children, strict=True):
        number, pictures = parts(inner)
        assert [label for label, _ in number.options] == ["Trouser", "Bag"]
        for c, picture in zip((1, 8), pictures.children, strict=True):
            heat = explain(model, x, c, rule, edges=False)
            assert f"logit is {heat.logits[0, c]:.1f}: relevance adds up to {heat.input.sum():.1f}," in picture.value


def test_the_relevance_explorer_wants_one_image_and_all_names():
    test, model = data.load().test, models.bundled()
    x = data.samples(test, "Trouser", 2)
    for images, names in ((x, test.classes), (x[:0], test.classes), (x[:1], test.classes[:3])):
        with pytest.raises(ZsuError, match="pass one image"):
            relevance_explorer(model, images, names, {"eps": "epsilon"}, [8])


def test_the_budget_explorer_says_each_row():
    frame = pd.DataFrame({"at_test": [0.5, 0.0], "ag_test": [0.9, 0.8], "js_forget": [0.3, 0.1], "null": [0.05, 0.05]})
    frame.index = pd.Index([0, 3], name="k")
    number, pictures = parts(budget_explorer(frame, "neurons"))
    assert [label for label, _ in number.options] == ["0", "3"]
    expected = (
        "With 3 neurons, At is 0.0 %, Ag 80.0 %, and the divergence from retrained models 0.100 nats, of the null"
    )
    assert f"{expected} 0.050." in pictures.children[1].value


@pytest.mark.parametrize(
    ("js", "said", "lines"),
    [(float("nan"), "models n/a nats, of the null n/a.", 1), (0.3, "models 0.300 nats, of the null n/a.", 2)],
)
def test_the_budget_explorer_without_two_references_has_no_null(js, said, lines):
    frame = pd.DataFrame({"at_test": [0.5], "ag_test": [0.9], "js_forget": [js], "null": [float("nan")]})
    _, pictures = parts(budget_explorer(frame, "neurons"))
    assert said in pictures.children[0].value
    axis = plots.budget(frame, 0).axes[1]
    assert len(axis.lines) == lines  # the budget that is marked, and the curves
    assert [text.get_text() for text in axis.texts] == ["n/a"] * (2 - lines)
    plt.close(axis.figure)


def test_the_band_explorer_has_the_numbers_with_a_band_and_says_who_is_inside():
    null = pd.DataFrame({"mean": [0.0, 0.5], "low": [0.0, 0.4], "high": [0.0, 0.6]}, index=["at_test", "js_forget"])
    rows = ["original", "retrain", r"an edit $\foo$ for $5"]
    frame = pd.DataFrame({"at_test": [1, 0, 0], "js_forget": [0.9, 0.5, 0.45]}, index=rows)
    measure_of = {"at_test": "accuracy", "js_forget": "divergence"}
    report = Report(frame.assign(broken=False), null, [], pd.DataFrame(), {}, [], {}, measure_of)
    number, pictures = parts(band_explorer(report))
    assert [label for label, _ in number.options] == ["js_forget"]
    said = r"js_forget: the null band is 0.4 to 0.6. Inside: an edit $\foo$ for $5. Outside: original."
    assert f'alt="{said}"' in pictures.children[0].value


def test_no_band_no_explorer():
    null = pd.DataFrame({"mean": [0.0], "low": [float("nan")], "high": [float("nan")]}, index=["at_test"])
    frame = pd.DataFrame({"at_test": [1.0], "broken": [False]}, index=["original"])
    report = Report(frame, null, [], pd.DataFrame(), {}, [], {}, {"at_test": "accuracy"})
    with pytest.raises(ZsuError, match="no number of this audit has a band. audit with at least two references"):
        band_explorer(report)
