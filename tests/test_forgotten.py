"""What nobody has closed, at the end of the process."""

import subprocess
import sys

import pytest

FREEING = """
import torch
from moe_offload.offload.experts.forgotten import close_apart

class Holder:
    def __init__(self):
        self.memory = [torch.ones(1 << 20) for _ in range(64)]
    def close(self):
        print("closed", flush=True)

for _ in range(4):
    close_apart(Holder().close)
"""
ON_THE_WAY_OUT = """
import weakref
from moe_offload.offload.experts.forgotten import close_apart

class Left:
    pass

left = Left()
left.itself = left
left.end = weakref.finalize(left, close_apart, lambda: print("closed", flush=True))
left.end.atexit = False
"""


@pytest.mark.parametrize(("code", "printed"), [(FREEING, "closed\n" * 4), (ON_THE_WAY_OUT, "")])
def test_the_process_ends_well(code: str, printed: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, printed), run.stderr
