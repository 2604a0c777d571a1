"""zsu: zero-shot class unlearning by relevance analysis and neuronal path perturbation."""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import ZsuError

if TYPE_CHECKING:
    from .evaluation import audit
    from .forgetting import Forgotten, Patch, forget, select_neurons
    from .paths import Paths, find_paths
    from .relevance import Composite, Relevance, compare, explain, explain_each, explain_paths

__version__ = "0.1.0"
__all__ = [
    "Composite", "Forgotten", "Patch", "Paths", "Relevance", "ZsuError",
    "audit", "compare", "explain", "explain_each", "explain_paths", "find_paths",
    "forget", "select_neurons",
]  # fmt: skip

# The parts in the order of the chapters, the names that each gives, and its modules that have a short name here.
PARTS = {
    "data": "", "models": "", "training": "",
    "relevance": "Composite Relevance compare explain explain_each explain_paths rules composites comparison",
    "paths": "Paths find_paths graph",
    "forgetting": "Forgotten Patch forget select_neurons perturb selection rerouting peers",
    "plots": "", "evaluation": "audit", "scale": "sweep scoreboard reproduce", "widgets": "", "doctor": "",
}  # fmt: skip
HOMES = {name: part for part, names in PARTS.items() for name in names.split()}


def __getattr__(name: str):
    """Parts and names, imported when first used: torch takes seconds, and the command has settings to make before."""
    if name in PARTS:
        return import_module(f".{name}", __name__)
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f".{HOMES[name]}", __name__)
    return getattr(home, name) if name in __all__ else import_module(f".{name}", home.__name__)


def __dir__() -> list[str]:
    return [*__all__, *PARTS, "__version__"]
