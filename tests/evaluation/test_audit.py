"""The audit: its rows and columns on models of which the answer is known, and what it refuses."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset, TensorDataset
from toys import ACCURACIES, COMPARED, TEST, TRAIN, Fixed, Reads, images, report, run

import zsu.models
from helpers import NO_PAIRS, Changed
from zsu import Forgotten, ZsuError, audit, forget, plots
from zsu.data import Images, load, samples, without_samples
from zsu.evaluation import BASIC, CONTROLS, MEASURES, jensen_shannon, predict
from zsu.evaluation.audits import is_broken

COLUMNS = [*ACCURACIES, "ag_drop", *COMPARED, "broken", "seconds", "weights_changed", "memory"]


# --- the audit on models of which the answer is known ---------------------------------------------------------


def test_rows_columns_and_values_of_known_models():
    """A perfect original, an edit that takes class 1 for class 0, two equal references that do the same."""
    blind = Reads(blind=[1]).eval()
    frame = run({"blind": blind, "uniform": Fixed([0.0] * 3).eval()}, [blind, Reads(blind=[1]).eval()])
    assert list(frame.index) == ["original", "retrain", "blind", "uniform"]
    assert list(frame.columns) == COLUMNS
    assert frame.loc["original", ACCURACIES].tolist() == [1, 1, 1, 1, 1, 1]
    assert frame.loc["blind", ACCURACIES].tolist() == [0, 1, 3 / 8, 0, 1, 3 / 8]
    assert frame.loc["retrain", ACCURACIES].tolist() == [0, 1, 3 / 8, 0, 1, 3 / 8]
    assert frame.loc["uniform", ACCURACIES].tolist() == [0, 2 / 3, 1 / 4, 0, 1 / 3, 1 / 8]  # ties go to class 0
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
    found = report({}, [a, b, c])
    frame = found.frame
    p, q, r = (predict(m, TEST)[0][:1] for m in (a, b, c))
    pairs = [jensen_shannon(p, q), jensen_shannon(p, r), jensen_shannon(q, r)]
    assert found.pairs == pytest.approx(pairs)
    assert frame.loc["retrain", "js_forget"] == pytest.approx(np.mean(pairs))
    assert frame.loc["retrain", "js_forget_ratio"] == pytest.approx(1)
    ratio = frame.loc["original", "js_forget"] / np.mean(pairs)
    assert frame.loc["original", "js_forget_ratio"] == pytest.approx(ratio)


def test_original_against_itself_has_no_divergence():
    model = zsu.models.bundled("retrained")
    test = load("fashion-mini").test
    frame = run({"same": model}, [model, model], original=model, test=test, train=test, target="Trouser")
    assert frame.loc[["original", "same"], ["js_forget", "js_retained"]].to_numpy().max() == 0
    assert (frame.loc["original", ACCURACIES] == frame.loc["retrain", ACCURACIES]).all()
    assert frame.loc["original", "ag_test"] > 0.8


def test_without_references_there_is_nothing_to_compare():
    found = report({})
    frame = found.frame
    assert frame.loc["retrain", ACCURACIES + COMPARED].isna().all()
    assert frame.loc["original", ["js_forget", "js_retained", "js_forget_ratio"]].isna().all()
    assert frame.loc["original", "at_test"] == 1
    assert found.fooled == {}
    lines = {line.split()[0]: line.split() for line in str(found).splitlines() if line}
    assert lines["js_forget"] == ["js_forget", "n/a", "n/a", "n/a", "-"]
    assert "n/a: no models retrained without the class" in str(found)


def test_with_one_reference_only_the_null_is_missing():
    found = report({}, [Reads(blind=[1]).eval()])
    frame = found.frame
    assert frame.loc["retrain", "at_test"] == 0
    assert math.isnan(frame.loc["retrain", "js_forget"])
    assert frame.loc["original", "js_forget"] == pytest.approx(math.log(2))
    assert math.isnan(frame.loc["original", "js_forget_ratio"])
    assert found.null["low"].isna().all()
    assert "one retrained model has no band" in found.notes


def test_text_shows_every_number_and_marks_what_is_outside():
    references = [Fixed(logits).eval() for logits in ([9.0, 0.0, 0.0], [0.0, 0.0, 9.0], [1.0, 0.0, 9.0])]
    found = report({"blind": Reads(blind=[1]).eval()}, references, retrain_seconds=12.5)
    lines = {line.split()[0]: line.split() for line in str(found).splitlines() if line}
    assert lines["at_test"] == ["at_test", "1.000*", "0.000", "0.000..0.000", "0.000", "-"]
    assert lines["seconds"][1:4] == ["n/a", "12.500", "n/a"]
    low, high = found.null.loc["js_forget", ["low", "high"]]
    assert f"{found.frame.loc['retrain', 'js_forget']:.3f}" in lines["js_forget"]
    assert f"{low:.3f}..{high:.3f}" in lines["js_forget"]


def test_forgotten_results_bring_seconds_and_weights_changed():
    """The whole way on real data: the mask, beside two retrained models."""
    splits = load("fashion-mini")
    original = zsu.models.bundled("original")
    result = forget(original, samples(splits.test, "Trouser"), 1, "mask")
    test = without_samples(splits.test, "Trouser")
    references = [zsu.models.bundled("retrained", seed) for seed in range(2)]
    frame = run({"mask": result, "plain": result.model}, references, original=original, test=test, train=splits.test)
    assert frame.loc["mask", "weights_changed"] == result.patch.weights_changed == 33
    assert frame.loc["mask", "seconds"] == result.patch.metadata["seconds"] > 0
    assert frame.loc["plain", ["seconds", "weights_changed"]].isna().all()
    assert frame.loc["plain", ACCURACIES + COMPARED].equals(frame.loc["mask", ACCURACIES + COMPARED])
    assert frame.loc["mask", "at_test"] == 0
    assert 0 < frame.loc["retrain", "js_forget"] < frame.loc["mask", "js_forget"] < frame.loc["original", "js_forget"]


def test_a_collapsed_model_is_broken_and_gets_no_divergence():
    references = [Reads(blind=[1]).eval(), Reads(blind=[1]).eval()]
    wrong = Fixed([0.0, 9.0, 0.0]).eval()  # right on class 1 only
    found = report({"collapsed": wrong, "blind": Reads(blind=[1]).eval()}, references)
    assert found.frame["broken"].tolist() == [False, False, True, False]
    lines = {line.split()[0]: line.split() for line in str(found).splitlines() if line}
    assert lines["js_forget"][4] == lines["js_forget_ratio"][4] == "broken"
    assert lines["at_test"][4] == "1.000*"
    assert lines["js_forget"].count("broken") == 1


def test_an_under_trained_original_is_warned_about():
    with pytest.warns(UserWarning, match="right on 12% of the test data only") as found:
        audit(Fixed([0.0, 0.0, 9.0]).eval(), {}, TRAIN, TEST, 1, measures=BASIC, controls=False, progress=False)
    assert found[0].filename == __file__  # it points at who called


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
    run({}, [Reads(blind=[1]).eval()] * 2)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("references", [0, 2])
def test_figure_of_an_audit_begins_with_the_divergence_and_says_what_is_missing(references):
    never_saw = [Reads(blind=(1,)).eval() for _ in range(references)]
    found = run({"lost": Fixed([0.0, 0.0, 9.0]).eval()}, never_saw)
    figure = plots.audit(found)
    plt.close(figure)
    shown = {axis.get_xlabel().split()[0]: [text.get_text() for text in axis.texts] for axis in figure.axes}
    assert list(shown) == ["JS", "At:", "Ag:"]
    assert shown["JS"] == (["0.693", "0.000", "broken"] if references else ["n/a", "n/a", "broken"])
    assert shown["At:"] == ["100.0", "0.0" if references else "n/a", "0.0"]
    assert shown["Ag:"] == ["100.0", "100.0" if references else "n/a", "33.3"]
    assert [len(axis.lines) for axis in figure.axes] == [min(references, 1), 0, 0]  # the null, where there is one
    assert all(axis.get_xlim()[0] == 0 for axis in figure.axes)


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
    with pytest.raises(ZsuError, match=r"shape \(8, 4\) of '(reference 0|other)', of shape \(8, 3\) of the ori"):
        run(*arguments)


@pytest.mark.parametrize(
    ("original", "others", "broken", "sound"),
    [
        (1.0, 1, [0.0, 0.49], [0.5, 1.0]),  # of two classes: a retrained model always answers the other one
        (0.9, 1, [0.44], [0.46, 0.9]),
        (1.0, 2, [0.5, 0.74], [0.76, 1.0]),  # of three: one answer has 1/2
        (0.4, 2, [0.19], [0.21, 0.4]),  # an original below chance
        (0.505, 99, [0.01, 0.25], [0.26]),  # (.505 + 1/99) / 2 = .2576
    ],
)
def test_broken_by_hand(original, others, broken, sound):
    assert [is_broken(kept, original, others) for kept in broken + sound] == [True] * len(broken) + [False] * len(sound)


def test_one_answer_for_all_is_broken_however_frequent_its_class_is():
    """Nine of ten other images are of class 2, so it has Ag .9; with one other class it is what a retrained one is."""
    data = images([0] + [1] * 4 + [2] * 9)
    assert run({"two": Fixed([0.0, 0.0, 9.0]).eval()}, test=data, train=data).loc["two", "broken"]
    data = images([0] * 6 + [1] * 4, classes=2)
    found = run({"zero": Fixed([9.0, 0.0]).eval(), "one": Fixed([0.0, 9.0]).eval()}, original=Reads(classes=2).eval(),
                test=data, train=data).loc[["original", "zero", "one"], "broken"]  # fmt: skip
    assert found.tolist() == [False, False, True]


BAD_MODELS = {
    "the model is in train mode": Reads().train(),
    "label 2, but the model knows 2 classes": Fixed([0.0, 1.0]).eval(),
    "the outputs are not finite": Fixed([0.0, math.nan, 0.0]).eval(),
    r"mat1 and mat2 .* \(x is": nn.Sequential(nn.Flatten(), nn.Linear(7, 3)).eval(),
    r"the model's output is \(8, 1, 1, 3\). return logits": nn.Linear(1, 3).eval(),
}


@pytest.mark.parametrize("controls", [False, True])
def test_an_original_that_knows_too_few_classes_is_refused(controls):
    """Whether or not trivial edits are tried on it first."""
    with pytest.raises(ZsuError, match="audit of 'original': label 2, but the model knows 2 classes"):
        report({}, original=Fixed([0.0, 1.0]).eval(), target=2, controls=controls)


@pytest.mark.parametrize("match", BAD_MODELS)
def test_models_that_do_not_fit_are_refused(match):
    with pytest.raises(ZsuError, match=f"audit of 'bad': {match}"):
        run({"bad": BAD_MODELS[match]})


def test_references_that_know_the_class_are_refused():
    with pytest.raises(ZsuError, match="'reference 1' predicts the forgotten class on 100%.*trained without the class"):
        run({}, [Reads(blind=[1]).eval(), Reads().eval()])


def test_swapped_forget_and_retained_sets_are_told_by_their_labels():
    forget_set, retained_set = images([1] * 6), images([0, 0, 2, 2])
    with pytest.raises(ZsuError, match="the train data holds c0 0, c1 6, c2 0"):
        run({}, train=forget_set, test=retained_set)
    with pytest.raises(ZsuError, match="the test data holds c0 0, c1 6, c2 0"):
        run({}, test=forget_set)


def test_outputs_that_are_not_finite_name_the_model():
    bad = Fixed([0.0, math.inf, 0.0]).eval()
    with pytest.raises(ZsuError, match="audit of 'reference 0': the outputs are not finite"):
        run({}, [bad])
    with pytest.raises(ZsuError, match="audit of 'original': the outputs are not finite"):
        run({}, original=bad)


class Labelled(torch.utils.data.Dataset):
    """The images of `TEST` with labels of another type."""

    def __init__(self, convert):
        self.classes = TEST.classes
        self.targets = [convert(int(label)) for label in TEST.targets]

    def __len__(self):
        return len(TEST)

    def __getitem__(self, i):
        return TEST[i][0], self.targets[i]


@pytest.mark.parametrize("convert", [int, np.int64, np.uint8, torch.tensor, lambda label: f"c{label}"])
def test_labels_in_any_form(convert):
    blind = Reads(blind=[1]).eval()
    expected = run({"blind": blind}, [blind, blind])
    found = run({"blind": blind}, [blind, blind], test=Labelled(convert))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_labels_that_name_no_class_are_refused():
    with pytest.raises(ZsuError, match="label '0' is no class. use the names in .classes: c0, c1, c2"):
        run({}, test=Labelled(str))


def test_few_samples_of_the_class_are_said_and_nothing_is_fitted_to_them():
    blind = Reads(blind=[1]).eval()
    measures = ["accuracy", "forget rate", "forgetting score", "membership", "probes"]
    with pytest.warns(UserWarning, match="only 2 train samples of class 'c1': attacks that learn of them are n/a"):
        frame = run({"blind": blind}, [blind, blind], train=images([0] * 6 + [1] * 2), measures=measures)
    assert frame.loc["blind", ["fr", "fs", "mia_five"]].isna().all()
    assert frame.loc["blind", "at_test"] == 0


def test_two_references_are_one_pair_and_have_no_band_of_it():
    references = [Fixed([9.0, 0.0, 0.0]).eval(), Fixed([0.0, 0.0, 9.0]).eval()]
    found = report({}, references)
    assert found.null.loc["js_forget", ["low", "high"]].isna().all()
    assert found.null.loc["at_test", ["low", "high"]].notna().all()
    assert any("one pair" in note for note in found.notes)


def test_results_in_another_order_than_the_originals_are_refused(splits):
    originals = [zsu.models.bundled("original", s) for s in range(2)]
    edits = [forget(m, samples(splits.test, 1), 1, "mask") for m in originals]
    options = {"test": splits.test, "train": splits.test, "original": originals}
    assert report({"m": edits}, **options).frame.loc["m", "at_test"] == 0
    with pytest.raises(ZsuError, match="result 0 of 'm' was made of another model than original 0"):
        report({"m": edits[::-1]}, **options)
    with pytest.raises(ZsuError, match="'m' is a Patch. pass what zsu.forget returns"):
        report({"m": edits[0].patch}, **options)
    with pytest.raises(ZsuError, match="the edits are a list. pass a mapping"):
        report(edits, **options)


def test_references_that_are_much_worse_are_noted():
    found = report({}, [Fixed([0.0, 0.0, 9.0]).eval()] * 3)
    assert any("train more" in note for note in found.notes)
    assert next(iter(report({}, measures="accuracy").measure_of.values())) == "accuracy"


def test_unknown_measures_and_uneven_numbers_of_results_are_refused():
    with pytest.raises(ZsuError, match=r"no measures \['charm'\].*use some of accuracy, divergence"):
        run({}, measures=["charm"])
    with pytest.raises(ZsuError, match="3 results of 'edit' for 2 originals. pass one, or one for each original"):
        run({"edit": [Reads().eval()] * 3}, original=[Reads().eval()] * 2)


def test_controls_that_a_model_does_not_allow_are_noted():
    blind = Reads(blind=[1]).eval()
    found = report({"blind": blind}, [blind, blind], controls=True)
    assert list(found.frame.index) == ["original", "retrain", "blind", "zeroed"]
    noted = [note.split("'")[1] for note in found.notes if note.startswith("control '")]
    assert noted == [name for name in CONTROLS if name != "zeroed"]


def test_unknown_class_and_names_of_rows_are_refused():
    with pytest.raises(ZsuError, match="there is no class 'c9'"):
        run({}, target="c9")
    for name in ("original", "retrain"):
        with pytest.raises(ZsuError, match="the edits are named .* name them"):
            run({name: Reads().eval()})


BAD = {
    "no measures": {"measures": []},
    "a reference is a str": {"references": ["model.pt"]},
    "an original is a str": {"original": "model.pt"},
    "no original": {"original": []},
    "there is no class 1.5": {"target": 1.5},
    "seed -1": {"seed": -1},
    "seed 1099511627776": {"seed": 2**40},
}


@pytest.mark.parametrize("match", BAD)
def test_what_no_audit_can_be_made_of_is_refused(match):
    with pytest.raises(ZsuError, match=match):
        report({}, **{"original": Reads()} | BAD[match])


@pytest.mark.parametrize("name", [3, "", None, "retrain"])
def test_names_of_rows_are_strings(name):
    with pytest.raises(ZsuError, match="name them by strings"):
        report({name: Reads()})


def test_one_class_in_any_form_once_and_one_reference_alone():
    blind = Reads(blind=[1]).eval()
    for target in (torch.tensor(1), torch.tensor([1, 1]), np.array([1]), [1, "c1"], "1"):
        assert report({}, blind, target=target).about["class"] == "c1"


def test_a_wrapped_model_is_probed_at_the_same_depth(splits):
    train, test = (Subset(s, range(0, len(s), 20)) for s in splits)
    model = zsu.models.bundled()
    wrapped = nn.Sequential(model).eval()
    frame = audit(model, {"wrapped": wrapped}, train, test, 1, measures="probes", controls=False, progress=False).frame
    probes = [c for c in frame if c.startswith("probe")]
    assert len(probes) == 8
    assert frame.loc["wrapped", probes].tolist() == frame.loc["original", probes].tolist()


class Caches(nn.Module):
    """Keeps its features, gives its layers their inputs by name, and has no images but series (N, C, L)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        self.kept = self.conv(input=x).relu().mean(2)
        return self.head(input=self.kept)


def test_series_and_layers_called_by_name_and_models_that_keep_tensors():
    labels = torch.arange(90) % 3
    series = TensorDataset(torch.randn(90, 1, 9) + labels[:, None, None], labels)
    series.targets, series.classes = labels, ["a", "b", "c"]
    model = Caches().eval()
    frame = report({}, original=model, train=series, test=series, measures=tuple(MEASURES), controls=True).frame
    assert list(frame.index) == ["original", "retrain", *CONTROLS]
    assert frame.loc["original", ["probe_head", "at_noise", "relearn", "ou"]].notna().all()
    assert math.isnan(frame.loc["original", "at_crop"])
    model.kept.requires_grad_()  # an inference tensor would refuse


def test_models_without_parameters():
    class Flat(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3)

    assert report({"flat": Flat().eval()}).frame.loc["flat", "at_test"] == 0


def test_forgotten_is_what_forget_returns():
    assert Forgotten._fields == ("model", "patch", "cut")


@pytest.mark.parametrize("change", NO_PAIRS)
@pytest.mark.parametrize("part", ["train", "test"])
def test_items_that_are_no_pairs_with_the_label_of_targets_are_refused(change, part):
    with pytest.raises(ZsuError):
        report({}, **{part: Changed(TEST, change)})
    same = Changed(TEST, lambda x, y: (x, torch.tensor(y)))
    assert run({}, **{part: same})[ACCURACIES].equals(run({}, **{part: TEST})[ACCURACIES])


def test_parts_with_other_classes_are_refused():
    other = Images(TEST.data, TEST.targets, ["c0", "c1", "another"])
    with pytest.raises(ZsuError, match="the train data has classes .*'another'.*, the test data"):
        report({}, train=other)


def test_a_stream_is_refused():
    class Stream(IterableDataset):
        targets, classes = TEST.targets, TEST.classes

        def __iter__(self):
            return iter(TEST)

    for part in ("train", "test"):
        with pytest.raises(ZsuError, match="a Stream has no items that can be read by their number"):
            report({}, **{part: Stream()})
    with pytest.raises(ZsuError, match="a Stream has no items"):
        predict(Reads().eval(), Stream())
