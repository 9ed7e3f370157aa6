"""What torch frees goes back to the system at once, and is kept within a prompt's pass for its next temporaries."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def test_freed_blocks_go_back_to_the_system():
    script = (
        "from moe_offload.offload.freed_memory import give_freed_memory_back\n"
        "from moe_offload.offload.planning.memory import rss_bytes\n"
        "assert give_freed_memory_back()\n"
        "import torch\n"
        "before = rss_bytes()\n"
        # Blocks of a few MiB with something small on top: kept in the heap, all of them would stay.
        "for _ in range(3):\n"
        "    blocks = [(torch.ones(2 << 20), torch.ones(64)) for _ in range(12)]\n"
        "    last = blocks[-1][1]\n"
        "    del blocks\n"
        "assert rss_bytes() - before < 24 << 20, rss_bytes() - before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


PROMPTS = """
import resource
from moe_offload.offload.freed_memory import give_freed_memory_back, keep_freed_memory_in_prompts
from moe_offload.offload.planning.memory import rss_bytes
assert give_freed_memory_back()
import torch
MIB = 1 << 20


class Model(torch.nn.Module):
    inner = None

    def forward(self, input_ids):
        if self.inner is not None:
            self.inner(input_ids)
        if input_ids.shape[1] == 99:
            raise ValueError
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(MIB)
        self.num_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def ids(num_tokens):
    return torch.zeros(1, num_tokens, dtype=torch.long)


def held_bytes():
    return rss_bytes() - before


torch.set_num_threads(1)
model = Model()
keep_freed_memory_in_prompts(model)
model(ids(512))
model(ids(1))
all_new = model.num_faults
before = rss_bytes()
"""


def run(script: str) -> None:
    subprocess.run([sys.executable, "-c", PROMPTS + script], check=True)


def test_a_prompt_keeps_what_it_frees_and_returns_it():
    run(
        "model(ids(512))\n"
        "assert model.num_faults < all_new / 5, (model.num_faults, all_new)\n"
        "assert held_bytes() < MIB, held_bytes()\n"
    )


def test_a_step_keeps_nothing():
    run(
        "assert all_new > 2000, all_new\n"
        "model(ids(1))\n"
        "assert model.num_faults > 0.9 * all_new, (model.num_faults, all_new)\n"
        "assert held_bytes() < MIB, held_bytes()\n"
    )


def test_a_prompt_that_fails_returns_everything():
    run(
        "try:\n"
        "    model(ids(99))\n"
        "except ValueError:\n"
        "    model(ids(1))\n"
        "assert model.num_faults > 0.9 * all_new, (model.num_faults, all_new)\n"
    )


def test_a_prompt_within_another_ends_nothing():
    run(
        "outer = Model()\n"
        "outer.inner = model\n"
        "keep_freed_memory_in_prompts(outer)\n"
        "outer(ids(512))\n"
        "assert outer.num_faults < all_new / 5, (outer.num_faults, all_new)\n"
        "assert held_bytes() < MIB, held_bytes()\n"
    )
