"""Personal state on disk: blocks of clients in safetensors files, from which single clients can be read."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedpers.cohort import Tree, leaves, set_leaf, tree
from fedpers.cohort.state import Block
from fedpers.errors import FedpersError

CLIENTS = "clients"
"""Tensor of the clients' numbers in each file; their states are beside it under ``state/ROLE/NAME``."""
_STATE = "state/"


class DamagedError(FedpersError):
    """A file does not hold what it should."""


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, onto the disk before this returns.

    Parameters
    ----------
    path : Path
    tensors : dict of str to Tensor
        On any device, of any dtype and shape.

    Raises
    ------
    OSError
        If the file cannot be written; part of it may be there.
    """
    # one storage each: safetensors refuses tensors that share memory
    content = save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_states(folder: Path, blocks: Iterable[Block]) -> list[Path]:
    """Write personal state, one file ``clients-00000.safetensors`` and so on for each block.

    Parameters
    ----------
    folder : Path
        Exists and holds no such files.
    blocks : iterable of (int64 ``[n]``, Tree ``[n]``)
        As ``grid.blocks()`` gives them; each is let go of before the next is taken.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    written: list[Path] = []
    for clients, state in blocks:
        path = folder / f"clients-{len(written):05d}.safetensors"
        write_tensors(path, {CLIENTS: clients, **{_STATE + name: value for name, value in leaves(state).items()}})
        written.append(path)
    return written


def state_files(folder: Path) -> list[Path]:
    """Files of :func:`write_states` in `folder`, in order."""
    return sorted(folder.glob("clients-*.safetensors"))


def read_states(folder: Path, initial: Tree, clients: Collection[int] | None = None) -> Iterator[Block]:
    """Read personal state block by block.

    Parameters
    ----------
    folder : Path
        Where :func:`write_states` wrote.
    initial : Tree
        State of a client that has not trained (``CohortApp.initial_state``, batch size []): it tells names, shapes,
        dtypes and the device.
    clients : collection of int, optional
        Only their rows are read; all if not given. Those without a row had not changed their initial state.

    Yields
    ------
    int64 ``[n]``, Tree ``[n]``
        Clients and their states; blocks without any of `clients` are left out.

    Raises
    ------
    DamagedError
        If a file cannot be read or holds something else.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder}, which holds personal state, is missing.")
    first = leaves(initial)
    selected = None if clients is None else torch.tensor(sorted(clients), dtype=torch.int64)
    for path in state_files(folder):
        with _opened(path) as file:
            numbers = _check_file(path, file, initial)
            rows = None if selected is None else torch.isin(numbers, selected).nonzero().flatten()
            if rows is not None and not len(rows):
                continue
            picked = numbers.clone() if rows is None else numbers[rows]
            state = tree({}, len(picked))
            for name, like in first.items():
                value = file.get_tensor(_STATE + name)  # mapped: rows that are not taken are not read
                picked_values = value.clone() if rows is None else value[rows]
                set_leaf(state, name, picked_values.to(like.device))
        yield picked, state


def check_states(folder: Path, initial: Tree, num_clients: int) -> None:
    """Refuse files that do not hold the personal state of a run; `initial` is as in :func:`read_states`.

    Parameters
    ----------
    folder : Path
    initial : Tree
    num_clients : int
        Clients of the run, each of whom may be there once.

    Raises
    ------
    DamagedError
    """
    seen: set[int] = set()
    for path in state_files(folder):
        with _opened(path) as file:
            numbers = _check_file(path, file, initial)
        clients = numbers.tolist()
        strange = [client for client in clients if not 0 <= client < num_clients or client in seen]
        if strange or len(set(clients)) < len(clients):
            raise DamagedError(f"{path} holds clients that are not in the data, or one of them twice.")
        seen.update(clients)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} cannot be read ({error}).") from error


def _check_file(path: Path, file: Any, initial: Tree) -> Tensor:
    """Clients in a file, which must hold a row of each entry of `initial` for each of them."""
    first = leaves(initial)
    if set(file.keys()) != {CLIENTS, *(_STATE + name for name in first)}:
        raise DamagedError(f"{path} holds other entries than the personal state of this run.")
    numbers: Tensor = file.get_tensor(CLIENTS)
    if numbers.dtype != torch.int64 or numbers.dim() != 1:
        raise DamagedError(f"{path} does not say which clients it holds.")
    for name, like in first.items():
        value = file.get_tensor(_STATE + name)  # mapped: nothing is read
        if value.dtype != like.dtype or value.shape != (len(numbers), *like.shape):
            raise DamagedError(
                f"{path}: {name} is {_named(value)} instead of {_named(like)} for {len(numbers)} clients."
            )
    return numbers


def _named(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
