"""What all train: data, networks and the textbook loop. It needs PyTorch alone, since it runs in others' environments.

Batches of 10, one pass, SGD. Pictures are random: only their number and shape matter.

- ``mlp``, ``cnn``: 1,000 clients with 50 pictures 3x32x32 each, 50 clients a round, no evaluation;
- ``pfllib_mnist``: what PFLlib's users begin with: 70,000 pictures 1x28x28 dealt to 20 clients by Dirichlet(0.1), a
  quarter of each client's for testing, its CNN, all clients in each round, all test pictures scored after it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, BATCH, LR = 10, 10, 0.05
WITHOUT_EVALUATION = ("mlp", "cnn")
PROBLEMS = (*WITHOUT_EVALUATION, "pfllib_mnist")
Part = tuple[Tensor, Tensor]
"""Pictures ``[n, C, H, W]`` and labels ``[n]``."""


@dataclass
class Problem:
    """Clients' samples and what is done with them.

    Attributes
    ----------
    name : str
        Of :data:`PROBLEMS`.
    train, test : list of Part
        By client.
    sampled : int
        Clients in a round.
    """

    name: str
    train: list[Part]
    test: list[Part]
    sampled: int

    @property
    def evaluated(self) -> bool:
        """Whether all test parts are scored after each round."""
        return self.name not in WITHOUT_EVALUATION

    @property
    def untimed(self) -> int:
        """Rounds at the start that are not timed."""
        return 1 if self.evaluated else 2

    def network(self) -> nn.Sequential:
        """An MLP 3072-64-10, or the convolutional network of PFLlib and of Flower's examples."""
        torch.manual_seed(0)
        if self.name == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        channels, features = (1, 1024) if self.name == "pfllib_mnist" else (3, 1600)
        first = (nn.Conv2d(channels, 32, 5), nn.ReLU(), nn.MaxPool2d(2))
        second = (nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(
            *first, *second, nn.Flatten(), nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, CLASSES)
        )


def problem(name: str) -> Problem:
    """One of :data:`PROBLEMS`, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    if name in WITHOUT_EVALUATION:
        x = torch.randn(1000, 52, 3, 32, 32, generator=generator)
        y = torch.randint(CLASSES, x.shape[:2], generator=generator)
        train = [(x[k, :50], y[k, :50]) for k in range(1000)]
        return Problem(name, train, [(x[k, 50:], y[k, 50:]) for k in range(1000)], 50)
    lists = dirichlet_lists(torch.arange(70_000) % CLASSES, 20, generator)
    x = torch.randn(70_000, 1, 28, 28, generator=generator)
    y = torch.arange(70_000) % CLASSES
    parts = [rows.tensor_split([len(rows) * 3 // 4]) for rows in lists]
    return Problem(name, *([(x[rows], y[rows]) for rows in column] for column in zip(*parts, strict=True)), 20)


def dirichlet_lists(y: Tensor, clients: int, generator: torch.Generator, alpha: float = 0.1) -> list[Tensor]:
    """Positions of each client's samples, 40 at least: of each class it gets a share drawn from Dirichlet(alpha).

    As in PFLlib, a client that has reached the mean number of samples gets no more of the next class.
    """
    while True:
        lists: list[list[Tensor]] = [[] for _ in range(clients)]
        for label in range(CLASSES):
            rows = (y == label).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            shares = torch._sample_dirichlet(torch.full((clients,), alpha), generator)
            shares *= torch.tensor([sum(map(len, chosen)) < len(y) / clients for chosen in lists])
            cuts = (shares.cumsum(0) / shares.sum() * len(rows)).long()[:-1]
            for chosen, part in zip(lists, rows.tensor_split(cuts), strict=True):
                chosen.append(part)
        merged = [torch.cat(chosen) for chosen in lists]
        if min(map(len, merged)) >= 40:
            return [rows[torch.randperm(len(rows), generator=generator)] for rows in merged]


def train_client(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """One pass of SGD over a client's samples, in random order."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for rows in torch.randperm(len(x)).to(x.device).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


class Textbook:
    """One client after the other, and a mean of their state dicts weighted by samples."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.train, self.test = ([(x.to(device), y.to(device)) for x, y in p] for p in (problem.train, problem.test))
        self.problem = problem
        self.model = problem.network().to(device)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}

    def round(self, number: int) -> None:
        """Train the sampled clients and average; score all test parts if the problem says so."""
        mean = {name: torch.zeros_like(value) for name, value in self.state.items()}
        sampled = torch.randperm(len(self.train))[: self.problem.sampled].tolist()
        total = sum(len(self.train[client][1]) for client in sampled)
        for client in sampled:
            x, y = self.train[client]
            self.model.load_state_dict(self.state)
            train_client(self.model, x, y)
            for name, value in self.model.state_dict().items():
                mean[name] += value * (len(y) / total)
        self.state = mean
        if self.problem.evaluated:
            self.model.load_state_dict(self.state)
            with torch.no_grad():
                right = [(self.model(x).argmax(1) == y).sum() for x, y in self.test]
            int(sum(right))

    def close(self) -> None:
        """Nothing is held."""


def timed(play: Callable[[int], object], untimed: int, rounds: int, device: str) -> list[float]:
    """Seconds of each of `rounds` rounds, after `untimed` others."""
    times = []
    for number in range(1, untimed + rounds + 1):
        start = time.perf_counter()
        play(number)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[untimed:]


def options(description: str | None, problems: tuple[str, ...] = PROBLEMS) -> argparse.ArgumentParser:
    """Parser of what every program here takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default="mlp", choices=problems)
    parser.add_argument("--rounds", type=int, default=15, help="that are timed, in each turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def report(times: list[float]) -> None:
    """Print what the program that started this one reads, as the last line."""
    print(json.dumps(times), flush=True)
