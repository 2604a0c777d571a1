"""zsu: zero-shot class unlearning by relevance analysis and neuronal path perturbation."""

from .comparison import compare
from .composites import Composite
from .errors import ZsuError
from .evaluation import audit
from .forgetting import Forgotten, forget
from .paths import Paths, find_paths
from .perturb import Patch
from .relevance import Relevance, explain, explain_each, explain_paths
from .selection import select_neurons

__version__ = "0.1.0"
__all__ = [
    "Composite", "Forgotten", "Patch", "Paths", "Relevance", "ZsuError",
    "audit", "compare", "explain", "explain_each", "explain_paths", "find_paths",
    "forget", "select_neurons",
]  # fmt: skip
