"""FedPer: a shared body under private heads.

M. G. Arivazhagan et al., Federated Learning with Personalization Layers, arXiv:1912.00818.

    (b_k, h_k) <- (b, h_k), then E passes of SGD on f_k over body and head together
    b          <- sum_k n_k / n * b_k

Shared: the body, its BatchNorm statistics averaged with it. Personal: the head.

The paper lets several last layers be personal; here these are whatever the network calls ``head``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, method


@dataclass(kw_only=True)
class FedPerUpdate(LocalUpdate):
    """Train body and head together; the head stays."""

    shared = "body"
    personal = "head"


@method("fedper")
@dataclass(kw_only=True)
class FedPer(PersonalizedStrategy):
    """Average of the bodies by number of training samples."""

    update = FedPerUpdate
