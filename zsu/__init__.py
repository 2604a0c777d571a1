"""zsu: zero-shot class unlearning by relevance analysis and neuronal path perturbation."""

from .errors import ZsuError
from .evaluation import audit
from .forgetting import Forgotten, forget
from .paths import Paths, find_paths
from .perturb import Patch
from .relevance import Relevance, explain

__version__ = "0.1.0"
__all__ = ["Forgotten", "Patch", "Paths", "Relevance", "ZsuError", "audit", "explain", "find_paths", "forget"]
