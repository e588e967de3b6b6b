from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from fedpers.cohort import Batch, Network, Training, model_tree, prepare, select
from fedpers.cohort.modules import announce, call, copy_network, part_tensors
from fedpers.cohort.tree import state_names
from fedpers.data.federated import FederatedData
from fedpers.errors import ConfigError
from tests.cohort.helpers import assert_same, cross_entropy, make_cohort, train_alone
from tests.problems import SmallNetwork, gaussian_data

LAYERS = {
    "1d": (lambda **o: nn.BatchNorm1d(3, **o), (5, 3)),
    "1d with length": (lambda **o: nn.BatchNorm1d(3, **o), (5, 3, 4)),
    "2d": (lambda **o: nn.BatchNorm2d(3, **o), (5, 3, 2, 4)),
    "3d": (lambda **o: nn.BatchNorm3d(3, **o), (5, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"affine": False}])
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_norm_leaves_padding_out(kind: str, options: dict[str, object]) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    theirs = make(**options).double().train()
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = prepare(theirs).train()
    direction = torch.randn(shape, dtype=torch.float64)
    for _ in range(3):  # running statistics over several batches
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        padded = torch.cat([x.detach(), torch.full((3, *shape[1:]), 77.0, dtype=torch.float64)]).requires_grad_()
        out = theirs(x)
        (out * direction).sum().backward()
        announce(ours, torch.tensor([1.0] * 5 + [0.0] * 3), None)
        actual = ours(padded)
        (actual[:5] * direction).sum().backward()
        torch.testing.assert_close(actual[:5], out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(padded.grad[:5], x.grad, rtol=1e-9, atol=1e-10)  # type: ignore[index]
        assert padded.grad[5:].abs().max() == 0  # type: ignore[index]
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_in_a_stack_has_statistics_per_client(momentum: float | None) -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=momentum), nn.Linear(5, 4)).double()
    data = gaussian_data((19, 14), dtype=torch.float64)
    cohort = make_cohort(network, data, training=Training(lr=0.1, batch_size=8, epochs=2))
    params = cohort.assemble(cohort.template)
    cohort.fit(params, cross_entropy)
    for client in (0, 1):
        alone = make_cohort(network, data, [client], training=cohort.training)
        expected = alone.assemble(alone.template)
        alone.fit(expected, cross_entropy)
        assert_same(params, {n: expected[n][0] for n in cohort.names("all")}, client)


def test_one_value_per_channel_cannot_be_normalized() -> None:
    layer = prepare(nn.BatchNorm1d(3)).train()
    announce(layer, None, None)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.randn(1, 3))
    announce(layer, torch.tensor([1.0, 0.0]), None)  # the same batch, padded: marks the client
    assert layer(torch.randn(2, 3))[0].isnan().all()


class Dropping(nn.Module):
    """Shows the masks of two dropout layers."""

    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.one, self.two = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], dim=1)


def mask(module: nn.Module, x: Tensor, key: int) -> Tensor:
    announce(module, None, torch.tensor(key))
    out: Tensor = module(x)
    return out


def test_dropout_rate_and_scale() -> None:
    out = mask(prepare(Dropping(0.25)).train(), torch.ones(400, 100), 12345)
    values = out.unique().tolist()
    assert values == pytest.approx([0.0, 1 / 0.75])
    assert float((out != 0).double().mean()) == pytest.approx(0.75, abs=0.005)
    assert float(out.mean(0).std()) < 0.05  # no column is favoured
    assert float(out.mean(1).std()) < 0.08


def test_dropout_differs_between_clients_steps_and_layers() -> None:
    module = prepare(Dropping(0.5)).train()
    x = torch.ones(20, 50)
    base = mask(module, x, 2**62 + 7)
    assert torch.equal(base, mask(module, x, 2**62 + 7))
    for other in (2**62 + 8, 2**61 + 7, 7):
        agreement = float((mask(module, x, other) == base).double().mean())
        assert 0.4 < agreement < 0.6
    assert 0.4 < float((base[:, :50] == base[:, 50:]).double().mean()) < 0.6


def test_dropout_does_not_depend_on_padding_or_the_stack() -> None:
    module = prepare(Dropping(0.5)).train()
    keys = torch.tensor([2**61 + 3, 99])

    def one(key: Tensor) -> Tensor:
        announce(module, None, key)
        out: Tensor = module(torch.ones(6, 10))
        return out

    stacked = vmap(one)(keys)
    for row in (0, 1):
        assert torch.equal(stacked[row], one(keys[row]))
        assert torch.equal(stacked[row][:4], mask(module, torch.ones(4, 10), int(keys[row])))


def test_channel_dropout_drops_whole_channels() -> None:
    out = mask(prepare(nn.Dropout2d(0.5)).train(), torch.ones(30, 20, 3, 3), 5)
    per_channel = out.flatten(2).sum(2)
    assert set(per_channel.unique().tolist()) == {0.0, 18.0}


def test_dropout_is_off_in_evaluation_and_at_rate_zero() -> None:
    x = torch.ones(5, 5)
    assert torch.equal(mask(prepare(nn.Dropout(0.9)).eval(), x, 3), x)
    assert torch.equal(mask(prepare(nn.Dropout(0.0)).train(), x, 3), x)
    assert not mask(prepare(nn.Dropout(1.0)).train(), x, 3).any()


def test_training_with_dropout_ignores_and_leaves_the_global_generator() -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        for clients in ([2, 4], [2]):
            cohort = make_cohort(SmallNetwork().double(), gaussian_data(dtype=torch.float64), clients)
            params = cohort.assemble(cohort.template)
            cohort.fit(params, cross_entropy)
            results.append({n: params[n][0] for n in cohort.names("all")})
        assert torch.equal(before, torch.random.get_rng_state())
    for other in results[1:]:
        assert_same(other, results[0])


def test_dropout_of_a_second_training_is_a_new_draw() -> None:
    network, data = SmallNetwork(norm=False, dropout=0.5).double(), gaussian_data(dtype=torch.float64)
    cohort = make_cohort(network, data, [2], training=Training(lr=1e-12, batch_size=0, shuffle=False))
    sums = []
    for _ in range(2):
        before = float(cohort.loss_sum)
        cohort.fit(cohort.assemble(cohort.template), cross_entropy, steps=1)
        sums.append(float(cohort.loss_sum) - before)
    assert sums[0] != pytest.approx(sums[1], rel=1e-3)


def test_dropout_of_the_next_step_is_a_new_draw() -> None:
    network, data = SmallNetwork(norm=False, dropout=0.5).double(), gaussian_data(dtype=torch.float64)
    cohort = make_cohort(network, data, [2], training=Training(batch_size=0, shuffle=False))
    names = cohort.trainable()
    walk = cohort.walk(cohort.assemble(cohort.template), steps=4)
    losses = [float(cohort.gradients(step, rows, cross_entropy, names)[0]) for step, rows in walk]
    assert len({round(loss, 4) for loss in losses}) == 4


class OwnNorm(nn.BatchNorm1d):
    pass


class OwnDropout(nn.Dropout):
    pass


REFUSED = [
    nn.SyncBatchNorm(3),
    nn.InstanceNorm1d(3, track_running_stats=True),
    nn.BatchNorm1d(3, track_running_stats=False),
    OwnNorm(3),
    OwnDropout(),
]


@pytest.mark.parametrize("layer", REFUSED, ids=lambda layer: type(layer).__name__)
def test_refuses_layers_that_would_make_results_depend_on_the_cohort(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=f"model={type(layer).__name__} at '1': expected"):
        prepare(nn.Sequential(nn.Linear(3, 3), layer))


@pytest.mark.parametrize(
    "layer",
    [
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.GRU(3, 3, 2, dropout=0.1),
        nn.InstanceNorm1d(3),
        nn.GroupNorm(1, 3),
        nn.LayerNorm(3),
        nn.AlphaDropout(),
        nn.RReLU(),
    ],
)
def test_takes_other_layers(layer: nn.Module) -> None:
    assert list(prepare(nn.Sequential(layer)).state_dict()) == list(nn.Sequential(layer).state_dict())


def test_prepare_copies_and_keeps_names_and_values() -> None:
    network = SmallNetwork()
    before = copy.deepcopy(network.state_dict())
    prepared = prepare(network)
    assert type(network.body[1]) is nn.BatchNorm1d
    assert list(prepared.state_dict()) == list(before)
    with torch.no_grad():
        prepared.head.weight.zero_()  # type: ignore[union-attr,operator]
    assert torch.equal(network.head.weight, before["head.weight"])
    assert list(prepare(prepared).state_dict()) == list(before)  # what is prepared may be prepared again


def test_second_order_gradients_go_through_masked_batch_norm() -> None:
    module = prepare(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).double().train()
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = {n: p.detach() for n, p in module.named_parameters()}

    def slope(weight: Tensor, padded: bool) -> Tensor:
        announce(module, torch.tensor([1.0] * 4 + [0.0] * 2) if padded else None, None)

        def loss(weight: Tensor) -> Tensor:
            buffers = {n: b.clone() for n, b in module.named_buffers()}
            out = functional_call(module, {**values, **buffers, "0.weight": weight}, (x if padded else x[:4],))
            return (out[:4] ** 3).sum()

        return grad(loss)(weight).square().sum()

    actual, expected = (grad(lambda w, p=p: slope(w, p))(values["0.weight"]) for p in (True, False))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_pictures_under_batch_norm_train_alike_in_any_cohort() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.AdaptiveAvgPool2d(1)
            )
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x).flatten(1))
            return out

    torch.manual_seed(0)
    network = Pictures().double()
    data: FederatedData = gaussian_data((13, 9, 6), features=(1, 5, 5), dtype=torch.float64)
    cohort = make_cohort(network, data, training=Training(lr=0.1, batch_size=4, epochs=2))
    params = cohort.assemble(cohort.template)
    cohort.fit(params, cross_entropy)
    for client in range(3):
        alone = make_cohort(network, data, [client], training=cohort.training)
        expected = alone.assemble(alone.template)
        alone.fit(expected, cross_entropy)
        assert_same(params, {n: expected[n][0] for n in cohort.names("all")}, client)


# ------------------------------------------------------------- several names for one thing


class Aliased(nn.Module):
    """A last layer under two names, the first of which is not `head`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.classifier = nn.Linear(5, 4)
        self.head = self.classifier

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class Tied(nn.Module):
    """Input and output share their weight, as in a language model; a trainable layer lies between them."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(6, 4, bias=False)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 4)
        self.head.weight = self.into.weight
        self.into.weight.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.into(x)).relu())
        return out


class Nested(nn.Module):
    """One table in two parts, under the name `table` in both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reader, self.writer = nn.ModuleDict(), nn.ModuleDict()
        self.reader["table"] = nn.Linear(6, 6)
        self.writer["table"] = self.reader["table"]
        self.writer["out"] = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.writer["out"](self.writer["table"](self.reader["table"](x).relu()).relu())
        return out


ENTRIES = {
    Aliased: [*(f"body.0.{n}" for n in ("weight", "bias")),
              *(f"body.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
              "classifier.weight", "classifier.bias"],
    Tied: ["body.weight", "body.bias", "head.bias"],
    Nested: ["reader.table.weight", "reader.table.bias", "writer.out.weight", "writer.out.bias"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ENTRIES)
def test_what_has_several_names_is_listed_once_and_trains_as_it_does_alone(kind: type[nn.Module]) -> None:
    network, data = kind().double(), gaussian_data((19, 14), dtype=torch.float64)
    cohort = make_cohort(network, data, training=Training(lr=0.1, batch_size=8, epochs=2))
    assert list(cohort.names("all")) == state_names(network) == list(model_tree(network).keys()) == ENTRIES[kind]
    params = cohort.assemble(cohort.template)
    cohort.fit(params, cross_entropy)
    for k, (client, steps) in enumerate([(0, 6), (1, 4)]):
        alone = train_alone(
            network, data, client, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), steps=steps, size=8
        )
        assert_same(params, {name: alone[name] for name in ENTRIES[kind]}, k)


@pytest.mark.parametrize("name", ["classifier", "head"])
def test_a_part_goes_by_either_name(name: str) -> None:
    network = Aliased()
    canonical = ("classifier.weight", "classifier.bias")
    assert select(network, name) == select(network, f"{name}.*") == canonical
    assert select(network, f"{name}.bias") == canonical[1:]
    assert select(network, "body") == select(network, ("all", f"-{name}")) == tuple(ENTRIES[Aliased][:7])
    cohort = make_cohort(network, gaussian_data((19, 14)))
    tensors = {n: v.clone() for n, v in model_tree(network).items()}
    tensors["classifier.bias"] += 1.0
    x = torch.randn(3, 5)
    expected = call(cohort.module.get_submodule("classifier"), {"bias": tensors["classifier.bias"]}, x)
    torch.testing.assert_close(Network(cohort.module, tensors).part(name)(x), expected)
    assert not torch.equal(network.head(x), expected)
    # an entry, too
    whole = call(cohort.module.eval(), {f"{name}.bias": tensors["classifier.bias"]}, torch.ones(2, 6))
    torch.testing.assert_close(whole, call(cohort.module, tensors, torch.ones(2, 6)))


def test_a_part_within_a_part_goes_by_either_name() -> None:
    network = prepare(Nested())
    tensors = {n: v for n, v in model_tree(network).items() if isinstance(v, Tensor)}
    assert select(network, "writer") == tuple(ENTRIES[Nested])
    assert select(network, "reader") == select(network, "writer.table") == tuple(ENTRIES[Nested][:2])
    inside = part_tensors(network, "writer", tensors)
    assert list(inside) == ["table.weight", "table.bias", "out.weight", "out.bias"]
    assert inside["table.bias"] is tensors["reader.table.bias"]
    assert list(part_tensors(network, "writer.table", tensors)) == ["weight", "bias"]
    assert part_tensors(network, "writer.out", {"writer.out.bias": tensors["reader.table.bias"]}).keys() == {"bias"}
    with pytest.raises(AttributeError):
        part_tensors(network, "nothing", tensors)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_tied_parameter_is_one_entry_that_all_its_layers_see(frozen: bool) -> None:
    network = prepare(Tied(frozen)).double()
    tensors = {n: v for n, v in model_tree(network).items() if isinstance(v, Tensor)}
    assert ("into.weight" in tensors) != frozen
    assert "head.weight" not in tensors
    changed = torch.full((4, 6), 0.5, dtype=torch.float64)
    x = torch.ones(2, 6, dtype=torch.float64)
    expected = copy.deepcopy(network)
    with torch.no_grad():
        expected.into.weight.copy_(changed)  # type: ignore[union-attr,operator]
    for name in ("into.weight", "head.weight"):
        assert torch.equal(call(network, {**tensors, name: changed}, x), expected(x))
    assert not torch.equal(network.into.weight, changed)  # type: ignore[union-attr]


# ------------------------------------------------------------------- copies


def half_frozen() -> SmallNetwork:
    network = SmallNetwork()
    network.body.requires_grad_(False)
    return network


def places(module: nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items()}


def test_copies_share_frozen_parameters_and_nothing_else() -> None:
    network = half_frozen()
    frozen = {"body.0.weight", "body.1.weight", "body.1.bias"}
    for copied in (copy_network(network), copy_network(copy_network(network)), copy_network(network, "cpu")):
        before, after = places(network), places(copied)
        assert {name for name in before if before[name] == after[name]} == frozen
        assert_same(dict(copied.state_dict()), dict(network.state_dict()))
        assert {n for n, p in copied.named_parameters() if not p.requires_grad} == frozen
    assert {name for name, place in places(prepare(network)).items() if place == places(network)[name]} == frozen


def test_tied_parameters_stay_tied_in_a_copy() -> None:
    for copied in (copy_network(Tied()), copy_network(Tied(), "cpu")):
        assert copied.head.weight is copied.into.weight
    aliased = copy_network(Aliased())
    assert aliased.head is aliased.classifier


def test_a_copy_for_another_device_leaves_the_network_where_it_is() -> None:
    network = half_frozen()
    copied = copy_network(network, "meta")
    assert {value.device.type for value in copied.state_dict().values()} == {"meta"}
    assert {value.device.type for value in network.state_dict().values()} == {"cpu"}


def test_a_cohort_on_a_copy_trains_alike() -> None:
    trained = []
    for copies in (0, 2):
        cohort = make_cohort(
            half_frozen().double(), gaussian_data(dtype=torch.float64), training=Training(lr=0.1, batch_size=8)
        )
        for _ in range(copies):
            cohort.module = copy_network(cohort.module)
        params = cohort.assemble(cohort.template)
        cohort.fit(params, cross_entropy)
        trained.append({name: params[name] for name in cohort.names("all")})
    assert trained[0].keys() == trained[1].keys() == set(state_names(half_frozen()))
    assert_same(trained[1], trained[0])
    assert (trained[0]["head.weight"] - half_frozen().head.weight).abs().amax((1, 2)).min() > 1e-3


class Twice(nn.Module):
    """One dropout layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.second(self.drop(self.first(x)))))
        return out


def test_each_use_of_a_dropout_layer_is_a_draw() -> None:
    module, x = prepare(nn.Dropout(0.5)).train(), torch.ones(20, 50)
    masks = []
    for key in (torch.tensor(7), torch.tensor(7)):  # two calls of a network in one step, twice
        network = Network(module, {}, key=key)
        masks.append([network(x), network(x)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert 0.4 < float((masks[0][0] == masks[0][1]).double().mean()) < 0.6
    assert torch.equal(masks[0][0], mask(module, x, 7))


def test_two_views_of_a_batch_differ_alike_in_any_cohort() -> None:
    def consistency(network: Network, batch: Batch) -> Tensor:
        away = (network(batch.x) - network(batch.x)).square().sum(1)
        return cross_entropy(network, batch) + batch.mean(away)

    data, network = gaussian_data(dtype=torch.float64), Twice().double()
    together = make_cohort(network, data, training=Training(lr=0.1, batch_size=8))
    params = together.assemble(together.template)
    together.fit(params, consistency)
    plain = together.assemble(together.template)
    make_cohort(network, data, training=together.training).fit(plain, cross_entropy)
    assert not torch.allclose(params["first.weight"], plain["first.weight"])
    for row, client in enumerate(together.clients):
        alone = make_cohort(network, data, [client], training=together.training)
        expected = alone.assemble(alone.template)
        alone.fit(expected, consistency)
        assert_same(params, {n: expected[n][0] for n in alone.names("all")}, row)


class Checkpointed(nn.Module):
    def __init__(self, inside: bool, uses: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
        self.head, self.inside, self.uses = nn.Linear(6, 4), inside, uses

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.uses):
            x = checkpoint(self.body, x, use_reentrant=False) if self.inside else self.body(x)
        out: Tensor = self.head(x)
        return out


def test_a_checkpoint_computes_the_same_mask_again() -> None:
    data = gaussian_data(dtype=torch.float64)
    trained = []
    for inside in (True, False):
        torch.manual_seed(0)
        cohort = make_cohort(Checkpointed(inside).double(), data, [0], training=Training(lr=0.1, batch_size=8))
        params = cohort.assemble(cohort.template)
        cohort.fit(params, cross_entropy)
        trained.append(params)
    assert_same(trained[0], {n: trained[1][n] for n in cohort.names("all")})
    cohort = make_cohort(Checkpointed(True, uses=2).double(), data, [0], training=Training(lr=0.1, batch_size=8))
    with pytest.raises(RuntimeError, match="a dropout layer that a network uses several times cannot be checkpointed"):
        cohort.fit(cohort.assemble(cohort.template), cross_entropy)
