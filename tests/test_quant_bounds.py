"""No kernel reads or writes past what it was given: memory may end where a slot does, and the next page be nobody's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_offload.quant import kernels

SCRIPT = Path(__file__).with_name("guarded_kernels.py")

pytestmark = pytest.mark.skipif(
    kernels.available() == ("torch",) or os.name != "posix", reason="no kernels were built, or no pages to guard"
)


def run(*arguments: str, num_threads: int = 2) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_an_overrun_would_be_seen():
    assert run("overrun").returncode in (-signal.SIGSEGV, -signal.SIGBUS)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_no_kernel_touches_what_is_beside_its_memory(num_threads: int):
    done = run(num_threads=num_threads)
    *_, last = done.stdout.splitlines() or ["nothing"]
    assert last == "done", f"exit {done.returncode} at: {last}\n{done.stderr[-2000:]}"
