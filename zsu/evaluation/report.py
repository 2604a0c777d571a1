"""audit(): one row a model, and the same for the models retrained without the class."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data import class_index, classes, histogram, targets
from ..errors import ZsuError
from ..forgetting import Forgotten
from .utility import accuracy, jensen_shannon, predict


def audit(
    original: nn.Module,
    forgotten: Mapping[str, Forgotten | nn.Module],
    train: Dataset,
    test: Dataset,
    target: int | str | Sequence[int | str],
    references: Sequence[nn.Module] = (),
    *,
    retrain_seconds: float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What was forgotten, and at what price, beside models retrained without the class.

    Parameters
    ----------
    original : nn.Module
        The model before.
    forgotten : mapping of str to Forgotten or nn.Module
        Edited models by the name of their row, controls among them.
    train, test : Dataset
        Train and test data. Leave the samples that the edit saw out of `test` (`zsu.data.without_samples`).
    target : int or str, or a list of them
        The class forgotten, by index or name, or several that were forgotten together: At is then over all of them.
    references : sequence of nn.Module
        Models retrained from scratch without the class, under different seeds.
    retrain_seconds : float, optional
        Time of one retraining, for the row "retrain".
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        Rows "original", "retrain" (mean of the references) and those of `forgotten`; columns

        * ``at_test, ag_test, all_test, at_train, ag_train, all_train``: accuracy on the forgotten class, on all others,
          and on everything. Ideal: as "retrain". Blind spot: a constant for the class's logit reaches it too.
        * ``ag_drop``: of ag_test from that of the original.
        * ``js_forget, js_retained``: mean Jensen-Shannon divergence (nats) of the test outputs to those of each
          reference, on the forgotten class and on the others. In the row "retrain": the mean over pairs of
          references, the *null* that no model should be expected to beat.
        * ``js_forget_ratio``: js_forget divided by the null.
        * ``seconds, weights_changed``: of the edit.
        * ``broken``: ag_test is less than half of the original's. Such a model has not forgotten a class but lost what
          it knew, and `table` shows no divergence for it.

        ``frame.attrs["null"]`` has the divergence of every pair of references on the forgotten class. NaN where there
        is nothing to compare with: without references, or with one only for the null.

    Raises
    ------
    ZsuError
        No sample of the class, or none of another, in a data set; unknown class; a name used twice; a model that
        does not fit the data.

    Warns
    -----
    UserWarning
        The original is right on less than half of the test data: then read the numbers relative to it.
    """
    named = [target] if isinstance(target, (int, np.integer, str)) else target
    target = [class_index(test, c) for c in named]
    for name, dataset in (("train", train), ("test", test)):
        check_split(name, dataset, target)
    if {"original", "retrain"} & set(forgotten):
        raise ZsuError("'original' and 'retrain' are rows of the table already", where="audit", remedy="rename")
    models = {"original": original} | {
        name: f.model if isinstance(f, Forgotten) else f for name, f in forgotten.items()
    }
    bar = tqdm(total=2 * (len(models) + len(references)), desc="audit", unit="model", disable=not progress)
    with bar:
        at_test = [outputs(m, test, target, bar) for m in references]
        at_train = [outputs(m, train, target, bar) for m in references]
        rows = {"original": {}, "retrain": {}}
        for name, model in models.items():
            p = outputs(model, test, target, bar)
            rows[name] = utility([p], [outputs(model, train, target, bar)])
            for part in ("forget", "retained"):
                divergences = [jensen_shannon(p[part][0], r[part][0]) for r in at_test]
                rows[name][f"js_{part}"] = mean(divergences)
    rows["retrain"] = utility(at_test, at_train)
    null = {
        part: [jensen_shannon(a[part][0], b[part][0]) for a, b in itertools.combinations(at_test, 2)]
        for part in ("forget", "retained")
    }
    rows["retrain"] |= {f"js_{part}": mean(values) for part, values in null.items()}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "model"
    frame.attrs["null"] = null["forget"]
    before = frame.loc["original"]
    if before["all_test"] < 0.5:
        warnings.warn(f"the original is right on {before['all_test']:.0%} of the test data only", stacklevel=2)
    frame.insert(6, "ag_drop", before["ag_test"] - frame["ag_test"])
    frame["js_forget_ratio"] = frame["js_forget"] / frame.loc["retrain", "js_forget"]
    patches = {name: f.patch for name, f in forgotten.items() if isinstance(f, Forgotten)}
    seconds = {name: float(p.metadata.get("seconds", "nan")) for name, p in patches.items()} | {
        "retrain": retrain_seconds
    }
    frame["seconds"] = frame.index.map(seconds).astype(float)
    frame["weights_changed"] = frame.index.map({n: p.weights_changed for n, p in patches.items()}).astype(float)
    frame["broken"] = frame["ag_test"] < before["ag_test"] / 2
    return frame


def check_split(name: str, dataset: Dataset, target: list[int]) -> None:
    """`ZsuError` with the number of samples of each class where the class, or all the others, have none."""
    forget = torch.isin(targets(dataset), torch.tensor(target))
    if not forget.any() or forget.all():
        named = ", ".join(repr(classes(dataset)[c]) for c in target)
        raise ZsuError(
            f"the {name} data holds {histogram(dataset)}",
            where="audit",
            remedy=f"pass data with samples of class {named} and of others",
        )


def outputs(model: nn.Module, dataset: Dataset, target: list[int], bar: tqdm) -> dict[str, tuple[Tensor, Tensor]]:
    """(softmax outputs, labels) of the forgotten class, of the others, and of all."""
    p, y = predict(model, dataset)
    bar.update()
    forget = torch.isin(y, torch.tensor(target))
    return {"forget": (p[forget], y[forget]), "retained": (p[~forget], y[~forget]), "all": (p, y)}


def utility(test: list[dict], train: list[dict]) -> dict[str, float]:
    """Accuracy on the class, on the others and on both, on test and train, the mean over models."""
    return {
        f"{short}_{split}": mean([accuracy(*o[part]) for o in runs])
        for split, runs in (("test", test), ("train", train))
        for short, part in (("at", "forget"), ("ag", "retained"), ("all", "all"))
    }


def mean(values: list[float]) -> float:
    """Mean; NaN of nothing."""
    return float(np.mean(values)) if values else float("nan")


def table(frame: pd.DataFrame) -> str:
    """The audit as plain text: n/a for what could not be compared, the null below."""
    shown = frame.drop(columns=["broken", "ag_drop"]).rename(columns=lambda c: c.replace("_", " ")).astype(object)
    for column in shown:
        shape = "{:,.0f}" if column == "weights changed" else "{:.3f}"
        shown[column] = [("n/a" if np.isnan(v) else shape.format(v)) for v in shown[column].astype(float)]
    shown.loc[frame["broken"], [c for c in shown if c.startswith("js")]] = "broken"
    text = shown.to_string(index_names=False)
    null = frame.loc["retrain", "js_forget"]
    note = "n/a: needs two models retrained without the class" if np.isnan(null) else f"{null:.3f} nats"
    return (
        f"{text}\n\nAt, Ag, all: accuracy on the forgotten class, on the others, on both. "
        f"JS: divergence from retrained models, in nats; ratio: to the null. seconds: of the edit.\n"
        f"Null (retrain against retrain) on the forgotten class: {note}."
    )
