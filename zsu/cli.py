"""The command `zsu`; `zsu --help` lists what it does. Bad input ends in one line and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

import zsu  # its parts are imported when first used: `zsu --help` does not wait for torch

from .errors import ZsuError
from .files import write_atomically

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Classes = Annotated[list[str], typer.Option("--class", help="Class to forget, by name or index; may be repeated.")]
PatchFile = Annotated[Path, typer.Option(help="Patch that `zsu forget` wrote for this model.")]
Model = Annotated[Path | None, typer.Option(help="Checkpoint (.safetensors, .pt). Default: the bundled small CNN.")]
Arch = Annotated[str | None, typer.Option(help="small-cnn or a torchvision model; default: as the checkpoint says.")]
Outputs = Annotated[
    int | None, typer.Option("--classes", min=1, help="Of the checkpoint; default: as its weights say.")
]
Data = Annotated[str, typer.Option(help="Data set by name, or a folder with train/CLASS/* and test/CLASS/*.")]
Root = Annotated[str, typer.Option(help="Where torchvision keeps, and downloads, its data sets.")]
Size = Annotated[int | None, typer.Option(help="Resize images to SIZE x SIZE pixels. Default: as in training.")]
Samples = Annotated[int, typer.Option(help="Unseen samples of the class that the edit may look at.")]
Seed = Annotated[int, typer.Option(help="Which samples, which noise.")]
References = Annotated[
    Path | None, typer.Option(help="Folder of checkpoints retrained without the class. Bundled for Trouser.")
]
SomeClasses = Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")]
SomeMethods = Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")]
SomeMeasures = Annotated[list[str] | None, typer.Option(help="Only this measure; may be repeated.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the data in training. Default: the course's.")]
Seeds = Annotated[int, typer.Option(min=1, max=10_000, help="Number of seeds.")]
Retrained = Annotated[int, typer.Option(min=2, help="Retrained models for each class.")]
SmallImages = Annotated[str, typer.Option(help="fashion-mini, fashion-mnist or other small images.")]
Trusted = Annotated[bool, typer.Option(help="Read checkpoints with pickled code: they can run anything. Only yours.")]


def command(example: str) -> Callable[[Callable], Callable]:
    """A command of `zsu`, with an example at the end of its help."""
    return app.command(epilog=f"Example: zsu {example}")


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"zsu {zsu.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
):
    """Make a trained image classifier forget a class, and check what it forgot."""


@command("forget --class Trouser --method paths --out forgotten.safetensors")
def forget(
    cls: Classes,
    method: Annotated[str, typer.Option(help="As in zsu.forget, or paths+retained.")] = "paths",
    perturbation: Annotated[str, typer.Option(help="zero, gaussian or laplace.")] = "zero",
    k: Annotated[int | None, typer.Option(help="At most so many edges; for other methods neurons per layer.")] = None,
    perturbed: Annotated[int | None, typer.Option(help="So many of the most frequent neurons are perturbed.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="lra-npp: only this layer, or all; repeatable.")] = None,
    scale: Annotated[float, typer.Option(help="Of the noise, in deviations of the weights.")] = 1.0,
    absolute: Annotated[bool, typer.Option(help="Scale in units of the weights.")] = False,
    samples: Samples = 36,
    seed: Seed = 0,
    model: Model = None,
    arch: Arch = None,
    classes: Outputs = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    references: References = None,
    trusted: Trusted = False,
    out: Annotated[Path | None, typer.Option(help="Patch file. Default: forget-CLASS-METHOD.safetensors")] = None,
):
    """Forget classes: write the patch, and audit it beside other methods and the controls.

    Methods of tier T2 and above see the training images of the class, T3 also 20 of each other class, T4 all others.
    """
    known = zsu.forgetting.METHODS
    if method not in known:
        raise ZsuError(f"unknown method {method!r}", where="--method", remedy=f"use one of {', '.join(known)}")
    network, splits, targets, names = prepare(cls, Checkpoint(model, arch, classes, trusted), data, root, size)
    if len(targets) > 1 and method == "paths+retained":
        raise ZsuError("retained samples for several classes", where="--method", remedy="use zsu.forget in Python")

    retrained = find_references(references, Checkpoint(model, arch, classes, trusted), names)

    def run(method: str, **options) -> zsu.Forgotten:
        seen = [zsu.sweep.seen_by(method, splits, c, seed, samples) for c in targets]
        x = [x.to(next(network.parameters())) for x, _ in seen]
        return zsu.forget(network, x, targets, method, retained=seen[0][1], seed=seed, **options)

    if perturbation == "zero" and (scale != 1 or absolute):
        raise ZsuError("no noise is added", where="--scale", remedy="name --perturbation gaussian or laplace")
    options: dict[str, Any] = {"k": k, "perturbed": perturbed, "layers": layer}
    options |= {} if perturbation == "zero" else {"perturbation": perturbation, "scale": scale, "absolute": absolute}
    chosen = run(method, **options)
    row = method if perturbation == "zero" else f"{method}-{perturbation}"
    out = out or Path(f"forget-{zsu.data.slug(' '.join(names))}-{row.replace('+', '-')}.safetensors")
    check_writable(out)
    held_out = without_samples(splits, targets, samples, seed)
    about = chosen.patch.metadata
    about |= {"class": ", ".join(names), "unseen": samples} | ({"arch": arch} if arch else {})
    others = ("paths", "lra-npp", "head-npp", "mask", "bias-shift", "random")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*still taken for the class")  # the table has it; it is not of the method
        rows = {row: chosen} | {other: run(other) for other in others if other != method}
    measures = zsu.evaluation.BASIC
    report = zsu.audit(network, rows, splits.train, held_out, targets, retrained, measures=measures, controls=False)
    chosen.patch.save(out)  # where nothing was refused
    print(report)
    print(f"\n{', '.join(names)}: weights changed by {row!r}: {chosen.patch.weights_changed:,}; patch written to {out}")
    budget = chosen.patch.budget or "none"
    print(f"tier {about['tier']}; budget: {budget}; samples not recognised: {about['unrecognised']}")


@command("audit --class Trouser --patch forgotten.safetensors")
def audit(
    cls: Classes,
    patch: PatchFile,
    model: Model = None,
    arch: Arch = None,
    classes: Outputs = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    references: References = None,
    measure: SomeMeasures = None,
    trusted: Trusted = False,
    out: Annotated[Path | None, typer.Option(help="Also write a page (.html), with .csv and .json beside it.")] = None,
):
    """Audit a patch, beside the original, trivial edits and retrained models.

    The images that `zsu forget` has seen are left out of the test.
    """
    check_ending(out, ".html")
    network, splits, targets, names = prepare(cls, Checkpoint(model, arch, classes, trusted), data, root, size)
    loaded = zsu.Patch.load(patch)
    about, name = loaded.made, ", ".join(names)
    if isinstance(loaded.metadata.get("target"), str):
        raise ZsuError("an older zsu wrote this patch", where=str(patch), remedy="make it anew with zsu forget")
    if about.get("class", name) != name or about.get("target", targets) != targets:
        what = f"the patch forgets {about.get('class', about.get('target'))!r}, not {name!r}"
        raise ZsuError(what, where=str(patch), remedy="name that class")
    edited = zsu.inside.copied(network)
    loaded.apply(edited)
    method = about.get("method", patch.stem)
    row = f"patch-{method}" if method in ("", "original", "retrain", *zsu.evaluation.CONTROLS) else method
    unseen = zsu.forgetting.request.count_seen(loaded, network, splits.test)
    held_out = without_samples(splits, targets, unseen, about.get("seed", 0))
    retrained = find_references(references, Checkpoint(model, arch, classes, trusted), names)
    edits = {row: zsu.Forgotten(edited, loaded)}
    report = zsu.audit(network, edits, splits.train, held_out, targets, retrained, measures=measure)
    print(report)
    if out is not None:
        report.save(out)
        print(f"\nwritten to {out}")


@command("apply --patch forgotten.safetensors --out edited.safetensors")
def apply(
    patch: PatchFile,
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
    model: Model = None,
    arch: Arch = None,
    trusted: Trusted = False,
):
    """Write the checkpoint that a patch makes of a model. Refused for another model than the patch was made for."""
    write_edited(patch, out, model, trusted, "apply", arch)


@command("revert --model edited.safetensors --patch forgotten.safetensors --out back.safetensors")
def revert(
    model: Annotated[Path, typer.Option(help="Checkpoint that holds the patch.")],
    patch: PatchFile,
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
    arch: Arch = None,
    trusted: Trusted = False,
):
    """Write the checkpoint that was there before a patch, bit for bit."""
    write_edited(patch, out, model, trusted, "revert", arch)


@command("diff --patch forgotten.safetensors")
def diff(patch: PatchFile, model: Model = None, trusted: Trusted = False):
    """Say what made a patch, and what it changes in each layer; with --model also the share of the layer's weights."""
    loaded = zsu.Patch.load(patch)
    state = None if model is None else zsu.models.read_state(model, trusted=trusted)[1]
    if state is not None:
        names = zsu.models.inner_names(state, loaded.changes)
        state = {name: state[raw] for name, raw in names.items()}
        if lacking := [name for name in loaded.changes if name not in state]:
            remedy = "use the model that the patch was made for"
            raise ZsuError(f"the checkpoint has no {lacking[0]}", where=str(model), remedy=remedy)
    for key, value in loaded.metadata.items():
        print(f"{key:<15} {zsu.perturb.in_short(value)}")
    print(f"\n{loaded.diff(state).to_string(float_format='{:.4g}'.format)}")


@command("paths --class Trouser --k 100 --out paths.npz")
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
    classes: Outputs = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    trusted: Trusted = False,
    show: Annotated[int, typer.Option(min=0, help="Print so many.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Also write them all: .csv, or .npz for zsu.Paths.load.")] = None,
):
    """Find the most probable neuronal paths of a class."""
    check_ending(out, ".csv", ".npz")
    network, splits, (target,), (name,) = prepare([cls], Checkpoint(model, arch, classes, trusted), data, root, size)
    x = zsu.data.samples(splits.test, target, samples, seed).to(next(network.parameters()))
    if contrast:
        relevance, against = zsu.relevance.explain_contrast(network, x, target, rules or "z+")
    else:
        relevance, against = zsu.explain(network, x, target, rules or "epsilon"), None
    found = zsu.find_paths(relevance, k, against=against)
    print(f"{name}: {found!r}")
    for path, probability in zip(found, found.probability[:show], strict=False):
        print(f"{probability:.3e}  " + "  ".join(f"{layer}:{channel}" for layer, channel in path))
    if out is not None and out.suffix == ".npz":
        found.save(out)
    elif out is not None:
        write_atomically(out, lambda temporary: found.to_frame().to_csv(temporary, index=False))


@command("train --data my-images --size 64 --arch resnet18 --exclude cat --out retrained.safetensors")
def train(
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
    arch: Annotated[str, typer.Option(help="small-cnn or a torchvision model.")] = "small-cnn",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Class to leave out, as a reference for forgetting it; may be repeated.")
    ] = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Initial weights and order of the images.")] = 0,
    epochs: Epochs = None,
):
    """Train a model from scratch, with or without a class."""
    channels = 1 if arch == "small-cnn" and data.casefold() in zsu.data.GREY else 3
    splits = zsu.data.load(data, root, transform=zsu.data.transform_for(data, channels, size))
    names = zsu.data.classes(splits.train)
    left_out = sorted(zsu.data.class_indices(splits.train, exclude or []))
    settings = {"seed": seed, "epochs": epochs or zsu.training.EPOCHS}
    check_writable(out)
    network = zsu.training.train(
        lambda: zsu.models.build(arch, len(names), channels), splits.train, exclude=left_out or None, **settings
    )
    rest = zsu.training.without_class(splits.test, left_out) if left_out else splits.test
    found = zsu.evaluation.accuracy(*zsu.evaluation.predict(network, rest))
    about = {"arch": arch, "classes": len(names), "channels": channels, "class_names": names, "exclude": left_out}
    zsu.models.save(network, out, **about, **settings, size=size, test_accuracy=found)
    on = f" on the other {len(names) - len(left_out)} classes" if left_out else ""
    print(f"test accuracy {found:.3f}{on}; written to {out}")


@command("references --class Bag --number 8")
def references(
    cls: Classes,
    number: Annotated[
        int, typer.Option(min=1, help="How many; 3 are the least for all null bands, 8 make them narrow.")
    ] = 8,
    model: Model = None,
    arch: Arch = None,
    classes: Outputs = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the model's own, or the course's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: references/CLASS")] = None,
    trusted: Trusted = False,
):
    """Train models like a given one without classes, for `zsu audit --references`. Those that are there stay."""
    _, splits, targets, names = prepare(cls, Checkpoint(model, arch, classes, trusted), data, root, size)
    file, about = Checkpoint(model).read()
    kind = arch or about.get("arch")
    if kind is None:
        raise ZsuError("the checkpoint does not say its architecture", where=str(file), remedy="give --arch")
    folder = out or Path("references") / zsu.data.slug(" ".join(names))
    epochs = epochs or about.get("epochs", zsu.training.EPOCHS)
    size = about.get("size") if size is None else size
    zsu.training.train_references(folder, splits, targets, number, kind, epochs, size)
    print(f"{number} models without {', '.join(names)} in {folder}")


@command("sweep --out sweep --class Trouser --class Bag --dry-run")
def sweep(
    out: Annotated[Path, typer.Option(help="Folder for the results, one file a task, and the models.")],
    cls: SomeClasses = None,
    method: SomeMethods = None,
    measure: SomeMeasures = None,
    seeds: Seeds = 3,
    samples: Samples = 36,
    references: Retrained = 3,
    data: SmallImages = "fashion-mini",
    root: Root = "data",
    epochs: Epochs = None,
    jobs: Annotated[int, typer.Option(help="Processes; -1 is one a core.")] = -1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler, in place of --jobs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do, and stop.")] = False,
):
    """Classes x seeds x methods x measures on all cores or a cluster. Stopped or killed, it goes on where it was."""
    options = {
        "classes": cls, "seeds": range(seeds), "methods": method or tuple(zsu.forgetting.METHODS),
        "measures": measure or zsu.sweep.ALL, "samples": samples, "references": references,
        "epochs": epochs or zsu.training.EPOCHS,
    }  # fmt: skip
    if dry_run:
        print(zsu.sweep.plan(zsu.sweep.check_sweep(zsu.sweep.Settings(out, data, root, **options)), jobs))
        return
    try:
        table = zsu.sweep.run(out, data, root, **options, jobs=jobs, scheduler=scheduler)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with what is done in {out}", file=sys.stderr)
        raise
    write_atomically(out / "sweep.csv", lambda temporary: table.to_csv(temporary, index=False))
    print(f"{len(table)} rows written to {out / 'sweep.csv'}")


@command("bench --out bench --class Trouser --class Bag --seeds 1")
def bench(
    out: Annotated[Path, typer.Option(help="Folder for the table, the figure and the models that are trained.")],
    cls: SomeClasses = None,
    method: SomeMethods = None,
    seeds: Seeds = 3,
    samples: Samples = 36,
    references: Retrained = 3,
    data: SmallImages = "fashion-mini",
    root: Root = "data",
    epochs: Epochs = None,
):
    """Methods x classes x seeds in one table, beside retrained models. An interrupted run goes on where it was."""
    board = zsu.scoreboard.bench(
        out, data, root, cls, range(seeds), methods=method or tuple(zsu.forgetting.METHODS), samples=samples,
        references=references, epochs=epochs or zsu.training.EPOCHS,
    )  # fmt: skip
    print(zsu.scoreboard.as_text(board))
    figure = zsu.plots.scoreboard(board)
    write_atomically(out / "scoreboard.png", lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    print(f"\nwritten to {out / zsu.scoreboard.FILE} and {out / 'scoreboard.png'}")


@command("reproduce mnist-cnn --data ~/mnist --out mnist-cnn")
def reproduce(
    row: Annotated[
        str, typer.Argument(help="mnist-cnn, cifar10-resnet50, cifar100-resnet50, imagenet-mini-vgg16 or mufac-vit.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of the row's data: IDX, CIFAR archives, images or MUFAC.")],
    out: Annotated[Path, typer.Option(help="Folder for models and results; an interrupted run goes on there.")],
    seeds: Seeds = 5,
    size: Annotated[int | None, typer.Option(min=1, help="Image size. Default: the paper's.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the row's.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
):
    """One of the paper's experiments: train, retrain, forget, audit, over several seeds; on GPUs through torchrun."""
    frame = zsu.reproduce.run(row, data, out, seeds, size, epochs, device)
    if frame is not None:  # on the first process of torchrun
        print(zsu.reproduce.as_text(row, frame))


@command("data mnist --root ~/data")
def data(
    name: Annotated[str, typer.Argument(help="Data set by name, or a folder.")] = "fashion-mini",
    root: Root = "data",
):
    """Say what is in a data set: image shape, classes, images per class. Downloads it where it is missing."""
    splits = zsu.data.load(name, root)
    shape = tuple(zsu.data.first_image(splits.test).shape)
    print(f"{name}: images {shape}, {len(splits.train):,} train, {len(splits.test):,} test")
    labels, counts = zsu.data.classes(splits.train), [zsu.data.counts(part) for part in splits]
    for index, (label, train, test) in enumerate(zip(labels, *counts, strict=True)):
        print(f"{index:>4}  {label:<20} {train:>7,} train {test:>7,} test")


@command("doctor")
def doctor():
    """Check in ten seconds whether this machine is ready for the course, and say what to do where it is not."""
    findings = zsu.doctor.check()
    print(*findings, sep="\n")
    wrong = sum(not finding.ok for finding in findings)
    print(f"{wrong} to mend; then run `zsu doctor` again." if wrong else "Ready for the course.")
    raise typer.Exit(1 if wrong else 0)


def check_ending(out: Path | None, *endings: str) -> None:
    """`ZsuError` for a file to write that ends otherwise."""
    if out is not None and out.suffix not in endings:
        raise ZsuError(out.suffix or "no ending", where="--out", remedy=f"end the file in {' or '.join(endings)}")


def check_writable(out: Path) -> None:
    """`ZsuError`, before much is done, for a file to write in a folder that is none or cannot be written to."""
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ZsuError("no writable folder", where=str(out.parent), remedy="choose another --out")


class Checkpoint(NamedTuple):
    """What the command line says of the model; no file is the bundled one."""

    model: Path | None
    arch: str | None = None
    classes: int | None = None
    trusted: bool = False

    def read(self) -> tuple[Path, dict]:
        """The file, and what it says about itself."""
        file = zsu.models.bundled_path() if self.model is None else self.model
        return file, zsu.models.metadata(file) if zsu.models.is_safetensors(file) else {}


def prepare(
    cls: list[str], chosen: Checkpoint, data: str, root: str, size: int | None
) -> tuple[nn.Module, zsu.data.Splits, list[int], list[str]]:
    """The model, the data in the shape that it wants, and the classes, by index and by name in the order of indices."""
    if chosen.model is None and (chosen.arch or data.casefold() != "fashion-mini"):
        raise ZsuError("the bundled model knows the bundled data only", where="--model", remedy="give --model FILE")
    file, about = chosen.read()
    network = zsu.models.load(file, chosen.arch, chosen.classes, trusted=chosen.trusted)
    channels = zsu.models.guess_channels(network.state_dict())
    transform = zsu.data.transform_for(data, channels, about.get("size") if size is None else size)
    splits = zsu.data.load(data, root, transform=transform)
    known, found = about.get("class_names"), zsu.data.classes(splits.test)
    known = known and [zsu.folders.normal(name) for name in known]
    remedy = "use the data that the model was trained on"
    if known not in (None, found):
        what = f"the model knows {', '.join(known)}; the data holds {', '.join(found)}"
        raise ZsuError(what, where=str(file), remedy=remedy)
    outputs = zsu.models.count_outputs(network, splits.test, str(file))
    if outputs != len(found):
        what = f"the model has {outputs} outputs, the data {len(found)} classes"
        raise ZsuError(what, where=str(file), remedy=remedy)
    targets = sorted(zsu.data.class_indices(splits.test, cls))
    return network, splits, targets, [found[c] for c in targets]


def write_edited(
    patch: Path, out: Path, model: Path | None, trusted: bool, action: str, arch: str | None = None
) -> None:
    """Apply or revert a patch on the state dict of a file; names and types stay those of the file."""
    check_ending(out, ".safetensors")
    if os.path.realpath(out) == os.path.realpath(patch):
        raise ZsuError("the patch would be overwritten", where="--out", remedy="choose another file")
    loaded = zsu.Patch.load(patch)
    arch = arch or loaded.made.get("arch")
    try:
        zsu.models.edit_file(Checkpoint(model).read()[0], out, getattr(loaded, action), arch, trusted=trusted)
    except ZsuError as error:
        if arch is None and model is not None and error.where != str(model):
            remedy = f"{error.remedy}; where the file holds more than the model, give --arch"
            raise ZsuError(error.what, where=error.where, remedy=remedy) from error
        raise
    print(f"written to {out}")


def without_samples(splits: zsu.data.Splits, targets: list[int], samples: int, seed: int) -> Dataset:
    """The test data without the samples of each class, of which some image has to be left."""
    if samples == 0:
        return splits.test
    held_out = zsu.data.without_samples(splits.test, targets, samples, seed)
    for target in targets:
        if zsu.data.counts(held_out)[target] == 0:
            what = f"all {samples} test images of {zsu.data.classes(held_out)[target]!r} are samples"
            raise ZsuError(what, where="--samples", remedy="leave some")
    return held_out


def find_references(folder: Path | None, chosen: Checkpoint, names: list[str]) -> list[nn.Module]:
    """References from the folder; for the bundled model and one class `zsu.models.references`; none otherwise."""
    if folder is not None:
        return zsu.models.load_all(folder, chosen.arch, chosen.classes, trusted=chosen.trusted)
    found = zsu.models.references(*names) if chosen.model is None and len(names) == 1 else []
    if not found:
        asked = " ".join(f"--class {name!r}" for name in names)
        note = f"No models retrained without this class: JS is n/a. `zsu references {asked}` makes some."
        print(note, file=sys.stderr)
    return found


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
