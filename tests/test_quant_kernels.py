"""The kernels' surroundings: choice of backend, threads, forks. What they compute is in test_quant_contract.py."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_offload.errors import ConfigError
from moe_offload.quant import backend_name, get_format, kernels

built = pytest.mark.skipif(kernels.available() == ("torch",), reason="no compiler was there when this was installed")


def test_the_best_backend_is_the_default(monkeypatch):
    monkeypatch.delenv("MOE_OFFLOAD_KERNELS", raising=False)
    best = kernels.available()[0]
    with kernels.forced(None):
        assert backend_name() == ("torch" if best == "torch" else f"cpu-{best}")


def test_the_environment_forces_a_backend(monkeypatch):
    for name in kernels.available():
        monkeypatch.setenv("MOE_OFFLOAD_KERNELS", name)
        with kernels.forced(None):
            assert backend_name() == ("torch" if name == "torch" else f"cpu-{name}")
    monkeypatch.setenv("MOE_OFFLOAD_KERNELS", "sse9")
    with kernels.forced(None), pytest.raises(ConfigError, match="MOE_OFFLOAD_KERNELS=sse9 cannot run here; available"):
        backend_name()


def test_forced_is_undone():
    before = backend_name()
    with kernels.forced("torch"):
        assert backend_name() == "torch"
    assert backend_name() == before


@pytest.mark.skipif("avx512-base" not in kernels.available(), reason="this machine has one set for AVX-512")
@pytest.mark.parametrize("shape", [(5, 40), (33, 768), (9, 100), (7, 190), (17, 2048)])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_both_sets_for_avx512_give_the_same_bits(shape, num_tokens):
    nf3 = get_format("nf3")
    packed = nf3.quantize(torch.randn(shape))
    x = torch.randn(num_tokens, shape[1]).bfloat16()
    with kernels.forced("avx512-base"):
        expected = nf3.linear(x, packed, shape)
    with kernels.forced("avx512"):
        assert torch.equal(nf3.linear(x, packed, shape), expected)


def product(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3000, 256)
    packed = get_format("nf4").quantize(torch.randn(shape, generator=generator))
    return torch.randn((2, 256), generator=generator), packed


@built
def test_calls_from_several_threads_at_once():
    cases = [product(seed) for seed in range(4)]
    nf4 = get_format("nf4")
    expected = [nf4.linear(x, packed, (3000, 256)) for x, packed in cases]

    def repeat(i: int) -> bool:
        x, packed = cases[i]
        return all(torch.equal(nf4.linear(x, packed, (3000, 256)), expected[i]) for _ in range(100))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(repeat, range(4)))


@built
def test_a_forked_child_computes_on():
    code = """
import os, sys, warnings
import torch
from moe_offload.quant import get_format
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
torch.set_num_threads(3)
nf4 = get_format("nf4")
packed = nf4.quantize(torch.randn(3000, 256))
x = torch.randn(2, 256)
expected = nf4.linear(x, packed, (3000, 256))
child = os.fork()
same = all(torch.equal(nf4.linear(x, packed, (3000, 256)), expected) for _ in range(50))
if child == 0:
    os._exit(0 if same else 1)
sys.exit(os.waitpid(child, 0)[1] or not same)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@built
def test_every_byte_is_read():
    """The checksum of all that was read notices a change of any byte."""
    data = torch.zeros((3 << 20) + 77, dtype=torch.uint8)
    assert kernels.read_all(data) == 0
    for place in (0, 1 << 20, data.numel() - 64, data.numel() - 1):
        data[place] = 1
        assert kernels.read_all(data) != 0
        data[place] = 0
