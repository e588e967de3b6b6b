"""FedALA: each client learns, entry by entry, how much of the received network to take into its former one.

J. Zhang et al., FedALA: Adaptive Local Aggregation for Personalized Federated Learning, AAAI 2023, arXiv:2212.01197.

With v_k the network after the client's last training, w the received one and weights W_k in [0, 1] (1 at first) for
the entries of the upper layers, the start of a client's training is

    m_k = v_k + (w - v_k) * W_k          in the upper layers; w in all others
    W_k <- clip(W_k - weight_lr * (w - v_k) * grad f_k(m_k), 0, 1)      on a share of the samples drawn in each round
    v_k <- SGD on f_k from m_k
    w   <- sum_k n_k / n * v_k
    prediction: m_k for the received w, before training

W_k is trained in the client's second training until it has converged, and for one pass in each later one; likewise,
but not for keeps, before a prediction. The criterion is that of the authors' code: the losses of the last batches of
ten passes deviate by less than 0.1; here after 100 passes at the latest.

Shared: the whole network, buffers averaged. Personal: the network v_k, and W_k, how much of the received one it takes.
W_k is trained with layers as in an evaluation; buffers, also of upper layers, are those of w. A client that has not
trained starts from and predicts with w.

``variant: pfllib`` repeats a common implementation, the authors' own: in every round the clients that do not train are
sent w too, train W_k and put m_k in the place of v_k, which counts as a training. (There upper layers are counted in
tensors, and the samples are consecutive ones.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import flwr.app as flower
import numpy as np
import torch
from flwr.serverapp import Grid
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Cohort, Reply, Tree, select, tree
from fedpers.cohort.plan import batches_per_epoch
from fedpers.randomness import generator
from fedpers.records import ARRAYS
from fedpers.server.collect import metrics_of
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Phase, Received, method

WEIGHTS = "weights"
PASSES, SPREAD, MOST_PASSES = 10, 0.1, 100


@dataclass(kw_only=True)
class FedALAUpdate(LocalUpdate):
    """Mix the received network into the former one, then train it."""

    personal = "all"
    settles_parts = True
    layers: Annotated[int, Field(ge=1, description="last layers with parameters that are mixed, of all kinds")] = 1
    share: Annotated[
        float, Field(gt=0, le=1, description="of a client's samples on which the weights of the mixture are trained")
    ] = 0.8
    weight_lr: Annotated[float, Field(gt=0, description="rate of the weights, in all rounds")] = 1.0

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """Weights of 1 take what is received."""
        parameters = select(module, "parameters")
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))[-self.layers :]
        weights = {n: torch.ones_like(template[n]) for n in parameters if n.rpartition(".")[0] in layers}
        return super().initial_state(template, module).set(WEIGHTS, tree(weights))

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Mix, then train the whole network."""
        params, weights = self.mix(cohort, received[ARRAYS])
        cohort.fit(params, self.loss)
        return cohort.reply(params, state={WEIGHTS: weights})

    def train_weights(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Mix without training the network and without a reply; for clients that do not train in a round."""
        params, weights = self.mix(cohort, received[ARRAYS])
        return cohort.reply(params, share="none", state={WEIGHTS: weights})

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """The mixture m_k."""
        return self.mix(cohort, received[ARRAYS])[0]

    def mix(self, cohort: Cohort, received: Tree) -> tuple[Tree, Tree]:
        """Mixtures m_k and their weights W_k, both ``[K]``."""
        params, weights = cohort.as_received(received), cohort.state[WEIGHTS].clone()
        names = [str(name) for name in weights.keys()]  # noqa: SIM118 (a TensorDict iterates over rows)
        former = cohort.state["model"].select(*names)
        before = cohort.trainings.cpu()
        busy = before > 0
        samples = [self.sampled(cohort, client) for client in cohort.clients]
        history: list[Tensor] = []
        while bool(busy.any()):
            history.append(self._pass(cohort, (params, former, weights), samples, busy))
            busy &= (before == 1) & (len(history) < MOST_PASSES)
            if len(history) > PASSES:
                busy &= torch.stack(history[-PASSES:]).std(0, unbiased=False).cpu() >= SPREAD
        for name in names:
            params[name] = torch.lerp(former[name], params[name], weights[name])
        return params, weights

    def _pass(
        self, cohort: Cohort, trees: tuple[Tree, Tree, Tree], samples: list[NDArray[np.int64]], busy: Tensor
    ) -> Tensor:
        """Train the weights of busy clients for one pass; return the loss ``[K]`` of each one's last batch."""
        size = self.training.batch_size
        steps = [batches_per_epoch(len(s), size, False) * int(b) for s, b in zip(samples, busy, strict=True)]
        in_order = replace(self.training, shuffle=False, drop_last=False)
        last = torch.zeros(cohort.size, device=cohort.device, dtype=cohort.loss_sum.dtype)
        walk = cohort.walk(*trees, steps=steps, samples=samples, training=in_order, frozen=True)
        for step, (received, former, weights) in walk:
            mixture = {n: torch.lerp(former[n], received[n], w) for n, w in weights.items()}
            losses, grads = cohort.gradients(step, {**received, **mixture}, self.loss, tuple(weights), frozen=True)
            for name, grad in grads.items():
                weights[name].sub_(self.weight_lr * grad * (received[name] - former[name])).clamp_(0, 1)
            last[step.places(last.device)] = losses.to(last)
            cohort.count_loss(step, losses)
        return last

    def sampled(self, cohort: Cohort, client: int) -> NDArray[np.int64]:
        """Samples of a client on which its weights are trained in this round."""
        samples = cohort.samples(client)
        count = max(1, int(self.share * len(samples)))
        return generator(cohort.seed, "local aggregation", client, cohort.round).permutation(samples)[:count]


@method("fedala")
@dataclass(kw_only=True)
class FedALA(PersonalizedStrategy):
    """FedAvg's server."""

    update = FedALAUpdate
    variant: Annotated[Literal["paper", "pfllib"], Field(description="who mixes in a round, see the module")] = "paper"

    def prepare(self, round: int, arrays: Tree, clients: list[int], grid: Grid, phase: Phase) -> list[int]:
        """In ``pfllib`` let the clients that do not train in this round mix."""
        others = [client for client in self.trainable_clients if client not in clients]
        if self.variant == "pfllib" and phase == "train" and others:
            config = flower.ConfigRecord({"server-round": round})
            results, size = self.exchange.call(grid, "train.weights", {ARRAYS: arrays}, config, others)
            self.report.bytes_down += size
            self.report.bytes_to_others += size
            for client, result in results.items():
                try:
                    self.report.gradients += int(metrics_of(result).get("gradients", 0))
                except ValueError as problem:
                    self.leave_out(client, f"it did not mix: {problem}", "evaluate")
        return clients
