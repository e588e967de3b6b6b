"""The pictures of a report: each a small function of methods, with the sentence that explains it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fedpers.evaluation.leaderboard import Group
from fedpers.evaluation.report.contents import COSTS, Floats, Method
from fedpers.evaluation.report.svg import STYLES, Axis, Frame, row_frame, series, share_axis, spread_axis, swatch
from fedpers.settings.groups import method_title

Styles = Mapping[str, int | None]
"""The style of each method by name; None: grey, one of the others."""

MAX_ROWS = 40
"""So many methods stand in a picture with a row for each."""
_CURVE_POINTS = 100
_LAYERS = 8


@dataclass(frozen=True)
class Figure:
    """A picture and the line under it."""

    svg: Markup
    title: str
    caption: str
    legend: tuple[tuple[Markup, str], ...] = ()


def differences(group: Group, styles: Styles) -> Iterator[Figure]:
    """For each reference, how far each method is from it, with intervals."""
    rows, headline = group.rows, group.headline
    for strategy in group.references:
        reference = method_title(strategy)
        compared = [(row, c) for row in rows for c in row.comparisons if c.reference == strategy]
        drawn = [(row, c) for row, c in compared if math.isfinite(c.difference)][:MAX_ROWS]
        if not drawn:
            continue
        differences = [100 * c.difference for _, c in drawn]  # in points
        values, ends = [0.0, *differences], [100 * e for _, c in drawn for e in (c.low, c.high) if math.isfinite(e)]
        reach = max(2.0, 4 * max(map(abs, values)))  # two seeds may have intervals ten times as wide
        low, high = min(*values, max(-reach, min(ends, default=0.0))), max(*values, min(reach, max(ends, default=0.0)))
        gap = 0.05 * max(high - low, 1.0)
        axis = Axis(low - gap, high + gap, f"points of test {headline} above {reference}")
        frame = row_frame(axis, [row.label for row, _ in drawn])
        marks = [frame.line([0, 0], [-0.6, len(drawn) - 0.4], "zero")]
        for place, (difference, (row, c)) in enumerate(zip(differences, drawn, strict=True)):
            style = styles.get(row.method)
            if math.isfinite(c.low) and math.isfinite(c.high):
                kind = f"interval solid {series(style)} {c.verdict}"
                marks.append(frame.line([100 * c.low, 100 * c.high], [place, place], kind))
            title = f"{row.label}: {points(c.difference)} points ({interval(c.low, c.high)})"
            marks.append(frame.marks([difference], [place], style, [title]))
        cut = f"; the first {len(drawn)} of {len(compared)} methods" if len(drawn) < len(compared) else ""
        known = any(math.isfinite(c.low) for _, c in drawn)
        intervals = "bars: 95 % intervals, thin where it is too close to call" if known else "too few for intervals"
        if known and (min(ends) < low or max(ends) > high):
            intervals += "; those that reach the edge go on beyond it"
        yield Figure(
            frame.drawn(marks, f"Difference of each method from {reference}", rows=[row.label for row, _ in drawn]),
            f"Better or worse than {reference}?",
            f"Right of the line: better than {reference}; {intervals}{cut}.",
        )


def curves(methods: Sequence[Method], styles: Styles, headline: str) -> Iterator[Figure]:
    """Scores over rounds, gradients, megabytes, seconds and simulated hours."""
    drawn = [(method, method.curve) for method in methods if method.curve is not None]
    drawn = [(method, curve) for method, curve in drawn if len(curve.costs["round"]) > 1]
    if not drawn:
        return
    y = share_axis((float(v) for _, curve in drawn for v in np.ravel(curve.scores)), headline)
    several = any(len(curve.scores) > 1 for _, curve in drawn)
    for cost, label in COSTS.items():
        totals = [float(curve.costs[cost][-1]) for _, curve in drawn]
        if max(totals) <= 0:
            continue
        x = spread_axis([t for t in totals if cost != "round"], label)
        if cost == "round":
            x = Axis(0.0, max(totals), label)
        elif x.log:  # from the first round in which something was spent
            firsts = [float(v) for _, curve in drawn for v in curve.costs[cost][curve.costs[cost] > 0][:1]]
            x = Axis(min(firsts), max(totals) * 1.05, label, log=True)
        frame = Frame(x, y)
        marks: list[Markup] = []
        for method, curve in sorted(drawn, key=lambda pair: styles.get(pair[0].row.method) is not None):
            marks += _curve_marks(frame, curve.costs[cost], curve.scores, styles.get(method.row.method))
        free = cost == "megabytes" and min(totals) <= 0
        yield Figure(
            frame.drawn(marks, f"{headline} over {label}"),
            f"Test {headline} over {cost}{'s' if cost == 'round' else ''}",
            "Mean over clients"
            + ("; band: lowest to highest seed" if several else "; one seed")
            + ("; a level line: nothing is sent" if free else "")
            + ".",
        )


def _curve_marks(frame: Frame, x: Floats, scores: Floats, style: int | None) -> Iterator[Markup]:
    if x[-1] <= 0:  # nothing is spent: the end of training, all along
        x, scores = np.array([frame.x.low, frame.x.high]), scores[:, [-1, -1]]
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _CURVE_POINTS)).round().astype(int))
    x, scores = x[kept], scores[:, kept]
    if frame.x.log:
        scores, x = scores[:, x >= frame.x.low], x[x >= frame.x.low]
    mean = scores.mean(0)
    if style is None:
        yield frame.line(x, mean, "other")
        return
    if len(scores) > 1:
        yield frame.band(x, scores.min(0), scores.max(0), f"s{style}")
    yield frame.line(x, mean, f"s{style}")
    if len(x):
        # each series has its markers at places of its own, so that they do not hide one another
        first = (style * len(x)) // (6 * STYLES)
        step = max(1, len(x) // 5)
        yield frame.marks(x[first::step], mean[first::step], style)


def recorded(method: Method) -> Iterator[Figure]:
    """What a method records of itself over rounds: personal shares of layers, holders of experts, sparsity."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in method.extra:
        families[re.sub(r"(/.*|_\d+)$", "", name)].append(name)
    for family, names in families.items():
        lines = {name.removeprefix(family).strip("/_") or "all": method.extra[name] for name in names}
        lines = {name: line for name, line in lines.items() if line.shape[1] > 1}
        if not lines:
            continue
        title, percent = f"{method.row.label}: {family.replace('_', ' ')}", _is_share(family, lines)
        if len(lines) > _LAYERS:
            yield _last_values(title, lines, percent)
            continue
        values = [float(v) for line in lines.values() for v in line[1]]
        y = share_axis(values, "") if percent else _number_axis(values)
        rounds = [line[0] for line in lines.values()]
        frame = Frame(Axis(float(min(r[0] for r in rounds)), float(max(r[-1] for r in rounds)), "round"), y)
        marks, legend = [], []
        for style, (name, line) in enumerate(lines.items()):
            step = max(1, line.shape[1] // 5)
            first = style * line.shape[1] // (6 * STYLES)
            marks += [frame.line(line[0], line[1], f"s{style}"),
                      frame.marks(line[0, first::step], line[1, first::step], style)]  # fmt: skip
            legend.append((swatch(style), name))
        yield Figure(frame.drawn(marks, title), title, _explained(family), tuple(legend) if len(lines) > 1 else ())


def _last_values(title: str, lines: Mapping[str, Floats], percent: bool) -> Figure:
    shown = dict(list(lines.items())[:MAX_ROWS])
    values = [float(line[1, -1]) for line in shown.values()]
    high = 1.0 if percent else max(0.0, *values) or 1.0
    frame = row_frame(Axis(min(0.0, *values), high, "at the last round", percent=percent), list(shown))
    marks = []
    for place, value in enumerate(values):
        (x0, y), (x1, _) = frame.points([0, value], [place, place])
        box = Markup('<rect class="gain" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="13"/>')
        marks.append(box.format(min(x0, x1), y - 6.5, abs(x1 - x0)))
    cut = f" The first {len(shown)} of {len(lines)}." if len(shown) < len(lines) else ""
    family = title.partition(": ")[2].replace(" ", "_")
    return Figure(frame.drawn(marks, title, rows=list(shown)), title, _explained(family, "at the last round") + cut)


_MEANINGS = {
    "personal_share": "Share of the entries of each layer that clients keep to themselves",
    "holders_of_expert": "Clients that hold each expert: whether the work is divided or one expert does it all",
    "clients_of_cluster": "Clients in each cluster",
    "gate_entropy": "How evenly clients use their experts (entropy of the gate, in nats; 0: one expert only)",
    "sparsity": "Share of the common table's entries that are next to zero",
    "sent_share": "Share of the table's entries that are sent",
}


def _explained(family: str, when: str = "over rounds") -> str:
    return f"{_MEANINGS.get(family, family.replace('_', ' ').capitalize())}, {when}, mean over seeds."


def _is_share(family: str, lines: Mapping[str, Floats]) -> bool:
    named = family.endswith(("share", "sparsity", "accuracy"))
    return named and all((line[1] >= 0).all() and (line[1] <= 1).all() for line in lines.values())


def _number_axis(values: Sequence[float]) -> Axis:
    present = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(0.0, *present), max(0.0, *present)
    return Axis(low, high + 0.05 * (high - low) if high > low else low + 1.0, "")


def points(value: float) -> str:
    """A difference of scores in percentage points, with its sign."""
    return "-" if math.isnan(value) else f"{100 * value:+.1f}"


def interval(low: float, high: float) -> str:
    """A 95 % interval of such a difference."""
    return f"{points(low)} to {points(high)}" if math.isfinite(low + high) else "no interval"
