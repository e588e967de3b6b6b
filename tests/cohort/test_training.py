from __future__ import annotations

import math
from typing import Any

import pytest

from fedpers.cohort import Training
from fedpers.errors import ConfigError

BAD: list[tuple[str, Any]] = [
    ("lr", 0.0),
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", math.inf),
    ("epochs", -1),
    ("steps", -1),
    ("batch_size", -1),
    ("optimizer", "sdg"),
    ("schedule", "cosin"),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("nesterov", True),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("betas", (0.9, 1.0)),
    ("betas", (0.9,)),
    ("eps", 0.0),
    ("clip", 0.0),
    ("lr_decay", 0.0),
    ("lr_decay", 1.1),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Training(**{name: value})
    assert str(caught.value).startswith(f"training.{name}={value}: expected ")


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sgd'"):
        Training(optimizer="sdg")
    with pytest.raises(ConfigError, match=r"training\.groups\.head\.rl.*did you mean 'lr'"):
        Training(groups={"head": {"rl": 0.1}})
    with pytest.raises(ConfigError, match=r"training\.groups\.head\.lr=-1"):
        Training(groups={"head": {"lr": -1}})
