"""Make plain files, which ``dataset=npz``, ``domains`` and ``text`` read, of a folder of packed data sets.

    python experiments/data/prepare.py PACKED OUT [NAME ...]

PACKED holds the packed files (see README.md beside this script for their form), OUT gets one file for each NAME;
without names all are made. What is written is checked against the published counts of each set, and anything else ends
the script.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Arrays = dict[str, NDArray[Any]]

MNIST_CLASSES = (6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958)
MNIST_TRAINING = 60_000
USPS_CLASSES = (1553, 1269, 929, 824, 852, 716, 834, 792, 708, 821)
OPTDIGITS_CLASSES = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
OPTDIGITS_HIGHEST = 16
HAR_CLASSES = (1722, 1544, 1406, 1777, 1906, 1944)
HAR_NAMES = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
HAR_TEST_SUBJECTS = (2, 4, 9, 10, 12, 13, 18, 20, 24)
HAR_STEPS = 128
PACS_DOMAINS = {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929}
PACS_NAMES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EVERY = 6
"""Of MNIST every sixth training picture is among the digit domains, so that it does not outweigh the others."""
FEWEST_CHARACTERS = 1_000


def expect(what: str, actual: Any, wanted: Any) -> None:
    """End the script with a sentence unless `actual` is `wanted`; arrays and sequences are compared entry by entry."""
    same = np.array_equal(np.asarray(actual), np.asarray(wanted))
    if not same:
        raise SystemExit(f"{what}: found {np.asarray(actual).tolist()}, expected {np.asarray(wanted).tolist()}.")


def read(folder: Path, name: str) -> Arrays:
    """All arrays of ``folder/name.npz``, by name; nothing is unpickled."""
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing.")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def unpacked(packed: Arrays) -> NDArray[np.uint8]:
    """Pictures uint8 ``[N, H, W, 3]`` of lossless WebP sheets, on which they lie row by row.

    ``shape`` is N, H, W, channels and pictures in a row of a sheet; sheet i is the bytes of ``webp`` from
    ``offsets[i]`` to ``offsets[i + 1]``.
    """
    total, height, width, _, columns = map(int, packed["shape"])
    ends = packed["offsets"].tolist()
    sheets = []
    for start, end in itertools.pairwise(ends):
        with Image.open(io.BytesIO(packed["webp"][start:end].tobytes())) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        grid = pixels.reshape(-1, height, columns, width, 3)  # rows, H, columns, W, channels
        sheets.append(np.moveaxis(grid, 2, 1).reshape(-1, height, width, 3))
    pictures = np.concatenate(sheets)
    expect("pictures fit on the sheets", total <= len(pictures) < total + len(sheets[-1]), True)
    return pictures[:total]


def class_ids(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Labels ``[N]`` as int64."""
    return labels.astype(np.int64)


def mnist(folder: Path) -> Arrays:
    """MNIST, 70,000 pictures, the training part first, with the writer of each (from QMNIST)."""
    packed = read(folder, "mnist")
    x, y, writer = packed["x"], class_ids(packed["labels"]), class_ids(packed["writer"])
    expect("mnist: shape of x", x.shape, (70_000, 28, 28))
    expect("mnist: training part", int(packed["n_train"].item()), MNIST_TRAINING)
    expect("mnist: classes", np.bincount(y), MNIST_CLASSES)
    sizes = np.unique(writer, return_counts=True)[1]
    expect("mnist: writers", len(sizes), 836)
    expect("mnist: writers with 50 and 100 pictures", ((sizes >= 50).sum(), (sizes >= 100).sum()), (583, 473))
    expect("mnist: writers in both parts", np.intersect1d(writer[:MNIST_TRAINING], writer[MNIST_TRAINING:]), [])
    return {"x": x, "y": y, "writer": writer, "n_train": np.array(MNIST_TRAINING)}


def cifar(folder: Path, name: str, classes: int) -> Arrays:
    """CIFAR, 60,000 pictures, the training part first."""
    packed = read(folder, name)
    x, y, training = unpacked(packed), class_ids(packed["labels"]), int(packed["n_train"].item())
    expect(f"{name}: shape of x", x.shape, (60_000, 32, 32, 3))
    expect(f"{name}: training part", training, 50_000)
    expect(f"{name}: classes, training", np.bincount(y[:training]), np.full(classes, 50_000 // classes))
    expect(f"{name}: classes, test", np.bincount(y[training:]), np.full(classes, 10_000 // classes))
    made: Arrays = {"x": x, "y": y, "n_train": np.array(training)}
    if classes == len(CIFAR10_NAMES):
        made["classes"] = np.array(CIFAR10_NAMES)
    return made


def har(folder: Path) -> Arrays:
    """UCI HAR: x float32 ``[10299, 9, 128]`` (body acceleration, gyroscope, total acceleration; x, y, z), y, subject.

    Packed are the recordings without the overlap of the windows: differences of neighbouring values in steps of 1/2000,
    as two arrays of bytes; total acceleration as its difference to that of the body. ``start`` is where windows begin.
    """
    packed = read(folder, "har")
    differences = (packed["hi"].astype(np.int32) << 8 | packed["lo"]).astype(np.uint16).view(np.int16)
    recording = np.cumsum(differences, axis=1, dtype=np.int32)
    recording[6:] += recording[:3]
    windows = np.lib.stride_tricks.sliding_window_view(recording, HAR_STEPS, axis=1)[:, packed["start"]]
    x = np.ascontiguousarray(windows.swapaxes(0, 1), dtype=np.float32) / np.float32(2000)
    y, subject = class_ids(packed["labels"]), class_ids(packed["subject"])
    expect("har: shape of x", x.shape, (10_299, 9, HAR_STEPS))
    expect("har: classes", np.bincount(y), HAR_CLASSES)
    expect("har: subjects", np.unique(subject), np.arange(1, 31))
    expect("har: windows of the official test subjects", np.isin(subject, HAR_TEST_SUBJECTS).sum(), 2947)
    expect("har: mean of total acceleration along x, to two places", round(float(x[:, 6].mean()), 2), 0.81)
    return {"x": x, "y": y, "subject": subject, "classes": np.array(HAR_NAMES)}


def pacs(folder: Path) -> Arrays:
    """PACS in 32x32 pixels: 9,991 pictures of 7 classes in 4 domains, which are given by name."""
    packed = read(folder, "pacs32")
    x, y = unpacked(packed), class_ids(packed["labels"])
    domain = np.array(list(PACS_DOMAINS))[packed["domain"]]
    expect("pacs: shape of x", x.shape, (9991, 32, 32, 3))
    expect("pacs: domains", [(domain == name).sum() for name in PACS_DOMAINS], list(PACS_DOMAINS.values()))
    expect("pacs: classes", np.unique(y), np.arange(len(PACS_NAMES)))
    return {"x": x, "y": y, "domain": domain, "classes": np.array(PACS_NAMES)}


def mnistm(folder: Path) -> Arrays:
    """MNIST-M: the first 2,500 of its test pictures, made from MNIST's test pictures of the same number."""
    packed = read(folder, "mnistm")
    x, y = unpacked(packed), class_ids(packed["labels"])
    expect("mnistm: shape of x", x.shape, (2500, 32, 32, 3))
    test = read(folder, "mnist")["labels"][MNIST_TRAINING:]
    expect("mnistm: labels that are those of MNIST's test part", (y == test[: len(y)]).sum(), len(y))
    return {"x": x, "y": y}


def usps(folder: Path) -> Arrays:
    """USPS, 9,298 pictures of 16x16 pixels, the training part first."""
    packed = read(folder, "usps_optdigits")
    x, y = packed["usps"], class_ids(packed["usps_labels"])
    expect("usps: shape of x", x.shape, (9298, 16, 16))
    expect("usps: training part", int(packed["usps_n_train"].item()), 7291)
    expect("usps: classes", np.bincount(y), USPS_CLASSES)
    return {"x": x, "y": y, "n_train": np.array(7291)}


def optdigits(folder: Path) -> Arrays:
    """UCI optical digits, 1,797 pictures of 8x8 pixels; grey levels 0 to 16 become 0 to 255."""
    packed = read(folder, "usps_optdigits")
    x, y = packed["opt"], class_ids(packed["opt_labels"])
    expect("optdigits: shape of x", x.shape, (1797, 8, 8))
    expect("optdigits: lowest and highest level", (x.min(), x.max()), (0, OPTDIGITS_HIGHEST))
    expect("optdigits: classes", np.bincount(y), OPTDIGITS_CLASSES)
    return {"x": np.rint(x * (255 / OPTDIGITS_HIGHEST)).astype(np.uint8), "y": y}


def shakespeare(folder: Path) -> dict[str, str]:
    """All that each role of 8 plays with at least 1,000 characters says, by the role's name, "PLAY / SPEAKER"."""
    packed = read(folder, "shakespeare")
    spoken = packed["text"].tobytes().decode("latin1")
    names = packed["names"].tobytes().decode("utf8").split("\n")
    ends = packed["offsets"].tolist()
    texts = [spoken[start:end] for start, end in itertools.pairwise(ends)]
    expect("shakespeare: roles", (len(texts), len(set(names))), (297, 297))
    expect("shakespeare: characters", (ends[-1], len(spoken)), (931_410, 931_410))
    expect("shakespeare: distinct characters", len(set(spoken)), 62)
    kept = {name: text for name, text in zip(names, texts, strict=True) if len(text) >= FEWEST_CHARACTERS}
    expect("shakespeare: roles with at least 1,000 characters", len(kept), 128)
    return kept


SETS: dict[str, Callable[[Path], Arrays]] = {
    "mnist": mnist,
    "har": har,
    "pacs": pacs,
    "mnistm": mnistm,
    "usps": usps,
    "optdigits": optdigits,
    "cifar10": lambda folder: cifar(folder, "cifar10", 10),
    "cifar100": lambda folder: cifar(folder, "cifar100", 100),
}
SHAKESPEARE = "shakespeare"
"""Text, which is no array."""
DIGITS = "digits"
"""The folder of four digit domains for ``dataset=domains``; MNIST's test part, of which MNIST-M is made, stays out."""


def domains_of_digits(folder: Path) -> dict[str, Arrays]:
    """Pictures of digits in four styles, by domain."""
    digits = {name: SETS[name](folder) for name in ("mnist", "mnistm", "usps", "optdigits")}
    some = slice(0, MNIST_TRAINING, EVERY)
    digits["mnist"] = {key: digits["mnist"][key][some] for key in ("x", "y")}
    return {name: {key: arrays[key] for key in ("x", "y")} for name, arrays in digits.items()}


def write(path: Path, arrays: Arrays) -> None:
    """Write one file, whole or not at all, and say what is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished.npz")
    save: Any = np.savez  # whose further arguments have other types
    save(unfinished, **arrays)
    unfinished.replace(path)
    shown = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
    print(f"{path}: {shown}", flush=True)


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="folder of the packed files")
    parser.add_argument("out", type=Path, help="folder for the plain files")
    names = [*SETS, SHAKESPEARE, DIGITS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    for name in options.names or names:
        if name not in names:
            parser.error(f"NAME={name}: expected one of {', '.join(names)}.")
    for name in options.names or names:
        if name == DIGITS:
            for domain, arrays in domains_of_digits(options.packed).items():
                write(options.out / DIGITS / f"{domain}.npz", arrays)
        elif name == SHAKESPEARE:
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"{SHAKESPEARE}.json"
            path.write_text(json.dumps(shakespeare(options.packed)), encoding="utf-8")
            print(f"{path}: text of each role", flush=True)
        else:
            write(options.out / f"{name}.npz", SETS[name](options.packed))


if __name__ == "__main__":
    main()
