"""How each method of PFLlib is run and compared: its settings, and what only its traces hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from fedpers.cohort import Cohort, Records, Reply, Tree, View, entries, tree
from fedpers.data.federated import FederatedData
from fedpers.records import ARRAYS
from fedpers.runtime.local import LocalGrid
from fedpers.strategies import PersonalizedStrategy
from tests.traces import Comparison

if TYPE_CHECKING:
    from tests.traces.pfllib import Trace


class Traced(NamedTuple):
    """How a method of the traced library is run here.

    Attributes
    ----------
    folder : str
    settings : mapping
        Of the strategy, so that it does what the library does.
    options : mapping
        How hyperparameters of the library are called here.
    roles : mapping
        Where personal state of the library stands here: role of a trace -> role of the state tree.
    sent : str, optional
        Role of a trace that holds what clients send, where that is another than their network.
    adjust : callable, optional
        Changes the options, the arguments of :class:`Training` and the samples of a recorded batch, in place (a
        mapping ``{"options", "training", "chunk"}``, with the run's number of ``rounds``), where the library counts
        otherwise.
    replay : callable, optional
        Lets both halves repeat what the library drew: called with strategy, update and trace.
    compare : callable, optional
        Compares what only this method has: called with comparison, trace, strategy, grid and round (from 0) after the
        round's aggregation.
    """

    folder: str
    settings: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, str] = MappingProxyType({})
    roles: Mapping[str, str] = MappingProxyType({})
    sent: str | None = None
    adjust: Callable[[dict[str, Any]], None] | None = None
    replay: Callable[[PersonalizedStrategy, Any, Trace], None] | None = None
    compare: Callable[[Comparison, Trace, PersonalizedStrategy, LocalGrid, int], None] | None = None


def _tensors_and_percent(run: dict[str, Any]) -> None:
    """FedALA: the library counts tensors (a weight and a bias in each layer) and percent."""
    run["options"]["layers"] //= 2
    run["options"]["share"] /= 100


def _twice_a_round(run: dict[str, Any]) -> None:
    """Per-FedAvg is trained twice a round, on chunks of two batches."""
    run["training"]["epochs"] *= 2
    run["chunk"] *= 2


def _server_batches(run: dict[str, Any]) -> None:
    """FedGH's server trains in batches of the clients' size."""
    run["options"]["server_batch_size"] = run["training"]["batch_size"]


def _repeat_slices(strategy: PersonalizedStrategy, update: Any, trace: Trace) -> None:
    """Let FedALA train its weights on the recorded slices."""
    starts, draw = trace.arrays["out/client/start/ala_rand_idx"], update.sampled

    def sampled(cohort: Cohort, client: int) -> np.ndarray:
        samples = cohort.data.samples(client, cohort.seed, cohort.round)
        start = int(starts[cohort.round - 1, client])
        return samples[start : start + len(draw(cohort, client))]

    update.sampled = sampled


def _compare_finetuned(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """FedBABU: the library fine-tunes after the last round, from what each client holds then."""
    if r + 1 < trace.rounds:
        return
    app = strategy.work.app
    clients = sorted(range(trace.clients), key=lambda c: (-app.sizes[c], c))
    update = replace(app.update, finetune_epochs=trace.meta["hyper"]["fine_tuning_epochs"])
    cohort = app.cohort(clients, tree({}, len(clients)), {"server-round": trace.rounds + 1})
    held = trace.group("out/client/trained/model")
    body = tree({n: torch.from_numpy(held[n][r][clients]) for n in cohort.names(update.shared)}, len(clients))
    tuned = update.fine_tuned(cohort, update.personalize(cohort, {ARRAYS: body}, {}))
    assert isinstance(tuned, View)
    for name, values in trace.group("out/client/finetuned/model").items():
        comparison.add("finetuned model", tuned.tensors[name], values[clients])
    for client, scores in zip(clients, cohort.logits(tuned, "test", update.predict), strict=True):
        comparison.add("finetuned scores", scores, trace.arrays[f"out/eval/final/test_scores/c{client}"][0])


def _compare_private_heads(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """Fed-RoD: the library keeps private heads apart from the network."""
    assert grid.engine is not None
    kept = grid.engine.store.gather(range(trace.clients))["model"]
    for name, values in trace.group("out/client/trained/head_p").items():
        comparison.add("private heads", kept[f"private_head.{name}"], values[r])


def _over_all_rounds(run: dict[str, Any]) -> None:
    """FedPHP: the momentum grows until the last round."""
    run["options"]["ramp"] = run["rounds"] - 1


def _mentor_and_mentee(run: dict[str, Any]) -> None:
    """FedKD: the shared network has a rate of its own; what is sent grows until the last round."""
    run["training"]["groups"] = {"shared": {"lr": run["options"].pop("shared_lr")}}
    run["options"]["energy_rounds"] = run["rounds"]


def _same_projection(strategy: PersonalizedStrategy, update: Any, trace: Trace) -> None:
    """Let FedKD start from the recorded projection, which is the same for all clients."""
    weights, adapt_model = trace.arrays["in/client_init/W_h/weight"], update.adapt_model

    def adapted(*given: Any) -> tuple[nn.Module, FederatedData]:
        model, data = adapt_model(*given)
        model.projection.load_state_dict({"weight": torch.from_numpy(weights[0].copy())})
        return model, data

    update.adapt_model = adapted


def _without_scores(strategy: PersonalizedStrategy, update: Any, trace: Trace) -> None:
    """FedPHP: the library predicts between training and average, with networks that nobody keeps."""
    trace.arrays["out/eval/main/test_num"] *= 0


def _compare_drift(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """FedDyn: the server's correction."""
    for name, value in trace.group("out/server/state").items():
        comparison.add("server drift", strategy.state["drift"][name], value[r])


def _share_first_head(strategy: Any, update: Any, trace: Trace) -> None:
    """FedGH: the library's server trains the head object of client 0, on classes as they first appear in the data."""
    train, trained_head = update.train, strategy.trained_head
    heads: dict[str, torch.Tensor] = {}

    def keeping_head(cohort: Cohort, received: Records, config: Mapping[str, Any]) -> Reply:
        reply = cohort.reply

        def noting(params: Tree, **options: Any) -> Reply:
            if 0 in cohort.clients:
                row = cohort.clients.index(0)
                heads.update({name: params[name][row].clone() for name in ("head.weight", "head.bias")})
            return reply(params, **options)

        cohort.reply = noting  # type: ignore[method-assign]
        answer: Reply = train(cohort, received, config)
        return answer

    def from_first_head(arrays: Tree, features: torch.Tensor, labels: torch.Tensor) -> Tree:
        start = Tree({**entries(arrays), **heads}, batch_size=[])
        heads.clear()
        order, at = [], 0
        for client in strategy.training_clients:
            appearing = list(dict.fromkeys(trace.arrays[f"in/train_y/c{client}"].tolist()))
            order += [at + sorted(appearing).index(label) for label in appearing]
            at += len(appearing)
        head: Tree = trained_head(start, features[order], labels[order])
        return head

    update.train, strategy.trained_head = keeping_head, from_first_head


def _combine_in_library_order(strategy: Any, update: Any, trace: Trace) -> None:
    """FedPAC: weights by drawn clients go with heads by replies; unless copied, combined heads replace those before."""
    copied = trace.meta["heads_copied_before_combining"]

    def combined(heads: Mapping[str, torch.Tensor], weights: torch.Tensor) -> dict[str, torch.Tensor]:
        clients, r = strategy.training_clients, strategy.report.round - 1
        drawn, replied = (
            [clients.index(client) for client in trace.arrays[key][r]] for key in ("in/selected", "out/upload_order")
        )
        result = {name: value.clone() for name, value in heads.items()}
        for name, value in result.items():
            source = heads[name] if copied else value
            for k, client in enumerate(replied):
                value[client] = torch.tensordot(weights[drawn[k], drawn].to(value), source[replied], 1)
        strategy.last_weights = weights
        return result

    strategy.combined = combined


def _compare_heads(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """FedPAC's weights, heads and mean features."""
    clients = list(strategy.training_clients)
    weights = trace.arrays["out/extra/head_weights"][r][np.ix_(clients, clients)]
    comparison.add("head weights", strategy.last_weights, weights)  # type: ignore[attr-defined]
    heads = entries(strategy.state["heads"])
    for client, *rows in zip(heads.pop("client").tolist(), *heads.values(), strict=True):
        for name, row in zip(heads, rows, strict=True):
            comparison.add("combined head", row, trace.group("out/client/end/model")[name][r, client])
    table, theirs = strategy.state["prototypes"]["table"], trace.arrays["out/server/protos"][r]
    compare_prototypes(comparison, "server prototypes", table, theirs)


def _repeat_noise(strategy: PersonalizedStrategy, update: Any, trace: Trace) -> None:
    """Give FedCP the recorded noise, also for predictions, and the recorded initial policy and context."""
    extend, personalize = update.adapt_model, update.personalize

    def recorded(model: nn.Module, data: FederatedData, seed: int) -> tuple[nn.Module, FederatedData]:
        network, data = extend(model, data, seed)
        values = {n.removeprefix("fc."): v[0] for n, v in trace.group("in/client_init/cs").items()}
        network.policy.load_state_dict({n: torch.from_numpy(np.array(v)) for n, v in values.items()})
        network.context.copy_(torch.from_numpy(np.array(trace.arrays["in/client_init/context"][0, 0])))
        return network, data

    def noise(part: str, client: int, round: int) -> np.ndarray:
        if f"in/gumbel_{part}/c{client}" not in trace.arrays:  # a case without noise
            passes, labels = (1, "test_y") if part == "eval" else (int(trace.meta["local_epochs"]), "train_y")
            return np.zeros((passes * len(trace.arrays[f"in/{labels}/c{client}"]), 8), np.float32)
        pairs = trace.arrays[f"in/gumbel_{part}/c{client}"][round - 1].reshape(-1, 2, 8)
        return np.asarray(pairs[:, 0] - pairs[:, 1])

    class Draws:
        def __init__(self, values: np.ndarray) -> None:
            self.values, self.used = values, 0

        def logistic(self, size: tuple[int, int]) -> np.ndarray:
            self.used += size[0]
            return self.values[self.used - size[0] : self.used]

    def noisy(cohort: Cohort, received: Records, config: Mapping[str, Any]) -> View:
        rows = [torch.from_numpy(noise("eval", client, cohort.round)) for client in cohort.clients]
        return replace(personalize(cohort, received, config), given={"noise": pad_sequence(rows, batch_first=True)})

    update.adapt_model, update.personalize = recorded, noisy
    update.draws = lambda cohort, client: Draws(noise("train", client, cohort.round))


def policies_of(trace: Trace, place: str) -> dict[str, np.ndarray]:
    """FedCP's common heads and policies by our names; nothing for other methods."""
    heads, policies = trace.group(f"{place}/head_g"), trace.group(f"{place}/cs")
    by_name = {f"global_head.{n}": v for n, v in heads.items()}
    return {**by_name, **{f"policy.{n.removeprefix('fc.')}": v for n, v in policies.items()}}


def _comparepolicies_of(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """FedCP: what all clients have of policy, common head and context at the end of a round."""
    assert grid.engine is not None
    clients = list(range(trace.clients))
    sent = strategy.send(r + 2, strategy.sent_arrays, clients)
    assert not isinstance(sent, Mapping)
    for name, values in policies_of(trace, "out/client/end").items():
        comparison.add("policy", torch.stack([sent[c][ARRAYS][name] for c in clients]), values[r])
    contexts = grid.engine.store.gather(clients)["model"]["context"]
    comparison.add("context", contexts, trace.arrays["out/client/end/context"][r, :, 0])


def _compare_memories(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """FedDBE: the library keeps the clients' vectors and the mean feature apart from the network."""
    assert grid.engine is not None
    kept = grid.engine.store.gather(range(trace.clients))["model"]
    comparison.add("memories", kept["memory"], trace.arrays["out/client/trained/client_mean"][r])
    comparison.add("mean feature", strategy.state["mean"]["mean"], trace.arrays["out/extra/global_mean"])


def _compare_critical(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """FedCAC's masks and customized networks, and what they make of all clients' networks."""
    for role in ("critical", "customized"):
        table = entries(strategy.state[role])
        clients = table.pop("client").tolist()
        theirs = trace.group(f"out/client/end/{role}") or trace.group(f"out/client/trained/{role}")
        for name, value in table.items():
            if role == "critical":
                comparison.exact(role, value.int().cpu().numpy(), theirs[name][r, clients].astype(int))
            else:
                comparison.add(role, value, theirs[name][r, clients])


def _repeat_choices(strategy: Any, update: Any, trace: Trace) -> None:
    """FedFomo: the library's choice among equals is its sort's, and the last samples are held out."""
    received = trace.arrays["out/client/start/received_ids"]

    def split(cohort: Cohort, client: int) -> tuple[np.ndarray, np.ndarray]:
        samples = cohort.samples(client)
        count = update.count_held_out(len(samples))
        return samples[:-count], samples[-count:]

    strategy.choose = lambda round, client: [int(i) for i in received[round - 1, client] if np.isfinite(i) and i >= 0]
    update.split = split


def _compare_affinity(
    comparison: Comparison, trace: Trace, strategy: PersonalizedStrategy, grid: LocalGrid, r: int
) -> None:
    """FedFomo's affinities."""
    comparison.add("affinity", strategy.state["affinity"]["matrix"], trace.arrays["out/server/P"][r])


def compare_prototypes(comparison: Comparison, kind: str, table: torch.Tensor, theirs: np.ndarray) -> None:
    """A table of prototypes and which classes have one; the library's are NaN for a class without."""
    known = ~np.isnan(theirs).any(1)
    comparison.exact(f"{kind} known", table[:, -1].cpu().numpy() > 0, known)
    comparison.add(kind, table[known, :-1], theirs[known])


SAMPLES = {"weighting": "samples"}
PFLLIB = {"variant": "pfllib"}
METHODS: dict[str, Traced] = {
    "local": Traced("Local", roles={"model": "model"}),
    "fedavg": Traced("FedAvg"),
    "fedprox": Traced("FedProx", options={"mu": "mu"}),
    "scaffold": Traced("SCAFFOLD", options={"server_learning_rate": "server_lr"}, roles={"c": "control"}),
    "feddyn": Traced("FedDyn", PFLLIB, {"alpha": "alpha"}, {"old_grad": "gradient"}, compare=_compare_drift),
    "fedper": Traced("FedPer", roles={"model": "model"}),
    "lg_fedavg": Traced("LG_FedAvg", roles={"model": "model"}),
    "fedrep": Traced("FedRep", {**SAMPLES, "body_epochs": None}, {"plocal_epochs": "head_epochs"}, {"model": "model"}),
    "fedbabu": Traced(
        "FedBABU", {"finetune_epochs": 0}, {"fine_tuning_epochs": "finetune_epochs"}, compare=_compare_finetuned
    ),
    "fedrod": Traced("FedROD", compare=_compare_private_heads),
    "fedbn": Traced("FedBN", SAMPLES, roles={"model": "model"}),
    "ditto": Traced(
        "Ditto",
        {**SAMPLES, **PFLLIB},
        {"mu": "mu", "plocal_epochs": "personal_epochs"},
        {"model_per": "model"},
    ),
    "pfedme": Traced(
        "pFedMe",
        {**SAMPLES, **PFLLIB},
        {"lamda": "lam", "K": "inner_steps", "p_learning_rate": "personal_lr", "beta": "beta"},
    ),
    "perfedavg": Traced("PerAvg", SAMPLES, adjust=_twice_a_round),
    "apfl": Traced("APFL", {**SAMPLES, **PFLLIB}, {"alpha": "alpha"}, {"model_per": "model", "alpha": "alpha"}),
    "moon": Traced("MOON", PFLLIB, {"mu": "mu", "tau": "temperature"}, {"old_model": "previous"}),
    "fml": Traced("FML", PFLLIB, {"alpha": "alpha", "beta": "beta"}, {"model": "model"}, "global_model"),
    "fedntd": Traced("FedNTD", {"weighting": "uniform"}, {"beta": "beta", "tau": "temperature"}),
    "fedala": Traced(
        "FedALA",
        PFLLIB,
        {"layer_idx": "layers", "rand_percent": "share", "eta": "weight_lr"},
        {"model": "model", "ala_w": "weights"},
        adjust=_tensors_and_percent,
        replay=_repeat_slices,
    ),
    "feddbe": Traced("FedDBE", {}, {"kl_weight": "kappa", "momentum": "mu"}, compare=_compare_memories),
    "fedphp": Traced(
        "FedPHP",
        PFLLIB,
        {"mu": "momentum", "lamda": "lam"},
        {"model_p": "inherited"},
        adjust=_over_all_rounds,
        replay=_without_scores,
    ),
    "fedkd": Traced(
        "FedKD",
        PFLLIB,
        {"mentee_learning_rate": "shared_lr", "T_start": "energy_start", "T_end": "energy_end"},
        {"model": "model"},
        "upload",
        adjust=_mentor_and_mentee,
        replay=_same_projection,
    ),
    "fedproto": Traced("FedProto", PFLLIB, {"lamda": "lam"}, {"model": "model"}),
    "fedgh": Traced(
        "FedGH",
        {},
        {"server_learning_rate": "server_lr"},
        {"model": "model"},
        adjust=_server_batches,
        replay=_share_first_head,
    ),
    "fedpac": Traced(
        "FedPAC",
        PFLLIB,
        {"lamda": "lam"},
        replay=_combine_in_library_order,
        compare=_compare_heads,
    ),
    "fedcac": Traced("FedCAC", PFLLIB, {"tau": "tau", "beta": "beta"}, compare=_compare_critical),
    "fedfomo": Traced(
        "FedFomo",
        PFLLIB,
        {"M": "models"},
        {"model": "model", "old_model": "before"},
        replay=_repeat_choices,
        compare=_compare_affinity,
    ),
    "fedamp": Traced("FedAMP", PFLLIB, {"alphaK": "alpha", "sigma": "sigma", "lamda": "mu"}, {"model": "model"}),
    "fedcp": Traced(
        "FedCP", PFLLIB, {"lamda": "lam"}, {"model": "model"}, replay=_repeat_noise, compare=_comparepolicies_of
    ),
    "fedas": Traced("FedAS", PFLLIB, roles={"model": "model"}),
}
