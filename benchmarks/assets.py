"""Make what ships, anew: `python benchmarks/assets.py data` or `python benchmarks/assets.py models`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from zsu import ZsuError, data, models, training
from zsu.files import make_folder, write_atomically

PER_CLASS = {"train": 1200, "test": 200}
DATA_SEED = 2017
IDX_FOLDERS = ["/usr/share/datasets/fashion-mnist", "data"]  # Debian's package, torchvision's download


# --- data -----------------------------------------------------------------------------------------------------


def build_data(folder: str | Path, per_class: dict[str, int] = PER_CLASS) -> dict[str, np.ndarray]:
    """Select the bundled part from the IDX files of Fashion-MNIST.

    Of each class, the first of a seeded permutation (NumPy's PCG64, seed `DATA_SEED`, classes 0 to 9, the training
    files before the test files); the selected images keep the order of the files.

    Parameters
    ----------
    folder : path
        Holds train-images-idx3-ubyte and so on, plain or as .gz, or torchvision's FashionMNIST/raw.
    per_class : dict
        How many images of each class for ``"train"`` and ``"test"``.

    Returns
    -------
    dict
        `zsu.data.MINI_ARRAYS`: images (N, 28, 28) and labels (N,), uint8.

    Raises
    ------
    ZsuError
        Missing or damaged files, or too few images of a class.
    """
    rng = np.random.default_rng(DATA_SEED)
    arrays = {}
    for part in data.Splits._fields:
        images, labels = data.read_idx_split(folder, part)
        chosen = []
        for c in range(len(data.FASHION_CLASSES)):
            members = rng.permutation(np.flatnonzero(labels == c))
            if len(members) < per_class[part]:
                raise ZsuError(f"class {c} has {len(members)} images, need {per_class[part]}", where=str(folder))
            chosen.append(members[: per_class[part]])
        order = np.sort(np.concatenate(chosen))
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images[order], labels[order]
    return arrays


def make_data(root: str | Path | None = None) -> None:
    """Write the bundled file from the IDX files in a folder, by default the first of `IDX_FOLDERS`."""
    if root is None:
        root = next((folder for folder in IDX_FOLDERS if Path(folder).is_dir()), IDX_FOLDERS[0])
    arrays = build_data(root)
    if data.checksum(arrays) != data.MINI_SHA256:
        raise ZsuError(f"the rebuilt data has another checksum, {data.checksum(arrays)}", where=str(root))
    write_atomically(data.MINI_FILE, lambda path: save_npz(path, arrays))
    size = data.MINI_FILE.stat().st_size
    print(f"{data.MINI_FILE}: {size:,} bytes, sha256 of the arrays {data.MINI_SHA256}")


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # an open file, because savez adds .npz to a name
        np.savez_compressed(file, **arrays)


# --- models ---------------------------------------------------------------------------------------------------


def make_models(work: Path, splits: data.Splits) -> None:
    """Train all models that ship, except those finished in the folder `work`; then write them into place."""
    make_folder(work)
    wanted = [(kind, seed) for kind in models.BUNDLED_FILES for seed in range(models.BUNDLED_SEEDS)]
    for kind, seed in tqdm(wanted, desc="models", unit="model"):
        train_model(kind, seed, splits, work)
    for kind, seed in wanted:
        place = models.bundled_path(kind, seed)
        make_folder(place.parent)
        about, state = models.read_state(work / place.name)
        about |= measure(models.load(work / place.name), splits)
        models.save_state(state, place, about)
        print(f"{place.name}: test accuracy {about['test_accuracy']:.4f}, {about['seconds']} s")
    for kind, seed in wanted:
        (work / models.bundled_path(kind, seed).name).unlink()


def train_model(kind: str, seed: int, splits: data.Splits, work: Path) -> None:
    """Have one of the models that ship in the folder `work`."""
    recipe = {"epochs": training.EPOCHS, "batch_size": training.BATCH_SIZE, "lr": training.LEARNING_RATE}
    recipe |= {"seed": seed, "exclude": models.BUNDLED_WITHOUT if kind == "retrained" else None}
    settings = {
        "data": "fashion-mini", "data_sha256": data.MINI_SHA256, **recipe, "class_names": data.FASHION_CLASSES,
        "forget_class": models.BUNDLED_WITHOUT, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    path = work / models.bundled_path(kind, seed).name
    training.train_once(path, settings, lambda: training.train(models.SmallCNN, splits.train, **recipe, progress=False))


def measure(model: models.SmallCNN, splits: data.Splits) -> dict[str, float]:
    """Accuracies on the class that the retrained models never saw, and on the rest."""
    at_test, ag_test = training.class_accuracies(model, splits.test, models.BUNDLED_WITHOUT)
    at_train, ag_train = training.class_accuracies(model, splits.train, models.BUNDLED_WITHOUT)
    share = 1 / len(data.FASHION_CLASSES)  # of the class in the test split
    return {"test_accuracy": share * at_test + (1 - share) * ag_test, "at_test": at_test, "ag_test": ag_test,
            "at_train": at_train, "ag_train": ag_train}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["data", "models"])
    parser.add_argument("--root", help=f"folder of the IDX files; default: the first of {', '.join(IDX_FOLDERS)}")
    parser.add_argument("--work", type=Path, default=Path("_build/models"),
                        help="keeps finished models, so that an interrupted run can go on")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.what == "data":
        make_data(options.root)
    else:
        make_models(options.work, data.load("fashion-mini"))


if __name__ == "__main__":
    try:
        main()
    except ZsuError as error:
        raise SystemExit(f"error: {error}") from None
