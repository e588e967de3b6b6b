"""What a server half computes with, where it trains or predicts itself (distillation, hypernetworks, clustering)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fedpers.cohort import Cohort, tree
from fedpers.errors import TrainingError
from fedpers.identity import check_halves

if TYPE_CHECKING:
    from fedpers.client.app import CohortApp
    from fedpers.data.federated import FederatedData
    from fedpers.server.strategy import PersonalizedStrategy
    from fedpers.tasks import Task


class ServerWork:
    """Network, task and cohorts for work on the server, from the clients' app.

    Parameters
    ----------
    strategy : PersonalizedStrategy
    app : CohortApp

    Raises
    ------
    ConfigError
        If the app belongs to another method.
    """

    def __init__(self, strategy: PersonalizedStrategy, app: CohortApp) -> None:
        check_halves(strategy, app.identity)
        self.app = app.first_kind
        self.seed = strategy.seed

    @property
    def module(self) -> nn.Module:
        """The clients' network, prepared."""
        return self.app.module

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.app.data.task

    def cohort(self, data: FederatedData, round: int) -> Cohort:
        """A cohort on the server, e.g. of one client that has public samples.

        Parameters
        ----------
        data : FederatedData
            Clients in descending order of training samples.
        round : int
            What random draws depend on, beside the run's seed.
        """
        app, update = self.app, self.app.update
        return Cohort(
            app.module,
            data.to(app.device),
            range(data.num_clients),
            tree({}, data.num_clients),
            template=app.template,
            seed=self.seed,
            round=round,
            training=update.training,
            needs_two_samples=app.traits.needs_two_samples,
            draws=app.traits.draws,
            shared=update.shared,
            personal=update.personal,
        )


def missing_work(method: str) -> TrainingError:
    """Error for a method that computes on the server and was given nothing to compute with."""
    return TrainingError(f"{method} computes on the server: call attach(client_app) before start.")
