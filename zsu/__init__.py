"""zsu: zero-shot class unlearning by relevance analysis and neuronal path perturbation."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
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


class ShortNames(MetaPathFinder, Loader):
    """``from zsu.rules import Gamma`` finds `zsu.relevance.rules`."""

    def find_spec(self, fullname, path, target=None):
        """Asked last of all, about what is no file."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in HOMES and name not in __all__ else None

    def create_module(self, spec):
        """The module itself, under one more name."""
        module = __getattr__(spec.name.rpartition(".")[2])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        """It ran when it was imported; only its own spec is given back to it."""
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(ShortNames())
