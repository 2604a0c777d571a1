"""zsu: zero-shot class unlearning by relevance analysis and neuronal path perturbation."""

from .errors import ZsuError
from .relevance import Relevance, explain

__version__ = "0.1.0"
__all__ = ["Relevance", "ZsuError", "explain"]
