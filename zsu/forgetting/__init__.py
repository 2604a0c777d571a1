"""Chapters 5 and 8: edits that make a model forget a class. `forget` does them, a `Patch` holds one."""

from .perturb import Patch
from .request import METHODS, TIERS, Forgotten, forget
from .selection import select_neurons

__all__ = ["METHODS", "TIERS", "Forgotten", "Patch", "forget", "select_neurons"]
