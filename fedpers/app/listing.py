"""``fedpers list``: what there is to choose from."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpers import tasks
from fedpers.errors import FedpersError, one_of
from fedpers.settings.base import choices
from fedpers.settings.groups import GROUPS, method_docstring, method_names
from fedpers.settings.model import KINDS as NETWORKS
from fedpers.settings.sources import SOURCES
from fedpers.tasks import Task

KINDS = {
    "datasets": "dataset",
    "partitions": "partition",
    "heterogeneity": "heterogeneity",
    "models": "model",
    "strategies": "strategy",
    "methods": "strategy",  # as they are called everywhere else
    "tasks": "",
}


def command(arguments: list[str]) -> int:
    """Print the names of one kind, each with a line on what it is.

    Of data sets also where they come from, of methods the year and what clients share and keep.
    """
    parser = argparse.ArgumentParser(prog="fedpers list", description="What there is to choose from.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    kind = parser.parse_args(arguments).kind
    if kind not in KINDS:
        raise FedpersError(f"fedpers list {kind or 'KIND'}: expected {one_of(KINDS, kind or '')}.")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for name, line in _lines(kind).items():
        table.add_row(name, Text(line))
        if kind == "datasets":
            table.add_row("", _origin(name), style="dim")
        elif KINDS[kind] == "strategy":
            table.add_row("", Text(str(describe_method(name))), style="dim")
    console = Console()
    console.print(table)
    group = KINDS[kind]
    if group in ("dataset", "model", "strategy"):
        console.print(f"One of your own: {group}=module:Name.", highlight=False)
    if group:
        console.print(f"Options of one: fedpers --help {group}=NAME", highlight=False)
    if group == "strategy":
        console.print(
            "Messages, bytes and traces of each: experiments/standard_set/methods.md of the repository", highlight=False
        )
    return 0


class MethodDescription(NamedTuple):
    """What a method's file says of it."""

    summary: str
    """The method's name and what it does."""
    year: str
    """Of the paper; empty where there is none."""
    shared: str
    """What of a client's state is averaged or otherwise combined with that of others."""
    personal: str
    """What stays with the client."""

    def __str__(self) -> str:
        return f"{self.year}{'. ' * bool(self.year)}Shared: {self.shared}. Personal: {self.personal}."


def describe_method(name: str) -> MethodDescription:
    """Read what the docstring of a method's file says: its first line, source, and ``Shared: ... Personal: ...``."""
    text = method_docstring(name)
    first, _, rest = text.partition("\n\n")
    source = rest.partition("\n\n")[0]
    years = re.findall(r"\b(?:19|20)\d\d\b(?!\.\d)", source)
    arxiv = re.findall(r"arXiv:(\d\d)\d\d\.\d+", source)
    year = years[0] if years else f"20{arxiv[0]}" if arxiv else ""
    match = re.search(r"Shared:\s(.*?)\.\s+Personal:\s(.*?)\.(?:\s|$)", text, re.DOTALL)
    parts = match.groups() if match else ("-", "-")
    # what stands in brackets, and sentences after the first, explain; `x` and references to classes are markup
    shared, personal = (" ".join(re.sub(r"\s\([^)]*\)|`", "", part).partition(". ")[0].split()) for part in parts)
    return MethodDescription(" ".join(first.split()), year, shared, personal)


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
        return {name: describe_method(name).summary for name in method_names()}
    lines: dict[str, str] = {}
    for module in pkgutil.iter_modules(tasks.__path__):
        for _, value in inspect.getmembers(importlib.import_module(f"fedpers.tasks.{module.name}"), inspect.isclass):
            if issubclass(value, Task) and value is not Task:
                lines[value.name] = (value.__doc__ or "").strip().splitlines()[0]
    return lines
