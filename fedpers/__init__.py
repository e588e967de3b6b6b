"""fedpers: personalized federated learning, with cohorts of clients trained as one computation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpers.run.export import load_client, load_server
    from fedpers.runtime.local import simulate

__version__ = "0.1.0"
__all__ = ["__version__", "load_client", "load_server", "simulate"]
_HOMES = {"load_client": "fedpers.run.export", "load_server": "fedpers.run.export", "simulate": "fedpers.runtime.local"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: importing fedpers stays cheap
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedpers' has no attribute '{name}'")
