"""A run at Weights & Biases, offline where there is no login."""

from __future__ import annotations

import configparser
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedpers.errors import FedpersError
from fedpers.settings.run import WandbConfig
from fedpers.tracking.base import Resumed, plain_number

logger = logging.getLogger(__name__)
INIT_SECONDS = 20.0
"""Seconds that Weights & Biases may take to start a run."""
FINISH_SECONDS = 60.0
"""Seconds it may take to upload the rest at the end; what is left stays on disk for ``wandb sync``."""


class WandbTracker:
    """Weights & Biases run with its files in ``wandb/`` in the run folder; silent on the console.

    Without a login it is offline and opens no connection; ``wandb sync`` uploads it later. A server that does not
    answer is waited for :data:`INIT_SECONDS` at the start and :data:`FINISH_SECONDS` at the end.

    Parameters
    ----------
    config : WandbConfig
    folder : Path
        The run folder.
    run_name : str
        Used where the config gives no name.
    run_config : mapping
        Stored as the run's config.
    resumed : Resumed, optional
        The run with its id goes on. Rounds that are logged again stay as wandb has them.

    Raises
    ------
    FedpersError
        If ``mode=online`` is asked for without a login (rather than prompting for one).
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        run_name: str,
        run_config: Mapping[str, Any],
        resumed: Resumed | None = None,
    ) -> None:
        mode: str = config.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        mode = {"run": "online", "dryrun": "offline"}.get(mode, mode)  # former names
        if mode not in ("offline", "disabled") and not _logged_in():
            raise FedpersError(f"there is no login for {mode} mode; run 'wandb login' or set WANDB_API_KEY.")
        root = Path(folder).absolute()
        environment = {"WANDB_CACHE_DIR": os.environ.get("WANDB_CACHE_DIR", str(root / "wandb" / "cache"))}
        if mode != "online":
            # its crash reports would look up a host name even offline
            environment["WANDB_ERROR_REPORTING"] = "false"
        with _environment(environment):
            import wandb

            bounds: dict[str, Any] = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
            supported = {name: value for name, value in bounds.items() if name in wandb.Settings.model_fields}
            self._run: Any = wandb.init(
                project=config.project,
                name=config.name or run_name,
                group=config.group,
                mode=mode,  # type: ignore[arg-type,unused-ignore]
                dir=str(root),
                config=dict(run_config),
                reinit="create_new",
                id=None if resumed is None else resumed.ids.get("wandb"),
                resume=None if resumed is None else "allow",
                settings=wandb.Settings(silent=True, console="off", **supported),
            )
        # wandb's background process logs where the first run of this process is: a folder without links out of it can
        # be moved, and resumed
        for link in (root / "wandb").glob("*/logs/debug-core.log"):
            if link.is_symlink():
                link.unlink()

    @property
    def id(self) -> str:
        """What wandb calls the run."""
        return str(self._run.id)

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics with the round as step."""
        self._run.log({name: plain_number(value, math.nan) for name, value in metrics.items()}, step=round)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Add to the run's summary."""
        self._run.summary.update({name: plain_number(value, math.nan) for name, value in metrics.items()})

    def clients(self, values: Mapping[str, Sequence[float]]) -> None:
        """Add one histogram over clients per metric to the run's summary, named ``clients/...``."""
        from wandb import Histogram

        self._run.summary.update({f"clients/{name}": Histogram(list(column)) for name, column in values.items()})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _logged_in() -> bool:
    """Whether wandb would find a key, looked up in its own places without asking anyone."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _stored_server() or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    for path in [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if path.is_file() and netrc(path).authenticators(host):
                return True
        except (OSError, NetrcParseError) as error:
            logger.debug("%s cannot be read, so it holds no wandb login: %s", path, error)
    return False


def _stored_server() -> str | None:
    """Address of the server that ``wandb login --host`` has written to the user's settings."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    stored = configparser.ConfigParser(interpolation=None)
    try:
        stored.read(Path(folder).expanduser() / "settings", encoding="utf-8")
    except (OSError, UnicodeError, configparser.Error) as error:
        logger.debug("wandb's settings cannot be read, so they name no server: %s", error)
    return stored.get("default", "base_url", fallback=None)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
