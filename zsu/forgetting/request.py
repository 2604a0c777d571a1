"""forget(): remove classes from a trained classifier, from a few unseen samples of them or with more data."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import classes, counts, histogram, samples, targets
from ..errors import ZsuError, check_seed, is_integer, warn
from ..inside import (
    check_finite,
    check_model,
    check_weights,
    copied,
    guarded,
    logits_of,
    place,
    uncompiled,
)
from ..models import count_outputs
from ..relevance.checks import as_target, check_input, output_weights
from .cutting import CutPaths
from .methods import BiasShift, Edit, Mask, Method, Zeroed, no_rows
from .neurons import HeadNpp, LraNpp, Random
from .peers import BoundaryShrink, FineTune, NegativeGradient, Ssd, Svd
from .perturb import Patch, model_hash, same_bits

FEW = 5  # fewer samples than these are warned about

# The methods with their defaults. A method need not be here to be used.
METHODS = {
    method.name: method
    for method in (
        CutPaths(), LraNpp(), HeadNpp(), Mask(), BiasShift(), Random(), Zeroed(),
        FineTune(), NegativeGradient(), Ssd(), Svd(), BoundaryShrink(),
    )
} | {"paths+retained": CutPaths(retained=True)}  # fmt: skip


class Forgotten(NamedTuple):
    """What `forget` returns.

    Attributes
    ----------
    model : nn.Module
        The edited copy.
    patch : Patch
        The edit; ``patch.revert(model)`` gives the original back bit for bit, ``patch.diff(model)`` says what it
        changes in each layer.
    cut : pandas.DataFrame
        What was perturbed, one row each: layer, channel, source (the source channel of a cut edge; <NA> where the
        whole neuron was perturbed, and where the layer is the name of a bias that was lowered). Empty for methods that
        train. None where it is not known, as of a patch from a file.
    """

    model: nn.Module
    patch: Patch
    cut: pd.DataFrame | None = None


def forget(
    model: nn.Module,
    x: Tensor | Sequence[Tensor],
    target: int | Sequence[int],
    method: str | Method = "paths",
    perturbation: str = "zero",
    *,
    retained: Dataset | None = None,
    seed: int = 0,
    **options,
) -> Forgotten:
    """Make a copy of the model forget classes, from a few samples of them that it was not trained on.

    Parameters
    ----------
    model : nn.Module
        Classifier in eval mode with logits (N, classes) as output, of at least two classes; it is not changed. Of what
        `torch.compile` made, in whole or in part, the copy is what was compiled, and names are those in it.
    x : Tensor (N, C, H, W), or a list of them
        Samples of the class, of the dtype and on the device of the model; for several classes one tensor each. The
        methods of tier T2 and above want all training images of the class.
    target : int, or a list of them
        Index of the class to forget. Several are forgotten one after the other in the order of their indices, whatever
        the order of the list, and make one patch; a later one can raise the probability of an earlier one a little.
    method : str or Method
        A name of `METHODS`, with the method's own options as keywords, or a method with its options:
        ``forget(model, x, target, "ssd", alpha=5, retained=kept)`` and
        ``forget(model, x, target, Ssd(alpha=5), retained=kept)`` are the same. By the data that they need:

        * T1, a few samples of the class: ``"paths"``, `zsu.forgetting.CutPaths` (T3 with `retained`); ``"lra-npp"``,
          `LraNpp`; ``"head-npp"``, `HeadNpp`;
        * controls: ``"mask"`` and ``"bias-shift"`` (T0: the class's logit, or its bias alone, becomes a constant far
          below all others), ``"random"`` (as many random neurons as ``"lra-npp"`` takes), ``"zeroed"`` (T0: all weights
          are 0);
        * ``"boundary-shrink"`` (T2), ``"ssd"``, ``"svd"`` (T3), ``"fine-tune"``, ``"negative-gradient"`` (T4): see
          `zsu.forgetting.peers`.
    perturbation : {"zero", "gaussian", "laplace"}
        See `zsu.forgetting.perturb.perturb`; an option of ``"paths"``, ``"lra-npp"``, ``"head-npp"`` and ``"random"``,
        as are `scale` and `absolute` of the noise.
    retained : Dataset, optional
        Samples of the other classes, with ``.targets`` and ``.classes``: for ``"paths"`` if you have some, and for the
        methods of T3 and T4. Refused by all others, which do not look at it.
    seed : int
        Of the noise, of the random control and of training.
    **options
        Of the method, see its class: k, perturbed, layers, alpha, epochs, ... None is the default.

    Returns
    -------
    Forgotten

    Raises
    ------
    ZsuError
        Unknown method, option or perturbation; k < 1 or more neurons than a layer has; target no integer; a model that
        takes no sample for the class, has one class, has weights that are computed (parametrizations, weight_norm,
        pruning), or cannot be copied; retained data that is missing, not asked for, or holds the class; an edit after
        which the logits are not finite; and what `explain` refuses.

    Warns
    -----
    UserWarning
        The model does not recognise half of the samples; fewer than 5 samples; the edit changes no weight; some
        samples are still taken for the class, whatever the method: then the best that it reached is returned, and
        ``patch.metadata["budget"]`` says so for those that look for one.
    """
    model, several = uncompiled(model), pair_samples(x, target)
    check_seed(seed, "forget")
    if not isinstance(perturbation, str) or perturbation != "zero":
        options = {"perturbation": perturbation} | options
    method = as_method(method, options, retained is not None)
    check_retained(method, retained, [c for _, c in several])
    started = time.perf_counter()
    unrecognised = sum(count_unrecognised(answers(model, s), c) for s, c in several)
    if retained is not None:
        check_fits(model, retained)
    check_weights(model)
    with torch.inference_mode(False), torch.enable_grad():
        edited = copied(model)
        held = {name: t.clone() for name, t in edited.named_buffers()}
        for p in edited.parameters():
            p.requires_grad_(p.is_floating_point())  # methods that train change frozen parameters too
        with guarded(edited):
            edits = [method.edit(edited, s, c, retained, int(seed)) for s, c in several]
    if not all(isinstance(e, Edit) for e in edits):
        raise ZsuError(f"{method.name!r} returned no Edit", where="forget", remedy="let edit return Edit(cut, budget)")
    for p, original in zip(edited.parameters(), model.parameters(), strict=True):
        p.requires_grad_(original.requires_grad)
    patch = Patch.between(model, edited)
    moved = [name for name, t in edited.named_buffers() if t.is_floating_point() and not same_bits(t, held[name])]
    if moved:
        warn(f"{method.name!r} changes {moved[0]}, a buffer: the patch holds parameters alone")
    if patch.weights_changed == 0:
        warn("the edit has no effect: no weight changes")
    for s, c in several:
        left = int((answers(edited, s, "the edited model").argmax(1) == c).sum())
        if left:
            warn(f"class {c}: {left} of {len(s)} samples are still taken for the class")
    patch.metadata = as_json({
        "target": [c for _, c in several],
        "method": method.name,
        "tier": method.tier,
        "options": {f.name: getattr(method, f.name) for f in dataclasses.fields(method)},
        "retained": 0 if retained is None else len(retained),
        "budget": [e.budget for e in edits],
        "samples": [len(s) for s, _ in several],
        "samples_sha256": samples_hash([s for s, _ in several]),
        "unrecognised": unrecognised,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 4),
        "parent": model_hash(model),
        "zsu": version("zsu"),
        "torch": torch.__version__,
    })  # fmt: skip
    return Forgotten(edited, patch, pd.concat([no_rows(), *(e.cut for e in edits)], ignore_index=True))


# --- what was asked for ---------------------------------------------------------------------------------------


def as_method(method: str | Method, options: Mapping[str, object], retained: bool) -> Method:
    """The method of that name, or the method itself, with its options; `ZsuError` for what does not go together."""
    if not isinstance(method, Method) and not (isinstance(method, str) and method in METHODS):
        remedy = f"use one of {', '.join(METHODS)}, or a method such as Ssd()"
        raise ZsuError(f"unknown method {method!r}", where="forget", remedy=remedy)
    method = method if isinstance(method, Method) else METHODS[method]
    known = [f.name for f in dataclasses.fields(method) if f.init and f.name != "retained"]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            remedy = f"it takes {', '.join(known)}" if known else "it has no options"
            raise ZsuError(f"{method.name!r} takes no {name}", where="forget", remedy=remedy)
    if retained and isinstance(method, CutPaths):
        given["retained"] = True
    return dataclasses.replace(method, **given)


def check_retained(method: Method, retained: Dataset | None, forgotten: list[int]) -> None:
    """Refuse retained data that is missing, not asked for, or of a class to forget."""
    needed = method.tier in ("T3", "T4")
    if retained is None and needed:
        remedy = "pass retained=, a data set of the other classes"
        raise ZsuError(f"{method.name!r} needs retained samples ({method.tier})", where="forget", remedy=remedy)
    if retained is None:
        return
    if not needed:
        remedy = "leave retained out, or use 'paths', which then is of tier T3"
        raise ZsuError(f"{method.name!r} is of tier {method.tier}: no retained data", where="forget", remedy=remedy)
    if np.isin(targets(retained).numpy(), forgotten).any():
        what = f"the retained data holds the class to forget: {histogram(retained)}"
        remedy = f"leave out {', '.join(classes(retained)[c] for c in forgotten)}"
        raise ZsuError(what, where="forget", remedy=remedy)


def check_fits(model: nn.Module, retained: Dataset) -> None:
    """Refuse retained data that the model does not fit, by one image of it."""
    remedy = "pass images as the model was trained on"
    if len(retained) == 0:
        raise ZsuError("the retained data is empty", where="forget", remedy=remedy)
    outputs = count_outputs(model, retained, "forget, retained data")
    if int(targets(retained).max()) >= outputs:
        what = f"the retained data has label {int(targets(retained).max())}, the model {outputs} classes"
        raise ZsuError(what, where="forget", remedy=remedy)


def pair_samples(x: Tensor | Sequence[Tensor], target: int | Sequence[int]) -> list[tuple[Tensor, int]]:
    """(samples, class) in the order of the classes."""
    if is_integer(target):
        return [(without_graph(x), int(target))]
    remedy = "pass the index of one class, or a list of indices and a list of as many tensors of samples"
    several = target.tolist() if isinstance(target, np.ndarray) else target
    if isinstance(several, (str, bytes)) or not isinstance(several, Sequence) or not all(map(is_integer, several)):
        raise ZsuError(f"target is {target!r}", where="forget", remedy=remedy)
    if len(set(several)) < len(several):
        what = "a class is named twice: whole classes are forgotten here, not single samples"
        raise ZsuError(what, where="forget", remedy=remedy)
    if not isinstance(x, Sequence) or len(x) != len(several) or not several:
        number = len(x) if isinstance(x, (Sequence, Tensor)) else "no"
        raise ZsuError(f"{number} tensors of samples for {len(several)} classes", where="forget", remedy=remedy)
    return sorted(((without_graph(s), int(c)) for s, c in zip(x, several, strict=True)), key=lambda pair: pair[1])


def without_graph(x: Any) -> Any:
    """Without a graph, so that no gradient reaches the caller's tensor; what is no tensor is refused later."""
    if isinstance(x, Tensor) and x.is_inference():
        with torch.inference_mode(False):
            return x.clone()  # which gradients may pass
    return x.detach() if isinstance(x, Tensor) else x


@torch.no_grad()
def answers(model: nn.Module, x: Tensor, where: str | None = None) -> Tensor:
    """Finite logits, in batches of 100."""
    check_model(model)
    check_input(model, x)
    logits = torch.cat([logits_of(model, part.clone(), where) for part in x.split(100)])  # it may change its input
    check_finite(model, logits, where)
    return logits


def count_unrecognised(logits: Tensor, target: int) -> int:
    """Number of samples that the model does not take for the class; `ZsuError` where that is all of them."""
    output_weights(logits, as_target(target, logits))  # refuses a target that is no class
    if logits.shape[1] == 1:
        remedy = "give it a logit for each of two classes"
        raise ZsuError("the model has one class, and no other to answer", where="forget", remedy=remedy)
    n = len(logits)
    wrong = int((logits.argmax(1) != target).sum())
    if wrong == n:
        remedy = "pass samples of the class that is named; what a model cannot predict it cannot forget"
        raise ZsuError(f"the model takes none of the {n} samples for class {target}", where="forget", remedy=remedy)
    if 2 * wrong > n:
        warn(f"the model does not take {wrong} of {n} samples for class {target}")
    if n < FEW:
        warn(f"{n} samples are few: what is found need not hold for the class")
    return wrong


def samples_hash(several: list[Tensor]) -> str:
    """sha256 over the bytes of the samples of each class, as float32."""
    digest = hashlib.sha256()
    for x in several:
        digest.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def count_seen(patch: Patch, model: nn.Module, test: Dataset) -> int:
    """How many test images of each class an edit has seen: those that `samples` draws, if their hash is the same.

    Warns where that cannot be told; training images, which methods of tier T2 and above see, are in no test.
    """
    about = patch.made
    if "unseen" in about:
        return about["unseen"]
    number, *others = set(about.get("samples", [0]))
    known = {"target", "seed", "samples_sha256"} <= about.keys()
    if known and not others and 0 < number < counts(test)[about["target"][0]]:
        drawn = [place(samples(test, c, number, about["seed"]), model) for c in about["target"]]
        if samples_hash(drawn) == about["samples_sha256"]:
            return number
    if about.get("tier", "T1") in ("T0", "T1") or about.get("method") == "paths":
        warn("which images the edit has seen is not known: they may be among those of the test")
    return 0


def as_json(about: dict) -> dict:
    """As JSON holds it: tuples and sets become lists, NumPy's numbers and arrays Python's, anything else its name."""

    def plain(value: Any) -> object:
        if hasattr(value, "tolist"):
            return value.tolist()
        return list(value) if isinstance(value, (set, frozenset, range)) else str(value)

    return json.loads(json.dumps(about, default=plain))
