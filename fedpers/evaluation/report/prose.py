"""What a report says in words: warnings, settings, and a paragraph on methods for a paper."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpers.evaluation.leaderboard import BASELINES, Group
from fedpers.evaluation.report.contents import Method
from fedpers.evaluation.runs import RunRecord, differing
from fedpers.settings.groups import method_title

_SHIFTS = ("name", "strength", "groups")


def baselines_of(run: RunRecord) -> tuple[str, ...]:
    """Strategies that a method has to beat in runs like this one."""
    return tuple(map(str, run.summary.get("baselines") or BASELINES))


def warnings(methods: Sequence[Method]) -> list[str]:
    """What makes the numbers of a group worth less than they look."""
    runs = [run for method in methods for run in method.runs]
    said = []
    absent = [name for name in baselines_of(runs[0]) if not any(method.row.strategy == name for method in methods)]
    if absent:
        said.append(
            f"No run of {' and none of '.join(map(method_title, absent))}: whether personalization pays cannot be seen "
            f"without. Add strategy={','.join(absent)} to the sweep."
        )
    if names := sorted({run.strategy for run in runs if run.selected_on == "test"}):
        said.append(f"The round was selected on test data ({', '.join(names)}): these scores are too high by design.")
    if all(len(method.row.seeds) == 1 for method in methods):
        said.append("One seed: differences between methods may be chance. Add seed=0,1,2,3,4 to the sweep.")
    stopped = [f"{run.folder} ({run.summary.get('rounds_done')} of {run.summary.get('rounds')} rounds)"
               for run in runs if run.summary.get("interrupted")]  # fmt: skip
    if stopped:
        said.append(f"Not finished: {listed(stopped, 5)}.")
    return said


def settings_in_common(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """Settings that all runs of a group share, by key."""
    runs = [run for method in methods for run in method.runs]
    shared = dict(runs[0].comparable)
    trainings = [run.training for run in runs]
    shared |= {f"training.{k}": v for k, v in trainings[0].items() if all(t.get(k) == v for t in trainings)}
    return [(key, _written(value)) for key, value in sorted(shared.items())]


def settings_that_differ(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """The settings of each method: its options, and what of training is not the same for all."""
    trainings = [run.training for method in methods for run in method.runs]
    described = []
    for method in methods:
        run = method.runs[0]
        options = [f"{key}={_written(value)}" for key, value in run.options.items() if value is not None]
        options = [option for option in options if option != "server_optimizer=none"]
        training = [f"training.{setting}" for setting in differing(run.training, trainings)]
        described.append((method.row.label, " ".join([*options, *training]) or "-"))
    return described


def paragraph(group: Group, methods: Sequence[Method]) -> str:
    """How the numbers of a group came about, for the section on methods of a paper."""
    run = methods[0].runs[0]
    summary, config, manifest = run.summary, run.config, _manifest(run.folder)
    return " ".join(
        sentence
        for sentence in (
            _data_sentence(summary, config, manifest),
            _training_sentence(summary, config, methods),
            _selection_sentence(group, methods),
            _tests_sentence(group, methods),
            _software_sentence(manifest),
        )
        if sentence
    )


def _data_sentence(summary: Mapping[str, Any], config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    sizes = _named_values(_named_values(manifest.get("data")).get("samples"))
    samples = [f"{_count(sizes[part])} {what}" for part, what in
               (("train", "training"), ("validation", "validation"), ("test", "test")) if part in sizes]  # fmt: skip
    clients = f"{_count(summary['num_clients'])} clients" if "num_clients" in summary else "clients"
    text = f"The data set {summary.get('dataset', '')} "
    text += f"({', '.join(samples)} samples) " if samples else ""
    text += f"was divided among {clients} (partition {summary.get('partition', 'unknown')})"
    shifts = _shifts(config)
    text += f", with {listed(shifts, 20)} as further heterogeneity" if shifts else ""
    if summary.get("num_unseen"):
        text += f"; {summary['num_unseen']} of them never train and are measured as newcomers"
    return f"{text}."


def _shifts(config: Mapping[str, Any]) -> list[str]:
    shift = config.get("heterogeneity")
    if not isinstance(shift, Mapping):
        return []
    names = [shift.get("name"), *(key for key, value in shift.items() if value is not None and key not in _SHIFTS)]
    return list(dict.fromkeys(str(name) for name in names if name not in (None, "none")))


def _training_sentence(summary: Mapping[str, Any], config: Mapping[str, Any], methods: Sequence[Method]) -> str:
    trainings = [run.training for method in methods for run in method.runs]
    training = trainings[0]
    differ = {item.partition("=")[0] for other in trainings for item in differing(other, trainings)}
    fraction = config.get("fraction")
    share = ""
    if isinstance(fraction, float) and fraction < 1:
        share = f" with {100 * fraction:g} % of the clients each"
    text = f"All methods trained the network {summary.get('model', '?')} for {summary.get('rounds', '?')} rounds{share}"
    if training.get("budget") is not None and "budget" not in differ:
        text += f", ended once clients had computed {training['budget']} gradients each in the mean"
    known_amounts = () if "steps" in differ else ("steps", "epochs")
    amounts = [key for key in known_amounts if training.get(key) and key not in differ]
    local = [f"{training[key]} local {key if training[key] != 1 else key[:-1]}" for key in amounts[:1]]
    known = (("optimizer", "optimizer {}"), ("lr", "learning rate {}"), ("batch_size", "batches of {}"),
             ("momentum", "momentum {}"), ("weight_decay", "weight decay {}"))  # fmt: skip
    local += [form.format(training[key]) for key, form in known if training.get(key) and key not in differ]
    text += f" ({', '.join(local)})" if local else ""
    text += f"; {listed(sorted(differ), 20)} differ between methods and are listed with them" if differ else ""
    low, high = (f([g for m in methods if (g := m.row.gradients) > 0] or [0.0]) for f in (min, max))
    if high > 1.05 * low:
        text += f". Methods differ in the gradients they computed ({low:,.0f} to {high:,.0f} per run)"
    return f"{text}."


def _selection_sentence(group: Group, methods: Sequence[Method]) -> str:
    parts = {run.selected_on for method in methods for run in method.runs}
    seeds = sorted({seed for method in methods for seed in method.row.seeds})
    intervals = any(math.isfinite(method.row.interval) for method in methods)
    where = {
        frozenset(
            {"validation"}
        ): f"The round was selected by mean {group.headline} on the clients' validation samples",
        frozenset({"test"}): f"The round was selected by mean {group.headline} on test samples",
        frozenset({"nothing"}): "The last round is reported",
    }.get(frozenset(parts), f"The round was selected on {listed(sorted(parts), 5)} data, depending on the method")
    return (
        f"{where}; we report test {group.headline} as the mean over all clients that train, each counting the "
        f"same, whether or not they took part in that round, averaged over {len(seeds)} "
        f"seed{'s' if len(seeds) > 1 else ''} "
        f"({listed(map(str, seeds), 12)})" + (" with 95 % confidence intervals (Student's t)." if intervals else ".")
    )


def _tests_sentence(group: Group, methods: Sequence[Method]) -> str:
    made = [comparison for row in group.rows for comparison in row.comparisons]
    tested = [comparison for comparison in made if comparison.verdict != "untested"]
    if not tested:
        return "Differences were not tested." if len(methods) > 1 else ""
    against = listed(dict.fromkeys(method_title(comparison.reference) for comparison in tested), 5, "and")
    over = {comparison.over for comparison in tested}
    means = [text for key, text in (
        ("seeds", "paired t-tests over common seeds"),
        ("clients", "a paired bootstrap over the clients of common seeds, which speaks of other clients, not "
         "other seeds"),
    ) if key in over]  # fmt: skip
    return (
        f"Differences from {against} were tested by {' or '.join(means)} (two-sided, 5 %), with Holm's correction over "
        "the methods compared with the same reference."
    )


def _software_sentence(manifest: Mapping[str, Any]) -> str:
    versions = _named_values(manifest.get("versions"))
    names = {"fedpers": "fedpers", "flwr": "Flower", "torch": "PyTorch"}
    software = [f"{text} {versions[key]}" for key, text in names.items() if key in versions]
    if not software:
        return ""
    commit, checksum = manifest.get("commit"), _named_values(manifest.get("data")).get("checksum")
    stated = [*([f"commit {str(commit)[:12]}"] if commit else []), *([f"data checksum {checksum}"] if checksum else [])]
    return f"Software: {', '.join(software)}{f' ({listed(stated, 5)})' if stated else ''}."


def _manifest(folder: Path) -> dict[str, Any]:
    """What ran where; nothing if the file is missing or damaged, as in folders of other programs."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _named_values(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def listed(items: Iterable[str], most: int, last: str = "") -> str:
    """Items with commas between them; beyond `most` their number."""
    texts = list(items)
    if len(texts) > most:
        return f"{', '.join(texts[:most])} and {len(texts) - most} more"
    if last and len(texts) > 1:
        return f"{', '.join(texts[:-1])} {last} {texts[-1]}"
    return ", ".join(texts)


def _written(value: Any) -> str:
    """A value as it would be typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
