"""Local: every client trains alone; the floor a federated method has to beat.

    w_k <- w_k - lr * grad f_k(w_k)        on the client's own samples, nothing is sent

Shared: nothing. Personal: the whole network, buffers included.

Like every other method it trains only the clients sampled in a round, so that its budget is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method


@dataclass(kw_only=True)
class LocalOnlyUpdate(LocalUpdate):
    """Train the own network; all of it stays."""

    shared = "none"
    personal = "all"
    mixes_networks = True


@method("local")
@dataclass(kw_only=True)
class Local(PersonalizedStrategy):
    """Server that has nothing to average."""

    update = LocalOnlyUpdate
