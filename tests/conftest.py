"""Settings for all tests, and fixtures that several areas share."""

import os

# Before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch
import transformers
from faulty_disk import FaultyDisk

torch.set_num_threads(1)


@pytest.fixture
def faulty_disk_class() -> type[FaultyDisk]:
    """A disk that reads real files and does wrong what it is told to."""
    return FaultyDisk
