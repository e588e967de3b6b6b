"""Options as annotated fields: what fits, what is refused and how, what is shown."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fedpers.cohort import Cohort, Reply
from fedpers.errors import ConfigError
from fedpers.settings import Settings, build, options
from fedpers.settings.base import Choices, OnlyFor, choice_options, choices, plain
from fedpers.strategies import LocalUpdate, Received


@dataclass(kw_only=True)
class Inner(Settings, group="oven.door"):
    """Nested settings."""

    open: bool = False


@dataclass(kw_only=True)
class Oven(Settings, group="oven"):
    """One field of every kind."""

    name: Annotated[str, Choices(gas="with a flame", steam="with water")] = "gas"
    heat: Annotated[float, Field(gt=0, le=300, description="degrees")] = 200.0
    minutes: Annotated[int | None, Field(ge=1)] = None
    racks: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    fan: bool = True
    mode: Literal["bake", "broil"] = "bake"
    sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], OnlyFor("gas", steam=(1, 2))] = (3,)
    rates: Mapping[str, Mapping[Literal["lr"], Annotated[float, Field(ge=0)]]] | None = None
    label: Annotated[str, Field(min_length=1, title="a word"), OnlyFor("steam")] = "hot"
    door: Inner = field(default_factory=Inner)
    spare: Inner | None = None


REFUSED: list[tuple[str, Any, str]] = [
    ("name", "gass", "oven=gass: expected one of gas, steam (did you mean 'gas'?)."),
    ("heat", True, "oven.heat=True: expected a number."),
    ("heat", "200", "oven.heat=200: expected a number."),
    ("heat", None, "oven.heat=None: expected a number."),
    ("heat", math.nan, "oven.heat=nan: expected a number."),
    ("heat", math.inf, "oven.heat=inf: expected a number."),
    ("heat", 0, "oven.heat=0.0: expected a number > 0 and <= 300."),
    ("heat", 301.0, "oven.heat=301.0: expected a number > 0 and <= 300."),
    ("minutes", 2.0, "oven.minutes=2.0: expected a whole number or null."),
    ("minutes", 0, "oven.minutes=0: expected a whole number >= 1, or null."),
    ("racks", 0, "oven.racks=0: expected a whole number >= 1, or auto."),
    ("racks", "many", "oven.racks=many: expected a whole number >= 1, or auto."),
    ("fan", 1, "oven.fan=1: expected true or false."),
    ("mode", "boil", "oven.mode=boil: expected one of bake, broil (did you mean 'broil'?)."),
    ("sizes", [0], "oven.sizes=[0]: expected a list, each entry a whole number >= 1."),
    ("sizes", "12", "oven.sizes=12: expected a list, each entry a whole number >= 1."),
    ("rates", 3, "oven.rates=3: expected a mapping of keys to values or null."),
    ("rates", {"a": 3}, "oven.rates.a=3: expected a mapping of keys to values."),
    ("rates", {"a": {"rl": 1.0}}, "oven.rates.a.rl=1.0: expected one of lr (did you mean 'lr'?)."),
    ("rates", {"a": {"lr": -1.0}}, "oven.rates.a.lr=-1.0: expected a number >= 0."),
    ("label", "", "oven.label=: expected a word."),
    ("door", {"open": True}, "oven.door={'open': True}: expected Inner(...), not a mapping."),
    ("spare", 3, "oven.spare=3: expected a mapping of keys to values, or null."),
]


@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Oven(**{name: value})
    assert str(caught.value) == sentence


def test_whole_numbers_do_for_floats_and_lists_for_tuples() -> None:
    oven = Oven(heat=250, sizes=[4, 5], rates={"a": {"lr": 1}})  # type: ignore[arg-type]
    assert (oven.heat, type(oven.heat)) == (250.0, float)
    assert oven.sizes == (4, 5)
    assert oven.rates == {"a": {"lr": 1.0}}


@given(st.one_of(st.booleans(), st.text(), st.floats(), st.integers(), st.none(), st.lists(st.integers())))
def test_a_number_in_its_range_and_nothing_else_is_taken(value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 < value <= 300:
        assert Oven(heat=value).heat == value
    else:
        with pytest.raises(ConfigError, match=r"^oven\.heat="):
            Oven(heat=value)


def test_building_from_plain_values_names_what_is_unknown() -> None:
    oven = build(Oven, {"name": "steam", "door": {"open": True}, "spare": {"open": False}, "sizes": [7]})
    assert (oven.name, oven.door, oven.spare, oven.sizes) == ("steam", Inner(open=True), Inner(), (7,))
    for values, sentence in (
        ({"heet": 3}, "oven.heet=3: expected a known key: one of door, fan, heat, "),
        ({"door": {"opn": 1}}, "oven.door.opn=1: expected a known key: one of open (did you mean 'open'?)."),
        ({"door": 3}, "oven.door=3: expected a mapping of keys to values."),
    ):
        with pytest.raises(ConfigError) as caught:
            build(Oven, values)
        assert str(caught.value).startswith(sentence)


def test_a_choice_has_its_options_with_its_defaults() -> None:
    assert choices(Oven) == {"gas": "with a flame", "steam": "with water"}
    gas, steam = (choice_options(Oven, name) for name in ("gas", "steam"))
    assert "label" not in gas
    assert (gas["sizes"].default, steam["sizes"].default, steam["label"].default) == ((3,), (1, 2), "hot")
    assert steam["name"].default == "steam"


def test_options_say_what_they_are() -> None:
    heat = options(Oven)["heat"]
    assert (heat.key, heat.default, heat.help, heat.allowed) == (
        "oven.heat",
        200.0,
        "degrees",
        "a number > 0 and <= 300",
    )
    assert plain(Oven())["door"] == {"open": False}
    assert plain(Oven())["sizes"] == [3]


@dataclass(kw_only=True)
class Mine(LocalUpdate):
    """A method of somebody's own, without annotations but types."""

    mu: float = 0.1
    passes: int = 1

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        raise AssertionError


@pytest.mark.parametrize(("name", "value"), [("mu", True), ("mu", "0.1"), ("mu", math.nan), ("passes", 1.0)])
def test_a_dataclass_of_ones_own_is_checked_too(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^strategy\.{name}="):
        Mine(**{name: value})
    assert Mine(mu=2).mu == 2.0


def test_settings_travel_without_what_checks_them() -> None:
    packed = pickle.dumps(Oven(heat=100.0))
    assert b"pydantic" not in packed
    assert pickle.loads(packed) == Oven(heat=100.0)


def test_settings_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys; from fedpers.app import _main; _main(['--help']); _main(['--help', 'partition', 'training']); "
        "sys.exit(', '.join({'torch', 'flwr', 'hydra', 'numpy', 'tensordict', 'ray'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
