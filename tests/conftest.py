"""Tests never touch the user's cache, spend no time on a good choice of the cohort size, and share one Ray cluster."""

import gc
import os
import sys
import warnings
from collections.abc import Iterator

import absl.logging
import pytest

# before PyTorch is imported, here and in every process that is started: threads that wait for one another while several
# processes share the cores cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's processes give way to all others unless it is told otherwise: beside the other tests they would hardly run
os.environ.setdefault("RAY_worker_niceness", "0")
# and it starts a process for each core before anybody asks for one
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

# absl, which dp-accounting and TensorBoard bring along, closes the stream of its handler when logging is set up anew,
# unless it is one of the process: while tests are captured it would close what all of them are captured in
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

LONGEST = ("test_superlink", "test_ray", "test_flower_runtime", "test_cli", "test_resume", "test_sweeps",
           "test_every_method", "test_stopped_machines", "test_readme", "test_compression",
           "test_flower_wrappers")  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device cuda`` lets clients compute on a GPU in the tests that take a device."""
    parser.addoption("--device", default="cpu", help="cpu or cuda, for the tests that take a device")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where clients compute: cpu, or what ``--device`` says."""
    return str(request.config.getoption("--device"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: they are dealt to processes as they come, which then end alike."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point ``FEDPERS_CACHE`` at a folder of these tests, not the user's.

    It is one for all of them: programs that tests start need not import, for a second or two each, what divides the
    data. Tests of what is kept take one of their own.
    """
    root = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPERS_CACHE", str((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache"))
        yield


@pytest.fixture(autouse=True)
def _quick_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sizes be compared by a few steps: tests need no good choice."""
    monkeypatch.setattr("fedpers.runtime.steps.SECONDS_PER_SIZE", 0.002)
    monkeypatch.setattr("fedpers.runtime.probe.TRIES", 1)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a Ray cluster with room for five actors: one for all tests of this process, since it starts slowly."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 5, "num_gpus": 0})
    yield made.address
    made.shutdown()


@pytest.fixture(scope="module")
def ray_machine(ray_address: str) -> Iterator[None]:
    """Connect this process to that cluster: Flower's simulation, in other modules, has one of its own."""
    import ray

    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def pytest_collection_finish() -> None:
    """Let the garbage collector look at what tests make alone: modules and tests stay to the end."""
    gc.collect()
    gc.freeze()
