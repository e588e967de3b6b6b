"""The ``fedpers`` command: one file for each subcommand. Nothing that is heavy is imported before it is used."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from fedpers import __version__
from fedpers.errors import ConfigError, FedpersError, TrainingError, one_of

SUBCOMMANDS = {
    "compare": "compare", "export": "export", "list": "listing", "partition": "partition", "plot": "plot",
    "report": "report", "resume": "resume", "tune": "tune",
}  # fmt: skip
"""Subcommands, and the file of each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (a run failed), 2 (bad input), 3 (no round to select), 130 or 143 (signals)."""
    code = 1

    def leave() -> None:
        if "ray" in sys.modules:
            _leave(code)

    atexit.register(leave)  # called last: before whatever is registered by what is imported from now on
    try:
        code = _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, as in "fedpers compare FOLDER | head", has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"fedpers {__version__}")
        return 0
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            return int(_load("help").command(arguments[1:]))
        first = arguments[0]
        if "output=" in arguments:
            raise ConfigError("output", "", "a folder")
        if first in SUBCOMMANDS:
            return int(_load(SUBCOMMANDS[first]).command(arguments[1:]))
        if not first.startswith(("-", "~")) and "=" not in first:
            known = one_of(SUBCOMMANDS, first)
            raise FedpersError(f"'{first}' is neither a setting (key=value) nor a subcommand: {known}.")
        return int(_load("run").command(arguments))
    except FedpersError as error:
        print(f"fedpers: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt as stop:
        reason = getattr(stop, "reason", "") or "interrupted; what a run has done so far is kept in its folder"
        print(f"fedpers: {reason}.", file=sys.stderr)
        code = int(getattr(stop, "exit_code", 130))
        if "ray" in sys.modules and import_module("fedpers.runtime.cluster").has_ended():
            _leave(code)  # Ray's own way out waits for processes that were stopped too, or aborts
        return code


def _leave(code: int) -> NoReturn:
    """End this process without C++'s destructors: Ray's threads outlive ``ray.shutdown``, and some end in a crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _load(subcommand: str) -> ModuleType:
    """Import a subcommand's file."""
    name = f"fedpers.app.{subcommand}"
    if name in sys.modules or not gc.isenabled():
        return import_module(name)
    gc.disable()  # imports leave next to no garbage, and looking for it takes 0.3 s of PyTorch's and Flower's 1.9
    try:
        return import_module(name)
    finally:
        gc.freeze()  # what was imported stays to the end, and need not be looked at again
        gc.enable()
