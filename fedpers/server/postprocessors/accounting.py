"""What clipping and noise guarantee: epsilon by the library ``dp-accounting``.

A round draws `sampled` of `clients` without replacement and adds Gaussian noise to the sum of their clipped changes.
Two runs are neighbours if the data of one client are replaced by any others: the sum then moves by up to twice the
clipping norm, so that noise of ``z`` norms is a multiplier of ``z / 2``. An adaptive norm divides ``z`` between sum and
count as if one client came or went; a replaced one moves either by twice as much, so that ``z / 2`` stands for both.
Rounds compose by their Rényi divergences: Y.-X. Wang, B. Balle, S. P. Kasiviswanathan, Subsampled Rényi Differential
Privacy and Analytical Moments Accountant, AISTATS 2019, arXiv:1808.00087.

Not covered: metrics and numbers of samples, which clients send in the clear, and the choice of the best round by them;
that a client failed; the rounding of floating-point numbers; with ``noise_source="system"`` the rounds that a run does
again after a crash, with other noise. What sampling adds holds only against those who do not
know who was sampled, and that follows from the run's seed, wherever the noise is drawn.
"""

from __future__ import annotations

import math

INSTALL = "pip install 'fedpers[privacy]'"
"""How to get the library."""
_LEAST, _MOST = 1e-6, 1e6
"""Noise that the library's formulas can work with; epsilon is above 1e12, or below what any delta leaves open."""


def epsilon(noise: float, sampled: int, clients: int, rounds: int, delta: float) -> float | None:
    """Privacy spent on one client's data in some rounds.

    Parameters
    ----------
    noise : float
        Standard deviation of the noise on the sum of the changes, relative to the clipping norm, >= 0.
    sampled : int
        Clients asked in a round, >= 1.
    clients : int
        Clients they are drawn from, >= `sampled`; those that never train do not count.
    rounds : int
        >= 0.
    delta : float
        In (0, 1).

    Returns
    -------
    float or None
        A bound from above, infinite without noise; where few of many clients are sampled it may be several times what
        is truly lost. None if the library is not installed.
    """
    if not rounds:
        return 0.0
    if noise < _LEAST:
        return math.inf
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        return None
    gaussian = dp_accounting.GaussianDpEvent(min(noise, _MOST) / 2)  # more noise spends no more
    # the bound for samples exceeds the one without them where nearly all are sampled, although sampling cannot harm
    events = (gaussian, dp_accounting.SampledWithoutReplacementDpEvent(clients, sampled, gaussian))
    spent = []
    for event in events:
        accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        spent.append(float(accountant.compose(event, rounds).get_epsilon(delta)))
    return min(spent)


__all__ = ["INSTALL", "epsilon"]
