"""What all train: data, networks and the textbook loop. It needs PyTorch alone, since it runs in others' environments.

1,000 clients with 50 pictures 3x32x32 each, 50 clients a round, one pass in batches of 10, SGD, no evaluation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

CLIENTS, SAMPLES, SHAPE, CLASSES, BATCH, LR = 1000, 50, (3, 32, 32), 10, 10, 0.05
SAMPLED = 50
UNTIMED = 2  # rounds at the start


def pictures(samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures ``[CLIENTS, samples, 3, 32, 32]`` and labels ``[CLIENTS, samples]``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS, samples, *SHAPE, generator=generator)
    return x, torch.randint(CLASSES, (CLIENTS, samples), generator=generator)


def network(cnn: bool) -> nn.Sequential:
    """An MLP 3072-64-10, or the convolutional network of PFLlib and of Flower's examples."""
    torch.manual_seed(0)
    if not cnn:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    first = (nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(1600, 512), nn.ReLU(), nn.Linear(512, CLASSES))


def train_client(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """One pass of SGD over a client's samples, in random order."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for rows in torch.randperm(len(x)).to(x.device).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


class Textbook:
    """One client after the other, and a running mean of their state dicts."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, cnn: bool, device: str) -> None:
        self.x, self.y = x.to(device), y.to(device)
        self.model = network(cnn).to(device)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}

    def round(self, number: int) -> None:
        """Train the sampled clients and average."""
        mean = {name: torch.zeros_like(value) for name, value in self.state.items()}
        for client in torch.randperm(CLIENTS)[:SAMPLED].tolist():
            self.model.load_state_dict(self.state)
            train_client(self.model, self.x[client], self.y[client])
            for name, value in self.model.state_dict().items():
                mean[name] += value / SAMPLED
        self.state = mean

    def close(self) -> None:
        """Nothing is held."""


def timed(play: Callable[[int], object], rounds: int, device: str) -> list[float]:
    """Seconds of each of `rounds` rounds, after a few that are not timed."""
    times = []
    for number in range(1, UNTIMED + rounds + 1):
        start = time.perf_counter()
        play(number)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[UNTIMED:]


def options(description: str | None) -> argparse.ArgumentParser:
    """Parser of what every program here takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cnn", action="store_true", help="a convolutional network instead of the MLP")
    parser.add_argument("--rounds", type=int, default=15, help="that are timed, in each turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def report(times: list[float]) -> None:
    """Print what the program that started this one reads, as the last line."""
    print(json.dumps(times), flush=True)
