"""bench(): one tidy table that grows, resumes and refuses to mix; and what is read off it."""

import math

import pandas as pd
import pytest

from zsu import ZsuError, data, plots, sweep
from zsu.scale.scoreboard import FILE, as_text, bench, load, summary
from zsu.scale.sweep import read_rows, seen_by

SETTINGS = {"classes": ["Trouser"], "seeds": [0], "samples": 6, "epochs": 6, "progress": False}
FEW = ("mask", "paths")


@pytest.fixture(scope="module")
def made(idx, tmp_path_factory):
    """A table of one class and seed, and its folder."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    return folder, bench(folder, "fashion-mnist", idx, methods=FEW, **SETTINGS)


def test_every_row_says_what_it_is_of(made):
    _, board = made
    assert board["method"].tolist() == ["original", "retrain", "mask", "paths"]
    assert board["tier"].tolist() == ["-", "T4", "T0", "T1"]
    for column in (
        "data",
        "data_sha256",
        "class",
        "class_name",
        "seed",
        "samples",
        "epochs",
        "zsu",
        "torch",
        "threads",
    ):
        assert board[column].notna().all(), column
    assert set(board["class_name"]) == {"Trouser"}
    assert (board["null_low"] <= board["null_high"]).all()


def test_the_file_reads_back_equal(made):
    folder, board = made
    pd.testing.assert_frame_equal(read_rows(folder / FILE), board, check_exact=True)


def test_a_finished_run_computes_nothing_and_more_methods_add_their_rows(made, idx, monkeypatch):
    folder, board = made
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "audit_methods", None)
        pd.testing.assert_frame_equal(bench(folder, "fashion-mnist", idx, methods=FEW, **SETTINGS), board)
    monkeypatch.setattr(sweep.training, "train", None)  # models are in the folder
    more = bench(folder, "fashion-mnist", idx, methods=(*FEW, "bias-shift"), **SETTINGS)
    pd.testing.assert_frame_equal(more.head(4), board)
    assert more["method"].tolist()[4:] == ["bias-shift"]
    assert more["js_forget"].iloc[4] == pytest.approx(more["js_forget"].iloc[2])  # as the mask


def test_an_interrupted_run_keeps_the_classes_that_are_done(idx, tmp_path, monkeypatch):
    audit_methods = sweep.audit_methods

    def interrupted(task, settings):
        if task.target == 8:
            raise KeyboardInterrupt
        return audit_methods(task, settings)

    settings = SETTINGS | {"classes": ["Trouser", "Bag"]}
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "audit_methods", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **settings)
    kept = read_rows(tmp_path / "tasks" / "1-0.csv")
    assert not (tmp_path / "tasks" / "8-0.csv").exists()
    whole = bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **settings)
    pd.testing.assert_frame_equal(whole.head(len(kept)), kept, check_exact=True)
    assert set(whole["class"]) == {1, 8}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("other", [{"samples": 7}, {"epochs": 5}])
def test_other_settings_or_data_are_not_mixed_in(made, idx, other):
    folder, _ = made
    before = (folder / FILE).read_bytes()
    with pytest.raises(ZsuError, match=f"results of other settings: {next(iter(other))} was"):
        bench(folder, "fashion-mnist", idx, methods=FEW, **SETTINGS | other)
    with pytest.raises(ZsuError, match="other settings: data was 'fashion-mnist', is 'fashion-mini'"):
        bench(folder, methods=FEW, **SETTINGS)
    assert (folder / FILE).read_bytes() == before


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ZsuError, match="unknown methods.*amnesia.*paths"):
        bench(tmp_path, methods=["amnesia"])
    with pytest.raises(ZsuError, match="there is no class 'Hat'"):
        bench(tmp_path, classes=["Hat"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ZsuError, match="cannot make this folder"):
        bench(tmp_path / "file")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "1-0.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ZsuError, match="not a table of results"):
        bench(tmp_path, classes=[1], seeds=[0])


def test_each_method_sees_the_data_of_its_tier():
    splits = data.load("fashion-mini")
    expected = {"mask": (36, None), "paths": (36, None), "paths+retained": (36, 180), "ssd": (1200, 180)}
    expected |= {"boundary-shrink": (1200, None), "fine-tune": (1200, 10_800)}
    for method, (images, kept) in expected.items():
        x, retained = seen_by(method, splits, 3, 0, 36)
        assert len(x) == images
        assert (retained is None) == (kept is None)
        if kept:
            labels = data.targets(retained)
            assert len(labels) == kept
            assert 3 not in labels


def test_summary_by_hand():
    """Two classes, one seed; the mask halves, then keeps, the divergence of the null."""
    rows = []
    for c, null in ((0, 0.1), (1, 0.3)):
        common = {"class": c, "seed": 0, "null_low": 0.05, "null_high": 0.15, "weights": 1000, "broken": False}
        retrain = {"at_test": 0, "ag_test": 0.79, "js_forget": null, "seconds": 8}
        rows += [
            {"method": "original", "tier": "-", "at_test": 0.9, "ag_test": 0.8, "js_forget": 0.6, **common},
            {"method": "retrain", "tier": "T4", **retrain, **common},
            {"method": "mask", "tier": "T0", "at_test": 0, "ag_test": 0.81, "js_forget": 0.2, "seconds": 0.5,
             "weights_changed": 10, **common},
            {"method": "edit", "tier": "T1", "at_test": 0.1 * c, "ag_test": 0.8 - 0.1 * c, "js_forget": 0.1 + 0.3 * c,
             "seconds": 2, "weights_changed": 10 + 10 * c, **common},
        ]  # fmt: skip
    board = pd.DataFrame(rows)
    found = summary(board)
    edit = found.loc["edit"]
    expected = {"at": 5, "at_worst": 10, "ag_drop": 5, "ag_drop_worst": 10, "ag_gap": -4, "js": 0.25, "js_ratio": 1.25}
    expected |= {"js_mask_worst": 2, "in_null": 0.5, "seconds": 2, "faster": 4, "weights": 2, "broken": 0}
    for column, value in expected.items():
        assert edit[column] == pytest.approx(value), column
    assert edit["tier"] == "T1"
    assert found.index.tolist() == ["retrain", "mask", "edit", "original"]  # by divergence
    assert math.isnan(found.loc["original", "seconds"])
    lines = {line.split()[0]: line.split() for line in as_text(board).splitlines() if line}
    assert lines["edit"][1:5] == ["T1", "5.00", "10.00", "5.00"]
    assert lines["original"][-1] == "n/a"
    without_mask = summary(board[board["method"] != "mask"])
    assert without_mask["js_mask_worst"].isna().all()


@pytest.mark.parametrize(
    ("low", "high", "mask", "edit"),
    [
        ([0.1, 0.2], [0.2, 0.6], [1, -1], [5, 1]),  # middles 0.15 and 0.4, half-widths 0.05 and 0.2
        ([0.1, 0.4], [0.1, 0.4], [2, 0.5], [4, 1.5]),  # of two references: the ratio to the null
    ],
)
def test_the_figure_measures_each_dot_with_the_band_of_its_class(low, high, mask, edit):
    rows = [
        {"method": m, "class": c, "seed": 0, "at_test": 0.1, "ag_drop": 0.02, "js_forget": js[c], "null_low": low[c],
         "null_high": high[c], "js_forget_ratio": js[c] / (0.1, 0.4)[c]}
        for c in (0, 1)
        for m, js in {"edit": (0.4, 0.6), "mask": (0.2, 0.2), "retrain": (0.1, 0.4), "original": (0.6, 0.6)}.items()
    ]  # fmt: skip
    divergence, at, drop = plots.scoreboard(pd.DataFrame(rows)).axes
    assert [t.get_text() for t in divergence.get_yticklabels()] == ["mask", "edit"]  # by the median
    dots = [c.get_offsets()[:, 0].tolist() for c in divergence.collections]
    assert dots[0] == pytest.approx(mask)
    assert dots[1] == pytest.approx(edit)
    assert dots[2] == pytest.approx([sum(mask) / 2, sum(edit) / 2])  # the bars
    banded = low != high
    assert ("band" in divergence.get_xlabel()) == banded
    assert len(divergence.patches) == banded
    assert at.collections[0].get_offsets()[:, 0].tolist() == pytest.approx([10, 10])
    assert drop.collections[0].get_offsets()[:, 0].tolist() == pytest.approx([2, 2])
    if banded:
        assert divergence.patches[0].get_extents().transformed(divergence.transData.inverted()).intervalx.tolist() == (
            pytest.approx([-1, 1])
        )


def test_models_of_other_data_in_the_folder_are_not_taken(idx, tmp_path, monkeypatch):
    """As where somebody took the settings and the results away."""
    bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **SETTINGS)
    calls = []
    train = sweep.training.train
    monkeypatch.setattr(sweep.training, "train", lambda *a, **k: calls.append(1) or train(*a, **k))
    for file in (tmp_path / "settings.json", *tmp_path.glob("tasks/*.csv")):
        file.unlink()
    bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **SETTINGS)
    assert calls == []
    for file in (tmp_path / "settings.json", *tmp_path.glob("tasks/*.csv")):
        file.unlink()
    monkeypatch.setattr(sweep.data, "content_hash", lambda splits: "another")
    other = bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **SETTINGS)
    assert len(calls) == 4  # one original, three retrained
    assert set(other["data_sha256"]) == {"another"}


def test_a_method_of_some_classes_only_is_compared_on_these():
    """Twice the null on the one class that it has, whatever the other's null is."""
    rows = []
    for c, null in ((0, 0.1), (1, 0.5)):
        common = {"class": c, "seed": 0, "null_low": 0.05, "null_high": 0.6, "weights": 1000, "broken": False}
        rows.append({"method": "original", "tier": "-", "at_test": 0.9, "ag_test": 0.8, "js_forget": 0.6, **common})
        retrain = {"at_test": 0, "ag_test": 0.8, "js_forget": null, "seconds": 8 + c}
        rows.append({"method": "retrain", "tier": "T4", **retrain, **common})
    edit = {"at_test": 0, "ag_test": 0.8, "js_forget": 0.2, "seconds": 2, "weights_changed": 10}
    rows.append({"method": "edit", "tier": "T1", **edit, **rows[0] | {"method": "edit", "tier": "T1", **edit}})
    rows.append({**rows[-1], "method": "ruin", "ag_test": 0.1, "broken": True})
    board = pd.DataFrame(rows)
    found = summary(board).loc["edit"]
    assert (found["js_ratio"], found["in_null"], found["faster"]) == (pytest.approx(2), 1, 4)
    lines = {line.split()[0]: line.split() for line in as_text(board).splitlines() if line}
    assert lines["ruin"].count("broken") == 4
    assert "broken" not in lines["edit"]


def test_the_tables_that_ship():
    for dataset, seeds in (("fashion-mini", 3), ("fashion-mnist", 1)):
        board = load(dataset)
        assert set(board["data"]) == {dataset}
        assert board.groupby("method").size().eq(10 * seeds).all()
        frame = summary(board)
        assert frame.loc["retrain", "js_ratio"] == pytest.approx(1)
        assert frame.loc["mask", "at"] == 0
    with pytest.raises(ZsuError, match="no table of 'mnist' ships. use one of fashion-mini, fashion-mnist"):
        load("mnist")
