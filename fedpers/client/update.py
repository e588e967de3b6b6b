"""The client half of a method: what K clients do in a round, written for one cohort."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from flwr.clientapp.typing import Mod
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import (
    ARRAYS,
    Batch,
    Cohort,
    Given,
    Network,
    Reply,
    Selection,
    Training,
    Tree,
    View,
    select,
    tree,
)
from fedpers.cohort.plan import smallest_batch
from fedpers.cohort.prediction import Predict
from fedpers.custom import check_overrides
from fedpers.data.federated import EVALUATED_PARTS, FederatedData, Part
from fedpers.errors import check
from fedpers.settings.base import Settings

if TYPE_CHECKING:
    from fedpers.client.app import CohortApp
    from fedpers.server.postprocessors import Postprocessor

log = logging.getLogger(__name__)
EXTRA = "train/"
"""What the names of a method's own training metrics begin with (:attr:`fedpers.cohort.Reply.metrics`)."""
Received = Mapping[str, Tree]
"""What the server sent, by record: one tree for the whole cohort (batch size []) or one per client ([K]). To be read,
not changed in place: other cohorts are given the same tensors."""


@dataclass(kw_only=True)
class LocalUpdate(Settings, group="strategy"):
    """What a client does in a round, written for K clients at once.

    A method overrides :meth:`train`, and :meth:`personalize` if it predicts with something else than received
    entries plus personal ones. A further method ``query_NAME`` answers the question NAME of the server half
    (``PersonalizedStrategy.query_clients``), with parameters and result of :meth:`train`. Fields are the method's
    options, see :class:`~fedpers.settings.Settings`.

    Attributes
    ----------
    shared, personal : selection
        Entries of the network (see :func:`fedpers.cohort.select`) that go to the server, and that stay. Buffers such
        as BatchNorm statistics belong to the layer they stand in: with ``shared = "all"`` they are averaged too.
    cohort_size : int or None
        Clients computed together when the user sets ``clients_at_once=auto``; None: chosen by timing steps of
        :meth:`Cohort.fit`. Set it if the method does not train with :meth:`Cohort.fit`, so that the timing says
        nothing.
    config_keys : tuple of str
        Keys of a message's configuration that the method reads beside ``server-round`` and ``auc``; a message with
        any other is refused.
    settles_parts : bool
        Whether the method itself settles what is shared and what is personal, entry by entry or in modules of its own,
        so that a subclass cannot override `shared` and `personal`; of all other methods it can.
    mixes_networks : bool
        Whether clients may have different networks: what is shared does not depend on them.
    mixing_settings : str
        Settings with which it does not, for the error of networks in which it does.
    training : Training
        Optimizer, rates and batches.
    can_finetune : bool
        Whether plain steps fit how the method trains and what it predicts with; if not, `finetune_epochs` must be 0.
    personal_layers : tuple of str, optional
        Parts of the network that stay with clients in place of :attr:`personal`; all others are shared.
    finetune_epochs : int
        Passes over a client's training samples before each evaluation, see :meth:`fine_tuned`.

    Raises
    ------
    ConfigError
        If the method itself settles what is personal and `personal_layers` are given, or it cannot be fine-tuned and
        `finetune_epochs` is not 0.
    """

    shared: ClassVar[Selection] = "all"
    personal: ClassVar[Selection] = "none"
    cohort_size: ClassVar[int | None] = None
    config_keys: ClassVar[tuple[str, ...]] = ()
    settles_parts: ClassVar[bool] = False
    mixes_networks: ClassVar[bool] = False
    mixing_settings: ClassVar[str] = "model.features=N"
    can_finetune: ClassVar[bool] = True
    training: Training = field(default_factory=Training)
    personal_layers: Annotated[
        tuple[Annotated[str, Field(pattern="^[^-]", title="a part of the network")], ...] | None,
        Field(
            title="null, or parts of the network",
            description="parts of the network that stay with clients, e.g. [head,body.2] or [norm], all others are "
            "shared; null: as the method has it",
        ),
    ] = None
    finetune_epochs: Annotated[
        int,
        Field(ge=0, description="passes over a client's training samples before each evaluation, forgotten after it"),
    ] = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_overrides(cls, LocalUpdate)

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs, allowed = self.finetune_epochs, "0, since plain steps do not fit how the method trains or adapts"
        check(self.can_finetune or not epochs, "strategy.finetune_epochs", epochs, allowed)
        if self.personal_layers is not None:
            allowed = "null, for the method itself settles what is shared and what is personal"
            check(not self.settles_parts, "strategy.personal_layers", self.personal_layers, allowed)
            # of one object only: its class keeps what the paper has
            self.__dict__["personal"] = self.personal_layers or "none"
            self.__dict__["shared"] = ("all", *(f"-{part}" for part in self.personal_layers))

    @classmethod
    def key(cls, name: str) -> str:
        """Configuration key of a field: ``training`` stays ``training``, any other field NAME is ``strategy.NAME``."""
        return name if name == "training" else super().key(name)

    @classmethod
    def is_plain(cls) -> bool:
        """Whether clients train, share and predict as those of federated averaging, which any Flower app may be."""
        hooks = ("train", "loss", "personalize")
        return cls.personal == "none" and all(getattr(cls, hook) is getattr(LocalUpdate, hook) for hook in hooks)

    # ------------------------------------------------------------- before training

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
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

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """Personal state of a client that has not trained yet.

        Whether a client has trained is remembered for the method (:attr:`fedpers.cohort.Cohort.trained`).

        Parameters
        ----------
        template : Tree
            The initial network, batch size [], the same for all clients.
        module : nn.Module
            The network that :meth:`adapt_model` returned, prepared; for :func:`fedpers.cohort.select`.

        Returns
        -------
        Tree
            Batch size [], by role; the default holds the personal entries under ``model``.
        """
        names = select(module, self.personal, self._key_of("personal"))
        return tree({"model": template.select(*names)} if names else {})

    def initial_arrays(self, template: Tree, module: nn.Module) -> Tree:
        """Arrays the server starts from, batch size []: the shared entries of the initial network.

        Parameters
        ----------
        template : Tree
            The initial network, batch size [].
        module : nn.Module
            The network that :meth:`adapt_model` returned, prepared.

        Raises
        ------
        ConfigError
            If the network has no part of the name, or all parameters of the shared parts are frozen.
        """
        names = select(module, self.shared, self._key_of("shared"))
        parts = self.shared if isinstance(self.shared, str) else ", ".join(self.shared)
        trained = set(select(module, "parameters"))
        frozen = any(not parameter.requires_grad for parameter in module.parameters())
        allowed = f"a network with parameters that are not frozen in what {type(self).__name__} shares ({parts})"
        shares_nothing = frozen and self.shared != "none" and not trained & set(names)
        check(not shares_nothing, "model", type(module).__name__, allowed)
        return template.select(*names)

    def _key_of(self, attribute: str) -> str:
        """What says which parts are shared or personal, for messages."""
        return f"{type(self).__name__}.{attribute}" if self.personal_layers is None else "strategy.personal_layers"

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """What :meth:`loss` and :meth:`predict` of one client may find in ``batch.given`` and ``network.given``.

        They are tried and timed with it before training; a method that passes nothing along needs none.

        Parameters
        ----------
        template : Tree
            The initial network, batch size [].
        data : FederatedData
        """
        return {}

    # -------------------------------------------------------------------- training

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train K clients; the default trains the whole network.

        :meth:`Cohort.assemble` makes one full network per client of what was received and what is personal,
        :meth:`Cohort.fit` changes these networks in place, and :meth:`Cohort.reply` divides them: the entries of
        `shared` go to the server, those of `personal` stay.

        Parameters
        ----------
        cohort : Cohort
            The K clients: their data, personal state and random draws.
        received : mapping of record to Tree
            What the server sent: batch size [] for the whole cohort, or [K].
        config : mapping
            The message's configuration; ``server-round`` is always there.

        Returns
        -------
        Reply
            Records ``[K]`` for the server, the clients' new personal state ``[K]``, and metrics ``[K]``.
        """
        params = cohort.assemble(received[ARRAYS])
        cohort.fit(params, self.loss)
        return cohort.reply(params)

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss of one client on one batch, a scalar; the default is the mean of the task's losses."""
        return batch.mean(batch.losses(self.predict(network, batch.x)))

    def effective_training(self, training: Training) -> Training:
        """Settings that training takes effect with; a method with rates of its own for some parts adds them."""
        return training

    def encode(self, records: dict[str, Tree]) -> dict[str, Tree]:
        """Form in which one client's records travel, e.g. without zeros; see :meth:`fedpers.cohort.Fold.decode`."""
        return records

    def smallest_batch(self, size: int) -> int:
        """Samples in the smallest batch a client of `size` samples trains on."""
        return smallest_batch(size, self.training.batch_size, self.training.drop_last)

    # ------------------------------------------------------------------ evaluation

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """Networks the clients predict with, before :meth:`fine_tuned`.

        The default puts personal and received entries together.

        Parameters
        ----------
        cohort, received, config
            As in :meth:`train`.

        Returns
        -------
        Tree ``[K]`` or View
            Full networks, parameters and buffers. In a view (:meth:`Cohort.view`) entries that are the same for all
            clients are there once.
        """
        return cohort.view(received[ARRAYS])

    def finetune_loss(self, network: Network, batch: Batch) -> Tensor:
        """Loss that fine-tuning minimizes, a scalar; the default is the task's of what the method predicts."""
        return LocalUpdate.loss(self, network, batch)

    @property
    def finetuned_parts(self) -> Selection:
        """Parameters that fine-tuning moves."""
        return "parameters"

    def fine_tuned(self, cohort: Cohort, networks: Tree | View) -> Tree | View:
        """Networks after :attr:`finetune_epochs` passes over each client's training samples; nothing of it is kept.

        Unseen clients are fine-tuned too; networks of :meth:`extra_models` and a common network are not. The optimizer
        starts anew, with the settings of this round's training.

        Parameters
        ----------
        cohort : Cohort
        networks : Tree ``[K]`` or View
            As :meth:`personalize` returns them.

        Returns
        -------
        Tree ``[K]`` or View
        """
        if not self.finetune_epochs:
            return networks
        view = View.of(networks)
        params = cohort.copies(view)
        cohort.fit(
            params,
            self.finetune_loss,
            training=self.effective_training(cohort.training),
            only=self.finetuned_parts,
            given=view.given,
            epochs=self.finetune_epochs,
            purpose="finetune",
        )
        return View.of(params, view.given)

    def evaluated_networks(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """Networks that are evaluated: what :meth:`personalize` returns, :meth:`fine_tuned`.

        Raises
        ------
        TypeError
            If :meth:`personalize` returns no networks.
        """
        networks = self.personalize(cohort, received, config)
        if not isinstance(networks, Tree | View):
            expected = "expected networks, as cohort.view(received['arrays']) or cohort.assemble(...) make them"
            raise TypeError(f"{type(self).__name__}.personalize returned {networks!r:.100}: {expected}")
        return self.fine_tuned(cohort, networks)

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Class scores ``[B, C]`` of one client for inputs `x` ``[B, ...]``, or what else the data's task measures."""
        return network(x)

    def extra_models(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Mapping[str, Tree | View]:
        """Further networks to be evaluated; none by default.

        Parameters
        ----------
        cohort, received, config
            As in :meth:`train`.

        Returns
        -------
        mapping of str to Tree ``[K]`` or View
            Full networks as :meth:`personalize` returns them, by a name that goes before their metrics.
        """
        return {}

    def further_predictions(self) -> Mapping[str, Predict]:
        """Other ways to predict with the same networks, by a name that goes before their metrics; none by default."""
        return {}

    def measure(
        self, cohort: Cohort, outputs: Sequence[Tensor], part: Part, config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Metrics of predictions on one part; the default takes those of the task, and a method may add its own.

        Parameters
        ----------
        cohort : Cohort
        outputs : sequence of Tensor ``[n_k, ...]``
            What :meth:`predict` gives for each client's samples of the part, one tensor for each of the K clients.
        part : {"validation", "test"}
        config : mapping
            The message's configuration; ``auc`` asks for the area under the ROC curve too.

        Returns
        -------
        dict of name to Tensor ``[K]``
            ``examples``, the number of samples, and the metrics; NaN for a client without samples, and for no other.
            See ``Task.measure``.
        """
        data = cohort.data
        return data.task.measure(outputs, cohort.labels(part), data.num_classes, auc=bool(config.get("auc")))

    def evaluate(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> list[dict[str, float]]:
        """Metrics of each client on its validation and test samples, NaN where it has none.

        Returns
        -------
        list of dict
            ``{part}-{metric}`` of :meth:`measure` for :meth:`personalize` and :meth:`fine_tuned`,
            ``{part}-{name}-{metric}`` for those of :meth:`extra_models` and :meth:`further_predictions`; and
            ``adaptation-gradients``, the gradients computed to personalize before predicting.
        """
        networks = self.evaluated_networks(cohort, received, config)
        measured: dict[str, tuple[Tree | View, Predict]] = {"": (networks, self.predict)}
        extra = self.extra_models(cohort, received, config)
        measured.update({f"{name}-": (others, self.predict) for name, others in extra.items()})
        measured.update({f"{name}-": (networks, predict) for name, predict in self.further_predictions().items()})
        rows: list[dict[str, float]] = [{} for _ in cohort.clients]
        for part in EVALUATED_PARTS:
            for prefix, (params, predict) in measured.items():
                columns = self.measure(cohort, cohort.logits(params, part, predict), part, config)
                for name, column in columns.items():
                    if prefix and name == "examples":
                        continue
                    for row, value in zip(rows, column.tolist(), strict=True):
                        row[f"{part}-{prefix}{name}"] = value
        for row, count in zip(rows, cohort.gradients_taken.tolist(), strict=True):
            row["adaptation-gradients"] = float(count)
        return rows

    # -------------------------------------------------------------------- the app

    def client_app(
        self,
        model: nn.Module,
        data: FederatedData,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mods: Sequence[Mod] = (),
        head: str | None = None,
        postprocessors: Sequence[Postprocessor] = (),
    ) -> CohortApp:
        """Make the Flower ``ClientApp`` of this method; parameters are those of :class:`~fedpers.client.app.CohortApp`.

        `head` is the dotted name of the network's last layer where it is not called ``head``.
        """
        from fedpers.client.app import CohortApp

        return CohortApp(
            self, model, data, seed=seed, device=device, mods=mods, head=head, postprocessors=postprocessors
        )


def check_passes(update: LocalUpdate, *passes: str) -> None:
    """Refuse ``training.steps`` beside a method's own numbers of passes, which would be taken instead.

    If ``training.epochs`` has no part in any of them either, a warning says so.

    Parameters
    ----------
    update : LocalUpdate
    *passes : str
        Its options; null stands for what the training settings say.

    Raises
    ------
    ConfigError
    """
    training = update.training
    given = [name for name in passes if getattr(update, name) is not None]
    allowed = f"null, or {' and '.join(f'strategy.{name}=null' for name in passes)}, whose passes take its place"
    check(not given or training.steps is None, "training.steps", training.steps, allowed)
    if len(given) == len(passes) and training.epochs != Training().epochs:
        values = ", ".join(f"strategy.{name}={getattr(update, name)}" for name in passes)
        log.warning("training.epochs=%s has no part in this method, which goes by %s", training.epochs, values)
