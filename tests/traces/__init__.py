"""Readers of traces of other codes, one module per source; :mod:`tests.reference` runs them.

Each module has ``METHODS`` (strategies it knows traces of), ``cases(root, methods)`` and ``compare(method, path,
device)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent.parent / "reference"


@dataclass
class Comparison:
    """Largest difference of each kind of array of one case; `tolerance` is the largest accepted one."""

    method: str
    case: str
    tolerance: float
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, ours: Any, theirs: Any) -> None:
        """Compare two arrays; the difference is relative to the largest reference entry (and at least 1e-2)."""
        on_cpu = ours.cpu() if isinstance(ours, torch.Tensor) else ours
        a, b = np.asarray(on_cpu, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
        if a.shape != b.shape:
            difference = float("inf")
        elif not a.size:
            difference = 0.0
        else:
            difference = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-2))
        if not np.isfinite(difference):
            difference = float("inf")
        self.worst[kind] = max(self.worst.get(kind, 0.0), difference)

    def exact(self, kind: str, ours: Any, theirs: Any) -> None:
        """Counts must agree exactly: a difference of any size is infinite."""
        self.worst[kind] = max(self.worst.get(kind, 0.0), 0.0 if np.array_equal(ours, theirs) else float("inf"))

    @property
    def difference(self) -> float:
        """Largest difference of the case."""
        return max(self.worst.values())

    @property
    def ok(self) -> bool:
        """Whether all differences are within tolerance."""
        return bool(self.worst) and self.difference <= self.tolerance
