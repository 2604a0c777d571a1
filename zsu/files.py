"""Files and folders of results: all of a file or nothing, and one folder for one set of settings."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from .errors import ZsuError


def make_folder(folder: str | os.PathLike) -> None:
    """Make a folder and those above it, where they are missing.

    Raises
    ------
    ZsuError
        That fails.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZsuError(f"cannot make this folder ({error})", where=str(folder), remedy="choose another") from error


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` for a file beside `path`, then move it there: all of the file or nothing.

    The temporary ends in .tmp, so that what a killed process leaves is no model, table or figure to any reader.

    Raises
    ------
    ZsuError
        The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "pass a path in a writable folder"
        raise ZsuError(f"cannot write this file ({error})", where=str(path), remedy=remedy) from error
    finally:
        with contextlib.suppress(OSError):  # it was never written, or is moved
            temporary.unlink()


def check_settings(path: Path, wanted: dict) -> None:
    """Write the settings of a folder of results; where there are some, refuse others.

    Raises
    ------
    ZsuError
        The settings there are others, or no JSON object.
    """
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(wanted, indent=1)))
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ZsuError(f"this is no JSON object ({error})", where=str(path), remedy="pass another folder") from error
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        listed = "; ".join(f"{key} was {found.get(key)!r}, is {wanted[key]!r}"[:200] for key in differing)
        remedy = "pass the same settings, or another folder for the results"
        raise ZsuError(f"this folder holds results of other settings: {listed}", where=str(path), remedy=remedy)
