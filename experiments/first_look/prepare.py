"""Make the files of this study: a share of MNIST, and PFLlib's 20 clients in it.

    python experiments/first_look/prepare.py MNIST PARTITIONS OUT [--share 0.1]

MNIST is an .npz file with ``x`` ``[70000, 28, 28]`` uint8 and ``labels`` ``[70000]``, the official training part first;
PARTITIONS one with PFLlib's ``mnist_dir0.1_20__idx`` (positions) and ``mnist_dir0.1_20__n`` ``[20, 2]`` (training and
test samples of each client). Of each list every ``1/share``-th position is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

NAME = "mnist_dir0.1_20"


def main() -> None:
    """Write ``mnist.npz`` and ``clients.npz``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path)
    parser.add_argument("partitions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    with np.load(options.mnist, allow_pickle=False) as file:
        x, y = file["x"], file["labels"].astype(np.int64)
    with np.load(options.partitions, allow_pickle=False) as file:
        positions, sizes = file[f"{NAME}__idx"].astype(np.int64), file[f"{NAME}__n"]
    step = round(1 / options.share)
    lists = [samples[::step] for samples in np.split(positions, np.cumsum(sizes.ravel())[:-1])]
    used = np.sort(np.concatenate(lists))
    place = np.full(len(y), -1)
    place[used] = np.arange(len(used))
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / "mnist.npz", x=x[used], y=y[used])
    named = {
        f"{part}_{k // 2}": place[samples] for k, samples in enumerate(lists) for part in [("train", "test")[k % 2]]
    }
    np.savez_compressed(options.out / "clients.npz", **named)
    counts = [len(samples) for samples in lists]
    print(f"{len(used)} samples; training {sum(counts[::2])} in {counts[::2]}, test {sum(counts[1::2])}")


if __name__ == "__main__":
    main()
