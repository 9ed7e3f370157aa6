"""The benchmark of kernels on a GPU, as far as it goes without one."""

import gpu_kernels
import pytest
import torch

from moe_offload.quant.slot_kernels.plain import PlainKernels

SMALL = gpu_kernels.Shape("small", 64, 32, 4, 2)


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_kernels.main([])
    with pytest.raises(SystemExit, match="2"):
        gpu_kernels.main(["--format", "int3"])


def test_what_it_runs_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(gpu_kernels, "_LEAST_SLAB_BYTES", 1 << 16)
    calls = []

    def run_once(given):
        for call in given:
            call()
        calls.append(len(given))
        return 1.0

    monkeypatch.setattr(gpu_kernels, "seconds", run_once)
    monkeypatch.setattr(gpu_kernels, "captured", lambda call: call)
    row = gpu_kernels.measure(SMALL, "nf4", torch.device("cpu"))
    assert row.kernels == PlainKernels().name
    assert calls == [8, 1, 1, 1]
    assert row.decode_bytes_per_s == 2 * (64 * 32 + 64 * 2 + 64 * 32 + 64 * 2) / 1
    assert "| small | nf4 | torch |" in gpu_kernels.table([row])


@pytest.mark.gpu
def test_it_runs_on_a_gpu() -> None:
    row = gpu_kernels.measure(SMALL, "nf4", torch.device("cuda", 0))
    assert row.decode_share > 0
    assert row.prefill_share > 0
