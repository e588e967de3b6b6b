"""What wandb and TensorBoard keep of runs, beside the runs' own files: ``python -m tests.tracked FOLDER...``.

Reads each run's ``wandb/offline-run-*/*.wandb`` and ``tensorboard/``, and compares every number of every round with
``rounds.jsonl`` and of the end with ``summary.json``.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

BLOCK, HEADER = 32768, 7
"""Bytes of a block of wandb's file, and before each piece of a record: a checksum, its length and its kind."""
FIRST = 7  # bytes before the first piece
NO_METRICS = ("round", "seconds")
Numbers = dict[str, float]


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of an offline run, in the format of LevelDB's logs: pieces of kind 2, 3, 4 begin, go on, end one."""
    content, place, record = file.read_bytes(), FIRST, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield record
            record = b""


def of_wandb(folder: Path) -> tuple[dict[int, Numbers], Numbers]:
    """Numbers by round, and those of the summary, of a run folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    rounds: dict[int, Numbers] = defaultdict(dict)
    summary: Numbers = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(file):
            record = Record()
            record.ParseFromString(data)
            for update in record.summary.update:
                value = json.loads(update.value_json)
                if isinstance(value, int | float):
                    summary["/".join(update.nested_key) or update.key] = value
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if "_step" in items:
                rounds[int(items["_step"])].update({k: v for k, v in items.items() if not k.startswith("_")})
    return rounds, summary


def of_tensorboard(folder: Path) -> tuple[dict[int, Numbers], Numbers]:
    """Numbers by round, and those of the summary, of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    rounds: dict[int, Numbers] = defaultdict(dict)
    summary: Numbers = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            if tag.startswith("summary/"):
                summary[tag.removeprefix("summary/")] = event.value
            else:
                rounds[event.step][tag] = event.value
    return rounds, summary


def differing(kept: Mapping[str, float], stated: Mapping[str, float]) -> list[str]:
    """Names that one lacks or whose numbers differ by more than TensorBoard's single precision."""

    def alike(name: str) -> bool:
        a, b = (float(numbers.get(name, math.inf)) for numbers in (kept, stated))
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))

    return [name for name in stated if name not in kept or not alike(name)]


def stated_of(folder: Path) -> tuple[dict[int, Numbers], Numbers]:
    """What ``rounds.jsonl`` says of the rounds, and ``summary.json`` of the selected and of the last one."""
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    rounds = {int(row["round"]): {k: v for k, v in row.items() if _is_metric(k, v)} for row in rows}
    summary = json.loads((folder / "summary.json").read_text())
    return rounds, {f"{w}/{k}": v for w in ("selected", "last") for k, v in summary[w].items() if _is_metric(k, v)}


def _is_metric(name: str, value: object) -> bool:
    return name not in NO_METRICS and isinstance(value, int | float)


def main(folders: list[str]) -> int:
    """Compare all runs below `folders`; 0 if nothing differs and there was something."""
    compared = wrong = 0
    for file in sorted(file for folder in folders for file in Path(folder).rglob("summary.json")):
        rounds, ends = stated_of(file.parent)
        for name, read in (("wandb", of_wandb), ("tensorboard", of_tensorboard)):
            kept_rounds, kept_summary = read(file.parent)
            problems = [f"round {r}: {n}" for r, row in rounds.items() for n in differing(kept_rounds.get(r, {}), row)]
            problems += [f"summary: {n}" for n in differing(kept_summary, ends)]
            compared += sum(map(len, rounds.values())) + len(ends)
            wrong += len(problems)
            if problems:
                print(f"{file.parent} {name}: {len(problems)} differ, e.g. {problems[0]}")
    print(f"{compared} numbers compared, {wrong} differ")
    return int(wrong > 0 or not compared)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
