"""Chapter 4: which ways through the network the relevance takes. A graph, and the best paths in it."""

from .graph import PathGraph, build_graph, contrast
from .search import Paths, find_paths

__all__ = ["PathGraph", "Paths", "build_graph", "contrast", "find_paths"]
