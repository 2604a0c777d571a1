"""Checkpoints as programs write them: where the state dict is, and what was put around its names and numbers."""

import argparse
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import takewhile
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ZsuError

State = dict[str, Tensor]
PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
AVERAGED = {"ema", "swa", "averaged", "teacher", "shadow"}  # parts of keys: a moving average of the weights
# Parts of names: DataParallel, torch.compile, and FSDP's.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")  # as torchvision named its layers before 0.2
NUMBER = re.compile(r"\.\d+(?=\.\w+$)")  # of the last module that a name goes through
# Weights that are stored as what they are computed from: weight_norm, spectral_norm, pruning, parametrizations, LoRA.
COMPUTED = re.compile(r"(_g|_v|_orig|_mask|\.parametrizations\..*|[._]lora_\w+)$")
COUNTER = "n_averaged"  # beside the weights of torch's AveragedModel
# Plain data that PyTorch refuses by itself: options of the command line, and numbers of NumPy.
SCALAR = np.float64(0).__reduce__()[0]  # makes a number of NumPy from its type and bytes
SAFE: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(t)) for t in ("?", "f2", "f4", "f8", "i4", "i8")),
        *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]  # fmt: skip

# --- files ----------------------------------------------------------------------------------------------------


def check_file(path: str | os.PathLike) -> None:
    """`ZsuError` unless there is a file."""
    if not Path(path).is_file():
        raise ZsuError("there is no such file", where=str(path), remedy="check the path of the checkpoint")


def damage(path: str | os.PathLike, error: Exception) -> ZsuError:
    """What to raise for a file that cannot be read to its end."""
    first_line = str(error).partition("\n")[0]
    what = f"this is not a complete checkpoint ({type(error).__name__}: {first_line})"
    return ZsuError(what, where=str(path), remedy="fetch or save it again")


def read_torch(path: str | os.PathLike, trusted: bool) -> object:
    """What is in a file of ``torch.save``."""
    with open(path, "rb") as file:
        if file.read(2) not in (b"PK", b"\x80\x02"):  # a zip, or a pickle as old versions of PyTorch wrote
            raise ZsuError("this is neither safetensors nor a PyTorch checkpoint", where=str(path))
    try:
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own words on what is refused below
            return torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        if trusted:
            raise damage(path, error) from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"this checkpoint needs pickled code{f' ({found[1]})' if found else ''}"
        remedy = "ask for a state dict, or pass trusted=True (--trusted) if you trust whoever made the file"
        raise ZsuError(f"{what}, which could run anything, and was not read", where=str(path), remedy=remedy) from error
    except Exception as error:  # a damaged file, or code that is not installed here, fails in many ways
        if "TorchScript" in str(error):
            remedy = "ask for a state dict: torch.save(model.state_dict(), path)"
            raise ZsuError("this is a TorchScript program, no state dict", where=str(path), remedy=remedy) from error
        raise damage(path, error) from error


# --- where the state dict is ----------------------------------------------------------------------------------


def find_state(content: Any, path: str | os.PathLike) -> tuple[State | nn.Module, list[str]]:
    """The state dict, or the whole model, in what a program saved; and what was left, in words.

    Raises
    ------
    ZsuError
        There is none, or none of several has a usual name.
    """
    if isinstance(content, nn.Module) or is_state(content):
        check_dense(content, path)
        return content, []
    found = dict(state_dicts(content)) if isinstance(content, Mapping) else {}
    if not found and isinstance(content, Mapping):  # one that holds an epoch or an accuracy too
        tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
        if is_state(tensors):
            check_dense(tensors, path)
            return tensors, [f"left out {in_short([str(name) for name in content if name not in tensors])}"]
    if not found:
        arrays = isinstance(content, Mapping) and any(isinstance(value, np.ndarray) for value in content.values())
        what = (
            f"the checkpoint holds a {type(content).__name__}{' of NumPy arrays' if arrays else ''} but no state dict"
        )
        raise ZsuError(what, where=str(path), remedy="save it with torch.save(model.state_dict(), path)")
    plain = [key for key in found if not AVERAGED & set(re.split(r"[._]", key.casefold()))] or list(found)
    usual = [key for name in PLAIN for key in plain if key.partition(".")[0] == name]
    if len(plain) > 1 and not usual:
        what = f"the checkpoint holds several state dicts: {', '.join(plain)}"
        raise ZsuError(what, where=str(path), remedy="save the one that you mean in a file of its own")
    taken = (usual or plain)[0]
    others = [repr(key) for key in found if key != taken]
    check_dense(found[taken], path)
    return found[taken], [f"{taken!r} was taken, not {in_short(others)}"] if others else []


def check_dense(state: State | nn.Module, path: str | os.PathLike) -> None:
    """`ZsuError` for weights without values, and for those that are not stored value by value."""
    for name, t in (state.state_dict() if isinstance(state, nn.Module) else state).items():
        if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_meta or t.is_quantized or t.is_nested):
            kind = "on meta" if t.is_meta else "quantized" if t.is_quantized else "nested" if t.is_nested else t.layout
            what = f"{name} is {kind}"
            raise ZsuError(what, where=str(path), remedy="save dense weights with values, such as float32")


def state_dicts(content: Mapping, depth: int = 2) -> Iterator[tuple[str, State | nn.Module]]:
    """State dicts and models by their key, those of dicts in it as "outer.inner"; what optimizers keep is left out."""
    for key, value in content.items():
        if not isinstance(key, str) or "optim" in key:
            continue
        if isinstance(value, nn.Module) or is_state(value):
            yield key, value
        elif isinstance(value, Mapping) and depth > 1:
            yield from ((f"{key}.{inner}", state) for inner, state in state_dicts(value, depth - 1))


def is_state(content: object) -> bool:
    """Whether these are tensors by name, at least one of them a matrix or more."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return False
    return all(isinstance(t, Tensor) for t in content.values()) and any(t.ndim > 1 for t in content.values())


# --- what was put around it -----------------------------------------------------------------------------------


def inner_names(state: Mapping[str, Tensor], wanted: Collection[str] = ()) -> dict[str, str]:
    """Names as the model inside knows them -> names in the file.

    What wrappers insert is taken out. Of the prefixes, such as ``model.``, the one goes that leads to most of the
    `wanted` names, or, where none are told, what all names share.
    """
    names: dict[str, str] = {}
    for name in state:
        if name != COUNTER:
            inner = ".".join(part for part in name.split(".") if part not in WRAPPERS)
            names.setdefault(DENSENET.sub(r"\1\2", inner), name)
    if wanted:
        prefix = best_prefix(names, set(wanted))
    else:
        parts = zip(*(name.split(".")[:-2] for name in names), strict=False)
        prefix = "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, parts))
    found = {name[len(prefix) :]: raw for name, raw in names.items() if name.startswith(prefix)}
    for name in [name for name in wanted if name not in found]:  # a head that was put behind a dropout: fc.1.weight
        inside = [other for other in found if NUMBER.sub("", other) == name]
        if len(inside) == 1:
            found[name] = found.pop(inside[0])
    return found


def best_prefix(names: Collection[str], wanted: set[str]) -> str:
    """The prefix under which most of the wanted names are; a moving average only where nothing else is."""
    ends = ((name, [0, *(dot.end() for dot in re.finditer(r"\.", name))]) for name in names)
    found = Counter(name[:i] for name, starts in ends for i in starts if name[i:] in wanted)
    if not found:
        return ""
    return max(found, key=lambda prefix: (found[prefix], not AVERAGED & set(re.split(r"[._]", prefix.casefold()))))


def as_computed(state: Mapping[str, Tensor]) -> State:
    """The same weights as zsu computes with them: half precision in float32, and all in float64 where some are.

    Where a BatchNorm of PyTorch before 0.4.1 has no ``num_batches_tracked``, it becomes 0.
    """
    wide = torch.float64 if any(t.dtype == torch.float64 for t in state.values()) else torch.float32
    found = {name: t.detach().to(wide) if t.is_floating_point() else t.detach() for name, t in state.items()}
    for name in state:
        counter = name.removesuffix("running_mean") + "num_batches_tracked"
        if name.endswith("running_mean") and counter not in state:
            found[counter] = torch.tensor(0)
    return found


def said(state: Mapping[str, Tensor], names: Mapping[str, str], found: Mapping[str, Tensor]) -> list[str]:
    """What differs between a file's state dict and what was `found` under `names`, in words."""
    notes = []
    around = {repr(raw.removesuffix(name)) for name, raw in names.items() if raw.endswith(name)} - {"''"}
    around |= {repr(f"{part}.") for raw in names.values() for part in WRAPPERS & set(raw.split("."))}
    if around:
        notes.append(f"names without {', '.join(sorted(around))}")
    inside = [
        (raw, name) for name, raw in names.items() if not raw.endswith(name) and NUMBER.sub("", raw).endswith(name)
    ]
    notes += [f"{raw} taken for {name}" for raw, name in inside]
    used = set(names.values())
    left = [raw for raw in state if raw not in used]
    if left:
        notes.append(f"left out {in_short(left)}")
    if len(found) > len(names):
        notes.append("num_batches_tracked, which old files lack, is 0")
    types = {f"{state[raw].dtype} as {found[name].dtype}" for name, raw in names.items()
             if state[raw].dtype != found[name].dtype}  # fmt: skip
    return [*notes, *(t.replace("torch.", "") for t in sorted(types))]


def in_short(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- which model it is of -------------------------------------------------------------------------------------


def guess_classes(state: Mapping[str, Tensor]) -> int:
    """Rows of the last matrix, which is the head in most models; 10 where there is none."""
    rows = [t.shape[0] for name, t in state.items() if name.endswith("weight") and t.ndim == 2]
    return rows[-1] if rows else 10


def guess_channels(state: Mapping[str, Tensor]) -> int:
    """Input channels of the first convolution; 3 where there is none."""
    channels = [t.shape[1] for t in state.values() if t.ndim == 4]
    return channels[0] if channels and channels[0] in (1, 3) else 3


def guess_size(state: Mapping[str, Tensor]) -> int | None:
    """Side of the images that a ViT, or the CNN of `zsu.reproduce`, was built for; None for other models."""
    held = {name: state[raw] for name, raw in inner_names(state).items()}
    if {"encoder.pos_embedding", "conv_proj.weight"} <= held.keys():  # (1, 1 + n n, D): a token and n x n patches
        return isqrt(held["encoder.pos_embedding"].shape[1] - 1) * held["conv_proj.weight"].shape[-1]
    if "6.weight" in held and held["6.weight"].ndim == 2:  # (512, 64 n n), after a pooling that halves
        return 2 * isqrt(held["6.weight"].shape[1] // 64)
    return None


def check_same_shapes(expected: State, found: State, arch: str, path: str | os.PathLike) -> None:
    """`ZsuError` unless both state dicts have tensors of the same names, shapes and kinds of numbers."""
    wanted, held = (
        {name: f"{tuple(t.shape)}{'' if t.is_floating_point() else f' {t.dtype}'}" for name, t in state.items()}
        for state in (expected, found)
    )
    differing = [name for name in wanted | held if wanted.get(name) != held.get(name)]
    if differing:
        listed = "; ".join(
            f"{name}: {held.get(name, 'absent')} in the file, {wanted.get(name, 'absent')} in the model"
            for name in differing[:3]
        )
        what = f"the checkpoint is not one of {arch}: {len(differing)} parameters differ, first {listed}"
        remedy = "pass the arch, classes and channels that it was trained with, or build the model and fill it yourself"
        if any(COMPUTED.search(name) for name in held.keys() - wanted.keys()):
            remedy = (
                "bake in the weights that are computed before you save: prune.remove, remove_weight_norm, merge LoRA"
            )
        raise ZsuError(what, where=str(path), remedy=remedy)


# --- editing one ----------------------------------------------------------------------------------------------


def edit(state: State, about: dict, change: Callable[[State], object], wanted: Collection[str] = ()) -> list[str]:
    """Change a state dict in place: as it stands in the file or, where that is refused, as `zsu.models.load` reads it.

    Names stay those of the file, and so do types where the new values fit. Where they do not, ``about["dtypes"]``
    keeps the old type, so that the way back ends where it began. Returns what became wider, in words.
    """
    held = {name: t.dtype for name, t in state.items()}
    names, view = {name: name for name in state}, state
    try:
        change(view)
    except ZsuError:  # for the weights as they are in the file
        names = inner_names(state, wanted)
        names = {name: raw for name, raw in names.items() if not wanted or name in wanted}
        view = as_computed({name: state[raw] for name, raw in names.items()})
        change(view)
    before = {name: getattr(torch, dtype) for name, dtype in about.pop("dtypes", {}).items()}
    wider = {}
    for name, raw in names.items():
        wide, dtype = view[name].detach(), before.get(raw, held[raw])
        narrow = wide.to(dtype)
        back, wanted_bits = (t.flatten().view(torch.uint8) for t in (narrow.to(wide.dtype), wide))
        fits = torch.equal(back, wanted_bits)
        state[raw] = narrow if fits else wide
        if not fits:
            wider[raw] = str(dtype).removeprefix("torch.")
    if wider:
        about["dtypes"] = wider
    return [f"{name} does not fit {dtype}" for name, dtype in wider.items()]
