"""The choice of cohort size and workers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fedpers.runtime.probe as module
from fedpers.cohort import Batch, Given, Network, Training, Tree
from fedpers.data.cache import cache_root
from fedpers.data.federated import FederatedData
from fedpers.runtime.engine import CohortEngine
from fedpers.runtime.probe import Choice, probe
from fedpers.strategies import CohortApp, FedAvgUpdate, LocalUpdate
from tests.problems import SmallNetwork, gaussian_data


@pytest.fixture
def app() -> CohortApp:
    return FedAvgUpdate(training=Training(lr=0.01, batch_size=8)).client_app(SmallNetwork(), gaussian_data())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedpers.runtime.steps.SECONDS_PER_SIZE", 0.002)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was measured, with fixed times: larger cohorts are better up to 4, a second worker helps."""
    calls: list[Any] = []

    def time_steps(size: int, device: torch.device) -> float:
        calls.append(size)
        return {1: 9.0, 4: 12.0}.get(size, 4.0 * size) * 1e-6

    monkeypatch.setattr(module, "stepper", lambda app, size: size)
    monkeypatch.setattr(module, "bytes_per_client", lambda app, size=1: 100)
    monkeypatch.setattr(module, "seconds_per_step", time_steps)
    monkeypatch.setattr(module, "_time_per_client", lambda app, size, clients: time_steps(size, app.device) / size)
    monkeypatch.setattr(module, "seconds_side_by_side", lambda sizes: 1e-6)
    monkeypatch.setattr(module, "cores", lambda: 2)
    return calls


def test_a_choice_is_measured_once_and_kept(app: CohortApp) -> None:
    torch.set_num_threads(2)
    first = probe(app, 7, "auto", 1)
    assert torch.get_num_threads() == 2
    assert first.how == "measured"
    assert 1 <= first.clients_at_once <= 7
    assert "1" in first.microseconds
    assert all(us > 0 for us in first.microseconds.values())
    again = probe(app, 7, "auto", 1)
    assert again == Choice(first.clients_at_once, 1, "cached", first.microseconds)
    (kept,) = (cache_root() / "cohort_sizes").iterdir()
    assert json.loads(kept.read_text())["microseconds"] == first.microseconds
    assert [p.name for p in cache_root().iterdir()] == ["cohort_sizes"]


def test_workers_are_measured_for_real(app: CohortApp) -> None:
    assert probe(app, 7, 1, "auto").workers in (1, min(module.cores(), 7))


def test_other_questions_are_measured_anew(app: CohortApp, measured: list[Any]) -> None:
    probe(app, 7, "auto", 1)
    probe(app, 6, "auto", 1)
    other = FedAvgUpdate(training=Training(lr=0.01, batch_size=16)).client_app(SmallNetwork(), gaussian_data())
    probe(other, 7, "auto", 1)
    assert measured == [1, 4, 7, 1, 3, 6, 1, 4, 7]  # six clients are two cohorts of three, not of four and two
    assert [probe(app, n, "auto", 1).how for n in (7, 6)] == ["cached"] * 2
    assert len(measured) == 9


def test_a_round_takes_as_long_as_the_core_with_most_cohorts(app: CohortApp, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[list[Any]] = []
    alone: list[Any] = []
    monkeypatch.setattr(module, "stepper", lambda app, size, network=None: size)
    monkeypatch.setattr(module, "_steps_of_a_round", lambda app, clients: [2] * clients)
    monkeypatch.setattr(module, "cores", lambda: 3)
    monkeypatch.setattr(module, "seconds_side_by_side", lambda sizes: together.append(sizes) or 6.0)

    def time_steps(step: Any, device: torch.device) -> float:
        if callable(step):
            return 2.0  # what a cohort takes before its first step
        alone.append(step)
        return 5.0

    monkeypatch.setattr(module, "seconds_per_step", time_steps)
    times = [7 * module._time_per_client(app, size, 7) for size in (1, 4, 7)]
    assert times == pytest.approx([3 * 7.0, 7.0, 6.0])
    assert together == [[1, 1, 1], [4, 4]]  # seven clients fill two cohorts of four, and one of seven
    assert alone == [7]


def test_short_steps_are_timed_twice(app: CohortApp, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.2, 0.1])
    monkeypatch.setattr(module, "stepper", lambda app, size, network=None: size)
    monkeypatch.setattr(module, "seconds_per_step", lambda step, device: 0.0 if callable(step) else next(times))
    assert module._time_per_client(app, 7, 7) == pytest.approx(0.1 / 7)


@pytest.mark.parametrize(
    ("times", "tried"),
    [([5, 4, 3, 2, 1], 5), ([4, 6.1, 1], 2), ([4, 5, 3, 4, 4], 5), ([4, 5, 5, 1], 3), ([4, 4.5, 5, 5, 1], 4)],
)
def test_larger_cohorts_are_tried_until_they_are_clearly_slower(
    app: CohortApp, monkeypatch: pytest.MonkeyPatch, times: list[float], tried: int
) -> None:
    monkeypatch.setattr(module, "_sizes", lambda app, clients: list(range(1, 1 + len(times))))
    monkeypatch.setattr(module, "_time_per_client", lambda app, size, clients: times[size - 1])
    assert len(module._measure(app, 7, math.inf).microseconds) == tried


def test_a_size_that_was_interrupted_is_timed_again(app: CohortApp, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: [4e-6], 2: [9e-6, 8e-6, 3e-6], 3: [2e-6], 4: [9e-6, 8e-6, 7e-6], 5: [1e-6]}
    monkeypatch.setattr(module, "TRIES", 3)
    monkeypatch.setattr(module, "_sizes", lambda app, clients: list(times))
    monkeypatch.setattr(module, "_time_per_client", lambda app, size, clients: times[size].pop(0))
    measured = module._measure(app, 7, math.inf).microseconds
    assert measured == pytest.approx({"1": 4, "2": 3, "3": 2, "4": 7})
    assert times == {1: [], 2: [], 3: [], 4: [], 5: [1e-6]}


def test_a_round_is_divided_into_cohorts_of_nearly_equal_size(app: CohortApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 2)
    assert module._sizes(app, 50) == [1, 4, 13, 25, 50]
    assert module._sizes(app, 1) == [1]
    assert module._sizes(app, 7) == [1, 4, 7]


def test_clients_of_a_round_stand_for_all_of_them(app: CohortApp) -> None:
    steps = sorted((-(-size // 8) for size in app.sizes), reverse=True)
    assert module._steps_of_a_round(app, 7) == steps
    assert module._steps_of_a_round(app, 3) == [steps[0], steps[2], steps[4]]
    assert module._steps_of_a_round(app, 1) == steps[:1]


def test_a_core_with_small_clients_waits_for_one_with_large_ones() -> None:
    def seconds(steps: list[int], size: int, threads: int = 2, begin: float = 0.0) -> float:
        return module._seconds_of_a_round(steps, size, threads, begin, float(size))

    assert seconds([10, 8, 2, 2], 2) == 18  # the other one has 4
    assert seconds([10, 8, 2, 2], 1) == 12  # 10 and 2, 8 and 2
    assert seconds([10, 8, 2, 2], 4) == seconds([10, 8, 2, 2], 1, threads=1) == 22
    assert seconds([10, 8, 2, 2], 1, begin=1.0) == 14


def test_given_values_are_kept(app: CohortApp, measured: list[Any]) -> None:
    assert probe(app, 7, 3, 2) == Choice(3, 2, "given")
    assert probe(app, 7, 30, 1) == Choice(7, 1, "given")
    assert not measured
    assert probe(app, 7, "auto", 1).workers == 1
    assert probe(app, 7, 2, "auto").clients_at_once == 2


def test_the_cohort_does_not_depend_on_the_workers(app: CohortApp, measured: list[Any]) -> None:
    choices = [probe(app, 7, "auto", workers) for workers in (1, 2, "auto")]
    assert [c.clients_at_once for c in choices] == [4] * 3
    assert [c.workers for c in choices] == [1, 2, 2]


def test_a_second_worker_must_be_faster(app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(app, 7, 1, "auto").workers == 2
    monkeypatch.setattr(module, "seconds_side_by_side", lambda sizes: 17.5e-6)  # two clients in the time of 1.94
    assert probe(app, 7, 1, "auto").workers == 1


def test_no_more_workers_than_cohorts(app: CohortApp, measured: list[Any]) -> None:
    assert probe(app, 7, 7, 8).workers == 1
    assert probe(app, 7, 5, 8).workers == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '{"bytes": 0, "microseconds": {}, "beyond": null}', '{"bytes": "x"}',
             '{"bytes": 4, "microseconds": 3, "beyond": null}', "\x00\xff"],
)  # fmt: skip
def test_a_damaged_cache_is_measured_again_and_repaired(text: str, app: CohortApp, measured: list[Any]) -> None:
    file = module._cache_file(module._key(app, 7))
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    assert probe(app, 7, "auto", 1).how == "measured"
    assert probe(app, 7, "auto", 1).how == "cached"
    assert len(measured) == 3


def test_a_cache_that_cannot_be_written_is_a_warning(
    app: CohortApp,
    measured: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert probe(app, 7, "auto", 1).clients_at_once == 4
    assert "could not be kept" in caplog.text
    assert str(tmp_path / "file") in caplog.text


def test_an_engine_settles_once(app: CohortApp, measured: list[Any]) -> None:
    engine = CohortEngine(app)
    assert engine.choice is None
    choice = engine.choose(7)
    assert engine.choose(3) is choice is engine.choice
    engine.close()


def test_choices_read_well() -> None:
    assert str(Choice(1, 1, "given")) == "cohorts of 1 client, 1 worker, given"
    text = str(Choice(4, 2, "measured", {"1": 9.4, "4": 3.0}))
    assert text == "cohorts of 4 clients, 2 workers, measured (per client and step 1: 9 us, 4: 3 us)"


# ------------------------------------------------------------------- memory


def bytes_free(monkeypatch: pytest.MonkeyPatch, clients: float) -> None:
    """Let there be room for so many clients of 100 bytes, cohorts on both cores together."""
    monkeypatch.setattr(module, "available_memory", lambda device: 100 * clients / module.MEMORY_SHARE)


@pytest.mark.parametrize(
    ("clients", "tried", "chosen"), [(2 * 7, [1, 4, 7], 4), (2 * 7 - 1, [1, 4], 4), (7, [1], 1), (0.1, [1], 1)]
)
def test_cohorts_beyond_the_memory_are_not_tried(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch, clients: float, tried: list[int], chosen: int
) -> None:
    bytes_free(monkeypatch, clients)
    choice = probe(app, 7, "auto", 1)
    assert measured == tried
    assert (choice.clients_at_once, choice.how, [*choice.microseconds]) == (
        chosen,
        "measured",
        [str(size) for size in tried],
    )


def test_a_cohort_may_be_entitled_to_another_part(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_free(monkeypatch, 7)
    probe(app, 7, "auto", 1, part=1.0)
    assert measured == [1, 4, 7]


def test_what_was_kept_obeys_the_memory_of_today(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_free(monkeypatch, 100)
    assert probe(app, 7, "auto", 1).clients_at_once == 4
    bytes_free(monkeypatch, 3)
    assert probe(app, 7, "auto", 1) == Choice(1, 1, "cached", {"1": 9.0})
    assert measured == [1, 4, 7]


def test_what_was_left_out_is_tried_when_it_fits(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for clients, how, sizes in [(3, "measured", 1), (3, "cached", 1), (7, "cached", 1), (8, "measured", 4)]:
        bytes_free(monkeypatch, clients)
        choice = probe(app, 7, "auto", 1)
        assert (choice.how, choice.clients_at_once) == (how, sizes)
    assert measured == [1, 1, 4]


def test_workers_that_do_not_fit_are_not_tried(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_free(monkeypatch, 2 * 3)
    assert probe(app, 7, 3, "auto").workers == 2
    bytes_free(monkeypatch, 2 * 3 - 0.1)
    measured.clear()
    assert probe(app, 7, 3, "auto").workers == 1
    assert not measured


def test_workers_are_as_many_as_fit(app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 4)
    for clients, workers in [(4, 4), (3.9, 3), (2, 2), (1.9, 1)]:
        bytes_free(monkeypatch, clients)
        assert probe(app, 7, 1, "auto").workers == workers


def test_where_the_memory_is_unknown_everything_is_tried(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_free(monkeypatch, math.inf)
    assert probe(app, 7, "auto", "auto").workers == 2
    assert measured[:3] == [1, 4, 7]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


PARAMETERS = 4 * (6 * 10 + 10 + 10 * 4 + 4)  # bytes
SAVED = 4 * 8 * (6 + 10 + 4) + 8 * 8  # of a batch of 8: inputs, features, log-probabilities; labels


def estimated(model: nn.Module, update: type[LocalUpdate] = FedAvgUpdate, **training: Any) -> int:
    settings = Training(lr=0.01, **{"batch_size": 8, **training})
    return module.bytes_per_client(update(training=settings).client_app(model, gaussian_data()))


def test_the_bytes_of_a_client_are_counted() -> None:
    plain = estimated(network())
    assert 0 <= plain - 2 * PARAMETERS - SAVED <= 100  # a few numbers per batch
    assert estimated(network(), momentum=0.9) == plain + PARAMETERS
    assert estimated(network(), optimizer="adamw") == plain + 2 * PARAMETERS
    assert estimated(network(), batch_size=16) == pytest.approx(2 * PARAMETERS + 2 * SAVED, abs=100)
    assert estimated(network(), LocalUpdate) == plain


def test_frozen_parameters_belong_to_no_client() -> None:
    half = network()
    half[0].requires_grad_(False)
    head = 4 * (10 * 4 + 4)
    assert estimated(half) == pytest.approx(2 * head + SAVED, abs=100)
    half[2].requires_grad_(False)
    half.append(nn.Linear(4, 4, bias=False))
    assert estimated(half) < 2 * 64 + SAVED + 4 * 8 * 4 + 100


@dataclass(kw_only=True)
class Kept(FedAvgUpdate):
    """The whole network is personal."""

    personal = "all"


def test_personal_state_is_counted() -> None:
    assert estimated(network(), Kept) == estimated(network()) + PARAMETERS + 8  # and how often it has trained


@dataclass(kw_only=True)
class Near(FedAvgUpdate):
    """Stays near what its loss is given."""

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        return {"center": template, "share": torch.tensor(0.5, dtype=torch.float64)}

    def loss(self, network: Network, batch: Batch) -> Tensor:
        center = cast(Mapping[str, Tensor], batch.given["center"])
        gap = torch.stack([(network.tensors[name] - value).square().sum() for name, value in center.items()])
        return super().loss(network, batch) + cast(Tensor, batch.given["share"]).float() * gap.sum()


def test_what_the_loss_is_given_is_counted() -> None:
    extra = estimated(network(), Near) - estimated(network())
    assert PARAMETERS + 8 <= extra <= 3 * PARAMETERS + 100  # the center, and the gap to it for the gradient
    choice = probe(Near(training=Training(lr=0.1)).client_app(network(), gaussian_data()), 7, "auto", "auto")
    assert choice.how == "measured"


@dataclass(kw_only=True)
class Inner(FedAvgUpdate):
    """Takes a gradient inside the loss."""

    def loss(self, network: Network, batch: Batch) -> Tensor:
        start = dict(network.tensors)
        plain = super().loss
        grads = torch.func.grad(lambda tensors: plain(network.replace(tensors), batch))(start)
        return plain(network.replace({name: value - 0.1 * grads[name] for name, value in start.items()}), batch)


def test_a_gradient_inside_the_loss_counts_as_a_second_pass() -> None:
    nested, plain = estimated(network(), Inner), estimated(network())
    assert plain < nested < 2 * plain


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.MaxPool2d(2)], ids=lambda layer: type(layer).__name__
)
def test_a_stack_of_any_size_takes_as_much_per_client_as_one_of_two(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, 1, 8, 8))
    app = FedAvgUpdate(training=Training(lr=0.01, batch_size=8)).client_app(model, gaussian_data(features=(1, 8, 8)))
    alone, two, six = (module.bytes_per_client(app, size) for size in (1, 2, 6))
    assert alone <= two <= 2 * alone  # what the sizes that are tried rely on
    assert six == pytest.approx(two, rel=0.02)


def test_room_for_one_client_alone_is_enough(app: CohortApp, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    counted = module.bytes_per_client
    monkeypatch.setattr(module, "bytes_per_client", lambda app, size=1: tried.append(size) or counted(app, size))
    monkeypatch.setattr(module, "available_memory", lambda device: 3 * counted(app) / module.MEMORY_SHARE)
    assert probe(app, 7, "auto", 1, part=1.0).clients_at_once == 1
    assert tried == [1]
    monkeypatch.setattr(module, "available_memory", lambda device: 5 * counted(app) / module.MEMORY_SHARE)
    assert set(probe(app, 7, "auto", 1, part=1.0).microseconds) <= {"1", "4"}
    assert tried == [1, 1, 2]


def test_an_engine_stays_within_the_memory(app: CohortApp, monkeypatch: pytest.MonkeyPatch) -> None:
    one = module.bytes_per_client(app, 2)
    monkeypatch.setattr(module, "available_memory", lambda device: 4 * one * module.cores() / module.MEMORY_SHARE)
    engine = CohortEngine(app)
    assert engine.choose(7).clients_at_once in (1, 4)
    assert set(engine.choose(7).microseconds) <= {"1", "4"}
    engine.close()


def test_a_size_that_a_gpu_could_not_hold_is_tried_again_only_with_more_memory(
    app: CohortApp, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_per_client(app: CohortApp, size: int, clients: int) -> float:
        measured.append(size)
        if size == 4:
            raise torch.cuda.OutOfMemoryError
        return 1e-6

    monkeypatch.setattr(module, "_time_per_client", time_per_client)
    bytes_free(monkeypatch, 100)
    for _ in range(2):
        assert probe(app, 7, "auto", 1).clients_at_once == 1
    assert measured == [1, 4]
    bytes_free(monkeypatch, 200)
    assert probe(app, 7, "auto", 1).how == "measured"
