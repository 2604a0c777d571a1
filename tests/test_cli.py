"""The command line: what it prints and writes, and that bad input ends in one line and exit code 2."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

import zsu
from zsu import Paths, cli, data, models
from zsu.forgetting.perturb import Patch


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `zsu WORDS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["zsu", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def refused(capsys, *words: str) -> str:
    """The one line that bad input gets."""
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith("zsu: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def folder(tmp_path):
    """Two classes of 16 x 16 pictures, as real PNG files: bright above, or bright below."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 12)):
        for cls in ("up", "down"):
            (tmp_path / "images" / split / cls).mkdir(parents=True)
            for i in range(n):
                picture = rng.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                picture[:8] += np.uint8(150) * (cls == "up")
                picture[8:] += np.uint8(150) * (cls == "down")
                Image.fromarray(picture).save(tmp_path / "images" / split / cls / f"{i}.png")
    return tmp_path / "images"


def test_forget_then_audit(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "forget", "--class", "trouser")
    assert code == 0
    table = numbers(out)
    assert list(table) == ["original", "retrain", "paths", "lra-npp", "head-npp", "mask", "bias-shift", "random"]
    assert table["paths"]["at_test"] == "0.000"
    assert re.match("tier T1; budget: edges 5, .*; samples not recognised: 1$", out.splitlines()[-1])
    assert "audit" in err  # the progress bar
    file = tmp_path / "forget-trouser-paths.safetensors"
    about = Patch.load(file).metadata
    assert (about["class"], about["target"], about["unseen"]) == ("Trouser", [1], 36)
    (budget,) = about["budget"]
    assert (budget["edges"], budget["available"], budget["edges_enough"]) == (5, 12, False)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    words = ["audit", "--class", "1", "--patch", str(file), "--measure", "accuracy", "--out", "audit.html"]
    code, again, _ = run(capsys, *words)
    assert code == 0
    found = numbers(again)
    assert list(found) == ["original", "retrain", "paths", "mask", "bias-shift", "random", "zeroed"]
    assert found["paths"] == {column: table["paths"][column] for column in found["paths"]}
    assert "<title>Audit: forgetting Trouser</title>" in (tmp_path / "audit.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {file.name, "audit.html", "audit.csv", "audit.json"}
    assert "end the file in .html" in refused(capsys, "audit", "--class", "1", "--patch", str(file), "--out", "a.pdf")


@pytest.mark.large  # beside eight references
def test_an_audit_without_measures_named_takes_all(capsys, tmp_path):
    zsu.forget(models.bundled(), data.samples(data.load("fashion-mini").test, 1), 1).patch.save(tmp_path / "p.patch")
    code, out, _ = run(capsys, "audit", "--class", "1", "--patch", str(tmp_path / "p.patch"))
    assert code == 0
    assert {"relearn", "cmia", "ou", "probe_head", "at_int8"} <= set(numbers(out)["paths"])


def numbers(out):
    """Of an audit's text: by model the text of each number."""
    head, *lines = out.splitlines()
    names = head.split()[:-2]  # the last column is "fooled by"
    rows = [line.split() for line in lines[: lines.index("")]]
    rows = [row for row in rows if row[0] not in ("seconds", "weights_changed", "memory")]  # which have no band
    return {name: {row[0]: row[1 + i] for row in rows} for i, name in enumerate(names) if name != "band"}


def test_apply_diff_and_revert_are_exact_and_refuse_another_model(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = models.bundled("original")
    patch = zsu.forget(original, data.samples(data.load("fashion-mini").test, "Bag"), 8).patch
    patch.save("bag.safetensors")
    assert run(capsys, "apply", "--patch", "bag.safetensors", "--out", "edited.safetensors")[0] == 0
    expected = patch.apply(models.bundled("original")).state_dict()
    edited = models.load("edited.safetensors").state_dict()
    assert all(torch.equal(edited[name], t) for name, t in expected.items())
    assert models.metadata("edited.safetensors")["class_names"] == data.FASHION_CLASSES
    words = ["--model", "edited.safetensors", "--patch", "bag.safetensors"]
    code, out, _ = run(capsys, "diff", *words)
    assert code == 0
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert lines["method"] == ["paths"]
    for name, change in patch.changes.items():
        assert int(lines[name][0]) == len(change.index)
        assert float(lines[name][4]) == pytest.approx(len(change.index) / expected[name].numel(), rel=1e-3)
    assert run(capsys, "revert", *words, "--out", "was.safetensors")[0] == 0
    was = models.load("was.safetensors").state_dict()
    assert all(torch.equal(was[name], t) for name, t in original.state_dict().items())
    before = sorted(tmp_path.iterdir())
    message = refused(capsys, "apply", *words, "--out", "twice.safetensors")
    assert zsu.perturb.model_hash(original)[:12] in message
    assert zsu.perturb.model_hash(edited)[:12] in message
    assert "overwritten" in refused(capsys, "apply", "--patch", "bag.safetensors", "--out", "bag.safetensors")
    other = str(models.bundled_path("original", 1))
    assert "does not hold" in refused(
        capsys, "revert", "--model", other, "--patch", "bag.safetensors", "--out", "x.safetensors"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_an_audit_leaves_out_what_a_patch_from_python_has_seen(capsys, tmp_path):
    file = str(tmp_path / "p.safetensors")
    test, original = data.load("fashion-mini").test, models.bundled("original")
    zsu.forget(original, data.samples(test, "Trouser", 100), 1, "mask").patch.save(file)
    only = ["--measure", "accuracy"]
    code, out, err = run(capsys, "audit", "--class", "Trouser", "--patch", file, *only)
    assert code == 0
    assert "not known" not in err
    held_out = data.without_samples(test, "Trouser", 100)
    p, y = zsu.evaluation.predict(original, held_out)
    found = float(numbers(out)["original"]["all_test"].strip("*"))
    assert found == pytest.approx(zsu.evaluation.accuracy(p, y), abs=5e-4)
    assert "forgets [1], not 'Bag'" in refused(capsys, "audit", "--class", "Bag", "--patch", file)
    zsu.forget(original, data.samples(test, "Trouser")[5:25], 1, "mask").patch.save(file)
    _, _, err = run(capsys, "audit", "--class", "Trouser", "--patch", file, *only)
    assert "which images the edit has seen is not known" in err


def test_several_classes_and_methods_that_need_more_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "forget", "--class", "Bag", "--class", "Trouser", "--method", "mask")
    assert code == 0
    assert Patch.load("forget-trouser-bag-mask.safetensors").metadata["target"] == [1, 8]
    table = numbers(out)
    assert float(table["mask"]["at_test"]) == 0.0
    assert float(table["original"]["at_test"]) > 0.9
    words = ["audit", "--class", "Trouser", "--class", "Bag", "--patch", "forget-trouser-bag-mask.safetensors"]
    code, again, _ = run(capsys, *words, "--measure", "accuracy")
    assert numbers(again)["mask"]["ag_test"] == table["mask"]["ag_test"]
    assert "not 'Trouser'" in refused(capsys, "audit", "--class", "Trouser", *words[-2:])
    both = ["--class", "Bag", "--class", "Trouser"]
    assert "several classes" in refused(capsys, "forget", *both, "--method", "paths+retained")


@pytest.mark.parametrize("method", ["svd", "paths+retained"])
def test_methods_that_need_retained_samples_get_them(capsys, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    audited, forgotten, forget = [], [], zsu.forget
    monkeypatch.setattr(zsu, "audit", lambda *args, **options: audited.append(args[1]))
    monkeypatch.setattr(zsu, "forget", lambda *args, **options: forgotten.append(args[3]) or forget(*args, **options))
    code, out, _ = run(capsys, "forget", "--class", "Sandal", "--method", method)
    assert code == 0
    assert "tier T3" in out
    assert Patch.load(f"forget-sandal-{method.replace('+', '-')}.safetensors").metadata["retained"] == 180
    assert forgotten == list(audited[0]) == [method, "paths", "lra-npp", "head-npp", "mask", "bias-shift", "random"]


def test_noise_has_options_of_its_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zsu, "audit", lambda *args, **options: None)
    words = ["forget", "--class", "Sandal", "--method", "head-npp", "--k", "3", "--perturbed", "5", "--scale", "2"]
    assert run(capsys, *words, "--perturbation", "gaussian", "--samples", "20")[0] == 0
    about = Patch.load("forget-sandal-head-npp-gaussian.safetensors").metadata
    assert about["samples"] == [20]
    wanted = {"k": 3, "perturbed": 5, "perturbation": "gaussian", "scale": 2.0}
    assert wanted.items() <= about["options"].items()


def test_bench(capsys, tmp_path):
    words = ["--class", "Trouser", "--seeds", "1", "--method", "mask", "--method", "paths", "--out", str(tmp_path)]
    code, out, err = run(capsys, "bench", *words)
    assert code == 0
    assert "sweep" in err  # the progress bar
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["retrain", "paths", "mask", "original"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scoreboard.csv", "scoreboard.png", "settings.json", "tasks"]
    assert "unknown methods" in refused(capsys, "bench", "--method", "magic", "--out", str(tmp_path))


def test_reproduce_refuses_what_is_not_there(capsys, tmp_path):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "mufac-vit" in refused(capsys, "reproduce", "mnist-vit", *words)
    assert str(tmp_path) in refused(capsys, "reproduce", "mufac-vit", *words)
    assert not (tmp_path / "out").exists()


def test_a_warning_is_one_line():
    """In a process of its own, as a user has it."""
    words = ["paths", "--class", "Trouser", "--k", "1000000", "--show", "0"]
    found = subprocess.run([sys.executable, "-m", "zsu", *words], capture_output=True, text=True)
    assert found.returncode == 0
    assert re.fullmatch(r"zsu: warning: there are only [\d,]+ paths\n", found.stderr)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"zsu {zsu.__version__}\n", "")


def test_a_model_with_other_classes_is_refused(capsys, tmp_path):
    torch.save(models.build("resnet18", 7, 3).state_dict(), tmp_path / "seven.pt")
    words = ["--class", "Trouser", "--model", str(tmp_path / "seven.pt"), "--arch", "resnet18"]
    assert "the model has 7 outputs, the data 10 classes" in refused(capsys, "paths", *words)


def test_paths(capsys, tmp_path):
    for name in ("paths.npz", "paths.csv"):
        code, out, _ = run(
            capsys, "paths", "--class", "Trouser", "--k", "50", "--show", "3", "--out", str(tmp_path / name)
        )
        assert code == 0
        assert out.startswith("Trouser: Paths(50 paths, ")
        assert out.count("\n") == 4
        assert "head:1  fc:" in out
    found = Paths.load(tmp_path / "paths.npz")
    frame = pd.read_csv(tmp_path / "paths.csv")
    assert len(found) == len(frame) == 50
    assert frame["probability"].tolist() == pytest.approx(found.probability.tolist())
    _, contrast, _ = run(capsys, "paths", "--class", "Trouser", "--contrast")
    assert contrast.startswith("Trouser: Paths(100 paths, ")
    assert "end the file in .csv or .npz" in refused(capsys, "paths", "--class", "Trouser", "--out", "paths.txt")
    assert "k is 0" in refused(capsys, "paths", "--class", "Trouser", "--k", "0")
    assert "unknown rule 'lrp'" in refused(capsys, "paths", "--class", "Trouser", "--rules", "lrp")


def test_train_and_forget_ones_own_images(capsys, folder, tmp_path):
    for name, extra in (("full", []), ("reference/a", ["--exclude", "up"]), ("reference/b", ["--exclude", "UP"])):
        (tmp_path / "reference").mkdir(exist_ok=True)
        words = [
            "--data",
            str(folder),
            "--size",
            "16",
            "--epochs",
            "30",
            "--out",
            str(tmp_path / f"{name}.safetensors"),
        ]
        code, out, _ = run(capsys, "train", *words, *extra)
        assert code == 0
        assert "test accuracy" in out
    assert models.metadata(tmp_path / "full.safetensors")["class_names"] == ["down", "up"]
    code, out, _ = run(
        capsys, "forget", "--class", "up", "--model", str(tmp_path / "full.safetensors"), "--data", str(folder),
        "--size", "16", "--samples", "6", "--out", str(tmp_path / "patch.safetensors"), "--method", "mask",
        "--references", str(tmp_path / "reference"),
    )  # fmt: skip
    assert code == 0
    table = numbers(out)
    assert (table["original"]["at_test"], table["mask"]["at_test"]) == ("1.000*", "0.000")


def test_references_are_made_once_and_the_audit_takes_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "references", "--class", "bag", "--number", "2", "--epochs", "1")
    assert code == 0
    assert out == "2 models without Bag in references/bag\n"
    folder = tmp_path / "references" / "bag"
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert sorted(before) == ["0.safetensors", "1.safetensors", "settings.json"]
    assert models.metadata(folder / "1.safetensors")["exclude"] == [8]
    (folder / "0.safetensors").unlink()
    assert run(capsys, "references", "--class", "bag", "--number", "2", "--epochs", "1")[0] == 0
    assert (folder / "1.safetensors").stat().st_mtime_ns == before["1.safetensors"]
    assert (folder / "0.safetensors").exists()
    assert "epochs was 1, is 2" in refused(capsys, "references", "--class", "bag", "--epochs", "2")
    test, original = data.load("fashion-mini").test, models.bundled("original")
    for name in ("Bag", "Coat"):
        target = data.class_index(test, name)
        zsu.forget(original, data.samples(test, name), target, "mask").patch.save(
            f"forget-{name.lower()}-mask.safetensors"
        )
    words = ["audit", "--class", "bag", "--patch", "forget-bag-mask.safetensors", "--measure", "accuracy"]
    code, out, _ = run(capsys, *words, "--references", "references/bag")
    assert code == 0
    assert numbers(out)["retrain"]["at_test"] == "0.000"
    assert "without Bag for 8 epochs" in refused(capsys, *words)  # found there, and no references of this model
    words = ["audit", "--class", "Coat", "--patch", "forget-coat-mask.safetensors", "--references", "references/bag"]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "'reference 0' predicts the forgotten class" in err


def test_data_says_what_is_there(capsys):
    code, out, _ = run(capsys, "data")
    assert code == 0
    assert "12,000 train, 2,000 test" in out
    assert "Trouser" in out


@pytest.mark.parametrize("command", [c.callback.__name__ for c in cli.app.registered_commands])
def test_help_has_an_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: zsu {command}" in out


def test_bad_input_is_one_line_and_nothing_is_written(capsys, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert "Trouser" in refused(capsys, "forget", "--class", "hat")
    assert "lra-npp" in refused(capsys, "forget", "--class", "Trouser", "--method", "magic")
    assert "k is 0. pass an integer" in refused(capsys, "forget", "--class", "Trouser", "--k", "0")
    assert "nowhere.pt" in refused(capsys, "forget", "--class", "Trouser", "--model", "nowhere.pt")
    assert "--class" in refused(capsys, "forget")
    assert "fashion-mini" in refused(capsys, "data", "no-such-data")
    assert "writable" in refused(capsys, "train", "--out", str(folder / "train" / "up" / "0.png" / "x.safetensors"))
    assert "writable" in refused(
        capsys, "forget", "--class", "Trouser", "--out", str(folder / "train" / "up" / "0.png" / "x.safetensors")
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_that_are_refused(capsys, tmp_path):
    pickled, truncated, other = tmp_path / "whole.pt", tmp_path / "cut.safetensors", tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2), pickled)
    truncated.write_bytes(models.bundled_path("original").read_bytes()[:1000])
    torch.save(torch.nn.Linear(2, 2).state_dict(), other)
    for file in (pickled, truncated, other):
        assert str(file) in refused(capsys, "forget", "--class", "Trouser", "--model", str(file))


def test_a_checkpoint_of_another_program_through_all_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {f"module.{name}": t.half() for name, t in models.bundled().state_dict().items()}
    torch.save({"model": state, "epoch": 3}, "m.pt")
    own = ["--model", "m.pt", "--classes", "10"]
    code, _, err = run(capsys, "forget", "--class", "Trouser", "--method", "mask", *own, "--out", "p.safetensors")
    assert code == 0, err
    assert "m.pt: names without 'module.'; float16 as float32" in err
    for words in (["audit", "--class", "Trouser", *own, "--measure", "accuracy"], ["diff", "--model", "m.pt"],
                  ["apply", "--model", "m.pt", "--out", "edited.safetensors"],
                  ["revert", "--model", "edited.safetensors", "--out", "back.safetensors"]):  # fmt: skip
        code, _, err = run(capsys, *words, "--patch", "p.safetensors")
        assert code == 0, err
    found = safetensors.torch.load_file("back.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert "not one of small-cnn" in refused(capsys, "paths", "--class", "1", "--model", "m.pt", "--classes", "7")
    torch.save({"other.weight": torch.zeros(2, 2)}, "other.pt")
    assert r"the checkpoint has no head." in refused(capsys, "diff", "--model", "other.pt", "--patch", "p.safetensors")


def test_one_class_only(capsys, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / split / "cat" / "0.png")
    assert "one class" in refused(capsys, "data", str(tmp_path))


def test_the_installed_command_runs():
    shown = subprocess.run([sys.executable, "-m", "zsu", "--help"], capture_output=True, text=True, check=True)
    assert "forget" in shown.stdout
