"""Settings: dataclasses whose annotated fields say once what an option is: type, range, default, one line of help."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from fedpers.errors import ConfigError, check, one_of

T = TypeVar("T", bound="Settings")
M = TypeVar("M")
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
"""Kinds of pydantic's errors that are about a range."""
_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}

RENAMED = {"runtime.cohort": "runtime.clients_at_once"}
"""Keys that have another name now."""
_KNOWN: dict[type, dict[str, Option]] = {}
"""Options by settings class, kept here rather than in the class, which may travel."""


class Settings:
    """Base of dataclasses whose fields are options, checked when an object is made.

        @dataclass(kw_only=True)
        class ProximalUpdate(LocalUpdate):
            mu: Annotated[float, Field(ge=0, description="strength of the pull; 0 is fedavg")] = 0.1

    Types and ranges are checked as by :mod:`pydantic` in strict mode: a whole number does for a float, a list for a
    tuple, and nothing else is converted; infinity and NaN are no numbers. A class that overrides ``__post_init__``
    calls ``super().__post_init__()`` first, and then finds every option in its range.

    Parameters
    ----------
    group : str
        What is typed before a field's name: ``class Training(Settings, group="training")``. Subclasses inherit it.

    Raises
    ------
    ConfigError
        If a value does not fit; it names the key as it is typed, the value and what is allowed.
    """

    _group: ClassVar[str] = ""

    def __init_subclass__(cls, group: str | None = None, **further: Any) -> None:
        super().__init_subclass__(**further)
        if group is not None:
            cls._group = group

    def __post_init__(self) -> None:
        for option in options(type(self)).values():
            object.__setattr__(self, option.name, option.check(getattr(self, option.name)))

    @classmethod
    def key(cls, name: str) -> str:
        """A field as it is typed: ``training.lr``."""
        return f"{cls._group}.{name}" if cls._group else name


class Choices:
    """Marks the option that names a choice of a group, and says in a line what each choice is.

    Parameters
    ----------
    **help
        ``Choices(iid="samples dealt at random", dirichlet="...")``.
    """

    def __init__(self, **help: str) -> None:
        self.help = help

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.help))


class OpenChoices(Choices):
    """The same, and ``module:Name`` for a choice of the user's own."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        custom = core_schema.str_schema(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
        return core_schema.union_schema([core_schema.literal_schema(list(self.help)), custom])


CUSTOM = "module:Name"
"""In :class:`OnlyFor`: every choice of the user's own."""


class OnlyFor:
    """Marks an option that only some choices of a group have: ``OnlyFor("dirichlet")``.

    Parameters
    ----------
    *names : str
        Choices that have it, with the field's default.
    **defaults
        Choices that have it with a default of their own.
    """

    def __init__(self, *names: str, **defaults: Any) -> None:
        self.names, self.defaults = names, defaults

    def __contains__(self, name: object) -> bool:
        if ":" in str(name):
            return CUSTOM in self.names
        return name in self.names or name in self.defaults

    def default(self, choice: str, otherwise: Any) -> Any:
        """Default that `choice` has, `otherwise` being that of the field."""
        return self.defaults.get(choice, otherwise)


class Needed:
    """Marks an option that some choices of a group cannot do without, though its default is null: ``Needed("csv")``.

    Parameters
    ----------
    *names : str
        These choices.
    """

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True)
class Option:
    """One field of a settings class.

    Attributes
    ----------
    name : str
    key : str
        As it is typed; a choice is typed as its group alone.
    hint : Any
        Its type, with range and help.
    default : Any
        :data:`dataclasses.MISSING` if there is none.
    needed : bool
        Whether the choice it belongs to cannot do without it, whatever the default.
    """

    name: str
    key: str
    hint: Any
    default: Any
    needed: bool = False

    @property
    def help(self) -> str:
        """One line on what it does; empty if its author wrote none."""
        return next((info.description for info in _marks(self.hint, FieldInfo) if info.description), "")

    @property
    def allowed(self) -> str:
        """What it may be, in words: ``"a number > 0, or null"``."""
        return describe(self.hint)

    @property
    def only_for(self) -> OnlyFor | None:
        """Choices of its group that have it; None for all of them."""
        return next(iter(_marks(self.hint, OnlyFor)), None)

    @cached_property
    def nested(self) -> type[Settings] | None:
        """The settings class whose objects it holds, if it does."""
        kinds = [_plain(kind) for kind in _alternatives(self.hint)]
        return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.hint, config=_STRICT)

    def check(self, value: Any) -> Any:
        """Return a value of the right type and range.

        Raises
        ------
        ConfigError
            If it is neither.
        """
        if self.nested is not None:  # settings were checked when they were made
            fits = isinstance(value, self.nested) or (value is None and type(None) in _alternatives(self.hint))
            kind = self.nested.__name__
            allowed = f"{kind}(...), not a mapping" if isinstance(value, Mapping) else describe(self.hint)
            check(fits, self.key, value, allowed)
            return value
        try:
            return self._adapter.validate_python(_as_meant(value, self.hint))
        except ValidationError as error:
            raise self._refusal(value, error) from None

    def _refusal(self, value: Any, error: ValidationError) -> ConfigError:
        """Name the entry at fault, which may lie within a mapping."""
        key, hint = self.key, self.hint
        value = value if isinstance(value, list) else _as_meant(value, hint)
        for step in error.errors()[0]["loc"]:
            inner = next((get_args(kind) for kind in map(_plain, _alternatives(hint)) if _is_mapping(kind)), None)
            if inner is None or not isinstance(value, Mapping) or step not in value:
                break
            key, value, hint = f"{key}.{step}", value[step], inner[1]
            names = _names(inner[0])
            if names and step not in names:
                return ConfigError(key, value, one_of(names, str(step)))
        out_of_range = any(problem["type"] in _RANGES for problem in error.errors())
        return ConfigError(key, value, describe(hint, value) if out_of_range or _names(hint) else _type_alone(hint))


def options(kind: type[Settings]) -> dict[str, Option]:
    """Options of a settings class by name, in their order."""
    if kind not in _KNOWN:
        hints, known = get_type_hints(kind, include_extras=True), dict[str, Option]()
        declared: tuple[dataclasses.Field[Any], ...] = fields(kind) if is_dataclass(kind) else ()
        for field in declared:
            if field.init:
                hint = hints[field.name]
                key = kind._group if _marks(hint, Choices) else kind.key(field.name)
                known[field.name] = Option(field.name, key, hint, _default(field))
        _KNOWN[kind] = known
    return _KNOWN[kind]


def describe(hint: Any, value: Any = None) -> str:
    """Say in words what a type allows.

    Parameters
    ----------
    hint : Any
        A type with or without ranges. A ``Field(title=...)`` is taken as it stands.
    value : Any, optional
        What was given, of which the nearest name is suggested.
    """
    titles = [info.title for info in _marks(hint, FieldInfo) if info.title]
    if titles:
        return titles[0]
    kinds = [kind if kind is hint else _marked_as(kind, hint) for kind in _alternatives(hint)]
    parts = [_described(kind, value) for kind in kinds]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, or {parts[-1]}"


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make settings from plain values, as they are composed or typed.

    Parameters
    ----------
    kind : type
    values : mapping
        By field name; nested settings as mappings.

    Raises
    ------
    ConfigError
        If a name is unknown or missing, or a value does not fit.
    """
    known = options(kind)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            if (key := kind.key(name)) in RENAMED:
                raise ConfigError(key, value, f"{RENAMED[key]}, as it is called now")
            raise ConfigError(kind.key(name), value, f"a known key: {one_of(known, name)}")
        nested = known[name].nested
        given[name] = build(nested, value) if nested is not None and isinstance(value, Mapping) else value
    for name, option in known.items():
        if name not in given and option.default is MISSING:
            raise ConfigError(option.key, None, "a value")
    return kind(**given)


def choices(kind: type[Settings]) -> dict[str, str]:
    """Choices of a group, each with a line of help."""
    return next(iter(_marks(options(kind)["name"].hint, Choices))).help


def choice_options(kind: type[Settings], choice: str) -> dict[str, Option]:
    """Options that one choice of a group has, each with the default it has there."""
    chosen: dict[str, Option] = {}
    for name, option in options(kind).items():
        only = option.only_for
        if name == "name":
            chosen[name] = replace(option, default=choice)
        elif only is None or choice in only:
            chosen[name] = option if only is None else replace(option, default=only.default(choice, option.default))
            if any(choice in mark.names for mark in _marks(option.hint, Needed)):
                chosen[name] = replace(chosen[name], needed=True)
    return chosen


def plain(value: Any) -> Any:
    """A default as Hydra stores it: tuples as lists, settings as mappings."""
    if isinstance(value, Settings):
        return {name: plain(getattr(value, name)) for name in options(type(value))}
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


# --------------------------------------------------------------- types and their marks


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _marks(hint: Any, kind: type[M]) -> list[M]:
    """Marks of a kind on an annotated type."""
    return [mark for mark in get_args(hint)[1:] if isinstance(mark, kind)] if get_origin(hint) is Annotated else []


def _plain(hint: Any) -> Any:
    """A type without marks."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Types of a union; one of anything else, with its marks."""
    return get_args(_plain(hint)) if get_origin(_plain(hint)) in (Union, types.UnionType) else (hint,)


def _marked_as(kind: Any, hint: Any) -> Any:
    """A type of an annotated union, with the marks of the whole where they may be about it."""
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return Annotated[(kind, *marks)] if marks and _origin(kind) in (int, float, str) else kind


def _names(hint: Any) -> tuple[Any, ...]:
    """Values of the literals in a type."""
    if marks := _marks(hint, Choices):
        return tuple(marks[0].help)
    kinds = [kind for kind in map(_plain, _alternatives(hint)) if get_origin(kind) is Literal]
    return tuple(name for kind in kinds for name in get_args(kind))


def _origin(hint: Any) -> Any:
    return get_origin(_plain(hint)) or _plain(hint)


def _is_mapping(hint: Any) -> bool:
    return isinstance(_origin(hint), type) and issubclass(_origin(hint), Mapping)


def _is_list(hint: Any) -> bool:
    kind = _origin(hint)
    return isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str


def _described(hint: Any, value: Any) -> str:
    """One alternative in words."""
    origin, names = _origin(hint), _names(hint)
    if names:
        if len(names) == 1 and get_origin(_plain(hint)) is Literal:
            return str(names[0])
        custom = f", or {CUSTOM}" if _marks(hint, OpenChoices) else ""
        return one_of(map(str, names), value if isinstance(value, str) else "") + custom
    if _is_list(hint):
        return f"a list, each entry {describe(get_args(_plain(hint))[0])}"
    mapping = _is_mapping(hint) or (isinstance(origin, type) and issubclass(origin, Settings))
    noun = "a mapping of keys to values" if mapping else _NOUNS.get(origin) or f"a {origin.__name__}"
    bounds = [bound for info in _marks(hint, FieldInfo) for bound in info.metadata]
    if any(isinstance(bound, MinLen) for bound in bounds):
        noun = f"{noun} that is not empty"
    limits = [f"{_SIGNS[type(b)]} {getattr(b, type(b).__name__.lower()):g}" for b in bounds if type(b) in _SIGNS]
    return f"{noun} {' and '.join(limits)}" if limits else noun


def _type_alone(hint: Any) -> str:
    """What is allowed without its range, for a value of another type."""
    titles = [info.title for info in _marks(hint, FieldInfo) if info.title]
    return titles[0] if titles else " or ".join(_described(_plain(kind), None) for kind in _alternatives(hint))


def _as_meant(value: Any, hint: Any) -> Any:
    """Lists, which is what configuration has, as tuples where these are meant, and whole numbers as floats."""
    kinds = {_origin(kind) for kind in _alternatives(hint)}
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in kinds and int not in kinds else value
