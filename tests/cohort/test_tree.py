from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedpers.cohort import leaves, model_tree, select, tree
from fedpers.cohort.tree import rows_finite
from fedpers.errors import ConfigError
from tests.problems import SmallNetwork

BODY = ("body.0.weight", "body.0.bias")
NORM = tuple(f"body.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
HEAD = ("head.weight", "head.bias")


class Named(SmallNetwork):
    """A bias too in the first layer, and a second normalization without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0] = nn.Linear(6, 8)
        self.body.add_module("4", nn.GroupNorm(2, 8))


GROUP = ("body.4.weight", "body.4.bias")
CASES = {
    "all": BODY + NORM + GROUP + HEAD,
    "none": (),
    "parameters": BODY + NORM[:2] + GROUP + HEAD,
    "buffers": NORM[2:],
    "head": HEAD,
    "body": BODY + NORM + GROUP,
    "norm": NORM + GROUP,
    "body.0": BODY,
    "body.0.bias": BODY[1:],
    "*.bias": ("body.0.bias", "body.1.bias", "body.4.bias", "head.bias"),
    "body.?.running_*": NORM[2:4],
    ("head", "body.0"): BODY + HEAD,
    ("all", "-norm"): BODY + HEAD,
    ("body", "-buffers", "-body.4"): BODY + NORM[:2],
    ("all", "-body", "body.0.bias"): ("body.0.bias", *HEAD),
    ("-head", "head"): HEAD,
    (): (),
}


@pytest.mark.parametrize("what", CASES, ids=str)
def test_select(what: str | tuple[str, ...]) -> None:
    assert select(Named(), what) == CASES[what]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"selection=heat: .*did you mean 'head'"):
        select(Named(), "heat")
    with pytest.raises(ConfigError, match=r"body\.9"):
        select(Named(), ("all", "-body.9"))
    with pytest.raises(ConfigError, match="body"):
        select(Named(), "bod")  # a prefix ends at a dot


def test_head_needs_a_head() -> None:
    with pytest.raises(ConfigError, match=r"model=Sequential: .*'head'"):
        select(nn.Sequential(nn.Linear(2, 2)), "head")
    assert select(nn.Sequential(nn.Linear(2, 2)), "norm") == ()


def test_model_tree_copies() -> None:
    network = SmallNetwork()
    copied = model_tree(network)
    network.head.bias.data.fill_(9)
    assert not (copied["head.bias"] == 9).any()
    assert list(leaves(copied)) == list(network.state_dict())


def test_rows_finite_names_the_clients() -> None:
    good = torch.zeros(3, 2)
    bad = good.clone()
    bad[1, 0] = math.inf
    worse = torch.tensor([0.0, 0.0, math.nan])
    finite = rows_finite(tree({"a": good, "b": bad, "c": worse, "n": torch.arange(3)}, 3))
    assert finite.tolist() == [True, False, False]


def test_rows_of_large_values_are_finite() -> None:
    large = torch.full((2, 4), 3e38)  # their sum is not
    finite = rows_finite(tree({"a": large, "b": torch.tensor([1.0, torch.inf])}, 2))
    assert finite.tolist() == [True, False]


class Hooked(nn.Module):
    """What ``state_dict`` returns is not what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 2), nn.Linear(2, 2)
        self.body.register_buffer("seen", torch.zeros(1))
        self.body.register_buffer("constant", torch.zeros(1), persistent=False)
        self.register_state_dict_post_hook(lambda module, values, prefix, _: values.pop(f"{prefix}body.weight"))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_what_a_client_owns_does_not_depend_on_hooks() -> None:
    expected = ["body.weight", "body.bias", "body.seen", "head.weight", "head.bias"]
    assert list(leaves(model_tree(Hooked()))) == expected == list(select(Hooked(), "all"))
