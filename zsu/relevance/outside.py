"""What enters the flow from outside: constants, and what hangs on the input although the tape did not see it made.

A function mode does not see what scripts, other threads, vmap or extensions compute. Autograd knows some of it: its
graph leads to the input. The rest, and what comes back as a number or an array, is found by a second forward pass on
slightly changed images, which only models need that read values or use tensors of unknown making: what joins the flow
must be the same there.
"""

from collections.abc import Iterable
from numbers import Number

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ZsuError
from .operations import FROM_PYTHON, Call, flat, tensors_in


class Outside:
    """What one forward pass meets outside the flow of `start`, the model's input.

    Attributes
    ----------
    reads : list of str
        Operations by which values left the sight of the tape, or came from out of it.
    joined : list of Tensor or number
        What joined the flow since the first of them, by value.
    """

    def __init__(self, model: nn.Module, start: Tensor):
        self.start = start
        # Tensors of the model by id, with their names and versions; they are kept, so that no other gets the same id.
        self.held: dict[int, tuple[Tensor, str, int]] = {}
        for name, m in model.named_modules():
            for key, t in (*vars(m).items(), *m._buffers.items(), *m._parameters.items()):
                if isinstance(t, Tensor):
                    self.held.setdefault(id(t), (t, f"{name}.{key}", version(t)))
        # Made in sight, of what is known; to a name, if there is one, and the version that was seen.
        self.made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.reads: list[str] = []
        self.joined: list[Tensor | Number] = []

    def knows(self, t: Tensor) -> bool:
        """Whether t cannot depend on the input: it was so when last seen, and nothing out of sight has changed it."""
        seen = self.held[id(t)][2] if id(t) in self.held else self.made.get(t, ("", None))[1]
        return seen == version(t)

    def name(self, t: Tensor | None) -> str:
        """That of a tensor of the model, or of the first such that it was computed from."""
        return self.held[id(t)][1] if id(t) in self.held else self.made.get(t, ("", 0))[0] if t is not None else ""

    def compute(self, call: Call, tensors: list[Tensor]) -> object:
        """What a call gives that has nothing to do with the flow; what has met unknown tensors is unknown."""
        known = all(self.knows(t) for t in tensors)
        out = call.run()
        for t in tensors:  # which the call may have changed
            if known:
                self.see(t, self.name(t))
            else:
                self.held.pop(id(t), None)
                self.made.pop(t, None)
        if known and "empty" not in call.name and call.name not in FROM_PYTHON:  # which others fill, or have filled
            source = next(filter(None, map(self.name, tensors)), "")
            for t in tensors_in((out,)):
                self.see(t, self.name(t) or source)
        return out

    def see(self, t: Tensor, name: str) -> None:
        """Note that t cannot depend on the input."""
        if id(t) in self.held:
            self.held[id(t)] = t, name, version(t)
        else:
            self.made[t] = name, version(t)

    def meet(self, call: Call, others: Iterable[Tensor]) -> None:
        """Look at what a call brings into the flow besides the flow itself."""
        others = [t for t in others if not call.changes(t)]
        for t in others:
            if self.knows(t):
                continue
            if t.grad_fn is not None and leads_to(t.grad_fn, self.start):
                raise hidden(t, call.name)
            self.reads.append("an operation out of sight")
        if self.reads:
            self.joined += [t.detach().clone() for t in others]
            self.joined += [v for v in flat((*call.args, *call.kwargs.values())) if isinstance(v, Number)]

    def check(self, again: "Outside") -> None:
        """Refuse what joined the flow, if it is not the same on other images."""
        if len(self.joined) == len(again.joined) and all(map(equal, self.joined, again.joined)):
            return
        what = f"a value that depends on the input leaves by {self.reads[0]!r} and joins what relevance flows through"
        raise ZsuError(what, where="explain", remedy="compute it with functions of torch, on tensors, in the model")


def version(t: Tensor) -> int:
    """How often t was changed in place, where PyTorch counts that."""
    return 0 if t.is_inference() else t._version


def leads_to(node: Node, leaf: Tensor) -> bool:
    """Whether the graph of autograd behind a node reaches a leaf."""
    seen, queue = {node}, [node]
    while queue:
        node = queue.pop()
        if getattr(node, "variable", None) is leaf:
            return True
        new = {below for below, _ in node.next_functions if below is not None} - seen
        seen |= new
        queue += new
    return False


def hidden(t: Tensor, joins: str) -> ZsuError:
    """Why a tensor that depends on the input is refused, by the name of what autograd saw."""
    made = t.grad_fn.name() if t.grad_fn is not None else "?"
    what = f"{joins!r} takes a tensor that was computed from the input out of sight (autograd: {made})"
    remedy = "call the plain function in the model: not scripted or traced, in vmap, in a thread or in an extension"
    return ZsuError(what, where="explain", remedy=remedy)


def equal(a: Tensor | Number, b: Tensor | Number) -> bool:
    """Whether two constants are the same, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b
