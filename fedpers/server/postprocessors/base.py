"""What every postprocessor may do around the mean of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fedpers.cohort import Fold, Tree
from fedpers.errors import check
from fedpers.settings.base import Settings

if TYPE_CHECKING:
    from fedpers.server.collect import Schema
    from fedpers.server.strategy import PersonalizedStrategy


class Postprocessor(Settings):
    """Something that is done to clients' replies and their mean, whatever the method.

    A subclass overrides what it needs: each default changes nothing. Where clients compute it may :meth:`encode` what
    they send; where replies are folded, :meth:`reply` sees every reply and :meth:`fold` may replace the method's fold;
    on the server, :meth:`aggregate` sees what the fold yields. Several work in their order in
    ``strategy.postprocessors``.

    Attributes
    ----------
    role : str
        Key of :attr:`state` in the strategy's state, and of :meth:`client_state` in a client's personal state.
    setting : str
        The key it is set by, for messages: ``"privacy"``.
    label : str
        What it is, for messages: ``"fixed"``.
    encodes : bool
        Whether it works where clients compute (:meth:`encode`), so that the client app must have it too.
    state : dict of str to Tensor
        What it knows from round to round: small tensors. The strategy keeps them in its own state.
    """

    role: ClassVar[str] = ""
    setting: ClassVar[str] = "postprocessor"
    encodes: ClassVar[bool] = False
    state: dict[str, Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reset()

    @property
    def label(self) -> str:
        """What it is, for messages."""
        return type(self).__name__

    def reset(self) -> None:
        """Forget :attr:`state`, before a run from the beginning."""
        self.state = {}

    def check(self, strategy: PersonalizedStrategy, arrays: Tree, sampled: int) -> None:
        """Refuse what it cannot work with.

        Parameters
        ----------
        strategy : PersonalizedStrategy
            Whose method it goes with, or not, and in whose ``postprocessors`` it stands.
        arrays : Tree
            The server's, batch size [].
        sampled : int
            Clients asked to train in a round.

        Raises
        ------
        ConfigError
        """

    # ------------------------------------------------------ where clients compute

    def client_state(self, arrays: Tree) -> Tree | None:
        """Personal state under :attr:`role` of a client that has not trained yet, batch size []; None keeps nothing.

        Parameters
        ----------
        arrays : Tree
            The server's initial arrays, batch size [].
        """
        return None

    def encode(
        self,
        records: dict[str, Tree],
        sent: Tree,
        state: Tree | None,
        *,
        seed: int,
        round: int,
        clients: Sequence[int],
    ) -> tuple[dict[str, Tree], Tree | None]:
        """Form in which the replies of K clients travel.

        Parameters
        ----------
        records : dict of str to Tree ``[K]``
        sent : Tree ``[]`` or ``[K]``
            The arrays the clients received.
        state : Tree ``[K]`` or None
            Personal state under :attr:`role`.
        seed, round : int
        clients : sequence of int

        Returns
        -------
        dict of str to Tree ``[K]``
        Tree ``[K]`` or None
            New personal state under :attr:`role`.
        """
        return records, state

    # ------------------------------------------------------ where replies are folded

    def schema(self, schema: Schema) -> Schema:
        """What a reply holds on the wire, from what it would hold without :meth:`encode`."""
        return schema

    def reply(self, records: dict[str, Tree], sent: Tree) -> tuple[dict[str, Tree], dict[str, Tensor]]:
        """Change the replies of K clients before they are folded.

        Parameters
        ----------
        records : dict of str to Tree ``[K]``
            As :meth:`schema` says.
        sent : Tree ``[]`` or ``[K]``
            The arrays the clients received.

        Returns
        -------
        dict of str to Tree ``[K]``
        dict of str to Tensor ``[K]``
            Further metrics of the replies.

        Raises
        ------
        ValueError
            Says why a reply among them cannot be used.
        """
        return records, {}

    def fold(self, arrays: Tree, round: int) -> Fold | None:
        """Empty aggregate for a round's replies in place of the method's, or None; `arrays` are the server's."""
        return None

    # ------------------------------------------------------ on the server

    def aggregate(
        self, strategy: PersonalizedStrategy, means: dict[str, Tree], replies: Mapping[int, Mapping[str, float]]
    ) -> dict[str, Tree]:
        """Change what the fold yields.

        Parameters
        ----------
        strategy : PersonalizedStrategy
            ``strategy.report`` tells the round and the sampled clients.
        means : dict of str to Tree
            Batch size [].
        replies : mapping of int to mapping
            Metrics of each reply in the fold, by client.
        """
        return means

    def summary(self, rounds: int, sampled: int, clients: int) -> dict[str, Any]:
        """What ``summary.json`` and ``manifest.json`` say of it.

        Parameters
        ----------
        rounds : int
            Rounds of training.
        sampled : int
            Clients asked in each of them.
        clients : int
            Clients they are drawn from.
        """
        return {}


def check_mean(postprocessor: Postprocessor, strategy: PersonalizedStrategy, without: str) -> None:
    """Refuse a method whose aggregate is more than a mean of the server's arrays, and a second one of the same kind.

    Parameters
    ----------
    postprocessor : Postprocessor
    strategy : PersonalizedStrategy
    without : str
        Value of the setting that means to do without: ``"none"``.

    Raises
    ------
    ConfigError
    """
    setting, label, method = postprocessor.setting, postprocessor.label, type(strategy).__name__
    allowed = f"{without} for {method}, whose aggregate is more than a mean of the server's arrays"
    check(strategy.plain_mean(), setting, label, allowed)
    kinds = [other.role for other in strategy.postprocessors]
    check(kinds.count(postprocessor.role) <= 1, "postprocessors", kinds, f"one for {setting} at most")


__all__ = ["Postprocessor", "check_mean"]
