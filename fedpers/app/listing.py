"""``fedpers list``: what there is to choose from."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpers import tasks
from fedpers.settings.base import choices
from fedpers.settings.groups import GROUPS, method_file, method_names
from fedpers.settings.model import KINDS as NETWORKS
from fedpers.settings.sources import SOURCES
from fedpers.tasks import Task

KINDS = {
    "datasets": "dataset",
    "partitions": "partition",
    "heterogeneity": "heterogeneity",
    "models": "model",
    "strategies": "strategy",
    "tasks": "",
}


def command(arguments: list[str]) -> int:
    """Print the names of one kind, each with a line on what it is; of data sets also where they come from."""
    parser = argparse.ArgumentParser(prog="fedpers list", description="What there is to choose from.")
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    kind = parser.parse_args(arguments).kind
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for name, line in _lines(kind).items():
        table.add_row(name, Text(line))
        if kind == "datasets":
            table.add_row("", _origin(name), style="dim")
    console = Console()
    console.print(table)
    group = KINDS[kind]
    if group in ("dataset", "model", "strategy"):
        console.print(f"One of your own: {group}=module:Name.", highlight=False)
    if group:
        console.print(f"Options of one: fedpers --help {group}=NAME", highlight=False)
    return 0


def _origin(name: str) -> str:
    """Source, licence and files of a data set."""
    return str(SOURCES[name]) if name in SOURCES else "files of your own, with the licence they have"


def _lines(kind: str) -> dict[str, str]:
    group = KINDS[kind]
    if group == "model":
        variants = {
            name: "{name} with model.norm={norm}".format(**values) for name, values in NETWORKS.items() if values
        }
        return choices(GROUPS[group]) | variants
    if group in GROUPS:
        return choices(GROUPS[group])
    if group == "strategy":
        return {name: _first_line(method_file(name).read_text(encoding="utf-8")) for name in method_names()}
    lines: dict[str, str] = {}
    for module in pkgutil.iter_modules(tasks.__path__):
        for _, value in inspect.getmembers(importlib.import_module(f"fedpers.tasks.{module.name}"), inspect.isclass):
            if issubclass(value, Task) and value is not Task:
                lines[value.name] = (value.__doc__ or "").strip().splitlines()[0]
    return lines


def _first_line(source: str) -> str:
    """First line of a module's docstring, after the method's name."""
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
