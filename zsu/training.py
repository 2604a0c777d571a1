"""Training and retraining from scratch, seeded; and once only, so that what was interrupted goes on."""

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from . import data, models
from .errors import ZsuError, check_count, check_seed, is_number
from .files import check_settings, make_folder
from .inside import check_logits, logits_of, model_errors, place

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
    check_seed(seed, "zsu.training.train")
    if not is_number(lr) or lr <= 0:
        raise ZsuError(f"the learning rate is {lr!r}", where="zsu.training.train", remedy="pass lr > 0")
    if isinstance(factory, nn.Module) or not callable(factory):
        what = f"training starts from a fresh model, but a {type(factory).__name__} was given"
        remedy = "pass a function that builds the model, such as SmallCNN without parentheses"
        raise ZsuError(what, where="zsu.training.train", remedy=remedy)
    if exclude is not None:
        dataset = without_class(dataset, exclude)
    if len(data.targets(dataset)) == 0:
        raise ZsuError("there are no images to train on", where="zsu.training.train")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = move(factory(), device)
        check_enough_outputs(model, dataset)
        fit(model, dataset, epochs, batch_size, lr, seed, progress)
    return model.eval()


def fit(model: nn.Module, dataset: Dataset, epochs: int, batch_size: int, lr: float, seed: int, progress: bool) -> None:
    """The training loop of `train`, in one process or in several."""
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, len(dataset) // batch_size)
    batch_size = min(batch_size, len(dataset))
    rank, world = process()
    if world > batch_size:
        what = f"{world} processes cannot share batches of {batch_size}"
        raise ZsuError(what, where="zsu.training.train", remedy="use fewer processes or a greater batch_size")
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
                with model_errors(model, x, "zsu.training.train"):
                    output = together(place(x, model))
                    logits = getattr(output, "logits", output)  # Inception and GoogLeNet return more in train mode
                    check_logits(model, logits, x, "zsu.training.train")
                    # The gradients of all processes are averaged: so weighted, that is the gradient of the whole batch.
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
        what = f"class {cls!r} cannot be left out: the data has {'none' if lacking.any() else 'only images'} of it"
        raise ZsuError(what, where="zsu.training.train", remedy=f"images by class: {data.histogram(dataset)}")
    return Subset(dataset, kept.nonzero()[:, 0].tolist())  # (M, 1) -> (M,)


def train_once(path: Path, settings: dict, make: Callable[[], nn.Module]) -> None:
    """Have a model with these settings in a file: `make` it where it is not there yet.

    All settings are kept in its metadata, and the seconds that it took, and in how many processes. In a process group
    the first process says whether it is there, all make it together, and the first one writes it.
    """
    rank, world = process()
    there = [models.is_made_with(path, settings)]
    if world > 1:
        distributed.broadcast_object_list(there)
    if there[0]:
        return
    started = time.perf_counter()
    model = make()
    if rank == 0:
        models.save(model, path, **settings, seconds=round(time.perf_counter() - started, 2), world=world)


def train_references(
    folder: str | os.PathLike,
    splits: data.Splits,
    exclude: Sequence[int | str],
    number: int,
    arch: str,
    epochs: int = EPOCHS,
    size: int | None = None,
) -> None:
    """Train models without some classes into a folder, FOLDER/SEED.safetensors; those that are there stay.

    Parameters
    ----------
    folder : path
        Made where it is missing; settings.json in it says how its models were trained.
    splits : Splits
        Whose training part they see, but for the classes.
    exclude : list of int or str
        The classes.
    number : int
        How many models, with seeds from 0 on.
    arch : str
        As in `zsu.models.build`.
    epochs : int
    size : int, optional
        That the images were resized to, to be kept in the metadata.

    Raises
    ------
    ZsuError
        As `train`; the folder holds models of other settings.
    """
    names, channels = data.classes(splits.train), data.first_image(splits.train).shape[0]
    settings = {
        "arch": arch, "classes": len(names), "channels": channels, "class_names": names, "epochs": epochs,
        "exclude": data.class_indices(splits.train, exclude), "data_sha256": data.content_hash(splits), "size": size,
    }  # fmt: skip
    make_folder(folder)
    check_settings(Path(folder) / "settings.json", settings)
    build = partial(models.build, arch, len(names), channels)
    make = partial(train, build, splits.train, exclude=exclude, epochs=epochs)
    for seed in tqdm(range(number), desc="references", unit="model"):
        train_once(Path(folder) / f"{seed}.safetensors", settings | {"seed": seed}, partial(make, seed=seed))


def move(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """A model to its device, if there is one; what is no model is refused."""
    if not isinstance(model, nn.Module):
        raise ZsuError(f"the factory returned a {type(model).__name__}, no model", where="zsu.training.train")
    try:
        return model if device is None else model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or PyTorch built without it
        raise ZsuError(f"cannot use device {device!r} ({error})", where="zsu.training.train") from error


def check_enough_outputs(model: nn.Module, dataset: Dataset) -> None:
    """`ZsuError` before training unless the model takes the images and has a logit for each class."""
    outputs, classes = models.count_outputs(model.eval(), dataset, "zsu.training.train"), len(data.classes(dataset))
    if outputs < classes:
        what, remedy = f"the model has {outputs} outputs, but there are {classes} classes", "build it with one for each"
        raise ZsuError(what, where="zsu.training.train", remedy=remedy)


def class_accuracies(model: nn.Module, dataset: Dataset, cls: int | str) -> tuple[float, float]:
    """Accuracy on one class and on the rest, At and Ag.

    Raises
    ------
    ZsuError
        No such class, or no image of it, or none of the rest.
    """
    of_class = data.targets(dataset) == data.class_index(dataset, cls)
    if of_class.all() or not of_class.any():
        what = f"accuracy needs images of class {cls!r} and of others"
        remedy = f"images by class: {data.histogram(dataset)}"
        raise ZsuError(what, where="zsu.training.class_accuracies", remedy=remedy)
    with torch.no_grad():
        right = torch.cat([logits_of(model, x).argmax(1).cpu() == y for x, y in data.batches(dataset)])
    return right[of_class].double().mean().item(), right[~of_class].double().mean().item()
