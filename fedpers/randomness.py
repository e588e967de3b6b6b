"""Every random draw comes from (seed, purpose, client, round), never from a global generator.

So cohort size, number of workers, runtime, resume and order of execution cannot change a result,
and all methods see the same sampled clients and the same batches under the same seed.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *ids: int) -> int:
    """Derive a 63-bit seed from the run's `seed`, a `purpose` and any ids (client, round, epoch).

    Equal arguments give equal seeds on every machine; different arguments give unrelated ones.
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in ids)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """NumPy generator for one purpose, e.g. ``generator(seed, "batches", client, round)``."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *ids)))


def sample_clients(seed: int, round: int, num_clients: int, fraction: float) -> list[int]:
    """Clients that take part in a round, ascending; the same for every method and runtime.

    ``fraction * num_clients`` of them, rounded half up, at least one; drawn without replacement.
    """
    size = max(1, int(fraction * num_clients + 0.5))
    if size >= num_clients:
        return list(range(num_clients))
    drawn = generator(seed, "sampling", round).choice(num_clients, size, replace=False)
    return sorted(int(c) for c in drawn)
