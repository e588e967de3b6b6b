"""``fedpers resume``: go on with a run, or a sweep, that was stopped."""

from __future__ import annotations

import argparse
import logging.config
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedpers.app.result import exit_code, print_error, print_result
from fedpers.app.sweeps.names import quoted
from fedpers.app.sweeps.record import FILE, Record, check_arguments, is_about_place, without_place
from fedpers.errors import FedpersError
from fedpers.evaluation.runs import ERROR_FILE
from fedpers.run import resume
from fedpers.run.reopen import FinishedError, check_contents, check_links
from fedpers.settings.groups import conf_folder


def command(arguments: list[str]) -> int:
    """Go on with a run, or with what is not done of a sweep."""
    parser = argparse.ArgumentParser(
        prog="fedpers resume",
        description="Go on with a run after its last checkpoint, or with the runs of a sweep that are not done.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a run or of a sweep")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", default=[],
        help="what is to change; of a run: rounds, runtime, runtime.*, tracker, tracker.*, "
        "checkpoint.*, stop.*; of a sweep: hydra/launcher, hydra.launcher.*",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if (options.folder / FILE).is_file():
        return _resume_sweep(options.folder, options.overrides)
    if not (options.folder / "config.yaml").exists() and (options.folder / "multirun.yaml").exists():
        raise FedpersError(
            f"{options.folder} holds a sweep without {FILE}, of an earlier version: its runs are resumed one by one."
        )
    check_contents(options.folder)
    _log_to_folder(options.folder)
    try:
        summary = resume(options.folder, options.overrides)
    except FinishedError as error:
        print(error)
        return 0
    except Exception as error:  # wrong settings, a failed run, or an error in the user's own method
        return print_error(error)
    (options.folder / ERROR_FILE).unlink(missing_ok=True)
    print_result(summary, options.folder.resolve())
    return exit_code(summary)


def _resume_sweep(folder: Path, typed: list[str]) -> int:
    """Go on with a sweep: what its record asks for beyond settings counts only when it is typed again."""
    from fedpers.app.run import execute

    check_links(folder)
    record = Record.read(folder)
    for text in typed:
        if text not in record.arguments and not text.startswith(("hydra/launcher=", "hydra.launcher.")):
            raise FedpersError(
                f"{text} is not what the sweep in {folder} has: only hydra/launcher and hydra.launcher.* may change."
            )
    arguments = [text for text in record.arguments if not text.startswith("hydra.sweep.dir=")]
    if any(text not in arguments for text in typed):
        arguments = without_place(arguments)
        arguments += [text for text in typed if is_about_place(text)]
    check_arguments(replace(record, arguments=arguments), typed, folder)
    sweeping = ["-m"] if record.tunes else []
    place = f"hydra.sweep.dir={quoted(str(folder))}"
    return execute([*sweeping, *arguments, place], replace(record, arguments=arguments))


def _log_to_folder(folder: Path) -> None:
    """Set up logging as Hydra does for a run in `folder`."""
    file = conf_folder() / "hydra" / "job_logging" / "fedpers.yaml"
    log_file = folder.resolve() / "run.log"
    if log_file.exists() and not os.access(log_file, os.W_OK):
        raise FedpersError(f"{log_file} may not be written: the run is not resumed.")
    # not resolved: Hydra alone knows what its file name stands for, and it is replaced
    settings: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    settings["handlers"]["file"]["filename"] = str(log_file)
    logging.config.dictConfig(settings)
