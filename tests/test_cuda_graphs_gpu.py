"""Decode steps run from CUDA graphs, on a real device. Skipped without one."""

import threading
from pathlib import Path

import pytest
import torch
from answers import answer
from families import make_config
from family_runs import CONTEXT_TOKENS, save_random_model

from moe_offload import OffloadedModel
from moe_offload.errors import BudgetError
from moe_offload.offload.graphs.cuda_recorder import CudaRecorder
from moe_offload.offload.graphs.recorder import RecordingError
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.tiers.cuda_queue import CudaQueue
from moe_offload.quant.slot_kernels.choice import triton_obstacle

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = make_config(request.param)
    if request.param == "gpt_oss":
        config.sliding_window = 16
    return pack_model(str(save_random_model(config, folder / "checkpoint")), folder / "pack", format="nf4")


def load(pack: Path, slots: int, graphs: str, prefetch: str | int = "off") -> OffloadedModel:
    settings = {"device": "cuda", "context_tokens": CONTEXT_TOKENS, "prefetch": prefetch, "warm_start": False}
    with pytest.raises(BudgetError) as vram:
        OffloadedModel.from_pretrained(pack, vram=1, ram="80%", **settings)
    return OffloadedModel.from_pretrained(
        pack, vram=vram.value.needed_bytes + slots * 16384, ram="80%", graphs=graphs, **settings
    )


@pytest.mark.hardware  # whole steps take Triton's kernels, which are interpreted elsewhere
@pytest.mark.parametrize("prefetch", ["off", 2])
def test_neither_graphs_nor_budgets_change_a_bit(pack: Path, prefetch: str | int):
    with load(pack, 1000, "off") as plain:
        expected = answer(plain)
    for slots in (0, 6, 1000):
        with load(pack, slots, "on", prefetch) as model:
            for _ in range(3):
                assert torch.equal(answer(model), expected)
            with model.tracing() as recording:
                assert torch.equal(answer(model), expected)
            assert (recording.trace.experts >= 0).any()
            forward = model._graphs.forward
            assert forward is not None
            assert not forward.is_off
            assert forward.num_recorded
            if slots == 1000 and triton_obstacle(torch.device("cuda", torch.cuda.current_device())) is None:
                assert forward.num_whole
            model._residency.cache.check_integrity()


@pytest.mark.hardware
def test_steps_are_recorded_again_when_slots_have_moved(pack: Path):
    with load(pack, 1000, "on") as model:
        expected = answer(model)
        forward = model._graphs.forward
        assert forward is not None
        before = forward.num_recorded
        model._graphs.forget()
        assert torch.equal(answer(model), expected)
        assert forward.num_recorded > before
        assert not forward.is_off


def test_pieces_share_a_pool_and_are_replayed_on_any_stream():
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = CudaRecorder(device)
    x = torch.zeros(16, device=device)
    with recorder.session():
        recorder.begin()
        doubled = x * 2
        first = recorder.end()
        recorder.begin()
        result = doubled + 1
        second = recorder.end()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            x.add_(3)
            first()
            second()
            stream.synchronize()
        assert torch.equal(result, x * 2 + 1)


def replayed_sum(recorder: CudaRecorder, x: torch.Tensor) -> float:
    """The sum of ``x + 1``, recorded and replayed: what a recorder does that is in order."""
    with recorder.session():
        recorder.begin()
        y = x + 1
        replay = recorder.end()
    replay()
    return float(y.sum().item())


def test_a_wait_in_a_recording_leaves_the_device_as_it_was():
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = CudaRecorder(device)
    x = torch.ones(16, device=device)

    def wait() -> None:
        with recorder.session():
            recorder.begin()
            (x * 2).sum().item()

    with pytest.raises(RecordingError):
        wait()
    assert (x * 2).sum().item() == 32
    torch.multinomial(x, 1)  # draws from the generator, which captures have a hand in
    assert replayed_sum(recorder, x) == 32


def test_an_interrupt_ends_a_recording_at_any_place():
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = CudaRecorder(device)
    x = torch.ones(16, device=device)

    def interrupt(begun: bool) -> None:
        with recorder.session():
            if begun:
                recorder.begin()
                x.add_(1)
            raise KeyboardInterrupt

    for begun in (True, False):
        with pytest.raises(KeyboardInterrupt):
            interrupt(begun)
        assert not torch.cuda.is_current_stream_capturing()
    assert x.sum().item() == 16
    assert replayed_sum(recorder, x) == 32


def test_other_threads_use_the_device_while_a_step_is_recorded():
    device = torch.device("cuda", torch.cuda.current_device())
    recorder, queue = CudaRecorder(device), CudaQueue(device)
    x, target = torch.ones(16, device=device), queue.allocate(1 << 20)
    failures: list[BaseException] = []

    def copy() -> None:
        try:
            source = torch.full((1 << 20,), 7, dtype=torch.uint8).pin_memory()
            for _ in range(20):
                event = queue.new_event()
                queue.copy(source, target, after=(), event=event)
                event.is_over()
                event.wait()
        except BaseException as error:
            failures.append(error)

    with recorder.session():
        recorder.begin()
        y = x + 1
        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
        replay = recorder.end()
    replay()
    queue.close()
    assert not failures
    assert y.sum().item() == 32
    assert bool((target == 7).all())
