"""Training and retraining from scratch, seeded; ``python -m zsu.training`` makes the models that ship."""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from . import data, models
from .errors import ZsuError, check_count
from .files import write_atomically

EPOCHS = 8
BATCH_SIZE = 80
LEARNING_RATE = 1e-2


def train(
    factory: Callable[[], nn.Module],
    dataset: Dataset,
    *,
    exclude: int | str | Sequence[int | str] | None = None,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    lr: float = LEARNING_RATE,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train a new model with Adam and a one-cycle learning rate.

    Parameters
    ----------
    factory : callable
        Builds a fresh model, such as `SmallCNN` or ``lambda: build("resnet18", 10, 3)``.
    dataset : Dataset
        The training split.
    exclude : int or str, or a list of them, optional
        A class to leave out, or several: retraining without it is the reference for forgetting it. The model keeps
        a logit for every class.
    epochs, batch_size : int
        Images beyond the last full batch are left to the next, differently shuffled epoch.
    lr : float
        The greatest learning rate of the cycle.
    seed : int
        Decides the initial weights, the order of the images and dropout. The global random state of
        PyTorch is put back afterwards.
    device : str or torch.device, optional
        Default: where the factory puts the model.
    progress : bool
        Show a progress bar.

    Returns
    -------
    nn.Module
        In eval mode. On one CPU, the same seed gives the same model.

    Raises
    ------
    ZsuError
        No data, no image of the excluded class or none besides, a model that does not fit the images or
        the number of classes, a loss that is not finite, more processes than images in a batch.

    Notes
    -----
    In a process group of `torch.distributed`, as torchrun makes them, all processes train one model together: each
    takes its share of every batch, and all return the model that one process would have trained, up to rounding.
    Two things differ: BatchNorm sees the share, not the batch, and dropout draws other numbers.
    """
    check_count("epochs", epochs, "zsu.training.train")
    check_count("batch_size", batch_size, "zsu.training.train")
    if not 0 < lr < math.inf:
        raise ZsuError(f"the learning rate is {lr!r}", where="zsu.training.train", remedy="pass lr > 0")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ZsuError(
            f"training starts from a fresh model, but a {type(factory).__name__} was given",
            where="zsu.training.train",
            remedy="pass a function that builds the model, such as SmallCNN without parentheses",
        )
    if exclude is not None:
        dataset = without_class(dataset, exclude)
    if len(data.targets(dataset)) == 0:
        raise ZsuError("there are no images to train on", where="zsu.training.train")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = _place(factory(), device)
        _check_fits(model, dataset)
        _fit(model, dataset, epochs, batch_size, lr, seed, progress)
    return model.eval()


def _fit(model: nn.Module, dataset: Dataset, epochs: int, batch_size: int, lr: float, seed: int, progress: bool):
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, len(dataset) // batch_size)
    batch_size = min(batch_size, len(dataset))
    rank, world = process()
    if world > batch_size:
        raise ZsuError(
            f"{world} processes cannot share batches of {batch_size}",
            where="zsu.training.train",
            remedy="use fewer processes or a greater batch_size",
        )
    together = DistributedDataParallel(model) if world > 1 else model
    if rank > 0:
        torch.manual_seed(seed + rank)  # other dropout on each share
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    device = next(model.parameters()).device
    model.train()
    with tqdm(total=epochs * steps, desc="training", unit="step", disable=not progress or rank > 0) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(dataset), generator=generator)[: steps * batch_size]
            share = order.reshape(steps, batch_size)[:, rank::world]  # (steps B,) -> (steps, B) -> (steps, share)
            total = torch.zeros((), device=device)
            for x, y in data.batches(Subset(dataset, share.flatten().tolist()), share.shape[1]):
                output = together(x.to(device))
                logits = getattr(output, "logits", output)  # Inception and GoogLeNet return more in train mode
                # The gradients of all processes are averaged: weighted so, that is the gradient of the whole batch.
                loss = F.cross_entropy(logits, y.to(device)) * (len(y) * world / batch_size)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                total += loss.detach()  # stays on the device: no waiting for it at every step
            if world > 1:
                distributed.all_reduce(total)
            mean = float(total) / (steps * world)
            if not math.isfinite(mean):
                raise ZsuError(f"the loss became {mean}", where="zsu.training.train", remedy=f"lower lr={lr}")
            bar.set_postfix(loss=f"{mean:.3f}")
    if world > 1:
        for statistic in model.buffers():  # of BatchNorm: each process has its own
            distributed.broadcast(statistic, 0)


def process() -> tuple[int, int]:
    """This process's rank, and how many processes there are: (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def without_class(dataset: Dataset, cls: int | str | Sequence[int | str]) -> Subset:
    """Everything but the images of a class, or of several.

    Raises
    ------
    ZsuError
        There are no images of one of them, or of no other class.
    """
    excluded = torch.tensor(data.class_indices(dataset, cls))
    kept = ~torch.isin(data.targets(dataset), excluded)
    lacking = ~torch.isin(excluded, data.targets(dataset))
    if lacking.any() or not kept.any():
        raise ZsuError(
            f"class {cls!r} cannot be left out: the data has {'none' if lacking.any() else 'only images'} of it",
            where="zsu.training.train",
            remedy=f"images by class: {data.histogram(dataset)}",
        )
    return Subset(dataset, kept.nonzero()[:, 0].tolist())  # (M, 1) -> (M,)


def kept(path: Path, settings: dict, make: Callable[[], nn.Module]) -> None:
    """Have a model in a file: `make` it where there is none with these settings, and note the seconds that it took."""
    if is_finished(path, settings):
        return
    started = time.perf_counter()
    model = make()
    models.save(model, path, **settings, seconds=round(time.perf_counter() - started, 1))


def _place(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ZsuError(f"the factory returned a {type(model).__name__}, no model", where="zsu.training.train")
    try:
        return model if device is None else model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or PyTorch built without it
        raise ZsuError(f"cannot use device {device!r} ({error})", where="zsu.training.train") from error


def _check_fits(model: nn.Module, dataset: Dataset) -> None:
    """Send one image through the model, so that a misfit is told before training."""
    x, _ = next(data.batches(Subset(dataset, [0])))
    classes = len(data.classes(dataset))
    try:
        with torch.no_grad():
            logits = model.eval()(x.to(next(model.parameters()).device))
    except RuntimeError as error:
        raise ZsuError(
            f"the model does not take images of shape {tuple(x.shape[1:])} ({error})",
            where="zsu.training.train",
            remedy="build it for these channels, or change the images with a transform",
        ) from error
    if logits.ndim != 2 or logits.shape[1] < classes:
        raise ZsuError(
            f"the model's output has shape {tuple(logits.shape)}, but there are {classes} classes",
            where="zsu.training.train",
            remedy="build it with one logit for each class",
        )


# ---------------------------------------------------------------------------------------------------------
# The models that ship
# ---------------------------------------------------------------------------------------------------------


def class_accuracies(model: nn.Module, dataset: Dataset, cls: int | str) -> tuple[float, float]:
    """Accuracy on one class and on the rest, At and Ag.

    Raises
    ------
    ZsuError
        No such class, or no image of it, or none of the rest.
    """
    of_class = data.targets(dataset) == data.class_index(dataset, cls)
    if of_class.all() or not of_class.any():
        raise ZsuError(
            f"accuracy needs images of class {cls!r} and of others",
            where="zsu.training.class_accuracies",
            remedy=f"images by class: {data.histogram(dataset)}",
        )
    device = next(model.parameters()).device
    with torch.no_grad():
        right = torch.cat([model(x.to(device)).argmax(1).cpu() == y for x, y in data.batches(dataset)])
    return right[of_class].double().mean().item(), right[~of_class].double().mean().item()


def train_bundled(kind: str, seed: int, splits: data.Splits, path: Path) -> None:
    """Train one of the models that ship and write it to `path` with what was measured on the way."""
    settings = _settings(kind, seed)
    start = time.perf_counter()
    model = train(
        models.SmallCNN, splits.train, exclude=settings["exclude"], epochs=EPOCHS, batch_size=BATCH_SIZE,
        lr=LEARNING_RATE, seed=seed, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    at_test, ag_test = class_accuracies(model, splits.test, models.BUNDLED_WITHOUT)
    at_train, ag_train = class_accuracies(model, splits.train, models.BUNDLED_WITHOUT)
    models.save(
        model, path, **settings, class_names=data.FASHION_CLASSES, forget_class=models.BUNDLED_WITHOUT,
        test_accuracy=0.1 * at_test + 0.9 * ag_test,  # the forget class is a tenth of the test split
        at_test=at_test, ag_test=ag_test, at_train=at_train, ag_train=ag_train,
        seconds=round(seconds, 1), threads=torch.get_num_threads(), torch=torch.__version__,
    )  # fmt: skip


def _settings(kind: str, seed: int) -> dict:
    """All that decides a model that ships."""
    return {
        "data": "fashion-mini", "data_sha256": data.MINI_SHA256, "seed": seed,
        "exclude": models.BUNDLED_WITHOUT if kind == "retrained" else None,
        "epochs": EPOCHS, "batch_size": BATCH_SIZE, "lr": LEARNING_RATE,
    }  # fmt: skip


def is_finished(path: Path, settings: dict) -> bool:
    """Whether the file holds a model that was made with these settings."""
    return path.is_file() and settings.items() <= models.metadata(path).items()


def make_bundled(splits: data.Splits, work: Path) -> None:
    """Train all models that ship, except those finished in the folder `work`; then move them into place."""
    wanted = [(kind, seed) for kind in models.BUNDLED_FILES for seed in range(models.BUNDLED_SEEDS)]
    for kind, seed in tqdm(wanted, desc="models", unit="model"):
        path = work / models.bundled_path(kind, seed).name
        if not is_finished(path, _settings(kind, seed)):
            train_bundled(kind, seed, splits, path)
    for place in [models.bundled_path(kind, seed) for kind, seed in wanted]:
        place.parent.mkdir(exist_ok=True)
        write_atomically(place, lambda temporary, place=place: shutil.move(work / place.name, temporary))
        about = models.metadata(place)
        print(f"{place.name}: test accuracy {about['test_accuracy']:.4f}, {about['seconds']} s")


def main(arguments: list[str] | None = None) -> None:
    """``python -m zsu.training [--work DIR]``: make the models in zsu/assets/models again."""
    parser = argparse.ArgumentParser(prog="python -m zsu.training", description="Train the models that ship.")
    parser.add_argument("--work", type=Path, default=Path("_build/models"),
                        help="keeps finished models, so that an interrupted run can go on")  # fmt: skip
    work = parser.parse_args(arguments).work
    work.mkdir(parents=True, exist_ok=True)
    make_bundled(data.load("fashion-mini"), work)


if __name__ == "__main__":
    try:
        main()
    except ZsuError as error:
        raise SystemExit(f"error: {error}") from None
