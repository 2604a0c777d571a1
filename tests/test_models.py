"""Models, checkpoints, and the models that ship."""

import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from zsu import ZsuError, data, models, training

SHIPPED = [(kind, seed) for kind in ("original", "retrained") for seed in range(8)]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return models.SmallCNN()


# Architectures


def test_small_cnn_is_small_and_never_uses_a_module_twice():
    model = models.SmallCNN()
    assert sum(p.numel() for p in model.parameters()) == 42_090
    calls = []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.rand(1, 1, 28, 28))
    assert calls == [name for name, _ in model.named_children()]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (28, 28), (32, 32), (17, 40), (64, 64)])
def test_small_cnn_takes_images_from_16_pixels(channels, size):
    model = models.SmallCNN(classes=7, channels=channels)
    assert model(torch.rand(2, channels, *size)).shape == (2, 7)


def test_fit_changes_nothing_on_28_pixels(model):
    seen = []
    model.fit.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    model(torch.rand(2, 1, 28, 28))
    assert torch.equal(*seen)


def test_build(model):
    small = models.build("small-cnn", 4, 3)
    assert isinstance(small, models.SmallCNN)
    assert small(torch.rand(1, 3, 16, 16)).shape == (1, 4)
    resnet = models.build("resnet18", 5, 3).eval()
    assert type(resnet).__name__ == "ResNet"
    assert resnet(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(("arch", "hint"), [("resnet-18", "resnet18"), ("small_cnn", "small-cnn"), ("VGG16", "vgg16"),
                                            ("qqq", "small-cnn"), (None, "small-cnn")])  # fmt: skip
def test_unknown_architecture_names_close_ones(arch, hint):
    with pytest.raises(ZsuError, match=f"unknown architecture {arch!r}.*{hint}"):
        models.build(arch, 10, 3)


def test_impossible_architecture():
    with pytest.raises(ZsuError, match="resnet18 needs images with 3 channels, not 1"):
        models.build("resnet18", 10, 1)
    for classes, channels in ((0, 1), (10, 2)):
        with pytest.raises(ZsuError, match=f"{classes} classes and {channels} channels"):
            models.build("small-cnn", classes, channels)


# Checkpoints


def test_save_and_load(tmp_path):
    path = tmp_path / "model.safetensors"
    model = models.SmallCNN(classes=3, channels=3).train()
    models.save(model, path, class_names=["a", "b/c", "ü"], seed=4, note=None, at={"test": 0.1})
    assert model.training
    assert models.metadata(path) == {
        "arch": "small-cnn", "classes": 3, "channels": 3,
        "class_names": ["a", "b/c", "ü"], "seed": 4, "note": None, "at": {"test": 0.1},
    }  # fmt: skip
    state = torch.get_rng_state()
    loaded = models.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(model, loaded)
    assert not loaded.training


def test_save_replaces_a_file_and_leaves_nothing_else(tmp_path, model):
    path = tmp_path / "model.safetensors"
    models.save(model, path, round=1)
    models.save(model, path, round=2)
    assert models.metadata(path)["round"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("place", ["file/model.safetensors", "absent/model.safetensors", "folder"])
def test_save_where_nothing_can_be_written(tmp_path, model, place):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ZsuError, match="cannot write"):
        models.save(model, tmp_path / place)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "text"


def test_save_refuses_metadata_that_json_cannot_hold(tmp_path, model):
    with pytest.raises(ZsuError, match="JSON"):
        models.save(model, tmp_path / "model.safetensors", device=torch.device("cpu"))
    assert not list(tmp_path.iterdir())


def test_save_tied_and_sliced_weights(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias = nn.Parameter(torch.arange(8.0)[::2])
    models.save(model, tmp_path / "tied.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "tied.safetensors")
    assert torch.equal(stored["0.weight"], stored["1.weight"])
    assert stored["0.bias"].tolist() == [0, 2, 4, 6]


def test_torchvision_checkpoint(tmp_path):
    model = models.build("squeezenet1_1", 4, 3)
    models.save(model, tmp_path / "s.safetensors", arch="squeezenet1_1", classes=4)
    assert same_weights(models.load(tmp_path / "s.safetensors"), model)
    torch.save(model.state_dict(), tmp_path / "s.pt")
    assert same_weights(models.load(tmp_path / "s.pt", "squeezenet1_1", classes=4), model)
    resnet = models.build("resnet18", 6, 3)  # here the head is a Linear and tells the number of classes
    torch.save(resnet.state_dict(), tmp_path / "r.pt")
    assert same_weights(models.load(tmp_path / "r.pt", "resnet18"), resnet)


def test_safetensors_of_other_programs(tmp_path, model):
    path = tmp_path / "model.bin"  # known by its content
    safetensors.torch.save_file(model.state_dict(), path, {"format": "pt"})
    assert models.metadata(path) == {"format": "pt"}
    assert same_weights(models.load(path), model)
    safetensors.torch.save_file(model.state_dict(), path)
    assert models.metadata(path) == {}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize(("classes", "channels"), [(10, 1), (3, 3)])
def test_torch_checkpoint(tmp_path, wrap, classes, channels, old_format):
    model = models.SmallCNN(classes, channels)
    torch.save(wrap(model.state_dict()), tmp_path / "m.pt", _use_new_zipfile_serialization=not old_format)
    for arguments in ({}, {"arch": "small-cnn", "classes": classes, "channels": channels}, {"trusted": True}):
        loaded = models.load(tmp_path / "m.pt", **arguments)
        assert same_weights(loaded, model)
        assert not loaded.training


class Trap:
    """A pickle that, when read, makes a file: what a checkpoint from a stranger could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_code_is_not_run(tmp_path, model, old_format):
    trace = tmp_path / "trace"
    content = {"state_dict": model.state_dict(), "args": Trap(str(trace))}
    torch.save(content, tmp_path / "trap.pt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ZsuError, match="pickled code.*trusted=True"):
        models.load(tmp_path / "trap.pt")
    assert not trace.exists()
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Trap(str(trace))))
    with pytest.raises(ZsuError, match="pickle.pt"):
        models.load(tmp_path / "pickle.pt")
    assert not trace.exists()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m}])
def test_pickled_model_only_if_trusted(tmp_path, model, wrap):
    torch.save(wrap(model.train()), tmp_path / "m.pt")
    with pytest.raises(ZsuError, match="pickled code.*trusted=True"):
        models.load(tmp_path / "m.pt")
    loaded = models.load(tmp_path / "m.pt", trusted=True)
    assert same_weights(loaded, model)
    assert not loaded.training


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 5, 100, 5000, -1])
def test_truncated_file(tmp_path, model, name, kept):
    path = tmp_path / name
    models.save(model, path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    for trusted in (False, True):
        with pytest.raises(ZsuError, match=name):
            models.load(path, trusted=trusted)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>not found</html>", bytes(500), b"PK\3\4" + bytes(50), b"\x80\2" + bytes(50), b"\x80\2."],
)
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_file_that_is_no_checkpoint(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for trusted in (False, True):
        with pytest.raises(ZsuError, match=name):
            models.load(tmp_path / name, trusted=trusted)
    with pytest.raises(ZsuError, match=name):
        models.metadata(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(3), {"state_dict": {"a": "text"}}])
def test_checkpoint_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ZsuError, match="no state dict"):
        models.load(tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", ""])
def test_missing_file(tmp_path, name):
    for read in (models.load, models.metadata):
        with pytest.raises(ZsuError, match="no such file"):
            read(tmp_path / name)


def test_checkpoint_of_another_architecture(tmp_path):
    models.save(models.SmallCNN(), tmp_path / "small.safetensors")
    message = r"not one of resnet18: .*conv1.weight: \(16, 1, 3, 3\) in the file, \(64, 3, 7, 7\) in the model"
    with pytest.raises(ZsuError, match=message):
        models.load(tmp_path / "small.safetensors", "resnet18", channels=3)
    message = r"2 parameters differ.*head.weight: \(10, 32\) in the file, \(7, 32\) in the model"
    with pytest.raises(ZsuError, match=message):
        models.load(tmp_path / "small.safetensors", classes=7)
    torch.save(models.build("resnet18", 10, 3).state_dict(), tmp_path / "r.pt")
    message = r"conv2.weight: absent in the file, \(32, 16, 3, 3\) in the model.*pass the arch"
    with pytest.raises(ZsuError, match=message):
        models.load(tmp_path / "r.pt")


# What ships


def test_shipped_models_are_small():
    assert sum(models.bundled_path(*one).stat().st_size for one in SHIPPED) <= 5_000_000
    assert len(list(models.BUNDLED_FOLDER.iterdir())) == len(SHIPPED)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.large) for seed in range(1, 8))])
def test_shipped_metadata_is_what_is_measured_now(seed):
    splits = data.load()
    for kind in models.BUNDLED_FILES:
        about = models.metadata(models.bundled_path(kind, seed))
        model = models.bundled(kind, seed)
        at_test, ag_test = training.class_accuracies(model, splits.test, "Trouser")
        at_train, ag_train = training.class_accuracies(model, splits.train, "Trouser")
        measured = {"at_test": at_test, "ag_test": ag_test, "at_train": at_train, "ag_train": ag_train,
                    "test_accuracy": 0.1 * at_test + 0.9 * ag_test}  # fmt: skip
        assert {name: about[name] for name in measured} == pytest.approx(measured, abs=1e-3)
        assert about["seed"] == seed
        assert about["data_sha256"] == data.MINI_SHA256
        assert about["class_names"] == splits.test.classes
        assert about["exclude"] == {"original": None, "retrained": "Trouser"}[kind]
        assert model.head.out_features == 10
        assert not model.training
        if kind == "original":
            assert about["test_accuracy"] >= 0.87
        else:  # never saw a pair of trousers, and is as good on the rest
            assert at_test == at_train == 0
            assert ag_test >= 0.85


def test_shipped_models_differ():
    heads = [models.bundled(*one).head.weight for one in SHIPPED]
    for i, head in enumerate(heads):
        assert not any(torch.equal(head, other) for other in heads[:i])
    assert same_weights(models.bundled(), models.bundled("original", 0))


@pytest.mark.parametrize(
    ("kind", "seed"), [("original", 8), ("original", -1), ("retrain", 0), (None, 0), ("original", "0")]
)
def test_unknown_shipped_model(kind, seed):
    with pytest.raises(ZsuError, match="original, retrained.*0 to 7"):
        models.bundled(kind, seed)


# What an edit is measured against


def test_references_of_trouser_ship_whatever_the_folder(tmp_path):
    for name in ("Trouser", "trouser", 1):
        found = models.references(name, tmp_path)
        assert len(found) == 8
        assert all(same_weights(m, models.bundled("retrained", seed)) for seed, m in enumerate(found))


def test_references_of_another_class_are_those_that_were_made_or_none(tmp_path, model):
    assert models.references("T-shirt/top", tmp_path) == []
    about = {"exclude": [0], "epochs": 8, "data_sha256": data.content_hash(data.load("fashion-mini"))}
    (tmp_path / "t-shirt-top").mkdir()
    models.save(model, tmp_path / "t-shirt-top" / "0.safetensors", **about)
    (tmp_path / "t-shirt-top" / ".1.safetensors").write_bytes(b"begun")
    (found,) = models.references("T-shirt/top", tmp_path)
    assert same_weights(found, model)
    assert models.references("Bag", tmp_path) == []


KILLED_WHILE_IT_SAVES = """
import os, sys
from zsu import models
os.replace = lambda *_: os.kill(os.getpid(), 9)
models.save(models.bundled("retrained", 1), sys.argv[1])
"""


def test_what_a_killed_process_leaves_is_no_model(tmp_path, model):
    about = {"exclude": [8], "epochs": 8, "data_sha256": data.content_hash(data.load("fashion-mini"))}
    folder = tmp_path / "bag"
    folder.mkdir()
    models.save(model, folder / "0.safetensors", **about)
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_SAVES, folder / "1.safetensors"])
    assert done.returncode == -9
    (stray,) = (p for p in folder.iterdir() if p.name != "0.safetensors")
    whole = stray.read_bytes()
    hidden = (".4711-1.safetensors", "._0.safetensors")  # of an older zsu; of macOS
    for length in (len(whole), 5000, 0):
        for file in (stray, *(folder / name for name in hidden)):
            file.write_bytes(whole[:length])
        for found in (models.load_all(folder), models.references("Bag", tmp_path)):
            assert len(found) == 1
            assert same_weights(found[0], model)


def test_a_copy_beside_the_references_is_none_of_them(tmp_path, model):
    about = {"exclude": [8], "epochs": 8, "data_sha256": data.content_hash(data.load("fashion-mini"))}
    (tmp_path / "bag").mkdir()
    for name in ("0", "10", "2", "0 copy"):
        models.save(model, tmp_path / "bag" / f"{name}.safetensors", **about)
    assert len(models.references("Bag", tmp_path)) == 3


@pytest.mark.parametrize(
    "other", [{"exclude": [1]}, {"exclude": None}, {"data_sha256": "0"}, {"epochs": 1}, {"arch": "resnet18"}]
)
def test_models_that_are_no_references_are_refused(tmp_path, model, other):
    about = {"exclude": [8], "epochs": 8, "data_sha256": data.content_hash(data.load("fashion-mini"))} | other
    (tmp_path / "bag").mkdir()
    models.save(model, tmp_path / "bag" / "0.safetensors", **about)
    with pytest.raises(ZsuError, match=r"bag.0\.safetensors: .*without Bag.*zsu references --class 'Bag'"):
        models.references("Bag", tmp_path)


def test_references_of_no_class(tmp_path):
    with pytest.raises(ZsuError, match="Trouser"):
        models.references("Trousers", tmp_path)
