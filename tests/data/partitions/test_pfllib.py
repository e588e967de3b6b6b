"""PFLlib's divisions where PFLlib itself has none to give; what it gives is compared in ``tests/data/test_load.py``."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fedpers.data.partitions.pfllib import divide_as_pfllib
from fedpers.errors import ConfigError, DataError
from fedpers.settings.partition import PartitionConfig


def test_a_client_with_one_sample_is_refused() -> None:
    config = PartitionConfig("pfllib_pathological", 10, classes_per_client=1)
    with pytest.raises(DataError, match=r"client 0 has 1 sample, too few to train and to test on; raise"):
        divide_as_pfllib(np.arange(10), 10, config, seed=1)


def test_proportions_that_are_all_zero_end_in_a_sentence() -> None:
    config = PartitionConfig("pfllib_dirichlet", 4, alpha=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no division of nothing by nothing
        with pytest.raises(DataError, match=r"in 1000 attempts not all of 4 clients had 5 samples; raise partition"):
            divide_as_pfllib(np.arange(40) % 3, 3, config, seed=1)


def test_a_seed_that_its_generator_does_not_take_is_named() -> None:
    with pytest.raises(ConfigError, match=r"partition\.seed=5000000000: expected below 2\^32 for partition=pfllib_d"):
        divide_as_pfllib(np.arange(40) % 3, 3, PartitionConfig("pfllib_dirichlet", 4), seed=5_000_000_000)
