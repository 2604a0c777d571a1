"""What goes wrong: the one exception of the package, warnings at the caller's line, and the check of numbers."""

import sys
import warnings
from numbers import Integral
from typing import TypeGuard


class ZsuError(ValueError):
    """Bad input, said once and clearly: what is wrong, where, and what to do about it.

    Parameters
    ----------
    what : str
        What is wrong, with the offending value or shape in it.
    where : str, optional
        The layer, file or function it was found in.
    remedy : str, optional
        What the caller can do.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}. {remedy}." if remedy else message)


def warn(message: str) -> None:
    """A UserWarning that points at the line outside the package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("zsu", "torch", "contextlib"):
        level, frame = level + 1, frame.f_back  # torch and contextlib: what @torch.no_grad() puts in between
    warnings.warn(message, stacklevel=level)


def in_one_line(error: Exception) -> str:
    """What an error of other code says, and its type."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value counts as a whole number; True and False do not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object, where: str) -> None:
    """`ZsuError` unless the value is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise ZsuError(f"{name} is {value!r}", where=where, remedy=f"pass an integer {name} >= 1")
