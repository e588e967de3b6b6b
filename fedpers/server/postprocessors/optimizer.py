"""A server optimizer around the mean: the server steps along the mean change instead of taking the mean.

S. Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295 (Algorithm 2: FedAdam, FedYogi);
T.-M. H. Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification,
arXiv:1909.06335 (FedAvgM, which is ``momentum``).

    d <- sum_k a_k (w_k - w)        change of the mean of a round, a_k as the method weights its clients
    w <- w + step of the server optimizer along d        (:class:`fedpers.server.tools.ServerOptimizer`)

Parameters move so; buffers, such as BatchNorm statistics, are the mean itself. With ``sgd`` and a rate of 1 nothing
changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fedpers.cohort import Tree, entries, select, tree
from fedpers.records import ARRAYS
from fedpers.server.postprocessors.base import Postprocessor, check_mean
from fedpers.server.tools import ServerOptimizer
from fedpers.settings.server import ServerOptimizerConfig

if TYPE_CHECKING:
    from fedpers.server.strategy import PersonalizedStrategy


@dataclass(kw_only=True)
class ServerStep(Postprocessor):
    """Steps along the mean change of parameters; its state is as large as these, twice with ``adam`` and ``yogi``."""

    role: ClassVar[str] = "server_optimizer"
    setting: ClassVar[str] = "server_optimizer"
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)

    @classmethod
    def of(cls, config: ServerOptimizerConfig) -> ServerStep | None:
        """The one that settings name; None for the mean itself."""
        return None if config.name == "none" else cls(optimizer=ServerOptimizer(**vars(config)))

    @property
    def label(self) -> str:
        """Name of the optimizer."""
        return self.optimizer.name

    def check(self, strategy: PersonalizedStrategy, arrays: Tree, sampled: int) -> None:
        """Refuse methods whose servers do more than take a mean."""
        check_mean(self, strategy, "none")

    def aggregate(
        self, strategy: PersonalizedStrategy, means: dict[str, Tree], replies: Mapping[int, Mapping[str, float]]
    ) -> dict[str, Tree]:
        """Put the server's step in the place of the mean, where there is one."""
        if ARRAYS not in means:
            return means
        before, after = entries(strategy.sent_arrays), entries(means[ARRAYS])
        names = [name for name in select(strategy.work.module, "parameters") if name in after]
        directions = tree({name: after[name] - before[name] for name in names})
        steps, moments = self.optimizer.step_tree(directions, tree(self.state) if self.state else None)
        self.state = dict(entries(moments))
        moved = {name: before[name] + step for name, step in entries(steps).items()}
        return {**means, ARRAYS: tree({**after, **moved})}
