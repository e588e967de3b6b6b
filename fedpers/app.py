"""The ``fedpers`` command: compose settings, run, compare."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedpers import __version__
from fedpers.errors import ConfigError, FedpersError, TrainingError, one_of

if TYPE_CHECKING:
    from fedpers.config import Config

USAGE = """\
fedpers - personalized federated learning

Run (settings are key=value, see below):
  fedpers strategy=ditto dataset=digits partition=dirichlet partition.alpha=0.1 seed=1
  fedpers -m strategy=local,fedavg,fedrep seed=0,1,2        every combination
  fedpers +experiment=demo                                  a preset

Subcommands:
  fedpers resume FOLDER [rounds=N] [runtime=...]      go on with a run that was stopped, after its last checkpoint
  fedpers compare FOLDER... [--json] [--svg FILE]     leaderboard of the runs found in folders
  fedpers plot FOLDER --out FILE.svg                  curves of one run, and growth of its masks if it has any
  fedpers --help | --version

Settings people change (choose = one of the files of conf/KEY):
  strategy    {strategy}
              strategy.KEY=VALUE for a method's own settings
  dataset     {dataset}      dataset.root=PATH
  partition   {partition}
              partition.alpha=0.1  partition.num_clients=20
  heterogeneity
              {heterogeneity}      split   {split}
  model       {model}
  training    training.lr=0.05 .epochs=1 .batch_size=10 .momentum=0 .optimizer=sgd|adam|adamw ...
  rounds=50   fraction=1.0 (of the clients, per round)   seed=0   evaluate_every=1   output=runs
  compression {compression}      compression.share=0.01  compression.bits=8
  privacy     {privacy}      privacy.noise=1  privacy.norm=1  privacy.delta=1e-5
  aggregation {aggregation}
  runtime     {runtime}
              runtime.cohort=auto|N  runtime.workers=auto|N  runtime.device=auto|cpu|cuda[:i]
              runtime=ray runtime.address=HOST:PORT  runtime.actors=auto|N  runtime.gpus_per_actor=0.5
  checkpoint  checkpoint.every=10 (rounds; 0: none)  checkpoint.keep=1
  tracker     none, wandb, tensorboard, [wandb,tensorboard]
  +experiment {experiment}

All settings with their values:  fedpers --cfg job [key=value ...]
Further options of Hydra:        fedpers --hydra-help
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (a run failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM)."""
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"fedpers {__version__}")
        return 0
    first = arguments[0]
    try:
        if "output=" in arguments:
            raise ConfigError("output", "", "a folder")
        if first in SUBCOMMANDS:
            return SUBCOMMANDS[first](arguments[1:])
        if not first.startswith("-") and "=" not in first and not first.startswith("~"):
            known = one_of(SUBCOMMANDS, first)
            raise FedpersError(f"'{first}' is neither a setting (key=value) nor a subcommand: {known}.")
        return _run(arguments)
    except TrainingError as error:
        print(f"fedpers: {error}", file=sys.stderr)
        return 1
    except FedpersError as error:
        print(f"fedpers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        told = getattr(stop, "told", "") or "interrupted; what a run has done so far is kept in its folder"
        print(f"fedpers: {told}.", file=sys.stderr)
        return int(getattr(stop, "exit_code", 130))


def _usage() -> str:
    def options(group: str) -> str:
        from fedpers.config import conf_folder

        return ", ".join(sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")))

    groups = (
        "strategy",
        "dataset",
        "partition",
        "heterogeneity",
        "split",
        "model",
        "compression",
        "privacy",
        "aggregation",
        "runtime",
        "experiment",
    )
    return USAGE.format(**{group: options(group) for group in groups})


# ----------------------------------------------------------------------- run


def _run(arguments: list[str]) -> int:
    """Compose with Hydra and run, once or for every combination of a sweep."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from fedpers.config import conf_folder

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through; they become one sentence here
    before = sys.argv
    sys.argv = ["fedpers", *arguments]
    failed: list[int] = []
    composed = False

    def job(cfg: Any) -> float | None:
        nonlocal composed
        composed = True
        try:
            return _job(cfg)
        except FedpersError as error:  # told here: Hydra would add lines, and end a sweep at its first failure
            print(f"fedpers: {error}", file=sys.stderr)
            failed.append(1 if isinstance(error, TrainingError) else 2)
            return None

    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise _sentence(error, arguments) from error
    except (TypeError, ValueError) as error:
        if composed:  # else Hydra's way of saying that it cannot make anything of an argument
            raise
        for key, _, value in (argument.lstrip("+").partition("=") for argument in arguments):
            options = [path.stem for path in (conf_folder() / key).glob("*.yaml")] if key else []
            if options and value not in options:
                raise ConfigError(key, value, one_of(options, value)) from error
        raise FedpersError(f"the settings cannot be read: {str(error).splitlines()[0].removesuffix('.')}.") from error
    except OSError as error:
        if error.filename is None:
            raise
        raise FedpersError(f"{error.filename}: {error.strerror}; choose another folder with output=.") from error
    finally:
        sys.argv = before
    return max(failed, default=0)


def composed(overrides: Sequence[str]) -> Config:
    """Settings made of ``key=value`` overrides, as the command makes them, without starting a run.

    Raises
    ------
    FedpersError
        If an override cannot be used.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from fedpers.config import Config, build, conf_folder

    try:
        with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
            cfg = compose("config", overrides=list(overrides))
        return build(Config, cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))
    except (HydraException, OmegaConfBaseException) as error:
        raise _sentence(error, overrides) from error


def _job(cfg: Any) -> float | None:
    """One job; returns the validation score of the selected round, for sweepers that optimize."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from fedpers.config import Config, build
    from fedpers.run import run

    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    folder = Path(HydraConfig.get().runtime.output_dir)
    return _tell(run(build(Config, resolved), folder, resolved), folder)


def _tell(summary: Mapping[str, Any], folder: Path) -> float | None:
    """Print a run's result in one line; return the validation score of the selected round."""
    selected, headline = summary["selected"], summary["headline"]
    chosen = "validation" if summary["protocol"] == "validation-selected" else "test, as published"
    print(
        f"{summary['strategy']} on {summary['dataset']}, seed {summary['seed']}: test {headline} "
        f"{_percent(selected.get(f'test/{headline}'))} at round {summary['selected_round']} (chosen on {chosen}), "
        f"{_percent(summary['last'].get(f'test/{headline}'))} at round {summary['last_round']}"
        f"{_unseen(summary['last'], headline)}; "
        f"{summary['seconds']:.1f} s; {_shown(folder)}{_left_out(summary['failures'])}"
    )
    score: float | None = selected.get(f"validation/{headline}")
    return score


def _unseen(last: Mapping[str, float | None], headline: str) -> str:
    if f"unseen/{headline}" not in last:
        return ""
    adapted = last.get(f"adapted/{headline}")
    return f", unseen clients {_percent(last[f'unseen/{headline}'])}, {_percent(adapted)} after adapting"


def _left_out(failures: int) -> str:
    return f"; {failures} client replies were unusable and left out (see run.log)" if failures else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _shown(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _sentence(error: Exception, arguments: Sequence[str]) -> FedpersError:
    """One sentence for what Hydra says in several lines."""
    from hydra.errors import OverrideParseException

    text = str(error)
    if found := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, name = found.groups()
        from fedpers.config import conf_folder

        options = [path.stem for path in (conf_folder() / group).glob("*.yaml")]
        return ConfigError(group, name, one_of(options, name))
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        given = next((a.partition("=")[2] for a in arguments if a.lstrip("+~").partition("=")[0] == key), "")
        *parents, name = key.split(".")
        while parents and not _keys(".".join(parents), key, arguments):  # the mistake is further up
            name = parents.pop()
        return ConfigError(key, given, f"a known key: {one_of(_keys('.'.join(parents), key, arguments), name)}")
    if isinstance(error, OverrideParseException):
        hint = "values with special characters need quotes within quotes, as in 'output=\"my runs\"'"
        return FedpersError(f"'{error.override}' cannot be read as key=value; {hint}.")
    first = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return FedpersError(first.removesuffix(".") + ".")


def _keys(parent: str, offending: str, arguments: Sequence[str]) -> list[str]:
    """Keys that exist under `parent` when the offending override is left out."""
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    from fedpers.config import conf_folder

    kept = [a for a in arguments if "=" in a and "," not in a and not a.startswith("-") and not a.startswith(offending)]
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        try:
            cfg = compose("config", overrides=kept)
        except Exception:  # another override is wrong as well: name the keys of the defaults
            cfg = compose("config")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


# ------------------------------------------------------------------- compare


def _compare(arguments: list[str]) -> int:
    """Print the leaderboard of the runs in folders."""
    import json

    from fedpers.evaluation.compare import find_runs, leaderboard_rows, print_leaderboard

    parser = argparse.ArgumentParser(prog="fedpers compare", description="Leaderboard of the runs found in folders.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders above them")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="also draw the tables into a picture")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    runs = find_runs(options.folders)
    if not runs:
        raise FedpersError(f"no finished run was found in {', '.join(options.folders)}.")
    if options.json:
        print(json.dumps(leaderboard_rows(runs), indent=1))
    else:
        print_leaderboard(runs)
    if options.svg:
        from rich.console import Console

        picture = Console(record=True, width=100, file=io.StringIO())
        print_leaderboard(runs, picture)
        try:
            picture.save_svg(str(options.svg), title="fedpers compare")
        except OSError as error:
            raise FedpersError(f"{options.svg} cannot be written ({error.strerror}).") from error
    return 0


def _plot(arguments: list[str]) -> int:
    """Draw one run."""
    from fedpers.evaluation.plots import plot_run

    parser = argparse.ArgumentParser(prog="fedpers plot", description="Curves of one run, and growth of its masks.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="run folder, or a folder above a single run")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="picture to write: .svg, .png, .pdf")
    options = parser.parse_args(arguments)
    plot_run(options.folder, options.out)
    return 0


def _resume(arguments: list[str]) -> int:
    """Go on with a run."""
    from fedpers.resume import FinishedError, check_contents
    from fedpers.run import resume

    parser = argparse.ArgumentParser(prog="fedpers resume", description="Go on with a run after its last checkpoint.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="run folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="rounds, runtime, runtime.*, tracker, tracker.*, checkpoint.*"
    )
    options = parser.parse_args(arguments)
    check_contents(options.folder)
    _log_into(options.folder)
    try:
        _tell(resume(options.folder, options.overrides), options.folder.resolve())
    except FinishedError as error:
        print(error)
    return 0


def _log_into(folder: Path) -> None:
    """Set up logging as Hydra does for a run in `folder`."""
    import logging.config

    from omegaconf import OmegaConf

    from fedpers.config import conf_folder

    file = conf_folder() / "hydra" / "job_logging" / "fedpers.yaml"
    settings: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    settings["handlers"]["file"]["filename"] = str(folder.resolve() / "run.log")
    logging.config.dictConfig(settings)


SUBCOMMANDS: dict[str, Callable[[list[str]], int]] = {"compare": _compare, "plot": _plot, "resume": _resume}

if __name__ == "__main__":
    main()
