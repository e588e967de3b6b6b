"""The pictures of a report that show clients: how each fares with each method, and what they own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fedpers.evaluation.report.contents import Clients, Floats, Method, paired
from fedpers.evaluation.report.figures import MAX_ROWS, Figure, Styles
from fedpers.evaluation.report.svg import WIDTH, Axis, Frame, picture, row_frame, series, share_axis, spread_axis

MAX_BUBBLES = 1500
_CELLS = 40
"""Points of a scatter plot are counted in so many cells along each axis once there are more than this allows."""
_MANY_POINTS = 400


def ranked_clients(methods: Sequence[Method], styles: Styles, headline: str) -> Iterator[Figure]:
    """Scores of clients from the worst to the best, a line for each method."""
    drawn = [(method, np.concatenate([c.score for c in method.clients.values()])) for method in methods
             if any(len(c.score) > 1 for c in method.clients.values())]  # fmt: skip
    if not drawn:
        return
    shares = np.linspace(0, 1, 51)
    lines = {method.row.method: np.quantile(scores, shares) for method, scores in drawn}
    y = share_axis((float(v) for line in lines.values() for v in line), headline)
    frame = Frame(Axis(0, 1, "share of the clients", percent=True), y)
    marks = []
    for method, _ in sorted(drawn, key=lambda pair: styles.get(pair[0].row.method) is not None):
        style, line = styles.get(method.row.method), lines[method.row.method]
        marks.append(frame.line(shares, line, series(style)))
        if style is not None:
            marks.append(frame.marks(shares[style % 8 :: 12], line[style % 8 :: 12], style))
    yield Figure(
        frame.drawn(marks, f"{headline} of clients from the worst to the best"),
        "Clients from worst to best",
        f"Each line: {headline} of a method's clients in ascending order"
        f"{', all seeds together' if any(len(m.clients) > 1 for m, _ in drawn) else ''}; "
        f"on the left those it serves worst.",
    )


def gains(methods: Sequence[Method], reference: Method, name: str) -> Iterator[Figure]:
    """For each method, the shares of clients that it serves better and worse than a reference does."""
    shares = []
    for method in methods:
        pairs = paired(method, reference)
        if method is not reference and pairs:
            difference = np.concatenate([clients.score - other.score for _, clients, other in pairs])
            shares.append((method.row.label, float((difference < 0).mean()), float((difference > 0).mean())))
    if not shares:
        return
    shares = shares[:MAX_ROWS]
    reach = max(0.05, max(max(lose, gain) for _, lose, gain in shares))
    frame = row_frame(Axis(-1.25 * reach, 1.25 * reach, "clients", percent=True), [label for label, _, _ in shares])
    marks = []
    for place, (_, lose, gain) in enumerate(shares):
        for value, style in ((-lose, "lose"), (gain, "gain")):
            (x0, y), (x1, _) = frame.points([0, value], [place, place])
            box = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="13"/>')
            marks.append(box.format(style, min(x0, x1), y - 6.5, abs(x1 - x0)))
            written = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{:.0f}</text>')
            end = ("end", x1 - 3) if value < 0 or style == "lose" else ("start", x1 + 3)
            marks.append(written.format(end[1], y + 4, end[0], 100 * abs(value)))
    marks.append(frame.line([0, 0], [-0.6, len(shares) - 0.4], "zero"))
    yield Figure(
        frame.drawn(marks, f"Share of clients better and worse off than with {name}", rows=[m for m, _, _ in shares]),
        f"Who gains and who loses against {name}",
        f"Percent of the clients that score higher (right, solid) and lower (left, pale) than the same clients "
        f"do with {name}; the rest are equal.",
    )


def scatter(method: Method, reference: Method, style: int, headline: str, name: str) -> Iterator[Figure]:
    """Clients by their scores with two methods."""
    pairs = paired(method, reference)
    if not pairs:
        return
    y, x = (np.concatenate([chosen(pair).score for pair in pairs]) for chosen in _BOTH)
    names = [_named(client, seed, len(pairs)) for seed, clients, _ in pairs for client in clients.names]
    shown = share_axis([*x.tolist(), *y.tolist()], "")
    gap = 0.03 * (shown.high - shown.low)  # a dot at the end of an axis is seen whole
    shown = Axis(shown.low - gap, shown.high + gap, "")
    frame = Frame(Axis(shown.low, shown.high, f"{headline} with {name}", percent=True),
                  Axis(shown.low, shown.high, f"with {method.row.label}", percent=True), height=300)  # fmt: skip
    exact = x, y
    x, y = np.clip(x, shown.low, shown.high), np.clip(y, shown.low, shown.high)
    if len(x) > _MANY_POINTS:  # to the middles of cells
        width = (shown.high - shown.low) / _CELLS
        x, y = (shown.low + (np.floor((v - shown.low) / width) + 0.5) * width for v in (x, y))
    counted: dict[tuple[float, float], list[int]] = defaultdict(list)
    for i, place in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        counted[place].append(i)
    most = max(map(len, counted.values()))
    marks = [frame.line([shown.low, shown.high], [shown.low, shown.high], "zero")]
    for (a, b), members in counted.items():
        ((across, down),) = frame.points(a, b)
        radius = 2.6 if most == 1 else 2.2 + 4.5 * math.sqrt((len(members) - 1) / max(1, most - 1))
        who = names[members[0]] if len(members) == 1 else f"{len(members)} clients, {names[members[0]]} among them"
        of, with_method = (float(np.mean(scores[members])) for scores in exact)
        title = f"{who}: {name} {_percent(of)}, {method.row.label} {_percent(with_method)}"
        dot = Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>')
        marks.append(dot.format(style, across, down, radius, title))
    each = "Each dot is a client" if most == 1 else "Dots are clients, larger ones several"
    yield Figure(
        frame.drawn(marks, f"{headline} of clients with {method.row.label} and with {name}"),
        f"{method.row.label} against {name}",
        f"{each}; above the line: better with {method.row.label}, below it: with {name}.",
    )


_BOTH: tuple[Callable[[tuple[int, Clients, Clients]], Clients], ...] = (lambda pair: pair[1], lambda pair: pair[2])


@dataclass(frozen=True)
class Harm:
    """A client that fares worse with a method than with a reference."""

    client: str
    test: int
    reference: float
    method: float


def harmed(method: Method, reference: Method) -> list[Harm]:
    """Clients that a method serves worse than a reference does, the worst first."""
    pairs = paired(method, reference)
    rows = [
        Harm(_named(name, seed, len(pairs)), int(tests), float(before), float(after))
        for seed, clients, other in pairs
        for name, tests, before, after in zip(clients.names, clients.test, other.score, clients.score, strict=True)
        if after < before
    ]
    return sorted(rows, key=lambda harm: harm.method - harm.reference)


def by_size(methods: Sequence[Method], styles: Styles, headline: str) -> Iterator[Figure]:
    """Scores against the number of training samples, means of groups of clients."""
    figure = _by(methods, styles, headline, lambda clients: clients.train, "training samples of a client")
    if figure is not None:
        yield Figure(figure, f"Test {headline} and the size of clients",
                     f"Mean {headline} of clients by how much data they train on: where it pays to learn together.",
                     )  # fmt: skip


def by_divergence(methods: Sequence[Method], styles: Styles, headline: str) -> Iterator[Figure]:
    """Scores against the divergence of labels, means of groups of clients."""
    figure = _by(methods, styles, headline, lambda clients: clients.divergence, "label divergence of a client")
    if figure is not None:
        yield Figure(figure, f"Test {headline} and unusual clients",
                     f"Mean {headline} of clients by how far their classes are from the mix of all "
                     "(0: the same mix, 1: no class in common).")  # fmt: skip


def _by(methods: Sequence[Method], styles: Styles, headline: str,
        read: Callable[[Clients], Floats | None], label: str) -> Markup | None:  # fmt: skip
    lines = {}
    for method in methods:
        columns = [(read(clients), clients.score) for clients in method.clients.values()]
        known = [(x, y) for x, y in columns if x is not None and len(x)]
        if styles.get(method.row.method) is not None and known:
            x, y = (np.concatenate(parts) for parts in zip(*known, strict=True))
            edges = np.unique(np.quantile(x, np.linspace(0, 1, 7)))
            places = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(0, len(edges) - 2))
            used = np.unique(places)
            lines[method.row.method] = np.array(
                [[np.median(x[places == p]) for p in used], [y[places == p].mean() for p in used]]
            )
    if not lines or max(line.shape[1] for line in lines.values()) < 2:
        return None
    xs = np.concatenate([line[0] for line in lines.values()])
    x_axis = spread_axis(xs.tolist(), label)
    if not x_axis.log:
        gap = 0.04 * max(float(np.ptp(xs)), 1e-3)
        x_axis = Axis(max(0.0, float(xs.min()) - gap), float(xs.max()) + gap, label)
    frame = Frame(x_axis, share_axis((float(v) for line in lines.values() for v in line[1]), headline))
    marks = []
    for name, line in lines.items():
        style = styles[name]
        marks += [frame.line(line[0], line[1], f"s{style}"), frame.marks(line[0], line[1], int(style or 0))]
    return frame.drawn(marks, f"{headline} against {label}")


def bubbles(names: Sequence[str], classes: Sequence[str], counts: Floats, seed: int | None) -> Iterator[Figure]:
    """Who owns what: a bubble for each client and class; of runs that differ, those with `seed`."""
    total, kinds = counts.shape
    labels = min(kinds, 40)
    clients = min(total, 60, max(1, MAX_BUBBLES // labels))
    shown = counts[:clients, :labels]
    if not shown.any():
        return
    left = min(110.0, 14 + 6.3 * max(len(name) for name in classes[:labels]))
    step = min((WIDTH - left - 10) / clients, 22.0)
    rise = min(22.0, max(10.0, 260 / labels))
    height, largest = 20 + rise * labels + 34, min(step, rise) / 2 * 1.1
    parts = []
    for row in range(labels):
        text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>')
        if rise >= 10 and (rise >= 12 or row % 2 == 0):
            parts.append(text.format(left - 4, 10 + rise * (row + 0.5) + 4, classes[row][: int(left / 6.3)]))
    for i, j in np.argwhere(shown > 0):
        radius = max(0.6, largest * math.sqrt(shown[i, j] / shown.max()))
        dot = Markup('<circle class="bubble" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>')
        parts.append(dot.format(left + step * (i + 0.5), 10 + rise * (j + 0.5), radius))
    bottom = 10 + rise * labels
    every = max(1, math.ceil(26 / step)) if max(map(len, names[:clients])) <= 4 else max(1, math.ceil(60 / step))
    for i in range(0, clients, every):
        text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
        parts.append(text.format(left + step * (i + 0.5), bottom + 14, names[i][:9]))
    name = Markup('<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="middle">client</text>')
    parts.append(name.format(left + step * clients / 2, bottom + 31))
    part = [f"the first {clients} of {total:,} clients" if clients < total else "",
            f"the first {labels} of {kinds} classes" if labels < kinds else ""]  # fmt: skip
    part.append("" if seed is None else f"in the runs of seed {seed}")
    cut = "".join(f"; {text}" for text in part if text)
    yield Figure(
        picture(height, Markup("").join(parts), "Samples of each class with each client"),
        "Who owns what",
        f"Columns are clients, rows are classes; the larger the bubble, the more samples "
        f"(largest: {int(shown.max()):,}){cut}.",
    )


def _named(client: str, seed: int, seeds: int) -> str:
    return f"client {client}" + (f", seed {seed}" if seeds > 1 else "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
