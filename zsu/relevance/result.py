"""What `explain` returns: relevance of every input value, channel and edge, and the ledger of where it went."""

from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from ..errors import warn
from .layers import Share
from .sums import on_host, total

EXPLODES = 1e4  # times the relevance handed to the outputs
STAYS = 0.1  # share of the relevance, kept by stabilisers
SHARES = ("into", "bias", "stabiliser", "constant")


@dataclass(eq=False)
class Relevance:
    """What `explain` returns. Tensors are on the device and of the dtype of the model (relevance of float16 and
    bfloat16 models is float32) and carry no graph.

    Attributes
    ----------
    input : Tensor (N, C, H, W)
        Relevance of every input value, per sample.
    logits : Tensor (N, classes)
        Output of the model.
    seed : Tensor (N, classes)
        The relevance that was handed to the outputs: the logit of the target class, or the seed given.
    layers : list of Share
        What paths lead through, in the order of the forward pass: the input, weighted layers, norms and additions.
    head : Share or None
        The one of them whose outputs are the logits, if there is one.
    tops : list of Share
        Those whose outputs become the logits without another of them in between: `head`, or several side by side, as
        in a concatenation; empty where an operation hides which they are.
    rows : list of Share
        The same as `layers`, and besides them softmax and constants: everything that keeps a share of the relevance.
    """

    input: Tensor
    logits: Tensor
    seed: Tensor
    layers: list[Share]
    head: Share | None
    rows: list[Share]
    tops: list[Share] = field(default_factory=list)

    def __repr__(self) -> str:
        n, classes = self.logits.shape
        return f"Relevance({n} samples, {classes} classes, {len(self.layers)} layers)"

    @cached_property
    def nodes(self) -> dict[str, Tensor]:
        """Relevance (N, K) of the output channels of each layer, summed over positions, by layer name.

        (1, K), summed over samples too, where the model moves samples and positions into one axis and out of order.
        """
        return {layer.name: layer.relevance for layer in self.layers}

    @cached_property
    def edges(self) -> dict[str, Tensor]:
        """Relevance R[k, j] that flows from target channel k to source channel j, summed over samples, positions
        and the kernel window, (K, J) by layer name; (K, J / groups) where channels are in groups. Of weighted layers
        and norms.
        """
        return {layer.name: layer.edges[0] for layer in self.layers if layer.edges and layer.kind != "add"}

    @cached_property
    def runner_up(self) -> Tensor:
        """int64 (N,): the class with the highest logit among those that no relevance was handed to."""
        return self.logits.masked_fill(self.seed != 0, -torch.inf).argmax(1)

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """Where the relevance went, summed over samples (float64), one row a layer, from the logit to the input.

        ``out`` arrived at the layer's outputs and ``into`` went on to its inputs. ``bias`` and ``stabiliser`` is what
        the layer kept, ``constant`` what went to tensors that do not depend on the input (class token, positions).
        ``gap = out - into - bias - stabiliser - constant`` is 0 up to rounding. ``amplification`` is sum |R| over all
        outputs in units of what was handed to the logits: large where relevance of both signs cancels. The last row,
        ``all``, does the same for the whole model: from the logits to the input values.
        """
        rows = [
            {"layer": row.name, "kind": row.kind, "out": row.out}
            | {share: float(getattr(row, share)) for share in SHARES}
            | {"amplification": self.amplification(row)}
            for row in reversed(self.rows)
            if row.kind != "input"
        ]
        whole = {"layer": "all", "kind": "model", "out": total(self.seed), "into": total(self.input)}
        whole |= {share: sum(row[share] for row in rows) for share in SHARES[1:]}
        whole["amplification"] = float(self.input.abs().sum() / self.seed.abs().sum())
        frame = pd.DataFrame([*rows, whole])
        frame.insert(7, "gap", frame["out"] - sum(frame[share] for share in SHARES))
        return frame

    def amplification(self, layer: Share) -> float:
        """Sum |R| over the outputs of a layer, relative to the relevance handed to the model's outputs."""
        return float(layer.magnitude / self.seed.abs().sum())

    def warn_if_unsound(self) -> None:
        """Relevance of both signs that cancels to the right sum, or stays with the stabiliser, says little."""
        of_rows = [number for row in self.rows for number in (row.stabiliser, row.magnitude)]
        handed, *numbers = on_host([self.seed.abs().sum(), *of_rows])
        magnitudes = numbers[1::2]
        kept = sum(map(abs, numbers[::2])) / (handed + 1e-300)
        if kept > STAYS:
            warn(
                f"the stabilisers keep {100 * kept:.0f} % of the relevance; use a smaller epsilon, as in Epsilon(1e-9)"
            )
        worst = max(range(1, len(magnitudes)), key=magnitudes.__getitem__, default=0)  # 0: the input alone
        if worst and magnitudes[worst] > EXPLODES * handed > 0:
            times = magnitudes[worst] / handed
            warn(
                f"relevance explodes: at {self.rows[worst].name}, sum |R| is {times:.1e} times that of the outputs; "
                "use a rule that dampens it, such as 'gamma' or 'epsilon-plus'"
            )
