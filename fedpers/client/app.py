"""The Flower ``ClientApp`` that a client half becomes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import flwr.app as flower
import torch
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor, nn

from fedpers.client.checks import check_groups, check_network, check_parts
from fedpers.client.predictor import Inputs, predictor
from fedpers.client.results import CohortResult
from fedpers.client.update import EXTRA, LocalUpdate, Received
from fedpers.cohort import Cohort, Reply, Tree, entries, has_role, leaves, model_tree, prepare, tree
from fedpers.cohort.modules import copy_network
from fedpers.cohort.networks import TRAINED
from fedpers.cohort.tree import rows_finite
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError, TrainingError, check
from fedpers.identity import ADAPTING, INVERSE_VARIANCE, MAX_STEPS, PHASE_STEPS, READS, check_config, identity_of
from fedpers.models import with_head
from fedpers.models.fields import take_fields
from fedpers.records import ARRAYS, CONFIG, METRICS, flatten_state, to_record, trees, unflatten_state
from fedpers.server.postprocessors.base import Postprocessor

IDENTIFY = "query.identify"
"""Message a strategy sends to learn which node holds which client."""
STATE = "fedpers"
"""Record of a context that holds a client's personal state."""

log = logging.getLogger(__name__)


class CohortApp(ClientApp):
    """A ``ClientApp`` for any Flower engine that also runs many clients at once.

    On Flower's engines it is called per client (K = 1): the client's number is the node's ``partition-id`` and its
    personal state lives in ``context.state``. Runtimes of this package call :meth:`run` for K clients.

    Parameters
    ----------
    update : LocalUpdate
        The client half of a method.
    model : nn.Module
        The network; its present values are every client's initial values.
    data : FederatedData
        Data of all clients.
    seed : int
        The run's seed.
    device : torch.device or str
    mods : sequence of Flower mods
        Around training, the first outermost. Clients of an app with mods are computed one at a time everywhere, and
        their personal state is in their contexts. Random numbers that a mod draws from a global generator do not depend
        on `seed`.
    head : str, optional
        Dotted name of the network's last layer where it is not called ``head``; see
        :func:`fedpers.models.with_head`.
    postprocessors : sequence of Postprocessor
        The same postprocessors as the strategy's; those with ``encodes=True`` are applied here.

    Raises
    ------
    ConfigError
        If network, data and method do not fit, or a mod needs a protocol that the strategies do not speak.
    """

    def __init__(
        self,
        update: LocalUpdate,
        model: nn.Module,
        data: FederatedData,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mods: Sequence[Mod] = (),
        head: str | None = None,
        postprocessors: Sequence[Postprocessor] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            hint = ": call it" if callable(model) else ""
            raise ConfigError("model", getattr(model, "__name__", type(model).__name__), f"a torch.nn.Module{hint}")
        allowed = "fedpers.data.FederatedData, which FederatedData.from_clients makes of arrays and sets of clients"
        check(isinstance(data, FederatedData), "data", type(data).__name__, allowed)
        self.update = update
        self.mods = tuple(mods)
        self.encoders = tuple(p for p in postprocessors if p.encodes)
        names = [getattr(mod, "__name__", type(mod).__name__) for mod in self.mods]
        check(not (names and self.encoders), "mods", names, "none with compression, whose replies mods cannot read")
        for mod in self.mods:
            name = getattr(mod, "__name__", type(mod).__name__)
            # in the middle of a round it expects messages that only Flower's secure aggregation workflow sends
            secure = ".secure_aggregation." in f"{getattr(mod, '__module__', '')}."
            allowed = "mods that pass one training message on, such as LocalDpMod"
            check(not secure and callable(mod), "mods", name, allowed)
        check_parts(update)
        self.identity = identity_of(update, self.encoders, mods=bool(self.mods))
        self.device = torch.device(device)
        self.seed = seed
        # where clients compute, so that what a method computes once is computed there
        allowed = "a network that has parameters, which this one does not"
        check(next(model.parameters(), None) is not None, "model", type(model).__name__, allowed)
        try:
            copied = copy.deepcopy(model)
        except RuntimeError as error:  # of tensors that were computed, not made
            allowed = f"a network that can be copied, e.g. with parametrizations.weight_norm, not weight_norm ({error})"
            raise ConfigError("model", type(model).__name__, allowed) from error
        model, data = take_fields(copied, data.fields).to(self.device), data.to(self.device)
        if head is not None:
            model = with_head(model, head, data.x[:2])
        adapted = update.adapt_model(model, data, seed)
        expected = f"a network and data from adapt_model, not {type(adapted).__name__}"
        check(isinstance(adapted, tuple) and len(adapted) == 2, "strategy", type(update).__name__, expected)
        model, data = adapted
        self.data = data.to(self.device)
        if not self.data.elsewhere and not any(len(positions) for positions in self.data.test):
            log.warning("%s: no client has samples for testing, so that nothing will be measured.", self.data.name)
        self.module = prepare(model).to(self.device)
        self.template = model_tree(self.module)
        self.initial_state = self._initial_state()
        self.sizes = self.data.sizes("train").tolist()
        self.traits = check_network(update, self.module, self.template, self.data)
        check_groups(update.training.groups or (), self.module)
        self._register()

    def _initial_state(self) -> Tree:
        """Personal state of a client that has not trained: the method's, encoders', and the count of trainings."""
        state = self.update.initial_state(self.template, self.module)
        arrays = self.update.initial_arrays(self.template, self.module)
        roles = set(state.keys())
        for encoder in self.encoders:
            initial, allowed = encoder.client_state(arrays), f"a role that {type(self.update).__name__} does not keep"
            check(encoder.role not in roles, "postprocessors", encoder.role, allowed)
            if initial is not None:
                state.set(encoder.role, initial)
        if has_role(state, TRAINED):
            name = type(self.update).__name__
            raise ConfigError("strategy", name, f"no role '{TRAINED}' in initial_state; use cohort.trainings")
        if leaves(state):
            state.set(TRAINED, torch.zeros((), dtype=torch.int64, device=self.device))
        return state

    def _register(self) -> None:
        """Answer all message types that the method knows."""
        super().__init__()
        mods = list(self.mods)
        self.train(mods=mods)(self._call_one)
        self.evaluate()(self._call_one)
        self.query("identify")(self._identify)
        for name in dir(type(self.update)):
            kind, _, action = name.partition("_")
            if kind in ("train", "evaluate", "query") and action and callable(getattr(self.update, name)):
                getattr(self, kind)(action, mods=mods if kind == "train" else None)(self._call_one)

    def kind(self, client: int) -> int:
        """Number of a client's kind of network; cohorts are of one kind (:class:`~fedpers.client.mixed.MixedApp`)."""
        return 0

    @property
    def first_kind(self) -> CohortApp:
        """App of the first kind of network."""
        return self

    @property
    def largest_kind(self) -> CohortApp:
        """App of the kind of network with most parameters."""
        return self

    def restrict(self, clients: Sequence[int]) -> Self:
        """Copy with the data of some clients only, to compute them on another machine; of none for what all share."""
        return self.with_data(self.data.restrict(clients))

    def with_data(self, data: FederatedData) -> Self:
        """Copy with other data of the same kind, on the same device; frozen parameters are shared with it."""
        part = copy.copy(self)
        part.data = data
        part.sizes = data.sizes("train").tolist()
        part.module = copy_network(self.module)
        part._register()  # its own calls, which do not hold on to all data
        return part

    def to(self, device: torch.device | str) -> Self:
        """Move what clients compute with to a device."""
        self.device = torch.device(device)
        self.data = self.data.to(self.device)
        self.module = copy_network(self.module, self.device)  # others may share its frozen parameters, where they lie
        self.template = self.template.to(self.device)
        self.initial_state = self.initial_state.to(self.device)
        return self

    def initial_arrays(self) -> flower.ArrayRecord:
        """What the server starts from, see :meth:`LocalUpdate.initial_arrays`."""
        return to_record(self.update.initial_arrays(self.template, self.module))

    def cohort(
        self, clients: Sequence[int], state: Tree, config: Mapping[str, Any], module: nn.Module | None = None
    ) -> Cohort:
        """Make a cohort of `clients`, which must stand in descending order of training samples.

        Parameters
        ----------
        clients : sequence of int ``[K]``
        state : Tree ``[K]``
        config : mapping
            ``server-round`` tells the round.
        module : nn.Module, optional
            A worker's own copy of :attr:`module`.
        """
        return Cohort(
            self.module if module is None else module,
            self.data,
            clients,
            state,
            template=self.template,
            seed=self.seed,
            round=int(config.get("server-round", 0)),
            training=self.update.training,
            needs_two_samples=self.traits.needs_two_samples,
            draws=self.traits.draws,
            shared=self.update.shared,
            personal=self.update.personal,
            max_steps=config.get(MAX_STEPS),
            inverse_variance=bool(config.get(INVERSE_VARIANCE)),
        )

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse a message's configuration with a key that nothing here reads.

        Raises
        ------
        ConfigError
        """
        check_config(config, cast(list[str], self.identity[READS]), type(self.update).__name__)

    def run(
        self,
        kind: str,
        clients: Sequence[int],
        state: Tree,
        received: Received,
        config: Mapping[str, Any],
        module: nn.Module | None = None,
    ) -> tuple[CohortResult, Tree | None, Tensor]:
        """Handle one message type for K clients.

        Parameters
        ----------
        kind : str
            Message type: ``train``, ``evaluate``, or ``KIND.NAME`` with KIND in train, evaluate, query, for the method
            ``KIND_NAME``.
        clients : sequence of int ``[K]``
            In descending order of training samples.
        state : Tree ``[K]``
            Personal state.
        received : mapping of record to Tree
            Batch size [] for what all clients received, or [K].
        config : mapping
            The message's configuration; ``server-round`` tells the round.
        module : nn.Module, optional
            A worker's own copy of :attr:`module`.

        Returns
        -------
        CohortResult
        Tree ``[K]`` or None
            New personal state; None if there is nothing to store.
        Tensor ``[K]``
            Which rows of it may be stored, bool; a client with a value that is not finite keeps its former state.

        Raises
        ------
        TypeError
            If the method returns neither a reply nor a sequence of metrics, or changes what was received in place.
        ValueError
            If the personal state that it returns is not as its initial state declares, or `clients` are in another
            order.
        """
        received = self._with_dtypes(received)
        cohort = self.cohort(clients, state, config, module)
        name = kind.replace(".", "_")
        before = _versions(received)
        output = getattr(self.update, name)(cohort, received, config)
        if changed := [entry for entry, version in _versions(received).items() if version != before[entry]]:
            expected = "expected the server's arrays as they were: other clients read them; change what assemble copies"
            raise TypeError(f"{type(self.update).__name__}.{name} changed received '{changed[0]}' in place: {expected}")
        if not isinstance(output, Reply | Sequence):
            expected = "cohort.reply(...), or a mapping of metrics for each client"
            raise TypeError(f"{type(self.update).__name__}.{name} returned {output!r:.100}: expected {expected}")
        if not isinstance(output, Reply):
            return _measured(cohort.clients, output), None, torch.ones(cohort.size, dtype=torch.bool)
        trains = kind.partition(".")[0] == "train"
        self._check_state(output, trains)
        losses = (cohort.loss_sum.cpu().double() / cohort.samples_seen.clamp(min=1)).tolist()
        finite = _finite_clients(output, losses)
        result = CohortResult(cohort.clients, self._metrics(cohort, losses, output), output.records)
        if type(self.update).encode is not LocalUpdate.encode:
            result.encode = self.update.encode
        for k, client in enumerate(cohort.clients):
            if not finite[k]:
                result.errors[client] = f"training gave values that are not finite (mean loss {losses[k]:g})"
        encoder_states: dict[str, Tree] = {}
        if trains and not config.get(ADAPTING):
            result.records, encoder_states = self._encoded(cohort, result.records, received, state)
        return result, self._stored_state(output.state, state, encoder_states, trains, cohort.size), finite

    def network_of(
        self,
        client: int,
        state: Tree,
        received: Received,
        config: Mapping[str, Any],
        inputs: Inputs | None = None,
    ) -> nn.Module:
        """Network of a client as an evaluation with these values takes it, in evaluation mode, a copy.

        Parameters
        ----------
        client : int
        state : Tree ``[1]``
            Its personal state.
        received, config
            As in :meth:`run`.
        inputs : callable, optional
            See :class:`~fedpers.client.predictor.Predictor`.
        """
        cohort = self.cohort([client], state, config)
        networks = self.update.evaluated_networks(cohort, self._with_dtypes(received), config)
        return predictor(self.module, self.update, networks, inputs)

    def _encoded(
        self, cohort: Cohort, records: dict[str, Tree], received: Received, state: Tree
    ) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """Records ``[K]`` after all encoders, and the encoders' new personal state ``[K]`` by role."""
        changed: dict[str, Tree] = {}
        for encoder in self.encoders:
            records, new = encoder.encode(
                records,
                received[ARRAYS],
                state.get(encoder.role, None),
                seed=self.seed,
                round=cohort.round,
                clients=cohort.clients,
            )
            if new is not None:
                changed[encoder.role] = new
        return records, changed

    def _stored_state(
        self, new: Tree | None, former: Tree, encoder_states: Mapping[str, Tree], trains: bool, size: int
    ) -> Tree | None:
        """Personal state ``[K]`` to store: the method's, the encoders', and the count of trainings; None for none."""
        if new is None and not trains:
            return None
        roles: dict[str, Any] = {**({} if new is None else dict(new.items())), **encoder_states}
        unchanged = [e.role for e in self.encoders if e.role not in roles and has_role(former, e.role)]
        roles.update({role: former[role] for role in unchanged})
        if has_role(former, TRAINED):
            roles[TRAINED] = former[TRAINED] + 1 if trains else former[TRAINED]
        return tree(roles, size) if roles or not trains else None

    def _with_dtypes(self, received: Received) -> Received:
        """What was received, the server's arrays in the network's dtypes: some of Flower's strategies send float64."""
        sent = entries(received[ARRAYS]) if ARRAYS in received else {}
        first = entries(self.template)
        other = {name: v for name, v in sent.items() if name in first and v.dtype != first[name].dtype}
        if not other:
            return received
        arrays = {name: v.to(first[name].dtype) if name in other else v for name, v in sent.items()}
        return {**received, ARRAYS: Tree(arrays, batch_size=received[ARRAYS].batch_size)}

    def _check_state(self, output: Reply, trains: bool) -> None:
        """Refuse to lose what the method says is personal."""
        if output.state is None and not trains:
            return
        core = {TRAINED, *(encoder.role for encoder in self.encoders)}
        expected = {name for name in leaves(self.initial_state) if name.partition("/")[0] not in core}
        returned = set() if output.state is None else set(leaves(output.state))
        name = type(self.update).__name__
        if missing := sorted(expected - returned):
            raise ValueError(f"{name} does not keep '{missing[0]}', which its initial state declares as personal")
        if unknown := sorted(returned - expected):
            raise ValueError(f"{name} keeps '{unknown[0]}', which its initial state does not declare as personal")
        first = leaves(self.initial_state)
        for entry, value in ({} if output.state is None else leaves(output.state)).items():
            is_now, was = (value.dtype, value.shape[1:]), (first[entry].dtype, first[entry].shape)
            if is_now != was:
                actual, declared = (f"{kind} {list(shape)}" for kind, shape in (is_now, was))
                raise ValueError(f"{name} keeps '{entry}' as {actual}, which its initial state declares as {declared}")

    def _metrics(self, cohort: Cohort, losses: Sequence[float], output: Reply) -> list[dict[str, float]]:
        """Counts, losses and the method's own metrics of each client."""
        columns = {f"{EXTRA}{name}": column.tolist() for name, column in output.metrics.items()}
        counts = [values.tolist() for values in (cohort.steps_taken, cohort.gradients_taken, cohort.samples_seen)]
        if cohort.max_steps is not None:
            columns[PHASE_STEPS] = cohort.longest_phase.tolist()
        return [
            {
                "num-examples": self.sizes[client],
                "steps": counts[0][k],
                "gradients": counts[1][k],
                "samples": counts[2][k],
                "train-loss": losses[k],
                **{name: float(column[k]) for name, column in columns.items()},
            }
            for k, client in enumerate(cohort.clients)
        ]

    def client_of(self, context: flower.Context) -> int:
        """Client number of a node.

        Raises
        ------
        ConfigError
            If the node has no ``partition-id`` or the data have no such client.
        """
        client = context.node_config.get("partition-id")
        if not isinstance(client, int) or not 0 <= client < self.data.num_clients:
            raise ConfigError("partition-id", client, f"a whole number from 0 to {self.data.num_clients - 1}")
        return client

    def identify_reply(self, client: int) -> flower.RecordDict:
        """Answer of a client to the server's first question: its number, and what it is (:mod:`fedpers.identity`)."""
        return flower.RecordDict({METRICS: flower.MetricRecord({"partition-id": client}), CONFIG: self.identity})

    def _identify(self, message: flower.Message, context: flower.Context) -> flower.Message:
        return flower.Message(self.identify_reply(self.client_of(context)), reply_to=message)

    def _call_one(self, message: flower.Message, context: flower.Context) -> flower.Message:
        client = self.client_of(context)
        if STATE in context.state.array_records:
            state = unflatten_state(context.state.array_records[STATE], self.initial_state)
        else:
            state = self.initial_state.clone().unsqueeze(0)
        received, config = trees(message.content, self.device), config_of(message.content)
        self.check_config(config)
        result, new, keep = self.run(message.metadata.message_type, [client], state, received, config)
        (client_result,) = result.rows()
        if client_result.content is None:
            raise TrainingError(client_result.error)
        if new is not None and keep[0]:
            context.state[STATE] = flatten_state(new)
        return flower.Message(client_result.content, reply_to=message)


def config_of(content: flower.RecordDict) -> dict[str, Any]:
    """Configuration of a message, all its config records in one."""
    merged: dict[str, Any] = {}
    for record in content.config_records.values():
        merged.update(record)
    return merged


def _versions(received: Received) -> dict[str, int]:
    """How often each tensor was changed in place, by record and name."""
    return {f"{record}/{name}": value._version for record, t in received.items() for name, value in leaves(t).items()}


def _finite_clients(output: Reply, losses: Sequence[float]) -> Tensor:
    """Which clients have only finite values in records, personal state and mean loss, bool ``[K]`` on the CPU."""
    finite = torch.tensor(losses).isfinite()
    for stacked in [*output.records.values(), *([] if output.state is None else [output.state])]:
        finite &= rows_finite(stacked).cpu()
    return finite


def _measured(clients: list[int], rows: Sequence[Mapping[str, float]]) -> CohortResult:
    """Evaluation results: NaN metrics are dropped, and a NaN of a split that has samples is an error.

    ``num-examples`` is the number of validation and test samples.
    """
    result = CohortResult(clients, [])
    client_metrics = []
    for client, metrics in zip(clients, rows, strict=True):
        for name, value in metrics.items():
            if math.isnan(value) and metrics.get(f"{name.partition('-')[0]}-examples", 1.0):
                result.errors.setdefault(client, f"{name} is {value}")
        measured = {name: value for name, value in metrics.items() if not math.isnan(value)}
        examples = measured.get("validation-examples", 0.0) + measured.get("test-examples", 0.0)
        client_metrics.append({"num-examples": examples, **measured})
    result.metrics = client_metrics
    return result
