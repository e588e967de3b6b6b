"""``fedpers --help``: what can be typed, and every option of a choice with its default, range and meaning."""

from __future__ import annotations

import ast
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from fedpers.errors import ConfigError, one_of
from fedpers.settings import CheckpointConfig, Config, StopConfig, Training
from fedpers.settings.base import Option, Settings, choice_options, choices, options, plain
from fedpers.settings.groups import GROUPS, TRACKERS, conf_folder, group_names, method_file

USAGE = """\
fedpers - personalized federated learning

Run (settings are key=value, see below):
  fedpers strategy=ditto dataset=digits partition=dirichlet partition.alpha=0.1 seed=1
  fedpers -m strategy=local,fedavg,fedrep seed=0,1,2        every combination
  fedpers +experiment=demo                                  a preset

Subcommands:
  fedpers resume FOLDER [rounds=N] [runtime=...]      go on with a run that was stopped, after its last checkpoint
  fedpers resume SWEEP [hydra/launcher=...]           go on with a sweep: what is open or missing of it
  fedpers tune [--seed N] key=value,value ...         choose each method's settings on validation, then run all seeds
  fedpers export FOLDER [--client 3] [--round best]   a client's network, or the common one, as safetensors
  fedpers compare FOLDER... [--pivot KEY] [--csv]     leaderboard of the runs found in folders (compare --help: columns,
                                                      sorting, Markdown, CSV, JSON, a picture)
  fedpers report FOLDER... [--out FILE.html]          the same with pictures, as one page for a browser
  fedpers plot FOLDER --out FILE.svg                  curves of one run, and growth of its masks if it has any
  fedpers partition [key=value ...] [--plot FILE]     what each client owns, without training
  fedpers list datasets|partitions|strategies|...     what there is to choose from
  fedpers --help strategy=fedrep training             every option of a choice, with its range; the choices of a group
  fedpers --version

Settings people change:
  strategy    {strategy}
              strategy.KEY=VALUE for a method's own settings
  dataset     {dataset}      dataset.root=PATH
  partition   {partition}
              partition.alpha=0.1  partition.num_clients=10  partition.min_samples=40
  heterogeneity
              {heterogeneity}
              heterogeneity=[rotation,label_noise] for several
  split       {split}
  model       {model}
  training    training.lr=0.05 training.epochs=1 training.batch_size=10 training.optimizer=sgd|adam|adamw ...
  rounds=50   fraction=1.0 (of the clients, per round)   seed=0   evaluate_every=1   output=runs
  compression {compression}      compression.share=0.01  compression.bits=8
  privacy     {privacy}      privacy.noise=1  privacy.norm=1  privacy.delta=1e-5
  aggregation {aggregation}
  server_optimizer
              {server_optimizer}      server_optimizer.lr=0.01
  runtime     {runtime}
              runtime.clients_at_once=auto|N  runtime.workers=auto|N  runtime.device=auto|cpu|cuda[:i]
              runtime=ray runtime.address=HOST:PORT  runtime.actors=auto|N  runtime.gpus_per_actor=0.5
  clock       {clock}      clock.samples_per_second=100  clock.download=20  clock.upload=5
  checkpoint  checkpoint.every=10 (rounds; 0: none)  checkpoint.keep=1  checkpoint.best=true
  stop        stop.patience=10 (evaluations without a better score)  stop.target=0.9
  tracker     {tracker}, [wandb,tensorboard]
  +experiment {experiment}

Sweeps in parallel, searches (pip install 'fedpers[sweeps]'):
  fedpers -m hydra/launcher=joblib hydra.launcher.n_jobs=4 seed=0,1,2,3
  fedpers -m hydra/launcher=submitit_slurm hydra.launcher.partition=NAME seed=0,1,2,3
  fedpers -m hydra/sweeper=optuna hydra.sweeper.n_trials=20 'training.lr=tag(log,interval(0.01,1))'

All settings with their values:  fedpers --cfg job [key=value ...]
Further options of Hydra:        fedpers --hydra-help
"""

_GROUPS = (*GROUPS, "strategy", "tracker", "experiment")
_WITHOUT_CHOICE: dict[str, type[Settings]] = {
    "training": Training,
    "checkpoint": CheckpointConfig,
    "stop": StopConfig,
}


def command(arguments: list[str]) -> int:
    """Print how the command is used; or the options of each ``group=choice``, the choices of each ``group``.

    Raises
    ------
    ConfigError
        If there is no such group or choice.
    """
    if not arguments:
        usage = USAGE.format(**{group: ", ".join(group_names(group)) for group in _GROUPS})
        print("\n".join(_wrapped(line, 14) for line in usage.splitlines()))
    for argument in arguments:
        group, _, choice = argument.partition("=")
        print("\n".join(_wrapped(line, 6) for line in _described(group, choice)))
    return 0


def _wrapped(line: str, indent: int) -> str:
    """A line as wide as the terminal, or 120 characters; what goes on below is indented."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    if len(line) <= width:
        return line
    return textwrap.fill(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False,
    )  # fmt: skip


def _described(group: str, choice: str) -> Iterable[str]:
    """Lines about a choice, or about a group."""
    if group in _WITHOUT_CHOICE:
        return [group, *_lines(options(_WITHOUT_CHOICE[group]))]
    if group not in _GROUPS:
        known = {name: option for name, option in options(Config).items() if not option.nested and name not in _GROUPS}
        if group in known:
            return [group, *_table([known[group]])]
        method = f"; {group} is strategy={group}" if group in group_names("strategy") else ""
        raise ConfigError("--help", group, one_of((*_GROUPS, *_WITHOUT_CHOICE, *known), group) + method)
    names = group_names(group)
    if not choice:
        return [f"{group}=", *(f"  {name:<18} {_summary(group, name)}".rstrip() for name in names)]
    if choice not in names and not (group == "strategy" and ":" in choice):
        raise ConfigError(group, choice, one_of(names, choice))
    title = f"{group}={choice}  {_summary(group, choice)}".rstrip()
    return [title, *_lines(_options(group, choice)), *_preset(group, choice)]


def _options(group: str, choice: str) -> Mapping[str, Option]:
    """Options of a choice by name, its name left out."""
    if group == "strategy":
        from fedpers.strategies.registry import method_options

        return method_options(choice)
    if group == "tracker":
        return options(TRACKERS[choice]) if choice in TRACKERS else {}
    if group in GROUPS and choice in choices(GROUPS[group]):
        return {name: option for name, option in choice_options(GROUPS[group], choice).items() if name != "name"}
    return {}


def _lines(known: Mapping[str, Option]) -> list[str]:
    """A line on each option: those that count as they stand, then those of what is off unless it is typed."""
    on: list[Option] = []
    off: list[Option] = []
    for whole in known.values():
        shown = off if whole.nested and whole.default is None else on
        shown += options(whole.nested).values() if whole.nested else [whole]
    lines = _table(on)
    if off:
        title = "  By keys of their own, each off unless one of them is typed (the others then have these values):"
        lines += ["", title, *_table(off)]
    return lines


def _table(shown: Sequence[Option]) -> list[str]:
    keys = [f"{option.key}={'' if option.needed else _typed(option.default)}" for option in shown]
    width = max(map(len, keys), default=0)
    return [f"  {key:<{width}}  {_meaning(option)}" for key, option in zip(keys, shown, strict=True)]


def _meaning(option: Option) -> str:
    """What an option does and what it may be, without null where a value is needed."""
    if option.needed:
        return f"needed: {option.help.partition('; null: ')[0]}  [{option.allowed.removesuffix(', or null')}]"
    return f"{option.help or '-'}  [{option.allowed}]"


def _typed(value: Any) -> str:
    """A default as it would be typed."""
    value = "" if value is MISSING else plain(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{','.join(map(_typed, value))}]" if isinstance(value, list) else str(value)


def _summary(group: str, choice: str) -> str:
    """One line on a choice."""
    if group == "strategy" and ":" not in choice:  # the first line of its file, which need not be imported
        text = ast.get_docstring(ast.parse(method_file(choice).read_text(encoding="utf-8"))) or ""
        return text.partition("\n")[0]
    kind: type[Settings] | None = GROUPS.get(group)
    return "" if kind is None else choices(kind).get(choice, "")


def _preset(group: str, choice: str) -> list[str]:
    """What a file of ``conf/`` sets beside or in place of the defaults."""
    import yaml

    file = conf_folder() / group / f"{choice}.yaml"
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    chosen = [entry for entry in content.pop("defaults", []) if isinstance(entry, dict)]
    overrides = {key.removeprefix("override /"): value for entry in chosen for key, value in entry.items()}
    overrides = {key: value for key, value in overrides.items() if not key.startswith("/")}  # no files it is based on
    content.pop("hydra", None)
    prefix = "" if "@package _global_" in text else f"{group}."
    settings = [f"{key}={_typed(value)}" for key, value in (overrides | _flat(content, prefix)).items()]
    return [f"  sets {' '.join(settings)}"] if settings else []


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
