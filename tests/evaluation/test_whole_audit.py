"""The whole audit on real and on degenerate models, and its page."""

import dataclasses
import html
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from torch import nn
from torch.utils.data import Subset
from toys import Reads
from toys import report as small_report

import zsu.models
from release import CHROMIUM
from zsu import ZsuError, audit, forget
from zsu.data import samples, targets, without_samples
from zsu.evaluation import CONTROLS, MEASURES, observed
from zsu.evaluation.measures import UTILITY


def some(dataset, n):
    """n images of each class."""
    labels = targets(dataset)
    return Subset(dataset, torch.cat([(labels == c).nonzero()[:n, 0] for c in range(10)]).tolist())


@pytest.fixture(scope="module")
def small(splits):
    return some(splits.train, 60), some(without_samples(splits.test, "Trouser"), 40)


@pytest.fixture(scope="module")
def passes():
    """How many samples went through a model, pass by pass, in the audit of `report`."""
    return []


@pytest.fixture(scope="module")
def report(small, splits, passes):
    """Three originals, their paths, and degenerate models, against six retrained ones."""
    originals = [zsu.models.bundled("original", s) for s in range(3)]
    edits = {"<paths>": [forget(m, samples(splits.test, "Trouser"), 1) for m in originals]}
    constant, uniform = (zsu.models.bundled("original") for _ in range(2))
    for net, bias in ((constant, 9.0), (uniform, 0.0)):
        for p in net.parameters():
            p.data.zero_()
        net.head.bias.data[0] = bias
    edits |= {
        "same": originals[0],
        "constant": constant,
        "uniform": uniform,
        "retrained": zsu.models.bundled("retrained"),
    }
    references = [zsu.models.bundled("retrained", s) for s in range(1, 7)]
    with pytest.MonkeyPatch.context() as patch:
        batches = observed.batches
        patch.setattr(observed, "batches", lambda dataset: passes.append(len(dataset)) or batches(dataset))
        return audit(originals, edits, *small, "Trouser", references, progress=False)


def test_every_control_reference_and_measure_is_there(report):
    assert list(report.frame.index[:3]) == ["original", "retrain", "<paths>"]
    assert list(report.frame.index[-4:]) == list(CONTROLS)
    assert set(report.measure_of.values()) == set(MEASURES)
    missing = report.frame.loc[["original", "mask", "<paths>", "zeroed"], list(report.measure_of)].isna()
    assert [(m, c) for m in missing.index for c in missing if missing.loc[m, c]] == [("zeroed", "head_norm")]  # 0 / 0
    assert report.null.notna().all(axis=None)
    assert set(report.seconds) == {"outputs", *MEASURES}


def test_the_original_as_an_edit_is_the_original(report):
    columns = [c for c in report.measure_of if c not in ("ulira", "klom")]  # for which it has no siblings
    assert report.frame.loc["same", columns].tolist() == report.frame.loc["original", columns].tolist()
    inside = report.tidy().set_index(["model", "column"])["inside"]["same"]
    for column in ("at_test", "js_forget", "agree_forget", "relearn", "pra_at_50", "at_noise", "mia_five"):
        assert not inside[column], column


def test_a_retrained_model_is_inside_nearly_everywhere(report):
    """A band of 95 % leaves out 5 % of what is the same."""
    inside = report.tidy().query("model == 'retrained'")["inside"]
    assert inside.notna().sum() > 35
    assert inside.mean() > 0.85


def test_constant_and_uniform_models_are_broken_and_score_as_they_must(report):
    frame = report.frame
    assert frame.loc[["constant", "uniform", "zeroed"], "broken"].all()
    assert not frame.drop(index=["constant", "uniform", "zeroed"])["broken"].any()
    for name in ("constant", "uniform", "zeroed"):
        assert frame.loc[name, "at_test"] == 0  # ties go to class 0
        assert frame.loc[name, "ag_test"] == pytest.approx(1 / 9)
        assert frame.loc[name, "fs"] == 0
        assert frame.loc[name, [c for c in frame if c.startswith("probe")]].tolist() == [0.5] * 8
        assert report.text(name, "fs") == "broken"
    assert frame.loc["uniform", "ece_retained"] == pytest.approx(1 / 9 - 0.1)
    p = math.exp(9) / (math.exp(9) + 9)
    assert frame.loc["constant", "ece_retained"] == pytest.approx(p - 1 / 9, abs=1e-6)
    assert report.routing.loc["uniform"].tolist() == pytest.approx([0.1] * 10)
    assert report.routing.loc["constant"].iloc[0] == pytest.approx(p)


def test_what_a_control_fools_is_marked_from_the_data(report):
    assert {"mask", "bias-shift", "zeroed"} <= set(report.fooled["at_test"])
    assert "original" not in report.fooled["at_test"]
    assert "mask" not in report.fooled.get("pra_at_50", [])
    assert "original" not in report.fooled.get("relearn", [])
    assert not UTILITY & set(report.fooled)
    moved = report.frame.copy()
    moved.loc["mask", "at_test"] = 1.0
    assert "mask" not in dataclasses.replace(report, frame=moved).fooled["at_test"]


def test_tidy_has_the_gap_to_retrained_models(report):
    row = report.tidy().query("model == 'mask' and column == 'js_forget'").iloc[0]
    assert row["gap"] == pytest.approx(report.frame.loc["mask", "js_forget"] - report.frame.loc["retrain", "js_forget"])
    assert row["measure"] == "divergence"
    assert row["null_low"] < row["null_mean"] < row["null_high"]


def test_tidy_says_which_numbers_are_void(report):
    """What a broken model scores, but for its accuracies and what is about the other classes."""
    tidy = report.tidy().set_index(["model", "column"])
    assert tidy.loc["uniform", "broken"].all()
    assert tidy["void"].equals(
        pd.Series([report.text(*key) == "broken" for key in tidy.index], tidy.index, name="void")
    )
    assert list(tidy.loc["uniform"].query("not void").index) == [
        c for c in report.measure_of if report.measure_of[c] == "accuracy" or c in UTILITY
    ]


def test_paths_are_found_out_where_a_mask_is_not(report):
    """What inner layers know brings the class back sooner than in a model that never knew it."""
    assert report.frame.loc["<paths>", "relearn"] < report.frame.loc["retrain", "relearn"]
    assert report.frame.loc["mask", "relearn"] > report.frame.loc["original", "relearn"] == 0


def test_the_same_seed_gives_the_same_numbers(small):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    few = [some(dataset, 12) for dataset in small]
    arguments = zsu.models.bundled(), {}, *few, 1, [zsu.models.bundled("retrained", s) for s in range(2)]
    for options in ({"controls": False}, {"measures": "accuracy"}):
        first, second = (audit(*arguments, **options, seed=3, progress=False).frame for _ in range(2))
        numbers = [c for c in first if c != "seconds"]
        np.testing.assert_array_equal(first[numbers].astype(float), second[numbers].astype(float))
    assert torch.equal(state, torch.random.get_rng_state())


def test_one_pass_a_model_and_split(report, passes):
    """And of the siblings, two of the original, the paths and each control, one over the class in either split."""
    models, siblings = len(report.frame) - 1 + 6, 2 * 6
    assert sorted(passes) == sorted([600, 400] * models + [60, 40] * siblings)


def test_several_classes(small, splits):
    """No retrained models here for two classes: what needs none is measured."""
    both = [samples(splits.test, c) for c in (1, 8)]
    edit = forget(zsu.models.bundled(), both, [1, 8])
    arguments, options = (zsu.models.bundled(), {"paths": edit}, *small, ["Trouser", "Bag"]), {"progress": False}
    frame = audit(*arguments, controls=False, **options).frame
    assert frame.loc["paths", "at_test"] < 0.1 < 0.9 < frame.loc["original", "at_test"]
    assert frame.loc["paths", ["pra_at_50", "relearn", "at_noise", "probe_head", "fs"]].notna().all()
    found = audit(*arguments, measures="accuracy", **options)
    assert list(found.frame.index) == ["original", "retrain", "paths", *CONTROLS]
    assert (found.frame.loc[["mask", "bias-shift", "zeroed"], "at_test"] < 0.5).all()
    assert found.about["class"] == "Trouser, Bag"


def test_references_of_another_architecture(small):
    """Depths that they do not share have no band; outputs do."""
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    frame = audit(zsu.models.bundled("retrained"), {}, *small, 1, [other] * 2, measures=["probes", "divergence"],
                  controls=False, progress=False)  # fmt: skip
    assert math.isnan(frame.null.loc["probe_head", "mean"])
    assert frame.null.loc["js_forget", "mean"] == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_whatever_mode_the_caller_is_in(small, mode):
    measures = ["over-unlearning", "relearning", "robustness"]
    options = {"measures": measures, "controls": False, "progress": False}
    model = zsu.models.bundled()
    plain = audit(model, {}, *small, 1, **options).frame
    with mode():
        within = audit(model, {}, *small, 1, **options).frame
    np.testing.assert_array_equal(plain[["ou", "relearn"]].astype(float), within[["ou", "relearn"]].astype(float))


# --- the page -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(report, tmp_path_factory):
    """The audit, saved."""
    file = tmp_path_factory.mktemp("page") / "audit.html"
    report.save(file)
    return report, file


def test_the_page_needs_nothing_else_and_defines_every_measure(saved):
    found, file = saved
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#measure-)""", text)
    assert "<script" not in text
    assert "&lt;paths&gt;" in text
    assert "<paths>" not in text
    for measure in set(found.measure_of.values()):
        assert html.escape(MEASURES[measure].__doc__.split("\n")[0]) in text
    for value in found.about.values():
        assert html.escape(value) in text
    alts = re.findall(r'<img alt="([^"]*)"', text)
    assert len(alts) == 3
    assert all("mask" in alt for alt in alts)


def test_numbers_lie_beside_the_page(saved):
    found, file = saved
    written = pd.read_csv(file.with_suffix(".csv"), engine="python")
    pd.testing.assert_series_equal(written["value"], found.tidy()["value"])
    content = json.loads(file.with_suffix(".json").read_text())
    assert content["models"]["<paths>"]["js_forget"] == pytest.approx(found.frame.loc["<paths>", "js_forget"])
    assert content["null"]["at_test"]["references"] == 6
    assert content["fooled"] == found.fooled


@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no browser; in CI this fails")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_in_a_browser(saved, browser, width, scheme):
    """Nothing to complain of for axe, nothing wider than a phone."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(saved[1].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}).response
    assert not [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]]
    page.close()


def test_another_ending_is_refused(saved, tmp_path):
    with pytest.raises(ZsuError, match="end the name in .html"):
        saved[0].save(tmp_path / "audit.txt")


FULL_DISK = """
import resource, signal, sys
import zsu.models
from zsu import audit
from zsu.data import load
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
test = load("fashion-mini").test
report = audit(zsu.models.bundled(), {}, test, test, 1, measures=["accuracy"], progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # no file may grow beyond 300 bytes
report.save(sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_a_full_disk_is_one_error_and_the_old_page_stays(tmp_path):
    file = tmp_path / "audit.html"
    file.write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, file], capture_output=True, text=True)
    assert "ZsuError" in done.stderr
    assert "cannot write this file" in done.stderr
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["audit.html"]


def test_names_with_dollars_are_drawn(tmp_path):
    knows, blind = Reads().eval(), Reads(blind=[1]).eval()
    small_report({"$x_{": knows, "a$b": blind}, [blind, blind, Reads(blind=[1, 2]).eval()]).save(tmp_path / "a.html")
    assert "a$b" in (tmp_path / "a.html").read_text()
    small_report({"same": blind}, [blind] * 3).save(tmp_path / "b.html")  # bands without width: nothing to draw
    assert "half-widths" not in (tmp_path / "b.html").read_text()
