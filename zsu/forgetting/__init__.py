"""Chapters 5 and 8: edits that make a model forget a class. `forget` does them, a `Patch` holds one."""

from .cutting import CutPaths
from .methods import BiasShift, Edit, Mask, Method, Perturbing, Zeroed
from .neurons import HeadNpp, LraNpp, Random
from .peers import BoundaryShrink, FineTune, NegativeGradient, Ssd, Svd
from .perturb import Patch
from .request import METHODS, Forgotten, forget
from .selection import select_neurons

__all__ = [
    "METHODS", "BiasShift", "BoundaryShrink", "CutPaths", "Edit", "FineTune", "Forgotten", "HeadNpp", "LraNpp", "Mask",
    "Method", "NegativeGradient", "Patch", "Perturbing", "Random", "Ssd", "Svd", "Zeroed", "forget", "select_neurons",
]  # fmt: skip
