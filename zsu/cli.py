"""The command `zsu`; `zsu --help` lists what it does. Bad input ends in one line and exit code 2."""

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

Classes = Annotated[list[str], typer.Option("--class", help="Class to forget, by name or index; may be repeated.")]
PatchFile = Annotated[Path, typer.Option(help="Patch that `zsu forget` wrote for this model.")]
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
SomeClasses = Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")]
SomeMethods = Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")]
SomeMeasures = Annotated[list[str] | None, typer.Option(help="Only this measure; may be repeated.")]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
Retrained = Annotated[int, typer.Option(min=2, help="Retrained models for each class.")]
SmallImages = Annotated[str, typer.Option(help="fashion-mini, fashion-mnist or other small images.")]
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
    cls: Classes,
    method: Annotated[str, typer.Option(help="As in zsu.forget, or paths+retained.")] = "paths",
    perturbation: Annotated[str, typer.Option(help="zero, gaussian or laplace.")] = "zero",
    k: Annotated[int | None, typer.Option(help="At most so many edges; for other methods neurons per layer.")] = None,
    perturbed: Annotated[int | None, typer.Option(help="So many of the most frequent neurons are perturbed.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="lra-npp: only in this layer; may be repeated.")] = None,
    scale: Annotated[float, typer.Option(help="Of the noise, in deviations of the weights.")] = 1.0,
    absolute: Annotated[bool, typer.Option(help="Scale in units of the weights.")] = False,
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
    """Forget classes: write the patch, and audit it beside other methods and the controls.

    Methods of tier T2 and above see the training images of the class, T3 also 20 of each other class, T4 all others.
    """
    from . import data as zsu_data
    from .evaluation import BASIC
    from .evaluation import audit as run_audit
    from .forgetting.request import TIERS
    from .forgetting.request import forget as run_forget
    from .scale.sweep import ROWS, seen_by

    if method not in ROWS:
        raise ZsuError(f"unknown method {method!r}", where="--method", remedy=f"use one of {', '.join(ROWS)}")
    network, splits = prepare(model, arch, data, root, size, trusted)
    targets, names = named(splits, cls)
    if len(targets) > 1 and method not in TIERS:
        raise ZsuError("retained samples for several classes", where="--method", remedy="use zsu.forget in Python")
    like = next(network.parameters())

    def run(method: str, **options):
        seen = [seen_by(method, splits, c, seed, samples) for c in targets]
        x, classes = [x.to(like.device, like.dtype) for x, _ in seen], targets
        if len(classes) == 1:
            (x,), (classes,) = x, classes
        plain = method.removesuffix("+retained")
        return run_forget(network, x, classes, plain, retained=seen[0][1], seed=seed, **options)

    options = {"k": k, "perturbed": perturbed, "layers": layer, "scale": scale, "absolute": absolute}
    chosen = run(method, perturbation=perturbation, **options)
    row = method if perturbation == "zero" else f"{method}-{perturbation}"
    out = out or Path(f"forget-{zsu_data.slug(' '.join(names))}-{row.replace('+', '-')}.safetensors")
    held_out = without(splits, targets, samples, seed)
    chosen.patch.metadata |= {"class": ", ".join(names), "unseen": str(samples)}
    chosen.patch.save(out)
    rows = {row: chosen}
    for other in ("paths", "lra-npp", "head-npp", "mask", "bias-shift", "random"):
        if other != method:
            rows[other] = run(other)
    retrained = retrained_models(references, model, data, names, arch, trusted)
    print(run_audit(network, rows, splits.train, held_out, targets, retrained, measures=BASIC, controls=False))
    about = chosen.patch.metadata
    print(f"\n{', '.join(names)}: weights changed by {row!r}: {chosen.patch.weights_changed:,}; patch written to {out}")
    print(f"tier {about['tier']}; budget: {about['budget'] or 'none'}; samples not recognised: {about['unrecognised']}")


@app.command(epilog="Example: zsu audit --class Trouser --patch forgotten.safetensors")
def audit(
    cls: Classes,
    patch: PatchFile,
    model: Model = None,
    arch: Arch = None,
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
    import copy

    from .evaluation import CONTROLS, MEASURES
    from .evaluation import audit as run_audit
    from .forgetting.perturb import Patch
    from .forgetting.request import Forgotten

    if out is not None and out.suffix != ".html":
        raise ZsuError(f"{out.suffix or 'no ending'}", where="--out", remedy="end the file in .html")
    network, splits = prepare(model, arch, data, root, size, trusted)
    targets, names = named(splits, cls)
    loaded = Patch.load(patch)
    about = loaded.metadata
    if about.get("class", ", ".join(names)) != ", ".join(names):
        what = f"the patch forgets {about['class']!r}, not {', '.join(names)!r}"
        raise ZsuError(what, where=str(patch), remedy="name that class")
    asked = ",".join(map(str, targets))
    if about.get("target", asked) != asked:
        raise ZsuError(f"the patch forgets class {about['target']}", where=str(patch), remedy="name that class")
    edited = loaded.apply(copy.deepcopy(network))
    method = about.get("method", patch.stem)
    row = {f"patch-{method}" if method in CONTROLS else method: Forgotten(edited, loaded, None)}
    held_out = without(splits, targets, unseen_samples(network, splits, targets, about), int(about.get("seed", 0)))
    retrained = retrained_models(references, model, data, names, arch, trusted)
    report = run_audit(network, row, splits.train, held_out, targets, retrained, measures=measure or tuple(MEASURES))
    print(report)
    if out is not None:
        report.save(out)
        print(f"\nwritten to {out}")


@app.command(epilog="Example: zsu apply --patch forgotten.safetensors --out edited.safetensors")
def apply(
    patch: PatchFile,
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
    model: Model = None,
    trusted: Trusted = False,
):
    """Write the checkpoint that a patch makes of a model. Refused for another model than the patch was made for."""
    write_edited(patch, out, model, trusted, "apply")


@app.command(
    epilog="Example: zsu revert --model edited.safetensors --patch forgotten.safetensors --out back.safetensors"
)
def revert(
    model: Annotated[Path, typer.Option(help="Checkpoint that holds the patch.")],
    patch: PatchFile,
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
    trusted: Trusted = False,
):
    """Write the checkpoint that was there before a patch, bit for bit."""
    write_edited(patch, out, model, trusted, "revert")


@app.command(epilog="Example: zsu diff --patch forgotten.safetensors")
def diff(patch: PatchFile, model: Model = None, trusted: Trusted = False):
    """Say what made a patch, and what it changes in each layer; with --model also the share of the layer's weights."""
    from . import models
    from .forgetting.perturb import Patch

    loaded = Patch.load(patch)
    state = None if model is None else models.read_state(model, trusted=trusted)[1]
    for key, value in loaded.metadata.items():
        print(f"{key:<15} {value}")
    print(f"\n{loaded.diff(state).to_string(float_format='{:.4g}'.format)}")


def write_edited(patch: Path, out: Path, model: Path | None, trusted: bool, action: str) -> None:
    """Apply or revert a patch on the state dict of a file; the architecture does not matter."""
    from . import models
    from .forgetting.perturb import Patch

    if out.resolve() == patch.resolve():
        raise ZsuError("the patch would be overwritten", where="--out", remedy="choose another file")
    about, state = models.read_state(checkpoint(model)[0], trusted=trusted)
    getattr(Patch.load(patch), action)(state)
    models.save_state(state, out, about)
    print(f"written to {out}")


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
    from .files import write_atomically
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
        write_atomically(out, lambda temporary: found.to_frame().to_csv(temporary, index=False))


@app.command(
    epilog="Example: zsu train --data my-images --size 64 --arch resnet18 --exclude cat --out retrained.safetensors"
)
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
    epochs: Annotated[int | None, typer.Option(help="Passes over the data. Default: the course's.")] = None,
):
    """Train a model from scratch, with or without a class."""
    import torch

    from . import data as zsu_data
    from . import models, training
    from .evaluation import accuracy, predict

    channels = 1 if arch == "small-cnn" and data.casefold() in GREY else 3
    splits = zsu_data.load(data, root, transform=transform(data, channels, size))
    names = zsu_data.classes(splits.train)
    left_out = sorted({zsu_data.class_index(splits.train, c) for c in exclude or []})
    settings = {"seed": seed, "epochs": training.EPOCHS if epochs is None else epochs}
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ZsuError("no writable folder", where=str(out.parent), remedy="choose another --out")
    network = training.train(
        lambda: models.build(arch, len(names), channels), splits.train, exclude=left_out or None, **settings
    )
    p, y = predict(network, splits.test)
    kept = torch.tensor([c not in left_out for c in y.tolist()])
    found = accuracy(p[kept], y[kept])
    about = {"arch": arch, "classes": len(names), "channels": channels, "class_names": names, "exclude": left_out}
    models.save(network, out, **about, **settings, size=size, test_accuracy=found)
    on = f" on the other {len(names) - len(left_out)} classes" if left_out else ""
    print(f"test accuracy {found:.3f}{on}; written to {out}")


@app.command(epilog="Example: zsu references --class Bag --number 8")
def references(
    cls: Classes,
    number: Annotated[
        int, typer.Option(min=1, help="How many; 3 are the least for all null bands, 8 make them narrow.")
    ] = 8,
    model: Model = None,
    arch: Arch = None,
    data: Data = "fashion-mini",
    root: Root = "data",
    size: Size = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the model's own, or the course's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: references/CLASS")] = None,
    trusted: Trusted = False,
):
    """Train models like a given one without classes, for `zsu audit --references`. Those that are there stay."""
    from tqdm.auto import tqdm

    from . import data as zsu_data
    from . import files, models, training

    network, splits = prepare(model, arch, data, root, size, trusted)
    targets, names = named(splits, cls)
    file, about = checkpoint(model)
    channels = channels_of(network)
    kind = arch or about.get("arch")
    if kind is None:
        raise ZsuError("the checkpoint does not say its architecture", where=str(file), remedy="give --arch")
    settings = {
        "arch": kind, "classes": len(zsu_data.classes(splits.train)), "channels": channels, "exclude": targets,
        "class_names": zsu_data.classes(splits.train), "data_sha256": zsu_data.content_hash(splits),
        "epochs": epochs or about.get("epochs", training.EPOCHS), "size": about.get("size") if size is None else size,
    }  # fmt: skip
    folder = Path("references") / zsu_data.slug(" ".join(names)) if out is None else out
    files.make_folder(folder)
    files.check_settings(folder / "settings.json", settings)
    for seed in tqdm(range(number), desc="references", unit="model"):
        training.kept(folder / f"{seed}.safetensors", settings | {"seed": seed}, lambda seed=seed: training.train(
            lambda: models.build(kind, settings["classes"], channels), splits.train, exclude=targets, seed=seed,
            epochs=settings["epochs"],
        ))  # fmt: skip
    print(f"{number} models without {', '.join(names)} in {folder}")


@app.command(epilog="Example: zsu sweep --out sweep --class Trouser --class Bag --dry-run")
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
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of models that are trained. Default: the course's.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; -1 is one a core.")] = -1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler, in place of --jobs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do, and stop.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep finished tasks, or do all audits anew.")] = True,
):
    """Classes x seeds x methods x measures on all cores or a cluster. Stopped or killed, it goes on where it was."""
    from . import training
    from .files import write_atomically
    from .scale import sweep as sweeping

    options = {
        "classes": cls, "seeds": range(seeds), "methods": method or sweeping.ROWS, "measures": measure or sweeping.ALL,
        "samples": samples, "references": references, "epochs": training.EPOCHS if epochs is None else epochs,
    }  # fmt: skip
    if not resume:
        for file in (out / "tasks").glob("*.csv"):
            file.unlink()
    if dry_run:
        print(sweeping.plan(*sweeping.checked(out, data, root, **options), jobs))
        return
    try:
        table = sweeping.run(out, data, root, **options, jobs=jobs, scheduler=scheduler)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with what is done in {out}", file=sys.stderr)
        raise
    write_atomically(out / "sweep.csv", lambda temporary: table.to_csv(temporary, index=False))
    print(f"{len(table)} rows written to {out / 'sweep.csv'}")


@app.command(epilog="Example: zsu bench --out bench --class Trouser --class Bag --seeds 1")
def bench(
    out: Annotated[Path, typer.Option(help="Folder for the table, the figure and the models that are trained.")],
    cls: SomeClasses = None,
    method: SomeMethods = None,
    seeds: Seeds = 3,
    samples: Samples = 36,
    references: Retrained = 3,
    data: SmallImages = "fashion-mini",
    root: Root = "data",
    epochs: Annotated[int | None, typer.Option(help="Of models that are trained. Default: the course's.")] = None,
):
    """Methods x classes x seeds in one table, beside retrained models. An interrupted run goes on where it was."""
    from . import plots, training
    from .files import write_atomically
    from .scale import scoreboard
    from .scale.sweep import ROWS

    board = scoreboard.bench(
        out, data, root, cls, range(seeds), method or ROWS, samples=samples, references=references,
        epochs=training.EPOCHS if epochs is None else epochs,
    )  # fmt: skip
    print(scoreboard.printed(board))
    figure = plots.scoreboard(board)
    write_atomically(out / "scoreboard.png", lambda temporary: figure.savefig(temporary, dpi=150))
    print(f"\nwritten to {out / scoreboard.FILE} and {out / 'scoreboard.png'}")


@app.command(epilog="Example: zsu reproduce mnist-cnn --data ~/mnist --out mnist-cnn")
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
    from .scale import reproduce as rows

    frame = rows.run(row, data, out, seeds, size, epochs, device)
    if frame is not None:  # on the first process of torchrun
        print(rows.printed(row, frame))


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


@app.command(epilog="Example: zsu doctor")
def doctor():
    """Check in ten seconds whether this machine is ready for the course, and say what to do where it is not."""
    from .doctor import check

    findings = check()
    for finding in findings:
        print(finding)
    wrong = sum(not finding.ok for finding in findings)
    print(f"{wrong} to mend; then run `zsu doctor` again." if wrong else "Ready for the course.")
    raise typer.Exit(1 if wrong else 0)


def prepare(
    model: Path | None, arch: str | None, data: str, root: str, size: int | None, trusted: bool
) -> tuple[nn.Module, Splits]:
    """The model, and the data in the shape that it wants."""
    import torch

    from . import data as zsu_data
    from . import models
    from .relevance.checks import forward

    if model is None and (arch or data.casefold() != "fashion-mini"):
        raise ZsuError("the bundled model knows the bundled data only", where="--model", remedy="give --model FILE")
    file, about = checkpoint(model)
    network = models.load(file, arch, trusted=trusted)
    size = about.get("size") if size is None else size
    channels = channels_of(network)
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


def checkpoint(model: Path | None) -> tuple[Path, dict]:
    """The file of the model, by default the bundled one, and what it says about itself."""
    from . import models

    file = models.bundled_path() if model is None else model
    return file, models.metadata(file) if file.suffix == ".safetensors" else {}


def channels_of(network: nn.Module) -> int:
    """Channels of the images: those that enter the first convolution (K, J, h, w); else 3."""
    return next((p.shape[1] for p in network.parameters() if p.dim() == 4), 3)


def unseen(network: nn.Module, splits: Splits, cls: str, samples: int, seed: int) -> tuple[int, Tensor]:
    """Index of the class, and samples of it as the model takes them."""
    from . import data as zsu_data

    target = zsu_data.class_index(splits.test, cls)
    like = next(network.parameters())
    return target, zsu_data.samples(splits.test, target, samples, seed).to(like.device, like.dtype)


def named(splits: Splits, cls: list[str]) -> tuple[list[int], list[str]]:
    """Indices and names of the classes, in the order of the indices."""
    from . import data as zsu_data

    targets = sorted({zsu_data.class_index(splits.test, c) for c in cls})
    return targets, [zsu_data.classes(splits.test)[c] for c in targets]


def unseen_samples(network: nn.Module, splits: Splits, targets: list[int], about: dict[str, str]) -> int:
    """How many test images of each class the edit has seen: those that `data.samples` draws, if their hash is the same.

    Warns where that cannot be told; training images, which methods of tier T2 and above see, are in no test.
    """
    from . import data as zsu_data
    from .forgetting.request import samples_hash

    if "unseen" in about:
        return int(about["unseen"])
    like = next(network.parameters())
    numbers = set(about.get("samples", "0").split(","))
    number = int(numbers.pop())
    if not numbers and 0 < number < int((zsu_data.targets(splits.test) == targets[0]).sum()):
        drawn = [zsu_data.samples(splits.test, c, number, int(about.get("seed", 0))).to(like) for c in targets]
        if samples_hash(drawn) == about.get("samples_sha256"):
            return number
    if about.get("tier", "T1") in ("T0", "T1") or about.get("method") == "paths":
        warnings.warn("which images the edit has seen is not known: they may be among those of the test", stacklevel=2)
    return 0


def without(splits: Splits, targets: list[int], samples: int, seed: int):
    """The test data without the samples of each class."""
    from . import data as zsu_data

    held_out = splits.test
    for target in targets if samples else []:
        held_out = zsu_data.without_samples(held_out, target, samples, seed)
        if not (zsu_data.targets(held_out) == target).any():
            what = f"all {samples} test images of {zsu_data.classes(splits.test)[target]!r} are samples"
            raise ZsuError(what, where="--samples", remedy="leave some")
    return held_out


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
    folder: Path | None, model: Path | None, data: str, names: list[str], arch: str | None, trusted: bool
) -> list[nn.Module]:
    """References from the folder; for the bundled model and one class `zsu.models.references`; none otherwise."""
    from . import models

    if folder is None:
        found = models.references(*names) if model is None and len(names) == 1 else []
        if found:
            return found
        asked = " ".join(f"--class {name!r}" for name in names)
        print(
            f"No models retrained without this class: JS is n/a. `zsu references {asked}` makes some.", file=sys.stderr
        )
        return []
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".pt", ".pth") and not is_patch(p))
    if not files:
        raise ZsuError("no checkpoints", where=str(folder), remedy="make some with `zsu references`")
    return [models.load(file, arch, trusted=trusted) for file in files]


def is_patch(file: Path) -> bool:
    """Whether `zsu forget` wrote the file."""
    from . import models

    return file.suffix == ".safetensors" and "zsu_patch" in models.metadata(file)


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
