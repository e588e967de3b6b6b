"""What a sweep varies, and what its jobs are called by it: their folders, and their labels on a screen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

_LONGEST = 100
"""Characters of a job's folder, which file systems and screens bear."""
_BY_THEMSELVES = ("strategy", "strategy.name", "dataset", "dataset.name", "seed")
"""Keys whose values a name holds without saying which they are."""


def as_typed(node: Any) -> Any:
    """Values of a part of Hydra's configuration as they were typed, in which ``${...}`` stands for nothing yet."""
    return {} if node is None else OmegaConf.to_container(node, resolve=False)


def swept(config: DictConfig) -> dict[str, Override]:
    """What a sweep varies: the overrides with several values, typed or of a preset, by key."""
    params = as_typed(config.hydra.sweeper.get("params"))
    texts = [*(f"{key}={value}" for key, value in params.items()), *as_typed(config.hydra.overrides.task)]
    last = {override.key_or_group: override for override in OverridesParser.create().parse_overrides(texts)}
    return {key: override for key, override in last.items() if override.is_sweep_override()}


def count_of(varied: Mapping[str, Override]) -> int | None:
    """How many combinations there are; None where a range of numbers is searched."""
    count = 1
    for override in varied.values():
        if not override.is_discrete_sweep():
            return None
        count *= sum(1 for _ in override.sweep_string_iterator())
    return count


def values_of(overrides: Sequence[str]) -> dict[str, str]:
    """Values of overrides by key, as they are typed."""
    pairs = (text.lstrip("+").partition("=") for text in overrides)
    return {key: value for key, _, value in pairs}


def quoted(text: str) -> str:
    """A value as Hydra takes it, whatever characters it has."""
    escaped = re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", "\\'")  # others stand for themselves
    return f"'{escaped}'"


@dataclass(frozen=True)
class Naming:
    """Names of a sweep's jobs.

    Parameters
    ----------
    varied : tuple of str
        Keys that the sweep varies.
    usual : mapping of str to str
        Values of ``strategy``, ``dataset`` and ``seed`` where a job does not say.
    """

    varied: tuple[str, ...]
    usual: Mapping[str, str]

    @classmethod
    def of(cls, config: DictConfig) -> Naming:
        """Names for a sweep as Hydra composed it."""
        usual = {"strategy": config.strategy.name, "dataset": config.dataset.name, "seed": config.seed}
        return cls(tuple(swept(config)), {key: str(value) for key, value in usual.items()})

    def label(self, overrides: Sequence[str]) -> str:
        """A job's name for readers: ``fedprox mu=0.1 seed=1``."""
        values = values_of(overrides)
        parts = [self._value(values, "strategy")]
        parts += [self._value(values, "dataset")] * ("dataset" in self.varied)
        parts += self._settings(values)
        parts += [f"seed={self._value(values, 'seed')}"] * ("seed" in self.varied)
        return " ".join(parts)

    def folder(self, number: int, overrides: Sequence[str]) -> str:
        """A job's folder: ``3_fedprox_digits_mu=0.1_seed1``."""
        values = values_of(overrides)
        parts = [self._value(values, "strategy"), self._value(values, "dataset"), *self._settings(values)]
        start, end = f"{number}_", f"_seed{self._value(values, 'seed')}"
        text = "_".join(part.replace(":", ".") for part in parts)
        middle = re.sub(r"[^\w.=+-]+", "-", re.sub(r"[\[\]{}'\"]", "", text), flags=re.ASCII)
        return start + middle[: _LONGEST - len(start) - len(end)].rstrip("._-") + end

    def settings(self, overrides: Sequence[str], keys: Sequence[str]) -> str:
        """Some of what is varied: ``lr=0.1 mu=1``."""
        values = values_of(overrides)
        return " ".join(f"{self._short(key)}={_short_value(values[key])}" for key in keys if key in values)

    def _settings(self, values: Mapping[str, str]) -> list[str]:
        shown = [key for key in self.varied if key not in _BY_THEMSELVES and key in values]
        return [f"{self._short(key)}={_short_value(values[key])}" for key in shown]

    def _value(self, values: Mapping[str, str], key: str) -> str:
        return _short_value(values.get(f"{key}.name", values.get(key, self.usual.get(key, ""))))

    def _short(self, key: str) -> str:
        """Last part of a key, where no other has the same."""
        last = key.rpartition(".")[2]
        return key if sum(other.rpartition(".")[2] == last for other in self.varied) > 1 else last


def _short_value(value: Any) -> str:
    """A value without quotes and escapes, and numbers that a search has drawn without digits that tell nothing."""
    text = re.sub(r"\\(.)", r"\1", str(value).strip("'\""))
    if re.fullmatch(r"-?\d+\.\d{5,}(e[+-]?\d+)?|-?\d\.\d+e[+-]?\d+", text):
        return f"{float(text):.4g}"
    return text
