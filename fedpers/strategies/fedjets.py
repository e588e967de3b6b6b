"""FedJETs (DDOME): experts that clients are matched with by a gate, without labels.

C. Dun et al., FedJETs: Efficient Just-In-Time Personalization with Federated Mixture of Experts,
arXiv:2306.08586 (version 3: DDOME).

A frozen common expert c turns each sample into an embedding e = body_c(x), once, before the first round. The server
holds a gate g(e) = softmax(MLP(e)) over M experts f_1..f_M, networks of one architecture. Anchor clients are tied for
good to one expert each: here client q, the q-th that trains, to expert q. Round, with N_a anchors and N_c others:

    other client k:   S_k <- the K experts of the highest mean g(e) over its samples      (asked before it is sent any)
                      g, {f_j : j in S_k} <- E passes of SGD on  -log sum_{j in S_k} gt_j(e) p_j(y|x),
                      p_j = softmax f_j,  gt = g over S_k, normalized                     (gate and experts together)
    anchor q:         f_q <- E passes of SGD on  -log p_q(y|x)
                      g   <- E passes of SGD on  -log g_q(e)                              (two losses, one batch order)
    server:           g   <- mean over all N_a + N_c,   f_j <- mean over those who trained it; others stay as they are

Prediction: S_k as above, without labels, then for each sample the one expert in S_k with the highest gate score.
Clients that never train choose S_k by the samples they are tested on (zero-shot), the others by their training samples.

Shared: the gate, and of each client the experts that it trains, BatchNorm statistics averaged within their expert.
Personal: nothing.

The server holds ``gate.*`` and all experts ``experts.I.*``. The common expert is the network that the strategy is given
(``model.pretrained=public``), used in evaluation mode; nobody owns or trains it. Its body is counted once for every
client that trains, in the bytes of round 1.

No code of the authors is known. What their text leaves open, and the reading taken here:

- The loss of other clients (its formula is lost in the available text): ``mixture: probabilities`` as above;
  ``unnormalized`` has g in place of gt, ``logits`` is the cross-entropy of sum_j gt_j f_j(x).
- The mean: replies weigh by samples; ``weighting: uniform`` is there. Anchors and others count alike for the gate.
- The gate: one hidden layer of ``gate_hidden`` units, ReLU. It has a rate of its own (``gate_lr``), as in the paper,
  unless ``training.groups`` names another for it.
- The two losses of an anchor are trained as their sum: they have no parameter in common, so each follows its own, but
  ``training.clip`` looks at the gradient of both. ``train/loss`` averages that sum and the loss of the other clients.
- Of the clients of a round a share of ``anchor_share`` are anchors (at most M), as in the paper half. So this method
  samples other clients than methods without anchors. With ``anchor_share: 0`` anchors do not take part.
- Experts start from values of their own (``init: random``), or all from the common expert (``init: common``).
- The gate travels twice to a client that is asked and then trains, since clients keep nothing between messages.
- Adapting locally (the paper has none) is training as one of the other clients, with the experts found without labels.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast

import torch
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.client.update import EXTRA
from fedpers.cohort import (
    Batch,
    Cohort,
    Given,
    Network,
    Records,
    Reply,
    Training,
    Tree,
    View,
    WeightedMean,
    entries,
    model_tree,
    tree,
)
from fedpers.cohort.prediction import Predict
from fedpers.data.federated import PARTS, FederatedData, Part
from fedpers.errors import ConfigError, check
from fedpers.models.frozen import featured
from fedpers.models.initial import drawing, fresh
from fedpers.randomness import generator, sample_clients
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, schema_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Phase, Received, method
from fedpers.tasks import class_losses

log = logging.getLogger(__name__)
HELD = "held"
"""Record that names the experts a client is sent, int64 ``[K]``, under SLOTS, or the one of an anchor under ANCHOR."""
SLOTS = "slots"
"""Numbers of the experts in a client's slots, int64: what losses and predictions are given."""
ANCHOR = "anchor"
SELECTED = "selected"


class HeldExperts(nn.Module):
    """What a client works with: the gate, and K of the M experts in as many slots.

    Parameters
    ----------
    gate : nn.Module
        Embeddings ``[B, d]`` to scores ``[B, M]`` before softmax.
    experts : sequence of nn.Module
        K networks.
    shape : sequence of int
        Of one picture.
    start : callable
        Yields gate and all M experts as the server starts with them.
    """

    def __init__(
        self, gate: nn.Module, experts: Sequence[nn.Module], shape: Sequence[int], start: Callable[[], Tree]
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self.shape = tuple(shape)
        self.start = start

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Divide rows ``[B, P + d]`` into pictures ``[B, *shape]`` and embeddings ``[B, d]``."""
        pixels = torch.Size(self.shape).numel()
        return x[:, :pixels].reshape(-1, *self.shape), x[:, pixels:]


@dataclass(kw_only=True)
class FedJETsUpdate(LocalUpdate):
    """Choose experts by the gate; train them, or the anchor's expert."""

    settles_parts = True
    experts: Annotated[
        int, Field(ge=1, description="in all, M in the paper; each has an anchor among the clients, the first ones")
    ] = 5
    top_k: Annotated[int, Field(ge=1, description="experts of a client, K in the paper")] = 2
    mixture: Annotated[
        Literal["probabilities", "unnormalized", "logits"], Field(description="loss of clients that are no anchors")
    ] = "probabilities"
    init: Annotated[
        Literal["random", "common"], Field(description="what experts start from; common: the common expert")
    ] = "random"
    gate_hidden: Annotated[int, Field(ge=1, description="width of the gate's hidden layer")] = 256
    gate_lr: Annotated[
        float | None, Field(gt=0, description="where training.groups has no other; null: training.lr")
    ] = 0.001
    evaluate_mixture: Annotated[bool, Field(description="also evaluate the mixture of a client's experts")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"a whole number >= 1 and <= strategy.experts={self.experts}"
        check(self.top_k <= self.experts, "strategy.top_k", self.top_k, allowed)

    def adapt_model(self, model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        """Embed all samples once with the common expert; return gate and slots, and rows [picture | embedding].

        Raises
        ------
        ConfigError
            If the network has no body and head, the data are not numbers with classes, or an expert has no anchor.
        """
        _check_anchors(self.experts, data)
        allowed = "samples with class labels for strategy=fedjets"
        check(data.task.classes, "dataset", data.name, allowed)
        if getattr(model, "pretrained_accuracy", 0.0) is None:
            log.warning("The common expert of fedjets has random values; model.pretrained=public trains it first.")
        embedding = featured(model, data, budget=sys.maxsize)[1].x.flatten(1)
        with drawing(seed, "gate"):
            gate = nn.Sequential(
                nn.Linear(embedding.shape[1], self.gate_hidden), nn.ReLU(), nn.Linear(self.gate_hidden, self.experts)
            )
        gate.to(embedding.dtype)

        def expert(i: int) -> nn.Module:
            return fresh(model, seed, i) if self.init == "random" else copy.deepcopy(model)

        def start() -> Tree:
            values = {f"gate.{n}": v for n, v in entries(model_tree(gate)).items()}
            for i in range(self.experts):
                values.update({f"experts.{i}.{n}": v for n, v in entries(model_tree(expert(i))).items()})
            return tree(values)

        held = HeldExperts(gate, [expert(i) for i in range(self.top_k)], data.x.shape[1:], start)
        return held, replace(data, x=torch.cat([data.x.flatten(1), embedding], 1))

    def initial_arrays(self, template: Tree, module: nn.Module) -> Tree:
        """Gate and all M experts; a client's network holds only K."""
        device = next(iter(entries(template).values())).device
        return tree({n: v.to(device) for n, v in entries(_held(module).start()).items()})

    def example_given(self, template: Tree, data: FederatedData) -> Given:
        """The first experts in the slots."""
        return {SLOTS: torch.arange(self.top_k, device=data.device)}

    # -------------------------------------------------------------------- a round

    def query_select(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Answer with the K experts of the highest mean gate score, ascending, int64 ``[K]``; labels play no part.

        A client that never trains goes by the samples it is tested on, any other by its training samples.
        """
        view = cohort.view(received[ARRAYS])
        zero_shot = [c in cohort.data.unseen and len(cohort.data.test[c]) > 0 for c in cohort.clients]
        parts: list[Part] = ["test" if untrained else "train" for untrained in zero_shot]
        scores = {part: cohort.logits(view, part, gate_scores) for part in PARTS if part in parts}
        gates = [torch.softmax(scores[part][k].double(), 1) for k, part in enumerate(parts)]
        chosen = torch.stack([gate.mean(0).topk(self.top_k).indices.sort().values for gate in gates])
        entropy = torch.stack([torch.special.entr(gate).sum(1).mean() for gate in gates])
        records = {SELECTED: tree({SLOTS: chosen}, cohort.size)}
        return Reply(records, metrics={"gate_entropy": entropy})

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train gate and held experts together; an anchor trains the gate and its expert, each for itself."""
        params = cohort.assemble(received[ARRAYS])
        held, training = cohort.per_client(received[HELD]), self.effective_training(cohort.training)
        if ANCHOR in held:
            trained = ("gate", "experts.0")
            cohort.fit(params, self.anchor_loss, only=trained, training=training, given={SLOTS: held[ANCHOR]})
            return cohort.reply(params, share=trained)
        cohort.fit(params, self.loss, training=training, given={SLOTS: held[SLOTS]})
        return cohort.reply(params)

    def effective_training(self, training: Training) -> Training:
        """Settings with the rate of the gate; as the first group it gives way to the user's."""
        if self.gate_lr is None:
            return training
        groups, pattern = training.groups or {}, "gate.*"
        while pattern in groups:  # a group of the user stays in its place
            pattern += "*"
        return replace(training, groups={pattern: {"lr": self.gate_lr}, **groups})

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Cross-entropy of the mixture of the held experts."""
        return batch.mean(F.nll_loss(self.mixed(network, batch.x), batch.y, reduction="none"))

    def anchor_loss(self, network: Network, batch: Batch) -> Tensor:
        """Cross-entropy of the expert in the first slot, and of the gate with that expert's number as its label."""
        picture, embedding = _held(network.module).split(batch.x)
        of_expert = batch.losses(network.part("experts.0")(picture))
        number = _slots(batch.given).expand(len(batch.x))
        of_gate = class_losses(network.part("gate")(embedding), number)
        return batch.mean(of_expert + of_gate)

    def mixed(self, network: Network, x: Tensor) -> Tensor:
        """Logarithm of the mixture's class probabilities ``[B, C]`` (with ``unnormalized`` they sum to less than 1)."""
        scores, outputs = self._scores(network, x)
        if self.mixture == "unnormalized":
            _, embedding = _held(network.module).split(x)
            log_probs = F.log_softmax(network.part("gate")(embedding), 1)
            shares = log_probs.gather(1, _slots(network.given).expand(len(x), -1))
        else:
            shares = F.log_softmax(scores, 1)
        if self.mixture == "logits":
            return F.log_softmax((shares.exp()[:, :, None] * outputs).sum(1), 1)
        return torch.logsumexp(shares[:, :, None] + F.log_softmax(outputs, 2), 1)

    def predict(self, network: Network, x: Tensor) -> Tensor:
        """Class scores ``[B, C]`` of the one held expert with the highest gate score, for each sample."""
        scores, outputs = self._scores(network, x)
        best_slot = scores.argmax(1).view(-1, 1, 1).expand(-1, 1, outputs.shape[2])
        return outputs.gather(1, best_slot).squeeze(1)

    def _scores(self, network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate scores before softmax ``[B, K]`` and class scores ``[B, K, C]`` of the held experts."""
        picture, embedding = _held(network.module).split(x)
        scores = network.part("gate")(embedding).gather(1, _slots(network.given).expand(len(x), -1))
        outputs = [network.part(f"experts.{slot}")(picture) for slot in range(self.top_k)]
        return scores, torch.stack(outputs, 1)

    # ----------------------------------------------------------------- evaluation

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> View:
        """Gate and experts as received, and which experts they are."""
        return replace(cohort.view(received[ARRAYS]), given={SLOTS: cohort.per_client(received[HELD])[SLOTS]})

    def further_predictions(self) -> Mapping[str, Predict]:
        """With `evaluate_mixture` also the mixture instead of one expert for each sample."""
        return {"mixture": self.mixed} if self.evaluate_mixture else {}


@method("fedjets")
@dataclass(kw_only=True)
class FedJETs(PersonalizedStrategy):
    """Server that holds all experts, and asks clients which they want."""

    update = FedJETsUpdate
    common_options = ("experts", "top_k")
    client_update: FedJETsUpdate = field(default_factory=FedJETsUpdate)
    anchor_share: Annotated[
        float, Field(ge=0, le=1, description="of a round's clients, rounded half up; with 0 anchors never train")
    ] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._held: dict[int, tuple[int, ...]] = {}  # experts of each client that was addressed last
        self._anchors: set[int] = set()  # who of them trains as an anchor

    def sample(self, round: int) -> list[int]:
        """Draw anchors and others, each without replacement."""
        anchors = anchor_clients(self.client_update.experts, self.unseen)
        able = [client for client in self.trainable_clients if client in anchors]
        others = [client for client in self.trainable_clients if client not in anchors]
        size = len(sample_clients(self.seed, round, len(self.trainable_clients), self.fraction))
        tied = min(len(able), int(self.anchor_share * size + 0.5))
        if self.anchor_share:  # where there are too few others, anchors take their places
            tied = min(len(able), max(tied, size - len(others)))
            if others and self.anchor_share < 1 and tied == size <= len(able):  # else the others would never train
                allowed = "a share of at least two clients a round, one of them no anchor"
                check(size > 1, "fraction", self.fraction, allowed)
                tied -= 1
        elif not others:
            allowed = "a number > 0 where every client is the anchor of an expert"
            raise ConfigError("strategy.anchor_share", self.anchor_share, allowed)
        drawn = _draw(able, tied, self.seed, "sampling_anchors", round)
        return sorted(drawn + _draw(others, min(len(others), size - tied), self.seed, "sampling", round))

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, phase: Phase) -> list[int]:
        """Ask all but the anchors of a round which experts they want."""
        anchors = anchor_clients(self.client_update.experts, self.unseen)
        self._anchors = {client for client in clients if phase == "train" and client in anchors}
        self._held = {client: (anchors[client],) for client in self._anchors}
        non_anchors = [client for client in clients if client not in self._anchors]
        gate = tree({n: v for n, v in entries(arrays).items() if n.startswith("gate.")})
        schema: Schema = {(SELECTED, SLOTS): Entry((self.client_update.top_k,), "int64")}
        answers = self.query_clients(grid, "select", round, non_anchors, {ARRAYS: gate}, phase, schema)
        entropies = []
        for client, (records, metrics) in answers.items():
            try:
                self._held[client] = self._selected(records)
            except ValueError as problem:
                self.leave_out(client, f"an unusable choice of experts: {problem}", phase)
            else:
                if math.isfinite(entropy := metrics.get(f"{EXTRA}gate_entropy", math.nan)):
                    entropies.append(entropy)
        if phase == "train":
            self._note_holders(round, arrays, entropies)
        return [client for client in clients if client in self._held]

    def _selected(self, records: Mapping[str, Tree]) -> tuple[int, ...]:
        """Experts a client asked for; ValueError says why they cannot be sent."""
        chosen = [int(i) for i in records[SELECTED][SLOTS].flatten().tolist()]
        experts, top_k = self.client_update.experts, self.client_update.top_k
        if len(chosen) != top_k or sorted(set(chosen) & set(range(experts))) != chosen:
            raise ValueError(f"{chosen} are not {top_k} ascending numbers from 0 to {experts - 1}")
        return tuple(chosen)

    def _note_holders(self, round: int, arrays: Tree, entropies: list[float]) -> None:
        """Note who holds what; in round 1 the common expert, as large as the body of any expert, went to everybody."""
        if round == 1:
            parts = [v for n, v in entries(arrays).items() if n.startswith("experts.0.")]
            heads = [v for n, v in entries(arrays).items() if n.startswith("experts.0.head.")]
            size = sum(v.nbytes for v in parts) - sum(v.nbytes for v in heads)
            self.report.bytes_down += self.num_trainable * size
            self.report.bytes_to_others += (self.num_trainable - len(self.report.sampled)) * size
        for i in range(self.client_update.experts):
            self.report.extra[f"holders_of_expert_{i}"] = float(sum(i in held for held in self._held.values()))
        if entropies:
            self.report.extra["gate_entropy"] = sum(entropies) / len(entropies)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send each client the gate and its experts, and their numbers."""
        if not self._anchors and len({self._held[client] for client in clients}) == 1:
            return self._records(arrays, clients[0])
        same = {(self._held[c], c in self._anchors): c for c in clients}  # clients with the same experts share records
        records = {key: self._records(arrays, client) for key, client in same.items()}
        return [records[self._held[c], c in self._anchors] for c in clients]

    def _records(self, arrays: Tree, client: int) -> Records:
        held = self._held[client]
        name = ANCHOR if client in self._anchors else SLOTS
        device = next(iter(entries(arrays).values())).device
        sent = {n: arrays[source] for n, source in _slot_names(arrays, held).items()}
        return {ARRAYS: tree(sent), HELD: tree({name: torch.tensor(held, device=device)})}

    def reply_schema(self, clients: list[int]) -> Sequence[Schema]:
        """Gate and the experts each was sent; clients that were sent the same share a schema."""
        schemas: dict[tuple[int, ...], Schema] = {}
        for held in {self._held[client] for client in clients}:
            names = _slot_names(self.sent_arrays, held)
            schemas[held] = schema_of(ARRAYS, {name: self.sent_arrays[source] for name, source in names.items()})
        return [schemas[self._held[client]] for client in clients]

    def fold(self) -> ExpertMean:
        """Mean of the gate over all, of each expert over its holders."""
        return ExpertMean(self._held)

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Experts nobody held stay as they are."""
        return tree({**entries(arrays), **entries(means[ARRAYS])})


class ExpertMean(WeightedMean):
    """Weighted mean that knows which expert each client had in which slot.

    Parameters
    ----------
    held : mapping of client to tuple of int
    """

    def __init__(self, held: Mapping[int, tuple[int, ...]]) -> None:
        super().__init__()
        self.held = dict(held)

    def add(self, records: Records, weight: float, client: int = -1) -> None:
        """Take in one client's gate and experts."""
        super().add({ARRAYS: tree(_at_server(records, self.held[client]))}, weight, client)

    def add_stack(self, records: Records, weights: Tensor, clients: Sequence[int] = ()) -> None:
        """Take in the gates and experts of K clients, those with the same experts together."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for k, client in enumerate(clients):
            rows.setdefault(self.held[client], []).append(k)
        for held, positions in rows.items():
            index = torch.tensor(positions)
            named = {name: value[index.to(value.device)] for name, value in _at_server(records, held).items()}
            super().add_stack({ARRAYS: tree(named, len(positions))}, weights[index])


def gate_scores(network: Network, x: Tensor) -> Tensor:
    """Gate scores before softmax ``[B, M]`` of rows ``[B, P + d]``."""
    _, embedding = _held(network.module).split(x)
    return network.part("gate")(embedding)


def anchor_clients(experts: int, unseen: Sequence[int]) -> dict[int, int]:
    """Expert of each anchor: the first clients that train, one for each expert, in order."""
    trained = (client for client in range(experts + len(unseen)) if client not in set(unseen))
    return {client: expert for expert, client in zip(range(experts), trained, strict=False)}


def _held(module: nn.Module) -> HeldExperts:
    return cast(HeldExperts, module)


def _slots(given: Given) -> Tensor:
    return cast(Tensor, given[SLOTS])


def _at_server(records: Records, held: Sequence[int]) -> dict[str, Tensor]:
    """Arrays of clients with the experts `held` by their names at the server, where ``experts.SLOT.`` has a number."""
    named = {}
    for name, value in entries(records[ARRAYS]).items():
        kind, _, rest = name.partition(".")
        slot, _, inner = rest.partition(".")
        named[f"experts.{held[int(slot)]}.{inner}" if kind == "experts" else name] = value
    return named


def _slot_names(arrays: Tree, held: Sequence[int]) -> dict[str, str]:
    """Names at a client, and those at the server, of the gate and of the experts `held`."""
    names = list(entries(arrays))
    sources = {name: name for name in names if name.startswith("gate.")}
    for slot, expert in enumerate(held):
        before = f"experts.{expert}."
        sources.update({f"experts.{slot}.{n.removeprefix(before)}": n for n in names if n.startswith(before)})
    return sources


def _draw(clients: Sequence[int], size: int, seed: int, purpose: str, round: int) -> list[int]:
    if not size:
        return []
    return [clients[i] for i in generator(seed, purpose, round).choice(len(clients), size, replace=False)]


def _check_anchors(experts: int, data: FederatedData) -> None:
    trained = data.num_clients - len(data.unseen)
    allowed = f"at most {trained}, the clients that train: each expert needs one as its anchor"
    if data.anchors:
        trained, allowed = len(data.anchors), f"at most {len(data.anchors)}: each expert needs an anchor"
        allowed += " (partition.anchors)"
    check(experts <= trained, "strategy.experts", experts, allowed)
