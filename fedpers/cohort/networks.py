"""The networks of K clients: which entries are the server's, which a client's, which the initial network's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpers.cohort.modules import linear_weights
from fedpers.cohort.prediction import View
from fedpers.cohort.tensordicts import TensorDict
from fedpers.cohort.tree import Selection, Tree, entries, expand_rows, has_role, select, tree

TRAINED = "trained"
"""Role in personal state that counts a client's trainings, int64; kept by whoever runs cohorts, not by methods."""


class ClientNetworks:
    """Networks of K clients, put together from what was received, what clients keep, and the initial network.

    Parameters
    ----------
    module : nn.Module
        The prepared network (:func:`fedpers.cohort.modules.prepare`).
    state : Tree ``[K]``
        The clients' personal state; its entry ``model`` has the personal entries of their networks.
    template : Tree
        The initial network, the same for all clients.
    shared, personal : selection
        The method's (``LocalUpdate.shared``, ``personal``).
    device : torch.device

    Attributes
    ----------
    size : int
        K.
    """

    def __init__(
        self,
        module: nn.Module,
        state: Tree,
        template: Tree,
        *,
        shared: Selection,
        personal: Selection,
        size: int,
        device: torch.device,
    ) -> None:
        self.module = module
        self.state = state
        self.template = template
        self.shared = shared
        self.personal = personal
        self.size = size
        self.device = device

    @property
    def trainings(self) -> Tensor:
        """How often each client has trained before, int64 ``[K]``.

        Raises
        ------
        RuntimeError
            If the method keeps no personal state: then nobody remembers.
        """
        if not has_role(self.state, TRAINED):
            raise RuntimeError("whether clients have trained is kept for methods with personal state only")
        trainings: Tensor = self.state[TRAINED].to(self.device)
        return trainings

    @property
    def trained(self) -> Tensor:
        """Which clients have trained before, bool ``[K]``; see :attr:`trainings`."""
        return self.trainings > 0

    def names(self, what: Selection) -> tuple[str, ...]:
        """Names of the network's entries that a selection stands for."""
        cache: dict[Selection, tuple[str, ...]] = self.module.__dict__.setdefault("_cohort_names", {})
        key = what if isinstance(what, str) else tuple(what)
        if key not in cache:
            cache[key] = select(self.module, what)
        return cache[key]

    def trainable(self, only: Selection = "parameters") -> tuple[str, ...]:
        """Names of the selected parameters that training may move: those that require a gradient in the network."""
        cache: dict[Selection, tuple[str, ...]] = self.module.__dict__.setdefault("_cohort_trainable", {})
        key = only if isinstance(only, str) else tuple(only)
        if key not in cache:
            unfrozen = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
            cache[key] = tuple(name for name in self.names(only) if name in unfrozen)
        return cache[key]

    def per_client(self, source: Mapping[str, Tensor] | Tree, names: Sequence[str] | None = None) -> Tree:
        """Give each client its own copy of `source`, batch size [K]: of one network, or of its row of a tree ``[K]``.

        A plain mapping is one network.
        """
        stacked = isinstance(source, TensorDict) and source.batch_size == torch.Size([self.size])
        tensors = entries(source) if isinstance(source, TensorDict) else source
        out = {}
        for name in tensors if names is None else names:
            out[name] = self._copies(name, tensors[name].to(self.device), stacked)
        return tree(out, self.size)

    def _copies(self, name: str, value: Tensor, stacked: bool) -> Tensor:
        """Copy ``[K, ...]`` of an entry for each client, laid out in memory as its gradients mapped over clients are.

        Those of a linear layer's weight come input by input: two layouts in one update take several times as long.
        """
        transposed = self.size > 1 and name in linear_weights(self.module)
        if transposed:
            value = value.mT if stacked else value.mT.contiguous()
        copies = value if stacked else value.expand(self.size, *value.shape)
        copies = copies.clone(memory_format=torch.contiguous_format)
        return copies.mT if transposed else copies

    def assemble(self, received: Tree, personal: Tree | None = None) -> Tree:
        """Full networks ``[K]``: personal entries from the clients' state, the others as received.

        Where both have an entry, the personal one counts for clients that have trained, for others the server's: they
        have learned nothing yet. Weights of linear layers are views: they lie in memory input by input, as their
        gradients do.

        Parameters
        ----------
        received : Tree
            From the server, one for all (batch size []) or one per client ([K]). What it lacks comes from the
            initial network.
        personal : Tree ``[K]``, optional
            Default ``state["model"]`` if there is one.
        """
        return self.copies(self.view(received, personal))

    def copies(self, view: View) -> Tree:
        """Full networks ``[K]`` with the values of a view, to be trained."""
        return tree(
            {name: self._copies(name, value, stacked=name in view.stacked) for name, value in view.tensors.items()},
            self.size,
        )

    def as_received(self, received: Tree) -> Tree:
        """Full networks ``[K]`` without what clients keep: what the server does not send is the initial network's."""
        return self.assemble(received, personal=tree({}, self.size))

    def common(self, received: Tree) -> Tree:
        """Full networks ``[K]`` as received; what is personal and not shared is the client's, which alone has it."""
        alone = [name for name in self.names(self.personal) if name not in self.names(self.shared)]
        return self.assemble(received, personal=self.state["model"].select(*alone) if alone else tree({}, self.size))

    def view(self, received: Tree, personal: Tree | None = None) -> View:
        """As :meth:`assemble`, but without copies: to predict with, not to train."""
        if personal is None:
            personal = self.state.get("model", None)
        per_client = received.batch_size == torch.Size([self.size])
        personal_values = {} if personal is None else entries(personal)
        sent = entries(received)
        stacked = set(sent) if per_client else set()
        tensors = {name: value.to(self.device) for name, value in {**entries(self.template), **sent}.items()}
        trained = self.trained if personal_values.keys() & sent.keys() else None
        for name, value in personal_values.items():
            personal_value = value.to(self.device)
            if name in sent and trained is not None and not bool(trained.all()):
                if not bool(trained.any()):
                    continue
                personal_value = torch.where(expand_rows(trained, personal_value), personal_value, tensors[name])
            tensors[name] = personal_value
            stacked.add(name)
        return View({name: tensors[name] for name in self.names("all")}, frozenset(stacked))


def mixed(share: Tensor, first: Tree, second: Tree, names: Sequence[str]) -> Tree:
    """Mix two stacks of networks: ``share * first + (1 - share) * second`` with `share` ``[K]``.

    Only the entries `names` are mixed; the others, such as buffers, are those of `first`.
    """
    out = {name: value.clone() for name, value in entries(first).items()}
    for name in names:
        out[name] = torch.lerp(second[name], first[name], expand_rows(share, first[name]))
    return tree(out, len(share))
