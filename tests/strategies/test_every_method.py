from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpers.cohort import Batch, Cohort, Network, Reply, Training, entries
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import STRATEGIES, FedAvg, FedAvgUpdate, LocalUpdate
from tests import equivalence, reference
from tests.cohort.helpers import assert_same
from tests.problems import VARIATIONS, SmallNetwork, gaussian_data, problem, problems
from tests.runtime.wire import WireGrid
from tests.strategies.helpers import run
from tests.traces import pfllib

UNTRAINED = ("no_learning", "pretrained")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """The two programs change logging for the process that they usually have to themselves."""
    log = logging.getLogger("fedpers")
    handlers = list(log.handlers)
    yield
    log.handlers = handlers
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", STRATEGIES)
def test_every_method_trains_in_whole_cohorts(method: str, device: str, caplog: pytest.LogCaptureFixture) -> None:
    given = problem(method, torch.float64)
    with caplog.at_level(logging.WARNING, logger="fedpers"):
        settings: dict[str, Any] = asdict(given.training)
        result = run(method, given.options, rounds=2, network=given.network, data=given.data, device=device, **settings)
    said = [record.getMessage() for record in caplog.records]  # such as clients that are computed one by one
    assert not [text for text in said if "has no part in" not in text], caplog.text
    start = {name: value.cpu() for name, value in entries(result.app.template).items()}
    moved = {name: value.cpu() for name, value in result.arrays.items()}
    for client in sorted(set(range(result.app.data.num_clients)) - set(given.data.unseen)):
        state = result.state(client)
        moved.update({f"{client}/{name}": value.cpu() for name, value in state.items()})
    known = [n for n in moved if n.rpartition("/")[2] in start]
    assert known or method in UNTRAINED
    for name in known:
        before = start[name.rpartition("/")[2]]
        value = moved[name]
        if value.dtype != before.dtype:  # a mask over the entry; some stay empty
            continue
        assert not torch.equal(value, before if "control" not in name else torch.zeros_like(value)), name
    report = result.strategy.report
    assert report.steps > 0 or method in UNTRAINED
    assert not report.evaluation_failures
    assert len(report.clients) + len(report.unseen) == result.app.data.num_clients
    score = [metrics[f"test-{given.data.task.headline}"] for metrics in report.clients.values()]
    assert all(0 <= value <= 1 for value in score)


@pytest.mark.slow
@pytest.mark.parametrize("method", STRATEGIES)
def test_a_wire_changes_nothing_and_nothing_global_is_drawn_or_changed(method: str) -> None:
    """One client per call, everything as bytes: as on Flower's own engines."""
    results = []
    for seed, grid in enumerate((None, WireGrid)):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.random.get_rng_state()
        given = problem(method, torch.float64)
        data = replace(given.data, unseen=given.data.unseen or (2,))
        results.append(
            run(method, given.options, rounds=2, fraction=0.7, network=given.network, data=data, grid=grid,
                **asdict(given.training))
        )  # fmt: skip
        assert torch.equal(before, torch.random.get_rng_state())
    local, wired = results
    assert_same(local.arrays, wired.arrays)
    for part in ("clients", "unseen", "adapted"):
        mine, theirs = (getattr(one.strategy.report, part) for one in results)
        assert mine.keys() == theirs.keys()
        assert mine
        for client, metrics in mine.items():
            assert metrics == pytest.approx(theirs[client], rel=1e-9, abs=1e-12), (part, client)
    assert local.strategy.report.bytes_up == wired.strategy.report.bytes_up
    assert local.strategy.report.bytes_down == wired.strategy.report.bytes_down
    assert not local.strategy.report.evaluation_failures


@pytest.mark.slow
def test_traces_of_another_library_are_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{method} " in printed for source in reference.SOURCES for method in source.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "case", "array"),
    [
        ("fedavg", "full_mb", "out/server/model/head.bias"),
        ("ditto", "part_mb", "out/client/trained/model_per/head.bias"),
        ("scaffold", "full_1b", "out/server/c/head.bias"),
        ("local", "full_mb", "out/eval/main/test_correct"),
    ],
)
def test_a_changed_trace_is_noticed(
    method: str, case: str, array: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pfllib.METHODS[method][0]
    copy = tmp_path / "pfllib" / folder / f"{case}.npz"
    copy.parent.mkdir(parents=True)
    shutil.copy(reference.HERE / "pfllib" / folder / f"{case}.npz", copy)
    assert reference.main(["--root", str(tmp_path), method]) == 0
    with np.load(copy) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[array][-1] += 1 if array.endswith("correct") else 1e-3
    np.savez(copy, **arrays)
    assert reference.main(["--root", str(tmp_path), method]) == 1
    assert "OVER" in capsys.readouterr().out


def test_no_traces_are_no_success(tmp_path: Path) -> None:
    assert reference.main(["--root", str(tmp_path), "fedavg"]) == 1


@pytest.mark.slow
def test_cohort_size_and_workers_do_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    assert equivalence.main(["cohort", "fedavg"]) == 0
    printed = capsys.readouterr().out
    assert f"1 methods in {len(problems('fedavg'))} settings, 0 over tolerance" in printed
    assert all(f"fedavg      {label} " in printed for label in ("default", *VARIATIONS["fedavg"]))


@cache
def by_default(method: str) -> dict[str, torch.Tensor]:
    return equivalence.outcome(method, torch.float64, 1000, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "label"), [(method, label) for method, further in VARIATIONS.items() for label in further]
)
def test_further_settings_do_not_depend_on_cohorts_and_matter(
    method: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "ROUNDS", 2)
    alone, together = (equivalence.outcome(method, torch.float64, k, 1, label=label) for k in (1, 3))
    assert equivalence.difference(alone, together) <= 1e-10
    assert equivalence.difference(alone, by_default(method)) > 1e-6


@pytest.mark.slow
def test_dependence_on_cohort_size_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = FedAvgUpdate.train

    def leaning(self: FedAvgUpdate, cohort: Cohort, received: Any, config: Any) -> Reply:
        reply = whole(self, cohort, received, config)
        reply.records["arrays"]["head.bias"] += 1e-3 * cohort.size
        return reply

    monkeypatch.setattr(FedAvgUpdate, "train", leaning)
    assert equivalence.main(["cohort", "fedavg"]) == 1
    assert "OVER" in capsys.readouterr().out


class CountsPadding(FedAvgUpdate):
    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(batch.x), batch.y)


def test_a_loss_that_counts_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"CountsPadding\.loss: expected a loss that leaves padding out"):
        CountsPadding().client_app(SmallNetwork(), gaussian_data())


class PenalizesGradients(FedAvgUpdate):
    """Takes gradients within its loss."""

    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        x = batch.x.detach().requires_grad_()
        losses = batch.losses(network(x))
        (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return batch.mean(losses + slope.square().sum(1))


def test_a_loss_may_take_gradients() -> None:
    network, data = SmallNetwork(norm=False, dropout=0.0).double(), gaussian_data(dtype=torch.float64)
    results = []
    for at_once in (1, 4):
        app = PenalizesGradients(training=Training(lr=0.1, batch_size=8)).client_app(network, data)
        with server_identity(1):
            grid = LocalGrid(app, data.num_clients, clients_at_once=at_once, workers=1)
            results.append(from_record(FedAvg().start(grid, app.initial_arrays(), num_rounds=2).arrays))
    for name, value in entries(results[0]).items():
        assert torch.allclose(value, results[1][name], atol=1e-9), name


class ChangesReceived(FedAvgUpdate):
    """Halves what the server sent, for whoever reads it next."""

    def train(self, cohort: Cohort, received: Any, config: Any) -> Reply:
        for value in received["arrays"].values():
            value.mul_(0.5)
        return super().train(cohort, received, config)


@pytest.mark.parametrize("at_once", [1, 4])
def test_what_was_received_is_not_changed_in_place(at_once: int) -> None:
    network, data = SmallNetwork(norm=False, dropout=0.0), gaussian_data()
    app = ChangesReceived().client_app(network, data)
    grid = LocalGrid(app, data.num_clients, clients_at_once=at_once, workers=1)
    sentence = r"ChangesReceived\.train changed received 'arrays/body\.0\.weight' in place: expected the server's"
    with server_identity(1), pytest.raises(TrainingError, match=sentence):
        FedAvg().start(grid, app.initial_arrays(), num_rounds=1)


class TakesTwoSamples(FedAvgUpdate):
    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        return batch.mean(batch.losses(network(batch.x)) * torch.ones(2))


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        (TakesTwoSamples(), r"^strategy=TakesTwoSamples\.loss: expected a loss that takes batches of the data \("),
    ],
)
def test_a_loss_that_cannot_be_trained_with_is_refused(update: FedAvgUpdate, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        update.client_app(SmallNetwork(), gaussian_data())


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (SmallNetwork(features=5), r"a network that takes samples of shape \[6\]"),
        (SmallNetwork(classes=2), r"a network with 4 outputs, not \[2\]"),
    ],
)
def test_networks_that_cannot_work_are_refused(network: torch.nn.Module, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LocalUpdate().client_app(network, gaussian_data())


class DrawsInItsLoss(FedAvgUpdate):
    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        return batch.mean(batch.losses(network(batch.x)) * torch.rand(()).clamp(min=1.0))


def test_a_loss_that_draws_is_given_the_clients_own_numbers() -> None:
    results = []
    for seed, clients_at_once in ((1, "auto"), (2, 3)):
        torch.manual_seed(seed)
        app, strategy = DrawsInItsLoss().client_app(SmallNetwork(norm=False), gaussian_data()), FedAvg()
        grid = LocalGrid(app, app.data.num_clients, clients_at_once=clients_at_once)
        with server_identity(1):
            results.append(strategy.start(grid, app.initial_arrays(), num_rounds=2).arrays)
        assert grid.engine is not None
        assert grid.engine.choice is not None
        assert grid.engine.choice.how == "one at a time"
        grid.close()
    assert all(np.array_equal(array.numpy(), results[1][name].numpy()) for name, array in results[0].items())
