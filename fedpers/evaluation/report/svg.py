"""Small pictures as SVG inside a page: axes, lines, bands, markers. Colours are classes of the page's style.

All pictures are :data:`WIDTH` units wide, about what a phone shows, so that their text is as large as the page's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

WIDTH, HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 40
_ROOM, _LETTER = 6.0, 6.3
"""Units beside a name, and of a letter."""
_MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",  # circle
    "M-3.1 -3.1h6.2v6.2h-6.2z",  # square
    "M0 -4.2L4 3.2H-4z",  # triangle
    "M0 -4.5L4.2 0L0 4.5L-4.2 0z",  # diamond
    "M0 4.2L4 -3.2H-4z",  # triangle that points down
    "M-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",  # plus
    "M-4 -4L0 -1.4L4 -4L1.4 0L4 4L0 1.4L-4 4L-1.4 0z",  # cross
    "M-4.5 -2h9v4h-9z",  # bar
)
STYLES = len(_MARKERS)
"""So many series have a colour and a marker of their own: classes ``s0`` to ``s7``."""


@dataclass(frozen=True)
class Axis:
    """A range of numbers, and how it is written.

    Parameters
    ----------
    low, high : float
        Ends; above 0 if `log`.
    label : str
    log : bool
        Whether equal factors are equally long.
    percent : bool
        Whether numbers are shares that are written in percent.
    """

    low: float
    high: float
    label: str
    log: bool = False
    percent: bool = False

    def place(self, values: ArrayLike) -> NDArray[np.float64]:
        """Where values lie, 0 at the low end and 1 at the high one."""
        v = np.asarray(values, dtype=np.float64)
        if self.log:
            span = math.log(self.high / self.low)
            return np.asarray(np.log(np.maximum(v, self.low * 1e-3) / self.low) / span)
        return (v - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers within the range, and how they are written."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if len(powers) > 3 else (1, 2, 5) if len(powers) > 2 else (1, 2, 3, 5, 7)
            values = [step * 10.0**power for power in powers for step in steps]
            values = [value for value in values if self.low <= value <= self.high]
            values = values[:: math.ceil(len(values) / 6)] if values else []
        else:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            values = [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(value, f"{100 * value:.4g} %" if self.percent else short(value)) for value in values]


def share_axis(values: Iterable[float], label: str) -> Axis:
    """An axis for scores, most of which are shares: what is below -100 % is cut off."""
    present = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = max(min(present), -1.0), max(present)
    gap = max(0.02, 0.06 * (high - low))
    low = low - gap if low < 0 else max(0.0, low - gap)
    return Axis(low, max(min(1.0, high + gap) if high <= 1 else high + gap, low + 0.02), label, percent=True)


def spread_axis(values: Iterable[float], label: str) -> Axis:
    """An axis for amounts, all >= 0: by factors where the largest is more than ten times the smallest above 0."""
    present = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(present), max(present)
    if high > 10 * low:
        return Axis(low / 1.15, high * 1.15, label, log=True)
    return Axis(0.0, high * 1.03, label)


def short(value: float) -> str:
    """A number in few characters: ``1200000`` is ``1.2M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)


@dataclass(frozen=True)
class Frame:
    """The area of a picture in which data are drawn, between two axes.

    Parameters
    ----------
    x, y : Axis
    height : float
        Of the whole picture, in units.
    left : float
        Units left of the area, for what is written there.
    """

    x: Axis
    y: Axis
    height: float = HEIGHT
    left: float = _LEFT

    def points(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Coordinates ``[n, 2]`` in the picture."""
        across = self.left + self.x.place(x) * (WIDTH - self.left - _RIGHT)
        down = self.height - _BOTTOM - self.y.place(y) * (self.height - _TOP - _BOTTOM)
        return np.stack(np.broadcast_arrays(across, down), axis=-1).reshape(-1, 2)

    def line(self, x: ArrayLike, y: ArrayLike, style: str) -> Markup:
        """A line through points; those that are not finite are left out."""
        return Markup('<path class="line {}" d="{}"/>').format(style, _path(self.points(x, y)))

    def band(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, style: str) -> Markup:
        """The area between two lines."""
        bottom, top = self.points(x, low), self.points(x, high)[::-1]
        return Markup('<path class="band {}" d="{}z"/>').format(style, _path(np.concatenate([bottom, top])))

    def marks(self, x: ArrayLike, y: ArrayLike, style: int | None, titles: Sequence[str] = ()) -> Markup:
        """Markers of a series; `titles` appear when a pointer rests on them."""
        drawn = []
        for place, (across, down) in enumerate(self.points(x, y)):
            if math.isfinite(across) and math.isfinite(down):
                title = Markup("<title>{}</title>").format(titles[place]) if titles else ""
                drawn.append(marker(style, across, down, title))
        return Markup("").join(drawn)

    def drawn(self, marks: Iterable[Markup], description: str, *, rows: Sequence[str] | None = None) -> Markup:
        """The whole picture.

        Parameters
        ----------
        marks : iterable of Markup
            What is inside the axes; it is cut at them.
        description : str
            For readers who do not see it.
        rows : sequence of str, optional
            Names written at y = 0, 1, ... in place of numbers.
        """
        right, bottom = WIDTH - _RIGHT, self.height - _BOTTOM
        parts = []
        for value, text in self.x.ticks():
            x = self.points(value, self.y.low)[0, 0]
            parts.append(Markup('<path class="grid" d="M{0} {1}V{2}"/>').format(_n(x), _n(bottom), _TOP))
            number = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
            parts.append(number.format(_n(min(x, WIDTH - 3.6 * len(text))), _n(bottom + 15), text))
        labels = self.y.ticks() if rows is None else list(enumerate(rows))
        for value, text in labels:
            y = self.points(self.x.low, value)[0, 1]
            if rows is None:
                parts.append(Markup('<path class="grid" d="M{0} {1}H{2}"/>').format(_n(self.left), _n(y), right))
            written = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>')
            parts.append(written.format(_n(self.left - 5), _n(y + 4), _shown(text, self.left)))
        parts.append(Markup('<path class="axis" d="M{0} {1}H{2}"/>').format(_n(self.left), _n(bottom), right))
        middle = (self.left + right) / 2
        name = Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>')
        parts.append(name.format(_n(middle), _n(self.height - 7), self.x.label))
        if self.y.label:
            turned = Markup(
                '<text class="name" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>'
            )
            parts.append(turned.format(_n((_TOP + bottom) / 2), self.y.label))
        inside = Markup('<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">{4}</svg>').format(
            _n(self.left), _TOP - 5, _n(right - self.left + 5), _n(bottom - _TOP + 10), Markup("").join(marks)
        )
        return picture(self.height, Markup("").join([*parts, inside]), description)


def picture(height: float, content: Markup, description: str) -> Markup:
    """An ``svg`` element."""
    opened = Markup('<svg class="figure" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return opened.format(WIDTH, _n(height), description) + content + Markup("</svg>")


def marker(style: int | None, x: float, y: float, title: str | Markup = "") -> Markup:
    """One marker of a series; None: a grey circle."""
    shape = Markup('<path class="mark {}" transform="translate({} {})" d="{}">{}</path>')
    return shape.format(series(style), _n(x), _n(y), _MARKERS[style or 0], title)


def series(style: int | None) -> str:
    """The class of a series; None: one of the others, which are grey."""
    return "other" if style is None else f"s{style}"


def swatch(style: int | None) -> Markup:
    """A line with its marker, as they stand in legends; None: the grey of the others."""
    line = Markup('<path class="line {}" d="M0 7H26"/>').format(series(style))
    drawn = line if style is None else line + marker(style, 13, 7)
    return Markup('<svg class="swatch" viewBox="0 0 26 14" aria-hidden="true">{}</svg>').format(drawn)


def row_frame(x: Axis, names: Sequence[str]) -> Frame:
    """A frame with a row for each name, the first on top, and room for the names, up to some thirty letters."""
    count, left = len(names), min(194.0, max(100.0, _ROOM + _LETTER * max(map(len, names))))
    return Frame(x, Axis(count - 0.4, -0.6, ""), height=_TOP + _BOTTOM + 19.0 * count, left=left)


def _shown(text: str, room: float) -> Markup:
    """A text that fits, with the whole of it for a pointer that rests on it."""
    most = int((room - _ROOM) / _LETTER)
    if len(text) <= most:
        return escape(text)
    return Markup("<title>{}</title>{}…").format(text, text[: most - 1])


def _path(points: NDArray[np.float64]) -> str:
    kept = points[np.isfinite(points).all(1)]
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in kept) if len(kept) else "M0 0"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
