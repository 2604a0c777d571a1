"""audit(): every measure on every model, its controls and the models retrained without the class."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import sklearn
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from ..data import batches, class_indices, classes, histogram, targets
from ..errors import ZsuError, as_names, check_flag, check_seed, is_integer, is_number, warn
from ..forgetting import Forgotten, Patch, forget
from ..forgetting.perturb import model_hash
from ..inside import logit_layer, place, uncompiled
from .measures import CONTROLS, MEASURES, OF_MANY, OF_PAIRS
from .observed import DEPTHS, Given, Observed, Outputs, observe
from .privacy import FEW
from .report import COST, Report
from .representation import accuracy_on
from .robustness import images_beside
from .utility import accuracy, balanced_accuracy, jensen_shannon, mean

AT_HAND = 250  # test images of the class, for measures that change images or train
SAMPLES = 36  # that the controls look at


class Case(NamedTuple):
    """What is audited; `results` are by row one edit, or one of each original."""

    originals: list[nn.Module]
    results: dict[str, list[Forgotten | nn.Module]]
    references: list[nn.Module]
    train: Dataset
    test: Dataset
    target: list[int]
    measures: list[str]
    seed: int


@torch.inference_mode(False)  # a caller's inference mode would forbid the gradients that attacks need
@torch.enable_grad()
def audit(
    original: nn.Module | Sequence[nn.Module],
    forgotten: Mapping[str, Forgotten | nn.Module | Sequence[Forgotten | nn.Module]],
    train: Dataset,
    test: Dataset,
    target: int | str | Sequence[int | str],
    references: nn.Module | Sequence[nn.Module] = (),
    *,
    measures: Sequence[str] | None = None,
    controls: bool = True,
    retrain_seconds: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """What was forgotten, what was not, and at what price, beside models retrained without the class.

    Every model runs once over each split. A measure's formula, source, ideal and blind spot are in its docstring, by
    name in `zsu.evaluation.MEASURES`, and in the page that `Report.save` writes.

    Parameters
    ----------
    original : nn.Module, or several
        The model before. U-LiRA and KLOM compare many models of a kind: for them pass several originals, trained under
        different seeds, of which the first is audited, and for each edit as many results in the same order.
    forgotten : mapping of str to Forgotten or nn.Module, or several
        Edited models by the name of their row.
    train, test : Dataset
        Train and test data. Leave the samples that the edit saw out of `test` (`zsu.data.without_samples`).
    target : int or str, or a list of them
        The class forgotten, by index or name, or several that were forgotten together: At is then over all of them.
    references : sequence of nn.Module, or one
        Models retrained from scratch without the class, under different seeds. None: no divergence. One: no band.
    measures : sequence of str
        Names in `MEASURES`; default all of them. ``zsu.evaluation.BASIC``, accuracy and divergence, takes a tenth of
        the time.
    controls : bool
        Also make and audit the trivial edits "mask", "bias-shift", "random" and "zeroed", except where `forgotten` has
        a row of that name. They look at up to 36 test images of the class.
    retrain_seconds : float, optional
        Time of one retraining, for the row "retrain".
    seed : int
        Of the attacks' draws, the noise, the controls.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Report
        Its `frame` has the columns of the measures, and

        * ``ag_drop``: of ag_test from that of the original.
        * ``js_forget_ratio``: js_forget divided by the null, the mean over pairs of references.
        * ``anamnesis``: relearn divided by the references' mean.
        * ``seconds, weights_changed, memory``: of the edit; memory is the patch's, in bytes.
        * ``broken``: of the test accuracy on the other classes, all of them weighing the same, less than half is left
          of what the original has above chance (one answer for all, right on one of them; with one other class: above
          0). Such a model has not forgotten a class but lost what it knew; text and page show "broken" in place of its
          other numbers than accuracies and those on the others.

        The row "retrain" is the mean over references, each measured against the others. NaN where there is nothing to
        compare with or to fit to.

    Raises
    ------
    ZsuError
        No sample of the class, or none of another, in a data set; unknown class or measure; a row called original or
        retrain; models that do not fit the data or each other; outputs that are not finite; a reference that predicts
        the class.

    Warns
    -----
    UserWarning
        The original is right on less than half of the test data: then read the numbers relative to it. Fewer than 5
        samples of the class in a split, of which no attack can learn.
    """
    asked = list(MEASURES) if measures is None else as_names("measures", measures, "audit")
    for name, flag in (("controls", controls), ("progress", progress)):
        check_flag(name, flag, "audit")
    if retrain_seconds is not None and not (is_number(retrain_seconds) and retrain_seconds >= 0):
        raise ZsuError(f"retrain_seconds is {retrain_seconds!r}", where="audit", remedy="pass a number of seconds")
    case = Case(make_list(original), lists_by_name(forgotten), make_list(references), train, test,
                class_indices(test, target), asked, seed)  # fmt: skip
    check_case(case)
    x, y = images_at_hand(case)
    made, notes = make_controls(case, x, y) if controls else ({}, [])
    case = case._replace(results=case.results | made)
    steps = (2 + len(case.measures)) * (1 + len(case.results) + len(case.references))
    with tqdm(total=steps, desc="audit", unit="step", disable=not progress) as bar:
        started = time.perf_counter()
        seen, data_sha256 = observe_all(case, x[:2], bar)
        seconds = {"outputs": time.perf_counter() - started}
        numbers = measure(case, seen, x, y, bar, seconds)
    return build_report(case, seen, numbers, seconds, notes, data_sha256, retrain_seconds)


# --- check ----------------------------------------------------------------------------------------------------


def make_list(value: Any) -> list:
    """A sequence as a list, one thing as a list of it; a `Forgotten`, which is a tuple, is one thing. Of what
    torch.compile made, the model inside.
    """
    several = value if isinstance(value, (list, tuple)) and not isinstance(value, Forgotten) else [value]
    return [uncompiled(v) for v in several]


def lists_by_name(forgotten: Mapping[str, object]) -> dict[str, list]:
    """The edits of each row as a list; `ZsuError` for what is no mapping, and for names that are taken."""
    if not isinstance(forgotten, Mapping):
        remedy = 'pass a mapping from names to results, such as {"paths": forgotten}'
        raise ZsuError(f"the edits are a {type(forgotten).__name__}", where="audit", remedy=remedy)
    if {"original", "retrain"} & set(forgotten) or not all(isinstance(name, str) and name for name in forgotten):
        what = f"the edits are named {', '.join(map(repr, forgotten))}"
        raise ZsuError(what, where="audit", remedy="name them by strings other than 'original' and 'retrain'")
    return {name: make_list(f) for name, f in forgotten.items()}


def check_case(case: Case) -> None:
    """`ZsuError` for what no audit can be made of."""
    for name, dataset in (("train", case.train), ("test", case.test)):
        check_split(name, dataset, case.target)
    if classes(case.train) != classes(case.test):
        what = f"the train data has classes {classes(case.train)}, the test data {classes(case.test)}"
        raise ZsuError(what, where="audit", remedy="pass two parts of one data set")
    unknown = [m for m in case.measures if m not in MEASURES]
    if unknown or not case.measures:
        raise ZsuError(f"no measures {unknown}", where="audit", remedy=f"use some of {', '.join(MEASURES)}")
    check_seed(case.seed, "audit")
    for what, models in (("an original", case.originals), ("a reference", case.references)):
        for model in models:
            if not isinstance(model, nn.Module):
                raise ZsuError(f"{what} is a {type(model).__name__}", where="audit", remedy="pass an nn.Module")
    if not case.originals:
        raise ZsuError("no original", where="audit", remedy="pass the model before the edit")
    for name, several in case.results.items():
        check_edits(name, several, case.originals)


def check_split(name: str, dataset: Dataset, target: list[int]) -> None:
    """`ZsuError` with the number of samples of each class where the class, or all the others, have none."""
    found = len(members(dataset, target))
    named = ", ".join(repr(classes(dataset)[c]) for c in target)
    if found in (0, len(dataset)):
        remedy = f"pass data with samples of class {named} and of others"
        raise ZsuError(f"the {name} data holds {histogram(dataset)}", where="audit", remedy=remedy)
    if found < FEW:
        warn(f"only {found} {name} samples of class {named}: attacks that learn of them are n/a")


def check_edits(name: str, several: list, originals: list[nn.Module]) -> None:
    """Each is a model or a `Forgotten`; of several each was made of the original at the same place."""
    if len(several) not in (1, len(originals)):
        what = f"{len(several)} results of {name!r} for {len(originals)} originals"
        raise ZsuError(what, where="audit", remedy="pass one, or one for each original")
    for i, edit in enumerate(several):
        if not isinstance(edit, (Forgotten, nn.Module)):
            remedy = "pass what zsu.forget returns, or a model"
            raise ZsuError(f"{name!r} is a {type(edit).__name__}", where="audit", remedy=remedy)
        parent = edit.patch.made.get("parent") if isinstance(edit, Forgotten) and len(several) > 1 else None
        if parent is not None and parent != model_hash(originals[i]):
            what = f"result {i} of {name!r} was made of another model than original {i}"
            raise ZsuError(what, where="audit", remedy="pass results in the order of the originals")


def members(dataset: Dataset, target: list[int]) -> list[int]:
    """Indices of the samples of the classes."""
    return torch.isin(targets(dataset), torch.tensor(target)).nonzero()[:, 0].tolist()  # (M, 1) -> (M,)


def images_at_hand(case: Case) -> tuple[Tensor, Tensor]:
    """Up to 250 test images (M, C, H, W) of the forgotten classes, evenly drawn from them, and labels (M,)."""
    indices = members(case.test, case.target)
    parts = list(batches(Subset(case.test, indices[:: -(-len(indices) // AT_HAND)])))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def make_controls(case: Case, x: Tensor, y: Tensor) -> tuple[dict[str, list], list[str]]:
    """The trivial edits of each original, by name; where a model does not allow one, a note instead."""
    by_class = [x[y == c][:SAMPLES] for c in case.target if (y == c).any()]
    made, notes = {}, []
    for name in [name for name in CONTROLS if name not in case.results]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of samples that the original does not recognise
                made[name] = [
                    forget(model, [place(s, model) for s in by_class], case.target, name, seed=case.seed)
                    for model in case.originals
                ]
        except ZsuError as error:
            notes.append(f"control {name!r}: {error}")
    return made, notes


# --- observe --------------------------------------------------------------------------------------------------


def observe_all(case: Case, x: Tensor, bar: tqdm) -> tuple[dict[str | int, Observed], str]:
    """Each model by its row, each reference by its number, on both splits, and a hash of the data.

    x is a few images, which tell which layer is the head.
    """
    digest = hashlib.sha256()
    seen: dict[str | int, Observed] = {}
    references = {i: [model] for i, model in enumerate(case.references)}
    models: dict[Any, list] = {"original": case.originals, **case.results, **references}
    for row, several in models.items():
        name = f"reference {row}" if is_integer(row) else row
        edited = [f.model if isinstance(f, Forgotten) else f for f in several]
        seen[row] = observe_model(case, name, edited, x, bar, None if seen else digest)
        check_outputs(name, seen[row].test, seen["original"].test, is_integer(row))
    return seen, digest.hexdigest()


def observe_model(
    case: Case, name: str, several: list[nn.Module], x: Tensor, bar: tqdm, digest: hashlib._Hash | None
) -> Observed:
    """The first of several with its outputs on both splits, one pass each; the others on the class only, if asked."""
    (model, *others), where, splits, siblings = several, f"audit of {name!r}", [], []
    depths = DEPTHS if {"probes", "prototype"} & set(case.measures) else 0
    for dataset in (case.train, case.test):
        splits.append(observe(model, dataset, case.target, depths, where, digest))
        bar.update()
    for other in others if set(OF_MANY) & set(case.measures) else []:
        parts = [Subset(dataset, members(dataset, case.target)) for dataset in (case.train, case.test)]
        train, test = (observe(other, part, case.target, where=where) for part in parts)
        siblings.append(Observed(other, train, test))
    return Observed(model, splits[0], splits[1], logit_layer(model, x), siblings)


def check_outputs(name: str, outputs: Outputs, original: Outputs, is_reference: bool) -> None:
    """A model has as many classes as the original; a reference does not predict the forgotten one."""
    found, wanted = tuple(outputs.logits.shape), tuple(original.logits.shape)
    if found != wanted:
        what = f"outputs of shape {found} of {name!r}, of shape {wanted} of the original"
        raise ZsuError(what, where="audit", remedy="compare models with the same classes")
    known = accuracy(*outputs.part(True))
    if is_reference and known >= 1 / wanted[1]:
        what = f"{name!r} predicts the forgotten class on {known:.0%} of its test images"
        raise ZsuError(what, where="audit", remedy="pass models that were trained without the class")


# --- measure --------------------------------------------------------------------------------------------------


def measure(
    case: Case, seen: dict[str | int, Observed], x: Tensor, y: Tensor, bar: tqdm, seconds: dict[str, float]
) -> dict[str, pd.DataFrame]:
    """Of each measure the numbers of all that was observed, one row each; how long it took goes into `seconds`."""
    model = seen["original"].model
    beside = images_beside(model, x, y) if "over-unlearning" in case.measures else x[:0]
    given = Given(seen["original"], case.target, case.train, x, y, beside, accuracy_on(model, x, y), case.seed)
    numbers = {}
    for name in case.measures:
        started, rows = time.perf_counter(), {}
        for row, m in seen.items():
            others = [seen[i] for i in range(len(case.references)) if i != row]
            if name in OF_MANY and is_integer(row):  # half of the other references stand for its siblings
                m, others = dataclasses.replace(m, siblings=others[1::2]), others[::2]
            rows[row] = MEASURES[name](m, given, others)
            bar.update()
        numbers[name] = with_derived(pd.DataFrame.from_dict(rows, orient="index"), range(len(case.references)))
        seconds[name] = time.perf_counter() - started
    return numbers


def with_derived(numbers: pd.DataFrame, references: range) -> pd.DataFrame:
    """Behind a measure's numbers, those that compare them with the original's or with the references' mean."""
    for new, old in (("js_forget_ratio", "js_forget"), ("anamnesis", "relearn")):
        if old in numbers:
            numbers[new] = numbers[old] / (mean(numbers.loc[references, old]) or np.nan)
    if "ag_test" in numbers:
        numbers["ag_drop"] = numbers.loc["original", "ag_test"] - numbers["ag_test"]
    return numbers


# --- report ---------------------------------------------------------------------------------------------------


def build_report(
    case: Case, seen: dict[str | int, Observed], numbers: dict[str, pd.DataFrame], seconds: dict[str, float],
    notes: list[str], data_sha256: str, retrain_seconds: float | None,
) -> Report:  # fmt: skip
    """The numbers of each model beside their bands, what its edit cost, and what else there is to say."""
    found, references = pd.concat(numbers.values(), axis=1).astype(float), range(len(case.references))
    measure_of = {c: name for name, part in numbers.items() for c in part}
    bands = {c: interval(found.loc[references, c], 3 if m in OF_PAIRS else 2) for c, m in measure_of.items()}
    null = pd.DataFrame.from_dict(bands, orient="index")
    found.loc["retrain"] = null["mean"]
    frame = found.loc[["original", "retrain", *case.results]].rename_axis("model")
    if "all_test" in frame and frame.loc["original", "all_test"] < 0.5:
        warn(f"the original is right on {frame.loc['original', 'all_test']:.0%} of the test data only")
    ag = {row: accuracy(*m.test.part(False)) for row, m in seen.items()}
    kept = {row: balanced_accuracy(*m.test.part(False)) for row, m in seen.items()}
    others = len(seen["original"].test.part(False)[1].unique())
    frame["broken"] = [is_broken(kept.get(row, kept["original"]), kept["original"], others) for row in frame.index]
    patches = {name: several[0].patch for name, several in case.results.items() if isinstance(several[0], Forgotten)}
    cost: dict[str, list] = {"retrain": [retrain_seconds, None, None]}
    for name, patch in patches.items():
        cost[name] = [float(patch.made.get("seconds", "nan")), patch.weights_changed, patch.nbytes]
    frame = frame.join(pd.DataFrame.from_dict(cost, "index", float, COST))
    outputs = [seen[i].test.part(True)[0] for i in references]  # (N, classes) each
    pairs = [jensen_shannon(p, q) for p, q in itertools.combinations(outputs, 2)]
    about = facts(case, seen["original"], data_sha256, patches)
    return Report(frame, null, pairs, routing_table(case, seen), seconds, notes + remarks(case, ag), about, measure_of)


def is_broken(kept: float, original: float, others: int) -> bool:
    """Whether less than half is left of what the original's accuracy on so many other classes is above chance, which is
    what one answer for all has; where that is nothing, as with one other class, of the accuracy itself.
    """
    chance = 1 / others if original > 1 / others else 0.0
    return kept - chance < (original - chance) / 2


def interval(values: Sequence[float], least: int = 2) -> dict[str, float]:
    """Mean, and the 95 % interval for one more value, mean -+ t sd sqrt(1 + 1 / K), of at least so many values."""
    known = [v for v in values if not np.isnan(v)]
    found = {"mean": mean(known), "low": np.nan, "high": np.nan, "references": len(known)}
    if len(known) >= least:
        deviation = np.std(known, ddof=1) * np.sqrt(1 + 1 / len(known))
        low, high = stats.t.interval(0.95, len(known) - 1)  # of deviation 1: scipy takes no 0
        found |= {"low": found["mean"] + low * deviation, "high": found["mean"] + high * deviation}
    return found


def remarks(case: Case, ag: dict[str | int, float]) -> list[str]:
    """Why some numbers or bands are missing, or worth little; by the accuracy on the other classes."""
    many, number = set(OF_MANY) & set(case.measures), len(case.references)
    few = many and 0 < number < 6
    worse = mean([ag[i] for i in range(number)]) < ag["original"] - 0.05  # false without references: their mean is NaN
    notes = {
        "no models retrained without the class": number == 0,
        "one retrained model has no band": number == 1,
        "two retrained models are one pair: no band of divergence, agreement and routing": number == 2,
        "the bands of ulira and klom need 6 retrained models, half of which stand for unlearned ones": few,
        "the retrained models are worse on the other classes than the original by over 5 points: train more": worse,
        "ulira and klom need several originals, and for each edit as many results": many and len(case.originals) < 3,
    }
    return [note for note, holds in notes.items() if holds]


def routing_table(case: Case, seen: dict[str | int, Observed]) -> pd.DataFrame:
    """Mean probability of each class on test inputs of the forgotten class, by model."""
    means = {row: m.test.part(True)[0].mean(0) for row, m in seen.items()}  # (N, classes) -> (classes,)
    if case.references:
        means["retrain"] = torch.stack([means[i] for i in range(len(case.references))]).mean(0)
    rows = [row for row in ("original", "retrain", *case.results) if row in means]
    names, outputs = classes(case.test), len(means["original"])
    names = [*names[:outputs], *map(str, range(len(names), outputs))]  # a model may know more classes than the data
    return pd.DataFrame([means[row].tolist() for row in rows], rows, names)


def facts(case: Case, original: Observed, data_sha256: str, patches: dict[str, Patch]) -> dict[str, str]:
    """Classes, samples, hashes and versions."""
    images = {
        f"{split} images": f"{int(o.forget.sum())} of the class, {int((~o.forget).sum())} others"
        for split, o in (("test", original.test), ("train", original.train))
    }
    return {
        "class": ", ".join(classes(case.test)[c] for c in case.target),
        **images,
        "references": str(len(case.references)),
        "sha256 of train and test": data_sha256,
        "sha256 of original": model_hash(original.model),
        **{f"patch {name}, parent": p.made.get("parent", "") for name, p in patches.items()},
        "versions": f"zsu {version('zsu')}, torch {torch.__version__}, scikit-learn {sklearn.__version__}, "
        f"Python {platform.python_version()}",
    }
