"""FedD2S: clients and a server teach each other through a cut in the network that moves from deep to shallow layers.

K. Atapour, S. J. Seyedmohammadi, J. Abouei, A. Mohammadi, K. N. Plataniotis, FedD2S: Personalized Data-Free Federated
Knowledge Distillation, arXiv:2402.10846.

Re-derived from the abstract and summaries; the sections on method and experiments were not at hand, there is no code of
the authors, and numbers are not comparable with the paper's. The network of client n is ``f_n = psi_n(phi_n(x))``,
phi_n its first l layers, psi_n the deeper ones with the head. In round t, from 1, ``l = Q[min((t - 1) / rate, J - 1)]``
with the dropping set Q of J cuts. The server has a head G of its own in the place of psi.

    up      H_n = phi_n(X_n), Z_n = f_n(X_n), labels Y_n                              of all training samples
    G       <- passes of SGD on  cross-entropy(G(h), y) + alpha T^2 KL(softmax(z / T) || softmax(G(h) / T))
    down    R_n = G(H_n)
    f_n     <- passes of SGD on  cross-entropy(f_n(x), y) + beta T^2 KL(softmax(r / T) || softmax(psi_n(phi_n(x)) / T))
               psi_n held fixed in the second term: layers behind the cut get no gradient from it

Shared: features, scores and labels; no parameters. Personal: the whole network, with which a client predicts.

Readings taken. The sources say: mutual distillation in two phases, head models that turn features into soft labels,
cross-entropy and KL in both directions, layers dropped from deep to shallow at a rate, from a set. The rest is modelled
on FedGKT (He et al. 2020):

- Layers are the children of the network's body that have parameters, each with the activations, normalizations and
  pooling that follow, and the head. ``cuts: null`` is every cut from the last hidden layer to the first; ``rate``
  counts rounds between drops, null never drops. In reverse order, or of a single number, `cuts` is a control.
- There is one server network; G is its part behind the cut. When the cut moves, the layers that G gains are fresh.
- A client sends nothing in its first round, in which it trains alone: features of a random network teach nothing.
- ``beta`` is 0.1, not FedGKT's 1, with which clients were less accurate than by training alone on digits
  (``experiments/fedd2s``).
- ``variant: parameters`` is a control that sends parameters instead, not FedD2S: the first l layers are averaged. A
  copy of the network with the received layers learns from f_n (in front of the cut only) and is sent back, then f_n
  learns from the copy; so it is from the first round on.

With ``variant: features`` nothing is averaged, and ``weighting`` has no part. The server's head trains with the
settings of clients but for passes, batches and, if given, ``server_lr``.

What is sent of features counts in the bytes: ``n (d_l + C) * 4 + 8 n`` up, ``4 n C`` down, with n samples, d_l features
at the cut and C outputs. Shallow cuts of
convolutional networks have large d_l. Features with labels tell much about samples; "data-free" means without public
data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.requirements import check_classes
from fedpers.cohort import Batch, Cohort, Loss, Network, Records, Reply, Tree, entries, tree
from fedpers.data.federated import FederatedData
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, dtype_name, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Phase, Received, SampleWeighting, method

KNOWLEDGE, TARGETS = "knowledge", "targets"
"""Records: what a client sends (``features``, ``scores``, ``labels``), and the server's ``scores`` for its samples."""
_FOLLOWERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def layers_of(module: nn.Module) -> list[list[str]]:
    """Names of the submodules of each layer, front to back; the last is the head.

    Raises
    ------
    ConfigError
        If the network is not a sequence of layers, the body, under a head.
    """
    body = getattr(module, "body", None)
    fits = isinstance(body, nn.Sequential) and hasattr(module, "head")
    check(fits, "model", type(module).__name__, "a network with a sequence of layers as its 'body' and a 'head'")
    assert isinstance(body, nn.Sequential)
    layers: list[list[str]] = [[]]
    started = False
    for name, child in body.named_children():
        begins = any(True for _ in child.parameters()) and not isinstance(child, _FOLLOWERS)
        if begins and started:
            layers.append([])
        started = started or begins
        layers[-1].append(f"body.{name}")
    return [*layers, ["head"]]


def through(network: Network, layers: Sequence[Sequence[str]], x: Tensor) -> Tensor:
    """Outputs of some consecutive layers."""
    for name in (name for layer in layers for name in layer):
        x = network.part(name)(x)
    return x


def soft_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` ``[B]`` of scores ``[B, C]``."""
    target, guess = (F.log_softmax(scores / temperature, -1) for scores in (teacher, student))
    return temperature**2 * (target.exp() * (target - guess)).sum(-1)


log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FedD2SUpdate(LocalUpdate):
    """Send features, scores and labels; learn from labels and from the server's scores."""

    shared = "none"
    personal = "all"
    settles_parts = True
    mixes_networks = True
    mixing_settings = "model.features=N strategy.cuts=[-1]"
    cuts: Annotated[
        tuple[int, ...] | None,
        Field(
            description="the dropping set: layers in front of the cut, in this order, -1 for all but the head; null: "
            "all hidden ones to 1"
        ),
    ] = None
    rate: Annotated[int | None, Field(ge=1, description="rounds until the cut moves on; null: it stays")] = 10
    beta: Annotated[float, Field(ge=0, description="weight of the server's scores; 0 is local training")] = 0.1
    alpha: Annotated[float, Field(ge=0, description="weight of the clients' scores in what the server learns")] = 1.0
    temperature: Annotated[float, Field(gt=0, description="of scores in both distillations")] = 3.0
    variant: Annotated[
        Literal["features", "parameters"],
        Field(description="what is sent; parameters is a control that averages the layers in front of the cut"),
    ] = "features"

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Refuse networks that cannot be cut and data without classes."""
        check_classes("fedd2s", data)
        hidden = len(layers_of(model)) - 1
        cuts = self.cuts_of(model)
        allowed = f"numbers from 1 to {hidden}, the hidden layers of {type(model).__name__}, at least one"
        check(bool(cuts) and min(cuts) >= 1 and max(cuts) <= hidden, "strategy.cuts", self.cuts, allowed)
        return model, data

    def cuts_of(self, module: nn.Module) -> tuple[int, ...]:
        """The dropping set for a network, counted from the front."""
        layers = len(layers_of(module))
        cuts = tuple(range(layers - 1, 0, -1)) if self.cuts is None else self.cuts
        return tuple(cut + layers if cut < 0 else cut for cut in cuts)

    def cut(self, module: nn.Module, round: int) -> int:
        """Layers in front of the cut in a round >= 1."""
        cuts = self.cuts_of(module)
        drops = 0 if self.rate is None else (max(1, round) - 1) // self.rate
        return cuts[min(drops, len(cuts) - 1)]

    def names(self, module: nn.Module, layers: Sequence[Sequence[str]]) -> tuple[str, ...]:
        """Entries of the network that belong to some layers."""
        prefixes = tuple(f"{name}." for layer in layers for name in layer)
        return tuple(name for name in module.state_dict() if name.startswith(prefixes))

    def initial_arrays(self, template: Tree, module: nn.Module) -> Tree:
        """The server's network, without layers that are always in front of the cut (``parameters``: behind it)."""
        cuts, layers = self.cuts_of(module), layers_of(module)
        held = layers[min(cuts) :] if self.variant == "features" else layers[: max(cuts)]
        return template.select(*self.names(module, held))

    # -------------------------------------------------------------------- training

    def query_knowledge(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Features, scores and labels of all training samples, of clients that have trained."""
        layers, cut = layers_of(cohort.module), self.cut(cohort.module, cohort.round)

        width = 0

        def features_and_scores(network: Network, x: Tensor) -> Tensor:
            nonlocal width
            features = through(network, layers[:cut], x)
            flat = features.flatten(1)
            width = flat.shape[1]
            return torch.cat([flat, through(network, layers[cut:], features)], 1)

        outputs = cohort.logits(cohort.state["model"], "train", features_and_scores)
        labels = cohort.labels("train")
        longest = int(cohort.sizes().max())
        stacked = torch.stack([F.pad(rows, (0, 0, 0, longest - len(rows))) for rows in outputs])
        padded = torch.stack([F.pad(y, (0, longest - len(y)), value=-1) for y in labels])
        padded[~cohort.trained] = -1  # what a random network says is not sent
        values = {"features": stacked[:, :, :width], "scores": stacked[:, :, width:], "labels": padded}
        return Reply({KNOWLEDGE: tree(values, cohort.size)})

    def encode(self, records: dict[str, Tree]) -> dict[str, Tree]:
        """Drop padding rows."""
        if KNOWLEDGE not in records:
            return records
        values = entries(records[KNOWLEDGE])
        return {**records, KNOWLEDGE: tree({n: v[values["labels"] >= 0] for n, v in values.items()})}

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Learn from labels and from the server."""
        if self.variant == "parameters":
            return self._train_with_copy(cohort, received)
        params, cut = cohort.state["model"], self.cut(cohort.module, cohort.round)
        if TARGETS not in received or not self.beta:
            cohort.fit(params, self.loss)
            return cohort.reply(params)
        # positions in the data, ascending, to find the server's scores for the samples of a batch
        owned, order = (
            torch.stack([cohort.data.positions("train", client, cohort.round) for client in cohort.clients])
            .to(cohort.device)
            .sort(1)
        )
        scores = cohort.per_client(received[TARGETS])["scores"]
        scores = scores.gather(1, order[:, :, None].expand_as(scores))
        loss, names = self._distilling(layers_of(cohort.module), cut), cohort.trainable()
        walk = cohort.walk(params)
        optimizer = walk.optimizer(names)
        for step, rows in walk:
            places = torch.searchsorted(step.take(owned).contiguous(), step.index.contiguous())
            wanted = step.take(scores)
            targets = scores.new_zeros(cohort.size, *step.index.shape[1:], scores.shape[2])
            of_step = step.places(cohort.device)
            targets[of_step] = wanted.gather(1, places[:, :, None].expand(-1, -1, wanted.shape[2]))
            losses, grads = cohort.gradients(step, rows, loss, names, given={TARGETS: targets})
            optimizer.update(rows, grads)
            cohort.count_loss(step, losses)
        return cohort.reply(params)

    def _distilling(self, layers: Sequence[Sequence[str]], cut: int) -> Loss:
        def loss(network: Network, batch: Batch) -> Tensor:
            features = through(network, layers[:cut], batch.x)
            scores = through(network, layers[cut:], features)
            # copies, so that running statistics are not changed twice
            held = {name: value.detach().clone() for name, value in network.tensors.items()}
            student = through(network.replace(held), layers[cut:], features)
            divergence = soft_loss(batch.given[TARGETS], student, self.temperature)
            return batch.mean(batch.losses(scores)) + self.beta * batch.mean(divergence)

        return loss

    def _train_with_copy(self, cohort: Cohort, received: Received) -> Reply:
        """The control: a copy with the received layers learns from the client's network, then the other way round."""
        layers, cut = layers_of(cohort.module), self.cut(cohort.module, cohort.round)
        front = self.names(cohort.module, layers[:cut])
        params = cohort.state["model"]
        copy = params.clone()
        for name, value in entries(cohort.per_client(received[ARRAYS], front)).items():
            copy[name] = value

        def from_teacher(weight: float) -> Loss:
            def loss(network: Network, batch: Batch) -> Tensor:
                scores = network(batch.x)
                teacher = network.replace(batch.given[TARGETS]).as_frozen()(batch.x).detach()
                divergence = batch.mean(soft_loss(teacher, scores, self.temperature))
                return batch.mean(batch.losses(scores)) + weight * divergence

            return loss

        trained_front = [name for name in cohort.trainable() if name in front]
        cohort.fit(copy, from_teacher(self.alpha), only=trained_front, given={TARGETS: params.clone()})
        cohort.fit(params, from_teacher(self.beta), given={TARGETS: copy.clone()})
        return cohort.reply(copy, share=list(front), state={"model": params})


@method("fedd2s")
@dataclass(kw_only=True)
class FedD2S(PersonalizedStrategy):
    """Server with a head of its own, which learns from all clients' features. It needs :meth:`attach`."""

    update = FedD2SUpdate
    common_options = ("cuts", "rate", "alpha", "beta", "temperature", "variant")
    client_update: FedD2SUpdate = field(default_factory=FedD2SUpdate)
    weighting: SampleWeighting = "samples"
    server_epochs: Annotated[
        int, Field(ge=1, description="passes of the server over what clients sent (features only)")
    ] = 5
    server_lr: Annotated[float | None, Field(gt=0, description="of the server's head; null: training.lr")] = None
    server_batch_size: Annotated[int, Field(ge=1, description="samples in a batch of the server")] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._targets: dict[int, Tensor] = {}  # the server's scores for the samples of this round's clients
        self._new_arrays: Tree | None = None
        self._front: tuple[str, ...] = ()  # what the control has sent

    def _cut(self) -> tuple[list[list[str]], int]:
        """Layers of the network, and how many of them are in front of the cut in this round."""
        module = self.work.module
        return layers_of(module), self.client_update.cut(module, self.report.round)

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, phase: Phase) -> list[int]:
        """Ask the clients that are to train what they know, and learn from it."""
        self._targets, self._new_arrays = {}, None
        if phase != "train" or self.client_update.variant == "parameters" or not self.client_update.beta:
            return clients
        layers, cut = self._cut()
        data = self.work.app.data
        shape, (outputs,) = self._shape(layers, cut), self._shape(layers, len(layers))
        kind = dtype_name(next(iter(entries(arrays).values())))
        schema: Schema = {
            (KNOWLEDGE, "features"): Entry((-1, math.prod(shape)), kind),
            (KNOWLEDGE, "scores"): Entry((-1, outputs), kind),
            (KNOWLEDGE, "labels"): Entry((-1,), "int64"),
        }
        answers = self.query_clients(grid, "knowledge", round, clients, {ARRAYS: tree({})}, phase, schema)
        knowledge = {}
        for client, (records, _) in answers.items():
            values = entries(records[KNOWLEDGE])
            labels = values["labels"]
            known = (labels >= 0) & (labels < data.num_classes)
            if len({len(value) for value in values.values()}) > 1 or not bool(known.all()):
                self.leave_out(client, "features, scores and labels do not belong together", phase)
            else:
                knowledge[client] = values
        nonempty = {client: values for client, values in knowledge.items() if len(values["labels"])}
        if nonempty:
            self._learn(round, arrays, nonempty, layers[cut:], shape)
        return [client for client in clients if client in knowledge]

    def _learn(
        self,
        round: int,
        arrays: Tree,
        knowledge: Mapping[int, Mapping[str, Tensor]],
        behind: Sequence[Sequence[str]],
        shape: tuple[int, ...],
    ) -> None:
        """Train the head, layers `behind` the cut, on features of `shape`, and score the clients' samples with it."""
        update, work = self.client_update, self.work
        names = ("features", "scores", "labels")
        columns = {name: torch.cat([values[name] for values in knowledge.values()]) for name in names}
        x = torch.cat([columns["features"], columns["scores"]], 1)
        every, none = [torch.arange(len(x))], [torch.arange(0)]
        outputs = columns["scores"].shape[1]
        data = FederatedData(x, columns["labels"], every, none, none, outputs, task=work.task)

        def predict(network: Network, x: Tensor) -> Tensor:
            return through(network, behind, x[:, :-outputs].reshape(-1, *shape))

        def loss(network: Network, batch: Batch) -> Tensor:
            scores = predict(network, batch.x)
            divergence = soft_loss(batch.x[:, -outputs:], scores, update.temperature)
            return batch.mean(batch.losses(scores)) + update.alpha * batch.mean(divergence)

        cohort = work.cohort(data, round)
        params = cohort.assemble(arrays, tree({}, 1))
        held = update.names(work.module, behind)
        training = replace(update.training, batch_size=self.server_batch_size, epochs=self.server_epochs, steps=None)
        training = replace(training, logit_adjustment=0.0)  # of a client's class shares, which these are not
        training = training if self.server_lr is None else replace(training, lr=self.server_lr)
        if len(x) % self.server_batch_size == 1 and len(x) > 1:  # normalization needs two samples
            training = replace(training, drop_last=True)
        trained = [name for name in cohort.trainable() if name in held]
        cohort.fit(params, loss, only=trained, training=training, purpose="server")
        (scores,) = cohort.logits(params, "train", predict)
        learned = [params[name] for name in held]
        if not all(bool(value.isfinite().all()) for value in (scores, *learned)):
            log.warning("round %d: the server's head diverged; it stays as it was, and clients train alone.", round)
            return
        self._new_arrays = tree({n: params[n][0] if n in held else v for n, v in entries(arrays).items()})
        sizes = [len(values["labels"]) for values in knowledge.values()]
        self._targets = dict(zip(knowledge, torch.split(scores, sizes), strict=True))
        self.report.extra["server_train_accuracy"] = float(
            (scores.argmax(1).cpu() == columns["labels"].cpu()).double().mean()
        )

    def _shape(self, layers: list[list[str]], cut: int) -> tuple[int, ...]:
        """Shape of one sample's features at the cut; behind all layers, of its scores."""
        app = self.work.app
        app.module.eval()
        with torch.no_grad():
            network = Network(app.module, entries(app.template))
            return tuple(through(network, layers[:cut], app.data.x[:1]).shape[1:])

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client the server's scores for its samples (``parameters``: the layers in front of the cut)."""
        if self.client_update.variant == "parameters":
            module = self.work.module
            layers = layers_of(module)[: self.client_update.cut(module, round)]
            self._front = self.client_update.names(module, layers)
            return {ARRAYS: arrays.select(*self._front)}
        nothing = {ARRAYS: tree({})}
        return [
            {**nothing, TARGETS: tree({"scores": self._targets[client]})} if client in self._targets else nothing
            for client in clients
        ]

    def reply_schema(self, clients: list[int]) -> Schema:
        """Nothing; with ``parameters`` the layers in front of the cut."""
        if self.client_update.variant == "features":
            return {}
        return schema_of(ARRAYS, entries(self.sent_arrays.select(*self._front)))

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the head that was trained, or the averaged layers."""
        if self.client_update.variant == "features":
            return arrays if self._new_arrays is None else self._new_arrays
        return tree({**entries(arrays), **entries(means.get(ARRAYS, tree({})))})
