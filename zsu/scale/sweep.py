"""run(): classes x seeds x methods x measures on all cores or a cluster, one file a task; stopped, it goes on."""

import contextlib
import functools
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from .. import data, models, training
from ..errors import ZsuError, check_seed, is_integer
from ..evaluation import MEASURES, audit
from ..evaluation.measures import OF_MANY
from ..files import check_settings, make_folder, write_atomically
from ..forgetting import METHODS, CutPaths, Forgotten, forget
from .pools import KILLED, in_processes, on_cluster

RETAINED = 20  # images of each other class, for methods of tier T3
ELSEWHERE = "done by another process"
ALL = tuple(m for m in MEASURES if m not in OF_MANY)  # those make each edit of every seed's original as well


class Settings(NamedTuple):
    """What a sweep is about, as `run` takes it; after `check` the same in every process."""

    folder: Path
    dataset: str
    root: str
    classes: Any  # indices, names or None; after `check` indices
    seeds: Sequence[int]
    methods: Sequence[str]
    measures: Sequence[str]
    samples: int
    references: int
    epochs: int
    controls: bool = True
    data_sha256: str = ""  # `check` finds it


class Task(NamedTuple):
    """Train a model (kind "train": without `target`, if it is not None), or audit all methods (kind "audit")."""

    kind: str
    target: Any  # the index of a class, or None
    seed: int


def run(
    folder: str | Path,
    dataset: str = "fashion-mini",
    root: str = "data",
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = tuple(METHODS),
    measures: Sequence[str] = ALL,
    *,
    controls: bool = True,
    samples: int = 36,
    references: int = 3,
    epochs: int = training.EPOCHS,
    jobs: int = -1,
    scheduler: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Forget each class of each original by each method, and audit the results; task by task, in many processes.

    Originals are the bundled small CNNs, or for other data small CNNs trained here; the references, some for each
    class, are trained here. A task trains one model or audits one class and seed, and its result is one file, written
    beside and moved into place: a killed process loses the task that it was at. A task is locked while it runs, and
    the system frees the locks of a dead process, so several sweeps may share a folder.

    Parameters
    ----------
    folder : path
        Holds settings.json, the models, and tasks/CLASS-SEED.csv; made where it is missing. On a cluster every worker
        has to see it, and the data, under the same path.
    dataset, root : str
        As in `zsu.data.load`.
    classes : sequence, optional
        By index or name; default all.
    seeds : sequence of int
        Of the originals, the samples, the noise and the training.
    methods : sequence of str
        Of `zsu.forgetting.METHODS`; ``"paths+retained"`` is paths with 20 images of each other class.
    measures : sequence of str
        Of `zsu.evaluation.MEASURES`. With "u-lira" or "klom" every task makes each edit of every seed's original.
    controls : bool
        As in `zsu.audit`.
    samples : int
        Unseen samples of the class, taken from the test split and left out of the test. Methods of tier T2 and above
        get all training images of the class, those of T3 also 20 of each other class, those of T4 all others.
    references : int
        Retrained models for each class, at least 2.
    epochs : int
        Of the models that are trained here.
    jobs : int
        Processes; -1 is one a core. 1 stays in this one. A process that is killed costs its task a second try.
    scheduler : str, optional
        Address of a Dask scheduler; needs ``pip install zsu[cluster]``. Its workers do the tasks, and a task whose
        worker died is done by another.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row for each class, seed and method, and for "original" and "retrain": class, class_name, seed, method,
        tier, the columns of `zsu.audit`, null_low and null_high (the smallest and the largest divergence between two
        references), weights (of the model), data, data_sha256, samples, references, epochs, zsu, torch, threads.

    Raises
    ------
    ZsuError
        Unknown class, method or measure; a folder with results of other data or settings; after all other tasks are
        done, those that failed, whose errors are in tasks/*.error.
    """
    wanted = (dataset, root, classes, seeds, methods, measures, samples, references, epochs, controls)
    settings = check_sweep(Settings(Path(folder), *wanted))
    make_folder(settings.folder / "tasks")
    same = about(settings) | {"measures": list(settings.measures), "controls": controls}
    if set(OF_MANY) & set(settings.measures):  # which look at every seed's model
        same["seeds"] = list(settings.seeds)
    check_settings(settings.folder / "settings.json", same)
    if not is_integer(jobs) or jobs == 0:
        raise ZsuError(f"jobs is {jobs!r}", where="sweep", remedy="use a number of processes, or -1 for one a core")
    failures = {}
    to_do = stages(settings)
    with tqdm(total=sum(map(len, to_do)), desc="sweep", unit="task", disable=not progress) as bar:
        for tasks in to_do:
            for task, error in work_on(tasks, settings, jobs, scheduler, bar):
                if error is not None:
                    failures[task] = error
                    bar.set_postfix(failed=len(failures))
                bar.update()
    if failures:
        what = f"{len(failures)} of {sum(map(len, to_do))} tasks failed"
        for task, error in list(failures.items())[:3]:
            what += f"; {task.kind} {task.target}-{task.seed}: {error}"
        fewer = " with fewer jobs" if KILLED in failures.values() else ""
        raise ZsuError(what.rstrip("."), where=str(settings.folder / "tasks"), remedy=f"run it again for those{fewer}")
    return pd.concat([read_rows(task_file(t, settings), about(settings)) for t in audits(settings)], ignore_index=True)


def check_sweep(settings: Settings) -> Settings:
    """The settings with classes as indices, every value once, and the hash; `ZsuError` for what does not exist."""
    given = (settings.seeds, settings.methods, settings.measures)
    several: list[list] = [[v] if isinstance(v, (int, str)) else list(v) for v in given]
    seeds, methods, measures = several
    if not seeds:
        raise ZsuError("no seeds", where="sweep", remedy="use some integers >= 0")
    for seed in seeds:
        check_seed(seed, "sweep")
    for what, wanted, known in (("methods", methods, METHODS), ("measures", measures, MEASURES)):
        unknown = [m for m in wanted if m not in known]
        if unknown or not wanted:
            raise ZsuError(f"unknown {what} {unknown}", where="sweep", remedy=f"use some of {', '.join(known)}")
    if settings.references < 2:
        what = f"{settings.references} references"
        raise ZsuError(what, where="sweep", remedy="use at least 2, so that there is a null")
    splits = load_data(settings.dataset, settings.root)
    every = range(len(data.classes(splits.test)))
    classes = data.class_indices(splits.test, every if settings.classes is None else settings.classes)
    if not classes:
        raise ZsuError("no classes", where="sweep", remedy="name some, or leave them out for all")
    return settings._replace(
        folder=settings.folder.absolute(), classes=tuple(classes), seeds=tuple(dict.fromkeys(map(int, seeds))),
        methods=tuple(dict.fromkeys(methods)), measures=tuple(dict.fromkeys(measures)),
        data_sha256=data.content_hash(splits),
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def load_data(dataset: str, root: str) -> data.Splits:
    """The data, read once a process."""
    return data.load(dataset, root)


def about(settings: Settings) -> dict:
    """The settings that make numbers comparable, as they stand in every row."""
    same = {name: getattr(settings, name) for name in ("data_sha256", "samples", "references", "epochs")}
    return {"data": settings.dataset, **same, "zsu": version("zsu"), "torch": torch.__version__}


# --- tasks ----------------------------------------------------------------------------------------------------


def stages(settings: Settings) -> list[list[Task]]:
    """What is to do: models first, then audits."""
    trainings = [Task("train", None, s) for s in settings.seeds]
    trainings += [Task("train", c, s) for c in settings.classes for s in range(settings.references)]
    return [[t for t in tasks if not is_done(t, settings)] for tasks in (trainings, audits(settings))]


def audits(settings: Settings) -> list[Task]:
    """All audits, by seed and class."""
    return [Task("audit", c, s) for s in settings.seeds for c in settings.classes]


def is_done(task: Task, settings: Settings) -> bool:
    """Whether the model is there, or the file with a row for every method."""
    if task.kind == "train":
        return models.is_made_with(*model_file(task.target, task.seed, settings))
    return not missing_methods(task, settings)


def missing_methods(task: Task, settings: Settings) -> list[str]:
    """The methods that the file of an audit has no row of."""
    rows = read_rows(task_file(task, settings), about(settings))
    return [m for m in settings.methods if rows.empty or m not in set(rows["method"])]


def task_file(task: Task, settings: Settings) -> Path:
    """Where the rows of an audit are."""
    return settings.folder / "tasks" / f"{task.target}-{task.seed}.csv"


def work_on(
    tasks: list[Task], settings: Settings, jobs: int, scheduler: str | None, bar: tqdm
) -> Iterator[tuple[Task, str | None]]:
    """Do tasks, in any order; those that another sweep is at are waited for in the end."""
    do, left = functools.partial(work, settings=settings), []
    results: Iterable
    if scheduler is not None:
        results = on_cluster(do, tasks, scheduler)
    elif jobs == 1:
        results = map(do, tasks)
    else:
        results = in_processes(do, tasks, jobs)
    for task, error in results:
        if error == ELSEWHERE:
            left.append(task)
        else:
            yield task, error
    for task in left:
        bar.set_postfix(waiting=len(left))
        yield work(task, settings, wait=True)


def work(task: Task, settings: Settings, wait: bool = False) -> tuple[Task, str | None]:
    """Do one task unless it is done; what went wrong, or `ELSEWHERE` where another process is at it."""
    name = f"{task.kind}-{task.target}-{task.seed}"
    lock, failure = (settings.folder / "tasks" / f"{name}.{ending}" for ending in ("lock", "error"))
    try:
        with FileLock(lock, timeout=-1 if wait else 0):
            if not is_done(task, settings):
                (train_model if task.kind == "train" else audit_methods)(task, settings)
            failure.unlink(missing_ok=True)
    except Timeout:
        return task, ELSEWHERE
    except Exception as error:  # the other tasks go on
        text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(ZsuError):  # the disk may be full
            write_atomically(failure, lambda temporary: temporary.write_text(text))
        return task, text
    return task, None


def train_model(task: Task, settings: Settings) -> None:
    """A model with or without a class."""
    splits = load_data(settings.dataset, settings.root)
    path, wanted = model_file(task.target, task.seed, settings)
    make_folder(path.parent)
    training.train_once(path, wanted, lambda: training.train(
        functools.partial(fresh_model, splits), splits.train, exclude=task.target, seed=task.seed,
        epochs=settings.epochs, progress=False,
    ))  # fmt: skip


def fresh_model(splits: data.Splits) -> models.SmallCNN:
    """An untrained small CNN for these images and classes."""
    return models.SmallCNN(len(data.classes(splits.train)), data.first_image(splits.train).shape[0])


def model_file(exclude: int | None, seed: int, settings: Settings) -> tuple[Path, dict]:
    """Where a model is, bundled or in the folder, and what its metadata have to say."""
    ships = exclude in (None, data.FASHION_CLASSES.index(models.BUNDLED_WITHOUT)) and settings.epochs == training.EPOCHS
    if ships and settings.data_sha256 == data.bundled_hash() and seed < models.BUNDLED_SEEDS:
        return models.bundled_path("original" if exclude is None else "retrained", seed), {}
    folder = "original" if exclude is None else f"retrained-{exclude}"
    wanted = {"exclude": exclude, "seed": seed, "epochs": settings.epochs, "data_sha256": settings.data_sha256}
    return settings.folder / folder / f"{seed}.safetensors", wanted


def load_trained(exclude: int | None, seed: int, settings: Settings) -> nn.Module:
    """A model that was trained before."""
    return models.load(model_file(exclude, seed, settings)[0])


def audit_methods(task: Task, settings: Settings) -> None:
    """Forget one class of one original by each method that has no row yet, and audit: the file of a task."""
    splits, target, seed = load_data(settings.dataset, settings.root), task.target, task.seed
    path, methods = task_file(task, settings), missing_methods(task, settings)
    warm_up(tuple(m for m in methods if METHODS[m].tier in ("T0", "T1")))
    others = [s for s in settings.seeds if s != seed] if set(OF_MANY) & set(settings.measures) else []
    originals = {s: load_trained(None, s, settings) for s in (seed, *others)}
    results = {m: [forget_by(m, originals[s], splits, target, s, settings.samples) for s in originals] for m in methods}
    unseen = [set(data.without_samples(splits.test, target, settings.samples, s).indices) for s in originals]
    held_out = Subset(splits.test, sorted(set.intersection(*unseen)))
    files = [model_file(target, s, settings)[0] for s in range(settings.references)]
    seconds = float(np.median([models.metadata(f)["seconds"] for f in files]))
    report = audit(
        list(originals.values()), results, splits.train, held_out, target, [models.load(f) for f in files],
        measures=settings.measures, controls=settings.controls, retrain_seconds=seconds, seed=seed, progress=False,
    )  # fmt: skip
    frame = report.frame.reset_index(names="method").assign(
        **{"class": target, "class_name": data.classes(splits.test)[target], "seed": seed},
        null_low=min(report.pairs),
        null_high=max(report.pairs),
        weights=sum(p.numel() for p in originals[seed].parameters()),
        **about(settings),
        threads=torch.get_num_threads(),
    )
    tiers = {name: method.tier for name, method in METHODS.items()} | {"retrain": "T4"}
    frame.insert(1, "tier", frame["method"].map(tiers).fillna("-"))
    known = read_rows(path, about(settings))
    if not known.empty:  # "original" and "retrain" are there already when methods are added
        frame = pd.concat([known, frame[~frame["method"].isin(known["method"])]], ignore_index=True)
    write_atomically(path, lambda temporary: frame.to_csv(temporary, index=False))


def forget_by(method: str, original: nn.Module, splits: data.Splits, target: int, seed: int, samples: int) -> Forgotten:
    """Forget a class, with what a method of this tier may see."""
    x, retained = seen_by(method, splits, target, seed, samples)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*still taken for the class")  # At says it, and controls are meant to
        return forget(original, x, target, method, retained=retained, seed=seed)


@functools.cache
def warm_up(methods: tuple[str, ...]) -> None:
    """Run each method once on the bundled model: the first call of a process compiles and loads."""
    x = data.samples(data.load("fashion-mini").test, 0, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in methods:
            forget(models.bundled(), x, 0, method)


def seen_by(
    method: str, splits: data.Splits, target: int, seed: int, samples: int
) -> tuple[torch.Tensor, Dataset | None]:
    """What `forget` gets of the data, by the tier of the method: images of the class, and retained data."""
    tier = METHODS[method].tier
    if tier in ("T0", "T1") or isinstance(METHODS[method], CutPaths):
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
    indices = [data.sample_indices(dataset, c, RETAINED, seed) for c in others]
    return Subset(dataset, torch.cat(indices).tolist())


# --- results and plans ----------------------------------------------------------------------------------------


def read_rows(file: Path, about: dict | None = None) -> pd.DataFrame:
    """A table that was written here, or an empty one; `ZsuError` where it differs in `about` from what is asked for."""
    if not file.is_file():
        return pd.DataFrame()
    try:
        board = pd.read_csv(file, engine="python")  # whose floats are exact
    except (OSError, ValueError) as error:
        raise ZsuError(f"not a table of results ({error})", where=str(file), remedy="move it away") from error
    for key in ("method", *(about or {})):
        if key not in board or board[key].isna().any():
            raise ZsuError(f"the table is damaged: rows without {key!r}", where=str(file), remedy="move it away")
    for key, value in (about or {}).items():
        if (board[key].astype(str) != str(value)).any():
            found = ", ".join(map(str, board[key].unique()))
            what = f"the table was made with {key} {found}, not {value}"
            raise ZsuError(what, where=str(file), remedy="use another folder")
    return board


def plan(settings: Settings, jobs: int) -> str:
    """What `run` would do, as text: tasks, time and disk, from one timed training step and one timed batch."""
    splits = load_data(settings.dataset, settings.root)
    to_train, to_audit = stages(settings)
    if not to_train and not to_audit:
        return f"nothing to do: everything is in {settings.folder}"
    model, batch = fresh_model(splits), torch.rand(100, *splits.train[0][0].shape)
    step = fastest(lambda: model(batch).sum().backward())
    with torch.no_grad():
        forward = fastest(lambda: model(batch))
    passes = len(settings.methods) + settings.references + 1
    training_minutes = len(to_train) * settings.epochs * len(splits.train) / 100 * step / 60
    audit_minutes = len(to_audit) * passes * (len(splits.train) + len(splits.test)) / 100 * forward / 60
    cores = joblib.effective_n_jobs(jobs)
    megabytes = len(to_train) * sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    megabytes += len(to_audit) * (passes + 1) * 1e-3
    return (
        f"{len(to_train)} models to train, {len(to_audit)} audits of {len(settings.methods)} methods, in "
        f"{settings.folder}\n"
        f"at least {(training_minutes + audit_minutes) / cores:.1f} min on {cores} processes: training "
        f"{training_minutes:.1f}, outputs {audit_minutes:.1f} core-minutes; methods that train, and attacks, "
        f"come on top\ndisk: {megabytes:.1f} MB"
    )


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of five runs."""
    return min(timeit.repeat(run, number=1, repeat=5))
