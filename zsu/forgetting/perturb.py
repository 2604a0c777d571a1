"""Perturbing weights: a Patch says which weights change from what to what, and can be undone bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ZsuError, check_flag, check_seed, is_integer, is_number
from ..files import write_atomically
from ..inside import COMPILED

Selection = Mapping[str, Tensor]  # name of a parameter -> int64 indices into its flattened values
Weights = nn.Module | MutableMapping[str, Tensor]  # a model, or its state dict
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of as many bytes


class Change(NamedTuple):
    """Values of one parameter at flat indices (int32 where they fit), before and after; all of shape (n,)."""

    index: Tensor  # type: ignore[assignment]  # a tuple's own `index` is not missed
    old: Tensor
    new: Tensor


@dataclass(eq=False)
class Patch:
    """A sparse, reversible edit of a model.

    Attributes
    ----------
    changes : dict of str to Change
        By parameter name.
    metadata : dict
        What made the patch, anything that JSON can hold: classes, method and its options, budget, samples' hash,
        versions, hash of the parent model, ...
    """

    changes: dict[str, Change]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Patch({self.weights_changed:,} weights of {', '.join(self.changes) or 'nothing'})"

    @property
    def weights_changed(self) -> int:
        """Number of weights whose value differs after the patch; a tied weight counts once for each of its names."""
        return sum(int((c.old != c.new).sum()) for c in self.changes.values())

    @property
    def budget(self) -> str:
        """What was found for each class, ``metadata["budget"]``, in a few words."""
        return in_short(self.metadata.get("budget") or "")

    @property
    def made(self) -> dict[str, Any]:
        """Of the metadata what `forget` writes and others read; what does not fit there, somebody else has written."""
        return {key: value for key, value in self.metadata.items() if fits(key, value)}

    @property
    def nbytes(self) -> int:
        """Memory of the patch: places, old and new values."""
        return sum(t.element_size() * t.numel() for c in self.changes.values() for t in (c.index, c.old, c.new))

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module) -> Patch:
        """The Patch that turns one model into another of the same architecture: the parameters whose bits differ."""
        changes = {}
        edited = parameters(after)
        for name, p in parameters(before).items():
            old, new = p.detach().flatten().cpu(), edited[name].detach().flatten().cpu()
            index = (old.view(BITS[old.element_size()]) != new.view(BITS[new.element_size()])).nonzero()[:, 0]  # (n,)
            if len(index):
                changes[name] = Change(small(index, p), old[index], new[index])
        return cls(changes)

    def apply(self, model: Weights) -> Weights:
        """Write the new values into a model or a state dict, in place.

        Raises
        ------
        ZsuError
            Another model than the one that the patch was made for, by its hash where the metadata have it and by the
            values that are to change; nothing is written then.
        """
        parent = self.made.get("parent")
        if parent is not None and (found := model_hash(model)) != parent:
            raise ZsuError(
                f"the patch was made for model {parent[:12]}, this is model {found[:12]}",
                where="Patch.apply",
                remedy="use the model that the patch was made for; where other patches came in between, Patch.rebase",
            )
        return self._write(model, "old", "new")

    def revert(self, model: Weights) -> Weights:
        """Write the old values back, in place, bit for bit; `ZsuError` where the model does not hold the new ones."""
        return self._write(model, "new", "old")

    def rebase(self, model: Weights) -> Patch:
        """The same new values for another state of the model: what is there now becomes the old values."""
        held = parameters(model)
        changes = {n: c._replace(old=self._held(held, n)) for n, c in self.changes.items()}
        return Patch(changes, self.metadata | {"parent": model_hash(model)})

    def diff(self, model: Weights | None = None) -> pd.DataFrame:
        """What the patch changes, one row a parameter.

        Columns: changed (weights whose value differs), zeroed (of those, now 0), mean_change and largest_change (of
        |new - old| over the changed ones); with a model, share (of the parameter's weights that change).
        """
        columns = ["changed", "zeroed", "mean_change", "largest_change"] + ["share"] * (model is not None)
        rows = {}
        for name, c in self.changes.items():
            moved = (c.new.double() - c.old.double()).abs()[c.old != c.new]
            mean, largest = (float(moved.mean()), float(moved.max())) if len(moved) else (0.0, 0.0)
            rows[name] = [len(moved), int(((c.new == 0) & (c.old != 0)).sum()), mean, largest]
            if model is not None:
                rows[name].append(len(moved) / max(1, parameters(model)[name].numel()))
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        frame.index.name = "parameter"
        return frame

    def _held(self, held: Mapping[str, Tensor], name: str) -> Tensor:
        """What the model holds where the patch changes the parameter; `ZsuError` where it has no such weights."""
        p, change = held.get(name), self.changes[name]
        if not is_sound(change):
            remedy = "pass a patch as zsu.forget makes it"
            raise ZsuError("places and values of the patch do not go together", where=name, remedy=remedy)
        if p is None or p.dtype != change.old.dtype or (len(change.index) and int(change.index.max()) >= p.numel()):
            have = "no such parameter" if p is None else f"{p.dtype} {tuple(p.shape)}"
            raise ZsuError(f"the model has {have}", where=name, remedy="use the model that the patch was made for")
        return p.detach().flatten()[change.index.to(p.device)].cpu()

    @torch.no_grad()
    def _write(self, model: Weights, expected: str, wanted: str) -> Weights:
        held = parameters(model)
        for name, change in self.changes.items():  # check everything before anything is written
            if not same_bits(self._held(held, name), getattr(change, expected).cpu()):
                raise ZsuError(
                    f"the model does not hold the {expected} values of the patch",
                    where=name,
                    remedy="use the model that the patch was made for, and apply or revert it once",
                )
        for name, change in self.changes.items():
            write(held[name], change.index, getattr(change, wanted))
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
                metadata = dict(json.loads((file.metadata() or {})["zsu_patch"]))
                names = dict.fromkeys(key.rpartition(":")[0] for key in file.keys())
                changes = {n: Change(*(file.get_tensor(f"{n}:{key}") for key in Change._fields)) for n in names}
            if not all(map(is_sound, changes.values())):
                raise ValueError("places and values that do not go together")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ZsuError(
                f"not a patch: {error}", where=str(path), remedy="pass a file that Patch.save wrote"
            ) from error
        return cls(changes, metadata)


@torch.no_grad()
def write(p: Tensor, index: Tensor, values: Tensor) -> None:
    """Values into the places of a tensor, flat ones, in place; nobody waits for its device."""
    index, values = (t.to(p.device, non_blocking=p.is_cuda) for t in (index, values))
    p[torch.unravel_index(index, p.shape)] = values


def fits(key: str, value: object) -> bool:
    """Whether `forget` can have written this into the metadata of a patch."""
    if key in ("target", "samples"):
        return isinstance(value, list) and bool(value) and all(is_integer(v) and v >= 0 for v in value)
    if key in ("seed", "unseen"):
        return is_integer(value) and value >= 0
    if key == "seconds":
        return is_number(value)
    return isinstance(value, str) or key not in ("method", "tier", "parent", "class", "arch", "samples_sha256")


def is_sound(change: Change) -> bool:
    """Whether places are numbered from 0, each once, and each has an old and a new value of one dtype."""
    index, old, new = change
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or not (index >= 0).all():
        return False
    once = bool((index[1:] > index[:-1]).all()) or len(index.unique()) == len(index)  # in order, as they are made here
    return once and index.shape == old.shape == new.shape and old.dtype == new.dtype


def undo(model: Weights, applied: Sequence[Patch], number: int) -> list[Patch]:
    """Take one of several patches back out of a model that holds them all, in place.

    The later ones are reverted, then the one, then the later ones are written again: where two patches change the same
    weight, the later one's value stays. Undoing the last patch, or all of them, restores the model bit for bit.

    Parameters
    ----------
    model : nn.Module or state dict
    applied : sequence of Patch
        In the order in which they were applied.
    number : int
        Which of them.

    Returns
    -------
    list of Patch
        The others, as they now stand in the model, in their order; each can be undone again.

    Raises
    ------
    ZsuError
        No such patch, or a model that does not hold all of them; the model is as before then.
    """
    if not 0 <= number < len(applied):
        raise ZsuError(f"no patch {number} of {len(applied)}", where="undo", remedy="count from 0")
    reverted = []
    try:
        for patch in reversed(applied[number:]):
            patch.revert(model)
            reverted.append(patch)
    except ZsuError:
        for patch in reversed(reverted):
            patch._write(model, "old", "new")
        raise
    later = []
    for patch in applied[number + 1 :]:
        later.append(patch.rebase(model))
        later[-1].apply(model)
    return [*applied[:number], *later]


def perturb(
    model: nn.Module,
    selection: Selection,
    perturbation: str = "zero",
    *,
    scale: float = 1.0,
    absolute: bool = False,
    seed: int = 0,
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
    absolute : bool
        Take `scale` as it is, in units of the weights.
    seed : int
        Of the noise; torch's global random state is not touched.

    Raises
    ------
    ZsuError
        Unknown perturbation, unknown parameter, negative scale.
    """
    check_noise(perturbation, scale, absolute)
    check_seed(seed, "perturb")
    held = parameters(model)
    scale, generator = float(scale), torch.Generator().manual_seed(int(seed))
    changes = {}
    for name, index in selection.items():
        if name not in held:
            raise ZsuError(f"no parameter {name!r}", where="perturb", remedy=f"use one of {', '.join(held)}")
        weight = held[name].detach()
        index = small(checked(index, weight, name), weight).to(weight.device, non_blocking=weight.is_cuda)
        old = weight.flatten()[index]
        if perturbation == "zero":
            new = torch.zeros_like(old)
        else:
            noise = standard_noise(perturbation, len(old), generator).to(old.device, non_blocking=old.is_cuda)
            # 0, not NaN, where there is a single weight
            deviation = 1.0 if absolute else weight.double().std(correction=0)
            new = (old.double() + scale * deviation * noise).to(old.dtype)
        for alias, p in held.items():  # a tied weight under each of its names
            if p is held[name]:
                changes[alias] = Change(index, old, new)
    return Patch(changes, {"perturbation": perturbation, "scale": scale, "absolute": bool(absolute), "seed": int(seed)})


def checked(index: Tensor, weight: Tensor, name: str) -> Tensor:
    """Flat indices, each once and in order, after a check: on the CPU, where selections are made."""
    index = torch.as_tensor(index).cpu().unique()
    if index.dtype != torch.int64 or (len(index) and not 0 <= int(index[0]) <= int(index[-1]) < weight.numel()):
        remedy = f"pass int64 indices from 0 to {weight.numel() - 1} into its flattened values"
        raise ZsuError(f"indices {index.dtype} that do not fit", where=name, remedy=remedy)
    return index


def small(index: Tensor, weight: Tensor) -> Tensor:
    """Flat indices into a weight as int32, where it has no more values than that can count."""
    return index.int() if weight.numel() <= torch.iinfo(torch.int32).max else index


def check_noise(perturbation: str, scale: float, absolute: bool) -> None:
    """`ZsuError` for a perturbation that `perturb` does not know, a scale below 0, or `absolute` that is no bool."""
    if not isinstance(perturbation, str) or perturbation not in ("zero", "gaussian", "laplace"):
        raise ZsuError(f"perturbation {perturbation!r}", where="perturb", remedy="use zero, gaussian or laplace")
    if not is_number(scale) or not scale >= 0:
        raise ZsuError(f"scale is {scale!r}", where="perturb", remedy="use a finite number of at least 0")
    check_flag("absolute", absolute, "perturb")


def standard_noise(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Gaussian with deviation 1, or Laplace with diversity 1 (the difference of two standard exponentials)."""
    if kind == "gaussian":
        return torch.randn(n, generator=generator)
    first, second = torch.empty(2, n).exponential_(generator=generator)
    return first - second


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes (0.0 and -0.0 differ, NaN equals itself)."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def parameters(model: Weights) -> dict[str, Tensor]:
    """Tensors by name, of a model or a state dict; tied ones by each of their names, as in a state dict. Of what
    torch.compile made the names are those of the model inside.
    """
    named = model if isinstance(model, Mapping) else dict(model.named_parameters(remove_duplicate=False))
    return {name.replace(COMPILED, ""): t for name, t in named.items()}


def model_hash(model: Weights) -> str:
    """sha256 over names, shapes and bytes of the tensors of the state dict, in the order of the names."""
    held = model if isinstance(model, Mapping) else model.state_dict()
    state: dict[str, Any] = {name.replace(COMPILED, ""): t for name, t in held.items() if isinstance(t, Tensor)}
    digest = hashlib.sha256()
    for name, t in sorted(state.items()):
        digest.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def in_short(value: object, most: int = 5) -> str:
    """A value of a patch's metadata in a few words: long lists are cut, and their length said."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_short(v)}" for key, v in value.items())
    if not isinstance(value, list):
        return str(value)
    if value and isinstance(value[0], dict):
        return "; ".join(filter(None, map(in_short, value)))
    shown = ", ".join(map(in_short, value[:most]))
    return f"[{shown}]" if len(value) <= most else f"[{shown}, ... {len(value)} in all]"
