"""Named trees of tensors: one client's (batch size ``[]``) or a cohort's stacked (batch size ``[K]``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fedpers.cohort.modules import canonical_names, named_state
from fedpers.cohort.tensordicts import TensorDict
from fedpers.errors import ConfigError, one_of

Tree = TensorDict
"""A ``TensorDict`` from dotted parameter names, or from roles to further trees, to tensors."""

Selection = str | Sequence[str]
"""Which entries of a network: a term, or several read from left to right; see :func:`select`."""

_TERMS = ("all", "none", "parameters", "buffers", "body", "head", "norm")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def tree(tensors: Mapping[str, Tensor | Tree], batch: int | None = None) -> Tree:
    """Wrap tensors by name, or trees by role; `batch` is the number of clients K, or None for a single client's."""
    return TensorDict(dict(tensors), batch_size=[] if batch is None else [batch])


def entries(values: Tree) -> dict[str, Tensor]:
    """Tensors of a tree by name, for a tree without roles."""
    return {str(name): value for name, value in values.items() if isinstance(value, Tensor)}


def has_role(state: Tree, role: str) -> bool:
    """Whether a tree has an entry of this name: a role, or a tensor's name."""
    return role in state.keys()  # noqa: SIM118 (a TensorDict iterates over rows)


def leaves(values: Tree) -> dict[str, Tensor]:
    """All tensors of a tree, those under a role by ``role/name``."""
    items = values.items(include_nested=True, leaves_only=True)
    return {p if isinstance(p, str) else "/".join(p): v for p, v in items if isinstance(v, Tensor)}


def set_leaf(values: Tree, name: str, value: Tensor) -> None:
    """Put a tensor into a tree under the name that :func:`leaves` gives it."""
    values.set(tuple(name.split("/")), value)


def state_names(module: nn.Module) -> list[str]:
    """Names of what a client may own: parameters and persistent buffers, without frozen parameters.

    Parameters that require no gradient are nobody's state: they stay in the module, one copy for all clients, and are
    neither stacked, sent nor stored. An entry that has several names is listed once, under the first.
    """
    return list(dict.fromkeys(_state_aliases(module).values()))


def _state_aliases(module: nn.Module) -> dict[str, str]:
    """Every name of a client's entry -> its canonical one, in the network's order."""
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    names = canonical_names(module)
    return {name: names[name] for name in named_state(module) if name not in frozen}


def model_tree(module: nn.Module) -> Tree:
    """Copy of all trainable parameters and persistent buffers of `module`, by dotted name, batch size ``[]``."""
    values = named_state(module)
    return tree({name: values[name].detach().clone() for name in state_names(module)})


def select(module: nn.Module, what: Selection, key: str = "selection") -> tuple[str, ...]:
    """Names of the network's entries (:func:`state_names`) that `what` stands for, in the network's order.

    Parameters
    ----------
    module : nn.Module
    what : str or sequence of str
        ``all``, ``none``, ``parameters``, ``buffers``, ``head`` (what lies under ``module.head``), ``body`` (all the
        rest), ``norm`` (parameters and buffers of normalization layers), a dotted prefix (``body.0``) or a pattern
        with ``*``. A leading ``-`` takes away: ``("all", "-norm")``. A part that has several names goes by any of them.
    key : str
        The setting that holds `what`, for messages.

    Raises
    ------
    ConfigError
        If a term matches nothing although it names something.
    """
    aliases = _state_aliases(module)
    names = list(dict.fromkeys(aliases.values()))
    parameters = {name for name, _ in module.named_parameters()}
    norm_layers = [name for name, layer in module.named_modules() if isinstance(layer, _NORMS)]

    def under(prefix: str) -> set[str]:
        return {name for alias, name in aliases.items() if alias == prefix or alias.startswith(prefix + ".")}

    def term(word: str) -> set[str]:
        if word in ("body", "head") and not hasattr(module, "head"):
            allowed = "a network whose last layer is named 'head', or the name it has: model.head=fc (head= in Python)"
            raise ConfigError("model", type(module).__name__, allowed)
        match word:
            case "all":
                return set(names)
            case "none":
                return set()
            case "parameters":
                return parameters & set(names)
            case "buffers":
                return set(names) - parameters
            case "head":
                return under("head")
            case "body":
                return set(names) - under("head")
            case "norm":
                return set().union(*(under(layer) for layer in norm_layers))
        matches = under(word) or {name for alias, name in aliases.items() if fnmatchcase(alias, word)}
        if not matches:
            raise ConfigError(key, word, one_of([*_TERMS, *aliases], word))
        return matches

    chosen: set[str] = set()
    for word in [what] if isinstance(what, str) else what:
        if word.startswith("-"):
            chosen -= term(word[1:])
        else:
            chosen |= term(word)
    return tuple(name for name in names if name in chosen)


def rows_finite(stacked: Tree) -> Tensor:
    """Which clients have only finite values, bool ``[K]``; integer entries always count as finite."""
    rows = [v for v in leaves(stacked).values() if v.is_floating_point() and v.numel()]
    ok = torch.ones(stacked.batch_size, dtype=torch.bool, device=rows[0].device if rows else stacked.device)
    for value in rows:
        ok = ok & sum_rows(value).isfinite().to(ok.device)  # a sum is several times faster to look at than its entries
    if rows and not ok.all():  # it may also have overflowed
        ok = torch.ones_like(ok)
        for value in rows:
            ok = ok & flat_rows(value.isfinite()).all(1).to(ok.device)
    return ok


def expand_rows(one: Tensor, value: Tensor) -> Tensor:
    """View `one` (``[K]``) so that it broadcasts over ``value`` (``[K, ...]``)."""
    return one.view(-1, *([1] * (value.dim() - 1)))


def flat_rows(value: Tensor) -> Tensor:
    """View ``[K, ...]`` as ``[K, n]``, also where a row is a single number."""
    return value.reshape(len(value), -1)


def sum_rows(value: Tensor) -> Tensor:
    """Sum of the entries of each row: ``[K, ...]`` to ``[K]``; of any layout in memory, which is not copied."""
    return value.sum(list(range(1, value.dim()))) if value.dim() > 1 else value


def map_tensors(values: Mapping[str, Any] | None, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Apply `change` to each tensor of a nested mapping; trees become plain mappings."""
    return {
        name: change(value)
        if isinstance(value, Tensor)
        else map_tensors(entries(value) if isinstance(value, TensorDict) else value, change)
        for name, value in (values or {}).items()
    }
