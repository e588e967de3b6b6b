"""``fedpers resume``: go on with a run that was stopped."""

from __future__ import annotations

import argparse
import logging.config
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedpers.app.result import exit_code, print_error, print_result
from fedpers.errors import FedpersError
from fedpers.run import resume
from fedpers.run.reopen import FinishedError, check_contents
from fedpers.settings.groups import conf_folder


def command(arguments: list[str]) -> int:
    """Go on with a run."""
    parser = argparse.ArgumentParser(prog="fedpers resume", description="Go on with a run after its last checkpoint.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="run folder")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="rounds, runtime, runtime.*, tracker, tracker.*, checkpoint.*, stop.*",
    )
    options = parser.parse_args(arguments)
    check_contents(options.folder)
    _log_to_folder(options.folder)
    try:
        summary = resume(options.folder, options.overrides)
    except FinishedError as error:
        print(error)
        return 0
    except Exception as error:  # wrong settings, a failed run, or an error in the user's own method
        return print_error(error)
    print_result(summary, options.folder.resolve())
    return exit_code(summary)


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
