"""The paper's five experiments, on tiny data in each format, with thin and with real architectures, on small images."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision import datasets, models
from torchvision.models.vision_transformer import interpolate_embeddings

from zsu import ZsuError, data, reproduce, training
from zsu import models as checkpoints

TARGET = {"mnist-cnn": 1, "cifar10-resnet50": 9, "cifar100-resnet50": 0, "imagenet-mini-vgg16": 1, "mufac-vit": 0}
COUNTS = {"train": (14, 6), "test": (7, 2)}  # images of the class to forget, and of each of three others
ARRAYS = {"mnist-cnn": (10, (28, 28)), "cifar10-resnet50": (10, (32, 32, 3)), "cifar100-resnet50": (100, (32, 32, 3))}
FOLDERS = ["n01440764", "n01734418", "n02084071", "n03888257"]


def refuse(*args, **kwargs):
    raise OSError("not to be called")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """As on a machine without network: no ImageNet weights."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(models._api, "load_state_dict_from_url", refuse)


@pytest.fixture
def row(monkeypatch):
    """Makes a row learn something from a few images: smaller batches, a greater learning rate."""

    def change(name: str, batch_size: int = 8, lr: float = 1e-3) -> str:
        changed = reproduce.ROWS[name]._replace(batch_size=batch_size, lr=lr)
        monkeypatch.setitem(reproduce.ROWS, name, changed)
        return name

    return change


# --- data sets, written as the real ones are ------------------------------------------------------------------


def tiny(part: str, target: int, classes: int, shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the class and three others; each class has its own brightness, with a little noise."""
    others = [c for c in range(classes) if c != target][:3]
    forget, kept = COUNTS[part]
    labels = np.array([target] * forget + others * kept)
    level = {target: 220} | dict(zip(others, (20, 80, 140), strict=True))
    noise = np.random.default_rng(seed + len(part)).integers(0, 30, (len(labels), *shape))
    bright = np.array([level[c] for c in labels]).reshape(-1, *[1] * len(shape))  # (N,) -> (N, 1, ...)
    return (bright + noise).astype(np.uint8), labels


def write(name: str, folder: Path, monkeypatch) -> Path:
    """The data of a row, in its own format."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "mnist-cnn":
        write_idx(folder)
    elif name.startswith("cifar"):
        write_cifar(name, folder, monkeypatch)
    elif name == "mufac-vit":
        write_mufac(folder)
    else:
        for part, place in (("train", "train"), ("test", "val")):
            for i, (image, label) in enumerate(zip(*tiny(part, 1, 4, (40, 48, 3)), strict=True)):
                jpeg(image, folder / place / FOLDERS[label] / f"{i}.JPEG")
    return folder


def write_idx(folder: Path, seed: int = 0) -> None:
    for part, prefix in data.IDX_PREFIX.items():
        images, labels = tiny(part, 1, 10, (28, 28), seed)
        for array, what in ((images, "images-idx3"), (labels.astype(np.uint8), "labels-idx1")):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            with gzip.open(folder / f"{prefix}-{what}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())


def write_cifar(name: str, folder: Path, monkeypatch) -> None:
    """Pickled batches; torchvision refuses files with other checksums than the real ones, so it is told these."""
    kind, key, names = {
        "cifar10-resnet50": (datasets.CIFAR10, "labels", "label_names"),
        "cifar100-resnet50": (datasets.CIFAR100, "fine_labels", "fine_label_names"),
    }[name]
    classes, shape = ARRAYS[name]
    place = folder / kind.base_folder
    place.mkdir()

    def put(file: str, content: dict) -> str:
        raw = pickle.dumps(content)
        (place / file).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    for part, attribute in (("train", "train_list"), ("test", "test_list")):
        images, labels = tiny(part, TARGET[name], classes, shape)
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)  # (N, 32, 32, 3) -> (N, 3 * 32 * 32)
        files = [file for file, _ in getattr(kind, attribute)]
        chunks = zip(files, np.array_split(rows, len(files)), np.array_split(labels, len(files)), strict=True)
        listed = [[file, put(file, {"data": x, key: y.tolist()})] for file, x, y in chunks]
        monkeypatch.setattr(kind, attribute, listed)
    checksum = put(kind.meta["filename"], {names: [f"class {c}" for c in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})


def write_mufac(folder: Path) -> None:
    for part in ("train", "test"):
        images, labels = tiny(part, 0, 8, (40, 40, 3))
        names = [f"F{i:04}_AGE_D_18_{'abcdefgh'[c]}1.jpg" for i, c in enumerate(labels)]
        for image, file in zip(images, names, strict=True):
            jpeg(image, folder / f"{part}_images" / file)
        table = pd.DataFrame({"family_id": "F", "person_id": "D", "age_class": list("abcdefgh"), "image_path": ""})
        table = table.iloc[labels].assign(image_path=names)
        table.to_csv(folder / f"custom_{part}_dataset.csv", index=False)


def jpeg(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


@pytest.mark.parametrize("name", reproduce.ROWS)
def test_loaders_read_each_format(name, tmp_path, monkeypatch):
    row = reproduce.ROWS[name]
    size = 28 if name == "mnist-cnn" else 32
    splits = row.load(write(name, tmp_path, monkeypatch), row.transform(size))
    assert data.class_index(splits.train, row.target) == TARGET[name]
    for part in ("train", "test"):
        split = getattr(splits, part)
        labels = data.targets(split)
        x, y = next(data.batches(split, len(split)))
        assert torch.equal(y, labels)
        assert tuple(x.shape) == (sum(COUNTS[part]) + 2 * COUNTS[part][1], 1 if size == 28 else 3, size, size)
        assert int((labels == TARGET[name]).sum()) == COUNTS[part][0]
        dark, bright = x[labels != TARGET[name]], x[labels == TARGET[name]]
        assert dark.amax() < bright.amin()  # the images belong to their labels
        if size == 32:  # standardised as ImageNet is
            red = (bright[:, 0] * 0.229 + 0.485) * 255
            assert 215 < red.min() <= red.max() <= 255


def test_imagenet_images_are_cropped_to_their_middle():
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = 255  # the middle square is white
    assert reproduce.middle(56)(Image.fromarray(image)).gt(0).all()
    assert tuple(reproduce.middle(56)(Image.fromarray(image)).shape) == (3, 56, 56)


def test_mufac_that_is_none_is_refused(tmp_path):
    row = reproduce.ROWS["mufac-vit"]
    with pytest.raises(ZsuError, match="no table of MUFAC"):
        row.load(tmp_path, row.transform(32))
    write_mufac(tmp_path)
    path = tmp_path / "custom_test_dataset.csv"
    path.write_text(path.read_text().replace(",b,", ",x,"))
    with pytest.raises(ZsuError, match=r"age classes \['x'\]"):
        row.load(tmp_path, row.transform(32))
    path.write_text("image_path,age\n")
    with pytest.raises(ZsuError, match="no table of MUFAC"):
        row.load(tmp_path, row.transform(32))


# --- the five rows --------------------------------------------------------------------------------------------


def thin(arch: str, num_classes: int = 1000, image_size: int = 224) -> nn.Module:
    """The architectures of `models.get_model` with few layers and channels, and heads as wide as the rows need."""
    if arch == "resnet50":
        return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes, width_per_group=4)
    if arch == "vit_b_16":
        return models.VisionTransformer(image_size, 16, 2, 4, 640, 640, num_classes=num_classes)
    hidden = [nn.Linear(16 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 512), nn.ReLU(), nn.Dropout()]
    parts = {"features": models.vgg.make_layers([8, "M", 8, "M", 16, "M", 16, "M", 16, "M"]),
             "avgpool": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten(),
             "classifier": nn.Sequential(*hidden, nn.Linear(512, num_classes))}  # fmt: skip
    return nn.Sequential(OrderedDict(parts))


def resnet_weights() -> dict[str, torch.Tensor]:
    """In place of ImageNet weights: random ones, with statistics of BatchNorm that fit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.get_model("resnet50")
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            model(torch.randn(32, 1, 1, 1) + 0.1 * torch.randn(32, 3, 32, 32))
    return model.state_dict()


# Image size, batch size, learning rate, epochs, seeds, methods: enough to learn something from 32 images. On ResNet-50
# "lra-npp" tries many budgets, which takes minutes, and each method on VGG-16, with 134 million weights, some seconds.
SHORT = {
    "mnist-cnn": (28, 8, 1e-3, 1, 2, reproduce.METHODS),
    "cifar10-resnet50": (32, 8, 3e-4, 6, 2, ("paths", "head-npp", "mask")),
    "cifar100-resnet50": (32, 8, 3e-4, 10, 1, ("paths", "head-npp", "mask")),
    "imagenet-mini-vgg16": (32, 16, 1e-4, 1, 1, ("lra-npp", "head-npp")),
    "mufac-vit": (32, 16, 1e-4, 1, 1, ("paths", "lra-npp", "head-npp")),
}
THIN = {
    "cifar10-resnet50": (32, 8, 1e-3, 6, 2, ("paths", "head-npp", "mask")),
    "cifar100-resnet50": (32, 8, 1e-3, 10, 1, ("paths", "head-npp", "mask")),
    "imagenet-mini-vgg16": (32, 8, 1e-3, 10, 1, ("lra-npp", "head-npp")),
    "mufac-vit": (32, 16, 1e-3, 2, 1, ("paths", "lra-npp", "head-npp")),
}


@pytest.mark.parametrize("name", THIN)
def test_thin_row_runs_whole_and_resumes(name, row, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "get_model", thin)
    run_row(name, THIN[name], row, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", [n if n == "mnist-cnn" else pytest.param(n, marks=pytest.mark.large) for n in SHORT])
def test_row_runs_whole_and_resumes(name, row, tmp_path, monkeypatch):
    run_row(name, SHORT[name], row, tmp_path, monkeypatch)


def run_row(name, short, row, tmp_path, monkeypatch):
    size, batch_size, lr, epochs, seeds, methods = short
    folder, out = write(name, tmp_path / "data", monkeypatch), tmp_path / "out"
    row(name, batch_size, lr)
    if "resnet" in name:
        weights = resnet_weights()
        monkeypatch.setattr(reproduce, "imagenet_weights", lambda arch: weights)

    def run() -> pd.DataFrame:
        return reproduce.run(name, folder, out, seeds, size, epochs, "cpu", methods, progress=False)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = run()
    scratch = any("trained from scratch" in str(w.message) for w in caught)
    assert scratch == (name in ("imagenet-mini-vgg16", "mufac-vit"))
    assert frame["model"].tolist() == ["original", "retrain", *methods] * seeds
    assert frame["seed"].tolist() == [s for s in range(seeds) for _ in range(len(methods) + 2)]
    assert (frame["note"] == "").all(), frame["note"].tolist()
    assert frame[reproduce.MEASURES].notna().all(axis=None)
    assert (frame.loc[frame["model"].isin(["mask", "retrain"]), ["at_test", "at_train"]] == 0).all(axis=None)
    assert (frame.loc[frame["model"] == "retrain", "seconds"] > 0).all()
    settings = json.loads((out / "settings.json").read_text())
    if name in SHORT and short == SHORT[name]:  # a whole architecture: its checkpoint says what it is
        found = checkpoints.load(out / "original-0.safetensors")
        kept = checkpoints.read_state(out / "original-0.safetensors")[1]
        assert all(torch.equal(t, kept[n]) for n, t in found.state_dict().items())
    changed = frame.loc[frame["model"] == "head-npp", "weights_changed"]
    matrices = [t for t in checkpoints.read_state(out / "original-0.safetensors")[1].values() if t.ndim == 2]
    hidden = name in ("mnist-cnn", "imagenet-mini-vgg16")  # a Linear: its rows, and the class's weights
    each = matrices[-2].shape[1] + 1 if hidden else 1 if name == "mufac-vit" else len(settings["classes"])
    assert changed.between(1, settings["perturbed"] * each).all()
    assert not hidden or (changed > len(settings["classes"]) * settings["perturbed"]).all()

    monkeypatch.setattr(training, "train", refuse)
    monkeypatch.setattr(reproduce, "audit_seed", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pd.testing.assert_frame_equal(run(), frame, check_exact=True)
    text = reproduce.as_text(name, frame)
    at, at_sd, ag, ag_sd = reproduce.ROWS[name].published["lra-npp"]
    for part in (reproduce.PUBLISHED, f"{at:.2f} ± {at_sd:.2f}", f"{ag:.2f} ± {ag_sd:.2f}", *methods):
        assert part in text
    shutil.rmtree(out)  # up to a gigabyte


@pytest.fixture
def mnist(tmp_path, row):
    write_idx(tmp_path)
    row("mnist-cnn")

    def run(out: str = "out", seeds: int = 1, **options):
        options = {"size": 12, "epochs": 1, "methods": ("lra-npp", "mask")} | options
        return reproduce.run("mnist-cnn", tmp_path, tmp_path / out, seeds, device="cpu", progress=False, **options)

    return run


def test_interrupted_run_goes_on_where_it_stopped(mnist, tmp_path, monkeypatch):
    whole = mnist("whole", 2)
    trained, train = [], training.train

    def interrupted(*args, **options):
        trained.append((options["seed"], options["exclude"]))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mnist("out", 2)
    assert not list((tmp_path / "out").glob("audit*"))
    frame = mnist("out", 2)
    assert trained == [(0, None), (0, 1), (1, None), (1, None), (1, 1)]
    columns = ["seed", "model", *reproduce.MEASURES, "js_forget", "weights_changed"]
    pd.testing.assert_frame_equal(frame[columns], whole[columns], check_exact=True)


def test_seeds_can_be_added_but_settings_are_not_mixed(mnist, tmp_path):
    first = mnist()
    assert mnist(seeds=2).head(len(first)).equals(first)
    for changed, text in (
        ({"epochs": 2}, "epochs was 1, is 2"),
        ({"size": 30}, "size was 12, is 30"),
        ({"methods": ("lra-npp",)}, "methods was"),
    ):
        with pytest.raises(ZsuError, match=text):
            mnist(**changed)
    write_idx(tmp_path, seed=1)
    with pytest.raises(ZsuError, match="data was"):
        mnist()
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(ZsuError, match="no JSON"):
        mnist()


def test_images_of_the_class_that_forgetting_saw_are_not_measured(mnist, monkeypatch):
    seen = {}

    def spy(original, x, target, method, **options):
        seen["x"] = x
        return real_forget(original, x, target, method, **options)

    def look(original, forgotten, train, test, *args, **options):
        seen["test"] = torch.cat([x for x, _ in data.batches(test)])
        return real_audit(original, forgotten, train, test, *args, **options)

    real_forget, real_audit = reproduce.forget, reproduce.audit
    monkeypatch.setattr(reproduce, "forget", spy)
    monkeypatch.setattr(reproduce, "audit", look)
    mnist()
    assert len(seen["x"]) == COUNTS["test"][0] - 1
    assert not (seen["x"][:, None] == seen["test"]).flatten(2).all(2).any()  # (n, m, 1, 28, 28) -> (n, m, pixels)


def test_a_method_that_fails_is_a_row_of_nan(mnist):
    with pytest.warns(UserWarning, match="'fine-tune' failed, ZsuError"):
        frame = mnist(methods=("fine-tune", "lra-npp"))
    assert frame["model"].tolist() == ["original", "retrain", "fine-tune", "lra-npp"]
    failed, fine = frame.iloc[2], frame.iloc[3]
    assert failed[reproduce.MEASURES].isna().all()
    assert fine[reproduce.MEASURES].notna().all()
    assert "needs retained samples" in failed["note"]
    assert "Failed: fine-tune, seed 0" in reproduce.as_text("mnist-cnn", frame)


def test_bad_arguments_are_refused(mnist, tmp_path):
    with pytest.raises(ZsuError, match="there is no row 'mnist'.*mnist-cnn"):
        reproduce.run("mnist", tmp_path, tmp_path / "out")
    with pytest.raises(ZsuError, match="seeds is 0"):
        mnist(seeds=0)
    with pytest.raises(ZsuError, match="not complete"):
        reproduce.run("cifar10-resnet50", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("make", "width"), [(thin, 640), pytest.param(models.get_model, 768, marks=pytest.mark.large)])
def test_pretrained_weights_are_taken_but_for_the_head(make, width, monkeypatch):
    monkeypatch.setattr(models, "get_model", make)
    row = reproduce.ROWS["mufac-vit"]
    state = make("vit_b_16", image_size=224).state_dict()
    model = reproduce.build_classifier(row, 8, 32, state).state_dict()
    body = {k: v for k, v in interpolate_embeddings(32, 16, dict(state)).items() if not k.startswith("heads.")}
    assert set(model) - set(body) == {"heads.head.weight", "heads.head.bias"}
    assert all(torch.equal(model[k], v) for k, v in body.items())
    assert model["heads.head.weight"].shape == (8, width)
    assert model["encoder.pos_embedding"].shape == (1, 5, width)  # 2 x 2 patches and the class token


def test_heads_are_those_of_the_architectures():
    with torch.device("meta"):
        for row in reproduce.ROWS.values():
            if row.arch:
                last = list(models.get_model(row.arch).named_parameters())[-2:]
                assert [name for name, p in last] == [n for n in dict(last) if n.startswith(row.head)]
                assert last[0][1].shape[1] >= row.perturbed >= row.k


# --- several processes ----------------------------------------------------------------------------------------

TORCHRUN = """
import sys
from zsu import reproduce
reproduce.ROWS["mnist-cnn"] = reproduce.ROWS["mnist-cnn"]._replace(batch_size=7)  # 4 images for one, 3 for the other
frame = reproduce.run("mnist-cnn", *sys.argv[1:3], 1, 12, 1, "cpu", methods=("mask",), progress=False)
print("rows", None if frame is None else len(frame))
"""


@pytest.mark.large
def test_torchrun_trains_the_model_of_one_process(mnist, row, tmp_path):
    row("mnist-cnn", batch_size=7)
    (tmp_path / "script.py").write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), str(tmp_path), str(tmp_path / "both")]  # fmt: skip
    path = os.pathsep.join([str(Path(reproduce.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert sorted(line for line in result.stdout.splitlines() if line.startswith("rows")) == ["rows 3", "rows None"]
    mnist("one", methods=("mask",))
    for kind in ("original", "retrained"):
        one, both = (load_file(tmp_path / out / f"{kind}-0.safetensors") for out in ("one", "both"))
        for key in one:
            assert (both[key] - one[key]).norm() <= 1e-4 * one[key].norm(), key  # rounding, grown by Adam


# --- statistics -----------------------------------------------------------------------------------------------


def frame_of(**values: list[float]) -> pd.DataFrame:
    """A frame as `run` returns it, with the same values for every measure."""
    rows = [{"seed": s, "model": m, "seconds": 1.0, "note": "", **dict.fromkeys(reproduce.MEASURES, v)}
            for m, column in values.items() for s, v in enumerate(column)]  # fmt: skip
    return pd.DataFrame(rows).replace({"model": {"lra": "lra-npp"}})


def test_statistics_by_hand():
    table = reproduce.statistics(frame_of(lra=[0.1, 0.2, 0.3, 0.4], paths=[0.2, 0.4, 0.3, 0.8]))
    assert table["measure"].tolist() == [m for m in reproduce.MEASURES for _ in range(2)]
    lra, paths = table.iloc[0], table.iloc[1]
    assert lra[["difference", "t_p", "wilcoxon_p", "cliff"]].isna().all()
    assert paths["mean"] == pytest.approx(0.425)
    assert paths["difference"] == pytest.approx(0.175)
    # Differences 0.1, 0.2, 0, 0.4: sd = sqrt(0.0875 / 3), t = 0.175 / (sd / 2) = 2.0494, 3 degrees of freedom.
    # F(t) for 3 degrees: 1/2 + (atan(t / sqrt 3) + t / sqrt 3 / (1 + t^2 / 3)) / pi
    u = 0.175 / (np.sqrt(0.0875 / 3) / 2) / np.sqrt(3)
    assert paths["t_p"] == pytest.approx(1 - 2 * (np.arctan(u) + u / (1 + u**2)) / np.pi)
    # The zero is dropped; all three others are positive: 2 / 2^3.
    assert paths["wilcoxon_p"] == pytest.approx(0.25)
    # Of 16 pairs (paths, lra): 0.2 -> 1 over, 2 under; 0.3 -> 2, 1; 0.4 -> 3, 0; 0.8 -> 4, 0.
    assert paths["cliff"] == pytest.approx((10 - 3) / 16)


def test_bootstrap_interval_of_two_values():
    # The mean of two draws is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4: the interval reaches from 0 to 1.
    assert reproduce.bootstrap(np.array([0.0, 1.0])) == (0, 1)
    low, high = reproduce.bootstrap(np.arange(1000.0))  # near the normal approximation: 499.5 +- 1.96 sd / sqrt(1000)
    assert (low, high) == pytest.approx((499.5 - 17.9, 499.5 + 17.9), abs=1)
    assert np.isnan(reproduce.bootstrap(np.array([1.0]))).all()


def test_statistics_without_differences_seeds_or_the_method_of_the_paper():
    same = reproduce.statistics(frame_of(lra=[0.1, 0.2], mask=[0.1, 0.2])).iloc[1]
    assert same["difference"] == same["cliff"] == 0
    assert np.isnan([same["t_p"], same["wilcoxon_p"]]).all()
    single = reproduce.statistics(frame_of(lra=[0.1], mask=[0.2])).iloc[1]
    assert single["cliff"] == 1
    assert np.isnan([single["t_p"], single["sd"], single["low"]]).all()
    failed = reproduce.statistics(frame_of(lra=[0.1, 0.2, np.nan], mask=[0.2, np.nan, 0.5])).iloc[1]
    assert failed["seeds"] == 2
    assert failed["difference"] == pytest.approx(0.1)  # the first seed alone has both
    none = reproduce.statistics(frame_of(mask=[0.1, 0.2]))
    assert none["difference"].isna().all()
    assert none["mean"].notna().all()


def test_data_that_differ_in_their_last_image_are_other_data():
    labels = torch.tensor([0, 1])
    one, other = torch.zeros(2, 2, 1, 4, 4, dtype=torch.uint8)
    other[-1] = 9
    hashes = set()
    for pixels in (one, other):
        part = data.Images(pixels, labels, ["a", "b"])
        hashes.add(
            reproduce.settings("mnist-cnn", reproduce.ROWS["mnist-cnn"], data.Splits(part, part), False, [])["data"]
        )
    assert len(hashes) == 2
