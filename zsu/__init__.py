"""zsu: zero-shot class unlearning by relevance analysis and neuronal path perturbation."""

from .errors import ZsuError
from .paths import Paths, find_paths
from .relevance import Relevance, explain

__version__ = "0.1.0"
__all__ = ["Paths", "Relevance", "ZsuError", "explain", "find_paths"]
