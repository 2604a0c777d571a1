"""bench(): methods x classes x seeds in one table, beside models retrained without each class; and what it says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import ZsuError
from ..evaluation import BASIC
from ..files import write_atomically
from .sweep import run

FILE = "scoreboard.csv"
SHIPPED = Path(__file__).parents[1] / "assets" / "scoreboard"


def bench(
    folder: str | Path,
    dataset: str = "fashion-mini",
    root: str = "data",
    classes: Sequence[int | str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    **options,
) -> pd.DataFrame:
    """`zsu.sweep.run` with accuracy, divergence and cost only, one task after the other, so that times can be compared.

    The table also goes into ``scoreboard.csv`` in the folder. Parameters, the `options` among them (methods, samples,
    references, epochs, progress), columns and errors are the same.
    """
    board = run(folder, dataset, root, classes, seeds, measures=BASIC, controls=False, jobs=1, **options)
    write_atomically(Path(folder) / FILE, lambda temporary: board.to_csv(temporary, index=False))
    return board


def load(dataset: str = "fashion-mini") -> pd.DataFrame:
    """The table of `bench` that ships: 10 classes, all methods.

    Parameters
    ----------
    dataset : {"fashion-mini", "fashion-mnist"}
        12,000 training images, three seeds, three references a class; or 60,000, one seed, two references.

    Raises
    ------
    ZsuError
        Another data set.
    """
    known = sorted(file.stem for file in SHIPPED.glob("*.csv"))
    if dataset not in known:
        remedy = f"use one of {', '.join(known)}, or make a table with zsu.scoreboard.bench"
        raise ZsuError(f"no table of {dataset!r} ships", where="scoreboard.load", remedy=remedy)
    return pd.read_csv(SHIPPED / f"{dataset}.csv")


def summary(board: pd.DataFrame) -> pd.DataFrame:
    """One row a method, over all classes and seeds of a table of `bench`.

    Columns: tier; at and at_worst (%, test); ag_drop and ag_drop_worst (points, from the original); ag_gap (points, to
    retrain); js (mean, nats), js_ratio (mean js by mean null), js_mask_worst (the largest ratio of a class's js to the
    mask's, seeds averaged; NaN without the mask), in_null (share of cases within the null band); seconds (median);
    faster (than one retraining); weights (%, the largest); broken (share of cases).
    """
    by = ["class", "seed"]
    columns = ("at_test", "ag_test", "js_forget", "seconds")
    at, ag, js, seconds = (board.pivot(index=by, columns="method", values=c) for c in columns)
    band = board[board["method"] == "retrain"].set_index(by)[["null_low", "null_high"]]
    rows = {}
    for method in board["method"].unique():
        own = board[board["method"] == method]
        cases = own.set_index(by).index  # a method may have been added for some classes only
        drop = 100 * (ag["original"] - ag[method])
        within = (js[method].ge(band["null_low"]) & js[method].le(band["null_high"]))[cases]
        banded = (band["null_low"] < band["null_high"]).any()  # not with two references, which are one pair
        by_class = js.loc[cases].groupby("class").mean()
        rows[method] = {
            "tier": own["tier"].iloc[0],
            "at": 100 * at[method].mean(),
            "at_worst": 100 * at[method].max(),
            "ag_drop": drop.mean(),
            "ag_drop_worst": drop.max(),
            "ag_gap": 100 * (ag[method] - ag["retrain"]).mean(),
            "js": js[method].mean(),
            "js_ratio": js[method].mean() / js.loc[cases, "retrain"].mean(),
            "js_mask_worst": (by_class[method] / by_class["mask"]).max() if "mask" in js else np.nan,
            "in_null": within.mean() if banded else np.nan,
            "seconds": own["seconds"].median(),
            "faster": seconds.loc[cases, "retrain"].median() / own["seconds"].median(),
            "weights": 100 * (own["weights_changed"] / own["weights"]).max(),
            "broken": own["broken"].astype(bool).mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").sort_values("js", kind="stable")


def as_text(board: pd.DataFrame) -> str:
    """`summary` as text, with what its columns mean."""
    frame = summary(board)
    broken = frame.pop("broken") > 0.5
    shapes = {"js": "{:.4f}", "seconds": "{:.3f}", "weights": "{:.2f}", "faster": "{:,.0f}", "in_null": "{:.2f}"}
    text = frame.astype(object)
    for column in frame.columns.drop("tier"):
        shape = shapes.get(column, "{:.2f}")
        text[column] = [("n/a" if np.isnan(v) else shape.format(v)) for v in frame[column]]
    text.loc[broken, ["js", "js_ratio", "js_mask_worst", "in_null"]] = "broken"
    null = board.loc[board["method"] == "retrain", "js_forget"]
    return (
        f"{text.to_string()}\n\n"
        f"{board['class'].nunique()} classes, {board['seed'].nunique()} seeds; at, ag in % and points, on test images; "
        f"js: divergence from retrained models on the class, nats; js_ratio: to the null, {null.mean():.4f};\n"
        "js_mask_worst: of any class, to the mask's; in_null: share of cases inside the null band; faster: than one "
        "retraining; weights: % changed at most."
    )
