"""The page of a report, which needs nothing else: from frames and strings to HTML, with figures as data."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import pandas as pd

from .. import plots

TEMPLATE = Path(__file__).parents[1] / "assets" / "page.html"


def page(
    title: str, notes: Sequence[str], numbers: str, figures: str, definitions: str, about: Mapping[str, str]
) -> str:
    """The whole page; numbers, figures and definitions as HTML, all else as text."""
    missing = "".join(f"<li>{escape(note)}</li>" for note in notes)
    facts = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td class="text hash">{escape(v)}</td></tr>' for k, v in about.items()
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), missing=missing and f"<h2>Missing</h2><ul>{missing}</ul>", numbers=numbers,
        figures=figures, definitions=definitions, facts=facts,
    )  # fmt: skip


def table(texts: pd.DataFrame, gaps: pd.DataFrame, margin: pd.DataFrame, measure_of: Mapping[str, str]) -> str:
    """All numbers, one row each: the models' texts with the gaps below, a link to the definition, and the margin.

    What has no measure, the cost of the edits, has no gaps, no link and no margin.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in texts)
    rows = []
    for c, values in texts.iterrows():
        name, below, end = c, [""] * len(values), "<td></td>" * 3
        if c in measure_of:
            name = f'<a href="#{anchor(measure_of[c])}">{escape(c)}</a>'
            below = [g and f'<small class="{g.split()[-1]}">{g}</small>' for g in gaps.loc[c]]
            band, fooled, spent = margin.loc[c]
            end = f'<td>{band}</td><td class="text">{escape(fooled)}</td><td>{spent}</td>'
        cells = "".join(f"<td>{text}{gap}</td>" for text, gap in zip(values, below, strict=True))
        rows.append(f'<tr><th scope="row">{name}</th>{cells}{end}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Numbers"><table><caption>Value; below, the gap to '
        'the mean of retrained models</caption><thead><tr><th scope="col" class="text">number</th>'
        f'{head}<th scope="col">band</th><th scope="col" class="text">fooled by</th><th scope="col">seconds of the '
        f"measure</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def figures(frame: pd.DataFrame, tidy: pd.DataFrame, routing: pd.DataFrame) -> str:
    """The drawings, each with a text that says what is seen; frames as a `Report` has them."""
    drawn = []
    if {"at_test", "js_forget"} <= set(frame):
        seen = "; ".join(f"{m} At {v.at_test:.1%}, Ag {v.ag_test:.1%}" for m, v in frame.iterrows())
        drawn.append((plots.audit(frame), f"Bars by model. {seen}.", "Accuracy and divergence on test images."))
    if (tidy["null_high"] - tidy["null_low"] > 1e-9).any():
        outside = tidy["inside"].eq(False) & ~tidy["void"]
        seen = "; ".join(f"{m} {outside[tidy['model'] == m].sum()}" for m in frame.index if m != "retrain")
        drawn.append((
            plots.gaps(tidy),
            f"Dots by number and model, in half-widths of the band. Numbers outside the band: {seen}.",
            "Gap to the mean of retrained models, in half-widths of the band; within -1 and 1 is inside. Dots at the "
            "edge are farther out. Numbers whose band has no width, and broken models, are left out.",
        ))  # fmt: skip
    seen = "; ".join(f"{m} mostly {p.idxmax()} ({p.max():.0%})" for m, p in routing.iterrows())
    drawn.append((plots.routing(routing), f"Table of shades. {seen}.", "Where test images of the class go."))
    return "".join(
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,'
        f'{b64encode(plots.png(figure, dpi=120)).decode()}"><figcaption>{escape(caption)}</figcaption></figure>'
        for figure, alt, caption in drawn
    )


def definitions(measure_of: Mapping[str, str], texts: Mapping[str, str]) -> str:
    """Of each measure its columns, and the text that defines it."""
    parts = []
    for name in dict.fromkeys(measure_of.values()):
        columns = ", ".join(c for c, m in measure_of.items() if m == name)
        about = f"{escape(name)} ({escape(columns)})</dt><dd>{escape(texts[name])}"
        parts.append(f'<dt id="{anchor(name)}">{about}</dd>')
    return "".join(parts)


def anchor(measure: str) -> str:
    """The place in the page that defines a measure."""
    return "measure-" + measure.replace(" ", "-")
