"""The page: groups of runs as sections of HTML, written into one file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from markupsafe import Markup

from fedpers import __version__
from fedpers.evaluation.comparisons import as_reference
from fedpers.evaluation.leaderboard import NO_LEARNING, Group, Row
from fedpers.evaluation.report import client_figures, figures, prose
from fedpers.evaluation.report.client_figures import Harm
from fedpers.evaluation.report.contents import Method, paired, read_label_counts, read_methods
from fedpers.evaluation.report.figures import Figure, Styles, points
from fedpers.evaluation.report.svg import STYLES, swatch
from fedpers.evaluation.runs import RunRecord
from fedpers.evaluation.tables import Column, columns, percent
from fedpers.evaluation.wording import ranks_over_tables
from fedpers.settings.groups import method_title

MAX_ROWS = 200
"""Rows of a table; further methods are in files only (``--csv``)."""
MAX_DRAWN = 60
"""Methods whose run folders are read and drawn, besides the references."""
MAX_PROBLEMS = 20
FIGURES_BYTES, PAGE_BYTES = 3_000_000, 4_200_000
"""Once the page has so many, the groups that follow have no pictures, or are a sentence."""
_SCATTERED = 3
_HARMED = 15


@dataclass(frozen=True)
class Part:
    """Pictures that answer one question."""

    title: str
    figures: list[Figure]
    legend: bool = False
    note: str = ""


@dataclass(frozen=True)
class HarmList:
    """Clients that a method serves worse than a reference does: `total` of `clients`, of which some are `shown`."""

    method: str
    reference: str
    total: int
    clients: int
    seeds: int
    shown: list[Harm]


@dataclass(frozen=True)
class Section:
    """What the page says of a group."""

    anchor: str
    group: Group
    warnings: list[str]
    notes: list[str]
    columns: list[tuple[Column, str]]
    rows: list[Row]
    styles: Styles
    parts: list[Part]
    harms: list[HarmList]
    common: list[tuple[str, str]]
    differing: list[tuple[str, str]]
    paragraph: str


def page(groups: Sequence[Group], runs: Sequence[RunRecord], left_out: Sequence[str] = ()) -> str:
    """The report of some groups as HTML.

    Parameters
    ----------
    groups : sequence of Group
        Of :func:`fedpers.evaluation.leaderboard.leaderboard`.
    runs : sequence of RunRecord
        All runs of these groups.
    left_out : sequence of str
        Sentences on folders that could not be used.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedpers.evaluation.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"swatch": swatch, "points": points}
    by_folder = {str(run.folder): run for run in runs}
    sections, shortened = [], 0
    colours: dict[str, int] = {}
    template, size = environment.get_template("section.html"), 0
    for number, group in enumerate(groups, start=1):
        if size > PAGE_BYTES:
            shortened += 1
            continue
        section = _section(f"group{number}", group, by_folder, colours, drawn=size < FIGURES_BYTES)
        if size >= FIGURES_BYTES:
            shortened += 1
        sections.append(Markup(template.render(section=section, alone=len(groups) == 1)))
        size += len(sections[-1])
    style, script = (
        Markup(environment.get_template(name).render()) for name in ("style.css", "sort.js")
    )  # neither holds anything of a run
    methods = {row.method for group in groups for row in group.rows}
    return environment.get_template("page.html").render(
        groups=groups, ranks=ranks_over_tables(groups), sections=sections, shortened=shortened, left_out=left_out,
        methods=len(methods), runs=len(runs), style=style, script=script, version=__version__,
        now=datetime.now().astimezone(),
    )  # fmt: skip


def _reference(rows: Sequence[Row], strategy: str) -> Row | None:
    """The row of a strategy that others are compared with, as in the table; None if there is none."""
    variants = [row for row in rows if row.strategy == strategy]
    return max(variants, key=lambda row: as_reference(len(row.seeds), row.score), default=None)


def _section(
    anchor: str, group: Group, runs: Mapping[str, RunRecord], colours: dict[str, int], *, drawn: bool
) -> Section:
    wanted = prose.baselines_of(runs[group.rows[0].folders[0]])
    best = {name: _reference(group.rows, name) for name in wanted}
    kept = group.rows[:MAX_DRAWN]
    kept += [row for row in best.values() if row is not None and row not in kept]
    methods, problems = read_methods(replace(group, rows=kept if drawn else []), runs)
    described = methods or [Method(row, [runs[f] for f in row.folders], None, {}) for row in kept]
    styles = _styles(group.rows, best, colours)
    compared = {name: next(m for m in methods if m.row is row) for name, row in best.items() if drawn and row}
    shown, more = group.rows[:MAX_ROWS], len(problems) - MAX_PROBLEMS
    return Section(
        anchor=anchor,
        group=group,
        warnings=prose.warnings(described),
        notes=[*group.notes, *problems[:MAX_PROBLEMS], *([f"And {more} more files."] if more > 0 else [])],
        columns=list(_columns(group)),
        rows=[*shown, *(row for row in best.values() if row is not None and row not in shown)],
        styles=styles,
        parts=[part for part in _parts(group, methods, compared, styles) if part.figures or part.note],
        harms=list(_harms(group, methods, compared, styles)),
        common=prose.settings_in_common(described),
        differing=prose.settings_that_differ(described),
        paragraph=prose.paragraph(group, described),
    )


_MEANINGS = {
    "score": "mean over clients at the selected round, each client counts the same; ± 95 % interval over seeds",
    "weighted": "the same, but each test sample counts the same",
    "unseen": "clients that never train, as they come",
    "adapted": "clients that never train, after training locally for one round at the end",
    "worst": "mean of the worst tenth of the clients",
    "std": "standard deviation over clients",
    "last": "mean over clients after the last round, whichever was selected",
    "sent": "bytes up and down in all rounds",
    "gradients": "gradients computed in training, of one client on one batch each",
    "time": "wall-clock time of a run",
    "simulated": "time that training would take on the clients' own devices (clock=devices): the slowest ends a round",
    "seeds": "seeds that the row is a mean of",
    "epsilon": "privacy spent, the most of all seeds",
}


def _columns(group: Group) -> Iterator[tuple[Column, str]]:
    """Columns of the table that say something of these rows, each with its meaning."""
    name = f"test/{group.headline}_weighted"
    weighted = Column("weighted", "weighted %", lambda row: percent(row.selected.get(name, math.nan)),
                      lambda row: row.selected.get(name, math.nan), -1)  # fmt: skip
    score, *others = columns(group)
    place = 1 + len(group.references)
    for column in [score, *others[: place - 1], weighted, *others[place - 1 :]]:
        if column is score or any(math.isfinite(column.value(row)) for row in group.rows):
            meaning = _MEANINGS.get(column.key, f"{column.title}, mean over clients".replace("\n", " "))
            if column.key.startswith("vs_"):
                meaning = "difference in points ± 95 % interval; undecided: too close to call, which is not equal"
            elif column.key.startswith("adapted_"):
                meaning = (
                    f"clients that never train, after {column.key.removeprefix('adapted_')} local steps at the end"
                )
            yield column, meaning


def _styles(rows: Sequence[Row], references: Mapping[str, Row | None], colours: dict[str, int]) -> Styles:
    """Styles 0 and 1 for the references, the others for the best methods; a method keeps its colour on the page."""
    styles: dict[str, int | None] = dict.fromkeys((row.method for row in rows), None)
    for style, row in enumerate(list(references.values())[:2]):
        if row is not None:
            styles[row.method] = style
    best = [row.method for row in rows if styles[row.method] is None and row.strategy != NO_LEARNING][: STYLES - 2]
    for method in best:
        if method in colours and colours[method] not in styles.values():
            styles[method] = colours[method]
    free = [style for style in range(2, STYLES) if style not in styles.values()]
    for method in best:
        if styles[method] is None:
            styles[method] = free.pop(0)
        colours.setdefault(method, int(styles[method] or 0))
    return styles


def _parts(group: Group, methods: Sequence[Method], references: Mapping[str, Method], styles: Styles) -> Iterator[Part]:
    if not methods:
        return
    headline = group.headline
    yield Part("Differences", list(figures.differences(group, styles)))
    yield Part("Training", list(figures.curves(methods, styles, headline)), legend=True)
    best = [method for method in methods if styles[method.row.method] not in (None, 0, 1)][:_SCATTERED]
    if group.spread:
        clients = list(client_figures.ranked_clients(methods, styles, headline))
        for name, reference in references.items():
            clients += client_figures.gains(methods, reference, method_title(name))
        yield Part("Clients", clients, legend=True, note=_sample_note(methods, headline))
        dots = [figure for name, reference in references.items() for method in best if method is not reference
                for figure in client_figures.scatter(method, reference, int(styles[method.row.method] or 0), headline,
                                              method_title(name))]  # fmt: skip
        yield Part("Client by client", dots)
    else:
        why = f"A single client's {headline} says next to nothing, since it is measured on one held-out item"
        yield Part("Clients", [], note=f"{why}: clients are not shown one by one.")
    by = [
        *client_figures.by_size(methods, styles, headline),
        *client_figures.by_divergence(methods, styles, headline),
    ]
    kinds = list(by)
    for method in methods:
        if (owners := read_label_counts(method)) is not None:
            several = len({seed for other in methods for seed in other.row.seeds}) > 1
            kinds += client_figures.bubbles(*owners, method.row.seeds[0] if several else None)
            break
    yield Part("Data of the clients", kinds, legend=bool(by))
    yield Part("Inside the methods", [f for method in methods[:20] for f in figures.recorded(method)][:24])


def _sample_note(methods: Sequence[Method], headline: str) -> str:
    import numpy as np

    sizes = [clients.test for method in methods for clients in method.clients.values() if len(clients.test)]
    if not sizes:
        return ""
    middle = float(np.median(np.concatenate(sizes)))
    if "accuracy" not in headline or not 1 <= middle <= 50:
        return ""
    return (
        f"Half of the clients have at most {middle:.0f} test samples, so that one sample is {100 / middle:.0f} points "
        f"of a client's {headline}: read these pictures for the whole, not for one client."
    )


def _harms(
    group: Group, methods: Sequence[Method], references: Mapping[str, Method], styles: Styles
) -> Iterator[HarmList]:
    if not group.spread:
        return
    for method in [method for method in methods if styles[method.row.method] not in (None, 0, 1)][:_SCATTERED]:
        for name, reference in references.items():
            pairs = paired(method, reference)
            if pairs and method is not reference:
                harmed = client_figures.harmed(method, reference)
                total = sum(len(clients.score) for _, clients, _ in pairs)
                yield HarmList(method.row.label, method_title(name), len(harmed), total, len(pairs), harmed[:_HARMED])
