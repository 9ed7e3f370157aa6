"""Settings for all tests, and fixtures that several areas share."""

import os
import signal
import sys
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


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--simulated-cuda``: run the tests that need a CUDA device on a simulated one."""
    parser.addoption("--simulated-cuda", action="store_true", help="run tests marked gpu on a simulated CUDA device")


def pytest_configure(config: pytest.Config) -> None:
    """Before test modules ask torch what there is."""
    if config.getoption("--simulated-cuda"):
        from simulated_cuda.install import install
        from simulated_cuda.library import CannotBuildError

        try:
            install()
        except CannotBuildError as error:
            pytest.exit(f"no simulated CUDA device: {error}", returncode=0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none, and what needs a real one where it is simulated."""
    is_simulated = "simulated_cuda.bindings" in sys.modules
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("hardware") and is_simulated:
            item.add_marker(pytest.mark.skip(reason="needs a real CUDA device"))


@pytest.fixture(autouse=True)
def working_device() -> Iterator[None]:
    """A simulated device that a test has made fail works again."""
    yield
    if "simulated_cuda.bindings" in sys.modules:
        sys.modules["simulated_cuda.bindings"].runtime.forget_failure()


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
