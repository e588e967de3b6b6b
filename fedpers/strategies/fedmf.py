"""FedMF: one item table for all, a user vector of one's own.

D. Chai et al., Secure Federated Matrix Factorization, IEEE Intelligent Systems 2021, arXiv:1906.05108.

User k has a vector w_k (and a bias), all have the item table C; item j scores ``sigmoid(w_k . C_j + b_k)``.

    w_k, C <- passes of SGD on the binary cross-entropy of the user's positives and drawn negatives
    C      <- mean_k C_k

Shared: C. Personal: w_k, b_k.

The paper factorizes explicit ratings and encrypts what is sent; here, as in the comparisons of papers on implicit
feedback, the loss is theirs and nothing is encrypted. It is FedRAP's visit without a table of one's own, without
penalties, without the decay of rates from step to step and without early stopping.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpers.strategies.fedrap import FedRAP, FedRAPUpdate


@dataclass(kw_only=True)
class FedMFUpdate(FedRAPUpdate):
    """Move user vector and item table at once, on the visited rows; what else FedRAP can do is switched off."""

    lam: float = field(default=0.0, init=False)
    mu: float = field(default=0.0, init=False)
    regularizer: str = field(default="none", init=False)
    curriculum: str = field(default="constant", init=False)
    variant: str = field(default="official", init=False)
    tables: str = field(default="common", init=False)
    step_decay: float = field(default=1.0, init=False)
    tolerance: float = field(default=0.0, init=False)


@dataclass(kw_only=True)
class FedMF(FedRAP):
    """Server: unweighted mean of the item tables."""

    update = FedMFUpdate
