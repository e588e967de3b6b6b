"""Leaderboards in LaTeX, to paste into a paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fedpers.evaluation.leaderboard import Group
from fedpers.evaluation.tables import columns, name_of

_ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "·": r"$\cdot$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip

_SIGN = re.compile(r"(?<![\w-])-(?=\d)")


def latex(groups: Sequence[Group]) -> str:
    r"""A ``table`` for each group, for a document with ``\usepackage{booktabs}``; the best score is bold."""
    return "\n".join(["% needs \\usepackage{booktabs}", *(_table(group) for group in groups)])


def _table(group: Group) -> str:
    shown = columns(group)
    lines = [_line(["method", *(column.title for column in shown)]), r"\midrule"]
    lines += [_line([name_of(row), *(column.cell(row) for column in shown)], bold=2 * row.best) for row in group.rows]
    return "\n".join([
        r"\begin{table}", r"\centering",
        rf"\caption{{{_escaped(group.title)}. {_escaped(group.sentence)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(shown)}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}",
        r"\end{table}", "",
    ])  # fmt: skip


def _line(cells: Iterable[str], *, bold: int = 0) -> str:
    """A line of the table, its first cells `bold`."""
    texts = [_SIGN.sub(r"$-$", _escaped(cell)) for cell in cells]
    return " & ".join(rf"\textbf{{{text}}}" if i < bold else text for i, text in enumerate(texts)) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_ESCAPED.get(character, character) for character in " ".join(text.split()))
