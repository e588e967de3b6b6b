"""The client half of a method, and the Flower ``ClientApp`` it becomes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import flwr.app as flower
import torch
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from tensordict import TensorDict
from torch import Tensor, nn

from fedpers.cohort import (
    Batch,
    Cohort,
    Network,
    Reply,
    Selection,
    Training,
    Tree,
    View,
    entries,
    leaves,
    measure,
    model_tree,
    prepare,
    sample_losses,
    select,
)
from fedpers.cohort.plan import lonely_sample, smallest_batch
from fedpers.cohort.tree import rows_finite
from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.errors import ConfigError, TrainingError, check
from fedpers.strategies.records import (
    CONFIG,
    METRICS,
    flatten_state,
    row,
    to_record,
    trees,
    unflatten_state,
)

IDENTIFY = "query.identify"
"""Message a strategy sends to learn which node holds which client."""
EXTRA = "train/"
"""What the names of a method's own training metrics begin with (:attr:`fedpers.cohort.Reply.metrics`)."""
STATE = "fedpers"
"""Record of a context that holds a client's personal state."""

Received = Mapping[str, Tree]
"""What the server sent, by record: one tree for the whole cohort (batch size []) or one per client ([K])."""


@dataclass(kw_only=True)
class LocalUpdate:
    """What a client does in a round, written for K clients at once.

    A method overrides :meth:`train`, and :meth:`personalize` if it predicts with something else than received
    entries plus its own. Fields are the method's hyperparameters.

    Attributes
    ----------
    shared, personal : selection
        Entries of the network (see :func:`fedpers.cohort.select`) that go to the server, and that stay. Buffers such
        as BatchNorm statistics belong to the layer they stand in: with ``shared = "all"`` they are averaged too.
    cohort_size : int or None
        How many clients to compute together if the user leaves it to us; None measures it. For methods whose training
        is not made of the core's steps, which is what is measured.
    training : Training
        Optimizer, rates and batches.
    """

    shared: ClassVar[Selection] = "all"
    personal: ClassVar[Selection] = "none"
    cohort_size: ClassVar[int | None] = None
    training: Training = field(default_factory=Training)

    def initial_state(self, model: Tree, module: nn.Module) -> Tree:
        """Personal state of a client that has not trained yet.

        Parameters
        ----------
        model : Tree
            Initial network, batch size [], the same for all clients.
        module : nn.Module
            For :func:`fedpers.cohort.select`.

        Returns
        -------
        Tree
            Batch size [], by role; the default holds the personal entries under ``model``.
        """
        names = select(module, self.personal)
        return TensorDict({"model": model.select(*names)} if names else {}, batch_size=[])

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train K clients; the default trains the whole network.

        Parameters
        ----------
        cohort : Cohort
        received : mapping of record to Tree
        config : mapping
            The message's configuration; ``server-round`` is always there.
        """
        params = cohort.assemble(received["arrays"])
        cohort.fit(params, self.loss)
        return cohort.reply(params, share=self.shared, keep=self.personal)

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """Networks the clients predict with; the default puts personal and received entries together."""
        return cohort.view(received["arrays"])

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of one client on one batch, a scalar; the default is the mean of ``sample_losses``."""
        return batch.mean(sample_losses(self.predict(network, batch.x), batch.y))

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Class scores ``[B, C]`` of one client."""
        return network(x)

    def others(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Mapping[str, Tree | View]:
        """Further networks to be evaluated, by a name that goes before their metrics; none by default."""
        return {}

    def measure(
        self, cohort: Cohort, outputs: Sequence[Tensor], part: Part, config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Metrics ``[K]`` of predictions on one part, see :func:`fedpers.cohort.measure`; a method may add its own."""
        return measure(cohort, outputs, part, with_auc=bool(config.get("auc")))

    def evaluate(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> list[dict[str, float]]:
        """Metrics of each client on its validation and test samples, NaN where it has none.

        Returns
        -------
        list of dict
            ``{part}-{metric}`` of :meth:`measure` for :meth:`personalize`, ``{part}-{name}-{metric}`` for those of
            :meth:`others`; and ``adaptation-gradients``, the gradients computed to personalize before predicting.
        """
        networks = {"": self.personalize(cohort, received, config)}
        networks.update({f"{name}-": network for name, network in self.others(cohort, received, config).items()})
        rows: list[dict[str, float]] = [{} for _ in cohort.clients]
        for part in PARTS[1:]:
            for prefix, params in networks.items():
                columns = self.measure(cohort, cohort.logits(params, part, self.predict), part, config)
                for name, column in columns.items():
                    if prefix and name == "examples":
                        continue
                    for own, value in zip(rows, column.tolist(), strict=True):
                        own[f"{part}-{prefix}{name}"] = value
        for own, taken in zip(rows, cohort.gradients_taken.tolist(), strict=True):
            own["adaptation-gradients"] = float(taken)
        return rows

    def extend(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """What clients work with: network and data, with what the method adds to them.

        A method with modules or parameters of its own returns a network around a copy of `model` that holds them as
        named parts; one with a frozen backbone returns data in which what the backbone computes once has replaced the
        pictures. Parameters that require no gradient are not stacked, sent or stored
        (:func:`fedpers.cohort.tree.state_names`).

        Parameters
        ----------
        model : nn.Module
            Not to be changed.
        data : FederatedData
        seed : int
            What initial values are drawn from.

        Raises
        ------
        ConfigError
            If the method cannot work with the network or the data.
        """
        return model, data

    def initial_arrays(self, template: Tree, module: nn.Module) -> Tree:
        """Arrays the server starts from, batch size []: the shared entries of the initial network.

        Parameters
        ----------
        template : Tree
            The initial network, batch size [].
        module : nn.Module
            The network that :meth:`extend` returned, prepared.
        """
        return template.select(*select(module, self.shared))

    def pack(self, records: dict[str, Tree]) -> dict[str, Tree]:
        """Form in which one client's records travel, e.g. without zeros; see :meth:`PersonalizedStrategy.unpack`."""
        return records

    def smallest_batch(self, size: int) -> int:
        """Samples in the smallest batch a client of `size` samples trains on."""
        return smallest_batch(size, self.training.batch_size, self.training.drop_last)

    def client_app(
        self,
        model: nn.Module,
        data: FederatedData,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mods: Sequence[Mod] = (),
    ) -> CohortApp:
        """Make the Flower ``ClientApp`` of this method; see :class:`CohortApp`."""
        return CohortApp(self, model, data, seed=seed, device=device, mods=mods)


@dataclass(frozen=True)
class Outcome:
    """What one client answers: records and metrics, or the reason why it has none."""

    content: flower.RecordDict | None
    error: str = ""


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
        their personal state is in their contexts. What a mod draws from a global generator no seed of ours decides.

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
    ) -> None:
        self.update = update
        self.mods = tuple(mods)
        for mod in self.mods:
            name = getattr(mod, "__name__", type(mod).__name__)
            # in the middle of a round it expects messages that only Flower's secure aggregation workflow sends
            own = ".secure_aggregation." in f"{getattr(mod, '__module__', '')}."
            check(not own and callable(mod), "mods", name, "mods that pass one training message on, such as LocalDpMod")
        self.device = torch.device(device)
        self.seed = seed
        # where clients compute, so that what a method computes once is computed there
        model, data = update.extend(copy.deepcopy(model).to(self.device), data.to(self.device), seed)
        self.data = data.to(self.device)
        self.module = prepare(model).to(self.device)
        self.template = model_tree(self.module)
        self.initial_state = update.initial_state(self.template, self.module)
        self.sizes = self.data.sizes("train").tolist()
        self._check_network()
        self._check_training()
        self._register()

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

    def restrict(self, clients: Sequence[int]) -> Self:
        """Copy with the data of some clients only, to compute them on another machine."""
        own = copy.copy(self)
        own.data = self.data.restrict(clients)
        own.sizes = own.data.sizes("train").tolist()
        own.module = copy.deepcopy(self.module)
        own._register()  # its own calls, which do not hold on to all data
        return own

    def to(self, device: torch.device | str) -> Self:
        """Move what clients compute with to a device."""
        self.device = torch.device(device)
        self.data = self.data.to(self.device)
        self.module = self.module.to(self.device)
        self.template = self.template.to(self.device)
        self.initial_state = self.initial_state.to(self.device)
        return self

    def _check_network(self) -> None:
        """Refuse a network that does not fit the data, or draws from a global generator."""
        name = type(self.module).__name__
        key = torch.zeros((), dtype=torch.int64, device=self.device)
        network = Network(self.module.train(), entries(self.template.clone()), key=key)
        before = _generator_states(self.device)
        try:
            with torch.no_grad():
                out = self.update.predict(network, self.data.x[:2])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = list(self.data.x.shape[1:])
            raise ConfigError("model", name, f"a network that takes samples of shape {shape} ({error})") from error
        classes = self.data.num_classes
        if out.dim() != 2 or out.shape[1] < classes:
            raise ConfigError("model", name, f"a network with {classes} outputs, not {list(out.shape[1:])}")
        if any(not torch.equal(a, b) for a, b in zip(before, _generator_states(self.device), strict=True)):
            raise ConfigError("model", name, "a network without random functions; use nn.Dropout layers")
        self._check_loss(network)
        self.needs_pairs = self._fails_alone(network)
        if self.needs_pairs:
            for client, size in enumerate(self.sizes):
                if self.update.smallest_batch(size) == 1:
                    raise lonely_sample(self.update.training.batch_size, client)

    def _check_loss(self, network: Network) -> None:
        """Refuse a method whose loss counts padding: the same samples, padded, must give the same loss."""
        if type(self.update).loss is LocalUpdate.loss or len(self.data.x) < 3:
            return
        x, y = self.data.x[:3], self.data.y[:3]
        weight = torch.tensor([1.0, 1, 1, 0, 0], device=x.device, dtype=x.dtype if x.is_floating_point() else None)
        padded = Batch(torch.cat([x, x[:2]]), torch.cat([y, y[:2]]), weight)
        with torch.no_grad():
            plain = self.update.loss(network, Batch(x, y))
            masked = self.update.loss(network.seeing(padded), padded)
        if not torch.allclose(plain, masked, rtol=1e-3, atol=1e-5, equal_nan=True):
            name = f"{type(self.update).__name__}.loss"
            raise ConfigError("strategy", name, "a loss that leaves padding out: reduce over samples with batch.mean")

    def _fails_alone(self, network: Network) -> bool:
        """Whether a batch of one sample leaves a layer that normalizes over the batch nothing to go by."""
        try:
            with torch.no_grad():
                return not bool(self.update.predict(network, self.data.x[:1]).isfinite().all())
        except ValueError:  # what batch normalization raises for one value per channel
            return True

    def _check_training(self) -> None:
        """Refuse settings that fit neither network nor data before anything is trained."""
        training = self.update.training
        for group in training.groups or ():
            select(self.module, group, "training.groups")

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
            needs_pairs=self.needs_pairs,
        )

    def run(
        self,
        kind: str,
        clients: Sequence[int],
        state: Tree,
        received: Received,
        config: Mapping[str, Any],
        module: nn.Module | None = None,
    ) -> tuple[list[Outcome], Tree | None, Tensor]:
        """Handle one message type for K clients.

        Parameters
        ----------
        kind : str
            Message type, ``train`` or ``evaluate``, or ``train.action`` for the method ``train_action``.
        clients, state, received, config, module
            See :meth:`cohort` and :class:`LocalUpdate`.

        Returns
        -------
        list of Outcome
            One per client, in their order.
        Tree ``[K]`` or None
            New personal state.
        Tensor ``[K]``
            Which rows of it may be stored; a client with a value that is not finite keeps its former state.
        """
        cohort = self.cohort(clients, state, config, module)
        answer = getattr(self.update, kind.replace(".", "_"))(cohort, received, config)
        if not isinstance(answer, Reply):
            outcomes = [_measured(client, own) for client, own in zip(cohort.clients, answer, strict=True)]
            return outcomes, None, torch.ones(len(outcomes), dtype=torch.bool)
        if answer.state is not None and leaves(answer.state).keys() != leaves(self.initial_state).keys():
            raise ValueError(
                f"{type(self.update).__name__}: the new personal state {sorted(leaves(answer.state))} has other names "
                f"than the initial state {sorted(leaves(self.initial_state))}"
            )
        finite = torch.ones(cohort.size, dtype=torch.bool)
        for stacked in [*answer.records.values(), *([] if answer.state is None else [answer.state])]:
            finite &= rows_finite(stacked).cpu()
        extra = {name: column.tolist() for name, column in answer.metrics.items()}
        losses = (cohort.loss_sum.cpu().double() / cohort.samples_seen.clamp(min=1)).tolist()
        finite &= torch.tensor(losses).isfinite()
        outcomes = []
        for k, client in enumerate(cohort.clients):
            if not finite[k]:
                outcomes.append(Outcome(None, f"training gave values that are not finite (mean loss {losses[k]:g})"))
                continue
            metrics = {
                "num-examples": self.sizes[client],
                "steps": int(cohort.steps_taken[k]),
                "gradients": int(cohort.gradients_taken[k]),
                "samples": int(cohort.samples_seen[k]),
                "train-loss": losses[k],
                **{f"{EXTRA}{name}": float(column[k]) for name, column in extra.items()},
            }
            records = self.update.pack({name: row(s, k) for name, s in answer.records.items()})
            outcomes.append(Outcome(_content(records, metrics)))
        return outcomes, answer.state, finite

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

    def _identify(self, message: flower.Message, context: flower.Context) -> flower.Message:
        content = flower.RecordDict({METRICS: flower.MetricRecord({"partition-id": self.client_of(context)})})
        return flower.Message(content, reply_to=message)

    def _call_one(self, message: flower.Message, context: flower.Context) -> flower.Message:
        client = self.client_of(context)
        if STATE in context.state.array_records:
            state = unflatten_state(context.state.array_records[STATE], self.initial_state)
        else:
            state = self.initial_state.clone().unsqueeze(0)
        received = trees(message.content, self.device)
        (outcome,), new, keep = self.run(
            message.metadata.message_type, [client], state, received, config_of(message.content)
        )
        if outcome.content is None:
            raise TrainingError(outcome.error)
        if new is not None and keep[0]:
            context.state[STATE] = flatten_state(new)
        return flower.Message(outcome.content, reply_to=message)


def _generator_states(device: torch.device) -> list[Tensor]:
    """State of torch's global generators."""
    states = [torch.random.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def config_of(content: flower.RecordDict) -> dict[str, Any]:
    """Configuration of a message, all its config records in one."""
    merged: dict[str, Any] = {}
    for record in content.config_records.values():
        merged.update(record)
    return merged


def _measured(client: int, metrics: Mapping[str, float]) -> Outcome:
    """Answer to an evaluation; NaN is right only where the client has no samples of a part."""
    for name, value in metrics.items():
        if math.isnan(value) and metrics.get(f"{name.partition('-')[0]}-examples", 1.0):
            return Outcome(None, f"{name} is {value}")
    own = {name: value for name, value in metrics.items() if value == value}
    examples = own.get("validation-examples", 0.0) + own.get("test-examples", 0.0)
    return Outcome(_content({}, {"num-examples": examples, **own}))


def _content(records: Mapping[str, Tree], metrics: Mapping[str, float]) -> flower.RecordDict:
    content = flower.RecordDict()
    for name, values in records.items():
        content[name] = to_record(values)
    content[METRICS] = flower.MetricRecord(dict(metrics))
    return content


__all__ = ["CONFIG", "IDENTIFY", "CohortApp", "LocalUpdate", "Outcome", "Received", "config_of"]
