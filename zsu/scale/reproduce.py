"""The five experiments of Chang et al. (2024, arXiv:2410.23693): data, architecture, training, forgetting, audit.

What is theirs and what is not: the architectures, data sets, forgotten classes and, for ``"head-npp"``, the number of
neurons are those of the authors' repository (github.com/ChangWenhan/LRA-NPP-Unlearning), and so is what ``"head-npp"``
does to them, which goes by what feeds the head. Training is `zsu.training`'s (Adam, one cycle), the same for the
original and the retrained model; the samples that forgetting starts from are unseen ones, of the test split.
Where a network starts from ImageNet weights, so does the retrained one: in the row
``imagenet-mini-vgg16`` these have seen the class, and the reference is only retrained without it, not free of it.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torchvision
from scipy import stats
from torch import distributed, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.models.vision_transformer import interpolate_embeddings
from tqdm.auto import tqdm

from .. import data, models, training
from ..data import Splits
from ..errors import ZsuError, check_count, warn
from ..evaluation import BASIC, audit
from ..files import check_settings, make_folder, write_atomically
from ..folders import open_image
from ..forgetting import forget

METHODS = ("paths", "lra-npp", "head-npp", "mask", "random")
PAPERS = "lra-npp"  # the method that the others are compared with
SAMPLES = 36  # unseen ones of the class, as in the authors' repository
MEASURES = ["at_test", "ag_test", "at_train", "ag_train"]
AGES = "abcdefgh"  # MUFAC's age classes: 0-6, 7-12, 13-19, 20-30, 31-45, 46-55, 56-66, 67-80 years
PUBLISHED = "authors' repository, March 2026 (commit 1a00959), accuracies on the training set, mean over 5 seeds"

# --- data -----------------------------------------------------------------------------------------------------


def pixels(size: int) -> Callable | None:
    """Pixels in [0, 1] of 28 x 28 images as they are, others resized."""
    return None if size == 28 else transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])


STANDARD = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]


def whole(size: int) -> Callable:
    """The whole image, resized to a square, with the mean and standard deviation of ImageNet."""
    return transforms.Compose([transforms.Resize((size, size)), *STANDARD])


def middle(size: int) -> Callable:
    """The middle of the image: its short side is resized to 8/7 of the size (256 for 224)."""
    return transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *STANDARD])


def load_named(name: str, folder: Path, transform: Callable | None) -> Splits:
    """A data set of torchvision whose files are in the folder; nothing is downloaded."""
    return data.load(name, folder, download=False, transform=transform)


def load_mufac(folder: Path, transform: Callable) -> Splits:
    """MUFAC: custom_train_dataset.csv with train_images/, and the same for test; "val" is left alone."""
    return Splits(*(Faces(folder, part, transform) for part in Splits._fields))


class Faces(Dataset):
    """One split of MUFAC (Choi and Na 2023, arXiv:2311.02240): faces, labelled with one of eight age classes.

    Parameters
    ----------
    folder : path
        Holds custom_PART_dataset.csv, with columns image_path and age_class ("a" to "h"), and PART_images/.
    part : str
        ``"train"``, ``"val"`` or ``"test"``.
    transform : callable
        From PIL image to tensor.

    Raises
    ------
    ZsuError
        A file that is missing or lacks a column, another age class; on access, an image that cannot be read.
    """

    classes = list(AGES)

    def __init__(self, folder: Path, part: str, transform: Callable):
        path = Path(folder) / f"custom_{part}_dataset.csv"
        try:
            table = pd.read_csv(path, usecols=["image_path", "age_class"], dtype=str)
        except (OSError, ValueError) as error:  # no file, no such columns, no csv
            remedy = "pass the unpacked folder custom_korean_family_dataset_resolution_128"
            raise ZsuError(f"this is no table of MUFAC ({error})", where=str(path), remedy=remedy) from error
        wrong = sorted(set(table["age_class"].fillna("").unique()) - set(AGES))
        if wrong:
            raise ZsuError(f"age classes {wrong}", where=str(path), remedy="use a to h")
        self.paths = [str(Path(folder) / f"{part}_images" / name) for name in table["image_path"]]
        self.targets = [AGES.index(age) for age in table["age_class"]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(open_image(self.paths[i])), self.targets[i]


# --- the five rows --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One experiment, as plain data.

    `arch` is torchvision's name, None for MNIST's CNN, and `head` how the names of its last layer's parameters begin.
    `k` and `perturbed` are for ``"head-npp"``. `published` has At and Ag in percent, mean and standard deviation.
    """

    load: Callable[[Path, Any], Splits]
    transform: Callable[[int], Callable | None]
    size: int
    target: int | str
    arch: str | None
    head: str
    k: int
    perturbed: int
    epochs: int
    lr: float
    batch_size: int
    published: dict[str, tuple[float, float, float, float]]


ROWS = {
    "mnist-cnn": Row(
        partial(load_named, "mnist"), pixels, 28, 1, None, "", k=50, perturbed=80, epochs=5, lr=1e-3, batch_size=64,
        published={"retrain": (0.00, 0.00, 98.74, 0.09), "lra-npp": (1.55, 0.82, 98.40, 0.04)},
    ),
    "cifar10-resnet50": Row(
        partial(load_named, "cifar10"), whole, 224, 9, "resnet50", "fc.", k=200, perturbed=400, epochs=10, lr=1e-4,
        batch_size=32, published={"retrain": (0.00, 0.00, 97.76, 0.20), "lra-npp": (5.26, 4.51, 97.62, 0.31)},
    ),
    "cifar100-resnet50": Row(
        partial(load_named, "cifar100"), whole, 224, 0, "resnet50", "fc.", k=150, perturbed=250, epochs=10, lr=1e-4,
        batch_size=64, published={"retrain": (0.00, 0.00, 91.92, 0.17), "lra-npp": (0.00, 0.00, 96.86, 0.10)},
    ),
    "imagenet-mini-vgg16": Row(
        data.load_folder, middle, 224, "n01734418", "vgg16", "classifier.6.", k=150, perturbed=400, epochs=10, lr=1e-4,
        batch_size=32, published={"retrain": (0.00, 0.00, 83.68, 0.92), "lra-npp": (0.59, 1.32, 83.08, 0.04)},
    ),
    "mufac-vit": Row(
        load_mufac, whole, 224, 0, "vit_b_16", "heads.", k=400, perturbed=600, epochs=10, lr=1e-4, batch_size=64,
        published={"retrain": (0.00, 0.00, 90.38, 3.30), "lra-npp": (7.19, 1.52, 86.12, 0.00)},
    ),
}  # fmt: skip


# --- models ---------------------------------------------------------------------------------------------------


def build_classifier(row: Row, classes: int, size: int, pretrained: dict[str, torch.Tensor] | None) -> nn.Module:
    """A fresh model for images of size x size, from ImageNet weights if there are any; its head is always new."""
    if row.arch is None:
        return models.mnist_cnn(classes, 1, size)
    vit = row.arch.startswith("vit")
    model = torchvision.models.get_model(row.arch, num_classes=classes, **({"image_size": size} if vit else {}))
    if pretrained is not None:
        body = {name: t for name, t in pretrained.items() if not name.startswith(row.head)}
        if vit and size != 224:
            body = interpolate_embeddings(size, 16, body)
        model.load_state_dict(body, strict=False)
    return model


def imagenet_weights(arch: str | None) -> dict[str, torch.Tensor] | None:
    """torchvision's first weights of an architecture, from its cache or the network; None where they cannot be had."""
    if arch is None:
        return None
    try:
        weights = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
        return weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no network, no space, a damaged file: many types
        warn(f"no ImageNet weights for {arch} ({error}): it is trained from scratch")
        return None


# --- the run --------------------------------------------------------------------------------------------------


def run(
    name: str,
    folder: str | os.PathLike,
    out: str | os.PathLike,
    seeds: int = 5,
    size: int | None = None,
    epochs: int | None = None,
    device: str | None = None,
    methods: Sequence[str] = METHODS,
    progress: bool = True,
) -> pd.DataFrame | None:
    """One of the paper's experiments: for each seed an original and a retrained model, each method, and the audit.

    Run by torchrun, all processes train together, and the first one does the rest.

    Parameters
    ----------
    name : str
        One of `ROWS`.
    folder : path
        The data: IDX files of MNIST or Fashion-MNIST; cifar-10-batches-py or cifar-100-python; train/CLASS/* and
        val/CLASS/*; MUFAC's csv files and folders of images.
    out : path
        Finished steps are kept here, and not done again: settings.json, original-SEED.safetensors,
        retrained-SEED.safetensors, audit-SEED.csv.
    seeds : int
        How many, from 0 on. A later run can add some.
    size, epochs : int, optional
        Of the images in pixels, and of training. Default: the row's.
    device : str, optional
        Default: the GPU if there is one.
    methods : sequence of str
        Of `forget`, without those that need more than a few samples. `statistics` compares with ``"lra-npp"``.
    progress : bool
        Show progress bars.

    Returns
    -------
    pandas.DataFrame, or None in all processes but the first
        One row for each seed and model: columns seed, model, those of `audit` against the retrained model of the same
        seed, and note: why a method failed, which then has NaN.

    Raises
    ------
    ZsuError
        Unknown row, missing or damaged data, results of other settings in `out`, fewer than two images to test.

    Warns
    -----
    UserWarning
        No ImageNet weights; a method failed; and what `forget` warns of, such as fewer than 5 samples.
    """
    if name not in ROWS:
        raise ZsuError(f"there is no row {name!r}", where="zsu.reproduce", remedy=f"use one of {', '.join(ROWS)}")
    for what, value in (("seeds", seeds), ("size", size), ("epochs", epochs)):
        check_count(what, 1 if value is None else value, "reproduce")
    row, out = ROWS[name], Path(out)
    row = row._replace(size=size or row.size, epochs=epochs or row.epochs)
    splits = row.load(Path(folder), row.transform(row.size))
    pretrained = imagenet_weights(row.arch)
    make_folder(out)
    check_settings(out / "settings.json", settings(name, row, splits, pretrained is not None, methods))
    if device is None:  # of several cards, this process's
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    with tqdm(total=3 * seeds, desc=name, unit="step", disable=not progress) as bar:
        if not train_all(row, splits, pretrained, out, seeds, device, bar):
            return None
        for seed in range(seeds):
            path = out / f"audit-{seed}.csv"
            if not path.exists():
                frame = audit_seed(row, splits, out, seed, device, methods, progress)
                write_atomically(path, partial(frame.to_csv, index=False))
            bar.update()
    frames = [pd.read_csv(out / f"audit-{seed}.csv", dtype={"note": str}) for seed in range(seeds)]
    return pd.concat(frames, ignore_index=True).fillna({"note": ""})


def settings(name: str, row: Row, splits: Splits, pretrained: bool, methods: Sequence[str]) -> dict:
    """All that decides the results, but for the seed."""
    digest = hashlib.sha256()
    for part in splits:
        digest.update(data.targets(part).numpy().tobytes())
        if isinstance(part, data.Images):
            digest.update(part.data.numpy().tobytes())
        else:  # too many to read them all: names and sizes of the files
            files = part.paths if isinstance(part, Faces) else [path for path, _ in part.samples]
            digest.update(repr([(Path(f).name, os.path.getsize(f)) for f in files]).encode())
    plain_data = {key: value for key, value in row._asdict().items() if isinstance(value, (int, float, str))}
    found = {"row": name, "data": digest.hexdigest(), "classes": data.classes(splits.train), "pretrained": pretrained}
    return found | plain_data | {"methods": list(methods)}


def train_all(row: Row, splits: Splits, pretrained: dict | None, out: Path, seeds: int, device: str, bar: tqdm) -> bool:
    """Train what is not there yet, together with the other processes of torchrun; whether this one is the first."""
    grouped = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized()
    if grouped:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    factory = partial(build_classifier, row, len(data.classes(splits.train)), row.size, pretrained)
    recipe: dict[str, Any] = {"epochs": row.epochs, "batch_size": row.batch_size, "lr": row.lr, "device": device}
    train = partial(training.train, factory, splits.train, **recipe, progress=not bar.disable)
    try:
        for seed in range(seeds):
            for kind, exclude in (("original", None), ("retrained", row.target)):
                make = partial(train, exclude=exclude, seed=seed)
                training.train_once(model_path(out, kind, seed), {"arch": row.arch or "mnist-cnn", "seed": seed}, make)
                bar.update()
        return training.process()[0] == 0
    finally:
        if grouped:
            distributed.destroy_process_group()


def model_path(out: Path, kind: str, seed: int) -> Path:
    """Where a trained model is kept."""
    return out / f"{kind}-{seed}.safetensors"


def load_trained(row: Row, splits: Splits, path: Path, device: str) -> nn.Module:
    """One of the trained models, in eval mode."""
    with torch.random.fork_rng(devices=[]):  # building draws random weights, soon overwritten
        model = build_classifier(row, len(data.classes(splits.train)), row.size, None)
    model.load_state_dict(models.read_state(path)[1])
    return model.to(device).eval()


def audit_seed(
    row: Row, splits: Splits, out: Path, seed: int, device: str, methods: Sequence[str], progress: bool
) -> pd.DataFrame:
    """Forget by each method, and measure: the rows of one seed."""
    original, retrained = (
        load_trained(row, splits, model_path(out, kind, seed), device) for kind in ("original", "retrained")
    )
    target = data.class_index(splits.test, row.target)
    unseen = int((data.targets(splits.test) == target).sum())
    if unseen < 2:
        what = f"the test split has {unseen} images of class {row.target!r}"
        raise ZsuError(what, where="zsu.reproduce", remedy="at least one to forget by and one to measure are needed")
    n = min(SAMPLES, unseen - 1)
    x = data.samples(splits.test, target, n, seed).to(device)
    forgotten, notes = {}, {}
    for method in methods:
        budget: dict[str, Any] = {"k": row.k, "perturbed": row.perturbed} if method == "head-npp" else {}
        try:
            forgotten[method] = forget(original, x, target, method, seed=seed, **budget)
        except (ZsuError, RuntimeError, MemoryError) as error:  # RuntimeError: a GPU without memory left
            notes[method] = f"{type(error).__name__}: {error}".replace("\n", " ")
            warn(f"seed {seed}: {method!r} failed, {notes[method]}")
    seconds = models.metadata(model_path(out, "retrained", seed))["seconds"]
    frame = audit(
        original, forgotten, splits.train, data.without_samples(splits.test, target, n, seed), target, [retrained],
        measures=BASIC, controls=False, retrain_seconds=seconds, progress=progress,
    ).frame  # fmt: skip
    frame = frame.drop(columns="js_forget_ratio").reindex(["original", "retrain", *methods])  # NaN where it failed
    frame = frame.rename_axis("model").reset_index()
    frame.insert(0, "seed", seed)
    return frame.assign(note=[notes.get(model, "") for model in frame["model"]])


# --- statistics -----------------------------------------------------------------------------------------------


def statistics(frame: pd.DataFrame) -> pd.DataFrame:
    """Each model's accuracies over the seeds, and compared with ``"lra-npp"`` on the same seeds.

    Parameters
    ----------
    frame : pandas.DataFrame
        From `run`.

    Returns
    -------
    pandas.DataFrame
        One row for each measure and model: the number of seeds without failure, mean, sd, the bootstrap interval of
        the mean (low, high); then, over the seeds where both did not fail, the mean difference to ``"lra-npp"``, p of
        the paired t test and of Wilcoxon's signed-rank test (two-sided; NaN for fewer than two seeds or where nothing
        differs), and Cliff's delta.
    """
    rows = []
    for measure in MEASURES:
        values = frame.pivot(index="seed", columns="model", values=measure)
        for model in frame["model"].unique():
            own = values[model].dropna().to_numpy()
            low, high = bootstrap(own)
            row = {"measure": measure, "model": model, "seeds": len(own), "mean": own.mean() if len(own) else np.nan,
                   "sd": own.std(ddof=1) if len(own) > 1 else np.nan, "low": low, "high": high}  # fmt: skip
            if model != PAPERS and PAPERS in values:
                row |= compare_with_paper(*values[[model, PAPERS]].dropna().to_numpy().T)
            rows.append(row)
    columns = ["measure", "model", "seeds", "mean", "sd", "low", "high", "difference", "t_p", "wilcoxon_p", "cliff"]
    return pd.DataFrame(rows, columns=columns)


def compare_with_paper(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean difference, p of two paired tests, and Cliff's delta of (n,) and (n,) values of the same seeds.

    Cliff's delta is P(a > b) - P(a < b) over all pairs (Cliff 1993, Psychological Bulletin 114).
    """
    if len(a) == 0:
        return {}
    tests = {}
    if len(a) > 1 and np.ptp(a - b) > 0:  # differences that are all the same have no standard error
        tests["t_p"] = float(stats.ttest_rel(a, b).pvalue)
    if len(a) > 1 and (a != b).any():
        tests["wilcoxon_p"] = float(stats.wilcoxon(a, b).pvalue)
    # (n, 1) - (n,) -> (n, n)
    return {"difference": float((a - b).mean()), **tests, "cliff": float(np.sign(a[:, None] - b).mean())}


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Percentile interval, 95 %, of the mean (Efron 1979); NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(0)
    found = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=rng)
    return found.confidence_interval


def as_text(name: str, frame: pd.DataFrame) -> str:
    """The results of `run` as plain text: accuracies in percent, the published ones beside them, and the statistics."""
    numbers = statistics(frame)
    ours = numbers.assign(text=[number(100 * m, 100 * s) for m, s in zip(numbers["mean"], numbers["sd"], strict=True)])
    table = ours.pivot(index="model", columns="measure", values="text").loc[frame["model"].unique(), MEASURES]
    published = ROWS[name].published
    for i, measure in enumerate(("at_train", "ag_train")):
        beside = {m: number(*p[2 * i : 2 * i + 2]) for m, p in published.items()}
        table[f"published {measure}"] = [beside.get("lra-npp" if m == "head-npp" else m, "") for m in table.index]
    table["seconds"] = frame.groupby("model")["seconds"].mean().map(number)
    table.columns.name = table.index.name = None
    numbers.loc[:, ["mean", "sd", "low", "high", "difference"]] *= 100
    compared = numbers.to_string(index=False, float_format="{:.3f}".format, na_rep="")
    failed = "".join(f"Failed: {f.model}, seed {f.seed}: {f.note}\n" for f in frame.itertuples() if f.note)
    return (
        f"{name}, {frame['seed'].nunique()} seeds: accuracy in percent, mean ± standard deviation\n\n"
        f"{table.to_string()}\n\n{failed}"
        f"published: {PUBLISHED};\nto be compared with a run on the same data only. The paper's own tables may differ. "
        "One value stands twice:\nbeside 'lra-npp', after the paper's description, and 'head-npp', closer to the code."
        f"\n\nCompared with {PAPERS!r} on the same seeds; low, high: bootstrap 95 % interval of the mean; p: two-sided,"
        f"\nnot corrected for the number of comparisons; with n seeds Wilcoxon's cannot be below 2 / 2^n.\n\n{compared}"
    )


def number(mean: float, sd: float = np.nan) -> str:
    """A number, with its standard deviation if there is one; nothing for NaN."""
    return "" if np.isnan(mean) else f"{mean:.2f}" if np.isnan(sd) else f"{mean:.2f} ± {sd:.2f}"
