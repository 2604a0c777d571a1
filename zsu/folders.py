"""Folders of images as people have them: which names are classes, which files are images, how deep their values are."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from .errors import ZsuError, in_one_line

# Beside names that begin with a dot, what systems and programs leave behind.
LEFT_BEHIND = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
TIFF_BITS, TIFF_WHITE = 258, 262  # tags: bits a value; 0 where 0 is white


class Folder(Dataset):
    """The images FOLDER/CLASS/*, as torchvision's ImageFolder has them, but for what `zsu.data.load` says of names."""

    def __init__(self, folder: Path, transform: Callable):
        files: dict[str, list[str]] = {}
        for entry in subfolders(folder, (folder.resolve(),)):
            name = normal(entry.name)
            if name in files:
                remedy = "rename one: an accent may be a character of its own or not"
                raise ZsuError(f"two class folders are called {name!r}", where=str(folder), remedy=remedy)
            if any("\ud800" <= c <= "\udfff" for c in name):  # how Python reads a name that is not UTF-8
                raise ZsuError(f"the name {name!r} of a class is not UTF-8", where=str(folder), remedy="rename it")
            files[name] = sorted(image_files(entry.path, (folder.resolve(),)), key=os.path.split)
        empty = sorted(name for name in files if not files[name])
        if empty or not files:
            what = f"no image in {', '.join(empty)}" if empty else "no class folder"
            remedy = f"lay images out as {folder.name}/CLASS/*, with endings {' '.join(IMG_EXTENSIONS)}"
            raise ZsuError(what, where=str(folder), remedy=remedy)
        self.classes = sorted(files)
        self.samples = [(path, label) for label, name in enumerate(self.classes) for path in files[name]]
        self.targets = [label for _, label in self.samples]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[i]
        return self.transform(open_image(path)), label


def visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, but for what systems and programs leave behind."""
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith(".") and e.name.casefold() not in LEFT_BEHIND]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is one, or a link to one; a link that leads to itself is none."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def subfolders(folder: str | Path, above: tuple[Path, ...]) -> list[os.DirEntry[str]]:
    """The folders in a folder, but for links to one of those above, or to one that holds these."""
    found = [entry for entry in visible(folder) if is_folder(entry)]
    return [e for e in found if not (e.is_symlink() and any(a.is_relative_to(Path(e).resolve()) for a in above))]


def image_files(folder: str, above: tuple[Path, ...]) -> list[str]:
    """Paths of the images in a folder and in those below it."""
    files, waiting = [], [(folder, above)]
    while waiting:
        here, above = waiting.pop()
        above = (*above, Path(here).resolve())
        files += [e.path for e in visible(here) if not is_folder(e) and is_image_file(e.name)]
        waiting += [(entry.path, above) for entry in subfolders(here, above)]
    return files


def open_image(path: str | os.PathLike) -> Image.Image:
    """A picture in RGB, 8 bits; `ZsuError` with its path where it cannot be read."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for a writer
            raise ValueError("this is no regular file")
        with Image.open(path) as image:
            return eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow raises many types
        what = f"cannot read this image ({in_one_line(error)})"
        raise ZsuError(what, where=str(path), remedy="replace the file") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 9 to 16 bits scaled to 8, where Pillow's `convert` would clip it; other images as they are."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # which Pillow scales to 16
    if image.mode in ("I", "F") and not deep:
        kind = "32-bit or signed integers" if image.mode == "I" else "floats"
        raise ValueError(f"nothing says which of its {kind} is white; save it with 8 bits, or 16 without sign")
    if not deep:
        return image
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    grey = np.asarray(image) / (2 ** tags.get(TIFF_BITS, (16,))[0] - 1)
    grey = 1 - grey if tags.get(TIFF_WHITE) == 0 else grey
    return Image.fromarray((255 * grey).round().astype(np.uint8))


def normal(name: object) -> str:
    """A name in Unicode's form NFC: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", str(name))
