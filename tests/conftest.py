"""Settings for all tests, and fixtures that several areas share."""

import os
import signal
from collections.abc import Iterator
from typing import Any

# Before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch
from faulty_disk import FaultyDisk

torch.set_num_threads(1)
# Before triton is imported: its kernels run on a GPU, or in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# What a script starts in the background ignores Ctrl-C, and so do its children; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def faulty_disk_class() -> type[FaultyDisk]:
    """A disk that reads real files and does wrong what it is told to."""
    return FaultyDisk


@pytest.fixture
def both(packs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One of the module's ``packs`` loaded twice, for tests of decode steps: fused, and eager."""
    from decode_runs import loaded_twice

    with loaded_twice(monkeypatch) as load:
        yield lambda name: load(packs(name))
