"""Checkpoints: every method goes on from one as if it had never stopped; what is damaged is never used."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.app as flower
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from fedpers.cohort import Training, Tree, leaves, tree
from fedpers.errors import FedpersError
from fedpers.flower_private import server_identity
from fedpers.process import reproducible_convolutions
from fedpers.records import from_record, to_record
from fedpers.run import run_rounds
from fedpers.run.checkpoint import Checkpoint, Checkpoints, network_checksum
from fedpers.run.progress import Progress, exactly, report_from_json, report_to_json, restored
from fedpers.runtime.local import LocalGrid
from fedpers.runtime.states import DamagedError, read_states, write_states
from fedpers.strategies import STRATEGIES, CohortApp, FedPerUpdate, PersonalizedStrategy, RoundReport, make_strategy
from tests.problems import SmallNetwork, gaussian_data, problem

ROUNDS, HALF = 4, 2


def made(method: str, device: str = "cpu") -> tuple[PersonalizedStrategy, CohortApp, LocalGrid]:
    """A method at its start, with partial participation and a client that never trains."""
    given = problem(method)
    data = given.data if given.data.unseen else replace(given.data, unseen=(4,))
    server = {"fraction": 0.5, "seed": 3, "unseen": data.unseen, "evaluate_every": 3}
    strategy, update = make_strategy(method, given.options, server=server, training=given.training)
    app = update.client_app(given.network, data, seed=3, device=device)
    strategy.attach(app)
    return strategy, app, LocalGrid(app, data.num_clients, clients_at_once=3, workers=1)


def outcome(strategy: PersonalizedStrategy, grid: LocalGrid, arrays: Tree) -> dict[str, Tensor]:
    """All state of server and clients by name, on the CPU."""
    assert grid.engine is not None
    tensors = {f"arrays/{name}": value for name, value in leaves(arrays).items()}
    for role, values in strategy.state.items():
        tensors.update({f"server/{role}/{name}": value for name, value in leaves(values).items()})
    rows = grid.engine.store.gather(range(grid.num_clients))
    tensors.update({f"clients/{name}": value for name, value in leaves(rows).items()})
    return {name: value.cpu() for name, value in tensors.items()}


def without_times(report: RoundReport) -> dict[str, Any]:
    """A report without times, NaN comparable."""
    fields: dict[str, Any] = exactly(report_to_json(report))
    return {name: value for name, value in fields.items() if "seconds" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_every_method_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(
    method: str, device: str, tmp_path: Path
) -> None:
    reproducible_convolutions(device)
    kept: dict[int, dict[str, Tensor]] = {}
    strategy, app, grid = made(method, device)
    checkpoints = Checkpoints(tmp_path)

    def save(report: RoundReport, arrays: flower.ArrayRecord, is_last: bool) -> None:
        values = from_record(arrays)
        kept[report.round] = {name: value.clone() for name, value in outcome(strategy, grid, values).items()}
        if report.round == HALF:
            content = {"report": report_to_json(report)}
            checkpoints.save(report.round, content, values, strategy.state, grid.blocks())

    with server_identity(1):
        undisturbed = [
            without_times(report)
            for report in run_rounds(strategy, grid, app.initial_arrays(), ROUNDS, after_round=save)
        ]
    grid.close()
    expected = dict(kept)

    (checkpoint,) = checkpoints.whole()
    kept.clear()
    strategy, app, grid = made(method, device)
    checkpoint.check_clients(app)
    arrays, state = checkpoint.read_server(app)
    grid.load(read_states(checkpoint.folder, app.initial_state))
    strategy.state = state
    kept[HALF] = outcome(strategy, grid, arrays)
    last_report = report_from_json(checkpoint.content["report"])
    with server_identity(1):
        resumed = run_rounds(
            strategy, grid, to_record(arrays), ROUNDS, last_report=last_report, state=state, after_round=save
        )
        reports = [without_times(report) for report in resumed]
    grid.close()
    assert sorted(kept) == list(range(HALF, ROUNDS + 1))
    for round, values in kept.items():
        assert values.keys() == expected[round].keys()
        for name, value in values.items():
            assert torch.equal(value, expected[round][name]), (round, name)
            assert value.dtype == expected[round][name].dtype
    assert reports == undisturbed[HALF:]


def test_an_extended_run_equals_one_that_was_as_long_from_the_start(tmp_path: Path) -> None:
    """After the last round clients are evaluated out of turn, and unseen ones train; neither may stay."""
    histories: list[list[dict[str, Any]]] = []
    for lengths in ((5,), (2, 5)):
        reports: list[dict[str, Any]] = []
        start: Checkpoint | None = None
        for number, rounds in enumerate(lengths):
            strategy, app, grid = made("fedper")
            strategy.evaluate_every = 3
            checkpoints = Checkpoints(tmp_path / f"{len(lengths)}-{number}")
            arrays, last_report, state = app.initial_arrays(), None, None
            if start is not None:
                values, state = start.read_server(app)
                grid.load(read_states(start.folder, app.initial_state))
                arrays, last_report = to_record(values), report_from_json(start.content["report"])
                reports.pop()

            def save(
                report: RoundReport,
                arrays: flower.ArrayRecord,
                is_last: bool,
                checkpoints: Checkpoints = checkpoints,
                strategy: PersonalizedStrategy = strategy,
                grid: LocalGrid = grid,
            ) -> None:
                content = {"report": report_to_json(report)}
                checkpoints.save(report.round, content, from_record(arrays), strategy.state, grid.blocks())

            with server_identity(1):
                continued = run_rounds(
                    strategy, grid, arrays, rounds, last_report=last_report, state=state, after_round=save
                )
                reports += [without_times(report) for report in continued]
            start = next(checkpoints.whole())
        histories.append(reports)
    assert histories[0][2]["clients"] == {}  # not due in the middle of a run
    assert histories[0][5]["adapted"]
    assert histories[0] == histories[1]


# ----------------------------------------------------------------- what is written


STATES = TensorDict(
    {
        "model": tree({"w": torch.tensor([[1.5, -0.0], [math.nan, math.inf], [0.1, 7.0]]), "n": torch.arange(3)}, 3),
        "mask": tree({"w": torch.tensor([[True, False], [False, False], [True, True]])}, 3),
        "half": tree({"b": torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16)}, 3),
        "byte": tree({"u": torch.tensor([[0], [255], [7]], dtype=torch.uint8)}, 3),
    },
    batch_size=[3],
)
INITIAL: Tree = STATES[0].apply(torch.zeros_like)


def blocks() -> Iterator[tuple[Tensor, Tree]]:
    yield torch.tensor([0, 3]), STATES[:2].clone()
    yield torch.tensor([5]), STATES[2:].clone()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_states_come_back_to_the_last_bit_and_by_client(tmp_path: Path) -> None:
    files = write_states(tmp_path, blocks())
    assert [path.name for path in files] == ["clients-00000.safetensors", "clients-00001.safetensors"]
    for clients, expected in ((None, [0, 3, 5]), ([5, 0], [0, 5]), ([1], []), ([], [])):
        read_back = list(read_states(tmp_path, INITIAL, clients))
        assert [client for numbers, _ in read_back for client in numbers.tolist()] == expected
        for numbers, state in read_back:
            rows = [[0, 3, 5].index(client) for client in numbers.tolist()]
            for name, value in leaves(state).items():
                assert same(value, leaves(STATES)[name][rows]), name


def test_numbers_in_json_come_back_to_the_last_digit() -> None:
    extra = {"drift": 0.1 + 0.2, "high": math.inf}
    report = RoundReport(3, [0, 2], {2: "no reply"}, 10, 20, 3, 40, 3, math.nan, extra, seconds=1e-300)
    report.clients, report.unseen = {0: {"a": 1 / 3, "low": -math.inf}}, {4: {"a": math.nan}}
    report.evaluation_failures = {1: "it broke"}
    progress = Progress("validation/accuracy", unseen=(4,))
    progress.take(RoundReport(2, [0], clients={0: {"x": 0.1}}), {"validation/accuracy": 0.7})
    progress.take(report, {"validation/accuracy": math.nan, "n": 3})
    text = json.dumps(exactly({"progress": progress.to_json(), "report": report_to_json(report)}), allow_nan=False)
    kept = restored(json.loads(text))
    again = Progress("validation/accuracy", unseen=(4,))
    again.restore(kept["progress"])
    assert repr(again) == repr(progress)  # NaN, and 3 is not 3.0
    assert repr(report_from_json(kept["report"])) == repr(report)
    assert again.last is not None
    assert type(again.last[1]["n"]) is int


def fedper() -> CohortApp:
    return FedPerUpdate(training=Training(batch_size=8)).client_app(SmallNetwork(), gaussian_data())


def saved(folder: Path, *rounds: int, keep: int = 2) -> Checkpoints:
    """Checkpoints of a run of FedPer's app."""
    app, checkpoints = fedper(), Checkpoints(folder, keep)
    state = app.initial_state.expand(3).clone()
    for round in rounds:
        values = from_record(app.initial_arrays())
        server_state = {"extra": tree({"step": torch.tensor(round)}), "empty": tree({})}
        path = checkpoints.save(round, {"x": math.nan}, values, server_state, [(torch.tensor([0, 2, 6]), state)])
        checkpoints.prune(path)
    return checkpoints


def test_the_last_are_kept_and_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, 4)
    (tmp_path / ".draft-round_000006").mkdir()
    (tmp_path / ".draft-round_000006" / "server.safetensors").write_bytes(b"half")
    assert [checkpoint.round for checkpoint in checkpoints.whole()] == [4, 2]
    saved(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_000004", "round_000006"]
    saved(tmp_path, 5, keep=1)  # after a resume from 4, as 6 was damaged
    assert [path.name for path in tmp_path.iterdir()] == ["round_000005"]


def test_a_checkpoint_of_the_same_round_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / "round_000002" / "server.safetensors").write_bytes(b"damaged")
    (checkpoint,) = saved(tmp_path, 2).whole()
    assert checkpoint.round == 2
    assert [path.name for path in tmp_path.iterdir()] == ["round_000002"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2)

    def failing() -> Iterator[tuple[Tensor, Tree]]:
        yield torch.tensor([0]), fedper().initial_state.expand(1).clone()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(4, {}, from_record(fedper().initial_arrays()), {}, failing())
    assert [path.name for path in tmp_path.iterdir()] == ["round_000002"]
    (checkpoint,) = checkpoints.whole()
    assert math.isnan(checkpoint.content["x"])
    arrays, state = checkpoint.read_server(fedper())
    assert int(state["extra"]["step"]) == 2
    assert state["empty"].is_empty()
    assert arrays.keys() == from_record(fedper().initial_arrays()).keys()


# -------------------------------------------------------------------- what is damaged


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``checkpoint.json`` as somebody who knows the format can."""
    import hashlib

    path = folder / "checkpoint.json"
    body = json.loads(path.read_text())["checkpoint"]
    change(body)
    digest = hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()
    path.write_text(json.dumps({"blake2b": digest, "checkpoint": body}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def entry(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: rewritten(
        folder, lambda body: body["files"].update({name: {"bytes": 1, "blake2b": "", **values}})
    )


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit of the server": lambda folder: flip(folder / "server.safetensors"),
    "a bit of the clients": lambda folder: flip(folder / "clients-00000.safetensors"),
    "a bit of the index": lambda folder: flip(folder / "checkpoint.json"),
    "cut off": lambda folder: os.truncate(folder / "server.safetensors", 10),
    "missing": lambda folder: (folder / "clients-00000.safetensors").unlink(),
    "no index": lambda folder: (folder / "checkpoint.json").unlink(),
    "empty index": lambda folder: (folder / "checkpoint.json").write_text(""),
    "deep index": lambda folder: (folder / "checkpoint.json").write_text("[" * 100_000),
    "list": lambda folder: (folder / "checkpoint.json").write_text("[]"),
    "further file": lambda folder: (folder / "code.py").write_text(""),
    "link": lambda folder: [  # type: ignore[dict-item, func-returns-value]
        shutil.move(folder / "server.safetensors", folder.parent / "elsewhere"),
        (folder / "server.safetensors").symlink_to(folder.parent / "elsewhere"),
    ],
    "linked index": lambda folder: [  # type: ignore[dict-item, func-returns-value]
        shutil.move(folder / "checkpoint.json", folder.parent / "elsewhere"),
        (folder / "checkpoint.json").symlink_to(folder.parent / "elsewhere"),
    ],
    "file from above": entry("../config.yaml"),
    "absolute file": entry("/etc/passwd"),
    "no format": lambda folder: rewritten(folder, lambda body: body.update(format="2")),
    "other round": lambda folder: rewritten(folder, lambda body: body.update(round=5)),
    "no number": lambda folder: rewritten(folder, lambda body: body.update(round="4")),
    "no files": lambda folder: rewritten(folder, lambda body: body.update(files=None)),
    "negative size": entry("clients-00001.safetensors", bytes=-1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, 2, 4)
    DAMAGE[damage](tmp_path / "round_000004")
    assert [checkpoint.round for checkpoint in checkpoints.whole()] == [2]
    (record,) = caplog.records
    assert record.getMessage().endswith(" This checkpoint is not used.")
    assert "round_000004" in record.getMessage()


@pytest.mark.parametrize(("written", "age"), [(1, "an earlier"), (3, "a later")])
def test_a_checkpoint_of_another_version_is_refused_in_one_sentence(written: int, age: str, tmp_path: Path) -> None:
    """It is whole, so that to go on from an older one, or to say that there is none, would be wrong."""
    checkpoints = saved(tmp_path, 2, 4)
    rewritten(tmp_path / "round_000004", lambda body: body.update(format=written))
    with pytest.raises(FedpersError) as caught:
        list(checkpoints.whole())
    assert str(caught.value) == (
        f"{tmp_path}/round_000004/checkpoint.json was written by {age} version of fedpers (format {written}, this one "
        "reads format 2): resume the run with that version, or start it anew."
    )


def remade(folder: Path, tensors: dict[str, Tensor], name: str) -> None:
    """Put other tensors in place, and the index right."""
    from fedpers.run.checkpoint import _digest_of
    from fedpers.runtime.states import write_tensors

    path = folder / name
    write_tensors(path, tensors)
    facts = {"bytes": path.stat().st_size, "blake2b": _digest_of(path)}
    rewritten(folder, lambda body: body["files"].update({name: facts}))


def contents(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(path).items()}


CHANGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "missing array": ("server", lambda t: t.pop("arrays/body.1.weight")),
    "further array": ("server", lambda t: t.update({"arrays/more": torch.zeros(1)})),
    "shape of an array": ("server", lambda t: t.update({"arrays/body.1.weight": torch.zeros(1)})),
    "type of an array": ("server", lambda t: t.update({"arrays/body.1.weight": t["arrays/body.1.weight"].double()})),
    "unknown role": ("server", lambda t: t.update({"state/other/x": torch.zeros(1)})),
    "unknown entry": ("server", lambda t: t.update({"x": torch.zeros(1)})),
    "missing state": ("clients-00000", lambda t: t.pop("state/model/head.weight")),
    "further state": ("clients-00000", lambda t: t.update({"state/model/more": torch.zeros(3)})),
    "shape of a state": ("clients-00000", lambda t: t.update({"state/model/head.weight": torch.zeros(3, 1)})),
    "a row too few": ("clients-00000", lambda t: t.update({"clients": torch.tensor([0, 2])})),
    "client twice": ("clients-00000", lambda t: t.update({"clients": torch.tensor([0, 2, 2])})),
    "unknown client": ("clients-00000", lambda t: t.update({"clients": torch.tensor([0, 2, 7])})),
    "no numbers": ("clients-00000", lambda t: t.update({"clients": torch.tensor([0.0, 2.0, 3.0])})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_the_run_are_refused(change: str, tmp_path: Path) -> None:
    file, edit = CHANGES[change]
    checkpoints = saved(tmp_path, 4)
    folder = tmp_path / "round_000004"
    tensors = contents(folder / f"{file}.safetensors")
    edit(tensors)
    remade(folder, tensors, f"{file}.safetensors")
    (checkpoint,) = checkpoints.whole()
    app = fedper()
    with pytest.raises(DamagedError, match=r"round_000004.*\.$"):
        (checkpoint.read_server if file == "server" else checkpoint.check_clients)(app)
    (checkpoint.check_clients if file == "server" else checkpoint.read_server)(app)  # the other file is fine


def test_a_file_larger_than_the_state_can_be_is_refused_unread(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 4)
    (checkpoint,) = checkpoints.whole()
    os.truncate(checkpoint.folder / "server.safetensors", 2**40)  # all of it a hole
    with pytest.raises(DamagedError, match="larger than the state of this run can be"):
        checkpoint.read_server(fedper())


def test_the_checksum_of_a_network_sees_frozen_parameters_and_buffers() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.BatchNorm1d(3).requires_grad_(False)
            self.register_buffer("scale", torch.ones(2), persistent=False)

    sums = {network_checksum(Fixed())}
    for name in ("layer.weight", "layer.running_mean", "layer.num_batches_tracked", "scale"):
        network = Fixed()
        {**network.state_dict(), "scale": network.scale}[name].add_(1)  # type: ignore[dict-item]
        sums.add(network_checksum(network))
    assert len(sums) == 5
    assert network_checksum(Fixed()) in sums
