"""fedpers: personalized federated learning, with cohorts of clients trained as one computation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpers.runtime.local import simulate

__version__ = "0.1.0"
__all__ = ["__version__", "simulate"]


def __getattr__(name: str) -> Any:
    if name == "simulate":  # on first use: importing fedpers stays cheap
        from fedpers.runtime.local import simulate

        return simulate
    raise AttributeError(f"module 'fedpers' has no attribute '{name}'")
