"""``fedpers partition``: what each client owns, without training."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpers.app.compose import composed
from fedpers.app.result import print_error
from fedpers.data import FederatedData, apply_heterogeneity, load_federated
from fedpers.errors import FedpersError
from fedpers.evaluation.clients import describe_clients, draw_clients
from fedpers.settings import Config

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN_CLIENTS, SHOWN_CLASSES = 30, 10
FEW_TEST_SAMPLES = 10
"""Accuracy of a client on fewer says little."""


def command(arguments: list[str]) -> int:
    """Print the clients of the data that the settings describe."""
    parser = argparse.ArgumentParser(
        prog="fedpers partition", description="What each client owns: sizes, labels, divergence; nothing is trained."
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as of a run: dataset=..., partition=..., ...")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write the rows of all clients")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also draw classes of clients: .svg, .png, .pdf")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    config = composed(options.settings)
    try:
        data = data_of(config)
    except Exception as error:  # of a function of the user's
        return print_error(error)
    rows = describe_clients(data)
    title = f"{data.name}, partition={config.partition.name}"
    console = Console()
    shown = SHOWN_CLASSES
    unlimited = console.options.update_width(1000)
    while shown > 1 and console.measure(_table(rows, shown), options=unlimited).maximum > console.width:
        shown -= 1
    console.print(_table(rows, shown))
    summary = _summary(rows, title, shown, ratings=data.num_items > 0)
    console.print(summary, soft_wrap=True, highlight=False)
    if options.csv is not None:
        try:
            rows.to_csv(options.csv, index=False)
        except OSError as error:
            raise FedpersError(f"{options.csv} cannot be written ({error}).") from error
    if options.plot is not None:
        draw_clients(rows, title, options.plot)
        print(options.plot)
    return 0


def data_of(config: Config) -> FederatedData:
    """The data of a run."""
    data = load_federated(config.dataset, config.partition, config.split, config.seed)
    seed = config.seed if config.partition.seed is None else config.partition.seed
    return apply_heterogeneity(data, config.heterogeneity, seed)


def _table(rows: DataFrame, shown_classes: int) -> Table:
    """The first clients, with the first classes."""
    classes = [column for column in rows.columns if column.startswith("class ")]
    hidden = set(classes[shown_classes:]) | ({"unseen"} if not rows["unseen"].any() else set())
    columns = [column for column in rows.columns if column not in hidden]
    table = Table(box=None, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "left" if column == "name" else "right"
        table.add_column(escape(column.removeprefix("class ")), justify=justify, no_wrap=True)
    for row in rows[columns].head(SHOWN_CLIENTS).itertuples(index=False):
        cells = (
            f"{value:.2f}"
            if isinstance(value, float)
            else escape("·" if isinstance(value, int) and not value and column.startswith("class ") else str(value))
            for column, value in zip(columns[1:], row[1:], strict=True)
        )
        table.add_row(str(row[0]), *cells)
    return table


def _summary(rows: DataFrame, title: str, shown_classes: int, *, ratings: bool) -> str:
    """What is not in the rows that are shown, and what a reader should know of all."""
    sizes = rows[["train", "validation", "test"]].sum(axis=1)
    what = "rated items" if ratings else "samples"
    lines = []
    if len(rows) > SHOWN_CLIENTS:
        lines.append(f"... and {len(rows) - SHOWN_CLIENTS} more clients (--csv FILE writes all).")
    number = sum(column.startswith("class ") for column in rows.columns)
    if number > shown_classes:
        lines.append(f"Of {number} classes the first {shown_classes} are shown (--csv FILE writes all).")
    lines.append(
        f"{title}: {len(rows)} clients, {sizes.sum()} {what}; {what} of a client {sizes.min()} to {sizes.max()}, "
        f"median {sizes.median():g}."
    )
    if "divergence" in rows:
        mean = rows["divergence"].mean()
        lines.append(f"Label divergence (0: the mix of all, 1: no class in common) {mean:.2f} on average.")
    few = int((rows["test"] < FEW_TEST_SAMPLES).sum())
    if few and not ratings:  # of which one is held out, whatever a user has
        lines.append(
            f"{few} of the clients have fewer than {FEW_TEST_SAMPLES} test samples: their accuracy says little."
        )
    return "\n".join(lines)
