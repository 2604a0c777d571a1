"""Perturbing weights: a Patch says which weights change from what to what, and can be undone bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .data import write_atomically
from .errors import ZsuError

Selection = Mapping[str, Tensor]  # name of a parameter -> int64 indices into its flattened values


class Change(NamedTuple):
    """Values of one parameter at flat indices, before and after; all of shape (n,)."""

    index: Tensor
    old: Tensor
    new: Tensor


@dataclass(eq=False)
class Patch:
    """A sparse, reversible edit of a model.

    Attributes
    ----------
    changes : dict of str to Change
        By parameter name.
    metadata : dict of str
        What made the patch: target, method, perturbation, seconds, hash of the parent model, ...
    """

    changes: dict[str, Change]
    metadata: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Patch({self.weights_changed:,} weights of {', '.join(self.changes) or 'nothing'})"

    @property
    def weights_changed(self) -> int:
        """Number of weights whose value differs after the patch."""
        return sum(int((c.old != c.new).sum()) for c in self.changes.values())

    def apply(self, model: nn.Module) -> nn.Module:
        """Write the new values into the model, in place; `ZsuError` where it does not hold the old ones."""
        return self._write(model, "old", "new")

    def revert(self, model: nn.Module) -> nn.Module:
        """Write the old values back, in place, bit for bit; `ZsuError` where the model does not hold the new ones."""
        return self._write(model, "new", "old")

    @torch.no_grad()
    def _write(self, model: nn.Module, expected: str, wanted: str) -> nn.Module:
        parameters = dict(model.named_parameters())
        for name, change in self.changes.items():  # check everything before anything is written
            p = parameters.get(name)
            index = change.index
            if p is None or p.dtype != change.old.dtype or (len(index) and int(index.max()) >= p.numel()):
                have = "no such parameter" if p is None else f"{p.dtype} {tuple(p.shape)}"
                raise ZsuError(f"the model has {have}", where=name, remedy="use the model that the patch was made for")
            held = p.flatten()[index.to(p.device)].cpu()
            if not same_bits(held, getattr(change, expected)):
                raise ZsuError(
                    f"the model does not hold the {expected} values of the patch",
                    where=name,
                    remedy="use the model that the patch was made for, and apply or revert it once",
                )
        for name, change in self.changes.items():
            p = parameters[name]
            p[torch.unravel_index(change.index.to(p.device), p.shape)] = getattr(change, wanted).to(p.device)
        return model

    def save(self, path: str | Path) -> None:
        """Write the patch as safetensors, whole or not at all; `ZsuError` where that fails."""
        tensors = {f"{name}:{key}": getattr(c, key) for name, c in self.changes.items() for key in Change._fields}
        content = safetensors.torch.save(tensors, {"zsu_patch": json.dumps(self.metadata)})
        write_atomically(path, lambda temporary: temporary.write_bytes(content))

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch that `save` wrote."""
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {})["zsu_patch"])
                names = dict.fromkeys(key.rpartition(":")[0] for key in file.keys())
                changes = {n: Change(*(file.get_tensor(f"{n}:{key}") for key in Change._fields)) for n in names}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ZsuError(
                f"not a patch: {error}", where=str(path), remedy="pass a file that Patch.save wrote"
            ) from error
        return cls(changes, metadata)


def perturb(
    model: nn.Module, selection: Selection, perturbation: str = "zero", *, scale: float = 1.0, seed: int = 0
) -> Patch:
    """The Patch that perturbs the selected weights; the model is not changed.

    Parameters
    ----------
    model : nn.Module
    selection : mapping of str to int64 Tensor
        Flat indices by parameter name.
    perturbation : {"zero", "gaussian", "laplace"}
        Set to 0, or add noise with mean 0.
    scale : float
        Standard deviation (gaussian) or diversity b (laplace) of the noise, in standard deviations of the weight
        tensor that it is added to.
    seed : int
        Of the noise; torch's global random state is not touched.

    Raises
    ------
    ZsuError
        Unknown perturbation, unknown parameter, negative scale.
    """
    if perturbation not in ("zero", "gaussian", "laplace"):
        raise ZsuError(f"perturbation {perturbation!r}", where="perturb", remedy="use zero, gaussian or laplace")
    if not scale >= 0:
        raise ZsuError(f"scale is {scale}", where="perturb", remedy="use a number of at least 0")
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, index in selection.items():
        if name not in parameters:
            raise ZsuError(f"no parameter {name!r}", where="perturb", remedy=f"use one of {', '.join(parameters)}")
        weight = parameters[name].detach()
        index = index.cpu().unique()
        old = weight.flatten()[index.to(weight.device)].cpu()
        if perturbation == "zero":
            new = torch.zeros_like(old)
        else:
            noise = standard_noise(perturbation, len(old), generator)
            deviation = float(weight.double().std(correction=0))  # 0, not NaN, where there is a single weight
            new = (old.double() + scale * deviation * noise).to(old.dtype)
        changes[name] = Change(index, old, new)
    return Patch(changes, {"perturbation": perturbation, "scale": str(scale), "seed": str(seed)})


def standard_noise(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Gaussian with deviation 1, or Laplace with diversity 1 (the difference of two standard exponentials)."""
    if kind == "gaussian":
        return torch.randn(n, generator=generator)
    first, second = torch.empty(2, n).exponential_(generator=generator)
    return first - second


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes (0.0 and -0.0 differ, NaN equals itself)."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def model_hash(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, t in model.state_dict().items():
        digest.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
