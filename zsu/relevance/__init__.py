"""Chapters 2 and 3: where the evidence for a class comes from. Rules say how, `explain` does it."""

from .comparison import compare
from .composites import Composite, Rules
from .explanation import activations, explain, explain_contrast, explain_each, explain_paths
from .result import Relevance
from .rules import AlphaBeta, Box, Epsilon, Flat, Gamma, Rule, WSquare

__all__ = [
    "AlphaBeta", "Box", "Composite", "Epsilon", "Flat", "Gamma", "Relevance", "Rule", "Rules", "WSquare",
    "activations", "compare", "explain", "explain_contrast", "explain_each", "explain_paths",
]  # fmt: skip
