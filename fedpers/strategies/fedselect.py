"""FedSelect: every client chooses, entry by entry, what of the network becomes its own.

R. Tamirisa et al., FedSelect: Personalized Federated Learning with Customized Selection of Parameters
for Fine-Tuning, CVPR 2024, arXiv:2404.02478; authors' code: github.com/lapisrocks/fedselect, commit 0949f8a50aa5.

A client's network is theta_k, its mask m_k (1 = personal, 0 = global); at the start m_k = 0. Per training:

    theta_k <- w where an entry is global, its own value where it is personal
    E times:   theta_k <- a pass of SGD that moves only entries with m_k = 1
               theta_k <- a pass of SGD that moves only entries with m_k = 0
    w       <- sum_k (1 - m_k) * theta_k / sum_k (1 - m_k)
    every `interval` trainings, after the passes:
               change_k = |theta_k - theta_k at the last update|, the common start the first time
               in each weight tensor: of its n global entries those with change_k >= c become personal,
               c = the sorted changes at index round((1 - rate) * n), unless its personal share is above `limit`

Shared: parameters, of each client those that are global for it. Personal: the network with its BatchNorm statistics,
the mask, the mask of the last training, the weights at the last update, the number of trainings. E is
``training.epochs``, so a round costs twice the gradients of FedAvg, also while masks are empty. Each pass has a batch
order of its own, and the optimizer starts anew with each; ``training.proximal`` pulls to where the whole training
starts. Clipping and momentum see the whole gradient, and what the mask holds is not moved. An entry that is personal
for everybody keeps its last value on the server; nobody reads it.

On the wire: a client sends its global entries only, and one bit per parameter that says which they are; it receives
all of w.

As in the authors' code (``variant: official``), which the traces in tests/reference/fedselect record:

- Only tensors with "weight" in their names have personal entries; biases never.
- What becomes personal after a training is averaged with it all the same and starts from that average.
- The first training is followed by no update.
- `limit` is compared before an update, in float32, and may be overshot: 0.25 and 0.8 end at 0.82 after six updates.
- Ties at c become personal together: if nothing in a tensor moved, all of it.
- ``batchnorm: official``: the code switches to evaluation mode at the first evaluation and never back. After its first
  training a client trains with frozen statistics and without dropout. In that first training both passes of an epoch
  see the data, so statistics move twice. ``batchnorm: fixed`` stays in training mode. Statistics are never sent.
- Clients are averaged uniformly; ``weighting: samples`` is an option of ours.
- Accuracy as the code has it, the mean over batches of ``training.batch_size`` in test order, a short one counting as
  much as the others, is measured beside the usual one as ``batch_accuracy``. The code measures after training and
  before averaging: here ``trained_batch_accuracy``, of the network as the client last trained it.

Unlike the code:

- `interval` defaults to 1. The code's defaults, 4 rounds and an interval of 3, update masks once, after the last
  training, and so never use a personal entry.
- Small tensors: where ``round((1 - rate) * n) = n`` (n = 1 or 2 at rate 0.25), or none is left, the code ends in an
  IndexError; here nothing more becomes personal. A rate of 0 ends the same way in the code, and 1 makes everything
  personal at once: both are refused.
- The code lets all clients train in all rounds. Trainings are counted per client, which is the same there; a client
  that is sampled now and then takes its global entries from the average it is sent when it trains again.
- The code averages in all rounds but the last; here in all. `trained_...` metrics are not touched by that.
- The mask-pruning branch (``invert=False``), a remnant of the workshop version, is left out.

``variant: paper``: the paper's text was not at hand; where abstract and summaries leave it open this is our reading.
The change is that within this training, from where it started. The entries of the whole network, biases too, are
ranked together; ``round(rate * n)`` of the n global ones become personal, ties in the network's order, none that did
not move, and never more than `limit` of the network. The mask grows after every `interval` trainings, the first
included, and holds at once: what becomes personal is not sent and keeps its trained value. BatchNorm is ``fixed``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpers.cohort import Cohort, Reply, Tree, WeightedMean, entries, proximal, select, tree
from fedpers.cohort.tree import expand_rows, flat_rows
from fedpers.data.federated import Part
from fedpers.errors import check
from fedpers.records import ARRAYS
from fedpers.server.collect import Entry, Schema, dtype_name
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method

MASK = "mask"
COUNT = "count"
Masks = dict[str, Tensor]
"""uint8 by parameter name: 1 where an entry is personal, 0 where it is global."""


@dataclass(kw_only=True)
class FedSelectUpdate(LocalUpdate):
    """Train personal and global entries in turns, then let the mask grow.

    Passes alternate: ``training.steps`` and schedules, which would begin anew with each pass, are refused.
    """

    shared = "parameters"
    personal = "all"
    settles_parts = True
    rate: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            title="a number > 0 and < 1, the share of global entries that become personal at an update",
            description="share of the global entries that become personal at an update of the mask",
        ),
    ] = 0.25
    limit: Annotated[float, Field(gt=0, le=1, description="share of personal entries up to which masks grow")] = 0.8
    interval: Annotated[
        int, Field(ge=1, description="trainings from one update of the mask to the next; 3 in the authors' code")
    ] = 1
    batchnorm: Annotated[
        Literal["official", "fixed"] | None,
        Field(description="official: frozen after the first training; null: official, or fixed with variant=paper"),
    ] = None
    variant: Annotated[Literal["official", "paper"], Field(description="see the module")] = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, schedule = self.training.steps, self.training.schedule
        check(steps is None, "training.steps", steps, "null for strategy=fedselect, which alternates whole passes")
        whole = "constant for strategy=fedselect, where the optimizer starts anew with each pass"
        check(schedule == "constant", "training.schedule", schedule, whole)

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """Whole network, mask of zeros; for the official update also what it looks back on."""
        names = select(module, "parameters")
        mask = tree({name: torch.zeros_like(template[name], dtype=torch.uint8) for name in names})
        state: dict[str, Any] = {"model": template.clone(), MASK: mask}
        if self.variant == "official":
            previous = {name: template[name].clone() for name in self._selectable(names)}
            state.update(used=mask.clone(), previous=tree(previous))
        return tree(state)

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Alternate, answer with the global entries, let the mask grow."""
        names = cohort.names("parameters")
        params = self.personalize(cohort, received, config)
        start = {name: params[name].clone() for name in names} if self.variant == "paper" else {}
        mask = {name: value.to(cohort.device) for name, value in entries(cohort.state[MASK]).items()}
        self._alternate(cohort, params, mask)

        trained = cohort.trainings
        state: dict[str, Tensor | Tree] = {}
        if self.variant == "official":
            due = (trained > 0) & (trained % self.interval == 0)
            before = {name: value.to(cohort.device) for name, value in entries(cohort.state["previous"]).items()}
            change = {name: (params[name] - value).abs() for name, value in before.items()}
            grown = mask
            if bool(due.any()):
                grown = {
                    **mask,
                    **where_rows(due, grow_by_tensor(restricted_to(mask, change), change, self.rate, self.limit), mask),
                }
            previous = where_rows(due, restricted_to(entries(params), before), before)
            state.update(used=tree(mask, cohort.size), previous=tree(previous, cohort.size))
            held = mask  # what was global in this training is sent, also where it has just become personal
        else:
            due = (trained + 1) % self.interval == 0
            change = {name: (params[name] - value).abs() for name, value in start.items()}
            held = grown = where_rows(due, grow_together(mask, change, self.rate, self.limit), mask)
        state[MASK] = tree(grown, cohort.size)
        return cohort.reply(params, state=state, metrics=self._shares(grown), **{MASK: tree(held, cohort.size)})

    def _alternate(self, cohort: Cohort, params: Tree, mask: Masks) -> None:
        """Passes that move what is personal and what is not, in turns."""
        personal_mask = {name: value.to(params[name].dtype) for name, value in mask.items()}
        global_mask = {name: 1 - value for name, value in personal_mask.items()}
        later = cohort.trained.cpu()
        frozen = later & (self.batchnorm == "official" or (self.batchnorm is None and self.variant == "official"))
        batches = cohort.batches_per_pass()
        # each pass has an optimizer of its own, but the pull is to where the training of the round starts
        mu, training = cohort.training.proximal, replace(cohort.training, proximal=0.0)
        pull = [proximal(mu, params.clone())] if mu else []
        fit = partial(cohort.fit, params, self.loss, adjust=pull, training=training)
        for _ in range(cohort.training.epochs):
            for phase, trained_mask in (("personal", personal_mask), ("global", global_mask)):
                if bool(frozen.all()) or not bool(frozen.any()):
                    fit(epochs=1, mask=trained_mask, frozen=bool(frozen[0]), phase=phase)
                    continue
                for mode in (False, True):  # some train for the first time
                    steps = [n if chosen == mode else 0 for n, chosen in zip(batches, frozen, strict=True)]
                    fit(steps=steps, mask=trained_mask, frozen=mode, phase=phase)

    def _selectable(self, names: Sequence[str]) -> list[str]:
        """Parameters that may have personal entries."""
        return [name for name in names if self.variant == "paper" or "weight" in name]

    def _shares(self, mask: Masks) -> dict[str, Tensor]:
        """Share of personal entries in the next training ``[K]``, of all parameters and of each that may have some."""
        counts = {name: flat_rows(value).sum(1).double() for name, value in mask.items()}
        sizes = {name: value[0].numel() for name, value in mask.items()}
        total = torch.stack(list(counts.values())).sum(0) / sum(sizes.values())
        names = self._selectable(list(mask))
        return {"personal_share": total, **{f"personal_share/{n}": counts[n] / max(1, sizes[n]) for n in names}}

    def personalize(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Tree:
        """Own values where the mask that was last sent by is 1, received ones where it is 0; own statistics."""
        held = cohort.state["used" if self.variant == "official" else MASK]
        personal_values, shared = entries(cohort.state["model"]), received[ARRAYS]
        names = set(cohort.names("parameters"))
        return tree(
            {
                name: torch.where(held[name].bool(), value, shared[name].to(value.device)) if name in names else value
                for name, value in personal_values.items()
            },
            cohort.size,
        ).to(cohort.device)

    def extra_models(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Mapping[str, Tree]:
        """Evaluate also the network as the client last trained it, before averaging: what the authors' code does.

        Of a client that has not trained yet it is the one it predicts with.
        """
        now = entries(self.personalize(cohort, received, config))
        last = where_rows(cohort.trained, entries(cohort.state["model"].to(cohort.device)), now)
        return {"trained": tree(last, cohort.size)}

    def measure(
        self, cohort: Cohort, outputs: Sequence[Tensor], part: Part, config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Add the mean accuracy of batches."""
        columns = super().measure(cohort, outputs, part, config)
        if cohort.data.task.classes:
            columns["batch-accuracy"] = batch_accuracy(outputs, cohort.labels(part), self.training.batch_size)
        return columns

    def encode(self, records: dict[str, Tree]) -> dict[str, Tree]:
        """Global entries in a row, and the mask as bits."""
        mask = entries(records[MASK])
        global_values = {name: value[mask[name] == 0] for name, value in entries(records[ARRAYS]).items()}
        return {ARRAYS: tree(global_values), MASK: tree({name: to_bits(value) for name, value in mask.items()})}


@method("fedselect")
@dataclass(kw_only=True)
class FedSelect(PersonalizedStrategy):
    """Mean of each entry over the clients for which it is global, uniform by default."""

    update = FedSelectUpdate
    weighting: Weighting = "uniform"

    def reply_schema(self, clients: list[int]) -> Schema:
        """Any number of values and a bit for each entry."""
        schema: Schema = {}
        for name, value in entries(self.sent_arrays).items():
            schema[ARRAYS, name] = Entry((-1,), dtype_name(value))
            schema[MASK, name] = Entry((-(-value.numel() // 8),), "uint8")
        return schema

    def fold(self) -> MaskedMean:
        """Sums of what clients sent, and of how many sent it."""
        return MaskedMean({name: value.shape for name, value in entries(self.sent_arrays).items()})

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Divide by the share of clients for which an entry is global; where there are none it stays as it was."""
        share = means[COUNT]
        return tree(
            {
                name: torch.where(share[name] > 0, mean / share[name], arrays[name])
                for name, mean in entries(means[ARRAYS]).items()
            }
        )


class MaskedMean(WeightedMean):
    """Weighted mean over all clients of arrays with 0 where an entry is personal, and of ``count``, 1 where it is not.

    Parameters
    ----------
    shapes : mapping of name to Size
        Of the server's arrays.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.shapes = dict(shapes)

    def decode(self, records: dict[str, Tree], client: int) -> dict[str, Tree]:
        """Undo :meth:`FedSelectUpdate.encode`.

        Raises
        ------
        ValueError
            If values and bits do not fit together.
        """
        arrays, count = {}, {}
        for name, shape in self.shapes.items():
            values, size = records[ARRAYS][name], shape.numel()
            is_global = from_bits(records[MASK][name], size) == 0
            if int(is_global.sum()) != len(values):
                raise ValueError(f"'{name}' has {len(values)} values for {int(is_global.sum())} global entries")
            whole = values.new_zeros(size)
            whole[is_global] = values
            arrays[name] = whole.view(shape)
            count[name] = is_global.to(values.dtype).view(shape)
        return {ARRAYS: tree(arrays), COUNT: tree(count)}


# ---------------------------------------------------------------------- masks


def grow_by_tensor(mask: Masks, change: Mapping[str, Tensor], rate: float, limit: float) -> Masks:
    """Let masks grow as the authors' code does, tensor by tensor.

    Parameters
    ----------
    mask : mapping of name to Tensor ``[K, ...]``
        uint8, 1 = personal.
    change : mapping of name to Tensor ``[K, ...]``
        >= 0. A NaN counts as the largest when places are counted, and never becomes personal.
    rate, limit : float
        See :class:`FedSelectUpdate`.

    Returns
    -------
    mapping of name to Tensor ``[K, ...]``
        New masks, uint8.
    """
    grown = {}
    for name, old in mask.items():
        personal, moved = flat_rows(old).bool(), flat_rows(change[name])
        size = personal.shape[1]
        left = size - personal.sum(1)
        count = personal.sum(1).float()
        share = count / count.new_tensor(max(1, size))  # a GPU multiplies by the reciprocal of a plain number
        cut_index = torch.round((1 - rate) * left.double()).long()
        grows = (share.double() <= limit) & (cut_index < left)
        ordered = moved.masked_fill(personal, math.nan).sort(dim=1).values  # NaN, so personal ones, come last
        cut = ordered.gather(1, cut_index.clamp(max=max(0, size - 1))[:, None]) if size else moved
        grown[name] = (personal | (grows[:, None] & (moved >= cut))).view_as(old).to(torch.uint8)
    return grown


def grow_together(mask: Masks, change: Mapping[str, Tensor], rate: float, limit: float) -> Masks:
    """Let masks grow over all tensors at once, exactly up to the limit; parameters as in :func:`grow_by_tensor`."""
    personal = torch.cat([flat_rows(value) for value in mask.values()], dim=1).bool()
    moved = torch.cat([flat_rows(change[name]) for name in mask], dim=1)
    size, num_personal = personal.shape[1], personal.sum(1)
    num_new = torch.round(rate * (size - num_personal).double()).long()
    num_new = torch.minimum(num_new, math.floor(limit * size + 1e-9) - num_personal).clamp(min=0)
    order = moved.masked_fill(personal, -1).sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(size, device=order.device) < num_new[:, None]
    chosen = torch.zeros_like(personal).scatter_(1, order, first)
    new = (personal | (chosen & (moved > 0))).to(torch.uint8)
    parts = torch.split(new, [value[0].numel() for value in mask.values()], dim=1)
    return {name: part.view_as(mask[name]) for name, part in zip(mask, parts, strict=True)}


def to_bits(mask: Tensor) -> Tensor:
    """Pack zeros and ones, eight in a byte, the first in its lowest bit: uint8 ``[ceil(n / 8)]``."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def from_bits(bits: Tensor, size: int) -> Tensor:
    """Undo :func:`to_bits`: uint8 ``[size]``."""
    bit_positions = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> bit_positions) & 1).flatten()[:size]


def batch_accuracy(outputs: Sequence[Tensor], labels: Sequence[Tensor], batch_size: int) -> Tensor:
    """Mean over a client's batches of the accuracy within each.

    Parameters
    ----------
    outputs : sequence of Tensor ``[n_k, C]``
    labels : sequence of Tensor ``[n_k]``
    batch_size : int
        Samples in a batch, in the given order, the last one possibly shorter; 0 means all of them.

    Returns
    -------
    Tensor ``[K]``
        float64 on the CPU; NaN without samples.
    """
    sizes = torch.tensor([len(client_labels) for client_labels in labels])
    scores, y = torch.cat(list(outputs)), torch.cat(list(labels))
    right = ((scores.argmax(1) == y) & scores.isfinite().all(1)).double().cpu()
    width = sizes.clamp(min=1) if batch_size == 0 else torch.full_like(sizes, batch_size)
    batches = -(-sizes // width)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    positions = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]
    last = (batches - 1) * width  # where the last batch begins
    within = torch.where(positions < last[owner], width[owner], (sizes - last)[owner])
    total = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, owner, right / within)
    return torch.where(sizes > 0, total / batches.clamp(min=1), math.nan)


def restricted_to(values: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `values` that have a name of `names`."""
    return {name: values[name] for name in names}


def where_rows(rows: Tensor, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take `new` for the clients in `rows` (bool ``[K]``), `old` for the others."""
    return {name: torch.where(expand_rows(rows, v), v, old[name]) for name, v in new.items()}
