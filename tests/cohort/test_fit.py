from __future__ import annotations

import copy
import re
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpers.cohort import Batch, Cohort, Network, Training, Tree, View, mixed, proximal, shifted, tree
from fedpers.errors import ConfigError
from tests.cohort.helpers import assert_same, batches, by_size, cross_entropy, make_cohort, train_alone
from tests.problems import SmallNetwork, gaussian_data

DATA = gaussian_data(dtype=torch.float64)
NETWORK = SmallNetwork(dropout=0.0).double()
SMALL = Training(lr=0.1, batch_size=8)


def start(cohort: Cohort) -> Tree:
    return cohort.assemble(cohort.template)


def plain_sgd(module: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr)


@pytest.mark.parametrize("only", ["head", "body", ("parameters", "-body.1")])
def test_only_the_selected_parameters_move(only: str) -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    params = start(cohort)
    before = params.clone()
    cohort.fit(params, cross_entropy, only=only)
    chosen = set(cohort.names(only)) & set(cohort.names("parameters"))
    for name in cohort.names("parameters"):
        moved = (params[name] != before[name]).flatten(1).any(1)
        assert moved.all() if name in chosen else not moved.any(), name
    assert (params["body.1.num_batches_tracked"] == cohort.steps_taken).all()  # the layer still sees the batches


def test_frozen_parameters_are_nobodys_state_and_stay() -> None:
    network = copy.deepcopy(NETWORK)
    network.body[0].requires_grad_(False)
    cohort = make_cohort(network, DATA, training=SMALL)
    params = start(cohort)
    whole = start(make_cohort(NETWORK, DATA, training=SMALL))
    assert set(params.keys()) == {n for n in whole.keys() if not n.startswith("body.0.")}  # noqa: SIM118
    before = params.clone()
    cohort.fit(params, cross_entropy)
    assert torch.equal(cohort.module.body[0].weight, network.body[0].weight)
    assert not torch.equal(params["head.weight"], before["head.weight"])

    def only_free(step: Any, rows: Any, grads: Any) -> None:
        for name in [n for n in grads if n.startswith("body.0.")]:
            grads[name].zero_()

    other = make_cohort(NETWORK, DATA, training=SMALL)
    other.fit(whole, cross_entropy, adjust=only_free)
    assert_same({n: params[n] for n in cohort.names("all")}, {n: whole[n] for n in cohort.names("all")})


def test_a_mask_holds_entries_against_gradient_momentum_and_decay() -> None:
    for settings in ({"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1}):
        training = Training(lr=0.1, batch_size=8, epochs=2, **settings)  # type: ignore[arg-type]
        cohort = make_cohort(NETWORK, DATA, training=training)
        params = start(cohort)
        before = params.clone()
        mask = {n: (torch.rand(v.shape, generator=torch.Generator().manual_seed(1)) < 0.5).to(v.dtype)
                for n, v in params.items() if n.startswith("head.")}  # fmt: skip
        cohort.fit(params, cross_entropy, only="head", mask=mask)
        for name, free in mask.items():
            moved = params[name] != before[name]
            assert torch.equal(moved, free.bool()), name


def test_frozen_layers_work_as_in_an_evaluation() -> None:
    network = copy.deepcopy(NETWORK)
    network.body[3].p = 0.5  # no dropout either
    network.body[1].running_mean += 0.4
    cohort = make_cohort(network, DATA, training=Training(lr=0.1, batch_size=8, epochs=2))
    params = start(cohort)
    cohort.fit(params, cross_entropy, frozen=True)
    for row, client in enumerate(by_size(DATA)):
        module = copy.deepcopy(network).eval()
        optimizer = plain_sgd(module)
        for x, y, _ in islice(batches(DATA, client, size=8), int(cohort.steps_taken[row])):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        assert_same(params, {n: v.detach() for n, v in module.state_dict().items()}, row)
    cohort.fit(params, cross_entropy)  # and the mode is not kept
    assert (params["body.1.num_batches_tracked"] > 0).all()


def test_zero_epochs_change_nothing() -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    params = start(cohort)
    before = params.clone()
    cohort.fit(params, cross_entropy, epochs=0)
    assert (params == before).all()
    assert cohort.steps_taken.sum() == cohort.samples_seen.sum() == 0


def test_passes_go_on_in_a_second_training() -> None:
    once, twice = (make_cohort(NETWORK, DATA, training=SMALL) for _ in range(2))
    a, b = start(once), start(twice)
    once.fit(a, cross_entropy, epochs=2)
    twice.fit(b, cross_entropy, epochs=1)
    twice.fit(b, cross_entropy, epochs=1)
    assert_same(a, {name: b[name] for name in once.names("all")})
    assert torch.equal(once.samples_seen, twice.samples_seen)


def test_rate_falls_with_the_round() -> None:
    training = Training(lr=0.1, batch_size=0, shuffle=False, lr_decay=0.5)
    cohort = make_cohort(NETWORK, DATA, training=training, round=3)
    assert cohort.rate == pytest.approx(0.025)
    params = start(cohort)
    cohort.fit(params, cross_entropy)
    for row, client in enumerate(by_size(DATA)):
        x, y = DATA.x[DATA.train[client]], DATA.y[DATA.train[client]]
        module = copy.deepcopy(NETWORK).train()
        nn.functional.cross_entropy(module(x), y).backward()
        plain_sgd(module, 0.025).step()
        assert_same(params, dict(module.state_dict()), row)


def test_loss_and_counts() -> None:
    cohort = make_cohort(NETWORK, DATA, training=Training(lr=1e-12, batch_size=8, epochs=2))
    cohort.fit(start(cohort), cross_entropy)
    assert cohort.samples_seen.tolist() == [2 * len(DATA.train[c]) for c in by_size(DATA)]
    alone = make_cohort(NETWORK, DATA, [3], training=Training(lr=1e-12, batch_size=8, epochs=2))
    alone.fit(start(alone), cross_entropy)
    row = by_size(DATA).index(3)
    assert float(cohort.loss_sum[row]) == pytest.approx(float(alone.loss_sum[0]), rel=1e-5)
    assert 0.5 < float(cohort.loss_sum[row] / cohort.samples_seen[row]) < 3  # near log(4), the network knows nothing


def test_proximal_is_the_gradient_of_the_penalty() -> None:
    anchor = {n: v + 0.3 for n, v in NETWORK.named_parameters()}

    def penalty(module: nn.Module) -> Tensor:
        return 0.35 * sum(((p - anchor[n].detach()) ** 2).sum() for n, p in module.named_parameters())  # type: ignore[return-value]

    cohort = make_cohort(NETWORK, DATA, training=Training(lr=0.1, batch_size=8, epochs=2))
    params = start(cohort)
    cohort.fit(
        params, cross_entropy, adjust=proximal(0.7, cohort.per_client({n: v.detach() for n, v in anchor.items()}))
    )
    for row, client in enumerate(by_size(DATA)):
        steps = int(cohort.steps_taken[row])
        alone = train_alone(NETWORK, DATA, client, plain_sgd, steps=steps, size=8, penalty=penalty)
        assert_same(params, alone, row)


def test_shifted_and_proximal_follow_their_clients_into_another_order() -> None:
    steps = [1, 5, 0, 3, 2, 4, 6]  # rows of the plan are not rows of the cohort
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    torch.manual_seed(0)
    shift = {"head.weight": torch.randn(7, 4, 8, dtype=torch.float64)}
    anchor = {"head.bias": torch.randn(7, 4, dtype=torch.float64)}
    params = start(cohort)
    cohort.fit(params, cross_entropy, steps=steps, adjust=[shifted(shift), proximal(0.5, anchor)])
    for row, client in enumerate(by_size(DATA)):

        def penalty(module: nn.Module, row: int = row) -> Tensor:
            linear = (module.head.weight * shift["head.weight"][row]).sum()  # type: ignore[operator,union-attr]
            return linear + 0.25 * ((module.head.bias - anchor["head.bias"][row]) ** 2).sum()  # type: ignore[operator,union-attr]

        alone = train_alone(NETWORK, DATA, client, plain_sgd, steps=steps[row], size=8, penalty=penalty)
        assert_same(params, alone, row)


ORDERS = [None, [1, 5, 0, 3, 2, 4, 6]]
"""Steps of each client: those of the settings, or such that rows of the plan are not rows of the cohort."""


@pytest.mark.parametrize("steps", ORDERS, ids=["by size", "reordered"])
@pytest.mark.parametrize("clients", [None, [4]], ids=["K=7", "K=1"])
def test_what_is_given_is_mapped_over_clients(steps: list[int] | None, clients: list[int] | None) -> None:
    chosen = by_size(DATA) if clients is None else clients
    count = None if steps is None else steps[: len(chosen)]
    first, second = (make_cohort(NETWORK, DATA, clients, training=SMALL) for _ in range(2))
    torch.manual_seed(0)
    anchor = first.per_client({n: v.detach() + 0.3 for n, v in NETWORK.named_parameters()})
    anchor = tree({n: v + torch.randn_like(v) for n, v in anchor.items()}, first.size)
    strength = torch.linspace(0.1, 0.9, first.size, dtype=torch.float64)

    def pulled(network: Network, batch: Batch) -> Tensor:
        assert network.given is batch.given
        pull = sum(((network.tensors[n] - v) ** 2).sum() for n, v in batch.given["anchor"].items())  # type: ignore[union-attr]
        return cross_entropy(network, batch) + batch.given["strength"] / 2 * pull  # type: ignore[operator]

    def pull(step: Any, rows: Any, grads: Any) -> None:
        for name, grad in grads.items():
            size = step.take(strength).view(-1, *[1] * (grad.dim() - 1))
            grad.add_(size * (rows[name] - step.take(anchor[name])))

    a, b = start(first), start(second)
    first.fit(a, pulled, steps=count, given={"anchor": anchor, "strength": strength})
    second.fit(b, cross_entropy, steps=count, adjust=pull)
    assert_same(a, {n: b[n] for n in first.names("all")})


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam"}, {"momentum": 0.9, "schedule": "cosine"}])
@pytest.mark.parametrize("steps", ORDERS, ids=["by size", "reordered"])
def test_each_client_may_have_a_rate_of_its_own(settings: dict[str, Any], steps: list[int] | None) -> None:
    training = Training(lr=0.1, batch_size=8, epochs=2, **settings)
    cohort = make_cohort(NETWORK, DATA, training=training)
    rates = torch.tensor([1.0, 0.5, 0.25, 2.0, 0.0, 1.5, 0.1], dtype=torch.float64)
    params = start(cohort)
    cohort.fit(params, cross_entropy, steps=steps, rates=rates)
    for row, client in enumerate(by_size(DATA)):
        rate = max(0.1 * float(rates[row]), 1e-300)
        alone = make_cohort(NETWORK, DATA, [client], training=Training(**{**vars(training), "lr": rate}))
        expected = start(alone)
        alone.fit(expected, cross_entropy, steps=None if steps is None else steps[row])
        assert_same(params, {n: expected[n][0] for n in cohort.names("all")}, row)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"optimizer": "adam"}])
@pytest.mark.parametrize("steps", ORDERS, ids=["by size", "reordered"])
def test_a_loop_over_a_walk_is_a_fit(settings: dict[str, Any], steps: list[int] | None) -> None:
    network = SmallNetwork(dropout=0.4).double()
    training = Training(lr=0.05, batch_size=8, epochs=2, **settings)
    fitted, walked = (make_cohort(network, DATA, training=training) for _ in range(2))
    a, b = start(fitted), start(walked)
    fitted.fit(a, cross_entropy, steps=steps)
    names = walked.trainable()
    walk = walked.walk(b, steps=steps)
    optimizer = walk.optimizer(names)
    for step, rows in walk:
        losses, grads = walked.gradients(step, rows, cross_entropy, names)
        optimizer.update(rows, grads)
        walked.count_loss(step, losses)
    assert_same(a, {n: b[n] for n in fitted.names("all")})
    for counted in ("steps_taken", "samples_seen", "gradients_taken", "loss_sum"):
        assert torch.equal(getattr(fitted, counted), getattr(walked, counted)), counted


@pytest.mark.parametrize("steps", ORDERS, ids=["by size", "reordered"])
def test_a_walk_over_two_trees_changes_the_rows_of_who_trains(steps: list[int] | None) -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    count = cohort.per_client({"n": torch.zeros(2, dtype=torch.int64)})
    seen = {"samples": torch.zeros(cohort.size)}
    sizes = set()
    for step, (steps_of, samples_of) in cohort.walk(count, seen, steps=steps):
        assert step.index.shape == step.y.shape
        assert torch.equal(cohort.data.x[step.index], step.x)
        steps_of["n"] += 1
        samples_of["samples"] += step.count
        sizes.add(step.active)
    wanted = steps or [-(-len(DATA.train[c]) // 8) for c in by_size(DATA)]
    assert count["n"].tolist() == [[n, n] for n in wanted]
    assert cohort.steps_taken.tolist() == wanted
    assert seen["samples"].tolist() == cohort.samples_seen.tolist()
    assert len(sizes) > 3  # clients leave one after the other


@pytest.mark.parametrize("steps", ORDERS, ids=["by size", "reordered"])
def test_a_walk_that_is_left_early_books_what_was_done(steps: list[int] | None) -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    mark = {"mark": torch.zeros(cohort.size)}
    for number, (_, rows) in enumerate(cohort.walk(mark, steps=steps)):
        rows["mark"] += 1
        if number == 1:
            break
    wanted = [min(n, 2) for n in steps or [-(-len(DATA.train[c]) // 8) for c in by_size(DATA)]]
    assert mark["mark"].tolist() == cohort.steps_taken.tolist() == wanted


def test_a_prediction_sees_what_its_client_is_given() -> None:
    cohort = make_cohort(NETWORK, DATA)
    shift = torch.arange(float(cohort.size), dtype=torch.float64)

    def predict(network: Network, x: Tensor) -> Tensor:
        return network(x) + network.given["shift"]  # type: ignore[operator,no-any-return]

    plain = cohort.logits(View(dict(cohort.template.items()), frozenset()), "test", lambda network, x: network(x))
    view = View(dict(cohort.template.items()), frozenset(), {"shift": shift})
    for k, scores in enumerate(cohort.logits(view, "test", predict)):
        assert torch.allclose(scores, plain[k] + k)
    alone = make_cohort(NETWORK, DATA, [3])
    view = View(dict(alone.template.items()), frozenset(), {"shift": shift[5:6]})
    expected = alone.logits(View(dict(alone.template.items()), frozenset()), "test", lambda network, x: network(x))
    assert torch.allclose(alone.logits(view, "test", predict)[0], expected[0] + 5)


def remembering(trainings: list[int]) -> Cohort:
    """Two clients that keep a whole network of nines."""
    cohort = make_cohort(NETWORK, DATA, [2, 0])
    kept = {n: torch.full_like(v, 9) for n, v in cohort.template.items()}
    cohort.state = Tree({"model": cohort.per_client(kept), "trained": torch.tensor(trainings)}, batch_size=[2])
    return cohort


@pytest.mark.parametrize("per_client", [False, True])
def test_who_never_trained_takes_what_the_server_sends(per_client: bool) -> None:
    cohort = remembering([0, 3])
    assert cohort.trained.tolist() == [False, True]
    received = tree({"head.bias": torch.arange(4.0, dtype=torch.float64)})
    full = cohort.assemble(cohort.per_client(received) if per_client else received)
    assert full["head.bias"].tolist() == [[0, 1, 2, 3], [9, 9, 9, 9]]
    assert (full["head.weight"] == 9).all()  # not sent: what the client keeps, from its initial state on
    assert cohort.state["model"]["head.bias"].eq(9).all()


def test_when_all_or_none_have_trained_nothing_is_mixed() -> None:
    received = tree({"head.bias": torch.arange(4.0, dtype=torch.float64)})
    view = remembering([0, 0]).view(received)
    assert "head.bias" not in view.stacked  # one copy for all
    assert view.tensors["head.bias"].tolist() == [0, 1, 2, 3]
    assert (remembering([1, 2]).assemble(received)["head.bias"] == 9).all()
    assert (remembering([1, 0]).as_received(received)["head.bias"] == torch.arange(4)).all()


def test_without_personal_state_nobody_knows_who_has_trained() -> None:
    with pytest.raises(RuntimeError, match="personal state only"):
        _ = make_cohort(NETWORK, DATA).trained


def test_a_batch_of_one_sample_under_batch_normalization_is_refused() -> None:
    cohort = make_cohort(NETWORK, gaussian_data((16, 9), dtype=torch.float64), training=SMALL, needs_two_samples=True)
    with pytest.raises(ConfigError, match=r"training\.batch_size=8.*client 1 "):
        cohort.fit(start(cohort), cross_entropy)


def test_clients_must_stand_by_size() -> None:
    with pytest.raises(ValueError, match="descending"):
        make_cohort(NETWORK, DATA, [1, 0])


def test_a_loss_over_parts_of_the_network() -> None:
    def parts(network: object, batch: object) -> Tensor:
        features = network.part("body")(batch.x)  # type: ignore[attr-defined]
        return batch.mean(  # type: ignore[attr-defined,no-any-return]
            nn.functional.cross_entropy(network.part("head")(features), batch.y, reduction="none")  # type: ignore[attr-defined]
        )

    results = []
    for loss in (cross_entropy, parts):
        cohort = make_cohort(SmallNetwork(dropout=0.3).double(), DATA, training=SMALL)
        params = start(cohort)
        cohort.fit(params, loss)
        results.append(params)
    names = list(NETWORK.state_dict())
    assert_same(results[0], {n: results[1][n] for n in names})


def test_assemble_prefers_personal_then_received_then_initial() -> None:
    cohort = remembering([1, 1])
    received = cohort.template.select("head.weight", "head.bias").clone()
    received["head.weight"] = received["head.weight"] + 1
    received["head.bias"] = received["head.bias"] + 2
    personal = cohort.per_client({"head.bias": torch.arange(4.0, dtype=torch.float64)})
    personal["head.bias"][1] = -1
    full = cohort.assemble(received, personal)
    assert full["head.bias"].tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1]]
    assert torch.equal(full["head.weight"][1], received["head.weight"])
    assert torch.equal(full["body.0.weight"][0], cohort.template["body.0.weight"])
    full["head.weight"].zero_()
    assert received["head.weight"].abs().sum() > 0  # what all received is not touched


def test_mixed_mixes_the_named_entries_only() -> None:
    first = Tree({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5, 6])}, batch_size=[2])
    second = Tree({"w": torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([7, 8])}, batch_size=[2])
    out = mixed(torch.tensor([0.25, 1.0]), first, second, ["w"])
    assert out["w"].tolist() == [[0.25, 0.5], [3.0, 4.0]]
    assert out["b"].tolist() == [5, 6]


@pytest.mark.parametrize("clients", [None, [4]], ids=["K=7", "K=1"])
def test_a_frozen_network_in_a_loss_works_as_in_an_evaluation(clients: list[int] | None) -> None:
    """A teacher neither drops, nor normalizes by the batch, nor changes the statistics it is given."""
    network = SmallNetwork(dropout=0.5).double()
    network.body[1].running_mean += 0.4  # type: ignore[operator]
    cohort = make_cohort(network, DATA, clients, training=SMALL)
    teacher = cohort.assemble(cohort.template)
    before = teacher.clone()
    evaluated = copy.deepcopy(network).eval()

    def distance(network: Network, batch: Batch) -> Tensor:
        frozen = network.replace(batch.given["teacher"]).as_frozen()
        assert frozen.part("body").frozen
        return batch.mean((frozen(batch.x) - 3.0).square().mean(1)) + 0.0 * cross_entropy(network, batch)

    params = start(cohort)
    losses = []
    for step, rows in cohort.walk(params, epochs=1):
        step_losses, _ = cohort.gradients(step, rows, distance, cohort.trainable(), given={"teacher": teacher})
        for k in range(step.active):
            x = step.x[k] if step.weight is None else step.x[k][step.weight[k] > 0]
            losses.append((float(step_losses[k]), float((evaluated(x) - 3.0).square().mean())))
    assert all(ours == pytest.approx(theirs, rel=1e-9) for ours, theirs in losses)
    assert_same(teacher, {n: before[n] for n in cohort.names("all")})
    assert (params["body.1.num_batches_tracked"] > 0).all()  # the network in training is not frozen


def test_a_walk_over_some_of_the_samples() -> None:
    cohort = make_cohort(NETWORK, DATA, training=Training(batch_size=4))
    some = [DATA.train[client].numpy()[: 2 + 3 * (k % 2)] for k, client in enumerate(by_size(DATA))]
    seen: list[set[int]] = [set() for _ in some]
    for step, _ in cohort.walk({}, epochs=2, samples=some):
        for place in range(step.active):
            row = place if step.rows is None else int(step.rows[place])
            seen[row] |= set(step.index[place].tolist())
    assert seen == [set(positions.tolist()) for positions in some]
    assert cohort.samples_seen.tolist() == [2 * len(positions) for positions in some]


@pytest.mark.parametrize("call", ["fit", "walk", "plan"])
def test_an_option_that_does_not_exist_is_refused(call: str) -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    arguments = {"fit": (start(cohort), cross_entropy), "walk": ({},), "plan": ()}[call]
    with pytest.raises(TypeError, match=r"^unknown option 'epoch': .*did you mean 'epochs'\?"):
        getattr(cohort, call)(*arguments, epoch=2)


def test_what_is_given_needs_a_row_for_each_client() -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    for value in (torch.zeros(3, 2), torch.tensor(1.0), cohort.template):
        with pytest.raises(ValueError, match=r"^given 'anchor' has shape \[.*\]: expected 7 rows, one for each client"):
            cohort.fit(start(cohort), cross_entropy, given={"anchor": value})
    with pytest.raises(ValueError, match=r"^rates have shape \[2\]: expected one for each of 7"):
        cohort.fit(start(cohort), cross_entropy, rates=torch.ones(2))


def test_rows_of_a_walk_cannot_be_replaced() -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    for _, rows in cohort.walk(start(cohort)):
        with pytest.raises(TypeError):
            rows["head.bias"] = rows["head.bias"] - 1


@pytest.mark.parametrize("clients", [None, [2], [4, 1]])
def test_pulls_shifts_and_masks_may_be_one_network_for_all(clients: list[int] | None) -> None:
    results = []
    for stacked in (True, False):
        cohort = make_cohort(NETWORK, DATA, clients, training=Training(lr=0.1, batch_size=8, epochs=2))
        params = start(cohort)
        one = {n: v + 0.1 for n, v in cohort.template.items() if n.startswith("head.")}
        values = cohort.per_client(one) if stacked else one
        held = {n: (v > 0).to(v.dtype) for n, v in values.items()}
        cohort.fit(params, cross_entropy, adjust=[proximal(0.3, values), shifted(values)], mask=held)
        results.append(params)
    assert_same(results[0], {n: results[1][n] for n in cohort.names("all")})


def test_values_of_another_shape_or_the_network_itself_are_refused() -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    for size in (1, 3):
        few = {"head.bias": torch.zeros(size, 4, dtype=torch.float64)}
        sentence = rf"^the value for 'head.bias' has shape \[{size}, 4\]: expected \[K, 4\] or \[4\]$"
        for options in ({"adjust": proximal(0.1, few)}, {"adjust": shifted(few)}, {"mask": few}):
            with pytest.raises(ValueError, match=sentence):
                cohort.fit(start(cohort), cross_entropy, **options)
    params = start(cohort)
    with pytest.raises(
        ValueError, match=r"^proximal pulls '.*' to itself: expected a copy, such as params\.clone\(\)$"
    ):
        cohort.fit(params, cross_entropy, adjust=proximal(0.1, params))


def test_what_cannot_be_trained_is_said() -> None:
    cohort = make_cohort(SmallNetwork(norm=False).double(), DATA, training=SMALL)
    with pytest.raises(ConfigError, match=r"^only=norm: expected parts of the network with parameters"):
        cohort.fit(start(cohort), cross_entropy, only="norm")
    with pytest.raises(TypeError, match=r"^a loss is \[\d+\]: expected a scalar tensor; reduce over samples with"):
        cohort.fit(start(cohort), lambda network, batch: batch.losses(network(batch.x)))
    with pytest.raises(ValueError, match=r"^'body\.0\.weight' has shape \[8, 6\]: expected networks of 7 clients"):
        cohort.fit(cohort.template, cross_entropy)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"metrics": {"a": 1.0}}, "metric 'a' is a float: expected a tensor [7], one number a client"),
        (
            {"metrics": {"a": torch.tensor(1.0)}},
            "metric 'a' is a tensor []: expected a tensor [7], one",
        ),
        ({"metrics": {"a": torch.ones(9)}}, "metric 'a' is a tensor [9]: expected a tensor [7], one number a client"),
        ({"extra": {}}, "record 'extra' is a dict: expected a tree of 7 clients"),
        ({"extra": tree({})}, "record 'extra' is a tree []: expected a tree of 7 clients"),
    ],
)
def test_a_reply_of_another_form_is_refused(answer: dict[str, Any], sentence: str) -> None:
    cohort = make_cohort(NETWORK, DATA, training=SMALL)
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}"):
        cohort.reply(start(cohort), **answer)
