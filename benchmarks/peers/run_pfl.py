"""Rounds of FedAvg in apple's pfl (PyPI: ``pfl``), in its environment: ``PYTHON benchmarks/peers/run_pfl.py``."""

from __future__ import annotations

import time

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from problem import BATCH, LR, WITHOUT_EVALUATION, options, problem, report
from torch import nn
from torch.nn import functional as F


class Model(nn.Module):
    """A network as pfl wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of a batch."""
        return F.cross_entropy(self.network(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
        """Nothing is evaluated."""
        return {}


class Clock(TrainingProcessCallback):
    """Notes the time after each round."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Note it."""
        self.stamps.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Run and print the seconds of each round."""
    chosen = options(__doc__, WITHOUT_EVALUATION).parse_args()
    torch.set_num_threads(1)
    case = problem(chosen.problem)

    def client(number: int) -> PyTorchTensorDataset:
        x, y = case.train[number]
        order = torch.randperm(len(x))
        return PyTorchTensorDataset((x[order], y[order]), user_id=str(number))

    data = FederatedDataset(client, lambda: int(torch.randint(len(case.train), ())))
    module = Model(case.network())
    model = PyTorchModel(
        module, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(module.parameters(), 1.0)
    )
    rounds, clock = case.untimed + chosen.rounds, Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=case.sampled,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=None),
        [clock],
        send_metrics_to_platform=False,
    )
    seconds = [after - before for before, after in zip(clock.stamps, clock.stamps[1:], strict=False)]
    report(seconds[case.untimed - 1 :])


if __name__ == "__main__":
    main()
