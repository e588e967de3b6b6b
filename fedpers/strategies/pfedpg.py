"""pFedPG: a server that generates a prompt for each client, and learns from how clients change it.

F.-E. Yang, C.-Y. Wang, Y.-C. F. Wang, Efficient Model Personalization in Federated Learning via Client-Specific Prompt
Generation, ICCV 2023.

With K prompts of width D for a frozen vision transformer F*, a base B ``[K, D]``, a descriptor d_n ``[K, D]`` of each
client and a generator phi = (W_Q, W_K, W_V, W_O):

    P_n  = B + softmax((d_n W_Q) (B W_K)^T / sqrt(inner)) (B W_V) W_O                       on the server, sent
    P~_n, h_n <- E passes of SGD on f_n(h_n(F*(P_n, .)))                                    on the client
    D_n  = P~_n - P_n                                                                       sent back
    theta <- theta + server_lr * mean_n (dP_n/dtheta)^T D_n       theta in {phi, B}, over the clients of the round
    d_n   <- d_n + server_lr * (dP_n/dd_n)^T D_n                  by client n alone

Shared: nothing is averaged; K * D numbers go down and K * D come up. Personal: the head, and the adapted prompts P~_n.
The server keeps phi, B and all d_n. Only input tokens before the first block are prompted.

Sign. D_n points downhill, so it is followed: the step above is one of gradient descent on
``0.5 * mean_n ||P~_n - P_n(theta)||^2`` with P~_n held fixed. Two of the unofficial implementations pass D_n as a
gradient to a minimizer, which walks away from what clients ask for.

No code of the authors was found, and the displayed equations could not be read in the copy at hand. Readings taken:

- A residual, and a single attention head of width ``inner``, 512 if D allows, as in two unofficial implementations.
  d_n has K rows, so that the K outputs differ; ``descriptor_tokens: 1`` gives it one, added to all rows of B alike.
- One step per round, on the *mean* over its clients; ``reduction: sum`` and ``weighting: samples`` are there too. d_n
  has one client only, so its step is neither divided nor weighted.
- Start: prompts as in visual prompt tuning (:func:`fedpers.models.frozen.prompted`), descriptors uniform in +-1,
  W uniform in +-1/sqrt(rows). The head starts as it comes: pretrained with the backbone, or new.
- Evaluated are the adapted prompts with the head they were trained with (``test/accuracy``), and those the server just
  generated (``test/generated_accuracy``). For a client that has not trained yet they are the same.
- Prompts and heads are trained together. The momentum of both starts anew in every round, as everywhere here; keeping
  that of the heads would be possible too.
- A client that never trains gets prompts from the mean of the known descriptors. To adapt, it fits one of its own from
  there: ``adapt_rounds`` times prompts are generated and trained, and its descriptor takes the step above, while phi, B
  and all else on the server stay as they are. Other methods adapt in a single such training.
- The paper's plain steps at its rate 0.001 (``server_optimizer: sgd``) hardly move the generator of a small network.
  Measured with ``+experiment=pfedpg`` (digits, 15 rounds, 3 seeds), mean validation accuracy after the last round: sgd
  at 0.001, 0.1 and 1: 79.7, 81.7 and 82.1 % (10 diverged); Adam at 0.001, 0.01 and 0.03: 82.4, 84.2 and 83.4 %. With
  sgd the prompts of different clients stay within 0.0015 of their mean (``train/prompt_spread``), with Adam at 0.01
  they come to differ by 0.16. Hence the default, Adam at 0.01. Beside it ``generator: none`` has 81.4 %.
- The paper's lr 0.25 for prompts and heads alike was too fast for the heads of that network; in the settings that come
  with the method it is the rate of the prompts, and heads have 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import flwr.app as flower
import torch
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Cohort, Collect, Records, Reply, Tree, View, entries, leaves, tree
from fedpers.cohort.fold import REPLIES
from fedpers.cohort.tree import expand_rows
from fedpers.identity import ADAPTING
from fedpers.models.frozen import PROMPTS
from fedpers.randomness import generator as numbers
from fedpers.records import ARRAYS
from fedpers.server.collect import schema_of, validated_reply
from fedpers.server.tools import ClientTable, ServerOptimizer
from fedpers.strategies.base import PersonalizedStrategy, Received, Weighting, method
from fedpers.strategies.fedvpt import FedVPTUpdate

GENERATOR, DESCRIPTORS, MOMENTS = "generator", "descriptors", "moments"
"""Roles in the server's state."""
MATRICES = ("query", "key", "value", "out")
_AT_ONCE = 64  # clients whose changes are differentiated together

Rows = dict[str, Tensor]
"""What is known of n clients: ``value`` ``[n, T, D]``; with Adam also ``first``, ``second``, and ``steps`` ``[n]``."""


def generate(base: Tensor, matrices: Mapping[str, Tensor], descriptors: Tensor) -> Tensor:
    """Prompts of n clients.

    Parameters
    ----------
    base : Tensor ``[K, D]``
    matrices : mapping of str to Tensor
        ``query``, ``key``, ``value`` ``[D, inner]`` and ``out`` ``[inner, D]``.
    descriptors : Tensor ``[n, T, D]``
        T is K, or 1 for one change of all rows.

    Returns
    -------
    Tensor ``[n, K, D]``
    """
    scores = (descriptors @ matrices["query"]) @ (base @ matrices["key"]).T / math.sqrt(matrices["key"].shape[1])
    return base + scores.softmax(-1) @ (base @ matrices["value"]) @ matrices["out"]


@dataclass(kw_only=True)
class PFedPGUpdate(FedVPTUpdate):
    """Train the received prompts and the client's head; answer with how the prompts changed."""

    settles_parts = True

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """Head; prompts as adapted last."""
        state = super().initial_state(template, module)
        state["adapted"] = template.select(PROMPTS)
        return state

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train prompts and head together."""
        params = cohort.assemble(received[ARRAYS])
        before = params[PROMPTS].clone()
        cohort.fit(params, self.loss)
        change = params[PROMPTS] - before
        metrics = {"prompt_change": change.flatten(1).norm(dim=1)}
        reply = cohort.reply(params, state={"adapted": params.select(PROMPTS)}, metrics=metrics)
        return Reply({ARRAYS: tree({PROMPTS: change}, cohort.size)}, reply.state, reply.metrics)

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> View:
        """Own head with the prompts as adapted last, or as received before the first training."""
        personal_values = {**entries(cohort.state["model"]), **entries(cohort.state["adapted"])}
        return cohort.view(received[ARRAYS], personal=tree(personal_values, cohort.size))

    def extra_models(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Mapping[str, Tree | View]:
        """``generated``: own head with the prompts as received."""
        return {"generated": cohort.view(received[ARRAYS])}


def follow(
    base: Tensor, matrices: Mapping[str, Tensor], descriptors: Tensor, changes: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Directions in which generated prompts follow changes.

    Parameters
    ----------
    base, matrices, descriptors
        See :func:`generate`.
    changes : Tensor ``[n, K, D]``
        D_n.
    weights : Tensor ``[n]``
        > 0.

    Returns
    -------
    dict of str to Tensor
        ``sum_n weight_n (dP_n/dtheta)^T D_n`` for the base (``prompts``) and each matrix.
    Tensor ``[n, T, D]``
        ``(dP_n/dd_n)^T D_n``, without weight.
    """
    inputs = {PROMPTS: base, **matrices, DESCRIPTORS: descriptors}
    inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    with torch.enable_grad():
        prompts = generate(inputs[PROMPTS], inputs, inputs[DESCRIPTORS])
        total = ((prompts * changes).flatten(1).sum(1) * weights).sum()
    gradients = dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))
    descriptor_grads = gradients.pop(DESCRIPTORS)
    return gradients, descriptor_grads / expand_rows(weights, descriptor_grads)


@method("pfedpg")
@dataclass(kw_only=True)
class PFedPG(PersonalizedStrategy):
    """Server with a generator, and a descriptor per client, each with a count of its steps."""

    update = PFedPGUpdate
    weighting: Weighting = "uniform"
    generator: Annotated[
        Literal["attention", "none"],
        Field(description="none: everybody gets the base, which still follows the changes (the paper's ablation)"),
    ] = "attention"
    inner: Annotated[
        int | None, Field(ge=1, description="width of the generator's queries, keys and values; null: min(512, 8 * D)")
    ] = None
    descriptor_tokens: Annotated[
        Literal[1] | None, Field(description="rows of a descriptor: 1, or one for each prompt (null)")
    ] = None
    server_optimizer: Annotated[
        Literal["adam", "sgd", "momentum", "yogi"], Field(description="of base, generator and descriptors")
    ] = "adam"
    server_lr: Annotated[float, Field(gt=0, description="of base, generator and descriptors")] = 0.01
    reduction: Annotated[
        Literal["mean", "sum"],
        Field(description="of a round's directions, for base and generator; adam and yogi see no difference"),
    ] = "mean"
    adapt_rounds: Annotated[
        int, Field(ge=1, description="steps of a new descriptor when a client that never trained adapts")
    ] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._optimizer = ServerOptimizer(name=self.server_optimizer, lr=self.server_lr)

    # ------------------------------------------------------------------- a round

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Generate each client's prompts."""
        if self.generator == "none":
            return {ARRAYS: arrays}
        return self._prompts(arrays, self._rows(arrays, clients)["value"])

    def fold(self) -> Collect:
        """Keep all changes: what they say of the generator is worked out here, where generator and descriptors are."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Move base, generator and the descriptors of `clients`."""
        changes, weights = means[ARRAYS][PROMPTS], means[REPLIES]["weight"].to(arrays[PROMPTS])
        if self.generator == "none":
            common = {PROMPTS: (expand_rows(weights, changes) * changes).double().sum(0)}
            table, toward = None, changes
        else:
            table = self._descriptors(arrays, clients)
            rows = table.rows(clients)
            common, toward = self._directions(arrays, rows["value"], changes, weights)
        scale = len(clients) if self.reduction == "sum" else 1
        mean = {n: (v / weights.double().sum()).to(changes) * scale for n, v in common.items()}
        steps, moments = self._optimizer.step_tree(tree(mean), self.state.get(MOMENTS))
        if leaves(moments):
            self.state[MOMENTS] = moments
        new = tree({PROMPTS: arrays[PROMPTS] + steps[PROMPTS]})
        if table is None:
            return new
        matrices = {n: v + steps[n] for n, v in entries(self.state[GENERATOR]).items()}
        self.state[GENERATOR] = tree(matrices)
        moved = self._moved(rows, toward)
        table.put(clients, moved)
        self.state[DESCRIPTORS] = table.values
        prompts = generate(new[PROMPTS], matrices, moved["value"])
        self.report.extra["prompt_spread"] = float((prompts - prompts.mean(0)).square().mean().sqrt())
        return new

    def _directions(
        self, arrays: Tree, descriptors: Tensor, changes: Tensor, weights: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted sums over clients, in float64, of what :func:`follow` returns; a few clients at a time."""
        sums: dict[str, Tensor] = {}
        rows = []
        parts = (torch.split(values, _AT_ONCE) for values in (descriptors, changes, weights))
        for some, their_changes, their_weights in zip(*parts, strict=True):
            directions, of_descriptors = follow(
                arrays[PROMPTS], entries(self.state[GENERATOR]), some, their_changes, their_weights
            )
            rows.append(of_descriptors)
            for name, value in directions.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
        return sums, torch.cat(rows)

    def _moved(self, rows: Rows, directions: Tensor) -> Rows:
        """Descriptors (and their moments) after a step."""
        step, moments = self._optimizer.step(directions, rows)
        return {"value": rows["value"] + step, **moments}

    # --------------------------------------------------- generator and descriptors

    def _prompts(self, arrays: Tree, descriptors: Tensor) -> list[dict[str, Tree]]:
        """Records for clients with these descriptors ``[n, T, D]``."""
        prompts = generate(arrays[PROMPTS], self._matrices(arrays), descriptors)
        return [{ARRAYS: tree({PROMPTS: row})} for row in prompts]

    def _rows(self, arrays: Tree, clients: list[int]) -> Rows:
        """What is known of `clients`; clients that never train have the mean of all that do, and no moments."""
        table = self._descriptors(arrays, clients)
        stored = table.rows([client for client in clients if client not in self.unseen])
        mean = table.mean()["value"]
        new = {"value": mean, **self._optimizer.moments(mean)}
        row_ids = iter(range(len(clients)))
        order = [None if client in self.unseen else next(row_ids) for client in clients]
        return {
            n: torch.stack([new[n].to(v.device) if at is None else v[at] for at in order]) for n, v in stored.items()
        }

    def _matrices(self, arrays: Tree) -> dict[str, Tensor]:
        """The generator, drawn when it is first needed."""
        if GENERATOR not in self.state:
            base = arrays[PROMPTS]
            width = base.shape[1]
            inner = min(512, 8 * width) if self.inner is None else self.inner
            drawn = {}
            for index, name in enumerate(MATRICES):
                shape = (inner, width) if name == "out" else (width, inner)
                bound = 1 / math.sqrt(shape[0])
                values = numbers(self.seed, "generator", index).uniform(-bound, bound, shape)
                drawn[name] = torch.from_numpy(values).to(base)
            self.state[GENERATOR] = tree(drawn)
        return entries(self.state[GENERATOR])

    def _descriptors(self, arrays: Tree, clients: Sequence[int]) -> ClientTable:
        """Descriptors of `clients` and of all that may train, drawn when they are first needed."""
        self._matrices(arrays)
        base = arrays[PROMPTS]
        count, width = base.shape
        shape = (count if self.descriptor_tokens is None else self.descriptor_tokens, width)

        def first(client: int) -> Rows:
            value = torch.from_numpy(numbers(self.seed, "descriptor", client).uniform(-1, 1, shape)).to(base)
            return {"value": value, **self._optimizer.moments(value)}

        table = ClientTable(first, self.state.get(DESCRIPTORS))
        table.add(sorted({*self.trainable_clients, *clients} - set(self.unseen)))
        self.state[DESCRIPTORS] = table.values
        return table

    # ------------------------------------------------------------- unseen clients

    def adapt(self, round: int, arrays: Tree, grid: Grid, clients: list[int]) -> tuple[list[int], list[Records]]:
        """Fit a descriptor to each client that never trained; phi, B and the known descriptors stay as they are."""
        able = self.prepare(round, arrays, clients, grid, "evaluate")
        rows = {} if self.generator == "none" else self._rows(arrays, able)
        base = arrays[PROMPTS]
        schema = schema_of(ARRAYS, {PROMPTS: base})
        for r in range(self.adapt_rounds if able else 0):
            config = flower.ConfigRecord({"server-round": round + r, ADAPTING: True})
            sent = self._prompts(arrays, rows["value"]) if rows else {ARRAYS: arrays}
            results, _ = self.exchange.call(grid, flower.MessageType.TRAIN, sent, config, able)
            changes = {}
            for client in able:
                try:
                    changes[client] = validated_reply(results[client], schema)[0][ARRAYS][PROMPTS].to(base)
                except ValueError as problem:
                    self.leave_out(client, f"it did not adapt: {problem}", "evaluate")
            stay = [i for i, client in enumerate(able) if client in changes]
            able = [able[i] for i in stay]
            if not able:
                return [], []
            if rows:
                rows = {name: value[stay] for name, value in rows.items()}
                stacked = torch.stack(list(changes.values()))
                toward = follow(base, self._matrices(arrays), rows["value"], stacked, base.new_ones(len(able)))[1]
                rows = self._moved(rows, toward)
        records: list[Records] = [{ARRAYS: arrays}] * len(able)
        return able, list(self._prompts(arrays, rows["value"])) if rows else records
