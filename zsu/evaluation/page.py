"""The report as one page that needs nothing else: tables, figures, definitions, versions, hashes."""

from __future__ import annotations

import inspect
from base64 import b64encode
from html import escape

import numpy as np
from matplotlib import pyplot as plt

from .. import plots
from .report import COST, MEASURES, Report, band, number

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


def page(report: Report) -> str:
    """HTML, with figures as data."""
    about = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td class="text hash">{escape(v)}</td></tr>'
        for k, v in report.about.items()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    title = f"Audit: forgetting {escape(report.about['class'])}"
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
{"<h2>Missing</h2><ul>" + notes + "</ul>" if notes else ""}
<h2>Numbers</h2>
<p>Names lead to their definitions. The table scrolls sideways.</p>
{table(report)}
<h2>Figures</h2>
{figures(report)}
<h2>Definitions</h2>
<dl>{definitions(report)}</dl>
<h2>About this audit</h2>
<div class="wide" tabindex="0" role="region" aria-label="About this audit"><table>
<caption>Data, models, versions</caption><tbody>{about}</tbody></table></div>
</main>
</body>
</html>
"""


def table(report: Report) -> str:
    """All numbers, one row each."""
    models = list(report.frame.index)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in models)
    rows = []
    for c in report.measure_of:
        low, high, centre = report.null.loc[c, ["low", "high", "mean"]]
        cells = []
        for name in models:
            gap, inside = "", report.inside(name, c)
            if inside is not None:
                where, difference = "in" if inside else "out", report.frame.loc[name, c] - centre
                sign = "+" if difference > 0 else ""
                gap = f'<small class="{where}">{sign}{number(c, difference)} {where}</small>'
            cells.append(f"<td>{report.text(name, c)}{gap}</td>")
        tricked = escape(report.tricked(c))
        spent = report.seconds.get(report.measure_of[c], np.nan)
        rows.append(
            f'<tr><th scope="row"><a href="#{slug(report.measure_of[c])}">{escape(c)}</a></th>'
            f"{''.join(cells)}<td>{band(low, high)}</td>"
            f'<td class="text">{tricked}</td><td>{number("s", spent)}</td></tr>'
        )
    for c in COST:
        cells = "".join(f"<td>{number(c, report.frame.loc[name, c])}</td>" for name in models)
        rows.append(f'<tr><th scope="row">{c}</th>{cells}<td></td><td></td><td></td></tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Numbers"><table><caption>Value; below, the gap to '
        'the mean of retrained models</caption><thead><tr><th scope="col" class="text">number</th>'
        f'{head}<th scope="col">band</th><th scope="col" class="text">fooled by</th><th scope="col">seconds of the '
        f"measure</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


@plt.rc_context({"text.parse_math": False})  # a model may be called "$x"
def figures(report: Report) -> str:
    """The drawings, each with a text that says what is seen."""
    frame, routing = report.frame, report.routing
    drawn = []
    if {"at_test", "js_forget"} <= set(frame):
        seen = "; ".join(f"{m} At {v.at_test:.1%}, Ag {v.ag_test:.1%}" for m, v in frame.iterrows())
        drawn.append((plots.audit(frame), f"Bars by model. {seen}.", "Accuracy and divergence on test images."))
    if (report.null["high"] - report.null["low"] > 1e-9).any():
        outside = {m: sum(report.inside(m, c) is False for c in report.measure_of) for m in frame.index}
        seen = "; ".join(f"{m} {n}" for m, n in outside.items() if m != "retrain")
        drawn.append((
            plots.gaps(report),
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


def definitions(report: Report) -> str:
    """Of each measure, what its docstring says."""
    parts = []
    for name in dict.fromkeys(report.measure_of.values()):
        columns = ", ".join(c for c, m in report.measure_of.items() if m == name)
        text = escape(inspect.getdoc(MEASURES[name]))
        parts.append(f'<dt id="{slug(name)}">{escape(name)} ({escape(columns)})</dt><dd>{text}</dd>')
    return "".join(parts)


def slug(name: str) -> str:
    """A measure's name as the place in the page that defines it."""
    return "measure-" + name.replace(" ", "-")
