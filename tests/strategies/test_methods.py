"""Each method's own update against a plain loop over clients and batches, written from the paper."""

from __future__ import annotations

import pytest
import torch

from fedpers.cohort import Training
from fedpers.errors import ConfigError
from fedpers.randomness import generator
from fedpers.strategies import PerFedAvgUpdate
from tests.cohort.helpers import assert_same
from tests.problems import SmallNetwork, gaussian_data
from tests.strategies.helpers import (
    DATA,
    NETWORK,
    SEED,
    Values,
    average,
    copied,
    drawn,
    initial,
    loss_of,
    passes,
    run,
    sgd,
    sizes,
    slopes,
    weights_of,
)

CLIENTS = range(DATA.num_clients)
BUFFERS = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
HEAD = {"head.weight", "head.bias"}
NORM = {name for name in NETWORK.state_dict() if name.startswith("body.1.")}


def under(role: str, state: Values) -> Values:
    return {name.removeprefix(f"{role}/"): value for name, value in state.items() if name.startswith(f"{role}/")}


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedavg_averages_parameters_and_buffers(weighting: str) -> None:
    result = run("fedavg", {"weighting": weighting}, fraction=0.5)
    server = initial()
    for r in (1, 2, 3):
        chosen = drawn(r, 0.5)
        assert len(chosen) == 2
        parts = []
        for client in chosen:
            parts.append(copied(server))
            sgd(parts[-1], passes(client, 2, r))
        server = average(parts, sizes(chosen) if weighting == "samples" else [1.0] * len(chosen))
    assert_same(result.arrays, server)
    assert float(server["body.1.num_batches_tracked"]) > 0
    for values in result.predictors():
        assert_same(values, server)


def test_local_keeps_everything() -> None:
    result = run("local", fraction=0.5)
    networks = [initial() for _ in CLIENTS]
    for r in (1, 2, 3):
        for client in drawn(r, 0.5):
            sgd(networks[client], passes(client, 2, r))
    assert result.arrays == {}
    assert result.strategy.report.bytes_down == result.strategy.report.bytes_up == 0
    for client, values in enumerate(result.predictors()):
        assert_same(values, networks[client])


def test_fedavg_ft_adapts_before_it_predicts_and_forgets() -> None:
    result = run("fedavg_ft", {"finetune_epochs": 2}, rounds=2)
    assert_same(result.arrays, run("fedavg", rounds=2).arrays)
    for client, values in enumerate(result.predictors()):
        adapted = copied(result.arrays)
        sgd(adapted, passes(client, 2, 2, purpose="finetune"))
        assert_same(values, adapted)
        assert result.state(client) == {}


def test_fedprox_pulls_towards_the_received_network() -> None:
    result = run("fedprox", {"mu": 0.6}, rounds=2)
    server = initial()
    for r in (1, 2):
        parts = []
        for client in CLIENTS:
            parts.append(copied(server))
            sgd(parts[-1], passes(client, 2, r), add=lambda n, v, w=server: 0.6 * (v - w[n]))
        server = average(parts, sizes(CLIENTS))
    assert_same(result.arrays, server)


def test_scaffold_with_server_lr_and_partial_participation() -> None:
    result = run("scaffold", {"server_lr": 0.7}, rounds=4, fraction=0.5)
    server = initial()
    names = weights_of()
    common = {n: torch.zeros_like(server[n]) for n in names}
    controls = [copied(common) for _ in CLIENTS]
    for r in range(1, 5):
        chosen = drawn(r, 0.5)
        parts, changes = [], []
        for client in chosen:
            values = copied(server)
            control = controls[client]
            sgd(values, passes(client, 2, r), add=lambda n, v, k=control, c=common: c[n] - k[n])
            steps = 2 * -(-len(DATA.train[client]) // 5)
            new = {n: control[n] - common[n] + (server[n] - values[n]) / (steps * 0.1) for n in names}
            changes.append({n: new[n] - control[n] for n in names})
            controls[client] = new
            parts.append(values)
        mean = average(parts, [1.0] * len(chosen))
        server = {n: server[n] + 0.7 * (mean[n] - server[n]) if n in names else mean[n] for n in server}
        common = {n: common[n] + sum(c[n] for c in changes) / DATA.num_clients for n in names}
    assert_same(result.arrays, server)
    assert_same(result.strategy.state["control"], common)
    for client in CLIENTS:
        assert_same(under("control", result.state(client)), controls[client])


@pytest.mark.parametrize(
    ("method", "personal", "weighted"),
    [("fedper", HEAD, True), ("lg_fedavg", set(NETWORK.state_dict()) - HEAD, True), ("fedbn", NORM, False)],
    ids=["fedper", "lg_fedavg", "fedbn"],
)
def test_all_but_the_personal_entries_is_shared(method: str, personal: set[str], weighted: bool) -> None:
    result = run(method, fraction=0.75)
    server = {n: v for n, v in initial().items() if n not in personal}
    states = [{n: v for n, v in initial().items() if n in personal} for _ in CLIENTS]
    for r in (1, 2, 3):
        chosen = drawn(r, 0.75)
        parts = []
        for client in chosen:
            values = {**copied(server), **copied(states[client])}
            sgd(values, passes(client, 2, r))
            states[client] = {n: values[n] for n in personal}
            parts.append({n: values[n] for n in server})
        server = average(parts, sizes(chosen) if weighted else [1.0] * len(chosen))
    assert result.arrays.keys() == server.keys()
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        assert under("model", result.state(client)).keys() == personal
        assert_same(values, {**server, **states[client]})


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_fedrep_trains_the_head_first_and_averages_bodies(weighting: str) -> None:
    options = {"head_epochs": 3, "body_epochs": 1, **({} if weighting == "uniform" else {"weighting": weighting})}
    result = run("fedrep", options, rounds=2)
    assert result.strategy.weighting == weighting
    body = {n: v for n, v in initial().items() if n not in HEAD}
    heads = [{n: v for n, v in initial().items() if n in HEAD} for _ in CLIENTS]
    for r in (1, 2):
        parts = []
        for client in CLIENTS:
            values = {**copied(body), **heads[client]}
            sgd(values, passes(client, 3, r), names=sorted(HEAD))
            sgd(values, passes(client, 1, r, first=3), names=sorted(set(weights_of()) - HEAD))
            heads[client] = {n: values[n] for n in HEAD}
            parts.append({n: values[n] for n in body})
        body = average(parts, sizes(CLIENTS) if weighting == "samples" else [1.0] * len(parts))
    assert_same(result.arrays, body)
    assert result.arrays.keys() >= BUFFERS
    for client, values in enumerate(result.predictors()):
        assert_same(values, {**body, **heads[client]})


@pytest.mark.parametrize("finetune", ["all", "head"])
def test_fedbabu_trains_bodies_under_the_initial_head_and_fine_tunes(finetune: str) -> None:
    result = run("fedbabu", {"finetune_epochs": 3, "finetune": finetune}, rounds=2, fraction=0.5)
    head = {n: v for n, v in initial().items() if n in HEAD}
    body = {n: v for n, v in initial().items() if n not in HEAD}
    for r in (1, 2):
        parts = []
        for client in drawn(r, 0.5):
            values = {**copied(body), **head}
            sgd(values, passes(client, 2, r), names=sorted(set(weights_of()) - HEAD))
            parts.append({n: values[n] for n in body})
        body = average(parts, sizes(drawn(r, 0.5)))
    assert result.arrays.keys() == body.keys()
    assert_same(result.arrays, body)
    for client, values in enumerate(result.predictors()):
        tuned = {**copied(body), **copied(head)}
        sgd(tuned, passes(client, 3, 2, purpose="finetune"), names=sorted(HEAD) if finetune == "head" else None)
        assert_same(values, tuned)
        assert result.state(client) == {}


def test_ditto_ties_an_own_network_to_the_received_one() -> None:
    result = run("ditto", {"mu": 0.4, "personal_epochs": 3}, fraction=0.25)
    server = initial()
    networks: dict[int, Values] = {}
    for r in (1, 2, 3):
        parts = []
        for client in drawn(r, 0.25):
            parts.append(copied(server))
            sgd(parts[-1], passes(client, 2, r))
            networks.setdefault(client, copied(server))  # which starts from the first network it receives
            sgd(networks[client], passes(client, 3, r, first=2), add=lambda n, v, w=server: 0.4 * (v - w[n]))
        server = average(parts, [1.0] * len(parts))
    assert_same(result.arrays, server)
    assert len(networks) < len(CLIENTS)
    for client, values in enumerate(result.predictors()):
        assert_same(values, networks.get(client, server))  # buffers too are the client's own


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_pfedme_on_moreau_envelopes(beta: float) -> None:
    result = run("pfedme", {"lam": 2.0, "inner_steps": 3, "personal_lr": 0.05, "beta": beta}, fraction=0.25)
    names = weights_of()
    server = initial()
    thetas: dict[int, Values] = {}
    for r in (1, 2, 3):
        parts = []
        for client in drawn(r, 0.25):
            w, theta = copied(server), copied(server)
            for x, y in passes(client, 2, r):
                for _ in range(3):
                    at = slopes(theta, x, y, names)
                    for n in names:
                        theta[n] -= 0.05 * (at[n] + 2.0 * (theta[n] - w[n]))
                for n in names:
                    w[n] -= 0.1 * 2.0 * (w[n] - theta[n])
            thetas[client] = theta
            parts.append({n: w[n] if n in names else theta[n] for n in w})
        mean = average(parts, [1.0] * len(parts))
        server = {n: (1 - beta) * server[n] + beta * v if v.is_floating_point() else v for n, v in mean.items()}
    assert_same(result.arrays, server)
    assert 0 < len(thetas) < DATA.num_clients  # so that the next lines see both kinds
    for client, values in enumerate(result.predictors()):
        assert_same(values, thetas.get(client, server))


def test_pfedme_moves_w_by_the_optimizer_of_the_settings() -> None:
    result = run("pfedme", {"lam": 2.0, "inner_steps": 1}, rounds=1, momentum=0.9, weight_decay=0.01)
    names = weights_of()
    parts = []
    for client in CLIENTS:
        theta = initial()
        w = {n: initial()[n].requires_grad_() for n in names}
        optimizer = torch.optim.SGD(w.values(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for x, y in passes(client, 2, 1):
            at = slopes(theta, x, y, names)
            for n in names:
                theta[n] = theta[n] - 0.1 * (at[n] + 2.0 * (theta[n] - w[n].detach()))
                w[n].grad = 2.0 * (w[n].detach() - theta[n])
            optimizer.step()
        parts.append({n: w[n].detach() if n in names else theta[n] for n in theta})
    assert_same(result.arrays, average(parts, [1.0] * len(parts)))


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_apfl_follows_the_chain_rule_through_the_mixture(adaptive: bool, momentum: float) -> None:
    options = {"alpha": 0.3, "adaptive": adaptive}
    result = run("apfl", options, rounds=2, fraction=0.75, momentum=momentum)
    names = weights_of()
    server = initial()
    networks: dict[int, Values] = {}
    alpha = [torch.tensor(0.3, dtype=torch.float64) for _ in CLIENTS]
    for r in (1, 2):
        parts = []
        for client in drawn(r, 0.75):
            w, v = copied(server), networks.setdefault(client, copied(server))
            velocity_w, velocity_v = ({n: torch.zeros_like(w[n]) for n in names} for _ in range(2))
            for x, y in passes(client, 2, r):
                share = alpha[client].clone().requires_grad_()
                free = {n: v[n].clone().requires_grad_() for n in names}
                mixture = {n: share * free[n] + (1 - share) * w[n] for n in names}
                loss_of({**v, **mixture}, x, y).backward()
                for n, slope in slopes(w, x, y, names).items():
                    velocity_w[n] = momentum * velocity_w[n] + slope
                    w[n] -= 0.1 * velocity_w[n]
                for n in names:
                    grad = free[n].grad
                    assert grad is not None
                    velocity_v[n] = momentum * velocity_v[n] + grad
                    v[n] -= 0.1 * velocity_v[n]
                if adaptive:
                    assert share.grad is not None
                    alpha[client] = (alpha[client] - 0.1 * share.grad).clamp(0, 1)
            parts.append(w)
        server = average(parts, [1.0] * len(parts))
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        a = alpha[client]
        assert float(result.state(client)["alpha"]) == pytest.approx(float(a), rel=1e-10)
        mine = networks.get(client, server)
        mixed = {n: a * mine[n] + (1 - a) * server[n] for n in names}
        assert_same(values, {**mine, **mixed})  # the mixture was trained with the own buffers
    assert (float(alpha[0]) != 0.3) == adaptive


@pytest.mark.parametrize("hessian", [True, False])
def test_perfedavg_trains_for_the_adapted_network(hessian: bool) -> None:
    network = SmallNetwork(norm=False, dropout=0.0).double()
    data = gaussian_data((20, 11, 13, 7), dtype=torch.float64)  # one batch of a single sample, and one of three
    options = {"inner_lr": 0.2, "hessian": hessian}
    result = run("perfedavg", options, rounds=2, network=network, data=data, epochs=3, lr_decay=0.5)
    names = weights_of(network)
    server = initial(network)
    for r in (1, 2):
        parts = []
        for client in CLIENTS:
            w = copied(server)
            for x, y in passes(client, 3, r, size=10, data=data):
                half = max(1, len(y) // 2)
                second = slice(half if len(y) > 1 else 0, None)
                free = {n: w[n].detach().requires_grad_() for n in names}
                inner = torch.autograd.grad(
                    loss_of(free, x[:half], y[:half], network), list(free.values()), create_graph=hessian
                )
                adapted = {n: free[n] - 0.2 * g for n, g in zip(names, inner, strict=True)}
                outer = torch.autograd.grad(loss_of(adapted, x[second], y[second], network), list(free.values()))
                w = {n: (free[n] - 0.1 * 0.5 ** (r - 1) * g).detach() for n, g in zip(names, outer, strict=True)}
            parts.append(w)
        server = average(parts, [1.0] * len(parts))
    assert_same(result.arrays, server)
    for client, values in enumerate(result.predictors()):
        drawn = generator(SEED, "adapt", client).permutation(data.samples(client, SEED, 2))
        index = torch.from_numpy(drawn[:5])
        at = slopes(server, data.x[index], data.y[index], names, network)
        assert_same(values, {n: server[n] - 0.2 * at[n] for n in names})


@pytest.mark.parametrize("size", [19, 18])  # batches of 8: pairs of 16, and halves of a remainder of 3 or 2
def test_perfedavg_with_batch_norm_refuses_halves_of_one_sample(size: int) -> None:
    data = gaussian_data((size, 16, 5), dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"training\.batch_size=8.*client 0 no batch of one sample"):
        PerFedAvgUpdate(training=Training(lr=0.1, batch_size=8)).client_app(SmallNetwork().double(), data)


@pytest.mark.slow
def test_rates_fall_over_the_rounds_for_every_part_of_a_method() -> None:
    """With a factor near 0 the second round moves nothing."""
    for method in ("fedavg", "fedrep", "ditto", "apfl", "perfedavg", "scaffold"):
        network = SmallNetwork(norm=False, dropout=0.0).double()
        one, two = (run(method, rounds=r, network=network, lr_decay=1e-13) for r in (1, 2))
        for client in CLIENTS:
            first, second = one.state(client), two.state(client)
            for name in first.keys() - {"trained"}:
                if method != "scaffold":
                    torch.testing.assert_close(second[name], first[name], rtol=1e-9, atol=1e-9)
        assert_same(two.arrays, one.arrays)
