"""Samples of nobody, on which a common network is tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpers.app import _main
from fedpers.data import PARTS, FederatedData, SplitConfig, load_federated
from fedpers.data.split import take_global
from fedpers.errors import ConfigError, DataError
from fedpers.settings import DatasetConfig, PartitionConfig
from tests.problems import gaussian_data


def test_each_client_gives_its_share() -> None:
    owned = [np.arange(0, 20), np.arange(20, 27), np.arange(27, 28)]
    left, taken = take_global(owned, SplitConfig(global_test=0.2), 0)
    assert taken is not None
    assert [len(positions) for positions in left] == [16, 6, 1]  # 4, 1.4 and 0.2, rounded
    assert sorted([*np.concatenate(left), *taken]) == list(range(28))
    alone, _ = take_global(owned[:1], SplitConfig(global_test=0.2), 0)
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
