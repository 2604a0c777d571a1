"""bench(): one tidy table that grows, resumes and refuses to mix; and what is read off it."""

import gzip
import math

import numpy as np
import pandas as pd
import pytest

from zsu import ZsuError, data, plots, scoreboard
from zsu.scoreboard import FILE, bench, printed, read, seen_by, summary

SETTINGS = {"classes": ["Trouser"], "seeds": [0], "samples": 6, "epochs": 6, "progress": False}
FEW = ("mask", "paths")


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    """60 + 20 images a class of Fashion-MNIST, as IDX files."""
    folder = tmp_path_factory.mktemp("idx")
    for part, prefix, number in zip(data.load("fashion-mini"), ("train", "t10k"), (60, 20), strict=True):
        chosen = np.concatenate([np.flatnonzero(part.targets.numpy() == c)[:number] for c in range(10)])
        arrays = {"images-idx3": part.data[chosen, 0].numpy(), "labels-idx1": part.targets[chosen].byte().numpy()}
        for name, a in arrays.items():
            head = bytes([0, 0, 8, a.ndim]) + b"".join(n.to_bytes(4, "big") for n in a.shape)
            with gzip.open(folder / f"{prefix}-{name}-ubyte.gz", "wb") as file:
                file.write(head + a.tobytes())
    return folder


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
    pd.testing.assert_frame_equal(read(folder / FILE), board, check_exact=True)


def test_a_finished_run_computes_nothing_and_more_methods_add_their_rows(made, idx, monkeypatch):
    folder, board = made
    with monkeypatch.context() as patched:
        patched.setattr(scoreboard, "task", None)
        pd.testing.assert_frame_equal(bench(folder, "fashion-mnist", idx, methods=FEW, **SETTINGS), board)
    monkeypatch.setattr(scoreboard.training, "train", None)  # models are in the folder
    more = bench(folder, "fashion-mnist", idx, methods=(*FEW, "bias-shift"), **SETTINGS)
    pd.testing.assert_frame_equal(more.head(4), board)
    assert more["method"].tolist()[4:] == ["bias-shift"]
    assert more["js_forget"].iloc[4] == pytest.approx(more["js_forget"].iloc[2])  # as the mask


def test_an_interrupted_run_keeps_the_classes_that_are_done(idx, tmp_path, monkeypatch):
    task = scoreboard.task

    def interrupted(folder, name, splits, target, *rest):
        if target == 8:
            raise KeyboardInterrupt
        return task(folder, name, splits, target, *rest)

    settings = SETTINGS | {"classes": ["Trouser", "Bag"]}
    with monkeypatch.context() as patched:
        patched.setattr(scoreboard, "task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **settings)
    kept = read(tmp_path / FILE)
    assert set(kept["class"]) == {1}
    whole = bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **settings)
    pd.testing.assert_frame_equal(whole.head(len(kept)), kept)
    assert set(whole["class"]) == {1, 8}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("other", [{"samples": 7}, {"epochs": 5}])
def test_other_settings_or_data_are_not_mixed_in(made, idx, other):
    folder, _ = made
    before = (folder / FILE).read_bytes()
    with pytest.raises(ZsuError, match=f"made with {next(iter(other))}.*use another folder"):
        bench(folder, "fashion-mnist", idx, methods=FEW, **SETTINGS | other)
    with pytest.raises(ZsuError, match="made with data"):
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
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(ZsuError, match="not a scoreboard"):
        bench(tmp_path)


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
    lines = {line.split()[0]: line.split() for line in printed(board).splitlines() if line}
    assert lines["edit"][1:5] == ["T1", "5.00", "10.00", "5.00"]
    assert lines["original"][-1] == "n/a"
    without_mask = summary(board[board["method"] != "mask"])
    assert without_mask["js_mask_worst"].isna().all()
    figure = plots.scoreboard(board.assign(ag_drop=0.0, js_forget_ratio=board["js_forget"] / 0.1))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["mask", "edit"]


def test_models_of_other_data_in_the_folder_are_not_taken(idx, tmp_path, monkeypatch):
    """As after a stop before the first row."""
    bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **SETTINGS)
    (tmp_path / FILE).unlink()
    again = bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **SETTINGS)
    calls = []
    train = scoreboard.training.train
    monkeypatch.setattr(scoreboard.training, "train", lambda *a, **k: calls.append(1) or train(*a, **k))
    (tmp_path / FILE).unlink()
    monkeypatch.setattr(scoreboard, "dataset_hash", lambda splits: "another")
    other = bench(tmp_path, "fashion-mnist", idx, methods=["mask"], **SETTINGS)
    assert len(calls) == 4  # one original, three retrained
    assert set(again["data_sha256"]) != set(other["data_sha256"])


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
    lines = {line.split()[0]: line.split() for line in printed(board).splitlines() if line}
    assert lines["ruin"].count("broken") == 4
    assert "broken" not in lines["edit"]
