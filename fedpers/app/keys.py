"""Arguments as Hydra needs them, and what a mistyped key may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from fedpers.errors import ConfigError, check, one_of
from fedpers.settings import Config
from fedpers.settings.base import RENAMED, Option, Settings, options, plain
from fedpers.settings.groups import GROUPS, group_names, method_names
from fedpers.settings.heterogeneity import SHIFTS
from fedpers.strategies.registry import method_options

OPEN_KEYS = (
    "training.groups",
    "dataset.arguments",
    "model.arguments",
    *(f"heterogeneity.{shift}" for shift in (*SHIFTS, "drift")),
)
"""Keys below which any name may be typed."""
_ELSEWHERE = {
    "learning_rate": "lr",
    "local_learning_rate": "lr",
    "local_epochs": "epochs",
    "num_epochs": "epochs",
    "num_rounds": "rounds",
    "global_rounds": "rounds",
    "comm_round": "rounds",
    "join_ratio": "fraction",
    "participation": "fraction",
    "clients": "num_clients",
    "n_clients": "num_clients",
    "num_users": "num_clients",
    "optim": "optimizer",
    "algorithm": "strategy",
    "method": "strategy",
    "data": "dataset",
    "gpu": "device",
    "gpus": "device",
    "cohort": "clients_at_once",
    "path": "root",
    "data_dir": "root",
}
"""What other libraries call a key, and its last part here."""


SERVER_OPTIMIZERS = {"fedavgm": "momentum", "fedadam": "adam", "fedyogi": "yogi"}
"""What papers call a method, and the server optimizer with which FedAvg is it."""
_OF_ONES_OWN = {
    "dataset": "; data of your own are dataset=npz, csv, parquet or images with dataset.root=PATH, ratings "
    "dataset=ratings dataset.root=FILE, a function dataset=module:function",
    "model": "; a network of your own is model=module:Class",
    "strategy": "; a method of your own is strategy=module:Class",
}
"""By group, what to type for parts of one's own; ends an error."""


def with_open_keys(arguments: Iterable[str]) -> list[str]:
    """Arguments in which names below open keys are added (``++``): Hydra takes none that it does not know.

    A list of shifts becomes the keys of each, with its defaults, ahead of what is typed for one of them: Hydra would
    keep the name of the last alone. ``dataset.name=module:function`` and ``model.name=module:Class`` become the choice
    of their group, without the options of another.

    Raises
    ------
    ConfigError
        If a list names something else than shifts, names one twice, or is one of several values.
    """
    arguments = list(arguments)
    arguments = [
        *(text for given in arguments if _is_list_of_shifts(given) for text in _shifts(given)),
        *(text for text in arguments if not _is_list_of_shifts(text)),
    ]
    starts = tuple(f"{key}{end}" for key in OPEN_KEYS for end in (".", "="))
    texts = [re.sub(r"^(dataset|model)\.name=(?=.*:)", r"\1=", text) for text in arguments]
    return [f"++{text}" if text.startswith(starts) else text for text in texts]


def _is_list_of_shifts(text: str) -> bool:
    return text.lstrip("+").startswith("heterogeneity=") and "[" in text


def _shifts(text: str) -> list[str]:
    """Settings that turn on each of a list of shifts."""
    key, _, value = text.lstrip("+").partition("=")
    one = value.startswith("[") and value.find("]") == len(value) - 1
    check(one, key, value, "a name, or one list of names, which cannot be varied in a sweep")
    names = [name.strip() for name in value[1:-1].split(",") if name.strip()]
    for name in names:
        check(name in SHIFTS, key, name, one_of(SHIFTS, name))
    check(len(set(names)) == len(names), key, value, "each shift once")
    if len(names) < 2:
        return [f"{key}={''.join(names) or 'none'}"]
    usual = {name: ",".join(f"{k}:{v}" for k, v in plain(SHIFTS[name]()).items()) for name in names}
    return [f"{key}=none", *(f"++{key}.{name}={{{values}}}" for name, values in usual.items())]


def check_choices(arguments: Iterable[str]) -> None:
    """Refuse a path where a choice is meant, which Hydra would take for a file of its own.

    Raises
    ------
    ConfigError
    """
    for text in arguments:
        group, _, value = text.lstrip("+").partition("=")
        if group in (*GROUPS, "strategy") and value.startswith(("/", "~", "./", "../")):
            hint = _OF_ONES_OWN.get(group, "")
            raise ConfigError(group, value, f"{one_of(group_names(group), value)}{hint}")


def meant(key: str, siblings: Iterable[str]) -> str:
    """What is allowed instead of an unknown key, in words.

    Parameters
    ----------
    key : str
        As it was typed.
    siblings : iterable of str
        Last parts of the keys that are known where it stands.
    """
    if key in RENAMED:
        return f"{RENAMED[key]}, as it is called now"
    siblings, name = list(siblings), key.rpartition(".")[2]
    known = dict(_known_keys())
    if choices := known.get(key):
        group = key.partition(".")[0]
        only = f"{name} is an option of {group}={', '.join(choices)} only"
        apart = ": give it in a command of its own, fedpers compare puts the runs of several into one table"
        return f"a known key: {one_of(siblings, name)}; {only}{apart if group == 'strategy' else ''}"
    if not difflib.get_close_matches(name, siblings, n=1, cutoff=0.8):
        last_parts = {full.rpartition(".")[2] for full in known}
        meanings = [part for part in (_ELSEWHERE.get(name), name) if part in last_parts]
        if not meanings:
            group = key.partition(".")[0]
            of_group = {f.partition(".")[2]: choices for f, choices in known.items() if f.startswith(f"{group}.")}
            if close := difflib.get_close_matches(name, of_group, n=1):  # before names that resemble it elsewhere
                choices = [] if close[0] in siblings else of_group[close[0]]
                only = f"; {close[0]} is an option of {group}={', '.join(choices)} only" if choices else ""
                return f"a known key: {one_of(siblings, name)}{only}"
            words = [*sorted(last_parts), *_ELSEWHERE]
            near = next(iter(difflib.get_close_matches(name, words, n=1, cutoff=0.8)), name)
            meanings = [_ELSEWHERE.get(near, near)]
        if places := [f for m in meanings for f in known if f.rpartition(".")[2] == m and f != key]:
            of_all = [full for full in places if not known[full]]  # rather than of some choice that is not on
            return f"{' or '.join(of_all or places)}, the whole name of that key"
    return f"a known key: {one_of(siblings, name)}"


def _known_keys() -> Iterator[tuple[str, list[str]]]:
    """Every key there is, with the choices that have it; none for one that all have."""
    yield from _below("", Config)
    for group, kind in GROUPS.items():
        yield from ((f"{group}.{name}", _owners(option)) for name, option in options(kind).items() if name != "name")
    owners: dict[str, list[str]] = {}
    for method in method_names():
        for name in method_options(method):
            owners.setdefault(f"strategy.{name}", []).append(method)
    yield from owners.items()


def _owners(option: Option) -> list[str]:
    only = option.only_for
    return [] if only is None else [*only.names, *only.defaults]


def _below(prefix: str, kind: type[Settings]) -> Iterator[tuple[str, list[str]]]:
    for name, option in options(kind).items():
        nested: type[Settings] | None = option.nested
        if nested is not None and name not in GROUPS:
            yield from _below(f"{prefix}{name}.", nested)
        else:
            yield f"{prefix}{name}", []
