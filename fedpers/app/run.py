"""``fedpers key=value ...``: compose the settings with Hydra and run, once or for every combination of a sweep."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpers.app.compose import register_choices, sentence
from fedpers.app.keys import check_choices, with_open_keys
from fedpers.app.result import exit_code, print_error, print_result, shown
from fedpers.app.sweeps.jobs import perform
from fedpers.app.sweeps.launch import Sweep
from fedpers.app.sweeps.names import as_typed
from fedpers.app.sweeps.plugins import (
    check_plugins,
    check_single,
    launching_through,
    not_instantiated,
    with_search_defaults,
)
from fedpers.app.sweeps.record import Record
from fedpers.errors import ConfigError, FedpersError, one_of
from fedpers.run import run
from fedpers.run.signals import Interrupted
from fedpers.settings import Config, build
from fedpers.settings.base import options
from fedpers.settings.groups import conf_folder, group_names


def command(arguments: list[str]) -> int:
    """Compose with Hydra and run, once or for every combination of a sweep."""
    return execute(arguments, Record(arguments))


class _Job:
    """What Hydra calls for each run, in whichever process its launcher has chosen."""

    def __init__(self) -> None:
        self.composed = False
        self.exit_code = 0

    def __call__(self, cfg: Any) -> float | None:
        """Run; the validation score of the selected round, for sweepers that optimize."""
        self.composed = True
        context = HydraConfig.get()
        resolved: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        folder = Path(context.runtime.output_dir)
        if context.mode == RunMode.MULTIRUN:
            wandb = (resolved["tracker"] or {}).get("wandb")
            if wandb is not None and wandb.get("group") is None:
                wandb["group"] = "_".join(Path(context.sweep.dir).parts[-2:])
            return perform(resolved, folder)
        try:
            check_single(as_typed(context.overrides.hydra))
            summary = run(build(Config, resolved), folder, resolved)
            self.exit_code = exit_code(summary)
            return print_result(summary, folder)
        except KeyboardInterrupt as stop:
            if getattr(stop, "reason", ""):
                raise
            raise Interrupted(signal.SIGINT, f"interrupted; what the run has done is in {shown(folder)}") from stop
        except Exception as error:  # printed at once: Hydra would add lines
            self.exit_code = print_error(error)
            _remove_if_unused(folder, Path(resolved["output"]))
            return None


def _remove_if_unused(folder: Path, output: Path) -> None:
    """Remove ``output/DATE/RUN``, which Hydra made for a run that then was refused; a folder of another place stays."""
    log_file = folder / "run.log"
    made = folder.absolute().parent.parent == output.absolute()
    if not made or {path.name for path in folder.iterdir()} - {".hydra", log_file.name}:
        return
    if log_file.exists() and log_file.stat().st_size:
        return
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        if Path(handler.baseFilename) == log_file.absolute():  # it would open the file with the next line
            root.removeHandler(handler)
            handler.close()
    shutil.rmtree(folder)
    with suppress(OSError):  # the folder of the date, unless other runs are there
        folder.parent.rmdir()


def execute(arguments: list[str], record: Record) -> int:
    """Run, or do what is not done yet of a sweep.

    Parameters
    ----------
    arguments : list of str
        For Hydra.
    record : Record
        Of the sweep, if it becomes one.
    """
    _check_dashes(arguments)
    check_choices(arguments)
    check_plugins(arguments)
    arguments = with_search_defaults(with_open_keys(arguments))
    register_choices(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through; they become one sentence here
    before = sys.argv
    # options of Hydra, such as -m, may stand between settings: its parser takes settings in one piece only
    sys.argv = ["fedpers", *sorted(arguments, key=lambda a: not a.startswith("-") and ("=" in a or a.startswith("~")))]
    job, sweep = _Job(), Sweep(record)
    try:
        with launching_through(sweep), _mode_as_typed(arguments):
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        if impossible := not_instantiated(error, arguments):
            raise impossible from error
        raise sentence(error, arguments) from error
    except ImportError as error:
        if impossible := not_instantiated(error, arguments):
            raise impossible from error
        raise
    except (TypeError, ValueError) as error:
        if isinstance(error, FedpersError):
            raise
        if not sweep.has_failed_only():  # else of a search without a single score, and the reasons follow
            _explain(error, arguments, job.composed or sweep.has_begun)
    except OSError as error:
        if error.filename is None:
            raise
        raise FedpersError(f"{error.filename}: {error.strerror}; choose another folder with output=.") from error
    finally:
        sys.argv = before
        sweep.close()
    if not sweep.has_begun:
        return job.exit_code
    results, failures = sweep.report()
    print("\n".join(results))
    sys.stdout.flush()
    if failures:
        print("\n".join(failures), file=sys.stderr)
    return sweep.exit_code()


def _check_dashes(arguments: list[str]) -> None:
    """Refuse ``--rounds 3`` in a sentence, of which Hydra would print the usage of its own options."""
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, given = argument.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if argument.startswith("--") and key.partition(".")[0] in {*options(Config), "hydra"}:
            given = given if equals else value if "=" not in value and not value.startswith("-") else "VALUE"
            raise FedpersError(f"'{argument}': settings are typed as key=value, without dashes: {key}={given}.")


@contextmanager
def _mode_as_typed(arguments: list[str]) -> Iterator[None]:
    """Spare Hydra a composition, to see whether ``hydra.mode`` is set, where nothing that is typed can set it."""
    may_set_it = ("-", "+", "~", "hydra", "experiment")
    if any(text.startswith(may_set_it) for text in arguments if text not in ("-m", "--multirun")):
        yield
        return
    get_mode = Hydra.get_mode
    Hydra.get_mode = lambda self, config_name, overrides: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = get_mode  # type: ignore[method-assign]


def _explain(error: Exception, arguments: list[str], composed: bool) -> None:
    """Raise what Hydra means by an error when it cannot make anything of an argument."""
    if composed:
        raise error
    for key, _, value in (argument.lstrip("+").partition("=") for argument in arguments):
        names = group_names(key) if key else []
        if names and value not in names:
            raise ConfigError(key, value, one_of(names, value)) from error
    raise FedpersError(f"the settings cannot be read: {str(error).splitlines()[0].removesuffix('.')}.") from error
