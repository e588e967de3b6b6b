"""Group Personalized FL: one model for all clients, then one for each group of them, then one for each client.

Z. Liu, Y. Hui, F. Peng, Group Personalized Federated Learning, ICASSP 2023, arXiv:2210.01863.

Re-derived from the abstract and summaries; the sections on method and experiments were not at hand, there is no code of
the authors, and numbers are not comparable with the paper's. With group g(k) of client k, given and not learned:

    stage 1, T_1 rounds      theta   <- sum_k n_k / n * (E passes of SGD on f_k, from theta)
    stage 2, all others      theta_g <- the same over the clients of group g, from theta_g; at first theta
    stage 3, to predict      theta_k <- E_3 passes of SGD on f_k, from theta_g(k); nothing of it is sent

Shared: the network; the server keeps one for each group. Personal: nothing; as in ``fedavg_ft`` the adapted network is
forgotten after a prediction. Who trains in a round does not depend on groups, so that all methods see the same clients;
the network of a group of which nobody trains stays as it is.

Read as a hierarchy (theta_g around theta, theta_k around theta_g), warm starts and few steps take the place of the two
Gaussian penalties. Readings taken where the text is silent, all of them options:

- ``group_mu`` adds the penalty ``mu/2 * ||w - theta||^2`` in stage 2, ``personal_mu`` adds ``mu/2 * ||w - theta_g||^2``
  in stage 3; ``group_rate`` and ``personal_rate`` are factors on the learning rates there.
- Stage 3 keeps, of theta_g and the networks after each pass, the one with the lowest validation loss: a client with few
  samples falls back to its group's network (``keep_best``). Its validation metrics are optimistic for that. One without
  validation samples keeps the last. The optimizer begins anew with each pass, so momentum restarts.
- A client belongs to one group. One that never trained has its group's network.

The rows of an ablation are settings: without groups ``global_rounds`` is the number of rounds; without a common start
it is 0; without stage 3 ``personal_epochs`` is 0. ``shuffle_groups`` is a control: with groups of the same sizes, drawn
at random, the gain of stage 2 should vanish.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fedpers.client.app import CohortApp
from fedpers.cohort import Cohort, GroupedMean, Records, Reply, Tree, View, entries, proximal, tree
from fedpers.cohort.fold import GROUPS
from fedpers.cohort.tree import expand_rows
from fedpers.errors import ConfigError, TrainingError, check
from fedpers.randomness import generator
from fedpers.records import ARRAYS
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, method

GLOBAL = "global"
"""Record of the network of all clients, sent beside that of the group where a penalty ties them."""


@dataclass(kw_only=True)
class GroupPerFLUpdate(LocalUpdate):
    """Train the received network; before a prediction, adapt it."""

    can_finetune = False
    global_rounds: Annotated[
        int, Field(ge=0, description="T_1: rounds over all clients; in later rounds each group trains its own network")
    ] = 25
    group_mu: Annotated[float, Field(ge=0, description="strength of the pull to the network of all in stage 2")] = 0.0
    group_rate: Annotated[float, Field(gt=0, description="factor on learning rates in stage 2")] = 1.0
    personal_epochs: Annotated[int, Field(ge=0, description="E_3: passes before each prediction; 0: none")] = 1
    personal_mu: Annotated[
        float, Field(ge=0, description="strength of the pull to the network of the group in stage 3")
    ] = 0.0
    personal_rate: Annotated[float, Field(gt=0, description="factor on learning rates in stage 3")] = 1.0
    keep_best: Annotated[
        bool, Field(description="stage 3 keeps what has the lowest validation loss, perhaps the network of the group")
    ] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "0 without stage 1 (strategy.global_rounds=0), to whose network it pulls"
        check(self.global_rounds > 0 or self.group_mu == 0, "strategy.group_mu", self.group_mu, allowed)
        anew = self.keep_best and self.personal_epochs > 1  # with each pass of stage 3 the optimizer begins anew
        without = "with strategy.keep_best and several personal_epochs, each with an optimizer of its own"
        schedule, pull = self.training.schedule, self.training.proximal
        check(not anew or schedule == "constant", "training.schedule", schedule, f"constant {without}")
        check(not anew or pull == 0, "training.proximal", pull, f"0 {without}; strategy.personal_mu pulls in stage 3")

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the received network, in stage 2 perhaps near that of all clients."""
        params = cohort.assemble(received[ARRAYS])
        pull = [proximal(self.group_mu, cohort.per_client(received[GLOBAL]))] if GLOBAL in received else []
        rates = _rates(cohort, self.group_rate) if cohort.round > self.global_rounds else None
        cohort.fit(params, self.loss, adjust=pull, rates=rates)
        return cohort.reply(params)

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree | View:
        """Adapt the received network on the client's training samples."""
        if not self.personal_epochs:
            return cohort.view(received[ARRAYS])
        params = cohort.assemble(received[ARRAYS])
        start = params.clone()
        pull = [proximal(self.personal_mu, start)] if self.personal_mu else []
        rates = _rates(cohort, self.personal_rate)
        if not self.keep_best:
            cohort.fit(params, self.loss, adjust=pull, rates=rates, epochs=self.personal_epochs, purpose="personal")
            return params
        best, lowest = start.clone(), self._validation_loss(cohort, start)
        for _ in range(self.personal_epochs):  # the optimizer begins anew in each
            cohort.fit(params, self.loss, adjust=pull, rates=rates, epochs=1, purpose="personal")
            loss = self._validation_loss(cohort, params)
            better = ((loss < lowest) | loss.isnan()).to(cohort.device)
            lowest = torch.minimum(loss, lowest)
            best = tree(
                {n: torch.where(expand_rows(better, v), v, best[n]) for n, v in entries(params).items()}, cohort.size
            )
        return best

    def _validation_loss(self, cohort: Cohort, params: Tree) -> Tensor:
        """Mean validation loss of each client ``[K]``; infinite where it is not finite, NaN without samples."""
        outputs = zip(cohort.logits(params, "validation", self.predict), cohort.labels("validation"), strict=True)
        losses = [cohort.data.task.losses(scores, y).double() for scores, y in outputs]
        means = [
            rows.mean().nan_to_num(nan=torch.inf, posinf=torch.inf) if len(rows) else rows.mean() for rows in losses
        ]
        return torch.stack(means).cpu()


def _rates(cohort: Cohort, factor: float) -> Tensor | None:
    return None if factor == 1 else torch.full((cohort.size,), factor, device=cohort.device)


@method("group_perfl")
@dataclass(kw_only=True)
class GroupPerFL(PersonalizedStrategy):
    """Averages over all clients at first, then within groups.

    The groups are `groups`, or those of the file, or of the data of the app that is attached.
    """

    update = GroupPerFLUpdate
    common_options = ("global_rounds", "group_mu")
    client_update: GroupPerFLUpdate = field(default_factory=GroupPerFLUpdate)
    groups: Annotated[
        tuple[int, ...] | None,
        Field(description="group of each client, numbered from 0; null: those that come with the data"),
    ] = None
    group_file: Annotated[
        str | None, Field(description="a .json file with a list: the group of each client, a number or a name")
    ] = None
    shuffle_groups: Annotated[bool, Field(description="deal the groups to clients at random, as a control")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.groups is not None and self.group_file is not None
        check(not both, "strategy.group_file", self.group_file, "null where strategy.groups is given")
        if self.group_file is not None:
            self.groups = _read_groups(Path(self.group_file))
        check(min(self.groups or (0,)) >= 0, "strategy.groups", self.groups, "numbers >= 0")
        self._group_of = self._dealt(self.groups or ())

    def attach(self, app: CohortApp) -> None:
        """Take the groups of the app's data where none were given.

        Raises
        ------
        ConfigError
            If there are none, or not one for each client.
        """
        super().attach(app)
        groups, clients = self.groups or app.data.groups, app.data.num_clients
        given = list(groups) or None
        allowed = (
            "the group of each client: strategy.groups, strategy.group_file, or data with groups "
            "(heterogeneity=label_groups or rotation, partition=domains)"
        )
        check(bool(groups), "strategy.groups", given, allowed)
        allowed = f"{clients} numbers >= 0, one for each client, not {len(groups)}"
        check(len(groups) == clients and min(groups) >= 0, "strategy.groups", given, allowed)
        self._group_of = self._dealt(groups)

    def _dealt(self, groups: Sequence[int]) -> tuple[int, ...]:
        """Groups as they are, or shuffled."""
        if not self.shuffle_groups:
            return tuple(groups)
        order = generator(self.seed, "shuffle_groups").permutation(len(groups))
        return tuple(groups[int(position)] for position in order)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Records | Sequence[Records]:
        """Send the network of all; in stage 2 that of the client's group, perhaps with that of all."""
        if round <= self.client_update.global_rounds:
            return {ARRAYS: arrays}
        if not self._group_of:
            raise TrainingError(
                "GroupPerFL knows no groups: give it groups=..., or call attach(client_app) before start."
            )
        if without := [client for client in clients if client >= len(self._group_of)]:
            raise TrainingError(f"GroupPerFL has {len(self._group_of)} groups=...: client {without[0]} has none.")
        if GROUPS not in self.state:
            return self._with_global(arrays, {ARRAYS: arrays})
        stacked = entries(self.state[GROUPS])
        networks = {g: tree({n: v[g] for n, v in stacked.items()}) for g in {self._group_of[c] for c in clients}}
        return [self._with_global(arrays, {ARRAYS: networks[self._group_of[client]]}) for client in clients]

    def _with_global(self, arrays: Tree, records: dict[str, Tree]) -> Records:
        return {**records, GLOBAL: arrays} if self.client_update.group_mu else records

    def fold(self) -> GroupedMean:
        """Mean over all clients, or one for each group."""
        grouped = self.report.round > self.client_update.global_rounds
        return GroupedMean(dict(enumerate(self._group_of)) if grouped else {})

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Take the mean of all, or put those of the groups into the table of the groups' networks."""
        numbers = means[GROUPS]["group"].tolist()
        if self.report.round <= self.client_update.global_rounds:
            return tree({name: value[0] for name, value in entries(means[ARRAYS]).items()})
        count = max(self._group_of) + 1
        before = self.state.get(GROUPS)
        networks = {
            name: value.expand(count, *value.shape).clone() if before is None else before[name].clone()
            for name, value in entries(arrays).items()
        }
        for name, value in entries(means[ARRAYS]).items():
            networks[name][numbers] = value
        self.state[GROUPS] = tree(networks)
        return arrays


def _read_groups(path: Path) -> tuple[int, ...]:
    """Groups of a file, numbered in their order of appearance."""
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("strategy.group_file", str(path), f"a readable .json file ({error})") from error
    good = isinstance(names, list) and names and all(isinstance(name, str | int) for name in names)
    check(bool(good), "strategy.group_file", str(path), "a list with a number or a name for each client")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)
