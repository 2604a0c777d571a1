"""The page of a report, which needs nothing else: from frames and strings to HTML, with figures as data."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
from matplotlib import pyplot as plt

from .. import plots

STYLE = """
:root { color-scheme: light dark; --line: #8888; --inside: #1a7f37; --outside: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --inside: #5bd07d; --outside: #ff8a80; } }
body { background: Canvas; color: CanvasText; font: 1rem/1.5 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th[scope=row], td.text, th.text { text-align: left; }
th[scope=row] { position: sticky; left: 0; background: Canvas; }
small { display: block; }
.in { color: var(--inside); } .out { color: var(--outside); }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
dt { font-weight: 600; margin-top: 1rem; } dd { margin: 0; white-space: pre-line; overflow-wrap: anywhere; }
a { color: inherit; } td.hash { white-space: normal; overflow-wrap: anywhere; }
"""


def page(
    title: str, notes: Sequence[str], numbers: str, figures: str, definitions: str, about: Mapping[str, str]
) -> str:
    """The whole page; numbers, figures and definitions as HTML, all else as text."""
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    facts = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td class="text hash">{escape(v)}</td></tr>' for k, v in about.items()
    )
    title = escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>Every number is to be read as its gap to models that were retrained without the class. The <em>band</em> is where one
more such model would lie, with 95 % confidence. <span class="in">In</span>: inside the band.
<span class="out">Out</span>: outside, on whichever side: the difference is visible. <em>Fooled by</em>: trivial edits
that lie in the band although they forgot nothing (or, zeroed, everything); such a number alone proves little.
<em>Broken</em>: the model lost what it knew of the other classes, and its other numbers mean nothing.
A number inside the band is no proof that the class is forgotten.</p>
{"<h2>Missing</h2><ul>" + listed + "</ul>" if notes else ""}
<h2>Numbers</h2>
<p>Names lead to their definitions. The table scrolls sideways.</p>
{numbers}
<h2>Figures</h2>
{figures}
<h2>Definitions</h2>
<dl>{definitions}</dl>
<h2>About this audit</h2>
<div class="wide" tabindex="0" role="region" aria-label="About this audit"><table>
<caption>Data, models, versions</caption><tbody>{facts}</tbody></table></div>
</main>
</body>
</html>
"""


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


@plt.rc_context({"text.parse_math": False})  # a model may be called "$x"
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
