"""A method gives one result, whether clients run in cohorts or one by one as any Flower engine would run them."""

from __future__ import annotations

from collections.abc import Iterator

import flwr.app as flower
import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto
from torch import Tensor

import fedpers
from fedpers.cohort import Training, leaves
from fedpers.flower_private import server_identity
from fedpers.records import from_record, unflatten_state
from fedpers.runtime.grid import FIRST_NODE, RUN_ID
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import CohortApp, LocalUpdate, make_strategy
from tests import flower_app
from tests.equivalence import difference
from tests.problems import SmallNetwork, gaussian_data
from tests.runtime.wire import WireGrid

METHODS = ("fedrep", "ditto", "scaffold", "pfedme", "apfl")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # single clients are small operations
    yield
    torch.set_num_threads(before)


class PerClient(ClientApp):
    """Any app that hands its messages on: no runtime can know that it could run in cohorts."""

    def __init__(self, inner: CohortApp) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, message: flower.Message, context: flower.Context) -> flower.Message:
        return self.inner(message, context)


def three_rounds(method: str, engine: str) -> dict[str, Tensor]:
    """Server arrays and state, personal states and metrics after three rounds."""
    training = Training(lr=0.02, epochs=2, batch_size=8, momentum=0.0 if method == "scaffold" else 0.5)
    strategy, update = make_strategy(method, {}, server={"fraction": 0.7, "seed": 3}, training=training)
    data = gaussian_data(dtype=torch.float64)
    app = update.client_app(SmallNetwork().double(), data, seed=3)
    clients = data.num_clients
    if engine == "cohorts":
        grid = LocalGrid(app, clients, clients_at_once=4, workers=1)
    else:
        grid = LocalGrid(PerClient(app), clients) if engine == "per client" else WireGrid(app, clients)
    arrays, config = app.initial_arrays(), flower.ConfigRecord()
    strategy.begin()
    with server_identity(RUN_ID):
        for r in (1, 2, 3):
            replies = grid.send_and_receive(strategy.configure_train(r, arrays, config, grid))
            new, _ = strategy.aggregate_train(r, replies)
            assert new is not None
            assert not strategy.report.failures
            arrays = new
            replies = grid.send_and_receive(strategy.configure_evaluate(r, arrays, config, grid))
            strategy.aggregate_evaluate(r, replies)
            assert not strategy.report.evaluation_failures
    grid.close()
    outcome = {f"server/{n}": v for n, v in leaves(from_record(arrays)).items()}
    for role, values in strategy.state.items():
        outcome.update({f"server/{role}/{n}": v for n, v in leaves(values).items()})
    for client, metrics in strategy.report.clients.items():
        outcome.update({f"metrics/{client}/{n}": torch.tensor(v) for n, v in metrics.items()})
    for client in range(clients):
        if engine == "cohorts":
            assert grid.engine is not None
            state = grid.engine.store.gather([client])
        else:
            assert grid.engine is None or engine == "wire"
            restored = context_from_proto(context_to_proto(grid.contexts[FIRST_NODE + client])).state
            if not restored:  # never sampled
                state = app.initial_state.unsqueeze(0)
            else:
                (record,) = restored.array_records.values()
                state = unflatten_state(record, app.initial_state)
        outcome.update({f"client/{client}/{n}": v for n, v in leaves(state).items()})
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_cohorts_and_single_clients_agree(method: str) -> None:
    cohorts = three_rounds(method, "cohorts")
    assert any(name.startswith("client/") for name in cohorts)
    assert difference(cohorts, three_rounds(method, "per client")) <= 1e-9
    assert difference(cohorts, three_rounds(method, "wire")) <= 1e-9


def test_flowers_fedavg_drives_a_method_of_this_package() -> None:
    from flwr.serverapp.strategy import FedAvg

    data = gaussian_data()
    results: list[list[torch.Tensor]] = []
    for cohort in (1, 4):
        app = LocalUpdate(training=Training(lr=0.1, batch_size=8)).client_app(SmallNetwork(), data)
        server = flower_app.ServerApp()

        @server.main()
        def main(grid: flower_app.Grid, context: flower.Context, app: CohortApp = app) -> None:
            result = FedAvg().start(grid, app.initial_arrays(), num_rounds=2)
            results.append(list(result.arrays.to_torch_state_dict().values()))
            metrics = result.evaluate_metrics_clientapp[2]
            assert 0 <= metrics["test-accuracy"] <= 1

        fedpers.simulate(server, app, data.num_clients, clients_at_once=cohort, workers=1)
    assert not torch.equal(results[0][0], SmallNetwork().state_dict()["body.0.weight"])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_a_server_does_to_a_reply_of_a_cohort_stays_there() -> None:
    data = gaussian_data()
    app = LocalUpdate(training=Training(lr=0.1, batch_size=8)).client_app(SmallNetwork(), data)
    grid = LocalGrid(app, data.num_clients, clients_at_once=3, workers=1)
    content = flower.RecordDict({"arrays": app.initial_arrays(), "config": flower.ConfigRecord({"server-round": 1})})
    with server_identity(RUN_ID):
        replies = list(grid.send_and_receive([flower.Message(content, n, "train") for n in grid.get_node_ids()]))
    before = {n: a.data for n, a in replies[1].content["arrays"].items()}
    for array in replies[0].content["arrays"].values():
        array.numpy()[...] = 7
        array.data = b""
    assert {n: a.data for n, a in replies[1].content["arrays"].items()} == before
    template = app.initial_arrays().to_torch_state_dict()
    assert all(torch.equal(v, SmallNetwork().state_dict()[n]) for n, v in template.items())


def test_messages_with_contents_of_their_own_run_in_one_cohort_as_one_by_one() -> None:
    data = gaussian_data()
    app = LocalUpdate(training=Training(lr=0.1, batch_size=8)).client_app(SmallNetwork(), data)

    def contents(client: int) -> flower.RecordDict:
        arrays = flower.ArrayRecord(SmallNetwork(seed=client).state_dict())
        return flower.RecordDict({"arrays": arrays, "config": flower.ConfigRecord({"server-round": 1})})

    results = []
    for grid in (
        LocalGrid(app, data.num_clients, clients_at_once=4, workers=2),
        LocalGrid(PerClient(app), data.num_clients),
    ):
        with server_identity(RUN_ID):
            messages = [flower.Message(contents(n - FIRST_NODE), n, "train") for n in grid.get_node_ids()]
            replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages)}
        grid.close()
        results.append([replies[n].content["arrays"].to_torch_state_dict() for n in sorted(replies)])
    assert len(results[0]) == data.num_clients
    for one, other in zip(*results, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
