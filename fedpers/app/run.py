"""``fedpers key=value ...``: compose the settings with Hydra and run, once or for every combination of a sweep."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpers.app.compose import register_choices, sentence
from fedpers.app.keys import check_choices, with_open_keys
from fedpers.app.result import exit_code, print_error, print_result
from fedpers.errors import ConfigError, FedpersError, one_of
from fedpers.run import run
from fedpers.settings import Config, build
from fedpers.settings.groups import conf_folder, group_names


def command(arguments: list[str]) -> int:
    """Compose with Hydra and run, once or for every combination of a sweep."""
    check_choices(arguments)
    arguments = with_open_keys(arguments)
    register_choices(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through; they become one sentence here
    before = sys.argv
    # options of Hydra, such as -m, may stand between settings: its parser takes settings in one piece only
    sys.argv = ["fedpers", *sorted(arguments, key=lambda a: not a.startswith("-") and ("=" in a or a.startswith("~")))]
    exit_codes: list[int] = []
    composed = False

    def job(cfg: Any) -> float | None:  # the validation score of the selected round, for sweepers that optimize
        nonlocal composed
        composed = True
        try:
            summary, folder = _run(cfg)
            score = print_result(summary, folder)
            exit_codes.append(exit_code(summary))
            return score
        except Exception as error:  # printed at once: Hydra would add lines, and end a sweep at its first failure
            exit_codes.append(print_error(error))
            return None

    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise sentence(error, arguments) from error
    except (TypeError, ValueError) as error:
        if composed:  # else Hydra's way of saying that it cannot make anything of an argument
            raise
        for key, _, value in (argument.lstrip("+").partition("=") for argument in arguments):
            names = group_names(key) if key else []
            if names and value not in names:
                raise ConfigError(key, value, one_of(names, value)) from error
        raise FedpersError(f"the settings cannot be read: {str(error).splitlines()[0].removesuffix('.')}.") from error
    except OSError as error:
        if error.filename is None:
            raise
        raise FedpersError(f"{error.filename}: {error.strerror}; choose another folder with output=.") from error
    finally:
        sys.argv = before
    return max(exit_codes, default=0)


def _run(cfg: Any) -> tuple[dict[str, Any], Path]:
    """Run one job; its summary and folder."""
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    wandb = (resolved["tracker"] or {}).get("wandb")
    if hydra_config.mode is RunMode.MULTIRUN and wandb is not None and wandb.get("group") is None:
        wandb["group"] = "_".join(Path(hydra_config.sweep.dir).parts[-2:])
    return run(build(Config, resolved), folder, resolved), folder
