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

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import flwr.app as flower
import torch
from flwr.serverapp import Grid
from tensordict import TensorDict
from torch import Tensor, nn

from fedpers.cohort import Cohort, Fold, Reply, Tree, View, entries, tree
from fedpers.cohort.tree import expand_rows
from fedpers.errors import check, one_of
from fedpers.models.frozen import PROMPTS
from fedpers.randomness import generator as numbers
from fedpers.strategies.base import PersonalizedStrategy, Received
from fedpers.strategies.fedvpt import FedVPTUpdate
from fedpers.strategies.intake import checked, form_of, outcome_of
from fedpers.strategies.records import ARRAYS
from fedpers.strategies.server import Records

log = logging.getLogger(__name__)
GENERATORS = ("attention", "none")
OPTIMIZERS = ("adam", "sgd")
REDUCTIONS = ("mean", "sum")
GENERATOR, DESCRIPTORS, MOMENTS = "generator", "descriptors", "moments"
"""Roles in the server's state, and records of a round's directions."""
MATRICES = ("query", "key", "value", "out")
_BETAS, _EPS = (0.9, 0.999), 1e-8
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
    """Train the received prompts and the own head; answer with how the prompts changed."""

    def initial_state(self, model: Tree, module: nn.Module) -> Tree:
        """Head; prompts as adapted last, and ``trained``, whether there are any."""
        state = super().initial_state(model, module)
        state["adapted"] = model.select(PROMPTS)
        state["trained"] = model[PROMPTS].new_zeros((), dtype=torch.int64)
        return state

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train prompts and head together."""
        params = cohort.assemble(received[ARRAYS])
        before = params[PROMPTS].clone()
        cohort.fit(params, self.loss)
        change = params[PROMPTS] - before
        kept = {
            "model": params.select(*cohort.names(self.personal)),
            "adapted": params.select(PROMPTS),
            "trained": torch.ones(cohort.size, dtype=torch.int64, device=cohort.device),
        }
        return Reply(
            {ARRAYS: tree({PROMPTS: change}, cohort.size)},
            TensorDict(kept, batch_size=[cohort.size]),
            {"prompt_change": change.flatten(1).norm(dim=1)},
        )

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> View:
        """Own head with the prompts as adapted last, or as received before the first training."""
        view = cohort.view(received[ARRAYS])
        own = cohort.state["adapted"][PROMPTS].to(cohort.device)
        trained = cohort.state["trained"].to(cohort.device).bool()
        prompts = torch.where(expand_rows(trained, own), own, view.tensors[PROMPTS])
        return View({**view.tensors, PROMPTS: prompts}, view.stacked | {PROMPTS})

    def others(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Mapping[str, Tree | View]:
        """``generated``: own head with the prompts as received."""
        return {"generated": cohort.view(received[ARRAYS])}


class Directions:
    """Fold of changes D_n: the chain rule through the generator, summed over clients in float64.

    Grows with the number of clients only by the directions of their descriptors, and by at most 64 changes that wait
    to be differentiated together.

    Parameters
    ----------
    base : Tensor ``[K, D]``
        As the prompts of the round were made of it.
    matrices : mapping of str to Tensor
        Of the generator; none if all clients got the base.
    descriptors : mapping of int to Tensor ``[T, D]``
        Of the round's clients.
    """

    def __init__(self, base: Tensor, matrices: Mapping[str, Tensor], descriptors: Mapping[int, Tensor]) -> None:
        self.base = base
        self.matrices = dict(matrices)
        self.descriptors = descriptors
        self.weight = 0.0
        self.sums: dict[str, Tensor] = {}
        self.own: dict[int, Tensor] = {}
        self._waiting: list[tuple[Tensor, float, int]] = []

    def add(self, records: Mapping[str, Tree], weight: float, client: int) -> None:
        """Take in one client's change."""
        self._waiting.append((records[ARRAYS][PROMPTS].to(self.base), weight, client))
        if len(self._waiting) == _AT_ONCE:
            self._differentiate()

    def __getstate__(self) -> dict[str, Any]:
        self._differentiate()
        return {**self.__dict__, "base": None, "matrices": {}, "descriptors": {}}  # whoever merges it has them

    def merge(self, other: Self) -> None:
        """Take in what another fold took in."""
        other._differentiate()
        self.weight += other.weight
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.own.update(other.own)

    def result(self) -> dict[str, Tree]:
        """Means over clients for base and generator; ``value`` ``[n, T, D]`` of each ``client`` ``[n]``."""
        self._differentiate()
        means = {name: (value / self.weight).to(self.base) for name, value in self.sums.items()}
        found = {ARRAYS: tree({PROMPTS: means.pop(PROMPTS)})}
        if self.matrices:
            clients = sorted(self.own)
            rows = {"client": torch.tensor(clients), "value": torch.stack([self.own[c] for c in clients])}
            found.update({GENERATOR: tree(means), DESCRIPTORS: tree(rows)})
        return found

    def _differentiate(self) -> None:
        """Turn waiting changes into directions."""
        if not self._waiting:
            return
        changes = torch.stack([change for change, _, _ in self._waiting])
        weights = changes.new_tensor([weight for _, weight, _ in self._waiting])
        clients = [client for _, _, client in self._waiting]
        self._waiting = []
        self.weight += float(weights.double().sum())
        found = {PROMPTS: (expand_rows(weights, changes) * changes).sum(0)}
        if self.matrices:
            rows = torch.stack([self.descriptors[client] for client in clients])
            found, own = follow(self.base, self.matrices, rows, changes, weights)
            self.own.update(zip(clients, own, strict=True))
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()


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
    free = {PROMPTS: base, **matrices, DESCRIPTORS: descriptors}
    free = {name: value.detach().requires_grad_() for name, value in free.items()}
    with torch.enable_grad():
        prompts = generate(free[PROMPTS], free, free[DESCRIPTORS])
        total = ((prompts * changes).flatten(1).sum(1) * weights).sum()
    found = dict(zip(free, torch.autograd.grad(total, list(free.values())), strict=True))
    own = found.pop(DESCRIPTORS)
    return found, own / expand_rows(weights, own)


@dataclass(kw_only=True)
class PFedPG(PersonalizedStrategy):
    """Server with a generator, and a descriptor per client.

    Parameters
    ----------
    generator : {"attention", "none"}
        ``none`` sends the base to everybody, which still follows the changes (the paper's ablation).
    inner : int, optional
        Width of queries, keys and values, >= 1; default ``min(512, 8 * D)``.
    descriptor_tokens : int, optional
        Rows of a descriptor: 1, or as many as prompts (null).
    server_optimizer : {"adam", "sgd"}
        How base, generator and descriptors move along their directions; Adam with betas 0.9 and 0.999, and a count of
        steps for each client's descriptor.
    server_lr : float
        Rate, > 0.
    reduction : {"mean", "sum"}
        Of directions over the clients of a round, for base and generator.
    adapt_rounds : int
        Steps of a new descriptor when a client that never trained adapts, >= 1.
    """

    update = PFedPGUpdate
    weighting: str = "uniform"
    generator: str = "attention"
    inner: int | None = None
    descriptor_tokens: int | None = None
    server_optimizer: str = "adam"
    server_lr: float = 0.01
    reduction: str = "mean"
    adapt_rounds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("generator", GENERATORS), ("server_optimizer", OPTIMIZERS), ("reduction", REDUCTIONS)):
            value = getattr(self, name)
            check(value in known, f"strategy.{name}", value, one_of(known, str(value)))
        check(self.inner is None or self.inner >= 1, "strategy.inner", self.inner, "a whole number >= 1, or null")
        tokens = self.descriptor_tokens
        check(tokens in (None, 1), "strategy.descriptor_tokens", tokens, "1, or null for one per prompt")
        rate = self.server_lr
        check(0 < rate < math.inf, "strategy.server_lr", rate, "a number > 0")
        check(self.adapt_rounds >= 1, "strategy.adapt_rounds", self.adapt_rounds, "a whole number >= 1")

    # ------------------------------------------------------------------- a round

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Generate each client's prompts."""
        if self.generator == "none":
            return {ARRAYS: arrays}
        return self._prompts(arrays, self._rows(arrays, clients)["value"])

    def fold(self) -> Fold:
        """Directions of base, generator and descriptors."""
        if self.generator == "none":
            return Directions(self.sent_arrays[PROMPTS], {}, {})
        known = entries(self.state[DESCRIPTORS])
        rows = dict(zip(known["client"].tolist(), known["value"], strict=True))
        return Directions(self.sent_arrays[PROMPTS], entries(self.state[GENERATOR]), rows)

    def to_fold_elsewhere(self) -> Self:
        """Take generator and descriptors along, which directions follow from."""
        own = super().to_fold_elsewhere()
        own.state = {role: values for role, values in self.state.items() if role != MOMENTS}
        return own

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Move base, generator and the descriptors of `clients`."""
        common = {**entries(means[ARRAYS]), **entries(means.get(GENERATOR, tree({})))}
        if self.reduction == "sum":
            common = {name: value * len(clients) for name, value in common.items()}
        steps = self._common_steps(common)
        if self.generator == "none":
            return tree({PROMPTS: arrays[PROMPTS] + steps[PROMPTS]})
        matrices = entries(self.state[GENERATOR])
        self.state[GENERATOR] = tree({name: value + steps[name] for name, value in matrices.items()})
        known, given = entries(self.state[DESCRIPTORS]), entries(means[DESCRIPTORS])
        place = self._places()
        rows = torch.tensor([place[c] for c in given["client"].tolist()], device=known["value"].device)
        moved = self._moved({n: v[rows] for n, v in known.items() if n != "client"}, given["value"])
        self.state[DESCRIPTORS] = tree(
            {n: v.index_copy(0, rows, moved[n]) if n in moved else v for n, v in known.items()}
        )
        new = tree({PROMPTS: arrays[PROMPTS] + steps[PROMPTS]})
        prompts = generate(new[PROMPTS], entries(self.state[GENERATOR]), moved["value"])
        self.report.extra["prompt_spread"] = float((prompts - prompts.mean(0)).square().mean().sqrt())
        return new

    def _common_steps(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Steps of base and generator."""
        if self.server_optimizer == "sgd":
            return {name: self.server_lr * value for name, value in directions.items()}
        known = entries(self.state.get(MOMENTS, tree({})))
        steps = known.get("steps", torch.zeros((), dtype=torch.int64)) + 1
        taken, kept = {}, {"steps": steps}
        for name, value in directions.items():
            first, second = (known.get(f"{name}.{m}", torch.zeros_like(value)) for m in ("first", "second"))
            taken[name], kept[f"{name}.first"], kept[f"{name}.second"] = self._adam(value, first, second, steps)
        self.state[MOMENTS] = tree(kept)
        return taken

    def _moved(self, rows: Rows, directions: Tensor) -> Rows:
        """Descriptors (and their moments) after a step."""
        if self.server_optimizer == "sgd":
            return {"value": rows["value"] + self.server_lr * directions}
        steps = rows["steps"] + 1
        taken, first, second = self._adam(directions, rows["first"], rows["second"], expand_rows(steps, directions))
        return {"value": rows["value"] + taken, "first": first, "second": second, "steps": steps}

    def _adam(self, value: Tensor, first: Tensor, second: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step along a direction, and the new moments."""
        first = torch.lerp(first, value, 1 - _BETAS[0])
        second = torch.lerp(second, value.square(), 1 - _BETAS[1])
        mean, square = (m / (1 - b ** steps.double()).to(m) for m, b in zip((first, second), _BETAS, strict=True))
        return self.server_lr * mean / (square.sqrt() + _EPS), first, second

    # --------------------------------------------------- generator and descriptors

    def _prompts(self, arrays: Tree, descriptors: Tensor) -> list[dict[str, Tree]]:
        """Records for clients with these descriptors ``[n, T, D]``."""
        self._know(arrays, [])
        prompts = generate(arrays[PROMPTS], entries(self.state[GENERATOR]), descriptors)
        return [{ARRAYS: tree({PROMPTS: own})} for own in prompts]

    def _rows(self, arrays: Tree, clients: list[int]) -> Rows:
        """What is known of `clients`; clients that never train have the mean of all that do, and no moments."""
        self._know(arrays, clients)
        known = {n: v for n, v in entries(self.state[DESCRIPTORS]).items() if n != "client"}
        mean = {n: torch.zeros_like(v[0]) if n != "value" else v.mean(0) for n, v in known.items()}
        place = self._places()
        return {
            n: torch.stack([mean[n] if c in self.unseen else v[place[c]] for c in clients]) for n, v in known.items()
        }

    def _places(self) -> dict[int, int]:
        """Where clients stand among the descriptors."""
        return {client: at for at, client in enumerate(self.state[DESCRIPTORS]["client"].tolist())}

    def _know(self, arrays: Tree, clients: Sequence[int]) -> None:
        """Draw generator and descriptors that are not there yet: those of `clients`, and of all that may train."""
        base = arrays[PROMPTS]
        count, width = base.shape
        if GENERATOR not in self.state:
            inner = min(512, 8 * width) if self.inner is None else self.inner
            shapes = {name: (inner, width) if name == "out" else (width, inner) for name in MATRICES}
            drawn = {}
            for place, (name, shape) in enumerate(shapes.items()):
                bound = 1 / math.sqrt(shape[0])
                values = numbers(self.seed, "generator", place).uniform(-bound, bound, shape)
                drawn[name] = torch.from_numpy(values).to(base)
            self.state[GENERATOR] = tree(drawn)
        known = entries(self.state.get(DESCRIPTORS, tree({})))
        listed = set(known["client"].tolist()) if known else set()
        new = sorted(({*self.seen, *clients} - set(self.unseen)) - listed)
        if not new:
            return
        shape = (count if self.descriptor_tokens is None else self.descriptor_tokens, width)
        drawn_rows = [torch.from_numpy(numbers(self.seed, "descriptor", c).uniform(-1, 1, shape)) for c in new]
        rows = {"client": torch.tensor(new, device=base.device), "value": torch.stack(drawn_rows).to(base)}
        if self.server_optimizer == "adam":
            rows.update(first=torch.zeros_like(rows["value"]), second=torch.zeros_like(rows["value"]))
            rows["steps"] = torch.zeros(len(new), dtype=torch.int64, device=base.device)
        self.state[DESCRIPTORS] = tree({n: torch.cat([known[n], v]) if known else v for n, v in rows.items()})

    # ------------------------------------------------------------- unseen clients

    def adapt(self, round: int, arrays: Tree, grid: Grid, clients: list[int]) -> tuple[list[int], list[Records]]:
        """Fit a descriptor to each client that never trained; phi, B and the known descriptors stay as they are."""
        able = self.prepare(round, arrays, clients, grid, "evaluate")
        rows = {} if self.generator == "none" else self._rows(arrays, able)
        base = arrays[PROMPTS]
        form = form_of(ARRAYS, {PROMPTS: base})
        for r in range(self.adapt_rounds if able else 0):
            config = flower.ConfigRecord({"server-round": round + r})
            sent = self._prompts(arrays, rows["value"]) if rows else {ARRAYS: arrays}
            messages, _ = self._messages(flower.MessageType.TRAIN, sent, config, able)
            answered = self._by_client(grid.send_and_receive(messages, timeout=self.timeout))
            changes = {}
            for client in able:
                try:
                    changes[client] = checked(outcome_of(answered.get(client)), form)[0][ARRAYS][PROMPTS].to(base)
                except ValueError as problem:
                    self.report.evaluation_failures[client] = str(problem)
                    log.info("client %d did not adapt: %s", client, problem)
            stay = [place for place, client in enumerate(able) if client in changes]
            able = [able[place] for place in stay]
            if not able:
                return [], []
            if rows:
                rows = {name: value[stay] for name, value in rows.items()}
                stacked = torch.stack(list(changes.values()))
                own = follow(base, entries(self.state[GENERATOR]), rows["value"], stacked, base.new_ones(len(able)))[1]
                rows = self._moved(rows, own)
        records: list[Records] = [{ARRAYS: arrays}] * len(able)
        return able, list(self._prompts(arrays, rows["value"])) if rows else records
