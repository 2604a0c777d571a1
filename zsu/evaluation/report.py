"""The Report of an audit: its numbers as frames, as text, and as a page."""

import functools
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import ZsuError
from ..files import write_atomically
from .measures import CONTROLS, MEASURES, UTILITY

COST = ["seconds", "weights_changed", "memory"]  # of the edit; memory: bytes of the patch


@dataclass(frozen=True, repr=False)
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
    pairs : list of float
        ``js_forget`` between every two references.
    routing : pandas.DataFrame
        Mean probability of each class on test inputs of the forgotten class, by model.
    seconds : dict of str to float
        Time of each measure over all models; "outputs" is the passes over the data.
    notes : list of str
        Why something is missing.
    about : dict of str to str
        Classes, samples, versions, hashes.
    measure_of : dict of str to str
        By column of `frame`, the measure that it comes from.
    """

    frame: pd.DataFrame
    null: pd.DataFrame
    pairs: list[float]
    routing: pd.DataFrame
    seconds: dict[str, float]
    notes: list[str]
    about: dict[str, str]
    measure_of: dict[str, str]

    @functools.cached_property
    def fooled(self) -> dict[str, list[str]]:
        """By column, the controls (and "original") that lie within the band although they did not forget."""
        rows = [name for name in ("original", *CONTROLS) if name in self.frame.index]
        found = {c: [name for name in rows if self.is_within(name, c)] for c in self.measure_of if c not in UTILITY}
        return {c: names for c, names in found.items() if names}

    def tidy(self) -> pd.DataFrame:
        """One row for each model and number.

        Columns: model, measure, column, value, gap (to the mean of retrained models), null_mean, null_low, null_high,
        inside (the band; <NA> where there is none), broken (the model is), void (the number says nothing, as the model
        is broken), fooled_by, seconds (of the measure).
        """
        rows, null = [], self.null.to_dict("index")
        for model, values in self.frame.iterrows():
            for column, measure in self.measure_of.items():
                value, band = float(values[column]), null[column]
                rows.append({
                    "model": model, "measure": measure, "column": column, "value": value, "gap": value - band["mean"],
                    "null_mean": band["mean"], "null_low": band["low"], "null_high": band["high"],
                    "inside": self.is_within(model, column), "broken": bool(values["broken"]),
                    "void": self.is_void(model, column), "fooled_by": ", ".join(self.fooled.get(column, [])),
                    "seconds": self.seconds.get(measure, np.nan),
                })  # fmt: skip
        return pd.DataFrame(rows).astype({"inside": "boolean"})

    def save(self, path: str | Path) -> None:
        """Write one page that needs nothing else, and beside it the numbers as .csv (`tidy`) and .json.

        Raises
        ------
        ZsuError
            The path does not end in .html; a file cannot be written. What was there before stays whole.
        """
        from . import page  # which draws

        path = Path(path)
        if path.suffix != ".html":
            raise ZsuError("the report is a page", where=str(path), remedy="end the name in .html")
        tidy = self.tidy()
        text = page.page(
            f"Audit: forgetting {self.about['class']}",
            self.notes,
            page.table(number_texts(self), gap_texts(self), margin_texts(self), self.measure_of),
            page.figures(self.frame, tidy, self.routing),
            page.definitions(self.measure_of, {name: inspect.getdoc(m) or "" for name, m in MEASURES.items()}),
            self.about,
        )
        content = {"about": self.about, "notes": self.notes, "seconds": self.seconds, "fooled": self.fooled}
        for name, frame in (("null", self.null), ("models", self.frame), ("routing", self.routing)):
            content[name] = json.loads(frame.to_json(orient="index"))
        write_atomically(path, lambda t: t.write_text(text, encoding="utf-8"))
        write_atomically(path.with_suffix(".csv"), lambda t: tidy.to_csv(t, index=False))
        write_atomically(path.with_suffix(".json"), lambda t: t.write_text(json.dumps(content, indent=1)))

    def __str__(self) -> str:
        """All numbers, one row each; * is outside the null band."""
        shown, margin = number_texts(self), margin_texts(self)
        outside = gap_texts(self).map(lambda gap: "*" * gap.endswith("out"))
        shown.loc[outside.index] += outside
        columns = [shown.iloc[:, :2], margin["band"], shown.iloc[:, 2:], margin["fooled by"]]
        shown = pd.concat(columns, axis=1).fillna("")
        spent = ", ".join(f"{m} {s:.1f}" for m, s in self.seconds.items())
        notes = "".join(f"\nn/a: {note}" for note in self.notes)
        return (
            f"{shown.to_string()}\n\n*: outside the band, the 95 % interval for one more model retrained without the "
            "class. fooled by: controls inside the band,\nwhich forgot nothing, or, zeroed, everything; not asked of "
            "numbers on the other classes. broken: of what the original's Ag is\nabove chance less than "
            "half is left. JS in nats; seconds, weights_changed and memory (bytes): of the edit.\n"
            f"Seconds of the audit: {spent}.{notes}"
        )

    __repr__ = __str__

    def text(self, model: str, column: str) -> str:
        """A number as text; "broken" where the model is, and the number is not about what it knows."""
        return "broken" if self.is_void(model, column) else number_text(column, self.frame.at[model, column])

    def inside(self, model: str, column: str) -> bool | None:
        """Whether a number is in the band; None for the band's own row, broken models, and without a band."""
        return None if model == "retrain" or self.is_void(model, column) else self.is_within(model, column)

    def is_void(self, model: str, column: str) -> bool:
        """Whether a number says nothing, as the model is broken, and the number is not about what it knows."""
        known = self.measure_of[column] == "accuracy" or column in UTILITY
        return bool(self.frame.at[model, "broken"]) and not known

    def is_within(self, model: str, column: str) -> bool | None:
        """Whether a number, of whatever model, lies in the band, up to rounding; None where there is none."""
        value, low, high = self.frame.at[model, column], self.null.at[column, "low"], self.null.at[column, "high"]
        return None if np.isnan([value, low, high]).any() else bool(low - 1e-9 <= value <= high + 1e-9)


def number_texts(report: Report) -> pd.DataFrame:
    """All numbers, one row each, and what the edits cost, of every model."""
    columns = {
        model: [report.text(model, c) for c in report.measure_of] + [number_text(c, values[c]) for c in COST]
        for model, values in report.frame.iterrows()
    }
    return pd.DataFrame(columns, index=[*report.measure_of, *COST])


def gap_texts(report: Report) -> pd.DataFrame:
    """Gaps to the mean of retrained models, with "in" or "out" of the band; nothing where nobody asks."""
    found: dict[str, list[str]] = {model: [] for model in report.frame.index}
    for model, texts in found.items():
        for c in report.measure_of:
            gap, inside = report.frame.at[model, c] - report.null.at[c, "mean"], report.inside(model, c)
            text = f"{'+' if gap > 0 else ''}{number_text(c, gap)} {'in' if inside else 'out'}"
            texts.append("" if inside is None else text)
    return pd.DataFrame(found, index=list(report.measure_of))


def margin_texts(report: Report) -> pd.DataFrame:
    """What stands beside each number: its band, what it is fooled by, and the seconds of its measure."""
    rows = {}
    for c, measure in report.measure_of.items():
        low, high = report.null.loc[c, ["low", "high"]]
        rows[c] = {
            "band": "n/a" if np.isnan(low) else f"{low:.3f}..{high:.3f}",
            "fooled by": "" if c in UTILITY else ", ".join(report.fooled.get(c, [])) or "-",
            "seconds of the measure": number_text("s", report.seconds.get(measure, np.nan)),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def number_text(column: str, value: float) -> str:
    """Without a sign of what rounds to zero; n/a for NaN."""
    if np.isnan(value):
        return "n/a"
    digits = 0 if column in ("weights_changed", "memory", "relearn") else 3
    return f"{round(value, digits) + 0.0:,.{digits}f}"
