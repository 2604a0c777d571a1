"""bench(): methods x classes x seeds in one tidy table, beside models retrained without each class; resumes."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from . import __version__, data, models, training
from .errors import ZsuError
from .evaluation import audit
from .forgetting import METHODS, TIERS, forget

RETAINED = 20  # images of each other class, for methods of tier T3
WITH_RETAINED = "paths+retained"
ROWS = (*METHODS, WITH_RETAINED)
FILE = "scoreboard.csv"


def bench(
    folder: str | Path,
    dataset: str = "fashion-mini",
    root: str = "data",
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = ROWS,
    *,
    samples: int = 36,
    references: int = 3,
    epochs: int = training.EPOCHS,
    progress: bool = True,
) -> pd.DataFrame:
    """Forget each class of each original by each method, and audit the results.

    Originals are the bundled small CNNs, or for other data small CNNs trained here; the references, some for each
    class, are trained here. Both stay in the folder, as does the table, which grows by one class and seed at a time: an
    interrupted run goes on where it was.

    Parameters
    ----------
    folder : path
        Holds ``scoreboard.csv`` and the models; made where it is missing.
    dataset, root : str
        As in `zsu.data.load`.
    classes : sequence, optional
        By index or name; default all.
    seeds : sequence of int
        Of the originals, the samples, the noise and the training.
    methods : sequence of str
        Of `zsu.forgetting.METHODS`, and ``"paths+retained"``: paths with 20 images of each other class.
    samples : int
        Unseen samples of the class, taken from the test split and left out of the test. Methods of tier T2 and above
        get all training images of the class, those of T3 also 20 of each other class, those of T4 all others.
    references : int
        Retrained models for each class, at least 2.
    epochs : int
        Of the models that are trained here.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row for each class, seed and method, and for "original" and "retrain": data, data_sha256, class, class_name,
        seed, method, tier, the columns of `zsu.audit`, null_low and null_high (the smallest and the largest divergence
        between two references), weights (of the model), samples, references, epochs, threads, zsu, torch.

    Raises
    ------
    ZsuError
        Unknown class or method; a table in the folder that was made from other data or settings.
    """
    folder = Path(folder)
    splits = data.load(dataset, root)
    unknown = [m for m in methods if m not in ROWS]
    if unknown or not methods:
        raise ZsuError(f"unknown methods {unknown}", where="bench", remedy=f"use some of {', '.join(ROWS)}")
    targets = range(len(data.classes(splits.test))) if classes is None else classes
    targets = [data.class_index(splits.test, c) for c in targets]
    if references < 2:
        raise ZsuError(f"{references} references", where="bench", remedy="use at least 2, so that there is a null")
    data.make_folder(folder)
    about = {
        "data": dataset,
        "data_sha256": dataset_hash(splits),
        "samples": samples,
        "references": references,
        "epochs": epochs,
        "zsu": __version__,
        "torch": torch.__version__,
    }
    board = read(folder / FILE, about)
    few_samples = [m for m in methods if TIERS.get(m) in ("T0", "T1")]
    tasks = [(c, s) for s in seeds for c in targets if missing(board, c, s, methods)]
    if tasks:  # the first call of a process compiles and loads, which is not the method's time
        warm_up(few_samples)
    for c, s in tqdm(tasks, desc="bench", unit="class", disable=not progress):
        wanted = missing(board, c, s, methods)
        rows = task(folder, splits, about, c, s, wanted)
        if not board.empty:  # "original" and "retrain" are there already when methods are added
            known = board.loc[(board["class"] == c) & (board["seed"] == s), "method"]
            rows = rows[~rows["method"].isin(known)]
        board = pd.concat([board, rows.assign(**about, threads=torch.get_num_threads())], ignore_index=True)
        data.write_atomically(folder / FILE, lambda temporary, board=board: board.to_csv(temporary, index=False))
    return board


def warm_up(methods: list[str]) -> None:
    """Run each method once on the bundled model."""
    x = data.samples(data.load("fashion-mini").test, 0, 5)
    for method in methods:
        forget(models.bundled(), x, 0, method)


def read(file: Path, about: dict | None = None) -> pd.DataFrame:
    """A table that `bench` wrote, or an empty one; `ZsuError` where it differs in `about` from what is asked for."""
    if not file.is_file():
        return pd.DataFrame()
    try:
        board = pd.read_csv(file, engine="python")  # whose floats are exact
    except (OSError, ValueError) as error:
        raise ZsuError(f"not a scoreboard ({error})", where=str(file), remedy="move it away") from error
    for key, value in (about or {}).items():
        if key not in board or (board[key].astype(str) != str(value)).any():
            found = ", ".join(map(str, board[key].unique())) if key in board else "nothing"
            raise ZsuError(
                f"the table was made with {key} {found}, not {value}", where=str(file), remedy="use another folder"
            )
    return board


def missing(board: pd.DataFrame, target: int, seed: int, methods: Sequence[str]) -> list[str]:
    """The methods that the table has no row of."""
    if board.empty:
        return list(methods)
    done = set(board.loc[(board["class"] == target) & (board["seed"] == seed), "method"])
    return [m for m in methods if m not in done]


def task(folder: Path, splits: data.Splits, about: dict, target: int, seed: int, methods: list[str]) -> pd.DataFrame:
    """The rows of one class and seed; `about` holds the settings of `bench`."""
    data_sha256, samples, epochs = about["data_sha256"], about["samples"], about["epochs"]
    original, _ = trained(folder, splits, data_sha256, None, seed, epochs)
    retrained = [trained(folder, splits, data_sha256, target, s, epochs) for s in range(about["references"])]
    results = {}
    for m in methods:
        x, retained = seen_by(m, splits, target, seed, samples)
        results[m] = forget(original, x, target, m.removesuffix("+retained"), retained=retained, seed=seed)
    held_out = data.without_samples(splits.test, target, samples, seed)
    seconds = float(np.median([s for _, s in retrained]))
    models_without = [model for model, _ in retrained]
    frame = audit(
        original, results, splits.train, held_out, target, models_without, retrain_seconds=seconds, progress=False
    )
    null = frame.attrs["null"]
    tiers = {m: f.patch.metadata["tier"] for m, f in results.items()} | {"retrain": "T4"}
    frame = frame.reset_index(names="method").assign(
        **{"class": target, "class_name": data.classes(splits.test)[target], "seed": seed},
        null_low=min(null),
        null_high=max(null),
        weights=sum(p.numel() for p in original.parameters()),
    )
    frame.insert(1, "tier", frame["method"].map(tiers).fillna("-"))
    return frame


def seen_by(
    method: str, splits: data.Splits, target: int, seed: int, samples: int
) -> tuple[torch.Tensor, Dataset | None]:
    """What `forget` gets of the data, by the tier of the method: images of the class, and retained data."""
    tier = "T3" if method == WITH_RETAINED else TIERS[method]
    if tier in ("T0", "T1") or method == WITH_RETAINED:
        x = data.samples(splits.test, target, samples, seed)
    else:
        members = (data.targets(splits.train) == target).nonzero()[:, 0]  # (M, 1) -> (M,)
        of_class = Subset(splits.train, members.tolist())
        x = torch.cat([images for images, _ in data.batches(of_class)])
    if tier == "T3":
        return x, some_retained(splits.train, target, seed)
    if tier == "T4":
        return x, training.without_class(splits.train, target)
    return x, None


def some_retained(dataset: Dataset, target: int, seed: int) -> Subset:
    """`RETAINED` images of every other class."""
    others = [c for c in range(len(data.classes(dataset))) if c != target]
    indices = [data._sample_indices(dataset, c, RETAINED, seed) for c in others]
    return Subset(dataset, torch.cat(indices).tolist())


def trained(
    folder: Path, splits: data.Splits, data_sha256: str, exclude: int | None, seed: int, epochs: int
) -> tuple[nn.Module, float]:
    """A model with or without the class and the seconds that its training took: bundled, from the folder, or new."""
    settings = {"exclude": exclude, "seed": seed, "epochs": epochs, "data_sha256": data_sha256}
    ships = exclude in (None, data.FASHION_CLASSES.index(training.FORGET_CLASS)) and epochs == training.EPOCHS
    if ships and data_sha256 == bundled_hash() and seed < models.BUNDLED_SEEDS:
        path = models.bundled_path("original" if exclude is None else "retrained", seed)
        return models.load(path), models.metadata(path)["seconds"]
    path = folder / ("original" if exclude is None else f"retrained-{exclude}") / f"{seed}.safetensors"
    if path.is_file() and settings.items() <= models.metadata(path).items():
        return models.load(path), models.metadata(path)["seconds"]
    data.make_folder(path.parent)
    image, _ = splits.train[0]
    number = len(data.classes(splits.train))
    started = time.perf_counter()
    model = training.train(
        lambda: models.SmallCNN(number, image.shape[0]), splits.train, exclude=exclude, seed=seed, epochs=epochs,
        progress=False,
    )  # fmt: skip
    models.save(model, path, **settings, seconds=round(time.perf_counter() - started, 1))
    return model, models.metadata(path)["seconds"]


@functools.cache
def bundled_hash() -> str:
    """`dataset_hash` of the data that the bundled models were trained on."""
    return dataset_hash(data.load("fashion-mini"))


def dataset_hash(splits: data.Splits) -> str:
    """sha256 over images and labels of both splits."""
    digest = hashlib.sha256()
    for part in splits:
        for x, y in data.batches(part, 1000):
            digest.update(x.numpy().tobytes())
            digest.update(y.numpy().tobytes())
    return digest.hexdigest()


def summary(board: pd.DataFrame) -> pd.DataFrame:
    """One row a method, over all classes and seeds of a table of `bench`.

    Columns: tier; at and at_worst (%, test); ag_drop and ag_drop_worst (points, from the original); ag_gap (points, to
    retrain); js (mean, nats), js_ratio (mean js by mean null), js_mask_worst (the largest ratio of a class's js to the
    mask's, seeds averaged; NaN without the mask), in_null (share of cases within the null band); seconds (median);
    faster (than one retraining); weights (%, the largest); broken (share of cases).
    """
    by = ["class", "seed"]
    columns = ("at_test", "ag_test", "js_forget", "seconds")
    at, ag, js, seconds = (board.pivot(index=by, columns="method", values=c) for c in columns)
    band = board[board["method"] == "retrain"].set_index(by)[["null_low", "null_high"]]
    rows = {}
    for method in board["method"].unique():
        own = board[board["method"] == method]
        cases = own.set_index(by).index  # a method may have been added for some classes only
        drop = 100 * (ag["original"] - ag[method])
        within = (js[method].ge(band["null_low"]) & js[method].le(band["null_high"]))[cases]
        banded = (band["null_low"] < band["null_high"]).any()  # not with two references, which are one pair
        by_class = js.loc[cases].groupby("class").mean()
        rows[method] = {
            "tier": own["tier"].iloc[0],
            "at": 100 * at[method].mean(),
            "at_worst": 100 * at[method].max(),
            "ag_drop": drop.mean(),
            "ag_drop_worst": drop.max(),
            "ag_gap": 100 * (ag[method] - ag["retrain"]).mean(),
            "js": js[method].mean(),
            "js_ratio": js[method].mean() / js.loc[cases, "retrain"].mean(),
            "js_mask_worst": (by_class[method] / by_class["mask"]).max() if "mask" in js else np.nan,
            "in_null": within.mean() if banded else np.nan,
            "seconds": own["seconds"].median(),
            "faster": seconds.loc[cases, "retrain"].median() / own["seconds"].median(),
            "weights": 100 * (own["weights_changed"] / own["weights"]).max(),
            "broken": own["broken"].astype(bool).mean(),
        }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "method"
    return frame.sort_values("js", kind="stable")


def printed(board: pd.DataFrame) -> str:
    """`summary` as text, with what its columns mean."""
    frame = summary(board)
    broken = frame.pop("broken") > 0.5
    shapes = {"js": "{:.4f}", "seconds": "{:.3f}", "weights": "{:.2f}", "faster": "{:,.0f}", "in_null": "{:.2f}"}
    text = frame.astype(object)
    for column in frame.columns.drop("tier"):
        shape = shapes.get(column, "{:.2f}")
        text[column] = [("n/a" if np.isnan(v) else shape.format(v)) for v in frame[column]]
    text.loc[broken, ["js", "js_ratio", "js_mask_worst", "in_null"]] = "broken"
    null = board.loc[board["method"] == "retrain", "js_forget"]
    return (
        f"{text.to_string()}\n\n"
        f"{board['class'].nunique()} classes, {board['seed'].nunique()} seeds; at, ag in % and points, on test images; "
        f"js: divergence from retrained models on the class, nats; js_ratio: to the null, {null.mean():.4f};\n"
        "js_mask_worst: of any class, to the mask's; in_null: share of cases inside the null band; faster: than one "
        "retraining; weights: % changed at most."
    )
