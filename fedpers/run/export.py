"""Networks of a finished or stopped run as modules, from its folder alone where a method allows it.

A checkpoint holds what networks are built from beside values (:mod:`fedpers.data.outline`). A method that computes
something of clients' samples before it predicts (a memory, a choice, some steps of adaptation) needs these: then the
data are loaded, and must be those of the run. The folder may be a stranger's, see :mod:`fedpers.run.reopen`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import flwr.app as flower
import torch
from torch import Tensor, nn

from fedpers.client.app import IDENTIFY
from fedpers.client.predictor import Inputs, with_values
from fedpers.client.update import LocalUpdate
from fedpers.cohort import Records, entries
from fedpers.data.outline import SamplesNeededError, WithoutSamples, outlined
from fedpers.errors import ConfigError, DataError, FedpersError, check, one_of
from fedpers.flower_private import server_identity
from fedpers.models.fields import take_fields
from fedpers.run.checkpoint import Checkpoint, Checkpoints
from fedpers.run.progress import report_from_json
from fedpers.run.reopen import Reopened, check_made, reopen
from fedpers.run.results import read_json
from fedpers.run.setup import Setup, initial_network, prepare_run
from fedpers.runtime.grid import RUN_ID
from fedpers.runtime.local import LocalGrid
from fedpers.runtime.states import DamagedError, read_states
from fedpers.server.common import is_common
from fedpers.settings import RuntimeConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedpers.data import FederatedData

Round = Literal["last", "best"]


@dataclass(frozen=True)
class Exported:
    """A network of a run.

    Attributes
    ----------
    module : nn.Module
        In evaluation mode, on the CPU.
    round : int
        After which it is as it is.
    method : str
    client : int or None
        None for the server's.
    name : str
        What the data call the client; empty if they do not.
    """

    module: nn.Module
    round: int
    method: str
    client: int | None = None
    name: str = ""


def load_client(
    folder: str | Path, client: int | str, round: Round = "last", overrides: Sequence[str] = ()
) -> nn.Module:
    """Load a client's network, with which it is evaluated in the run.

    Parameters
    ----------
    folder : str or Path
        The run's.
    client : int or str
        Its number, or what the data call it.
    round : {"last", "best"}
        Of the last checkpoint, or the round that was selected, whose state ``checkpoint.best=true`` keeps.
    overrides : sequence of str
        ``key=value``; code of your own counts only when you name it, e.g. ``model.name=mine:Net``.

    Returns
    -------
    nn.Module
        From samples ``[B, ...]``, as ``FederatedData.x`` holds them, to scores ``[B, ...]``; in evaluation mode, on
        the CPU. The network itself, or a :class:`~fedpers.client.predictor.Predictor` around it.

    Raises
    ------
    FedpersError
        If the run, the client or the state of that round is not there, or samples are needed that are not.
    """
    return export_client(folder, client, round, overrides).module


def load_server(folder: str | Path, round: Round = "last", overrides: Sequence[str] = ()) -> nn.Module:
    """Load the network that all clients of a run have in common.

    Parameters and errors are those of :func:`load_client`.

    Raises
    ------
    FedpersError
        Also if the method has no such network.
    """
    return export_server(folder, round, overrides).module


def export_client(folder: str | Path, client: int | str, round: Round, overrides: Sequence[str]) -> Exported:
    """:func:`load_client`, with what there is to say of it."""
    return _export(Path(folder), round, overrides, lambda state: state.client(client))


def export_server(folder: str | Path, round: Round, overrides: Sequence[str]) -> Exported:
    """:func:`load_server`, with what there is to say of it."""
    return _export(Path(folder), round, overrides, lambda state: state.server())


def _export(folder: Path, round: Round, overrides: Sequence[str], make: Callable[[_State], Exported]) -> Exported:
    """Make a network of what a checkpoint says of the data or, where that does not do, of the data."""
    opened = reopen(folder, overrides, "export")
    checkpoint = _checkpoint(folder, round, opened)
    opened.check_settings(checkpoint)
    config = replace(opened.config, runtime=RuntimeConfig(device="cpu"))
    outline, reason = checkpoint.content.get("outline"), "the checkpoint does not say what they are like"
    if isinstance(outline, Mapping):
        try:
            setup = prepare_run(config, outlined(outline, config.training.batch_size))
        except (ConfigError, DataError) as error:
            reason = f"without them nothing can be made: {str(error).removesuffix('.')}"
        else:
            reason = "the network's initial values do not follow from the seed alone"
            if setup.network == checkpoint.content.get("network"):
                try:
                    return make(_State(opened, checkpoint, setup))
                except SamplesNeededError:
                    reason = f"{config.strategy['name']} computes something of them before a client predicts"
    try:
        setup = prepare_run(config)
    except FedpersError as error:
        raise FedpersError(f"the samples of {folder} are needed ({reason}), but: {error}") from error
    check_made(folder, checkpoint, setup)
    return make(_State(opened, checkpoint, setup))


def _checkpoint(folder: Path, round: str, opened: Reopened) -> Checkpoint:
    """The checkpoint of the last round that has one, or of the best round."""
    check(round in ("last", "best"), "round", round, one_of(("last", "best"), str(round)))
    if round == "last":
        for checkpoint in opened.checkpoints(folder):
            return checkpoint
        raise FedpersError(f"no checkpoint in {folder} is whole.")
    kept = Checkpoints(folder / "checkpoints")
    best = read_json(folder / "summary.json").get("selected_round")
    if best is None:  # it has not been written: the newest of those that were the best when they were written
        for checkpoint in kept.whole(best=True):
            return checkpoint
        raise FedpersError(f"{folder}: no round has been selected yet; round=last takes the last checkpoint.")
    for checkpoint in itertools.chain(kept.whole(best=True), kept.whole()):
        if checkpoint.round == best:
            return checkpoint
    reason = "it is missing or damaged" if opened.config.checkpoint.best else "the run had checkpoint.best=false"
    raise FedpersError(
        f"{folder}: the state of the selected round, {best}, is not kept ({reason}); "
        "round=last takes the last checkpoint."
    )


class _State:
    """State of a run after a round, with what it is of."""

    def __init__(self, opened: Reopened, checkpoint: Checkpoint, setup: Setup) -> None:
        self.config, self.setup = replace(opened.config, runtime=RuntimeConfig(device="cpu")), setup
        self.folder, self.round = checkpoint.folder, checkpoint.round
        try:
            self.arrays, self.state = checkpoint.read_server(setup.app)
            checkpoint.check_clients(setup.app)
            self.report = report_from_json(checkpoint.content["report"])
            if self.report.round != self.round:
                raise ValueError(f"a report of round {self.report.round}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{checkpoint.folder} does not describe a run.") from error

    def client(self, given: int | str) -> Exported:
        """Network of a client."""
        client = _number(given, self.setup.data)
        with self._grid([client]) as grid:
            received = self._received(client, grid)
            assert grid.engine is not None
            module = self.setup.app.network_of(
                client, grid.engine.store.gather([client]), received, {"server-round": self.round}, self._inputs(client)
            )
        names = self.setup.data.client_names
        return Exported(module, self.round, str(self.config.strategy["name"]), client, names[client] if names else "")

    def server(self) -> Exported:
        """The common network."""
        app, method = self.setup.app.first_kind, str(self.config.strategy["name"])
        client = next(c for c in range(self.setup.data.num_clients) if c not in self.setup.data.unseen)
        if entries(self.arrays).keys() == entries(app.template).keys():
            with self._grid([client]) as grid:
                received = self._received(client, grid)
            if is_common(app, self.arrays, received):
                return Exported(with_values(app.module, entries(self.arrays)), self.round, method)
        raise FedpersError(
            f"strategy={method} has no network that all clients are sent whole: name a client, whose network it is."
        )

    @contextmanager
    def _grid(self, clients: Sequence[int]) -> Iterator[LocalGrid]:
        """Grid with the state of some clients, and the strategy as it was."""
        setup = self.setup
        kind = _UnansweredGrid if isinstance(setup.data, WithoutSamples) else LocalGrid
        grid = kind(setup.app, setup.data.num_clients, clients_at_once=1, workers=1)
        try:
            with server_identity(RUN_ID):
                grid.load(read_states(self.folder, setup.app.initial_state, clients))
                setup.strategy.restore(self.report, self.state)
                setup.strategy.nodes(grid)
                yield grid
        finally:
            grid.close()

    def _received(self, client: int, grid: LocalGrid) -> Records:
        """What a client is sent to be evaluated."""
        strategy = self.setup.strategy
        if client not in strategy.prepare(self.round, self.arrays, [client], grid, "evaluate"):
            reason = strategy.report.evaluation_failures.get(client, "it was left out")
            raise FedpersError(f"client {client} could not be evaluated: {reason.removesuffix('.')}.")
        sent = strategy.send(self.round, self.arrays, [client])
        return sent if isinstance(sent, Mapping) else sent[0]

    def _inputs(self, client: int) -> Inputs | None:
        """What the method makes of samples before networks see them; None if it takes them as they are."""
        setup, config = self.setup, self.config
        app = setup.app.first_kind
        if app.data.x is setup.data.x:
            return None
        kinds = list((setup.model.of_kinds() or {setup.model.name: setup.model}).values())
        network = initial_network(kinds[setup.app.kind(client)], config.seed, setup.data, torch.device("cpu"))
        return _Adapted(app.update, take_fields(network, setup.data.fields), setup.data, app.seed)


class _UnansweredGrid(LocalGrid):
    """Clients say who they are, and know nothing else without their samples."""

    def push_messages(self, messages: Iterable[flower.Message]) -> Iterable[str]:
        """Send the question who is who.

        Raises
        ------
        SamplesNeededError
            At any other message.
        """
        questions = list(messages)
        if any(message.metadata.message_type != IDENTIFY for message in questions):
            raise SamplesNeededError("clients are asked before they predict.")
        return super().push_messages(questions)


class _Adapted:
    """What a method makes of samples when a run begins, for others.

    Parameters
    ----------
    update : LocalUpdate
    network : nn.Module
        The initial one.
    data : FederatedData
        Of which these are more samples.
    seed : int
    """

    def __init__(self, update: LocalUpdate, network: nn.Module, data: FederatedData, seed: int) -> None:
        self.update, self.network, self.seed = update, network, seed
        self.data = data.restrict([0])

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs of the method's networks for samples ``[B, ...]``."""
        nothing, count = torch.zeros(0, dtype=torch.int64), self.data.num_clients
        samples = replace(
            self.data,
            x=x,
            y=self.data.y[:1].expand(len(x), *self.data.y.shape[1:]),
            train=[torch.arange(len(x)), *[nothing] * (count - 1)],
            validation=[nothing] * count,
            test=[nothing] * count,
            drift_round=0,
            drifted=None,
        )
        return self.update.adapt_model(self.network, samples, self.seed)[1].x


def _number(given: int | str, data: FederatedData) -> int:
    """Number of a client."""
    if isinstance(given, str) and given in data.client_names:
        return data.client_names.index(given)
    number = int(given) if not isinstance(given, str) or given.isdigit() else -1
    named = f", or {one_of(data.client_names, str(given))}" if 0 < len(data.client_names) <= 50 else ""
    named = ", or its name" if data.client_names and not named else named
    allowed = f"a number from 0 to {data.num_clients - 1}{named}"
    check(0 <= number < data.num_clients, "client", given, allowed)
    return number
