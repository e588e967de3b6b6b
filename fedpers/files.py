"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Draft beside `path` that takes its place after the block, or is removed if the block raises.

    Who reads `path` meanwhile sees the former file or the new one, never a part. Each thread of each process has
    its own draft; one that is killed leaves it behind.

    Yields
    ------
    Path
        Not there yet.

    Raises
    ------
    OSError
        If the folder of `path` does not exist or cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # what was raised says more
            draft.unlink(missing_ok=True)
        raise
