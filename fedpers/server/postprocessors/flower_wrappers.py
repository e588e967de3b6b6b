"""Flower's ``DifferentialPrivacy...`` strategies, or a wrapper of your own, around a method of this package.

    private = within(DifferentialPrivacyServerSideFixedClipping(FedRep(weighting="uniform"), 0.5, 2.0, 20))
    private.start(grid, initial_arrays)

A wrapper does not tell the strategy inside that it is there, so :func:`within` does. Flower's differ from
:class:`~fedpers.server.postprocessors.privacy.Privacy` (flwr 1.41): they draw from NumPy's global generator; a round
in which a client fails is dropped; a change of exactly 0 raises ZeroDivisionError; the adaptive ones take the share of
clipped changes for the share within the norm, so that the norm runs away from its target, and the server's one sizes
the noise by the next round's norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from fedpers.cohort import Tree, entries
from fedpers.errors import ConfigError, check
from fedpers.server.postprocessors.privacy import check_floats, check_share

if TYPE_CHECKING:
    from fedpers.server.strategy import PersonalizedStrategy

W = TypeVar("W", bound=Strategy)
CLIENT_SIDE = (DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyClientSideAdaptiveClipping)
PRIVATE = (
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    *CLIENT_SIDE,
)


def within(wrapper: W, timeout: float | None = 3600) -> W:
    """Tell the method inside `wrapper` that it is there, and refuse what the two would get wrong together.

    Parameters
    ----------
    wrapper : Strategy
        It holds a method of this package as its ``strategy``, possibly inside further wrappers.
    timeout : float, optional
        Seconds that exchanges of the method's own may take; those of training and evaluation go by ``wrapper.start``.

    Returns
    -------
    Strategy
        `wrapper` itself, to be started in place of the method.

    Raises
    ------
    ConfigError
        If there is no method of this package inside, or the two do not go together. What depends on the arrays is
        refused in the first round.
    """
    from fedpers.server.strategy import PersonalizedStrategy  # which imports this package

    inside = getattr(wrapper, "strategy", None)
    while inside is not None and not isinstance(inside, PersonalizedStrategy):
        inside = getattr(inside, "strategy", None)
    if inside is None:
        allowed = "a strategy that wraps a method of this package, such as DifferentialPrivacyServerSideFixedClipping"
        raise ConfigError("wrapper", type(wrapper).__name__, allowed)
    for private in _private(wrapper):
        _check_method(inside, private)
    inside.wrapper = wrapper
    inside.begin(timeout)
    return wrapper


def check_wrapped(strategy: PersonalizedStrategy, wrapper: Strategy, arrays: Tree) -> None:
    """Refuse arrays that one of Flower's privacy wrappers around `strategy` would get wrong.

    Parameters
    ----------
    strategy : PersonalizedStrategy
    wrapper : Strategy
        What :func:`within` was given.
    arrays : Tree
        The server's, batch size [].

    Raises
    ------
    ConfigError
    """
    for private in _private(wrapper):
        _check_method(strategy, private)  # again, for whoever changed the strategy since
        wrapper_name, name = type(private).__name__, type(strategy).__name__
        check(bool(entries(arrays)), "wrapper", wrapper_name, f"none around {name}, whose clients send nothing")
        check_floats(arrays, wrapper_name)
        for entry, value in entries(arrays).items():
            allowed = f"none around arrays like '{entry}', a single number, which it does not clip"
            check(value.dim() > 0, "wrapper", wrapper_name, allowed)


def _private(wrapper: Strategy) -> Iterator[Strategy]:
    """Flower's privacy wrappers among `wrapper` and those inside of it."""
    layer: Any = wrapper
    while layer is not None:
        if isinstance(layer, PRIVATE):
            yield layer
        layer = getattr(layer, "strategy", None)


def _check_method(strategy: PersonalizedStrategy, wrapper: Strategy) -> None:
    from fedpers.server.strategy import PersonalizedStrategy

    wrapper_name, name = type(wrapper).__name__, type(strategy).__name__
    allowed = f"none around {name}, whose aggregate is more than a mean of the server's arrays"
    check(strategy.plain_mean(), "wrapper", wrapper_name, allowed)
    for postprocessor in strategy.postprocessors:
        setting = postprocessor.setting
        if setting != "aggregation":  # which check_share names
            check(False, "wrapper", wrapper_name, f"none around a {name} that has {setting} of its own")
    check_share(strategy)
    more = isinstance(wrapper, CLIENT_SIDE) and type(strategy).send is not PersonalizedStrategy.send
    check(
        not more,
        "wrapper",
        wrapper_name,
        f"a ServerSide one around {name}, which sends its clients more than its arrays",
    )


__all__ = ["check_wrapped", "within"]
