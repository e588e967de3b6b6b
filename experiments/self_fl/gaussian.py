"""Self-FL on Gaussian clients, beside the closed form: ``python experiments/self_fl/gaussian.py``.

The true mean of client m is drawn from N(theta_0, s_0 I) in R^d, each of its n_m samples from N(theta_m, v I), so that
the variance of its sample mean is s_m = v / n_m. The loss is half the squared distance, the network a vector. Printed
are squared errors per coordinate of the global network (from theta_0) and of the personal ones (mean over clients), and
their ratio to those of the optimum, which knows s_0 and s_m; means over seeds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from typing import Any

import flwr.app as flower
import numpy as np
import torch
from torch import Tensor, nn

from fedpers.cohort import Training, entries
from fedpers.data import FederatedData
from fedpers.flower_private import server_identity
from fedpers.records import from_record
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import make_strategy
from fedpers.tasks import Regression

CLIENTS, DIMENSIONS, INTER, NOISE, ROUNDS, LR = 100, 20, 1.0, 10.0, 20, 0.05
"""Clients have 4 to 40 samples: s_m from 0.25 to 2.5 beside s_0 = 1."""
CLOSED_FORM: dict[str, Any] = {
    "step_rule": "quadratic", "intra": "gradients", "curvature": 2 / DIMENSIONS, "min_ratio": 0.0, "max_ratio": 1e6,
    "smoothing": 0.0,
}  # fmt: skip
ROWS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "self_fl": ("self_fl", CLOSED_FORM, 20, ROUNDS),
    "self_fl start_from=global": ("self_fl", {**CLOSED_FORM, "start_from": "global"}, 20, ROUNDS),
    "self_fl weighting=uniform": ("self_fl", {**CLOSED_FORM, "weighting": "uniform"}, 20, ROUNDS),
    "self_fl, s_0 to 0": ("self_fl", {**CLOSED_FORM, "inter_variance": 1e-9, "min_ratio": 1.0}, 1, 100),
    "self_fl, s_0 to infinity": ("self_fl", {**CLOSED_FORM, "inter_variance": 1e4}, 20, 3),
    "fedavg (pooled)": ("fedavg", {}, 20, ROUNDS),
    "local": ("local", {}, 200, 1),
}
"""Method, options, passes in a round, rounds; of 1 pass in each of 100 rounds fedavg's mean is the pooled one."""


class Vector(nn.Module):
    """A network that gives the same vector for every sample."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d]``."""
        return self.theta.expand(len(x), -1)


class Clients:
    """Drawn clients and the closed form for them."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = np.exp(rng.uniform(np.log(4), np.log(41), CLIENTS)).astype(int)
        self.centre = torch.from_numpy(rng.normal(size=DIMENSIONS) * 3)
        self.true = self.centre + torch.from_numpy(rng.normal(size=(CLIENTS, DIMENSIONS))) * INTER**0.5
        samples = [
            self.true[m] + torch.from_numpy(rng.normal(size=(size, DIMENSIONS))) * NOISE**0.5
            for m, size in enumerate(self.sizes)
        ]
        self.means = torch.stack([rows.mean(0) for rows in samples])
        lists = list(torch.arange(sum(self.sizes)).split(self.sizes.tolist()))
        y = torch.cat([*samples, self.true])
        test = list(torch.arange(sum(self.sizes), len(y))[:, None])
        nothing = [torch.arange(0)] * CLIENTS
        self.data = FederatedData(torch.zeros(len(y), 1, dtype=torch.float64), y, lists, nothing, test, DIMENSIONS,
                                  "gaussian", task=Regression())  # fmt: skip

    def optimum(self, inter: float = INTER) -> tuple[Tensor, Tensor]:
        """Best global ``[d]`` and personal ``[M, d]`` networks for a variance between clients."""
        intra = NOISE / torch.from_numpy(self.sizes).double()[:, None]
        weights = 1 / (inter + intra)
        centre = (weights * self.means).sum(0) / weights.sum()
        share = intra / (inter + intra)
        return centre, share * centre + (1 - share) * self.means

    def errors(self, centre: Tensor, personal: Tensor) -> tuple[float, float]:
        """Squared errors per coordinate: of the global network, and of the personal ones."""
        return float((centre - self.centre).square().mean()), float((personal - self.true).square().mean())


def trained(
    clients: Clients, method: str, options: dict[str, Any], epochs: int, rounds: int
) -> tuple[Tensor, Tensor, float, float]:
    """Global and personal networks after all rounds, the variance between clients, and steps of a client and round."""
    # losses are means over d coordinates: this rate makes one of LR for half the squared distance
    training = Training(lr=LR * DIMENSIONS / 2, batch_size=0, epochs=epochs)
    strategy, update = make_strategy(method, options, training=training)
    app = update.client_app(Vector(DIMENSIONS), clients.data)
    grid = LocalGrid(app, CLIENTS, clients_at_once=CLIENTS, workers=1)
    arrays, steps = app.initial_arrays(), 0
    strategy.begin()
    with server_identity(1):
        for number in range(1, rounds + 1):
            messages = strategy.configure_train(number, arrays, flower.ConfigRecord(), grid)
            new, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
            assert new is not None
            arrays, steps = new, steps + strategy.report.steps
    centre = entries(from_record(arrays)).get("theta", torch.zeros(DIMENSIONS, dtype=torch.float64))
    assert grid.engine is not None
    state = grid.engine.store.gather(range(CLIENTS))
    personal = state["model"]["theta"] if "model" in state.keys() else centre.expand(CLIENTS, -1)  # noqa: SIM118
    grid.close()
    return centre, personal, strategy.report.extra.get("inter_variance", float("nan")), steps / CLIENTS / rounds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    results: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(chosen.seeds):
        clients = Clients(seed)
        best = clients.errors(*clients.optimum())
        results.setdefault("optimum", []).append((*best, INTER, 0))
        for name, row in ROWS.items():
            centre, personal, inter, steps = trained(clients, *row)
            results.setdefault(name, []).append((*clients.errors(centre, personal), inter, steps))
    print(f"{'':28}{'global':>10}{'ratio':>8}{'personal':>10}{'ratio':>8}{'s_0':>10}{'steps':>8}")
    means = {name: [statistics.mean(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}
    best_centre, best_personal, *_ = means["optimum"]
    for name, (centre, personal, inter, steps) in means.items():
        ratios = centre / best_centre, personal / best_personal
        print(f"{name:28}{centre:10.4f}{ratios[0]:8.3f}{personal:10.4f}{ratios[1]:8.3f}{inter:10.3g}{steps:8.1f}")


if __name__ == "__main__":
    main()
