"""The audit: its measures by hand, its rows and columns on models of which the answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import zsu.models
from zsu import Forgotten, ZsuError, audit, forget
from zsu.data import Images, load, samples, without_samples
from zsu.evaluation import accuracy, jensen_shannon, predict, table

ACCURACIES = ["at_test", "ag_test", "all_test", "at_train", "ag_train", "all_train"]
COMPARED = ["js_forget", "js_retained", "js_forget_ratio"]
COLUMNS = [*ACCURACIES, "ag_drop", *COMPARED, "seconds", "weights_changed", "broken"]


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def images(labels, classes=3):
    """Images of one pixel, which is the label."""
    labels = torch.tensor(labels)
    return Images(labels.to(torch.uint8).reshape(-1, 1, 1, 1), labels, [f"c{i}" for i in range(classes)])


class Reads(nn.Module):
    """Knows every label of `images` but those it takes for class 0."""

    def __init__(self, classes=3, blind=()):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.classes, self.blind = classes, blind

    def forward(self, x):
        label = (x.flatten() * 255).round().long()
        for b in self.blind:
            label = torch.where(label == b, 0, label)
        return self.scale * nn.functional.one_hot(label, self.classes).float()


TEST, TRAIN = images([0, 0, 1, 1, 1, 2]), images([0, 1, 2, 2])


def run(forgotten, references=(), original=None, test=TEST, train=TRAIN, target=1, **options):
    original = original or Reads().eval()
    return audit(original, forgotten, train, test, target, references, progress=False, **options)


# --- measures by hand -----------------------------------------------------------------------------------------


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_jensen_shannon_of_equal_and_disjoint_outputs():
    p = rows([0.2, 0.8], [1, 0])
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(rows([1, 0]), rows([0, 1])) == pytest.approx(math.log(2), rel=1e-12)
    assert jensen_shannon(rows([0.5, 0.5, 0]), rows([0, 0, 1])) == pytest.approx(math.log(2), rel=1e-12)


def test_jensen_shannon_by_hand():
    """p = (1, 0), q = (1/2, 1/2): m = (3/4, 1/4), KL(p, m) = ln 4/3, KL(q, m) = (ln 2/3 + ln 2) / 2."""
    expected = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert jensen_shannon(rows([1, 0]), rows([0.5, 0.5])) == pytest.approx(expected, rel=1e-12)
    assert jensen_shannon(rows([0.5, 0.5]), rows([1, 0])) == pytest.approx(expected, rel=1e-12)
    two = jensen_shannon(rows([1, 0], [0.3, 0.7]), rows([0.5, 0.5], [0.3, 0.7]))  # the mean over samples
    assert two == pytest.approx(expected / 2, rel=1e-12)


def test_jensen_shannon_refuses_other_shapes():
    with pytest.raises(ZsuError, match=r"outputs of shape \(1, 2\) and \(1, 3\).*the same classes"):
        jensen_shannon(rows([1, 0]), rows([1, 0, 0]))


def test_accuracy_by_hand():
    p = rows([0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2])
    assert accuracy(p, torch.tensor([0, 1, 0, 0])) == 0.75
    assert accuracy(p[:1], torch.tensor([1])) == 0


def test_predict_gives_softmax_and_labels_and_no_graph():
    p, y = predict(Fixed([0.0, math.log(3.0)]).eval(), images([1, 0], 2))
    torch.testing.assert_close(p, rows([0.25, 0.75], [0.25, 0.75]), atol=1e-7, rtol=0)
    assert y.tolist() == [1, 0]
    assert p.dtype == torch.float64
    assert not p.requires_grad


# --- the audit on models of which the answer is known ---------------------------------------------------------


def test_rows_columns_and_values_of_known_models():
    """A perfect original, an edit that takes class 1 for class 0, two equal references that do the same."""
    blind = Reads(blind=[1]).eval()
    frame = run({"blind": blind, "uniform": Fixed([0.0] * 3).eval()}, [blind, Reads(blind=[1]).eval()])
    assert list(frame.index) == ["original", "retrain", "blind", "uniform"]
    assert list(frame.columns) == COLUMNS
    assert frame.loc["original", ACCURACIES].tolist() == [1, 1, 1, 1, 1, 1]
    assert frame.loc["blind", ACCURACIES].tolist() == [0, 1, 1 / 2, 0, 1, 3 / 4]
    assert frame.loc["retrain", ACCURACIES].tolist() == [0, 1, 1 / 2, 0, 1, 3 / 4]
    assert frame.loc["uniform", ACCURACIES].tolist() == [0, 2 / 3, 1 / 3, 0, 1 / 3, 1 / 4]  # ties go to class 0
    assert frame["ag_drop"].tolist() == pytest.approx([0, 0, 0, 1 / 3])
    assert frame.loc["original", "js_forget"] == pytest.approx(math.log(2))
    assert frame.loc["original", "js_retained"] == pytest.approx(0, abs=1e-12)
    assert frame.loc["blind", ["js_forget", "js_retained"]].tolist() == pytest.approx([0, 0], abs=1e-12)
    # uniform (1/3, 1/3, 1/3) against a certain answer: m = (2/3, 1/6, 1/6)
    uniform = (math.log(3 / 2) + (math.log(1 / 2) + 2 * math.log(2)) / 3) / 2
    assert frame.loc["uniform", ["js_forget", "js_retained"]].tolist() == pytest.approx([uniform] * 2)
    assert frame.loc["retrain", ["js_forget", "js_retained"]].tolist() == [0, 0]


def test_divergence_is_the_mean_over_all_references():
    same, other = Fixed([0.0, 1.0, 2.0]).eval(), Fixed([5.0, 0.0, 0.0]).eval()
    p, q = (predict(m, TEST)[0][:1] for m in (same, other))
    for references in ([same, other], [other, same]):
        frame = run({"edit": Fixed([0.0, 1.0, 2.0]).eval()}, references)
        assert frame.loc["edit", "js_forget"] == pytest.approx(jensen_shannon(p, q) / 2)


def test_null_is_the_mean_over_pairs_of_references():
    a, b, c = (Fixed(logits).eval() for logits in ([9.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 9.0]))
    frame = run({}, [a, b, c])
    p, q, r = (predict(m, TEST)[0][:1] for m in (a, b, c))
    pairs = [jensen_shannon(p, q), jensen_shannon(p, r), jensen_shannon(q, r)]
    assert frame.loc["retrain", "js_forget"] == pytest.approx(np.mean(pairs))
    assert frame.loc["retrain", "js_forget_ratio"] == pytest.approx(1)
    ratio = frame.loc["original", "js_forget"] / np.mean(pairs)
    assert frame.loc["original", "js_forget_ratio"] == pytest.approx(ratio)


def test_original_against_itself_has_no_divergence():
    model = zsu.models.bundled("original")
    test = load("fashion-mini").test
    frame = run({"same": model}, [model, model], original=model, test=test, train=test, target="Trouser")
    assert frame.loc[["original", "same"], ["js_forget", "js_retained"]].to_numpy().max() == 0
    assert (frame.loc["original", ACCURACIES] == frame.loc["retrain", ACCURACIES]).all()
    assert frame.loc["original", "at_test"] > 0.9


def test_without_references_there_is_nothing_to_compare():
    frame = run({})
    assert frame.loc["retrain", ACCURACIES + COMPARED].isna().all()
    assert frame.loc["original", ["js_forget", "js_retained", "js_forget_ratio"]].isna().all()
    assert frame.loc["original", "at_test"] == 1
    lines = table(frame).splitlines()
    (retrain,) = [line for line in lines if line.startswith("retrain")]
    assert retrain.split() == ["retrain"] + ["n/a"] * 11
    assert "Null (retrain against retrain) on the forgotten class: n/a: needs two models" in lines[-1]


def test_with_one_reference_only_the_null_is_missing():
    frame = run({}, [Reads(blind=[1]).eval()])
    assert frame.loc["retrain", "at_test"] == 0
    assert math.isnan(frame.loc["retrain", "js_forget"])
    assert frame.loc["original", "js_forget"] == pytest.approx(math.log(2))
    assert math.isnan(frame.loc["original", "js_forget_ratio"])


def test_table_shows_every_row_and_number():
    references = [Fixed([9.0, 0.0, 0.0]).eval(), Fixed([0.0, 0.0, 9.0]).eval()]
    frame = run({"blind": Reads(blind=[1]).eval()}, references, retrain_seconds=12.5)
    text = table(frame)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["blind"][:6] == ["0.000", "1.000", "0.500", "0.000", "1.000", "0.750"]
    assert lines["blind"][-2:] == ["n/a", "n/a"]
    assert lines["retrain"][-2] == "12.500"
    assert f"{frame.loc['retrain', 'js_forget']:.3f} nats." in text
    assert "js forget ratio" in text


def test_forgotten_results_bring_seconds_and_weights_changed():
    """The whole way on real data: the mask, beside two retrained models."""
    splits = load("fashion-mini")
    original = zsu.models.bundled("original")
    result = forget(original, samples(splits.test, "Trouser"), 1, "mask")
    test = without_samples(splits.test, "Trouser")
    references = [zsu.models.bundled("retrained", seed) for seed in range(2)]
    frame = run({"mask": result, "plain": result.model}, references, original=original, test=test, train=splits.test)
    assert frame.loc["mask", "weights_changed"] == result.patch.weights_changed == 33
    assert frame.loc["mask", "seconds"] == float(result.patch.metadata["seconds"]) > 0
    assert frame.loc["plain", ["seconds", "weights_changed"]].isna().all()
    assert frame.loc["plain", ACCURACIES + COMPARED].equals(frame.loc["mask", ACCURACIES + COMPARED])
    assert frame.loc["mask", "at_test"] == 0
    assert 0 < frame.loc["retrain", "js_forget"] < frame.loc["mask", "js_forget"] < frame.loc["original", "js_forget"]


def test_a_collapsed_model_is_broken_and_gets_no_divergence():
    references = [Reads(blind=[1]).eval(), Reads(blind=[1]).eval()]
    wrong = Fixed([0.0, 9.0, 0.0]).eval()  # right on class 1 only
    frame = run({"collapsed": wrong, "blind": Reads(blind=[1]).eval()}, references)
    assert frame["broken"].tolist() == [False, False, True, False]
    lines = {line.split()[0]: line for line in table(frame).splitlines() if line}
    assert lines["collapsed"].count("broken") == 3
    assert "broken" not in lines["blind"] + lines["retrain"]


def test_an_under_trained_original_is_warned_about():
    with pytest.warns(UserWarning, match="right on 17% of the test data only"):
        run({}, original=Fixed([0.0, 0.0, 9.0]).eval())


def test_a_module_with_an_attribute_called_model_is_taken_as_it_is():
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return -self.model(x)

    frame = run({"wrapped": Wrapped(Reads()).eval()})
    assert frame.loc["wrapped", "at_test"] == 0


def test_the_global_generator_is_left_alone():
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    frame = run({}, [Reads(blind=[b]).eval() for b in (1, 2)])
    assert frame.loc["retrain", "at_test"] == 0.5
    assert torch.equal(state, torch.random.get_rng_state())


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize(("labels", "histogram"), [([0, 0, 2], "c0 2, c1 0, c2 1"), ([1, 1], "c0 0, c1 2, c2 0")])
def test_empty_forget_or_retain_split_is_refused_with_the_histogram(split, labels, histogram):
    with pytest.raises(ZsuError, match=f"the {split} data holds {histogram}. pass data with samples of class 'c1'"):
        run({}, **{split: images(labels)})


def test_empty_data_is_refused():
    with pytest.raises(ZsuError, match="the test data holds c0 0, c1 0, c2 0"):
        run({}, test=Subset(TEST, []))
    with pytest.raises(ZsuError, match="the data set is empty"):
        predict(Reads().eval(), Subset(TEST, []))


@pytest.mark.parametrize("where", ["reference", "forgotten"])
def test_models_of_other_classes_are_refused(where):
    other = Reads(classes=4).eval()
    arguments = ({}, [other]) if where == "reference" else ({"other": other}, [Reads().eval()])
    with pytest.raises(ZsuError, match=r"outputs of shape \(3, [34]\) and \(3, [34]\).*compare models with the same"):
        run(*arguments)


BAD_MODELS = {
    "the model is in train mode": Reads().train(),
    "label 2, but the model knows 2 classes": Fixed([0.0, 1.0]).eval(),
    "the outputs are not finite": Fixed([0.0, math.nan, 0.0]).eval(),
    "the model refuses images": nn.Sequential(nn.Flatten(), nn.Linear(7, 3)).eval(),
    r"the outputs have shape \(6, 1, 1, 3\)": nn.Linear(1, 3).eval(),
}


@pytest.mark.parametrize("match", BAD_MODELS)
def test_models_that_do_not_fit_are_refused(match):
    with pytest.raises(ZsuError, match=match):
        run({"bad": BAD_MODELS[match]})


def test_unknown_class_and_names_of_rows_are_refused():
    with pytest.raises(ZsuError, match="there is no class 'c9'"):
        run({}, target="c9")
    for name in ("original", "retrain"):
        with pytest.raises(ZsuError, match="rows of the table already"):
            run({name: Reads().eval()})


def test_forgotten_is_what_forget_returns():
    assert Forgotten._fields == ("model", "patch", "cut")
