"""Loading whole data sets, and what a user reads when files are not what they should be."""

import bz2
import gzip
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpers.data import DatasetConfig, load_dataset
from fedpers.data.datasets import DATASETS
from fedpers.data.torchvision_shim import import_torchvision
from fedpers.errors import ConfigError, DataError
from fedpers.tasks import Regression


def sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "made.npz", **arrays)
    return str(path / "made.npz")


# --- digits and configs ---


def test_digits_are_normalized_pictures() -> None:
    digits = load_dataset(DatasetConfig())
    assert digits.x.shape == (1797, 1, 8, 8)
    assert digits.x.dtype == torch.float32
    assert digits.y.dtype == torch.int64
    assert digits.num_classes == 10
    assert len(digits.y.unique()) == 10
    assert abs(float(digits.x.mean())) < 1e-4
    assert abs(float(digits.x.std()) - 1) < 1e-3
    assert digits.name == "digits"
    assert digits.train_size is None
    assert digits.owner is None


def test_unknown_name_lists_options_and_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"dataset=cifr10: expected one of ag_news, amazon_video, cifar10, .*did you mean 'cifar10'"
    ):
        DatasetConfig(name="cifr10")
    with pytest.raises(ConfigError, match=r"dataset\.root=None: expected the path of an \.npz file"):
        DatasetConfig(name="npz")


def test_other_file_errors_become_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(config: DatasetConfig) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setitem(DATASETS, "digits", forbidden)
    with pytest.raises(DataError, match=r"digits: \[Errno 13\] Permission denied: '/somewhere'\."):
        load_dataset(DatasetConfig())


@pytest.mark.slow
def test_importing_is_cheap() -> None:
    code = (
        "import sys, fedpers.data; print([m for m in ('datasets','flwr_datasets','sklearn','torchvision') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torchvision_imports_again_and_again() -> None:
    first = import_torchvision()
    assert import_torchvision() is first is sys.modules["torchvision"]
    assert hasattr(torch.ops.torchvision, "nms")
    assert hasattr(torch.ops.torchvision, "qnms")


def test_other_import_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("fedpers.data.torchvision_shim.importlib.import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision()


# --- npz ---


def test_npz_pictures_become_normalized_channels_first(tmp_path: Path) -> None:
    # Channel 0 of the two training pictures holds 0 and 2 (mean 1, deviation 1), channel 1 holds 10 and 50.
    x = np.zeros((3, 4, 5, 2), np.uint8)
    x[1, ..., 0], x[2, ..., 0] = 2, 4
    x[0, ..., 1], x[1, ..., 1], x[2, ..., 1] = 10, 50, 30
    root = npz(tmp_path, x=x, y=np.array([0, 1, 1]), n=2)
    data = load_dataset(DatasetConfig(name="npz", root=root, n_train="n"))
    assert data.x.shape == (3, 2, 4, 5)
    assert data.train_size == 2
    assert data.num_classes == 2
    assert data.name == "made"
    assert data.x[:, 0, 0, 0].tolist() == [-1, 1, 3]
    assert data.x[:, 1, 3, 4].tolist() == [-1, 1, 0]


def test_npz_grey_constant_and_float(tmp_path: Path) -> None:
    grey = npz(tmp_path, x=np.full((2, 3, 3), 7, np.uint8), y=np.array([0, 1]))
    data = load_dataset(DatasetConfig(name="npz", root=grey))
    assert data.x.shape == (2, 1, 3, 3)
    assert (data.x == 0).all()
    floats = npz(tmp_path, a=np.array([[1.5, 2.0], [3.0, -4.0]]), b=np.array([1, 0], np.uint8))
    data = load_dataset(DatasetConfig(name="npz", root=floats, x="a", y="b"))
    assert data.x.tolist() == [[1.5, 2.0], [3.0, -4.0]]
    assert data.x.dtype == torch.float32
    assert data.y.tolist() == [1, 0]
    assert data.y.dtype == torch.int64


@pytest.mark.parametrize(
    ("y", "shape", "targets"),
    [(np.array([0.5, -2.0, 3.0]), (3,), 1), (np.array([[1.0], [2.0], [7.0]]), (3, 1), 1), (np.eye(3, 2), (3, 2), 2)],
)
def test_npz_with_floats_is_a_regression(tmp_path: Path, y: Any, shape: tuple[int, ...], targets: int) -> None:
    data = load_dataset(DatasetConfig(name="npz", root=npz(tmp_path, x=np.zeros((3, 2)), y=y)))
    assert data.task == Regression()
    assert data.num_classes == targets
    assert data.y.dtype == torch.float32
    assert tuple(data.y.shape) == shape
    assert data.y.tolist() == y.tolist()


@pytest.mark.parametrize(
    ("given", "numbers", "names"),
    [([7, 7, 3], [1, 1, 0], ("3", "7")), ([0, 1, 1], [0, 1, 1], ()), (["b", "a", "a"], [1, 0, 0], ("a", "b"))],
)
def test_npz_domains(tmp_path: Path, given: Any, numbers: list[int], names: tuple[str, ...]) -> None:
    root = npz(tmp_path, x=X, y=Y, style=np.array(given))
    data = load_dataset(DatasetConfig(name="npz", root=root, domain="style"))
    assert data.domain is not None
    assert data.domain.dtype == torch.int64
    assert data.domain.tolist() == numbers
    assert data.domain_names == names
    assert data.owner is None


@pytest.mark.parametrize("ids", [np.array([7, 7, 3]), np.array(["b", "b", "a"])])
def test_npz_owners(tmp_path: Path, ids: Any) -> None:
    root = npz(tmp_path, x=np.zeros((3, 2)), y=np.zeros(3, int), who=ids)
    owner = load_dataset(DatasetConfig(name="npz", root=root, client="who")).owner
    assert owner is not None
    assert owner.dtype == torch.int64
    assert owner[0] == owner[1] > owner[2]


def test_signs_are_two_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = DatasetConfig("npz", root=npz(tmp_path, x=np.zeros((4, 2)), y=np.array([1, -1, -1, 1])))
    data = load_dataset(config)
    assert (data.y.tolist(), data.num_classes, data.class_names) == ([1, 0, 0, 1], 2, ("-1", "1"))
    assert "the labels -1, 1 are numbered as classes 0 to 1." in caplog.text


X, Y = np.zeros((3, 2)), np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X, "label": Y}, r"has no array 'y'; it has label, x\."),
        ({"x": X[:2], "y": Y}, r"x has 2 samples but y has 3\."),
        ({"x": X, "y": Y.astype(float)}, r"y holds whole numbers as float64; store class ids as whole numbers, or the"),
        (
            {"x": X, "y": Y[:, None]},
            r"y must be whole numbers or text .*, not int64 \[3, 1\]\.",
        ),
        ({"x": X, "y": np.zeros((3, 0))}, r"y must be whole numbers .*, not float64 \[3, 0\]\."),
        ({"x": X, "y": np.array([0.5, np.nan, 1])}, r"y is not finite \(nan or infinite\) in 1 of 3 samples\."),
        ({"x": X, "y": np.array([[0.5, 1e300], [1, 2], [3, 4]])}, r"y is not finite \(nan or infinite\) in 1 of 3"),
        ({"x": X, "y": Y - 1}, r"y has the label -1, expected class ids from 0 to 99999\."),
        ({"x": X, "y": Y * 10**12}, r"y has the label 1000000000000, expected class ids"),
        ({"x": X[:0], "y": Y[:0]}, r"there are no samples\."),
        ({"x": X * np.nan, "y": Y}, r"x is not finite \(nan or infinite\) in 3 of 3 samples\."),
        ({"x": X + 1e300, "y": Y}, r"x is not finite"),
        ({"x": X.astype(np.int32), "y": Y}, r"x is int32, expected uint8 pictures or floats"),
        ({"x": np.zeros((3, 3, 32, 32), np.uint8), "y": Y}, r"x is uint8 \[3, 3, 32, 32\], expected pictures"),
        ({"x": X.astype(object), "y": Y}, r"x holds Python objects, which are not read"),
        ({"x": X, "y": np.array([0, None, 1])}, r"y holds Python objects, which are not read"),
        ({"x": X, "y": Y, "client": Y[:2]}, r"2 client ids for 3 samples\."),
        ({"x": X, "y": Y, "client": X[:, 0]}, r"client must be whole numbers or text \[N\], not float64 \[3\]\."),
        ({"x": X, "y": Y, "domain": Y[:2]}, r"made: there are 2 domains for 3 samples\."),
        ({"x": X, "y": Y, "domain": X}, r"domain must be whole numbers or text \[N\], not float64 \[3, 2\]\."),
        ({"x": X, "y": Y, "n": np.array(4)}, r"n must be one whole number from 1 to 3\."),
        ({"x": X, "y": Y, "n": np.array([1, 2])}, r"n must be one whole number from 1 to 3\."),
    ],
)
def test_npz_refuses(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    config = DatasetConfig(
        name="npz",
        root=npz(tmp_path, **arrays),
        client="client" if "client" in arrays else None,
        domain="domain" if "domain" in arrays else None,
        n_train="n" if "n" in arrays else None,
    )
    with pytest.raises(DataError, match=message) as error:
        load_dataset(config)
    sentence(error)


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_npz_unpickles_nothing(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    root = npz(tmp_path, x=np.array([Trap(sprung)], dtype=object), y=np.array([0]))
    bare = tmp_path / "bare.npz"
    bare.write_bytes(pickle.dumps(Trap(sprung)))
    for path in (root, str(bare)):
        with pytest.raises(DataError):
            load_dataset(DatasetConfig(name="npz", root=path))
    assert not sprung.exists()


def test_npz_missing_or_damaged(tmp_path: Path) -> None:
    good = Path(npz(tmp_path, x=X, y=Y))
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"NUMPY") + 130] ^= 255  # inside the data of x: the checksum of the zip member is wrong
    for name, damaged in {"empty": b"", "text": b"hello", "cut": content[:200], "flipped": bytes(flipped)}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}.npz is damaged") as error:
            load_dataset(DatasetConfig(name="npz", root=str(path)))
        sentence(error)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DataError, match=r"one\.npy is damaged or not an \.npz file"):
        load_dataset(DatasetConfig(name="npz", root=str(tmp_path / "one.npy")))
    for path in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(DataError, match=r"^dataset\.root=.* is missing or not a file\.$"):
            load_dataset(DatasetConfig(name="npz", root=str(path)))


# --- torchvision: idx files ---


def idx(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


PICTURES = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
LABELS = np.array([3, 9, 0, 1, 2, 4, 5])
IDX = {
    "train-images-idx3-ubyte": idx(PICTURES[:5]),
    "train-labels-idx1-ubyte": idx(LABELS[:5]),
    "t10k-images-idx3-ubyte": idx(PICTURES[5:]),
    "t10k-labels-idx1-ubyte": idx(LABELS[5:]),
}


def write_idx(folder: Path, packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in IDX.items():
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize(
    ("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, name: str, kind: str, flat: bool, packed: bool) -> None:
    folder = write_idx(tmp_path if flat else tmp_path / kind / "raw", packed)
    before = sorted(folder.iterdir())
    data = load_dataset(DatasetConfig(name=name, root=str(tmp_path), download=False))
    assert data.x.shape == (7, 1, 28, 28)
    assert data.y.tolist() == LABELS.tolist()
    assert data.train_size == 5
    assert data.num_classes == 10
    assert data.name == name
    mean, deviation = PICTURES[:5].mean(), PICTURES[:5].std()
    np.testing.assert_allclose(data.x[:, 0].numpy(), (PICTURES - mean) / deviation, rtol=1e-5, atol=1e-5)
    assert sorted(folder.iterdir()) == before


def test_idx_missing_and_download_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "MNIST" / "raw")
    gone = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    gone.unlink()
    with pytest.raises(DataError, match=rf"mnist: {gone} is missing; set dataset\.root .*dataset\.download=true") as e:
        load_dataset(DatasetConfig(name="mnist", root=str(tmp_path), download=False))
    sentence(e)

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError, match=r"the download failed \(Network is unreachable\); set dataset\.root to a") as e:
        load_dataset(DatasetConfig(name="mnist", root=str(tmp_path)))
    sentence(e)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte", IDX["train-images-idx3-ubyte"][:-1]),
        ("t10k-labels-idx1-ubyte", b""),
        ("t10k-images-idx3-ubyte", b"something else entirely"),
        ("train-labels-idx1-ubyte", idx(PICTURES)),
        ("train-images-idx3-ubyte.gz", b"not gzip"),
        ("train-images-idx3-ubyte.gz", gzip.compress(IDX["train-images-idx3-ubyte"])[:-20]),
    ],
)
def test_idx_damaged(tmp_path: Path, file: str, content: bytes) -> None:
    write_idx(tmp_path, packed=file.endswith(".gz"))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"mnist: {tmp_path / file} is damaged \(.+\); replace it, or delete") as error:
        load_dataset(DatasetConfig(name="mnist", root=str(tmp_path)))
    sentence(error)


def test_idx_that_disagree(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:1]))
    with pytest.raises(DataError, match="2 test pictures but 1 labels"):
        load_dataset(DatasetConfig(name="mnist", root=str(tmp_path)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([10, 0])))
    with pytest.raises(DataError, match="labels run from 0 to 10, expected 0 to 9"):
        load_dataset(DatasetConfig(name="mnist", root=str(tmp_path)))


def write_emnist(folder: Path, variant: str, labels: np.ndarray[Any, Any], packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(0, 5)), ("test", slice(5, 7))):
        for what, values in (("images-idx3", PICTURES[rows].swapaxes(1, 2)), ("labels-idx1", labels[rows])):
            path = folder / f"emnist-{variant}-{part}-{what}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return folder


@pytest.mark.parametrize(
    ("variant", "stored", "classes", "names"),
    [
        ("byclass", [61, 0, 10, 35, 36, 9, 60], [61, 0, 10, 35, 36, 9, 60], ("0", "9", "A", "Z", "a", "z")),
        ("bymerge", [46, 0, 10, 35, 36, 9, 45], [46, 0, 10, 35, 36, 9, 45], ("0", "9", "A", "Z", "a", "t")),
        ("balanced", [46, 0, 10, 35, 36, 9, 45], [46, 0, 10, 35, 36, 9, 45], ("0", "9", "A", "Z", "a", "t")),
        ("letters", [1, 26, 2, 3, 4, 5, 6], [0, 25, 1, 2, 3, 4, 5], ("a", "z")),
        ("digits", [0, 1, 2, 3, 9, 5, 6], [0, 1, 2, 3, 9, 5, 6], ()),
    ],
)
@pytest.mark.parametrize("folder", [".", "EMNIST/raw", "gzip"])
def test_emnist(
    tmp_path: Path, variant: Any, stored: list[int], classes: list[int], names: tuple[str, ...], folder: str
) -> None:
    write_emnist(tmp_path / folder, variant, np.array(stored), packed=folder != "EMNIST/raw")
    data = load_dataset(DatasetConfig(name="emnist", root=str(tmp_path), variant=variant, download=False))
    assert data.y.tolist() == classes
    assert data.train_size == 5
    assert data.num_classes == {"byclass": 62, "letters": 26, "digits": 10}.get(variant, 47)
    assert [*data.class_names][:1] + [*data.class_names][-1:] == [*names][:1] + [*names][-1:]
    assert set(names) <= set(data.class_names)
    assert len(data.class_names) in (0, data.num_classes)
    mean, deviation = PICTURES[:5].mean(), PICTURES[:5].std()
    np.testing.assert_allclose(data.x[:, 0].numpy(), (PICTURES - mean) / deviation, rtol=1e-5, atol=1e-5)


def test_emnist_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = np.array([1, 26, 2, 3, 4, 5, 6])
    write_emnist(tmp_path, "letters", letters)
    wanted = r"emnist: .*EMNIST/raw/emnist-balanced-train-images-idx3-ubyte is missing; set dataset\.root"
    with pytest.raises(DataError, match=wanted) as error:
        load_dataset(DatasetConfig(name="emnist", root=str(tmp_path), download=False))
    sentence(error)

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError, match=r"is missing, and the download failed \(Network is unreachable\)") as error:
        load_dataset(DatasetConfig(name="emnist", root=str(tmp_path)))
    sentence(error)
    write_emnist(tmp_path, "letters", letters - 1)
    with pytest.raises(DataError, match="labels run from -1 to 24, expected 0 to 25"):
        load_dataset(DatasetConfig(name="emnist", root=str(tmp_path), variant="letters"))
    file = tmp_path / "emnist-letters-test-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"emnist: {file} is damaged") as error:
        load_dataset(DatasetConfig(name="emnist", root=str(tmp_path), variant="letters"))
    sentence(error)
    with pytest.raises(ConfigError, match=r"dataset\.variant=byletter: expected one of balanced, "):
        DatasetConfig(name="emnist", variant="byletter")  # type: ignore[arg-type]


# --- torchvision: SVHN and USPS ---


def write_svhn(path: Path, pictures: np.ndarray[Any, Any], labels: list[int]) -> None:
    """Pictures uint8 ``[N, 32, 32, 3]`` as MATLAB's X ``[32, 32, 3, N]``."""
    from scipy.io import savemat

    savemat(path, {"X": pictures.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]})


def write_usps(path: Path, pictures: np.ndarray[Any, Any], labels: list[int]) -> None:
    """Pictures uint8 ``[N, 16, 16]`` as LIBSVM's lines, values from -1 to 1."""
    rows = [
        " ".join([str(label), *(f"{place}:{value:.6f}" for place, value in enumerate(values, start=1))])
        for label, values in zip(labels, (pictures.reshape(len(pictures), -1) + 0.5) / 255 * 2 - 1, strict=True)
    ]
    path.write_bytes(bz2.compress("\n".join(rows).encode()))


def write_parts(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> np.ndarray[Any, Any]:
    """Made-up files of five and two pictures in the official format, with torchvision told their md5."""
    import_torchvision()
    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    cls: Any = getattr(datasets, kind)
    shape = (7, 32, 32, 3) if kind == "SVHN" else (7, 16, 16)
    pictures = np.random.default_rng(2).integers(0, 255, shape, dtype=np.uint8)
    write = write_svhn if kind == "SVHN" else write_usps
    parts = {}
    for part, rows, labels in (("train", slice(0, 5), [1, 10, 3, 4, 5]), ("test", slice(5, 7), [9, 2])):
        url, name, _ = cls.split_list[part]
        write(root / name, pictures[rows], labels)
        parts[part] = [url, name, calculate_md5(root / name)]
    monkeypatch.setattr(cls, "split_list", parts)
    return pictures


@pytest.mark.parametrize(("name", "classes"), [("svhn", [1, 0, 3, 4, 5, 9, 2]), ("usps", [0, 9, 2, 3, 4, 8, 1])])
def test_svhn_and_usps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: list[int]) -> None:
    pictures = write_parts(tmp_path, monkeypatch, name.upper())
    before = sorted(tmp_path.iterdir())
    data = load_dataset(DatasetConfig(name=name, root=str(tmp_path), download=False))
    wanted = pictures.transpose(0, 3, 1, 2) if pictures.ndim == 4 else pictures[:, None]
    assert data.x.shape == wanted.shape
    assert data.y.tolist() == classes
    assert (data.train_size, data.num_classes, data.name) == (5, 10, name)
    mean, deviation = wanted[:5].mean((0, 2, 3), keepdims=True), wanted[:5].std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(data.x.numpy(), (wanted - mean) / deviation, rtol=1e-4, atol=1e-4)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "file"), [("svhn", "test_32x32.mat"), ("usps", "usps.t.bz2")])
def test_svhn_and_usps_missing_or_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    write_parts(tmp_path, monkeypatch, name.upper())
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    config = DatasetConfig(name=name, root=str(tmp_path), download=False)
    with pytest.raises(DataError, match=rf"{name}: .*{file} is damaged \(wrong md5\); set dataset\.root") as error:
        load_dataset(config)
    sentence(error)

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    (tmp_path / file).unlink()
    wanted = rf"{file} is missing, and the download failed \(Network is unreachable\); set dataset\.root to a"
    with pytest.raises(DataError, match=wanted) as error:
        load_dataset(DatasetConfig(name=name, root=str(tmp_path)))
    sentence(error)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda *_: True)
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}: the files in {tmp_path} cannot be read") as error:
        load_dataset(config)
    sentence(error)


# --- torchvision: CIFAR ---


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> tuple[Path, np.ndarray[Any, Any]]:
    """Made-up batches in CIFAR's format, with torchvision told their md5."""
    import_torchvision()
    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    cls: Any = getattr(datasets, kind)
    folder: Path = root / cls.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind == "CIFAR10" else "fine_labels"
    pictures = np.random.default_rng(1).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, calculate_md5(folder / name)]

    train, test = cls.train_list, cls.test_list
    per = 10 // len(train)
    lists = [
        write(name, {"data": pictures[i * per : (i + 1) * per].reshape(per, -1), key: list(range(i, i + per))})
        for i, (name, _) in enumerate(train)
    ]
    monkeypatch.setattr(cls, "train_list", lists)
    monkeypatch.setattr(cls, "test_list", [write(test[0][0], {"data": pictures[10:].reshape(2, -1), key: [7, 8]})])
    name, md5 = write(cls.meta["filename"], {cls.meta["key"]: ["a"]})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "filename": name, "md5": md5})
    return folder, pictures


@pytest.mark.parametrize(("name", "kind", "classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, classes: int) -> None:
    folder, pictures = write_cifar(tmp_path, monkeypatch, kind)
    for root in (tmp_path, folder):
        data = load_dataset(DatasetConfig(name=name, root=str(root), download=False))
        assert data.x.shape == (12, 3, 32, 32)
        assert data.y[-2:].tolist() == [7, 8]
        assert data.train_size == 10
        assert data.num_classes == classes
        mean = pictures[:10].mean((0, 2, 3), keepdims=True)
        deviation = pictures[:10].std((0, 2, 3), keepdims=True)
        np.testing.assert_allclose(data.x.numpy(), (pictures - mean) / deviation, rtol=1e-4, atol=1e-5)


def test_cifar_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DatasetConfig(name="cifar10", root=str(tmp_path), download=False)
    with pytest.raises(DataError, match=r"cifar10: .*data_batch_1 is missing; set dataset\.root") as error:
        load_dataset(config)
    sentence(error)
    folder, _ = write_cifar(tmp_path, monkeypatch, "CIFAR10")
    sprung = tmp_path / "sprung"
    (folder / "data_batch_3").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(DataError, match=r"data_batch_3 is damaged \(wrong md5\); set dataset\.root") as error:
        load_dataset(config)
    sentence(error)

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    wanted = re.escape("data_batch_3 is damaged (wrong md5), and the download failed (Network is unreachable)")
    with pytest.raises(DataError, match=wanted) as error:
        load_dataset(DatasetConfig(name="cifar10", root=str(tmp_path)))
    sentence(error)
    assert not sprung.exists()
