"""Samples of nobody, on which a common network is tested."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpers.app import _main
from fedpers.cohort import Network
from fedpers.data import (
    PARTS,
    FederatedData,
    HeterogeneityConfig,
    SplitConfig,
    apply_heterogeneity,
    load_federated,
)
from fedpers.data.split import take_global
from fedpers.errors import ConfigError, DataError
from fedpers.server.common import measure_common
from fedpers.settings import DatasetConfig, PartitionConfig
from fedpers.settings.heterogeneity import Drift
from fedpers.strategies import FedAvgUpdate, make_strategy
from tests.problems import SmallNetwork, gaussian_data


def test_each_client_gives_its_share() -> None:
    owned = [np.arange(0, 20), np.arange(20, 27), np.arange(27, 28)]
    left, taken, owners = take_global(owned, SplitConfig(global_test=0.2), 0)
    assert taken is not None
    assert owners is not None
    assert all(position in owned[owner] for position, owner in zip(taken, owners, strict=True))
    assert [len(positions) for positions in left] == [16, 6, 1]  # 4, 1.4 and 0.2, rounded
    assert sorted([*np.concatenate(left), *taken]) == list(range(28))
    alone, _, _ = take_global(owned[:1], SplitConfig(global_test=0.2), 0)
    assert np.array_equal(alone[0], left[0])  # whoever else there is
    with pytest.raises(
        ConfigError, match=r"split.global_test=0.01: expected at least 0.025, one sample of the largest"
    ):
        take_global(owned, SplitConfig(global_test=0.01), 0)


@pytest.mark.parametrize("partition", ["dirichlet", "pathological", "shards"])
def test_nobody_owns_them(partition: str) -> None:
    def load(share: float) -> FederatedData:
        split = SplitConfig(global_test=share, public=0.1)
        return load_federated(DatasetConfig("digits"), PartitionConfig(partition, num_clients=5), split, 1)

    data, without = load(0.1), load(0)
    assert data.global_test is not None
    assert data.public is not None
    owned = torch.cat([positions for part in PARTS for positions in data.part(part)])
    total = len(owned) + len(data.public) + len(data.global_test)
    assert len(data.global_test) == pytest.approx(0.1 * total, abs=2.5)  # half a sample of each client
    assert len(torch.unique(torch.cat([owned, data.global_test, data.public]))) == total
    assert set(data.y[data.global_test].tolist()) == set(data.y[owned].tolist()), "all classes are there"
    assert without.global_test is None
    assert data.checksum != without.checksum
    assert data.restrict([0]).global_test is None


@pytest.mark.parametrize("drift", [None, Drift(3, 1.0)])
def test_samples_of_the_global_test_set_change_as_their_client_does(drift: Drift | None) -> None:
    split, partition = SplitConfig(global_test=0.2), PartitionConfig("iid", num_clients=4)
    data = load_federated(DatasetConfig("digits"), partition, split, 1)
    shifted = apply_heterogeneity(data, HeterogeneityConfig("label_groups", groups=2, drift=drift), 1)
    assert data.global_test is not None
    assert data.global_owners is not None
    taken, owners = data.global_test, data.global_owners
    after = taken if shifted.drifted is None else shifted.drifted[taken]
    for client in range(4):
        mine = torch.cat([data.part(part)[client] for part in PARTS])
        for places, now in ((taken, mine), (after, mine if shifted.drifted is None else shifted.drifted[mine])):
            names = dict(zip(data.y[mine].tolist(), shifted.y[now].tolist(), strict=True))
            here = owners == client
            assert shifted.y[places[here]].tolist() == [names[label] for label in data.y[taken[here]].tolist()]
    assert not torch.equal(shifted.y[taken], data.y[taken])


def test_a_common_network_is_measured_after_a_drift_on_what_clients_have_then() -> None:
    data = gaussian_data((20, 9, 13))
    x, y = torch.cat([data.x, data.x[:2] + 9]), torch.cat([data.y, data.y[:2]])
    kept = [[positions[positions > 1] for positions in data.part(part)] for part in PARTS]
    drifted = torch.arange(len(x))
    drifted[:2] = len(data.x) + torch.arange(2)
    moved = replace(
        data, x=x, y=y, train=kept[0], validation=kept[1], test=kept[2], global_test=torch.arange(2),
        global_owners=torch.zeros(2, dtype=torch.int64), drift_round=3, drifted=drifted,
    )  # fmt: skip
    _, update = make_strategy("fedavg")
    app = update.client_app(SmallNetwork(), moved)
    losses = [measure_common(app, app.template, round)["loss"] for round in (1, 2, 3)]
    assert losses[0] == losses[1] != losses[2]


def test_shifts_need_to_know_whose_they_are() -> None:
    data = gaussian_data((20, 9, 13))
    first = data.test[0][:1]
    loose = replace(data, test=[data.test[0][1:], *data.test[1:]], global_test=first)
    with pytest.raises(ConfigError, match=r"nothing says whose the samples of .* global test set are"):
        apply_heterogeneity(loose, HeterogeneityConfig("label_groups", groups=2), 0)
    with pytest.raises(DataError, match="there are 2 global_owners for 1 samples"):
        replace(loose, global_owners=torch.tensor([0, 0]))


def test_data_refuse_what_belongs_to_a_client_or_is_public() -> None:
    data = gaussian_data()
    with pytest.raises(DataError, match="1 global_test samples also belong to a client or are public"):
        replace(data, global_test=data.train[0][:1])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["dataset=synthetic_ratings", "split.global_test=0.1"], "split.global_test=0.1: expected"),
        (["partition=label_sets", "split.global_test=0.1"], "0 with partition=label_sets, whose clients share samples"),
    ],
)
def test_where_there_can_be_none(settings: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(settings) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fedavg", "knnper", "fedper"])
def test_it_is_measured_where_there_is_a_common_network(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"strategy={method}",
        "split.global_test=0.2",
        "rounds=3",
        "evaluate_every=2",
        "partition.num_clients=4",
    ]
    assert _main([*arguments, "runtime.workers=1", "runtime.clients_at_once=2", f"hydra.run.dir={tmp_path}"]) == 0
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    summary, printed = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out
    assert summary["global_samples"] > 300
    measured = ["global/accuracy" in line for line in rounds]
    if method == "fedper":
        assert not any(measured)
        assert "There is no global/accuracy: clients of fedper are not all sent one whole network" in printed
        return
    assert measured == [True, False, True, True]
    assert summary["last"]["global/accuracy"] == rounds[3]["global/accuracy"] > rounds[0]["global/accuracy"]
    assert "global/accuracy" in summary["selected"]
    assert "the common network" in printed


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = SmallNetwork(norm=False, dropout=0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores: Tensor = self.network(x)
        return scores, x


@dataclass(kw_only=True)
class FirstOutput(FedAvgUpdate):
    def predict(self, network: Network, x: Tensor) -> Tensor:
        return cast(Any, network(x))[0]  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class Negated(FedAvgUpdate):
    def predict(self, network: Network, x: Tensor) -> Tensor:
        return -network(x)


def test_a_common_network_predicts_as_the_method_does() -> None:
    data = gaussian_data()
    data = replace(data, test=[data.test[0][:0], *data.test[1:]], global_test=data.test[0])
    plain = FedAvgUpdate().client_app(SmallNetwork(norm=False, dropout=0.0), data)
    expected = measure_common(plain, plain.template, 1)
    wrapped = TwoOutputs()
    wrapped.network.load_state_dict(plain.module.state_dict())
    app = FirstOutput().client_app(wrapped, data)
    assert measure_common(app, app.template, 1) == expected
    negated = Negated().client_app(SmallNetwork(norm=False, dropout=0.0), data)
    assert measure_common(negated, plain.template, 1)["loss"] != expected["loss"]
