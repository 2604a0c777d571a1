"""zsu: zero-shot class unlearning by relevance analysis and neuronal path perturbation."""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import ZsuError

if TYPE_CHECKING:
    from .comparison import compare
    from .composites import Composite
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

MODULES = "data models training rules composites relevance comparison graph paths perturb selection".split()
MODULES += "rerouting peers forgetting evaluation sweep scoreboard reproduce plots widgets doctor".split()


def __getattr__(name: str):
    """Names and modules, imported when first used: the command `zsu` has settings to make before torch is there."""
    if name in MODULES:
        return import_module(f".{name}", __name__)
    for module in MODULES if name in __all__ else ():
        found = getattr(import_module(f".{module}", __name__), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
