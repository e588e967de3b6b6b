"""pFedHN: a hypernetwork on the server generates the network of each client, and learns from how clients change it.

A. Shamsian, A. Navon, E. Fetaya, G. Chechik, Personalized Federated Learning using Hypernetworks, ICML 2021,
arXiv:2103.04628 (Algorithm 1). With an embedding v_i of each client and the hypernetwork h(.; phi), an MLP under a
linear layer for each entry t of the clients' network,

    theta_i,t = b_t + W_t MLP(v_i)                                            on the server, sent
    theta~_i  <- E passes of SGD on f_i, from theta_i                         on the client
    D_i       = theta~_i - theta_i                                            sent back
    phi <- phi + server_lr * mean_i (dtheta_i/dphi)^T D_i                     phi = (MLP, all W_t, all b_t)
    v_i <- v_i + server_lr * (dtheta_i/dv_i)^T D_i                            by client i alone

    prediction: theta_i as generated, without local training

Shared: nothing is averaged; as many numbers as a network has go down and come up. Personal: buffers, such as BatchNorm
statistics, which are not generated; with ``local_head`` (pFedHN-PC) also the head, trained together with the rest.

The paper draws one client a round; so does ``fraction`` of one client. With more, phi takes one step on the mean over
them, and each v_i one on its own direction, neither divided nor weighted. Values are drawn as PyTorch's layers draw
them, as in the authors' code, but the b_t are the initial network, near which all clients start.

What the authors' code adds to the paper's plain step are options: momentum 0.9 (at rate 0.01, about the plain step at
0.1) or Adam, weight decay, a limit of the norm (50), a rate of the embeddings. As there, an embedding whose client did
not train has the direction 0: momentum, decay and Adam move it too. Its Adam knows neither decay nor that rate, this
one does. Every local step of it sees the first batch of a new order (in place of passes), and the optimizer of a local
head keeps its momentum from visit to visit, where optimizers of this project start anew.

A client that never trains gets the network of the mean embedding. To adapt, it fits one of its own from there:
``adapt_rounds`` times its network is generated and trained, and v takes the step above; all else stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import flwr.app as flower
import torch
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpers.cohort import Cohort, Collect, Records, Reply, Selection, Tree, entries, leaves, select, tree
from fedpers.cohort.fold import REPLIES
from fedpers.cohort.tree import expand_rows
from fedpers.identity import ADAPTING
from fedpers.randomness import generator
from fedpers.records import ARRAYS
from fedpers.server.collect import schema_of, validated_reply
from fedpers.server.tools import ClientTable, ServerOptimizer
from fedpers.strategies.base import LocalUpdate, PersonalizedStrategy, Received, Weighting, method

HYPERNETWORK, EMBEDDINGS, MOMENTS = "hypernetwork", "embeddings", "moments"
"""Roles in the server's state; its arrays are the b_t."""


def generate(phi: Mapping[str, Tensor], embeddings: Tensor) -> dict[str, Tensor]:
    """Networks ``[n, ...]`` of clients with embeddings ``[n, e]``, by name.

    `phi` holds ``mlp.I.weight`` and ``mlp.I.bias`` of layer I, ``weight.NAME`` ``[..., h]``, ``bias.NAME`` ``[...]``.
    """
    features = embeddings
    for i in range(sum(name.startswith("mlp.") for name in phi) // 2):
        features = F.linear(features.relu() if i else features, phi[f"mlp.{i}.weight"], phi[f"mlp.{i}.bias"])
    names = [name.removeprefix("bias.") for name in phi if name.startswith("bias.")]
    return {n: phi[f"bias.{n}"] + torch.tensordot(features, phi[f"weight.{n}"], ([1], [-1])) for n in names}


def follow(
    phi: Mapping[str, Tensor], embeddings: Tensor, changes: Mapping[str, Tensor], weights: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Directions in which generated networks follow changes D_i ``[n, ...]``, with `weights` ``[n]`` > 0.

    For phi ``sum_i weight_i (dtheta_i/dphi)^T D_i``, for embeddings ``[n, e]`` ``(dtheta_i/dv_i)^T D_i``.
    """
    inputs = {name: value.detach().requires_grad_() for name, value in phi.items()}
    rows = embeddings.detach().requires_grad_()
    with torch.enable_grad():
        networks = generate(inputs, rows)
        products = [(networks[name] * change).flatten(1).sum(1) for name, change in changes.items()]
        total = (torch.stack(products).sum(0) * weights).sum()
    *common, of_embeddings = torch.autograd.grad(total, [*inputs.values(), rows])
    return dict(zip(inputs, common, strict=True)), of_embeddings / expand_rows(weights, rows)


@dataclass(kw_only=True)
class PFedHNUpdate(LocalUpdate):
    """Train the generated network; answer with how it changed."""

    shared = "parameters"
    personal = "buffers"
    settles_parts = True
    local_head: Annotated[bool, Field(description="heads stay with the clients (pFedHN-PC)")] = False

    @property
    def _parts(self) -> tuple[Selection, Selection]:
        """What is generated, and what stays."""
        return (("parameters", "-head"), ("head", "buffers")) if self.local_head else (self.shared, self.personal)

    def initial_state(self, template: Tree, module: nn.Module) -> Tree:
        """What is not generated."""
        return tree({"model": template.select(*names)} if (names := select(module, self._parts[1])) else {})

    def initial_arrays(self, template: Tree, module: nn.Module) -> Tree:
        """The generated entries as the network comes."""
        return template.select(*select(module, self._parts[0]))

    def train(self, cohort: Cohort, received: Received, config: Mapping[str, Any]) -> Reply:
        """Train the whole network."""
        generated, kept = self._parts
        params = cohort.assemble(received[ARRAYS])
        before = {name: params[name].clone() for name in cohort.names(generated)}
        cohort.fit(params, self.loss)
        reply = cohort.reply(params, share=generated, keep=kept)
        changes = tree({name: params[name] - value for name, value in before.items()}, cohort.size)
        return Reply({ARRAYS: changes}, reply.state, reply.metrics)


@method("pfedhn")
@dataclass(kw_only=True)
class PFedHN(PersonalizedStrategy):
    """Server with a hypernetwork and an embedding of each client."""

    update = PFedHNUpdate
    weighting: Weighting = "uniform"
    embedding_dim: Annotated[
        int | None, Field(ge=1, description="numbers in a client's embedding; null: 1 + a quarter of the clients")
    ] = None
    hidden: Annotated[int, Field(ge=1, description="width of the hypernetwork")] = 100
    hidden_layers: Annotated[int, Field(ge=0, description="of that width, after the first")] = 3
    server_optimizer: Annotated[
        Literal["sgd", "momentum", "adam", "yogi"], Field(description="of hypernetwork and embeddings")
    ] = "sgd"
    server_lr: Annotated[float, Field(gt=0, description="of the hypernetwork")] = 0.1
    embedding_lr: Annotated[float | None, Field(gt=0, description="of embeddings; null: strategy.server_lr")] = None
    server_decay: Annotated[float, Field(ge=0, description="weight decay of hypernetwork and embeddings")] = 0.0
    server_clip: Annotated[float | None, Field(gt=0, description="largest norm of all directions together")] = None
    adapt_rounds: Annotated[int, Field(ge=1, description="steps of the embedding of a client that adapts")] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._optimizer = ServerOptimizer(name=self.server_optimizer, lr=self.server_lr)
        self._embedding_optimizer = ServerOptimizer(name=self.server_optimizer, lr=self.embedding_lr or self.server_lr)

    def send(self, round: int, arrays: Tree, clients: list[int]) -> Sequence[Records]:
        """Generate each client's network."""
        return self._networks(arrays, self._rows(arrays, clients)["value"])

    def fold(self) -> Collect:
        """Keep all changes: what they say of the hypernetwork is worked out on the server."""
        return Collect()

    def combine(self, arrays: Tree, means: Mapping[str, Tree], clients: list[int]) -> Tree:
        """Move hypernetwork and embeddings."""
        phi, table = self._phi(arrays), self._embeddings(arrays)
        everybody, rows = table.clients, table.rows(table.clients)
        weights = means[REPLIES]["weight"].to(rows["value"])
        common, toward = follow(phi, table.rows(clients)["value"], entries(means[ARRAYS]), weights / weights.sum())
        places = torch.tensor([everybody.index(client) for client in clients], device=toward.device)
        of_rows = torch.zeros_like(rows["value"]).index_copy(0, places, toward)
        if self.server_clip is not None:
            norm = torch.stack([value.norm() for value in (*common.values(), of_rows)]).norm()
            factor = float((self.server_clip / (norm + 1e-6)).clamp(max=1))
            common, of_rows = {name: factor * value for name, value in common.items()}, factor * of_rows
        decayed = tree({name: value - self.server_decay * phi[name] for name, value in common.items()})
        steps, moments = self._optimizer.step_tree(decayed, self.state.get(MOMENTS))
        if leaves(moments):
            self.state[MOMENTS] = moments
        table.put(everybody, self._moved(rows, of_rows - self.server_decay * rows["value"]))
        self.state[EMBEDDINGS] = table.values
        new = {name: value + steps[name] for name, value in phi.items()}
        self.state[HYPERNETWORK] = tree({n: v for n, v in new.items() if not n.startswith("bias.")})
        return tree({name: new[f"bias.{name}"] for name in entries(arrays)})

    def _moved(self, rows: Mapping[str, Tensor], directions: Tensor) -> dict[str, Tensor]:
        """Embeddings (and their moments) after a step."""
        step, moments = self._embedding_optimizer.step(directions, rows)
        return {"value": rows["value"] + step, **moments}

    def _networks(self, arrays: Tree, embeddings: Tensor) -> list[Records]:
        """Records for clients with these embeddings ``[n, e]``."""
        networks = generate(self._phi(arrays), embeddings)
        return [{ARRAYS: tree({name: value[i] for name, value in networks.items()})} for i in range(len(embeddings))]

    def _phi(self, arrays: Tree) -> dict[str, Tensor]:
        """The hypernetwork, drawn when it is first needed; its b_t are the server's arrays."""
        biases = dict(sorted(entries(arrays).items()))
        if HYPERNETWORK not in self.state:
            like = next(iter(biases.values()))
            width = 1 + self.num_trainable // 4 if self.embedding_dim is None else self.embedding_dim
            shapes: dict[str, tuple[int, ...]] = {}
            for i in range(self.hidden_layers + 1):
                shapes[f"mlp.{i}.weight"] = (self.hidden, self.hidden if i else width)
                shapes[f"mlp.{i}.bias"] = (self.hidden,)
            shapes.update({f"weight.{name}": (*value.shape, self.hidden) for name, value in biases.items()})
            drawn = {}
            for index, (name, shape) in enumerate(shapes.items()):
                bound = 1 / math.sqrt(width if name.startswith("mlp.0.") else self.hidden)
                values = generator(self.seed, "hypernetwork", index).uniform(-bound, bound, shape)
                drawn[name] = torch.from_numpy(values).to(like)
            self.state[HYPERNETWORK] = tree(drawn)
        return {**entries(self.state[HYPERNETWORK]), **{f"bias.{name}": value for name, value in biases.items()}}

    def _embeddings(self, arrays: Tree) -> ClientTable:
        """Embeddings of all clients that may train, drawn when they are first needed."""
        like = self._phi(arrays)["mlp.0.weight"]

        def first(client: int) -> dict[str, Tensor]:
            value = torch.from_numpy(generator(self.seed, "embedding", client).standard_normal(like.shape[1])).to(like)
            return {"value": value, **self._embedding_optimizer.moments(value)}

        table = ClientTable(first, self.state.get(EMBEDDINGS))
        table.add(self.trainable_clients)
        self.state[EMBEDDINGS] = table.values
        return table

    def _rows(self, arrays: Tree, clients: list[int]) -> dict[str, Tensor]:
        """What is known of `clients`; those that never train have the mean of all that do, and no moments."""
        table = self._embeddings(arrays)
        mean = table.mean()["value"]
        new = {"value": mean, **self._embedding_optimizer.moments(mean)}
        rows = [new if c in self.unseen else {n: v[0] for n, v in table.rows([c]).items()} for c in clients]
        return {name: torch.stack([row[name].to(value.device) for row in rows]) for name, value in new.items()}

    def adapt(self, round: int, arrays: Tree, grid: Grid, clients: list[int]) -> tuple[list[int], list[Records]]:
        """Fit an embedding to each client that never trained; all else stays as it is."""
        able = self.prepare(round, arrays, clients, grid, "evaluate")
        rows = self._rows(arrays, able) if able else {}
        for r in range(self.adapt_rounds if able else 0):
            config = flower.ConfigRecord({"server-round": round + r, ADAPTING: True})
            sent = self._networks(arrays, rows["value"])
            results, _ = self.exchange.call(grid, flower.MessageType.TRAIN, sent, config, able)
            replies = Collect()
            for client in able:
                try:
                    replies.add(validated_reply(results[client], schema_of(ARRAYS, entries(arrays)))[0], 1.0, client)
                except ValueError as problem:
                    self.leave_out(client, f"it did not adapt: {problem}", "evaluate")
            rows = {name: value[[client in replies.kept for client in able]] for name, value in rows.items()}
            able = replies.clients
            if not able:
                break
            changes = {name: value.to(arrays[name]) for name, value in entries(replies.stacked()[ARRAYS]).items()}
            weights = rows["value"].new_ones(len(able))
            rows = self._moved(rows, follow(self._phi(arrays), rows["value"], changes, weights)[1])
        return able, self._networks(arrays, rows["value"]) if able else []
