"""Self-FL: two uncertainties decide how far each client departs from the global network, and what it counts there.

H. Chen, J. Ding, E. Tramel, S. Wu, A. K. Sahu, S. Avestimehr, T. Zhang, Self-Aware Personalized Federated Learning,
NeurIPS 2022, arXiv:2204.08069.

Re-derived from the abstract and summaries; the sections on method and experiments were not at hand, there is no code of
the authors, and numbers are not comparable with the paper's. Networks theta_m scatter around theta with variance s_0
(inter-client), what client m learns scatters around theta_m with variance s_m (intra-client). For Gaussians the best
personal network is ``B_m theta + (1 - B_m) z_m`` with ``B_m = s_m / (s_0 + s_m)``, z_m the client's own optimum.

    theta_m <- l_m steps of SGD on f_m from theta without m's own part
    s_m     <- variance of theta_m along these steps
    theta   <- sum_m theta_m / (s_0 + s_m) / sum_m 1 / (s_0 + s_m)
    s_0     <- mean_m [ |theta_m - theta|^2 / d + s_0 s_m / (s_0 + s_m) ]          d parameters
    prediction: theta_m

Shared: the parameters, with their uncertainty s_0 down and s_m up. Personal: the whole network theta_m, buffers
included, and s_m.

Readings taken, all of them options. The abstract says that step counts and aggregation follow the two uncertainties,
one across time and one across clients; the formulas are proposals:

- ``step_rule: log`` takes ``l_m = b_m * log(1 + s_0 / s_m) / q`` steps within ``min_ratio`` and ``max_ratio``, b_m
  those of the training settings and q the median logarithm after the warm-up, whose client takes its usual steps: it
  divides the same work otherwise among clients. ``quadratic`` takes those by which gradient descent on a quadratic of
  curvature c comes from its start to the optimum, ``log((s_0' + s_m) / s_m) / -log(1 - lr * c)``, s_0' the variance
  around that start: with a small s_0 all tend to one network, with a large one to local ones. It knows nothing of
  momentum, schedules and rates of groups of layers.
- ``start_from: leave_one_out`` takes out of theta what the client put in, ``(theta - p_m theta_m) / (1 - p_m)`` with
  its share p_m of the weights, if it was in the last aggregate with less than nine tenths of them, which the server
  says; ``global`` starts from theta.
- ``intra: trajectory`` is the variance of the iterates in the second half of a training, with the last, per coordinate,
  mean over coordinates; ``gradients`` the sampling variance of the optimum, ``var(gradient of a sample) / (n_m c^2)``,
  for which one more pass is taken sample by sample. A client for whom neither gives a variance keeps its former one.
- ``inter: em`` is the rule above, the mean taken with the aggregation's shares p; ``empirical`` lacks the second term,
  and can collapse since what is sent has been drawn to theta. The first term is divided by ``1 - sum p^2``, since
  theta is the mean of the same networks. Both are smoothed over rounds (``smoothing``). ``inter_variance`` fixes s_0.
- In the first ``warmup_rounds`` all take their usual steps from theta and count alike.

What is sent has been drawn to theta already, so that iterating the third line weighs z_m by ``1 / (s_0 + s_m)^2``;
``weighting: uniform`` is the one whose fixed point is the Gaussian optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Cohort, Records, Reply, Tree, entries, tree
from fedpers.cohort.tree import expand_rows, sum_rows
from fedpers.cohort.variance import RunningVariance
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.server.collect import reply_weight
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

UNCERTAINTY = "uncertainty"
"""Record to clients: ``inter`` s_0, ``scale`` 1 / q, and of the client's part in the last aggregate ``round``,
``share`` p_m (0: it had none) and ``others``, the variance of that aggregate without it. Role of the server: ``inter``
and ``scale``.
"""
AGGREGATE = "aggregate"
"""Role of the server: ``round`` of the last aggregate, and of its n clients ``clients``, ``share`` and ``others``."""
MEMORY = "memory"
"""Role in personal state: ``variance`` s_m (0: not known) and ``round`` of the last training."""
SMALLEST = 1e-12
"""A variance below this counts as this."""
InverseVariance = Annotated[
    Literal["inverse_variance", "samples", "uniform"],
    Field(description="weight of a client in the average: 1 / (s_0 + s_m), its training samples, or 1"),
]


@dataclass(kw_only=True)
class SelfFLUpdate(LocalUpdate):
    """Train for as many steps as the uncertainties say."""

    shared = "parameters"
    personal = "all"
    settles_parts = True
    step_rule: Annotated[
        Literal["log", "quadratic", "fixed"], Field(description="how many steps; fixed: those of the training settings")
    ] = "log"
    start_from: Annotated[Literal["leave_one_out", "global"], Field(description="network a training starts from")] = (
        "leave_one_out"
    )
    intra: Annotated[
        Literal["trajectory", "gradients"], Field(description="where the variance of a client's own network is seen")
    ] = "trajectory"
    curvature: Annotated[float, Field(gt=0, description="of the loss, for step_rule=quadratic and intra=gradients")] = (
        1.0
    )
    min_ratio: Annotated[
        float, Field(ge=0, le=1, description="fewest steps, in multiples of those of the training settings")
    ] = 0.25
    max_ratio: Annotated[
        float, Field(ge=1, description="most steps, in multiples of those of the training settings")
    ] = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_rule == "quadratic":
            allowed = f"less than 1 / training.lr = {1 / self.training.lr:g} with step_rule=quadratic"
            check(self.training.lr * self.curvature < 1, "strategy.curvature", self.curvature, allowed)

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """The network; nothing is known of its variance."""
        state = super().initial_state(template, module)
        zero = torch.zeros((), dtype=torch.float64, device=template.device)
        state[MEMORY] = tree({"variance": zero, "round": zero.to(torch.int64)})
        return state

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train from the start that the method says, and measure the variance."""
        params = cohort.assemble(received[ARRAYS], cohort.state["model"].select(*cohort.names("buffers")))
        names = cohort.trainable()
        inter, steps = None, None
        if UNCERTAINTY in received:
            known = entries(cohort.per_client(received[UNCERTAINTY]))
            inter = around_start = known["inter"]
            if self.start_from == "leave_one_out":
                around_start = inter + self._leave_out(cohort, params, received[ARRAYS], known)
            steps = self._steps(cohort, inter, around_start, known["scale"])
        cohort.measures_variance = self.intra == "trajectory"
        cohort.fit(params, self.loss, steps=steps)
        if self.intra == "trajectory":
            variance = cohort.variance(params)
        else:
            variance = self._sampling_variance(cohort, params, names)
        former = torch.where(cohort.trained.to(variance.device), cohort.state[MEMORY]["variance"].to(variance), 0)
        variance = torch.where(variance > 0, variance, former)
        weight = torch.ones_like(variance)
        if inter is not None:
            weight = 1 / (inter + torch.where(variance > 0, variance, inter)).clamp(min=SMALLEST)
        arrays = entries(received[ARRAYS])
        squares = [sum_rows((params[n] - value.to(cohort.device)).double().square()) for n, value in arrays.items()]
        memory = {"variance": variance, "round": torch.full_like(weight, cohort.round).to(torch.int64)}
        return cohort.reply(
            params,
            state={MEMORY: tree(memory, cohort.size)},
            metrics={
                "intra_variance": variance,
                "inverse_variance": weight,
                "squared_distance": torch.stack(squares).sum(0),
            },
        )

    def _usual_steps(self, cohort: Cohort) -> list[int]:
        """Steps ``[K]`` of the training settings."""
        training = cohort.training
        if training.steps is not None:
            return [training.steps] * cohort.size
        return [training.epochs * batches for batches in cohort.batches_per_pass()]

    def _steps(self, cohort: Cohort, inter: Tensor, around_start: Tensor, scale: Tensor) -> list[int]:
        """Steps ``[K]`` by `inter`, the variance `around_start` of a training and `scale`, all ``[K]``."""
        usual = self._usual_steps(cohort)
        variance = cohort.state[MEMORY]["variance"].to(inter)
        known = (variance > 0) & cohort.trained
        if self.step_rule == "fixed":
            return usual
        steps = torch.tensor(usual, dtype=torch.float64)
        safe = variance.clamp(min=SMALLEST)
        if self.step_rule == "log":
            wanted = steps * (torch.log1p(inter / safe) * scale).cpu()
        else:
            wanted = (torch.log1p(around_start / safe) / -math.log(1 - cohort.rate * self.curvature)).cpu()
        chosen = torch.where(known.cpu(), wanted, steps).round()
        within = torch.maximum(chosen, (steps * self.min_ratio).ceil())
        return torch.minimum(within, (steps * self.max_ratio).ceil()).long().tolist()

    def _leave_out(self, cohort: Cohort, params: Tree, arrays: Tree, known: Mapping[str, Tensor]) -> Tensor:
        """Take the clients' parts out of what they start from, in place; variance ``[K]`` of what is left."""
        memory, model = cohort.state[MEMORY], cohort.state["model"]
        share = known["share"]
        as_sent = cohort.trained & (memory["round"].to(cohort.device) == known["round"]) & (share > 0) & (share < 0.9)
        factor = torch.where(as_sent, share / (1 - share).clamp(min=0.1), 0)
        for name in entries(arrays):
            common = params[name]
            common += expand_rows(factor.to(common), common) * (common - model[name].to(common))
        return torch.where(as_sent, known["others"], 0)

    def _sampling_variance(self, cohort: Cohort, params: Tree, names: tuple[str, ...]) -> Tensor:
        """Variance ``[K]`` of the clients' optima by the scatter of their samples' gradients."""
        scatter = RunningVariance({name: params[name] for name in names})
        plan = cohort.plan(epochs=1, batch_size=1, drop_last=False, frozen=True, purpose="uncertainty")
        for step in cohort.steps(plan):
            rows = {name: step.take(params[name]) for name in cohort.names("all")}
            _, grads = cohort.gradients(step, rows, self.loss, names, frozen=True)
            every = {name: grads.get(name, torch.zeros_like(rows[name])) for name in names}
            scatter.add(every, torch.ones(step.active, dtype=torch.bool, device=cohort.device), step)
        return scatter.result() / (scatter.count * self.curvature**2)


@method("self_fl")
@dataclass(kw_only=True)
class SelfFL(PersonalizedStrategy):
    """Average by inverse variance, and the variance between clients."""

    update = SelfFLUpdate
    weighting: InverseVariance = "inverse_variance"
    inter: Annotated[Literal["em", "empirical"], Field(description="how the variance between clients is seen")] = "em"
    inter_variance: Annotated[
        float | None, Field(gt=0, description="variance between clients; null: estimated in each round")
    ] = None
    smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of the former variance between clients in the new one")
    ] = 0.5
    warmup_rounds: Annotated[int, Field(ge=1, description="rounds with the usual steps and uniform weights")] = 1

    @classmethod
    def plain_mean(cls) -> bool:
        """No: s_0 follows from how far each client is from the exact mean, and its part is taken out of that mean."""
        return False

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send the network and, after the warm-up, what is known of the scatter of networks and the client's part."""
        if UNCERTAINTY not in self.state or round <= self.warmup_rounds:
            return {ARRAYS: arrays}
        last = entries(self.state[AGGREGATE])
        row_of = {client: row for row, client in enumerate(last["clients"].tolist())}
        nothing = torch.zeros((), dtype=torch.float64)
        records = []
        for client in clients:
            row = row_of.get(client)
            part = {n: nothing if row is None else last[n][row].clone() for n in ("share", "others")}
            values = {**entries(self.state[UNCERTAINTY]), **part, "round": last["round"]}
            records.append({ARRAYS: arrays, UNCERTAINTY: tree(values)})
        return records

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the mean; estimate the variance between clients from how far each went."""
        new = means[ARRAYS]
        weights = [reply_weight(self.weighting, self.reply_metrics[client]) for client in clients]
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        names = ("train/intra_variance", "train/squared_distance")
        rows = {client: self.reply_metrics[client] for client in clients}
        rows = {c: row for c, row in rows.items() if all(0 <= row.get(name, math.nan) < math.inf for name in names)}
        if len(rows) < 2:  # nothing scatters
            self.state[AGGREGATE] = self._parts(clients, shares)
            return new
        among = shares[[client in rows for client in clients]]
        among = among / among.sum()
        intra, squares = (torch.tensor([row[name] for row in rows.values()], dtype=torch.float64) for name in names)
        size = sum(value.numel() for value in entries(arrays).values())
        moved = sum(float((entries(new)[n] - v).double().square().sum()) for n, v in entries(arrays).items())
        inter = (float(among @ squares) - moved) / size / max(SMALLEST, 1 - float(among @ among))
        before = self.state.get(UNCERTAINTY)
        if before is not None and self.inter == "em":
            former = float(before["inter"])
            variance = torch.where(intra > 0, intra, former)
            inter += float(among @ (former * variance / (former + variance)))
        if before is not None:
            inter = self.smoothing * float(before["inter"]) + (1 - self.smoothing) * inter
        inter = max(SMALLEST, inter if self.inter_variance is None else self.inter_variance)
        if before is None or self.report.round <= self.warmup_rounds:
            logs = torch.log1p(inter / intra.clamp(min=SMALLEST))[intra > 0]
            scale = 1 / float(logs.median()) if len(logs) else 1.0
        else:
            scale = float(before["scale"])
        values = {"inter": inter, "scale": scale}
        self.state[UNCERTAINTY] = tree({name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})
        self.state[AGGREGATE] = self._parts(clients, shares)
        self.report.extra["inter_variance"] = inter
        return new

    def _parts(self, clients: list[int], shares: Tensor) -> Tree:
        """What the clients of this round's aggregate, with `shares` ``[n]`` of the weights, are to know of it."""
        variances = [self.reply_metrics[client].get("train/intra_variance", 0.0) for client in clients]
        inter = float(self.state[UNCERTAINTY]["inter"]) if UNCERTAINTY in self.state else 0.0
        scatter = shares.square() * torch.tensor(
            [inter + (s if s > 0 else inter) for s in variances], dtype=shares.dtype
        )
        others = (scatter.sum() - scatter) / (1 - shares).clamp(min=SMALLEST).square()
        rounds = torch.tensor(self.report.round)
        return tree({"round": rounds, "clients": torch.tensor(clients), "share": shares, "others": others})
