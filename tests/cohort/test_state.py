from __future__ import annotations

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
    found = store.gather([3, 2, 0])
    assert found.batch_size == torch.Size([3])
    assert found["model", "head.weight"].tolist() == [[1, 2], [7, -7], [1, 2]]
    assert found["model", "steps"].tolist() == [3, 0, 3]
    assert found["alpha"].tolist() == [0.5, 7.0, 0.5]


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
