from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from fedpers.cohort import StateStore, Tree, leaves, tree


def initial() -> Tree:
    model = tree({"head.weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)})
    return TensorDict({"model": model, "alpha": torch.tensor(0.5)}, batch_size=[])


def state(*alphas: float) -> Tree:
    k = len(alphas)
    model = tree({"head.weight": torch.tensor([[a, -a] for a in alphas]), "steps": torch.arange(k)}, k)
    return TensorDict({"model": model, "alpha": torch.tensor(alphas)}, batch_size=[k])


def test_who_never_wrote_holds_the_initial_state() -> None:
    store = StateStore(range(4), initial())
    store.scatter([2], state(7.0), torch.tensor([True]))
    gathered = store.gather([3, 2, 0])
    assert gathered.batch_size == torch.Size([3])
    assert gathered["model", "head.weight"].tolist() == [[1, 2], [7, -7], [1, 2]]
    assert gathered["model", "steps"].tolist() == [3, 0, 3]
    assert gathered["alpha"].tolist() == [0.5, 7.0, 0.5]


def test_scatter_in_any_order_and_only_what_is_kept() -> None:
    store = StateStore(range(5), initial())
    store.scatter([4, 0, 2], state(1.0, 2.0, 3.0), torch.tensor([True, False, True]))
    assert store.gather(range(5))["alpha"].tolist() == [0.5, 0.5, 3.0, 0.5, 1.0]
    assert store.written.tolist() == [False, False, True, False, True]
    store.scatter([2, 4], state(8.0, 9.0), torch.tensor([False, True]))
    assert store.gather(range(5))["alpha"].tolist() == [0.5, 0.5, 3.0, 0.5, 9.0]


def test_gather_copies() -> None:
    store = StateStore(range(2), initial())
    store.scatter([0], state(1.0), torch.tensor([True]))
    taken = store.gather([0, 1])
    taken["alpha"].fill_(-1)
    taken["model", "head.weight"].fill_(-1)
    assert store.gather([0, 1])["alpha"].tolist() == [1.0, 0.5]
    assert store.gather([1])["model", "head.weight"].tolist() == [[1, 2]]


def test_a_method_without_personal_state() -> None:
    store = StateStore(range(3), tree({}))
    store.scatter([1], tree({}, 1), torch.tensor([True]))
    assert leaves(store.gather([0, 1])) == {}
    assert store.gather([0, 1]).batch_size == torch.Size([2])


def test_clients_have_any_numbers() -> None:
    store = StateStore([7, 3], initial())
    store.scatter([3], state(2.0), torch.tensor([True]))
    assert store.gather([7, 3])["alpha"].tolist() == [0.5, 2.0]
    with pytest.raises(KeyError):
        store.gather([0])


def test_rows_beyond_the_budget_lie_in_files_that_are_gone_at_the_end(tmp_path: Path) -> None:
    needed = 100 * StateStore([0], initial()).bytes_per_client
    assert not StateStore(range(100), initial(), memory=needed, folder=tmp_path).mapped
    store = StateStore(range(100), initial(), memory=needed - 1, folder=tmp_path)
    assert store.mapped
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.memmap")) == needed
    store.scatter([42, 7], state(1.0, 2.0), torch.tensor([True, True]))
    gathered = store.gather([7, 8, 42])
    assert gathered["alpha"].tolist() == [2.0, 0.5, 1.0]
    assert gathered["model", "steps"].tolist() == [1, 3, 0]
    gathered["alpha"].zero_()
    assert store.gather([7])["alpha"].tolist() == [2.0]
    store.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", [None, 0])
def test_blocks_are_all_that_was_written(memory: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore([5, 4, 3, 2, 1, 0], initial(), memory=memory, folder=tmp_path)
    monkeypatch.setattr("fedpers.cohort.state.BLOCK_BYTES", 2 * store.bytes_per_client)
    store.scatter([3, 0, 5], state(3.0, 0.0, 5.0), torch.tensor([True, True, True]))
    blocks = list(store.blocks())
    assert [clients.tolist() for clients, _ in blocks] == [[0, 3], [5]]
    assert [values["alpha"].tolist() for _, values in blocks] == [[0.0, 3.0], [5.0]]
    other = StateStore(range(6), initial())
    for clients, values in blocks:
        other.load(clients.tolist(), values)
    assert other.written.tolist() == [True, False, False, True, False, True]
    assert torch.equal(other.gather(range(6))["model", "head.weight"], store.gather(range(6))["model", "head.weight"])
    other.clear()
    assert other.gather([3])["alpha"].tolist() == [0.5]
    assert list(StateStore(range(3), tree({})).blocks()) == []
