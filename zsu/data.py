"""Data sets: the bundled Fashion-MNIST part, torchvision's own, folders of images; and samples of one class.

A data set here is anything with torchvision's attributes: ``len``, ``[i] -> (image, label)``,
``.targets`` (labels 0..C-1) and ``.classes`` (their names), or a ``Subset`` or ``ConcatDataset`` of such.
Where an item that is read has another label than ``.targets``, that is an error.
"""

import functools
import gzip
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torchvision import datasets, transforms

from .errors import ZsuError, check_count, check_seed, in_one_line, is_integer
from .folders import Folder, normal

MINI_FILE = Path(__file__).parent / "assets" / "fashion-mini.npz"
MINI_SHA256 = "2a24a9ecd9fdec7f014317c00e09f7a117bede044ed8479d8a7e7a0634591ba6"  # see `checksum`
MINI_ARRAYS = ["train_images", "train_labels", "test_images", "test_labels"]
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
TORCHVISION = {
    "fashion-mnist": datasets.FashionMNIST,
    "mnist": datasets.MNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}
NAMES = ["fashion-mini", *TORCHVISION]
GREY = {"fashion-mini", "fashion-mnist", "mnist"}  # the others are loaded in colour
IDX_PREFIX = {"train": "train", "test": "t10k"}


# ---------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------


class Splits(NamedTuple):
    """A training and a test data set with the same classes."""

    train: Dataset
    test: Dataset


class Images(Dataset):
    """Images held in memory as bytes, with torchvision's attribute names.

    Parameters
    ----------
    data : Tensor (N, C, H, W), uint8
    targets : Tensor (N,), integer
        Labels 0..len(classes)-1.
    classes : list of str
        The name of each label.
    transform : callable, optional
        As in torchvision: gets a PIL image. Without one, images become floats in [0, 1] (`ToTensor`).

    Raises
    ------
    ZsuError
        Other shapes or dtypes, or labels that are not 0..C-1.
    """

    def __init__(self, data: torch.Tensor, targets: Iterable, classes: list[str], transform: Callable | None = None):
        if not isinstance(data, torch.Tensor) or data.dtype != torch.uint8 or data.ndim != 4:
            found = f"has shape {tuple(data.shape)} and dtype {data.dtype}" if hasattr(data, "dtype") else None
            what = f"image data {found or f'is a {type(data).__name__}'}"
            raise ZsuError(what, where="Images", remedy="pass a uint8 tensor of shape (N, C, H, W)")
        self.data = data
        self.classes = list(classes)
        self.targets = integer_labels(targets, self.classes)
        if len(data) != len(self.targets):
            raise ZsuError(f"{len(data)} images but {len(self.targets)} labels", where="Images")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        label = int(self.targets[i])
        if self.transform is None:
            return self.data[i] / 255, label  # uint8 (C, H, W) -> float32 in [0, 1]
        return self.transform(transforms.functional.to_pil_image(self.data[i])), label


def load(
    name_or_folder: str | os.PathLike = "fashion-mini",
    root: str | os.PathLike = "data",
    *,
    download: bool = True,
    transform: Callable | None = None,
) -> Splits:
    """Load a data set by name, or from a folder of images.

    Parameters
    ----------
    name_or_folder : str or path
        ``"fashion-mini"`` (bundled: 12,000 + 2,000 images of Fashion-MNIST, needs no network),
        ``"fashion-mnist"``, ``"mnist"``, ``"cifar10"``, ``"cifar100"`` (torchvision; upper or lower case),
        or a folder DIR with DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val/CLASS/*).
    root : path
        Where torchvision keeps its files, or a folder with the IDX files of ``"mnist"`` or ``"fashion-mnist"``, such as
        that of Debian's package dataset-fashion-mnist; unused for the others.
    download : bool
        Whether torchvision may download what is missing in `root`.
    transform : callable, optional
        From PIL image to tensor. Default: `ToTensor`, a float32 tensor (C, H, W) in [0, 1].

    Returns
    -------
    Splits
        ``.train`` and ``.test``.

    Raises
    ------
    ZsuError
        Unknown name, missing or damaged files, a folder without the layout above.

    Notes
    -----
    Images of a folder are read as torchvision's ImageFolder reads them, files of the same endings: converted to RGB,
    which drops transparency, takes the first of several frames and leaves the orientation in EXIF alone. Grey of up to
    16 bits is scaled to 8; floats and wider integers are refused, as nothing says which value is white.
    Names that begin with a dot, ``__MACOSX`` and the like are no classes and no images, at any depth, and a link to a
    folder above is not followed. Classes are numbered in the order of their names in Unicode's form NFC.
    """
    name = str(name_or_folder).casefold()
    if name == "fashion-mini":
        return load_mini(transform)
    if name in TORCHVISION:
        return load_torchvision(name, root, download, transform)
    if name and os.path.isdir(str(name_or_folder)):
        return load_folder(Path(str(name_or_folder)), transform)
    remedy = f"pass one of {', '.join(NAMES)}, or a folder with train/CLASS/* and test/CLASS/*"
    raise ZsuError(f"no data set and no folder is called {str(name_or_folder)!r}", where="zsu.data.load", remedy=remedy)


def load_mini(transform: Callable | None) -> Splits:
    try:
        with np.load(MINI_FILE) as file:
            arrays = {name: file[name] for name in MINI_ARRAYS}
    except Exception as error:  # a missing, truncated or foreign file fails in many ways
        what = f"the bundled data cannot be read ({error})"
        raise ZsuError(what, where=str(MINI_FILE), remedy="reinstall zsu") from error
    if checksum(arrays) != MINI_SHA256:
        raise ZsuError("the bundled data does not match its checksum", where=str(MINI_FILE), remedy="reinstall zsu")
    pairs = ((arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in Splits._fields)
    return Splits(*(Images(channels_first(images), labels, FASHION_CLASSES, transform) for images, labels in pairs))


def load_torchvision(name: str, root: str | os.PathLike, download: bool, transform: Callable | None) -> Splits:
    if name in ("mnist", "fashion-mnist") and any(Path(root).glob("train-images-idx3-ubyte*")):
        return load_idx(name, root, transform)
    try:
        parts = [TORCHVISION[name](root, train=train, download=download) for train in (True, False)]
    except Exception as error:  # no network, no permission, damaged files: torchvision raises many types
        failed = f"the download failed ({error})" if download else "download=False"
        what = f"{name} is not complete in {str(root)!r} and {failed}"
        remedy = "check the network and the folder, copy torchvision's files there, or use 'fashion-mini'"
        raise ZsuError(what, where="zsu.data.load", remedy=remedy) from error
    return Splits(*(Images(channels_first(p.data), p.targets, p.classes, transform) for p in parts))


def load_idx(name: str, folder: str | os.PathLike, transform: Callable | None) -> Splits:
    """The IDX files of MNIST or Fashion-MNIST."""
    pairs, names = (read_idx_split(folder, part) for part in Splits._fields), TORCHVISION[name].classes
    return Splits(*(Images(channels_first(images), labels, names, transform) for images, labels in pairs))


def read_idx_split(folder: str | os.PathLike, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) and labels (N,) of a split, from its IDX files."""
    names = (f"{IDX_PREFIX[part]}-{what}-ubyte" for what in ("images-idx3", "labels-idx1"))
    images, labels = (read_idx(find_idx(folder, name)) for name in names)
    return images, labels


def find_idx(folder: str | os.PathLike, name: str) -> Path:
    places = [Path(folder) / sub / (name + end) for sub in ("", "FashionMNIST/raw") for end in (".gz", "")]
    for path in places:
        if path.is_file():
            return path
    remedy = "install Debian's dataset-fashion-mnist, or download with zsu.data.load('fashion-mnist')"
    raise ZsuError(f"there is no {name}(.gz)", where=str(folder), remedy=remedy)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, the number of dimensions, each dimension as big-endian int32, the data."""
    try:
        packed = path.read_bytes()
        raw = bytearray(gzip.decompress(packed) if path.suffix == ".gz" else packed)  # tensors can be written
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)  # bytes -> (N,) or (N, H, W)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ZsuError("this is not a complete IDX file", where=str(path), remedy="fetch it again") from error


def transform_for(name_or_folder: str | os.PathLike, channels: int, size: int | None = None) -> Callable | None:
    """For `load`: PIL image -> float32 (channels, size, size) in [0, 1]; None where the data is like that by itself."""
    grey = str(name_or_folder).casefold() in GREY
    if size is None and channels == (1 if grey else 3):
        return None
    if size is not None:
        check_count("size", size, "zsu.data")
    colour = transforms.Grayscale() if channels == 1 else transforms.Lambda(lambda image: image.convert("RGB"))
    resize = [] if size is None else [transforms.Resize((size, size))]
    return transforms.Compose([colour, *resize, transforms.ToTensor()])


def channels_first(data: np.ndarray | torch.Tensor) -> torch.Tensor:
    data = torch.as_tensor(data)
    if data.ndim == 3:
        return data[:, None]  # (N, H, W) -> (N, 1, H, W)
    return data.permute(0, 3, 1, 2).contiguous()  # (N, H, W, 3) -> (N, 3, H, W)


def load_folder(folder: Path, transform: Callable | None) -> Splits:
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), folder / "test")
    train, test = (load_split(part, transform) for part in (folder / "train", test))
    if train.classes != test.classes:
        what = f"the classes of train and test differ: {sorted(set(train.classes) ^ set(test.classes))}"
        raise ZsuError(what, where=str(folder), remedy="give both the same class folders")
    if len(train.classes) < 2:
        what = f"there is only one class, {train.classes[0]!r}"
        raise ZsuError(what, where=str(folder), remedy="forgetting a class needs at least two classes")
    return Splits(train, test)


def load_split(folder: Path, transform: Callable | None) -> Folder:
    try:
        return Folder(folder, transform or transforms.ToTensor())
    except OSError as error:  # no folder, or one that may not be read
        what = f"this folder holds no class folders with images ({error})"
        remedy = "lay the images out as train/CLASS/* and test/CLASS/*"
        raise ZsuError(what, where=str(folder), remedy=remedy) from error


# ---------------------------------------------------------------------------------------------------------
# Labels, samples, batches: for any data set with .targets and .classes
# ---------------------------------------------------------------------------------------------------------


def targets(dataset: Dataset) -> torch.Tensor:
    """Labels of a data set.

    Parameters
    ----------
    dataset : Dataset
        Has ``.targets`` and ``.classes``, or is a `Subset` of such a data set.

    Returns
    -------
    Tensor (N,), int64

    Raises
    ------
    ZsuError
        No ``.targets`` or ``.classes``, or labels that are not 0..C-1.
    """
    check_indexed(dataset)
    try:
        hasattr(dataset, "targets")
    except Exception as error:  # a property may raise any
        remedy = "mend the data set's own code"
        raise ZsuError(f".targets cannot be read ({in_one_line(error)})", where="zsu.data", remedy=remedy) from error
    if not hasattr(dataset, "targets") and isinstance(dataset, Subset):
        return targets(dataset.dataset)[subset_indices(dataset)]
    if not hasattr(dataset, "targets") and isinstance(dataset, ConcatDataset):
        classes(dataset)  # the same of all parts
        return torch.cat([targets(part) for part in dataset.datasets])
    if not hasattr(dataset, "targets"):
        remedy = "set dataset.targets to the labels and dataset.classes to their names, as torchvision does"
        raise ZsuError(f"a {type(dataset).__name__} has no .targets", where="zsu.data", remedy=remedy)
    labels = integer_labels(dataset.targets, classes(dataset))
    if len(labels) != len(dataset):
        what = f"{len(dataset)} items, but {len(labels)} labels in .targets"
        raise ZsuError(what, where="zsu.data", remedy="set dataset.targets to the labels of all items, in their order")
    return labels


def classes(dataset: Dataset) -> list[str]:
    """Class names of a data set, in the order of the labels, and in Unicode's form NFC.

    Raises
    ------
    ZsuError
        No ``.classes``, or parts of a `ConcatDataset` that differ in them.
    """
    check_indexed(dataset)
    if not hasattr(dataset, "classes") and isinstance(dataset, Subset):
        return classes(dataset.dataset)
    if not hasattr(dataset, "classes") and isinstance(dataset, ConcatDataset):
        first, *others = [classes(part) for part in dataset.datasets]
        if any(names != first for names in others):
            what = f"the parts have different classes: {first} and {next(n for n in others if n != first)}"
            raise ZsuError(what, where="zsu.data", remedy="give all parts the same .classes, in the same order")
        return first
    names = getattr(dataset, "classes", None)
    if not isinstance(names, Iterable) or isinstance(names, (str, set, frozenset, Iterator)):  # those have no order
        remedy = "pass a data set with .classes, the list of class names, and .targets, as torchvision's have"
        raise ZsuError(f"a {type(dataset).__name__} has no .classes", where="zsu.data", remedy=remedy)
    return [normal(name) for name in names]


def check_indexed(dataset: object) -> None:
    """`ZsuError` for streams, loaders and whatever else has no length and no items."""
    indexed = all(hasattr(dataset, name) for name in ("__len__", "__getitem__"))
    if not indexed or isinstance(dataset, IterableDataset):
        what = f"a {type(dataset).__name__} has no items that can be read by their number"
        raise ZsuError(what, where="zsu.data", remedy="pass a data set with len() and [i], not a stream or a loader")


def subset_indices(dataset: Subset) -> torch.Tensor:
    """Which items of its data set a `Subset` has: (N,), each >= 0."""
    size = len(dataset.dataset)
    try:
        indices = torch.as_tensor(dataset.indices)
    except Exception as error:  # lists of other things fail in many ways
        what = f"the indices of a Subset are no numbers ({in_one_line(error)})"
        raise ZsuError(what, where="zsu.data", remedy="pass a list of integers") from error
    if len(indices) == 0:
        return torch.empty(0, dtype=torch.int64)
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        what = f"the indices of a Subset have shape {tuple(indices.shape)} and dtype {indices.dtype}"
        raise ZsuError(what, where="zsu.data", remedy="pass a list of integers: of a mask, the places where it is True")
    indices = indices.to("cpu", torch.int64)
    if indices.min() < -size or indices.max() >= size:
        what = f"a Subset has indices {int(indices.min())} to {int(indices.max())} of a data set of {size} items"
        raise ZsuError(what, where="zsu.data", remedy="pass indices of items that are there")
    return indices % size


def integer_labels(labels: Iterable, names: list[str]) -> torch.Tensor:
    """Labels as int64, checked to be 0..C-1; class names become their indices."""
    remedy = "give one integer for each image"
    try:
        array = labels.cpu().to_dense() if isinstance(labels, torch.Tensor) else np.array(list(labels))
        if isinstance(array, np.ndarray) and isinstance(next(iter(array.flat), None), str):
            array = np.array([index_of_label(str(label), names) for label in array.flat])
        labels = torch.as_tensor(array)
    except ZsuError:
        raise
    except Exception as error:  # what data sets hold as labels fails in many ways
        raise ZsuError(f"the labels are no numbers ({in_one_line(error)})", where="zsu.data", remedy=remedy) from error
    if labels.ndim != 1 or (len(labels) and (labels.is_floating_point() or labels.is_complex())):
        what = f"the labels have shape {tuple(labels.shape)} and dtype {labels.dtype}"
        raise ZsuError(what, where="zsu.data", remedy=remedy)
    labels = labels.to(torch.int64)
    wrong = labels[(labels < 0) | (labels >= len(names))].unique().tolist()
    if wrong:
        what = f"labels {wrong[:10]} are not in 0..{len(names) - 1}, but there are {len(names)} classes"
        remedy = (
            "number the classes 0, 1, 2, ... in the order of .classes, as by numpy.unique(..., return_inverse=True)"
        )
        raise ZsuError(what, where="zsu.data", remedy=remedy)
    return labels


def index_of_label(label: str, names: list[str]) -> int:
    """Index of a label that is a class name."""
    found = [i for i, name in enumerate(names) if name == normal(label)]
    if len(found) != 1:
        what = f"label {label!r} is {'the name of several classes' if found else 'no class'}"
        raise ZsuError(what, where="zsu.data", remedy=f"use the names in .classes: {', '.join(names)}")
    return found[0]


def class_index(dataset: Dataset, cls: int | str) -> int:
    """Index of a class given by index, by name, or by an index in digits.

    Parameters
    ----------
    dataset : Dataset
    cls : int or str
        ``1``, ``"Trouser"``, ``"trouser"`` or ``"1"``. Digits are names where the names are digits. Case and spaces at
        the ends matter only where a name is written exactly so.

    Returns
    -------
    int

    Raises
    ------
    ZsuError
        No such class, or several of which none has exactly this name; the message lists the classes.
    """
    names = classes(dataset)
    index = index_of_name(names, cls) if isinstance(cls, str) else int(cls) if is_integer(cls) else None
    if index is None or not 0 <= index < len(names):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise ZsuError(f"there is no class {cls!r}", where="zsu.data", remedy=f"choose by index or name: {listed}")
    return index


def class_indices(dataset: Dataset, classes: int | str | Iterable[int | str]) -> list[int]:
    """Indices of one class or of several, in the order given, each once; errors as `class_index`."""
    if isinstance(classes, (torch.Tensor, np.ndarray)):
        classes = classes.tolist()
    named = classes if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]
    return list(dict.fromkeys(class_index(dataset, c) for c in named))


def index_of_name(names: list[str], name: str) -> int | None:
    for same in (normal, lambda text: normal(normal(text).strip().casefold())):  # exactly, then about so
        found = [i for i, other in enumerate(names) if same(other) == same(name)]
        if len(found) > 1:
            listed = ", ".join(f"{i} {names[i]!r}" for i in found)
            raise ZsuError(f"{name!r} may be any of {listed}", where="zsu.data", remedy="choose by index")
        if found:
            return found[0]
    digits = name.strip()
    if digits.isdecimal() and not any(n.isdecimal() for n in names):
        return int(digits)
    return None


def histogram(dataset: Dataset) -> str:
    """Number of images of each class, as text for a message: ``"T-shirt/top 200, Trouser 200"``."""
    return ", ".join(f"{name} {count}" for name, count in zip(classes(dataset), counts(dataset), strict=True))


def counts(dataset: Dataset) -> list[int]:
    """Number of images of each class."""
    return torch.bincount(targets(dataset), minlength=len(classes(dataset))).tolist()


def samples(dataset: Dataset, cls: int | str, n: int = 36, seed: int = 0) -> torch.Tensor:
    """Draw images of one class: the few unseen samples that zero-shot forgetting starts from.

    Pass the **test** split: the samples have to be unseen, that is, no part of the training data.

    Parameters
    ----------
    dataset : Dataset
    cls : int or str
        The class, by index or name.
    n : int
        How many images.
    seed : int
        Another seed draws others. The global random state is neither used nor changed.

    Returns
    -------
    Tensor (n, C, H, W), float32

    Raises
    ------
    ZsuError
        No such class, no image of it, or fewer than `n`; `n` < 1; images that do not stack.
    """
    return read(dataset, sample_indices(dataset, cls, n, seed), targets(dataset))[0]


def without_samples(dataset: Dataset, cls: int | str | Iterable[int | str], n: int = 36, seed: int = 0) -> Subset:
    """Everything but the images that `samples` draws with the same arguments, of one class or of each of several.

    Returns
    -------
    Subset
        Of `dataset`, in its order.

    Raises
    ------
    ZsuError
        As `samples`.
    """
    keep = torch.ones_like(targets(dataset), dtype=torch.bool)
    for index in class_indices(dataset, cls):
        keep[sample_indices(dataset, index, n, seed)] = False
    return Subset(dataset, keep.nonzero()[:, 0].tolist())  # (N - n, 1) -> (N - n,)


def sample_indices(dataset: Dataset, cls: int | str, n: int, seed: int) -> torch.Tensor:
    """Where the images are that `samples` draws: (n,)."""
    index = class_index(dataset, cls)
    check_count("n", n, "zsu.data")
    check_seed(seed, "zsu.data")
    members = (targets(dataset) == index).nonzero()[:, 0]  # (M, 1) -> (M,)
    if len(members) < n:
        what = f"{n} samples of class {classes(dataset)[index]!r} were asked for, the data has {len(members)}"
        remedy = f"pass a smaller n or other data; images by class: {histogram(dataset)}"
        raise ZsuError(what, where="zsu.data", remedy=remedy)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
    return members[order[:n]]


def batches(dataset: Dataset, batch_size: int = 100) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run through a data set in its order, without touching the global random state.

    Parameters
    ----------
    dataset : Dataset
    batch_size : int

    Yields
    ------
    x : Tensor (B, C, H, W), float32
    y : Tensor (B,), int64

    Raises
    ------
    ZsuError
        Items that are no (image, label), images that are no float tensors or that differ in shape, labels that are not
        those of ``.targets``; `batch_size` < 1.
    """
    check_count("batch_size", batch_size, "zsu.data")
    labels, images = targets(dataset), in_memory(dataset)
    for where in torch.arange(len(labels)).split(batch_size) if len(labels) else ():
        if images is None:
            yield read(dataset, where, labels)
        else:
            yield images[where] / 255, labels[where]


def in_memory(dataset: Dataset) -> torch.Tensor | None:
    """Images (N, C, H, W) of an `Images` without a transform, or of a `Subset` of one; None of other data sets."""
    if type(dataset) is Images and dataset.transform is None:  # not of a class whose items may be others
        return dataset.data
    if type(dataset) is Subset and not hasattr(dataset, "targets"):
        images = in_memory(dataset.dataset)
        return None if images is None else images[subset_indices(dataset)]
    return None


def read(dataset: Dataset, where: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some items, given where they are and the labels of all: images (B, C, H, W) and labels (B,), on the CPU.

    Everything that is read goes through here; errors as `batches`.
    """
    items = [read_item(dataset, i) for i in where.tolist()]
    found = integer_labels([label for _, label in items], classes(dataset))
    differs = (found != labels[where]).nonzero()[:, 0]  # (wrong, 1) -> (wrong,)
    if len(differs):
        i, theirs, mine = (int(t[differs[0]]) for t in (where, found, labels[where]))
        remedy = "set .targets to the labels that the items have, as after a target_transform"
        raise ZsuError(f"item {i} has label {theirs}, .targets has {mine}", where="zsu.data", remedy=remedy)
    return stack_images([image for image, _ in items]), found


def read_item(dataset: Dataset, i: int) -> Sequence:
    """One item (image, label) of a data set; what else it gives, or raises, is one `ZsuError`."""
    try:
        item = dataset[i]
    except ZsuError:
        raise
    except Exception as error:  # the data set's own code, and its transforms
        remedy = f"see what dataset[{i}] does, and leave out items that cannot be read"
        raise ZsuError(f"item {i} cannot be read ({in_one_line(error)})", where="zsu.data", remedy=remedy) from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        kind = type(item).__name__ + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
        remedy = "pass a data set whose items are pairs (image, label)"
        raise ZsuError(f"item {i} is a {kind}, not (image, label)", where="zsu.data", remedy=remedy)
    return item


def stack_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Images (C, H, W) to (B, C, H, W), without a graph, half precision as float32."""
    for image in images:
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            kind = f"tensor of {image.dtype}" if isinstance(image, torch.Tensor) else type(image).__name__
            remedy = "give the data set transform=torchvision.transforms.ToTensor()"
            if isinstance(image, torch.Tensor):
                remedy = "give the data set transform=torchvision.transforms.ConvertImageDtype(torch.float32)"
            elif isinstance(image, np.ndarray):
                remedy = "let its items be float tensors (C, H, W), as torch.from_numpy makes them of arrays"
            raise ZsuError(f"an image is a {kind}, not a float tensor", where="zsu.data", remedy=remedy)
        if image.layout != torch.strided or image.is_meta or image.is_nested:
            what = f"an image is a {image.layout} tensor on {image.device}"
            raise ZsuError(what, where="zsu.data", remedy="let the items be dense tensors with values")
        if image.shape != images[0].shape:
            what = f"images differ in shape: {tuple(images[0].shape)} and {tuple(image.shape)}"
            remedy = "pass a transform that resizes them, such as Compose([Resize((64, 64)), ToTensor()])"
            raise ZsuError(what, where="zsu.data", remedy=remedy)
    x = torch.stack(images).detach().cpu()
    return x.float() if x.dtype.itemsize < 4 else x


def first_image(dataset: Dataset) -> torch.Tensor:
    """The first image of a data set (C, H, W)."""
    if len(targets(dataset)) == 0:
        raise ZsuError("the data set is empty", where="zsu.data", remedy="pass one with images")
    return read(dataset, torch.tensor([0]), targets(dataset))[0][0]  # (1, C, H, W) -> (C, H, W)


def slug(name: str) -> str:
    """A name of classes as part of a file's name: T-shirt/top -> t-shirt-top."""
    return "-".join("".join(c if c.isalnum() or c == "-" else " " for c in name.lower()).split())


def content_hash(splits: Splits) -> str:
    """sha256 over images and labels of both splits."""
    digest = hashlib.sha256()
    for part in splits:
        for x, y in batches(part, 1000):
            digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def bundled_hash() -> str:
    """`content_hash` of the bundled data, which the bundled models were trained on."""
    return content_hash(load("fashion-mini"))


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over the bytes of the four arrays, in the order of `MINI_ARRAYS`."""
    digest = hashlib.sha256()
    for name in MINI_ARRAYS:
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
