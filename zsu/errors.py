"""What goes wrong: the one exception of the package, warnings at the caller's line, and the check of numbers."""

import sys
import warnings
from numbers import Integral, Real
from typing import TypeGuard

MOST = 500  # letters of what other code says


class ZsuError(ValueError):
    """Bad input, said once and clearly, in one line: what is wrong, where, and what to do about it.

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
        message = f"{message}. {remedy}." if remedy else message
        super().__init__(" ".join(line.strip() for line in message.splitlines()))  # values may have line breaks


def warn(message: str) -> None:
    """A UserWarning that points at the line outside the package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("zsu", "torch", "contextlib"):
        level, frame = level + 1, frame.f_back  # torch and contextlib: what @torch.no_grad() puts in between
    warnings.warn(message, stacklevel=level)


def in_one_line(error: Exception) -> str:
    """What an error of other code says, and its type."""
    return " ".join(f"{type(error).__name__}: {words(error)}".split()).rstrip(".:")[:MOST]


def words(error: Exception) -> str:
    """What an error of other code says; some fail at that."""
    try:
        return str(error)
    except Exception:
        return ""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value counts as a whole number; True and False do not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value counts as a finite real number; True and False do not."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # type: ignore[operator]


def check_count(name: str, value: object, where: str) -> None:
    """`ZsuError` unless the value is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise ZsuError(f"{name} is {value!r}", where=where, remedy=f"pass an integer {name} >= 1")


def check_seed(seed: object, where: str) -> None:
    """`ZsuError` unless the value is a seed for all random generators that are used here."""
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise ZsuError(f"seed {seed!r}", where=where, remedy="pass an integer from 0 to 2**32 - 1")


def check_flag(name: str, value: object, where: str) -> None:
    """`ZsuError` unless the value is True or False, of Python or NumPy, or one of the integers 0 and 1."""
    if type(value).__name__ not in ("bool", "bool_") and not (is_integer(value) and value in (0, 1)):
        raise ZsuError(f"{name} is {value!r}", where=where, remedy=f"pass {name}=True or {name}=False")


def as_names(name: str, value: object, where: str) -> list[str]:
    """One string, or several, as a list, each once; `ZsuError` for anything else."""
    try:
        several = [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    except TypeError:
        several = [value]
    if not all(isinstance(v, str) for v in several):
        raise ZsuError(f"{name} is {value!r}", where=where, remedy="pass a name, or a list of names")
    return list(dict.fromkeys(several))
