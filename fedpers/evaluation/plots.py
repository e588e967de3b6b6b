"""Pictures of one run, drawn from its folder; matplotlib is loaded when something is drawn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpers.errors import ConfigError, FedpersError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARE = "train/personal_share"
"""Metric of methods with masks: share of personal entries; ``.../LAYER`` is that of one layer."""
LINES = 8
"""Layers that are drawn as lines; more are drawn as a map."""
_DESCRIBED = re.compile("test/(.+)_worst_decile")
_HEIGHT = 3.4
_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9822b", "#777777"


@dataclass(frozen=True)
class Rounds:
    """What a run folder says about its rounds.

    Attributes
    ----------
    folder : Path
    rows : list of dict
        Lines of ``rounds.jsonl``, ascending by ``round``; a metric that was not measured in a round is absent or None.
    summary : dict
        ``summary.json``; empty while there is none.
    """

    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """Metric by which the run is ranked; without a summary, the one whose distribution over clients is there."""
        names = [match[1] for row in self.rows for name in row if (match := _DESCRIBED.fullmatch(name))]
        return str(self.summary.get("headline") or (names[0] if names else "accuracy"))

    @property
    def layers(self) -> list[str]:
        """Layers with masks, by name, numbers in it as numbers."""
        names = {n.removeprefix(f"{SHARE}/") for row in self.rows for n in row if n.startswith(f"{SHARE}/")}
        return sorted(names, key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")])

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Rounds in which a metric was measured, and its values."""
        points = [(int(row["round"]), float(row[name])) for row in self.rows if row.get(name) is not None]
        return [round for round, _ in points], [value for _, value in points]


def read_rounds(folder: Path) -> Rounds:
    """Read the run in `folder`, or the only one below it.

    Raises
    ------
    FedpersError
        If there is no run, more than one, or its ``rounds.jsonl`` is damaged or empty.
    """
    folder = Path(folder)
    paths = sorted(folder.rglob("rounds.jsonl"))
    if not paths:
        raise FedpersError(f"no run was found in {folder}.")
    if len(paths) > 1:
        raise FedpersError(f"{folder} holds {len(paths)} runs; choose one of them, e.g. {paths[0].parent}.")
    try:
        rows = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines()]
        summary_path = paths[0].with_name("summary.json")
        summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.exists() else {}
        if not rows or not all("round" in row for row in rows):
            raise ValueError("it has no rounds")
    except (OSError, ValueError, TypeError) as error:
        raise FedpersError(f"{paths[0].parent} cannot be read: {error}.") from error
    return Rounds(paths[0].parent, rows, summary)


def plot_run(folder: Path, file: Path) -> None:
    """Draw the headline metric over rounds, and the growth of masks if the method has any.

    Parameters
    ----------
    folder : Path
        A run folder, or one above a single run.
    file : Path
        The picture; its ending says the format: svg, png, pdf.

    Raises
    ------
    FedpersError
        If the run cannot be read, nothing was measured, or the picture cannot be written.
    """
    run = read_rounds(folder)
    if not run.layers:
        figure = _figure(5.6, _HEIGHT)
        _draw_headline(figure.subplots(), run)
    elif len(run.layers) <= LINES:  # side by side
        figure = _figure(11.2, _HEIGHT)
        left, right = figure.subplots(1, 2)
        _draw_headline(left, run)
        _draw_masks(figure, right, run)
    else:  # the map is as high as there are layers
        figure = _figure(7.0, _HEIGHT + _height(run))
        top, below = figure.subplots(2, 1, height_ratios=[_HEIGHT, _height(run)])
        _draw_headline(top, run)
        _draw_masks(figure, below, run)
    _save(figure, run, file)


def plot_masks(folder: Path, file: Path) -> None:
    """Draw the share of personal entries in each layer over rounds, the mean over the clients that trained.

    Up to :data:`LINES` layers are lines, more are a map of layers by rounds.

    Parameters
    ----------
    folder, file : Path
        See :func:`plot_run`.

    Raises
    ------
    FedpersError
        As :func:`plot_run`, and if the run's method has no masks.
    """
    run = read_rounds(folder)
    if not run.layers:
        raise FedpersError(f"{run.folder} records no masks: {SHARE}/LAYER is missing, which strategy=fedselect writes.")
    figure = _figure(7.0, _height(run))
    _draw_masks(figure, figure.subplots(), run)
    _save(figure, run, file)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _height(run: Rounds) -> float:
    return _HEIGHT if len(run.layers) <= LINES else max(_HEIGHT, 1.2 + 0.13 * len(run.layers))


def _draw_headline(axes: Axes, run: Rounds) -> None:
    name = run.headline
    drawn: list[float] = []
    curves: Sequence[tuple[str, str, Mapping[str, Any]]] = (
        (f"test/{name}", "test", {"color": _BLUE}),
        (f"validation/{name}", "validation", {"color": _ORANGE, "linewidth": 1.0}),
        (f"test/{name}_worst_decile", "test, worst tenth of the clients", {"color": _BLUE, "linestyle": ":"}),
    )
    for key, label, style in curves:
        rounds, values = run.curve(key)
        if rounds:
            drawn += values
            axes.plot(rounds, values, label=label, marker=_dot(rounds), **style)
    if not drawn:
        raise FedpersError(f"{run.folder} was not evaluated in any round: test/{name} is missing.")
    if run.summary.get("selected_round") is not None:
        axes.axvline(run.summary["selected_round"], color=_GREY, linewidth=0.8, linestyle="--", label="selected round")
    axes.set_title(f"{name}, mean over clients", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    _as_shares(axes, run)
    axes.set_ylim(bottom=min(0.0, 1.02 * min(drawn)))  # not every metric is a share


def _dot(rounds: Sequence[float]) -> str | None:
    """Marker of a curve: of a single round there is no line."""
    return "." if len(rounds) == 1 else None


def _draw_masks(figure: Figure, axes: Axes, run: Rounds) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    axes.set_title("personal share of each layer, mean over the clients of a round", fontsize=10)
    layers = run.layers
    if len(layers) <= LINES:
        colors = colormaps["viridis"]
        for index, layer in enumerate(layers):
            rounds, values = run.curve(f"{SHARE}/{layer}")
            part = index / max(1, len(layers) - 1)
            # lines often coincide, since every layer grows by the same rate: thinner ones lie on top
            width = 5 - 3.5 * part
            axes.plot(rounds, values, label=layer, color=colors(0.9 * part), linewidth=width, marker=_dot(rounds))
        rounds, values = run.curve(SHARE)
        dot = _dot(rounds)
        axes.plot(rounds, values, label="all parameters", color="black", linewidth=1.2, linestyle="--", marker=dot)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        _as_shares(axes, run)
        return
    rounds = sorted({round for layer in layers for round in run.curve(f"{SHARE}/{layer}")[0]})
    curves = [dict(zip(*run.curve(f"{SHARE}/{layer}"), strict=True)) for layer in layers]
    grid = [[curve.get(round, math.nan) for round in rounds] for curve in curves]
    first, last = rounds[0] - 0.5, rounds[-1] + 0.5
    picture = axes.imshow(
        grid, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis",
        extent=(first, last, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(layers)), layers, fontsize=6)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(picture, ax=axes, format="{x:.0%}")


def _as_shares(axes: Axes, run: Rounds) -> None:
    """Rounds from 0 on the one axis, percent on the other."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, max(1, int(run.rows[-1]["round"])))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, run: Rounds, file: Path) -> None:
    file = Path(file)
    title = [str(run.summary[key]) for key in ("strategy", "dataset", "partition") if key in run.summary]
    if title:
        figure.suptitle(f"{', '.join(title)}, seed {run.summary.get('seed')}", fontsize=11)
    file_types = sorted(figure.canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".") not in file_types:
        raise ConfigError("--out", file, f"a file that ends in one of .{', .'.join(file_types)}")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise FedpersError(f"{file} cannot be written ({error.strerror or error}).") from error
