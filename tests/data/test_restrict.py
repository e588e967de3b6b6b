"""Data of some clients only, as an actor gets them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpers.data.federated import PARTS
from fedpers.errors import DataError
from tests.problems import gaussian_data, ranking_data


def test_kept_clients_see_the_same_samples() -> None:
    data = replace(gaussian_data(), public=None)
    part = data.restrict([4, 1])
    assert part.num_clients == data.num_clients
    assert part.elsewhere == (0, 2, 3, 5, 6)
    assert len(part.x) == sum(len(data.part(p)[c]) for p in PARTS for c in (1, 4))
    for name in PARTS:
        for client in (1, 4):
            before, after = data.part(name)[client], part.part(name)[client]
            assert torch.equal(part.x[after], data.x[before])
            assert torch.equal(part.y[after], data.y[before])
        assert [len(part.part(name)[c]) for c in part.elsewhere] == [0] * 5
    assert torch.equal(torch.from_numpy(part.samples(4, 0, 1)), part.train[4])


def test_public_samples_stay_behind_and_shared_samples_come_once() -> None:
    data = gaussian_data((8, 9))
    shared = replace(data, train=[data.train[0], torch.cat([data.train[1], data.train[0][:2]])])
    part = shared.restrict([1])
    assert len(part.x) == 9 + 2 + 5 + 5
    public = replace(data, train=[data.train[0][1:], data.train[1]], public=data.train[0][:1])
    assert public.restrict([0]).public is None


def test_users_keep_all_items_and_draw_the_same_negatives() -> None:
    data = ranking_data()
    part = data.restrict([2, 5])
    assert len(part.x) == len(data.x)
    for user in (2, 5):
        assert (part.samples(user, 3, 1) == data.samples(user, 3, 1)).all()


def test_a_client_without_samples_is_still_refused_where_it_should_have_some() -> None:
    data = gaussian_data((8, 9))
    with pytest.raises(DataError, match="client 1 has no training samples"):
        replace(data, train=[data.train[0], data.train[1][:0]])
