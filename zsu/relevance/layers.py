"""A layer of the model: its structure, what one backward pass finds there, and what it needs while the tape runs."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import sums
from .sums import Axes

Number = float | Tensor  # sums stay on the device as 0-dimensional tensors until somebody looks


@dataclass(frozen=True, eq=False)
class Layer:
    """One step of the forward pass that relevance flows through: the input, one with weights, an addition, a norm..."""

    kind: str
    name: str
    weight: str | None = None  # name of the weight parameter, where it is one
    groups: int = 1  # convolution groups; 0: every channel has only its own source (BatchNorm)
    # For each summand the number of the channel that each of its channels comes from; -1: none. Numbers go through all
    # layers of the tape, in results through `Relevance.layers`, as those of nodes in a `PathGraph`. None: unknown.
    sources: list[np.ndarray | None] = field(default_factory=list)


@dataclass(eq=False)
class Share:
    """What one backward pass finds at a layer, for N samples, K channels and J sources."""

    layer: Layer
    relevance: Tensor = None  # type: ignore[assignment]  # (N, K); in results it is always there
    edges: list[Tensor] = field(default_factory=list)  # weighted: one (K, J / groups); addition: (K,) per summand
    handed: Number | None = None  # relevance that went to the inputs, summed over samples; None: the sum of the edges
    bias: Number = 0.0
    stabiliser: Number = 0.0
    constant: Number = 0.0  # ... to tensors that do not depend on the input
    magnitude: Number = 0.0  # sum of |R| over all outputs

    name = property(lambda self: self.layer.name)
    kind = property(lambda self: self.layer.kind)
    weight = property(lambda self: self.layer.weight)
    groups = property(lambda self: self.layer.groups)
    sources = property(lambda self: self.layer.sources)

    @property
    def out(self) -> float:
        """Relevance that arrived, summed over samples."""
        return sums.total(self.relevance)

    @property
    def into(self) -> float:
        """Relevance that went on to the inputs, summed over samples."""
        return sum(map(sums.total, self.edges)) if self.handed is None else float(self.handed)


@dataclass(eq=False)
class Replay:
    """The backward pass that runs over a tape: what is asked of it, and what the steps find."""

    input: Tensor  # of the model
    edges: bool
    last: bool = True  # no other pass follows, so that the steps may let go of their tensors
    open: Collection[Layer] | None = None  # the only layers that hand on what arrives; None: all do
    shares: dict[Layer, Share] = field(default_factory=dict)
    direct: list[Tensor] = field(default_factory=list)  # relevance of the input values that is no multiple of them

    @property
    def samples(self) -> int:
        return len(self.input)

    def begin(self, last: bool, open: Collection[Layer] | None = None) -> None:
        """Another pass, which has found nothing yet."""
        self.last, self.open, self.shares, self.direct = last, open, {}, []

    def share(self, layer: Layer) -> Share:
        """What this pass has found at a layer so far."""
        return self.shares.setdefault(layer, Share(layer))


@dataclass(eq=False)
class Step:
    """A layer while the tape runs."""

    layer: Layer
    axes: Axes  # of the output
    replay: Replay
    z: Tensor | None = None  # the output, where the backward pass needs it, without graph and in the same memory

    @property
    def share(self) -> Share:
        return self.replay.share(self.layer)

    @property
    def closed(self) -> bool:
        """Whether nothing is to be handed on, because a path leads elsewhere."""
        return self.replay.open is not None and self.layer not in self.replay.open

    def arrive(self, z: Tensor, g: Tensor) -> Tensor:
        """Note the relevance R = z g of the outputs, and return it."""
        R, relevance, self.share.magnitude = sums.arrive(z, g, self.axes)
        self.share.relevance = sums.of_samples(relevance, self.replay.samples)
        return R


class Tap(NamedTuple):
    """The output of a layer."""

    edge: GradientEdge  # where the graph of autograd can be cut into
    axes: tuple[int | None, int]
    value: Tensor
