"""The command `zsu`: forget, audit, paths, train, data. Bad input ends in one line and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__
from .errors import ZsuError

if TYPE_CHECKING:  # torch takes seconds to import, which `zsu --help` need not wait for
    from torch import Tensor, nn

    from .data import Splits

GREY = {"fashion-mini", "fashion-mnist", "mnist"}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Class = Annotated[str, typer.Option("--class", help="Class to forget, by name or index.")]
Model = Annotated[Path | None, typer.Option(help="Checkpoint (.safetensors, .pt). Default: the bundled small CNN.")]
Arch = Annotated[str | None, typer.Option(help="small-cnn or a torchvision model; default: as the checkpoint says.")]
Data = Annotated[str, typer.Option(help="Data set by name, or a folder with train/CLASS/* and test/CLASS/*.")]
Root = Annotated[str, typer.Option(help="Where torchvision keeps, and downloads, its data sets.")]
Size = Annotated[int | None, typer.Option(help="Resize images to SIZE x SIZE pixels. Default: as in training.")]
Samples = Annotated[int, typer.Option(help="Unseen samples of the class that the edit may look at.")]
Seed = Annotated[int, typer.Option(help="Which samples, which noise.")]
References = Annotated[
    Path | None, typer.Option(help="Folder of checkpoints retrained without the class. Bundled for Trouser.")
]
Trusted = Annotated[bool, typer.Option(help="Read checkpoints with pickled code: they can run anything. Only yours.")]


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"zsu {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
):
    """Make a trained image classifier forget a class, and check what it forgot."""


@app.command(epilog="Example: zsu forget --class Trouser --method paths --out forgotten.safetensors")
def forget(
    cls: Class,
    method: Annotated[str, typer.Option(help="paths, lra-npp, head-npp, mask or random.")] = "paths",
    perturbation: Annotated[str, typer.Option(help="zero, gaussian or laplace.")] = "zero",
    k: Annotated[int | None, typer.Option(help="At most so many edges; for other methods neurons per layer.")] = None,
    samples: Samples = 36,
    seed: Seed = 0,
    model: Model = None,
    arch: Arch = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    references: References = None,
    trusted: Trusted = False,
    out: Annotated[Path | None, typer.Option(help="Patch file. Default: forget-CLASS-METHOD.safetensors")] = None,
):
    """Forget one class: write the patch, and audit it beside the other methods and the controls."""
    from . import data as zsu_data
    from .evaluation import audit as run_audit
    from .evaluation import table
    from .forgetting import METHODS
    from .forgetting import forget as run_forget

    network, splits = prepare(model, arch, data, root, size, trusted)
    target, x = unseen(network, splits, cls, samples, seed)
    name = zsu_data.classes(splits.test)[target]
    chosen = run_forget(network, x, target, method, perturbation, k=k, seed=seed)
    row = method if perturbation == "zero" else f"{method}-{perturbation}"
    out = out or Path(f"forget-{slug(name)}-{row}.safetensors")
    held_out = zsu_data.without_samples(splits.test, target, samples, seed)
    if not (zsu_data.targets(held_out) == target).any():
        raise ZsuError(f"all {samples} test images of {name!r} are samples", where="--samples", remedy="leave some")
    chosen.patch.metadata["class"] = name
    chosen.patch.save(out)
    rows = {row: chosen}
    for other in METHODS:
        if other != method:
            rows[other] = run_forget(network, x, target, other, seed=seed)
    retrained = retrained_models(references, model, data, name, arch, trusted)
    print(table(run_audit(network, rows, splits.train, held_out, target, retrained)))
    print(f"\n{name}: weights changed by {row!r}: {chosen.patch.weights_changed:,}; patch written to {out}")


@app.command(epilog="Example: zsu audit --class Trouser --patch forgotten.safetensors")
def audit(
    cls: Class,
    patch: Annotated[Path, typer.Option(help="Patch that `zsu forget` wrote for this model.")],
    model: Model = None,
    arch: Arch = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    references: References = None,
    trusted: Trusted = False,
):
    """Audit a patch. The images that `zsu forget` has seen are left out of the test."""
    import copy

    from . import data as zsu_data
    from .evaluation import audit as run_audit
    from .evaluation import table
    from .forgetting import Forgotten
    from .perturb import Patch

    network, splits = prepare(model, arch, data, root, size, trusted)
    target = zsu_data.class_index(splits.test, cls)
    name = zsu_data.classes(splits.test)[target]
    loaded = Patch.load(patch)
    about = loaded.metadata
    if about.get("class", name) != name:
        what = f"the patch forgets {about['class']!r}, not {name!r}"
        raise ZsuError(what, where=str(patch), remedy="name that class")
    samples, seed = int(about.get("samples", 36)), int(about.get("seed", 0))
    edited = loaded.apply(copy.deepcopy(network))
    row = {about.get("method", patch.stem): Forgotten(edited, loaded, None)}
    held_out = zsu_data.without_samples(splits.test, target, samples, seed)
    retrained = retrained_models(references, model, data, name, arch, trusted)
    print(table(run_audit(network, row, splits.train, held_out, target, retrained)))


@app.command(epilog="Example: zsu paths --class Trouser --k 100 --out paths.npz")
def paths(
    cls: Annotated[str, typer.Option("--class", help="Class to explain, by name or index.")],
    k: Annotated[int, typer.Option(help="How many paths.")] = 100,
    rules: Annotated[
        str | None, typer.Option(help="Rule or composite. Default: epsilon, and z+ for a contrast.")
    ] = None,
    contrast: Annotated[bool, typer.Option(help="Only what goes beyond the runner-up's flow on each sample.")] = False,
    samples: Samples = 36,
    seed: Seed = 0,
    model: Model = None,
    arch: Arch = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    trusted: Trusted = False,
    show: Annotated[int, typer.Option(min=0, help="Print so many.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Also write them all: .csv, or .npz for zsu.Paths.load.")] = None,
):
    """Find the most probable neuronal paths of a class."""
    from . import data as zsu_data
    from .paths import find_paths
    from .relevance import explain, explain_contrast

    if out is not None and out.suffix not in (".csv", ".npz"):
        raise ZsuError(f"{out.suffix or 'no ending'}", where="--out", remedy="end the file in .csv or .npz")
    network, splits = prepare(model, arch, data, root, size, trusted)
    target, x = unseen(network, splits, cls, samples, seed)
    if contrast:
        relevance, against = explain_contrast(network, x, target, rules or "z+")
    else:
        relevance, against = explain(network, x, target, rules or "epsilon"), None
    found = find_paths(relevance, k, against=against)
    print(f"{zsu_data.classes(splits.test)[target]}: {found!r}")
    for path, probability in zip(found, found.probability[:show], strict=False):
        print(f"{probability:.3e}  " + "  ".join(f"{layer}:{channel}" for layer, channel in path))
    if out is not None and out.suffix == ".npz":
        found.save(out)
    elif out is not None:
        zsu_data.write_atomically(out, lambda temporary: found.to_frame().to_csv(temporary, index=False))


@app.command(
    epilog="Example: zsu train --data my-images --size 64 --arch resnet18 --exclude cat --out retrained.safetensors"
)
def train(
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
    arch: Annotated[str, typer.Option(help="small-cnn or a torchvision model.")] = "small-cnn",
    exclude: Annotated[str | None, typer.Option(help="Class to leave out: a reference for forgetting it.")] = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Initial weights and order of the images.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data. Default: the course's.")] = None,
):
    """Train a model from scratch, with or without a class."""
    from . import data as zsu_data
    from . import models, training
    from .evaluation import accuracy, predict

    channels = 1 if arch == "small-cnn" and data.casefold() in GREY else 3
    splits = zsu_data.load(data, root, transform=transform(data, channels, size))
    names = zsu_data.classes(splits.train)
    if exclude is not None:
        exclude = zsu_data.class_index(splits.train, exclude)
    settings = {"seed": seed, "epochs": training.EPOCHS if epochs is None else epochs}
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ZsuError("no writable folder", where=str(out.parent), remedy="choose another --out")
    network = training.train(
        lambda: models.build(arch, len(names), channels), splits.train, exclude=exclude, **settings
    )
    p, y = predict(network, splits.test)
    kept = y != (-1 if exclude is None else exclude)
    found = accuracy(p[kept], y[kept])
    about = {"arch": arch, "classes": len(names), "channels": channels, "class_names": names, "exclude": exclude}
    models.save(network, out, **about, **settings, size=size, test_accuracy=found)
    on = "" if exclude is None else f" on the other {len(names) - 1} classes"
    print(f"test accuracy {found:.3f}{on}; written to {out}")


@app.command(epilog="Example: zsu data mnist --root ~/data")
def data(
    name: Annotated[str, typer.Argument(help="Data set by name, or a folder.")] = "fashion-mini",
    root: Root = "data",
):
    """Say what is in a data set: image shape, classes, images per class. Downloads it where it is missing."""
    import torch

    from . import data as zsu_data

    splits = zsu_data.load(name, root)
    print(f"{name}: images {tuple(splits.test[0][0].shape)}, {len(splits.train):,} train, {len(splits.test):,} test")
    counts = [torch.bincount(zsu_data.targets(part)).tolist() for part in splits]
    for index, label in enumerate(zsu_data.classes(splits.train)):
        print(f"{index:>4}  {label:<20} {counts[0][index]:>7,} train {counts[1][index]:>7,} test")


def prepare(
    model: Path | None, arch: str | None, data: str, root: str, size: int | None, trusted: bool
) -> tuple[nn.Module, Splits]:
    """The model, and the data in the shape that it wants."""
    import torch

    from . import data as zsu_data
    from . import models
    from .relevance import forward

    if model is None and (arch or data.casefold() != "fashion-mini"):
        raise ZsuError("the bundled model knows the bundled data only", where="--model", remedy="give --model FILE")
    file = models.bundled_path() if model is None else model
    network = models.load(file, arch, trusted=trusted)
    about = models.metadata(file) if file.suffix == ".safetensors" else {}
    size = about.get("size") if size is None else size
    channels = next(
        (p.shape[1] for p in network.parameters() if p.dim() == 4), 3
    )  # the first convolution's (K, J, h, w)
    splits = zsu_data.load(data, root, transform=transform(data, channels, size))
    known, found = about.get("class_names"), zsu_data.classes(splits.test)
    if known is not None and known != found:
        raise ZsuError(
            f"the model knows {', '.join(known)}; the data holds {', '.join(found)}",
            where=str(file),
            remedy="use the data that the model was trained on",
        )
    like = next(network.parameters())
    with torch.no_grad():
        outputs = forward(network, splits.test[0][0][None].to(like.device, like.dtype)).shape[-1]
    if outputs != len(found):
        what = f"the model has {outputs} outputs, the data {len(found)} classes"
        raise ZsuError(what, where=str(file), remedy="use the data that the model was trained on")
    return network, splits


def unseen(network: nn.Module, splits: Splits, cls: str, samples: int, seed: int) -> tuple[int, Tensor]:
    """Index of the class, and samples of it as the model takes them."""
    from . import data as zsu_data

    target = zsu_data.class_index(splits.test, cls)
    like = next(network.parameters())
    return target, zsu_data.samples(splits.test, target, samples, seed).to(like.device, like.dtype)


def transform(data: str, channels: int, size: int | None):
    """PIL image -> float tensor (channels, size, size) in [0, 1]; None where the data is like that by itself."""
    from torchvision import transforms as t

    if size is None and channels == (1 if data.casefold() in GREY else 3):
        return None

    if size is not None and size < 1:
        raise ZsuError(f"{size} pixels", where="--size", remedy="use a positive number")
    colour = t.Grayscale() if channels == 1 else t.Lambda(lambda image: image.convert("RGB"))
    return t.Compose([colour, *([t.Resize((size, size))] if size else []), t.ToTensor()])


def retrained_models(
    folder: Path | None, model: Path | None, data: str, name: str, arch: str | None, trusted: bool
) -> list[nn.Module]:
    """References from the folder; the bundled ones for the bundled model and Trouser; none otherwise."""
    from . import models

    if folder is None:
        if model is None and name == "Trouser":
            return [models.bundled("retrained", seed) for seed in range(models.BUNDLED_SEEDS)]
        print("No models retrained without this class: JS is n/a (see --references).", file=sys.stderr)
        return []
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".pt", ".pth") and not is_patch(p))
    if not files:
        raise ZsuError("no checkpoints", where=str(folder), remedy="make some with `zsu train --exclude CLASS`")
    return [models.load(file, arch, trusted=trusted) for file in files]


def is_patch(file: Path) -> bool:
    """Whether `zsu forget` wrote the file."""
    from . import models

    return file.suffix == ".safetensors" and "zsu_patch" in models.metadata(file)


def slug(name: str) -> str:
    """T-shirt/top -> t-shirt-top"""
    return "-".join("".join(c if c.isalnum() or c == "-" else " " for c in name.lower()).split())


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads do not spin
    warnings.showwarning = lambda message, *_: print(f"zsu: warning: {message}", file=sys.stderr)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's own complaints about the command line
        if not isinstance(error, ZsuError) and usage is None:
            raise
        message = usage() if usage else str(error)
        print(message if message.startswith("Usage") else f"zsu: {message}", file=sys.stderr)
        sys.exit(2)
