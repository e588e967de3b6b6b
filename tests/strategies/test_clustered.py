"""Clustering of clients by their updates: FedAvg before it, FedAvg within clusters after it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from fedpers.cohort import entries
from fedpers.errors import ConfigError, TrainingError
from fedpers.flower_private import server_identity
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import Clustered, make_strategy
from fedpers.strategies.clustered import CENTERS, MEMBERS, NETWORKS
from tests.strategies.helpers import DATA, NETWORK, Finished, Values, copied, passes, run, sgd

COMMON: dict[str, Any] = {"common_rounds": 2, "clusters": 2}


def network(result: Finished, cluster: int) -> Values:
    return {name: value[cluster] for name, value in entries(result.strategy.state[NETWORKS]).items()}


def close(first: Values, second: Values) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_first_rounds_are_fedavg() -> None:
    result = run("clustered", COMMON, rounds=2, fraction=0.5)
    close(result.arrays, run("fedavg", rounds=2, fraction=0.5).arrays)
    assert not result.strategy.state


def test_all_clients_are_clustered_by_what_they_changed() -> None:
    result = run("clustered", COMMON, rounds=3, fraction=0.5)
    before = run("fedavg", rounds=2, fraction=0.5)
    close(result.arrays, before.arrays)
    alone = [copied(before.arrays) for _ in range(4)]
    for client, values in enumerate(alone):
        sgd(values, passes(client, 2, 3))
    names = [name for name, _ in NETWORK.named_parameters()]
    updates = np.stack([np.concatenate([(w[n] - before.arrays[n]).numpy().ravel() for n in names]) for w in alone])
    expected = fcluster(linkage(updates, "ward"), 2, "maxclust")
    members = result.strategy.state[MEMBERS]
    assert members["client"].tolist() == [0, 1, 2, 3]
    clusters = members["cluster"].numpy()
    assert ((clusters[:, None] == clusters) == (expected[:, None] == expected)).all()
    assert clusters[0] == 0


def test_a_cluster_is_fedavg_over_its_clients() -> None:
    result = run("clustered", {"common_rounds": 0, "clusters": 2}, rounds=3)
    members = result.strategy.state[MEMBERS]
    for cluster in (0, 1):
        others = tuple(members["client"][members["cluster"] != cluster].tolist())
        assert 0 < len(others) < 4
        close(network(result, cluster), run("fedavg", rounds=3, data=replace(DATA, unseen=others)).arrays)


UPDATES = np.array([[0.0, 1.0], [0.0, 3.0], [2.0, 0.1], [0.0, 1.2], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metric": "l1", "linkage": "single", "threshold": 1.1}, [0, 1, 2, 0, 0]),
        ({"linkage": "complete", "threshold": 1.9}, [0, 1, 2, 0, 0]),
        ({"linkage": "complete", "threshold": 0.5}, [0, 1, 2, 0, 3]),
        ({"metric": "cosine", "linkage": "average", "threshold": 0.5}, [0, 0, 1, 0, 2]),
        ({"clusters": 1}, [0, 0, 0, 0, 0]),
        ({"clusters": 9}, [0, 1, 2, 3, 4]),
    ],
)
def test_clusters_of_a_few_updates(options: dict[str, Any], expected: list[int]) -> None:
    assert Clustered(**options).cluster(UPDATES) == expected
    assert Clustered(**options).cluster(UPDATES[:1]) == [0]


def test_who_has_no_cluster_trains_the_common_network_and_joins_the_nearest() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clustered, "sample", lambda self, round: [0, 1, 2] if round == 1 else [0, 1, 2, 3])
        first = run("clustered", {"common_rounds": 0, "clusters": 3}, rounds=1)
        second = run("clustered", {"common_rounds": 0, "clusters": 3}, rounds=2)
    assert first.strategy.state[MEMBERS]["client"].tolist() == [0, 1, 2]
    members = second.strategy.state[MEMBERS]
    assert members["client"].tolist() == [0, 1, 2, 3]
    assert members["cluster"][:3].tolist() == [0, 1, 2]
    assert second.strategy.state[CENTERS][CENTERS].shape[0] == 3
    assert all(torch.isfinite(value).all() for value in network(second, int(members["cluster"][3])).values())


def test_ward_needs_euclidean_distances() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.metric=cosine: expected l2 where strategy\.linkage is ward"):
        make_strategy("clustered", {"metric": "cosine"})


def test_parameters_are_known_from_the_app() -> None:
    strategy, update = make_strategy("clustered", {"common_rounds": 0})
    app = update.client_app(NETWORK, DATA)
    with server_identity(1), pytest.raises(TrainingError, match=r"call attach\(client_app\) before start"):
        strategy.start(LocalGrid(app, 4, clients_at_once=4, workers=1), app.initial_arrays(), num_rounds=1)
