"""Checkpoints of a run: all state after a round, in safetensors and JSON, written whole or not at all.

``checkpoints/round_000020/`` holds ``server.safetensors`` (``arrays/NAME``, and the strategy's state as
``state/ROLE/NAME``), ``clients-00000.safetensors`` and so on (personal state, see :mod:`fedpers.runtime.states`) and
``checkpoint.json``: what the run has yielded so far, its settings, what its data are like, checksums of its data and
network, and size and digest of every file. It is the state after a round as in the middle of a run: what is done after
the last round only (an evaluation that is not due, adaptation of clients that never train) is not in it, so that a run
that is extended equals one that was as long from the start. ``checkpoints/best_000012/`` holds the same of the best
round so far (``checkpoint.best``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedpers.client.app import CohortApp
from fedpers.cohort import Tree, entries, leaves, set_leaf, tree
from fedpers.cohort.state import Block
from fedpers.errors import FedpersError
from fedpers.records import from_record
from fedpers.run.progress import exactly, restored, whole
from fedpers.runtime.states import DamagedError, check_states, write_states, write_tensors

log = logging.getLogger(__name__)
FORMAT = 2
"""2: trainings are counted by the core; conditional inputs of GPFL and slots of FedJETs are no entries of networks."""
INDEX = "checkpoint.json"
SERVER = "server.safetensors"
_NAME = re.compile(r"round_(\d{6,9})")
_BEST = re.compile(r"best_(\d{6,9})")
_FILE = re.compile(r"server\.safetensors|clients-\d{5,9}\.safetensors")
_DRAFT = ".draft-"
_ARRAYS, _STATE = "arrays/", "state/"
_MOST_INDEX = 2**30
"""Bytes of a ``checkpoint.json`` that are read at most."""


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk, whose files have the sizes and digests that it says.

    Attributes
    ----------
    folder : Path
    round : int
    content : dict
        What :meth:`Checkpoints.save` was given.
    roles : list of str
        Of the strategy's state.
    """

    folder: Path
    round: int
    content: dict[str, Any]
    roles: list[str]

    @property
    def is_best(self) -> bool:
        """Whether it is kept as that of the best round."""
        return _BEST.fullmatch(self.folder.name) is not None

    def read_server(self, app: CohortApp) -> tuple[Tree, dict[str, Tree]]:
        """The server's arrays and the strategy's state, on the app's device.

        Raises
        ------
        DamagedError
            If they do not fit the app.
        """
        path = self.folder / SERVER
        like = entries(from_record(app.initial_arrays()))
        most = sum(value.nbytes for value in [*like.values(), *entries(app.template).values()])
        # what a server knows beside its arrays is at most some numbers of their size for each client
        if path.stat().st_size > 2**28 + 16 * most * (1 + app.data.num_clients):
            raise DamagedError(f"{path} is larger than the state of this run can be.")
        arrays: dict[str, Tensor] = {}
        state: dict[str, Tree] = {role: tree({}) for role in self.roles}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a file is no mapping)
                    value = file.get_tensor(name).clone().to(app.device)
                    if name.startswith(_ARRAYS):
                        arrays[name.removeprefix(_ARRAYS)] = value
                        continue
                    role, _, rest = name.removeprefix(_STATE).partition("/")
                    if not name.startswith(_STATE) or role not in state or not rest:
                        raise DamagedError(f"{path} holds '{name}', which is no entry of a server.")
                    set_leaf(state[role], rest, value)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path} cannot be read ({error}).") from error
        for name in sorted(arrays.keys() ^ like.keys()):
            raise DamagedError(f"{path}: '{name}' is {'unknown' if name in arrays else 'missing'} in its arrays.")
        for name, value in like.items():
            if arrays[name].shape != value.shape or arrays[name].dtype != value.dtype:
                raise DamagedError(f"{path}: '{name}' is of another shape or type than in this run.")
        return tree({name: arrays[name] for name in like}), state

    def check_clients(self, app: CohortApp) -> None:
        """Refuse personal state that does not fit the app.

        Raises
        ------
        DamagedError
        """
        check_states(self.folder, app.initial_state, app.data.num_clients)


class Checkpoints:
    """The checkpoints of one run folder.

    Parameters
    ----------
    folder : Path
        ``checkpoints`` in the run folder; made by the first :meth:`save`.
    keep : int
        The last so many are kept, >= 1.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        round: int,
        content: Mapping[str, Any],
        arrays: Tree,
        state: Mapping[str, Tree],
        blocks: Iterable[Block],
        *,
        best: bool = False,
    ) -> Path:
        """Write one checkpoint; it is there whole when this returns, and not at all if this raises.

        Parameters
        ----------
        round : int
        content : mapping
            Plain values; floats come back to the last digit.
        arrays : Tree
            The server's, batch size [].
        state : mapping of role to Tree
            The strategy's.
        blocks : iterable of (int64 ``[n]``, Tree ``[n]``)
            Personal state.
        best : bool
            As that of the best round so far, which :meth:`prune_best` removes and :meth:`prune` leaves alone.

        Returns
        -------
        Path
            Its folder. Older ones are still there, see :meth:`prune`.

        Raises
        ------
        OSError
            If it cannot be written, e.g. because the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        target = self.folder / f"{'best' if best else 'round'}_{round:06d}"
        draft = self.folder / f"{_DRAFT}{target.name}"
        try:
            draft.mkdir()
            server = {_ARRAYS + name: value for name, value in entries(arrays).items()}
            for role, values in state.items():
                server.update({f"{_STATE}{role}/{name}": value for name, value in leaves(values).items()})
            write_tensors(draft / SERVER, server)
            files = [draft / SERVER, *write_states(draft, blocks)]
            body = exactly(
                {
                    "format": FORMAT,
                    "round": round,
                    "roles": list(state),
                    "files": {p.name: {"bytes": p.stat().st_size, "blake2b": _digest_of(p)} for p in files},
                    "content": content,
                }
            )
            _write_index(draft / INDEX, body)
            _sync(draft)
            if target.exists():  # a damaged one, or the run would have gone on from it
                target.rename(self.folder / f"{_DRAFT}old")
            draft.rename(target)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return target

    def prune(self, newest: Path) -> None:
        """Remove what is older than the last `keep` up to `newest`, and what is newer, from before a resume."""
        self._clear()
        number = _number(newest)
        kept = [path for path in self.all() if _number(path) <= number][: self.keep]
        for path in self.all():
            if path not in kept:
                _remove(path)

    def prune_best(self, keep: Collection[int | None]) -> None:
        """Remove those of best rounds, but of these rounds."""
        for path in self.all(best=True):
            if _number(path) not in keep:
                _remove(path)

    def all(self, *, best: bool = False) -> list[Path]:
        """Folders of checkpoints, the newest first, whether whole or not; with `best` those of best rounds."""
        if not self.folder.is_dir():
            return []
        pattern = _BEST if best else _NAME
        return sorted((p for p in self.folder.iterdir() if pattern.fullmatch(p.name)), key=_number, reverse=True)

    def whole(self, *, best: bool = False) -> Iterator[Checkpoint]:
        """Checkpoints whose files are as they were written, the newest first; others are named in a warning."""
        for path in self.all(best=best):
            try:
                yield _read(path)
            except OSError as error:
                log.warning("%s cannot be read (%s). This checkpoint is not used.", path, error.strerror or error)
            except DamagedError as error:
                log.warning("%s This checkpoint is not used.", error)

    def _clear(self) -> None:
        """Remove what a run that was killed left half written."""
        for path in self.folder.glob(f"{_DRAFT}*"):
            _remove(path)


def network_checksum(module: nn.Module) -> str:
    """Digest of all parameters, also frozen ones, and buffers of a network."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted({**module.state_dict(), **dict(module.named_buffers())}.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(folder: Path) -> Checkpoint:
    """Read and check one checkpoint; no tensor is made."""
    body = _read_index(folder / INDEX)
    try:
        number, roles, files, content = body["round"], body["roles"], body["files"], body["content"]
        listed = {str(name): (whole(entry["bytes"]), str(entry["blake2b"])) for name, entry in files.items()}
        good = whole(number) == _number(folder) and isinstance(content, dict)
        good = good and all(isinstance(role, str) and role for role in roles) and SERVER in listed
        good = good and all(_FILE.fullmatch(name) for name in listed)
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise DamagedError(f"{folder / INDEX} does not describe a checkpoint.")
    file_names = {path.name for path in folder.iterdir()}
    for name in sorted(file_names ^ {INDEX, *listed}):
        raise DamagedError(f"{folder / name} is {'missing' if name in listed else 'no part of the checkpoint'}.")
    for name, (size, digest) in listed.items():
        path = folder / name
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != size or _digest_of(path) != digest:
            raise DamagedError(f"{path} is damaged: it has another size or checksum than when it was written.")
    return Checkpoint(folder, number, content, list(roles))


def _write_index(path: Path, body: Any) -> None:
    text = json.dumps(body, allow_nan=False, sort_keys=True)
    whole_text = json.dumps({"blake2b": _digest(text.encode()), "checkpoint": body}, allow_nan=False, sort_keys=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(whole_text)
        file.flush()
        os.fsync(file.fileno())


def _read_index(path: Path) -> dict[str, Any]:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_INDEX:
            raise DamagedError(f"{path} is no file of a checkpoint.")
        index = json.loads(path.read_text(encoding="utf-8"))
        body = index["checkpoint"]
        if index["blake2b"] != _digest(json.dumps(body, sort_keys=True).encode()):
            raise DamagedError(f"{path} is damaged: it has another checksum than when it was written.")
        read = restored(body)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: it is no index of a checkpoint.") from error
    if not isinstance(read, dict):
        raise DamagedError(f"{path} is damaged: it is no index of a checkpoint.")
    written = read.get("format")
    if written != FORMAT and isinstance(written, int):
        age = "an earlier" if written < FORMAT else "a later"
        raise FedpersError(
            f"{path} was written by {age} version of fedpers (format {written}, this one reads format {FORMAT}): "
            "resume the run with that version, or start it anew."
        )
    if written != FORMAT:
        raise DamagedError(f"{path} is damaged: it is no index of a checkpoint.")
    return read


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name) or _BEST.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def _sync(folder: Path) -> None:
    """Put the names in a folder onto the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
