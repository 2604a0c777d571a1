"""Models: a small CNN to learn on, torchvision's classifiers by name, checkpoints, and the ones that ship."""

import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision import models as torchvision_models

from . import data
from .checkpoints import (
    State,
    as_computed,
    check_file,
    check_same_shapes,
    damage,
    edit,
    find_state,
    guess_channels,
    guess_classes,
    guess_size,
    in_short,
    inner_names,
    read_torch,
    said,
)  # fmt: skip
from .errors import ZsuError, is_integer, warn
from .files import write_atomically
from .inside import logits_of

BUNDLED_FOLDER = Path(__file__).parent / "assets" / "models"
BUNDLED_FILES = {"original": "original-{}.safetensors", "retrained": "retrained-trouser-{}.safetensors"}
BUNDLED_SEEDS = 8
ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
BUNDLED_WITHOUT = "Trouser"  # what the retrained ones never saw


class SmallCNN(nn.Module):
    """Three convolutions, one hidden layer, one head: 42,090 parameters for 10 classes of grey images.

    Parameters
    ----------
    classes : int
        Number of logits.
    channels : int
        1 for grey, 3 for colour images.

    Notes
    -----
    Takes images of at least 16 x 16 pixels. `fit` makes their size fixed; on 28 x 28 it changes nothing.
    """

    def __init__(self, classes: int = 10, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.MaxPool2d(2)
        self.fit = nn.AdaptiveAvgPool2d(3)
        self.fc = nn.Linear(64 * 3 * 3, 32)
        self.relu4 = nn.ReLU()
        self.head = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) of images (N, channels, H, W)."""
        x = self.conv1(x).contiguous(memory_format=torch.channels_last)  # the same numbers, much faster on a CPU
        x = self.pool1(self.relu1(x))  # (N, channels, 28, 28) -> (N, 16, 14, 14)
        x = self.pool2(self.relu2(self.conv2(x)))  # -> (N, 32, 7, 7)
        x = self.fit(self.pool3(self.relu3(self.conv3(x))))  # -> (N, 64, 3, 3)
        x = self.relu4(self.fc(x.flatten(1)))  # (N, 64, 3, 3) -> (N, 576) -> (N, 32)
        return self.head(x)  # -> (N, classes)


def mnist_cnn(classes: int, channels: int, size: int) -> nn.Sequential:
    """The CNN of Chang et al. for MNIST, in `zsu.reproduce`."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * (size // 2) ** 2, 512), nn.ReLU(), nn.Linear(512, classes),
    )  # fmt: skip


def build(arch: str, classes: int = 10, channels: int = 1, size: int | None = None) -> nn.Module:
    """A fresh, untrained model.

    Parameters
    ----------
    arch : str
        ``"small-cnn"``, ``"mnist-cnn"`` or the name of a torchvision classifier, such as ``"resnet18"``.
    classes : int
        Number of logits.
    channels : int
        Channels of the images: 1 or 3; torchvision's models need 3.
    size : int, optional
        Of the images, for weights that depend on it: those of ``"mnist-cnn"``, by default 28, and ViTs, 224.

    Returns
    -------
    nn.Module
        In train mode. Its weights are drawn from the global random state, as PyTorch always does.

    Raises
    ------
    ZsuError
        Unknown `arch`, or a number of classes or channels that it cannot have.
    """
    if classes < 1 or channels not in (1, 3):
        what = f"a model with {classes} classes and {channels} channels was asked for"
        raise ZsuError(what, where="zsu.models.build", remedy="pass classes >= 1, and channels 1 (grey) or 3 (colour)")
    if arch == "small-cnn":
        return SmallCNN(classes, channels)
    if arch == "mnist-cnn":
        return mnist_cnn(classes, channels, size or 28)
    known = torchvision_models.list_models(module=torchvision_models)
    if arch not in known:
        close = difflib.get_close_matches(str(arch).casefold(), ["small-cnn", *known], n=3, cutoff=0.5)
        remedy = f"did you mean {' or '.join(close)}" if close else "pass small-cnn or a torchvision classifier"
        raise ZsuError(f"unknown architecture {arch!r}", where="zsu.models.build", remedy=remedy)
    if channels != 3:
        remedy = "use small-cnn, or repeat the grey channel in the transform and pass channels=3"
        raise ZsuError(f"{arch} needs images with 3 channels, not {channels}", where="zsu.models.build", remedy=remedy)
    options = {"image_size": size} if size and arch.startswith("vit") else {}
    return torchvision_models.get_model(arch, weights=None, num_classes=classes, **options)


def save(model: nn.Module, path: str | os.PathLike, **about) -> None:
    """Write a model as safetensors, whole or not at all.

    Parameters
    ----------
    model : nn.Module
    path : path
        An existing file is replaced.
    **about
        Metadata, anything JSON can hold, such as ``arch="resnet18", class_names=[...]``. The arch, classes
        and channels of a `SmallCNN` are added; give `arch` for others, so that `load` can build them.

    Raises
    ------
    ZsuError
        The file cannot be written, or JSON cannot hold a value.
    """
    if isinstance(model, SmallCNN):
        shape = {"classes": model.head.out_features, "channels": model.conv1.in_channels}
        about = {"arch": "small-cnn", **shape, **about}
    save_state(model.state_dict(), path, about)


def save_state(state: Mapping[str, torch.Tensor], path: str | os.PathLike, about: Mapping) -> None:
    """`save` for a state dict and its metadata, as `read_state` returns them."""
    try:
        strings = {key: json.dumps(value) for key, value in about.items()}
    except (TypeError, ValueError) as error:
        raise ZsuError(f"the metadata does not fit into JSON ({error})", where="zsu.models.save") from error
    # Copies, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    content = safetensors.torch.save(tensors, strings)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def metadata(path: str | os.PathLike) -> dict:
    """What `save` was told about a model. What another program means by the same keys, and does not fit, is left out.

    Raises
    ------
    ZsuError
        No such file, or not a complete safetensors file.
    """
    check_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            strings = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise damage(path, error) from error
    found = {key: json_or_text(text) for key, text in strings.items()}
    return {key: value for key, value in found.items() if fits(key, value)}


def fits(key: str, value: object) -> bool:
    """Whether metadata can have this value, where `load` or the command line reads it."""
    if value is None or key not in ("arch", "class_names", "classes", "channels", "size", "epochs"):
        return True
    if key in ("arch", "class_names"):
        return isinstance(value, str if key == "arch" else list)
    return is_integer(value) and value >= 1


def is_made_with(path: str | os.PathLike, settings: Mapping) -> bool:
    """Whether there is such a file, and its `metadata` say all that the settings say."""
    return Path(path).is_file() and settings.items() <= metadata(path).items()


def json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # written by another program
        return text


def load(
    path: str | os.PathLike,
    arch: str | None = None,
    classes: int | None = None,
    channels: int | None = None,
    *,
    trusted: bool = False,
) -> nn.Module:
    """Read a model from a safetensors file or a PyTorch checkpoint.

    Parameters
    ----------
    path : path
        A safetensors file, or what ``torch.save`` wrote: a state dict, alone or in a dict, as training programs
        keep it. Of a model and its moving average the model is taken.
    arch : str, optional
        As in `build`. Default: the metadata's, else ``"small-cnn"``.
    classes, channels : int, optional
        Default: the metadata's, else read off the weights.
    trusted : bool
        Also read checkpoints with pickled code, such as a whole model. Such a file can run anything on
        your machine: only for files of people you trust.

    Returns
    -------
    nn.Module
        In eval mode, on the CPU, in float32, or in float64 where the file has that. The global random state is not
        changed.

    Raises
    ------
    ZsuError
        Missing, damaged or foreign file, pickled code, or a checkpoint of another architecture.

    Warns
    -----
    UserWarning
        In one line, what was taken off or left: names that ``module.``, ``_orig_mod.``, ``model.`` or another prefix
        stands before, weights of other parts, half precision, a moving average.
    """
    about, content, notes = read_checkpoint(path, trusted)
    if isinstance(content, nn.Module):
        return content.eval()
    arch = arch or about.get("arch") or "small-cnn"
    with torch.random.fork_rng(devices=[]):  # building draws random weights, soon overwritten
        model, names = model_for(content, arch, classes or about.get("classes"), channels or about.get("channels"))
    wanted = model.state_dict()
    children = {name.partition(".")[0] for name in wanted}
    names = {name: raw for name, raw in names.items() if name in wanted or name.partition(".")[0] in children}
    state = as_computed({name: content[raw] for name, raw in names.items()})
    check_same_shapes(wanted, state, arch, path)
    if notes := notes + said(content, names, state):
        warn(f"{path}: {'; '.join(notes)}")
    model.to(next(t.dtype for t in state.values() if t.is_floating_point()))
    for name, t in model.state_dict().items():  # not load_state_dict, which changes some for the sake of old files
        t.copy_(state[name])
    return model.eval()


def model_for(
    state: Mapping[str, torch.Tensor], arch: str, classes: int | None, channels: int | None
) -> tuple[nn.Module, dict[str, str]]:
    """A fresh model of an architecture, of as many classes as the state dict has; and its names -> the file's."""
    grey = arch in ("small-cnn", "mnist-cnn") and guess_channels(state) == 1
    model = build(arch, classes or guess_classes(state), channels or (1 if grey else 3), guess_size(state))
    if getattr(model, "aux_logits", False) and not any("aux" in name.casefold() for name in state):
        cast(Any, model).aux_logits = False  # GoogLeNet and Inception, saved without the heads that help to train them
        for name, _ in list(model.named_children()):
            if "aux" in name.casefold():
                setattr(model, name, None)
    wanted = model.state_dict()
    names = inner_names(state, wanted)
    found = {name: state[names[name]] for name in wanted if name in names}
    rows = {len(t) for name, t in found.items() if t.ndim and t.shape[:1] != wanted[name].shape[:1]}
    if classes is None and len(rows) == 1 and rows != {guess_classes(state)}:
        return model_for(state, arch, rows.pop(), channels)  # the head is no matrix, or not the last one
    return model, names


def read_state(path: str | os.PathLike, *, trusted: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """Metadata and state dict of a file that `load` reads, names and types as they are there.

    Raises
    ------
    ZsuError
        Missing, damaged or foreign file, or pickled code that is not trusted.
    """
    about, state, notes = read_checkpoint(path, trusted)
    if notes:
        warn(f"{path}: {'; '.join(notes)}")
    return about, state.state_dict() if isinstance(state, nn.Module) else dict(state)


def edit_file(
    path: str | os.PathLike,
    out: str | os.PathLike,
    change: Callable[[State], object],
    arch: str | None = None,
    *,
    trusted: bool = False,
) -> None:
    """Write what a change, such as ``patch.apply``, makes of a file that `load` reads; names and types stay the file's.

    The architecture matters where the file holds more than the model.

    Raises
    ------
    ZsuError
        As `read_state`, and as the change.

    Warns
    -----
    UserWarning
        New values that need more digits than the file's type has: those weights are written as they are computed.
    """
    about, state = read_state(path, trusted=trusted)
    wider = edit(state, about, change, () if arch is None else build(arch, channels=3).state_dict())
    save_state(state, out, about)
    if wider:
        warn(f"{out} has some weights in more digits than {path}: {in_short(wider)}")


def read_checkpoint(path: str | os.PathLike, trusted: bool) -> tuple[dict, State | nn.Module, list[str]]:
    """Metadata, the state dict or whole model, and what else was in the file, in words."""
    if not is_safetensors(path):
        return {}, *find_state(read_torch(path, trusted), path)
    try:
        return metadata(path), safetensors.torch.load_file(path), []
    except safetensors.SafetensorError as error:
        raise damage(path, error) from error


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether the file begins as safetensors do: eight bytes of header length, then JSON."""
    check_file(path)
    with open(path, "rb") as file:
        return Path(path).suffix == ".safetensors" or file.read(9)[8:] == b"{"


def count_outputs(model: nn.Module, dataset: Dataset, where: str) -> int:
    """How many logits a model has for an image of a data set; `ZsuError` where it does not take such images."""
    with torch.no_grad():
        return logits_of(model, data.first_image(dataset)[None], where).shape[1]


def bundled(kind: str = "original", seed: int = 0) -> SmallCNN:
    """A model that ships with zsu, trained by ``benchmarks/assets.py`` on ``fashion-mini``.

    Parameters
    ----------
    kind : str
        ``"original"``, trained on all ten classes, or ``"retrained"``, trained from scratch without
        class 1, Trouser: the reference that forgetting is measured against.
    seed : int
        0 to 7. ``bundled()`` is the one of the course; the others tell how much training varies by itself.

    Returns
    -------
    SmallCNN
        In eval mode, with 10 logits.

    Raises
    ------
    ZsuError
        Another kind or seed.
    """
    return cast(SmallCNN, load(bundled_path(kind, seed)))


def bundled_path(kind: str = "original", seed: int = 0) -> Path:
    """The file of `bundled`, for `metadata`: accuracies and how the model was trained."""
    if kind not in BUNDLED_FILES or seed not in range(BUNDLED_SEEDS):
        what = f"no bundled model is called {kind!r} with seed {seed!r}"
        remedy = f"pass one of {', '.join(BUNDLED_FILES)}, and a seed from 0 to {BUNDLED_SEEDS - 1}"
        raise ZsuError(what, where="zsu.models.bundled", remedy=remedy)
    return BUNDLED_FOLDER / BUNDLED_FILES[kind].format(seed)


def references(name: str | int, folder: str | os.PathLike = "references") -> list[nn.Module]:
    """What forgetting one class of ``fashion-mini`` is measured against: models that never saw it.

    Parameters
    ----------
    name : str or int
        The class. For Trouser eight models ship; for any other ``zsu references --class NAME`` trains some.
    folder : path
        Where that command was run, and ``references`` after it.

    Returns
    -------
    list of SmallCNN
        In eval mode; empty where there are none, never models that saw the class.

    Raises
    ------
    ZsuError
        No such class; models in the folder of another architecture, or trained otherwise.
    """
    fashion = data.load("fashion-mini")
    target = data.class_index(fashion.test, name)
    name = data.classes(fashion.test)[target]
    if name == BUNDLED_WITHOUT:
        return [bundled("retrained", seed) for seed in range(BUNDLED_SEEDS)]
    made = (Path(folder) / data.slug(name)).glob("*.safetensors")
    files = sorted((file for file in made if file.stem.isdecimal()), key=lambda file: int(file.stem))
    if not files:
        return []
    wanted = {"arch": "small-cnn", "exclude": [target], "epochs": metadata(bundled_path())["epochs"]}
    wanted["data_sha256"] = data.bundled_hash()
    for file in files:
        if not is_made_with(file, wanted):
            what = f"this is no small CNN trained on fashion-mini without {name} for {wanted['epochs']} epochs"
            remedy = f"move the folder away and run `zsu references --class {name!r}`, or name it in --references"
            raise ZsuError(what, where=str(file), remedy=remedy)
    return [load(file) for file in files]


def load_all(
    folder: str | os.PathLike, arch: str | None = None, classes: int | None = None, *, trusted: bool = False
) -> list[nn.Module]:
    """Every checkpoint in a folder, by name, as `load` reads it; hidden files and patches are left out.

    Raises
    ------
    ZsuError
        There are none, or one of them cannot be read.
    """
    files = [p for p in sorted(Path(folder).glob("[!.]*")) if p.suffix in ENDINGS]
    found = [
        load(p, arch, classes, trusted=trusted) for p in files if not (is_safetensors(p) and "zsu_patch" in metadata(p))
    ]
    if not found:
        raise ZsuError("no checkpoints", where=str(folder), remedy="make some with `zsu references`")
    return found
