"""audit(): every measure on every model, its controls and the models retrained without the class; and the Report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import sklearn
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from ..data import batches, class_indices, classes, histogram, targets
from ..errors import ZsuError, is_integer, warn
from ..files import write_atomically
from ..forgetting import Forgotten, Patch, forget
from ..forgetting.perturb import model_hash
from . import privacy, representation, robustness, utility
from .outputs import DEPTHS, Observed, logit_layer, observe, placed
from .utility import jensen_shannon, mean

MEASURES: dict[str, Callable] = {
    "accuracy": utility.accuracies,
    "divergence": utility.divergence,
    "agreement": utility.agreement,
    "routing": utility.routing,
    "calibration": utility.calibration,
    "forget rate": privacy.forget_rate,
    "forgetting score": privacy.forgetting_score,
    "membership": privacy.membership_inference,
    "u-lira": privacy.likelihood_ratio,
    "klom": privacy.margins_kl,
    "cmia": privacy.class_membership,
    "over-unlearning": robustness.over_unlearning,
    "prototype": representation.prototype_attack,
    "probes": representation.linear_probes,
    "relearning": representation.relearning,
    "head": representation.head_shortcut,
    "robustness": robustness.robustness,
}
BASIC = ("accuracy", "divergence")
OF_MANY = ("u-lira", "klom")  # compare many models of a kind
OF_PAIRS = ("divergence", "agreement", "routing")  # two references are one pair, which has no spread
CONTROLS = ("mask", "bias-shift", "random", "zeroed")
UTILITY = {"ag_test", "all_test", "ag_train", "all_train", "ag_drop", "js_retained", "agree_retained", "ece_retained"}
UTILITY |= {f"pra_ag_{round(100 * a)}" for a in representation.ALPHAS}
COST = ["seconds", "weights_changed", "memory"]  # of the edit; memory: bytes of the patch
AT_HAND = 250  # test images of the class, for measures that change images or train
SAMPLES = 36  # that the controls look at


class Given(NamedTuple):
    """What an audit is about.

    `x` (M, C, H, W) and `y` (M,): up to 250 test images of the class, and their labels; `beside`: images just beyond
    the class's boundary (see `robustness.over_unlearning`); `original_at`: accuracy of the original on x.
    """

    original: Observed
    target: list[int]
    train: Dataset
    x: Tensor
    y: Tensor
    beside: Tensor
    original_at: float
    seed: int


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `audit` found; ``print(report)`` shows it as text, `save` writes a page.

    Attributes
    ----------
    frame : pandas.DataFrame
        One row a model ("original", "retrain", controls and edits), one column a number. See `audit`.
    null : pandas.DataFrame
        One row a column of `frame`: mean, low, high, references. The 95 % interval for one more retrained model:
        mean -+ t sd sqrt(1 + 1 / K), t of K - 1 degrees of freedom; NaN with fewer than two references, for
        divergence, agreement and routing, which compare pairs, with fewer than three. There the K values share pairs,
        so with few references the band is too narrow.
    fooled : dict of str to list of str
        By column, the controls (and "original") that lie within the band although they did not forget.
    routing : pandas.DataFrame
        Mean probability of each class on test inputs of the forgotten class, by model.
    seconds : dict of str to float
        Time of each measure over all models; "outputs" is the passes over the data.
    notes : list of str
        Why something is missing.
    about : dict of str to str
        Classes, samples, versions, hashes.
    """

    frame: pd.DataFrame
    null: pd.DataFrame
    fooled: dict[str, list[str]]
    routing: pd.DataFrame
    seconds: dict[str, float]
    notes: list[str]
    about: dict[str, str]
    measure_of: dict[str, str]

    def tidy(self) -> pd.DataFrame:
        """One row for each model and number.

        Columns: model, measure, column, value, gap (to the mean of retrained models), null_mean, null_low, null_high,
        inside (the band; <NA> where there is none), broken, fooled_by, seconds (of the measure).
        """
        rows = []
        for model, values in self.frame.iterrows():
            for column, measure in self.measure_of.items():
                low, high, centre = self.null.loc[column, ["low", "high", "mean"]]
                value = float(values[column])
                rows.append({
                    "model": model, "measure": measure, "column": column, "value": value, "gap": value - centre,
                    "null_mean": centre, "null_low": low, "null_high": high,
                    "inside": within(value, low, high), "broken": bool(values["broken"]),
                    "fooled_by": ", ".join(self.fooled.get(column, [])), "seconds": self.seconds.get(measure, np.nan),
                })  # fmt: skip
        return pd.DataFrame(rows).astype({"inside": "boolean"})

    def save(self, path: str | Path) -> None:
        """Write one page that needs nothing else, and beside it the numbers as .csv (`tidy`) and .json.

        Raises
        ------
        ZsuError
            The path does not end in .html; a file cannot be written. What was there before stays whole.
        """
        from .page import page  # which draws

        path = Path(path)
        if path.suffix != ".html":
            raise ZsuError("the report is a page", where=str(path), remedy="end the name in .html")
        text, frame = page(self), self.tidy()
        content = {
            "about": self.about,
            "notes": self.notes,
            "seconds": self.seconds,
            "fooled": self.fooled,
            "null": json.loads(self.null.to_json(orient="index")),
            "models": json.loads(self.frame.to_json(orient="index")),
            "routing": json.loads(self.routing.to_json(orient="index")),
        }
        write_atomically(path.with_suffix(".csv"), lambda t: frame.to_csv(t, index=False))
        write_atomically(path.with_suffix(".json"), lambda t: t.write_text(json.dumps(content, indent=1)))
        write_atomically(path, lambda t: t.write_text(text, encoding="utf-8"))

    def __str__(self) -> str:
        """All numbers, one row each; * is outside the null band."""
        columns = list(self.measure_of)
        shown = pd.DataFrame(
            {m: [self.text(m, c) + "*" * (self.inside(m, c) is False) for c in columns] for m in self.frame.index}
        )
        shown.insert(2, "band", [band(*self.null.loc[c, ["low", "high"]]) for c in columns])
        shown["fooled by"] = [self.tricked(c) for c in columns]
        cost = pd.DataFrame({m: [number(c, self.frame.loc[m, c]) for c in COST] for m in self.frame.index})
        cost.insert(2, "band", "")
        shown = pd.concat([shown.set_axis(columns), cost.set_axis(COST)]).fillna("")
        spent = ", ".join(f"{m} {s:.1f}" for m, s in self.seconds.items())
        notes = "".join(f"\nn/a: {note}" for note in self.notes)
        return (
            f"{shown.to_string()}\n\n*: outside the band, the 95 % interval for one more model retrained without the "
            "class. fooled by: controls inside the band,\nwhich forgot nothing, or, zeroed, everything; not asked of "
            "numbers on the other classes. broken: Ag is less than half of the\noriginal's. JS in nats; seconds, "
            "weights_changed and memory (bytes): of the edit.\n"
            f"Seconds of the audit: {spent}.{notes}"
        )

    __repr__ = __str__

    def tricked(self, column: str) -> str:
        """The controls that a number is fooled by as text; nothing for numbers that do not ask what was forgotten."""
        return "" if column in UTILITY else ", ".join(self.fooled.get(column, [])) or "-"

    def text(self, model: str, column: str) -> str:
        """A number as text; "broken" where the model is, and the number is not about what it knows."""
        values = self.frame.loc[model]
        if values["broken"] and self.measure_of[column] != "accuracy" and column not in UTILITY:
            return "broken"
        return number(column, values[column])

    def inside(self, model: str, column: str) -> bool | None:
        """Whether a number is in the band; None for the band's own row, broken models, and without a band."""
        if model == "retrain" or self.text(model, column) == "broken":
            return None
        return within(self.frame.loc[model, column], *self.null.loc[column, ["low", "high"]])


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
    measures: Sequence[str] = tuple(MEASURES),
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
        Names in `MEASURES`. ``zsu.evaluation.BASIC``, accuracy and divergence, takes a tenth of the time of all.
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
        * ``broken``: ag_test is less than half of the original's. Such a model has not forgotten a class but lost what
          it knew; text and page show "broken" in place of what it scores.

        ``frame.attrs["null"]`` has the divergence of every pair of references on the forgotten class. The row
        "retrain" is the mean over references, each measured against the others. NaN where there is nothing to compare
        with or to fit to.

    Raises
    ------
    ZsuError
        No sample of the class, or none of another, in a data set; unknown class or measure; a name used twice; models
        that do not fit the data or each other; outputs that are not finite; a reference that predicts the class.

    Warns
    -----
    UserWarning
        The original is right on less than half of the test data: then read the numbers relative to it. Fewer than 5
        samples of the class in a split, of which no attack can learn.
    """
    target = class_indices(test, target)
    for name, dataset in (("train", train), ("test", test)):
        check_split(name, dataset, target)
    measures = [measures] if isinstance(measures, str) else list(dict.fromkeys(measures))
    unknown = [m for m in measures if m not in MEASURES]
    if unknown or not measures:
        raise ZsuError(f"no measures {unknown}", where="audit", remedy=f"use some of {', '.join(MEASURES)}")
    if not isinstance(forgotten, Mapping):
        remedy = 'pass a mapping from names to results, such as {"paths": forgotten}'
        raise ZsuError(f"the edits are a {type(forgotten).__name__}", where="audit", remedy=remedy)
    if {"original", "retrain"} & set(forgotten) or not all(isinstance(name, str) and name for name in forgotten):
        what = f"the edits are named {', '.join(map(repr, forgotten))}"
        raise ZsuError(what, where="audit", remedy="name them by strings other than 'original' and 'retrain'")
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise ZsuError(f"seed {seed!r}", where="audit", remedy="pass an integer from 0 to 2**32 - 1")
    results = {name: listed(f) for name, f in forgotten.items()}
    originals, references, notes = listed(original), listed(references), []
    for what, several in (("an original", originals), ("a reference", references)):
        for model in several:
            if not isinstance(model, nn.Module):
                raise ZsuError(f"{what} is a {type(model).__name__}", where="audit", remedy="pass an nn.Module")
    if not originals:
        raise ZsuError("no original", where="audit", remedy="pass the model before the edit")
    for name, several in results.items():
        if len(several) not in (1, len(originals)):
            what = f"{len(several)} results of {name!r} for {len(originals)} originals"
            raise ZsuError(what, where="audit", remedy="pass one, or one for each original")
        check_edits(name, several, originals)
    x, y = at_hand(test, target)
    if controls:
        made = {name: control(name, originals, x, y, target, seed, notes) for name in CONTROLS if name not in results}
        results |= {name: several for name, several in made.items() if several}
    models = {"original": originals} | {
        name: [f.model if isinstance(f, Forgotten) else f for f in several] for name, several in results.items()
    }
    many = any(m in OF_MANY for m in measures)
    depths = DEPTHS if {"probes", "prototype"} & set(measures) else 0
    steps = (2 + len(measures)) * (len(models) + len(references))
    with tqdm(total=steps, desc="audit", unit="step", disable=not progress) as bar:
        started, digest = time.perf_counter(), hashlib.sha256()
        seen = {}
        for name, several in models.items():
            seen[name] = observed(several[0], name, train, test, target, depths, x, bar, digest if not seen else None)
            if many:
                seen[name].siblings = [of_class(m, name, train, test, target) for m in several[1:]]
        retrained = [observed(m, f"reference {i}", train, test, target, depths, x, bar)
                     for i, m in enumerate(references)]  # fmt: skip
        check_models(seen, retrained)
        seconds = {"outputs": time.perf_counter() - started}
        given = about_original(seen["original"], target, train, x, y, seed, "over-unlearning" in measures)
        rows, null, measure_of = {name: {} for name in seen}, [{} for _ in retrained], {}
        for measure in measures:
            started = time.perf_counter()
            for name, m in seen.items():
                rows[name] |= MEASURES[measure](m, given, retrained)
                bar.update()
            for i, r in enumerate(retrained):
                others = retrained[:i] + retrained[i + 1 :]
                if measure in OF_MANY:
                    r, others = dataclasses.replace(r, siblings=others[1::2]), others[::2]
                null[i] |= MEASURES[measure](r, given, others)
                bar.update()
            measure_of |= dict.fromkeys([c for c in rows["original"] if c not in measure_of], measure)
            seconds[measure] = time.perf_counter() - started
    return assembled(rows, null, measure_of, seen, retrained, results, seconds, retrain_seconds, notes, target, test,
                     many, {"train and test": digest.hexdigest(), "original": model_hash(originals[0])})  # fmt: skip


def check_edits(name: str, several: list, originals: list[nn.Module]) -> None:
    """Each is a model or a `Forgotten`; of several each was made of the original at the same place."""
    for i, edit in enumerate(several):
        if not isinstance(edit, (Forgotten, nn.Module)):
            remedy = "pass what zsu.forget returns, or a model"
            raise ZsuError(f"{name!r} is a {type(edit).__name__}", where="audit", remedy=remedy)
        parent = edit.patch.metadata.get("parent") if isinstance(edit, Forgotten) and len(several) > 1 else None
        if parent is not None and parent != model_hash(originals[i]):
            what = f"result {i} of {name!r} was made of another model than original {i}"
            raise ZsuError(what, where="audit", remedy="pass results in the order of the originals")


def listed(value) -> list:
    """A sequence as a list, one thing as a list of it; a `Forgotten`, which is a tuple, is one thing."""
    return list(value) if isinstance(value, (list, tuple)) and not isinstance(value, Forgotten) else [value]


def check_split(name: str, dataset: Dataset, target: list[int]) -> None:
    """`ZsuError` with the number of samples of each class where the class, or all the others, have none."""
    found = len(members(dataset, target))
    named = ", ".join(repr(classes(dataset)[c]) for c in target)
    if found in (0, len(dataset)):
        raise ZsuError(
            f"the {name} data holds {histogram(dataset)}",
            where="audit",
            remedy=f"pass data with samples of class {named} and of others",
        )
    if found < privacy.FEW:
        what = f"only {found} {name} samples of class {named}: attacks that learn of them are n/a"
        warn(what)


def members(dataset: Dataset, target: list[int]) -> list[int]:
    """Indices of the samples of the classes."""
    return torch.isin(targets(dataset), torch.tensor(target)).nonzero()[:, 0].tolist()  # (M, 1) -> (M,)


def at_hand(test: Dataset, target: list[int]) -> tuple[Tensor, Tensor]:
    """Up to 250 test images (M, C, H, W) of the forgotten classes, evenly drawn from them, and labels (M,)."""
    indices = members(test, target)
    parts = list(batches(Subset(test, indices[:: -(-len(indices) // AT_HAND)])))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def control(
    name: str, originals: list[nn.Module], x: Tensor, y: Tensor, target: list[int], seed: int, notes: list[str]
) -> list[Forgotten | nn.Module]:
    """The trivial edit of each original; nothing, and a note, where a model does not allow it."""
    by_class = [x[y == c][:SAMPLES] for c in target if (y == c).any()]
    edits = []
    for model in originals:
        samples = [placed(s, model) for s in by_class]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of samples that the original does not recognise
                single = len(target) == 1
                edits.append(forget(model, samples[0] if single else samples, target[0] if single else target, name,
                                    seed=seed))  # fmt: skip
        except (ZsuError, IndexError) as error:
            notes.append(f"control {name!r}: {error}")
            return []
    return edits


def observed(
    model: nn.Module, name: str, train: Dataset, test: Dataset, target: list[int], depths: int, x: Tensor, bar: tqdm,
    digest=None,
) -> Observed:  # fmt: skip
    """A model with its outputs on both splits; one pass each."""
    splits = []
    for dataset in (train, test):
        splits.append(observe(model, dataset, target, depths, name, digest))
        bar.update()
    return Observed(model, *splits, head=logit_layer(model, x[:2]))


def of_class(model: nn.Module, name: str, train: Dataset, test: Dataset, target: list[int]) -> Observed:
    """A sibling, on the samples of the class only."""
    parts = [Subset(split, members(split, target)) for split in (train, test)]
    return Observed(model, *(observe(model, part, target, name=name) for part in parts))


def check_models(seen: dict[str, Observed], retrained: list[Observed]) -> None:
    """All models have as many classes; no reference predicts the class."""
    references = {f"reference {i}": r for i, r in enumerate(retrained)}
    shape = seen["original"].test.logits.shape
    for name, m in (seen | references).items():
        if m.test.logits.shape != shape:
            what = f"outputs of shape {tuple(m.test.logits.shape)} of {name!r}, of shape {tuple(shape)} of the original"
            raise ZsuError(what, where="audit", remedy="compare models with the same classes")
    for name, r in references.items():
        known = utility.accuracy(*r.test.part(True))
        if known >= 1 / shape[1]:
            what = f"{name!r} predicts the forgotten class on {known:.0%} of its test images"
            raise ZsuError(what, where="audit", remedy="pass models that were trained without the class")


def about_original(
    original: Observed, target: list[int], train: Dataset, x: Tensor, y: Tensor, seed: int, walk: bool
) -> Given:
    """What the measures share."""
    given = Given(original, target, train, x, y, x[:0], 0.0, seed)
    given = given._replace(original_at=representation.at_on(original.model, given))
    return given._replace(beside=robustness.beside(original.model, x, y)) if walk else given


def assembled(
    rows: dict, null: list[dict], measure_of: dict, seen: dict, retrained: list, results: dict, seconds: dict,
    retrain_seconds: float | None, notes: list[str], target: list[int], test: Dataset, many: bool, hashes: dict,
) -> Report:  # fmt: skip
    """The numbers as a `Report`."""
    bands = pd.DataFrame(
        [interval([n.get(c, np.nan) for n in null], 3 if m in OF_PAIRS else 2) for c, m in measure_of.items()],
        index=list(measure_of),
    )
    rows = {"original": rows.pop("original"), "retrain": bands["mean"].to_dict(), **rows}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "model"
    for new, old in (("js_forget_ratio", "js_forget"), ("anamnesis", "relearn")):
        if old in frame:
            centre = frame.loc["retrain", old] or np.nan
            frame.insert(frame.columns.get_loc(old) + (2 if old == "js_forget" else 1), new, frame[old] / centre)
            bands.loc[new] = [*(bands.loc[old, ["mean", "low", "high"]] / centre), bands.loc[old, "references"]]
            measure_of[new] = measure_of[old]
    if "ag_test" in frame:
        before = frame.loc["original"]
        if before["all_test"] < 0.5:
            warn(f"the original is right on {before['all_test']:.0%} of the test data only")
        frame.insert(frame.columns.get_loc("all_train") + 1, "ag_drop", before["ag_test"] - frame["ag_test"])
        bands.loc["ag_drop"] = interval([before["ag_test"] - n["ag_test"] for n in null])
        measure_of["ag_drop"] = "accuracy"
    measure_of = {c: measure_of[c] for c in frame.columns}
    ag = {name: utility.accuracy(*m.test.part(False)) for name, m in seen.items()}
    frame["broken"] = [ag.get(name, ag["original"]) < ag["original"] / 2 for name in frame.index]
    edits = {name: several[0].patch for name, several in results.items() if isinstance(several[0], Forgotten)}
    times = {name: float(p.metadata.get("seconds", "nan")) for name, p in edits.items()} | {"retrain": retrain_seconds}
    frame["seconds"] = frame.index.map(times).astype(float)
    frame["weights_changed"] = frame.index.map({n: p.weights_changed for n, p in edits.items()}).astype(float)
    frame["memory"] = frame.index.map({n: p.nbytes for n, p in edits.items()}).astype(float)
    pairs = [(a.test.part(True)[0], b.test.part(True)[0]) for i, a in enumerate(retrained) for b in retrained[:i]]
    frame.attrs["null"] = [jensen_shannon(a, b) for a, b in pairs]
    notes = notes + missing(seen["original"], retrained, many)
    about = described(seen["original"], retrained, [classes(test)[c] for c in target], hashes, edits)
    routing = routes(seen, retrained, classes(test)).reindex([m for m in frame.index if m in seen or retrained])
    return Report(frame, bands, fooled(frame, bands, measure_of), routing, seconds, notes, about, measure_of)


def missing(original: Observed, retrained: list[Observed], many: bool) -> list[str]:
    """Why some numbers or bands are missing, or worth little."""
    notes = []
    if len(retrained) < 2:
        notes.append("one retrained model has no band" if retrained else "no models retrained without the class")
    if len(retrained) == 2:
        notes.append("two retrained models are one pair: no band of divergence, agreement and routing")
    if many and 0 < len(retrained) < 6:
        notes.append("the bands of ulira and klom need 6 retrained models, half of which stand for unlearned ones")
    ag, *others = (utility.accuracy(*m.test.part(False)) for m in (original, *retrained))
    if others and mean(others) < ag - 0.05:
        notes.append(
            "the retrained models are worse on the other classes than the original by over 5 points: train more"
        )
    if many and len(original.siblings) < 2:
        notes.append("ulira and klom need several originals, and for each edit as many results")
    return notes


def routes(seen: dict[str, Observed], retrained: list[Observed], names: list[str]) -> pd.DataFrame:
    """Mean probability of each class on test inputs of the forgotten class, by model."""
    means = {name: m.test.part(True)[0].mean(0) for name, m in seen.items()}  # (N, classes) -> (classes,)
    if retrained:
        means["retrain"] = torch.stack([r.test.part(True)[0].mean(0) for r in retrained]).mean(0)
    number = len(means["original"])
    return pd.DataFrame({name: p.tolist() for name, p in means.items()}, index=names[:number]).T


def described(
    original: Observed, retrained: list[Observed], forgotten: list[str], hashes: dict[str, str], edits: dict[str, Patch]
) -> dict[str, str]:
    """Classes, samples, hashes and versions."""
    images = {
        f"{split} images": f"{int(o.forget.sum())} of the class, {int((~o.forget).sum())} others"
        for split, o in (("test", original.test), ("train", original.train))
    }
    return {
        "class": ", ".join(forgotten),
        **images,
        "references": str(len(retrained)),
        **{f"sha256 of {what}": value for what, value in hashes.items()},
        **{f"patch {name}, parent": p.metadata.get("parent", "") for name, p in edits.items()},
        "versions": f"zsu {version('zsu')}, torch {torch.__version__}, scikit-learn {sklearn.__version__}, "
        f"Python {platform.python_version()}",
    }


def interval(values: list[float], least: int = 2) -> dict[str, float]:
    """Mean, and the 95 % interval for one more value, mean -+ t sd sqrt(1 + 1 / K), of at least so many values."""
    known = [v for v in values if not np.isnan(v)]
    found = {"mean": mean(known), "low": np.nan, "high": np.nan, "references": len(known)}
    if len(known) >= least:
        half = stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) * np.sqrt(1 + 1 / len(known))
        found |= {"low": found["mean"] - half, "high": found["mean"] + half}
    return found


def within(value: float, low: float, high: float) -> bool | None:
    """Whether a number lies in the band, up to rounding; None where there is none."""
    return None if np.isnan([value, low, high]).any() else bool(low - 1e-9 <= value <= high + 1e-9)


def fooled(frame: pd.DataFrame, bands: pd.DataFrame, measure_of: dict[str, str]) -> dict[str, list[str]]:
    """By column that should tell forgetting: the rows that forgot nothing, or everything, and lie in the band."""
    found = {}
    for column in measure_of:
        low, high = bands.loc[column, ["low", "high"]]
        if column in UTILITY:
            continue
        rows = [name for name in ("original", *CONTROLS) if name in frame.index]
        inside = [name for name in rows if within(frame.loc[name, column], low, high)]
        if inside:
            found[column] = inside
    return found


def number(column: str, value: float) -> str:
    """As text, without a sign of what rounds to zero; n/a for NaN."""
    if np.isnan(value):
        return "n/a"
    digits = 0 if column in ("weights_changed", "memory", "relearn") else 3
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def band(low: float, high: float) -> str:
    """As text; n/a for NaN."""
    return "n/a" if np.isnan(low) else f"{low:.3f}..{high:.3f}"
