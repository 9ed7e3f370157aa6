"""Decode steps run from recordings, on a fake device with a fake recorder: the same bits as the model's own code."""

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import NEW_TOKENS, PROMPT, answer
from fake_cuda_model import Load, loading_on_fake_devices
from fake_recorder import FakeRecorder
from families import make_config
from family_runs import save_random_model
from recorded_kernels import RecordedKernels, recorded_kernels
from transformers import BatchEncoding
from transformers.cache_utils import StaticSlidingWindowLayer

from moe_offload import OffloadedModel
from moe_offload.offload import loader
from moe_offload.offload import model as model_module
from moe_offload.offload.answer_clock import AnswerClock
from moe_offload.offload.experts import residency as residency_module
from moe_offload.offload.experts.lookahead import Lookahead
from moe_offload.offload.experts.step_tuning import StepTuner
from moe_offload.offload.graphs import choice
from moe_offload.offload.graphs.answer_cache import AnswerCaches
from moe_offload.offload.graphs.answer_layers import AnswerState, AnswerWindow, KeptMemory
from moe_offload.offload.graphs.captured_step import CapturedStep
from moe_offload.offload.graphs.graphed_forward import GraphedForward
from moe_offload.offload.graphs.speculation import Speculation
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.planning.kv_cache import state_bytes

FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module", params=FAMILIES)
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = make_config(request.param)
    if request.param == "gpt_oss":
        config.sliding_window = 16  # full after a few tokens
    checkpoint = save_random_model(config, folder / "checkpoint")
    return pack_model(str(checkpoint), folder / "pack", format="source")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    with loading_on_fake_devices(monkeypatch) as load:
        yield load


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    fake = FakeRecorder()
    monkeypatch.setattr(choice, "make_recorder", lambda device: fake)
    monkeypatch.setattr(residency_module, "slot_kernels", recorded_kernels)
    for module in (model_module, loader):  # on a GPU, embeddings are not read from the pack row by row
        monkeypatch.setattr(module, "table_in_pack", lambda *args: None)
    monkeypatch.setenv("MOE_OFFLOAD_DENSE", "eager")  # calls of our own kernels are not torch's to record
    return fake


def forward_of(model: OffloadedModel) -> GraphedForward:
    forward = model._graphs.forward
    assert forward is not None
    return forward


@pytest.mark.parametrize(("slots", "host_slots"), [(0, 4), (10, 30), (1000, 1000)])
def test_graphs_change_no_bit(pack: Path, load: Load, slots: int, host_slots: int):
    budget = {"slots_bytes": slots * 4096, "host_bytes": host_slots * 4096, "prefetch": "off", "warm_start": False}
    plain = load(pack, **budget, graphs="off")
    expected = answer(plain)
    model = load(pack, **budget, graphs="auto")
    forward = forward_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(answer(model), expected)
        assert torch.equal(answer(model), expected)  # from the recordings of the first answer
    assert not forward.is_off
    assert forward.num_recorded <= 2  # a window that is full is another step
    assert forward.num_by_layers + forward.num_whole > NEW_TOKENS
    check_tables(model)
    assert model.stats.hits + model.stats.misses >= 2 * (plain.stats.hits + plain.stats.misses)


def check_tables(model: OffloadedModel) -> None:
    table = model._graphs.table
    assert table is not None
    for layer_idx in range(len(model.manifest.layers)):
        table.check_integrity(layer_idx, model._residency.cache.resident(layer_idx))
    model._residency.cache.check_integrity()


STATES: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "jamba": {},
    "lfm2_moe": {},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "n_groups": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "attention", "linear_attention"]},
}


@pytest.mark.parametrize("family", STATES)
def test_states_that_every_token_changes(family: str, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch):
    config = make_config(family, **STATES[family])
    checkpoint = save_random_model(config, tmp_path / "checkpoint")
    pack = pack_model(str(checkpoint), tmp_path / "pack", format="source")
    budget = {"host_bytes": 1 << 30, "prefetch": "off", "warm_start": False}
    expected = answer(load(pack, slots_bytes=0, **budget, graphs="off"))
    monkeypatch.setattr(Speculation, "is_on", True)
    for slots_bytes in (0, 1 << 30):
        model = load(pack, slots_bytes=slots_bytes, **budget, graphs="auto")
        for _ in range(2):
            assert torch.equal(answer(model), expected)
        forward = forward_of(model)
        assert not forward.is_off
        assert (forward.num_whole if slots_bytes else forward.num_undone) > NEW_TOKENS // 2
    caches = model._graphs.caches
    assert caches is not None
    with torch.inference_mode(), caches.lend(1) as cache:
        states = [tensor for layer in cache.layers if isinstance(layer, AnswerState) for tensor in layer.state]
    assert 0 < sum(tensor.nbytes for tensor in states) <= state_bytes(config, 4)


def test_steps_that_miss_nothing_are_launched_whole(pack: Path, load: Load):
    model = load(pack, slots_bytes=1 << 30, host_bytes=0, prefetch="off", graphs="auto")
    forward = forward_of(model)
    for _ in range(2):
        answer(model)
    before, hits = (forward.num_whole, forward.num_by_layers, forward.num_undone), model.stats.hits
    answer(model)
    assert (forward.num_whole - NEW_TOKENS + 1, forward.num_by_layers, forward.num_undone) == before
    top_k = 2 * len(model.manifest.layers)
    assert model.stats.hits - hits >= top_k * NEW_TOKENS  # told by the device, and the last step too


def test_a_step_that_was_launched_for_nothing_is_undone(
    pack: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
):
    budget = {"slots_bytes": 10 * 4096, "host_bytes": 30 * 4096, "prefetch": "off", "warm_start": False}
    expected = answer(load(pack, **budget, graphs="off"))
    monkeypatch.setattr(Speculation, "is_on", True)
    model = load(pack, **budget, graphs="auto")
    assert torch.equal(answer(model), expected)
    assert forward_of(model).num_undone > 4
    assert not forward_of(model).is_off
    check_tables(model)


def test_a_recording_that_is_wrong_is_found_out(
    pack: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
):
    """The first steps are compared with the model's own code, and that is what counts."""
    budget = {"slots_bytes": 1 << 30, "host_bytes": 0, "prefetch": "off"}
    expected = answer(load(pack, **budget, graphs="off"))
    model = load(pack, **budget, graphs="auto")
    run_by_layers = CapturedStep.run_by_layers

    def run_wrongly(step: CapturedStep, *args: Any) -> bool:
        missed = run_by_layers(step, *args)
        step.output.logits += 1
        return missed

    monkeypatch.setattr(CapturedStep, "run_by_layers", run_wrongly)
    with pytest.warns(UserWarning, match="other logits"):
        assert torch.equal(answer(model), expected)
    assert forward_of(model).is_off
    assert torch.equal(answer(model), expected)


def test_code_that_waits_for_the_device_is_not_recorded(pack: Path, load: Load):
    budget = {"slots_bytes": 1 << 30, "host_bytes": 0, "prefetch": "off"}
    expected = answer(load(pack, **budget, graphs="off"))
    model = load(pack, **budget, graphs="auto")

    def wait(module: Any, args: Any) -> None:
        args[0].sum().item()

    model.model.lm_head.register_forward_pre_hook(wait)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        assert torch.equal(answer(model), expected)
    assert forward_of(model).is_off


def test_kernels_that_read_slots_on_the_host_stay_out_of_the_recording(
    pack: Path, load: Load, monkeypatch: pytest.MonkeyPatch
):
    budget = {"slots_bytes": 10 * 4096, "host_bytes": 30 * 4096, "prefetch": "off", "graphs": "auto"}
    expected = answer(load(pack, **budget))
    monkeypatch.setattr(RecordedKernels, "reads_slots", True)
    model = load(pack, **budget)
    assert torch.equal(answer(model), expected)
    forward = forward_of(model)
    assert not forward.is_off
    assert forward.num_by_layers
    assert not forward.num_whole


def test_a_prompt_in_pieces_and_then_recorded_steps(pack: Path, load: Load):
    model = load(pack, slots_bytes=1 << 30, host_bytes=0, prefetch="off", graphs="auto")
    whole = answer(model)
    model._generator._chunk_tokens = 4
    pieces = answer(model)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(answer(model), pieces)
    assert not forward_of(model).is_off


def test_recorded_steps_look_ahead_as_others_do(pack: Path, load: Load):
    some_slots_bytes = 7 * read_manifest(pack).layers[0].slot_bytes
    budget = {"slots_bytes": some_slots_bytes, "host_bytes": 30 * 4096, "warm_start": False}
    for depth in (1, 2):
        eager = load(pack, **budget, prefetch=depth, graphs="off")
        expected = answer(eager)
        model = load(pack, **budget, prefetch=depth, graphs="auto")
        assert torch.equal(answer(model), expected)
        forward = forward_of(model)
        assert not forward.is_off
        assert forward.num_by_layers > NEW_TOKENS // 2
        assert lookahead_of(model).counts == lookahead_of(eager).counts
        assert model.stats.prefetch_used
        check_tables(model)


def test_trials_of_lookahead_are_of_recorded_steps(pack: Path, load: Load, monkeypatch: pytest.MonkeyPatch):
    times: list[float] = []
    record = StepTuner.record
    monkeypatch.setattr(StepTuner, "record", lambda tuner, *step: times.append(step[0]) or record(tuner, *step))
    budget = {"slots_bytes": 10 * 4096, "host_bytes": 30 * 4096, "warm_start": False}
    expected = answer(load(pack, **budget, prefetch="off", graphs="off"))
    model = load(pack, **budget, prefetch="auto", graphs="auto")
    for _ in range(2):
        assert torch.equal(answer(model), expected)
    forward = forward_of(model)
    assert forward.num_recorded >= 2  # with lookahead and without
    assert 0 < len(times) < forward.num_by_layers + forward.num_whole  # those that were checked do not count


def test_lookahead_is_left_off_where_nothing_is_missed(pack: Path, load: Load):
    model = load(pack, slots_bytes=1 << 30, host_bytes=0, prefetch=2, graphs="auto")
    for _ in range(2):
        answer(model)
    before = lookahead_of(model).counts
    answer(model)
    assert forward_of(model).num_whole > NEW_TOKENS
    assert lookahead_of(model).counts == before


def lookahead_of(model: OffloadedModel) -> Lookahead:
    lookahead = model._step.predictor
    assert isinstance(lookahead, Lookahead)
    return lookahead


@pytest.mark.parametrize("prefetch", ["off", 1])
@pytest.mark.parametrize("slots", [10, 1000])
def test_recorded_steps_are_traced_as_others_are(pack: Path, load: Load, slots: int, prefetch: str | int):
    traces = []
    for graphs in ("off", "auto"):
        model = load(pack, slots_bytes=slots * 4096, host_bytes=1 << 30, prefetch=prefetch, graphs=graphs)
        for _ in range(2):
            answer(model)
        with model.tracing() as recording:
            answer(model)
        traces.append(recording.trace)
    forward = forward_of(model)
    assert not forward.is_off
    assert forward.num_by_layers > NEW_TOKENS // 2
    eager, recorded = traces
    for name in ("experts", "probs", "token_ids", "phase", "predicted"):
        assert np.array_equal(getattr(recorded, name), getattr(eager, name)), name
    assert recorded.layer_us is not None
    assert (recorded.layer_us[-NEW_TOKENS // 2 :, :, [0, 3]] > 0).all()  # what is dense, and experts


def test_steps_that_the_cpu_has_a_part_in_are_traced(pack: Path, load: Load):
    model = load(pack, slots_bytes=0, host_bytes=1 << 30, prefetch="off", graphs="auto", miss_path="cpu")
    with model.tracing() as recording:
        answer(model)
    assert forward_of(model).num_by_layers > NEW_TOKENS // 2
    assert (recording.trace.experts[-NEW_TOKENS // 2 :] >= 0).all()


def test_two_answers_at_once_have_caches_of_their_own(pack: Path, load: Load):
    model = load(pack, slots_bytes=10 * 4096, host_bytes=30 * 4096, prefetch="off", graphs="auto")
    prompts = [PROMPT[:, : 5 + 3 * turn] for turn in range(2)]
    alone = [tokens_of(model, prompt) for prompt in prompts]
    together: dict[int, torch.Tensor] = {}

    def run(turn: int) -> None:
        together[turn] = tokens_of(model, prompts[turn])

    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for turn in range(2):
        assert torch.equal(together[turn], alone[turn])


def tokens_of(model: OffloadedModel, prompt: torch.Tensor) -> torch.Tensor:
    inputs = BatchEncoding({"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
    sampling = {"max_new_tokens": 16, "temperature": None, "top_p": None, "top_k": None}
    return model._generator._run(inputs, None, sampling, None, model._generator._begin(AnswerClock()))


def test_a_window_that_is_full_forgets_the_oldest():
    """Beside transformers' own, which moves all of it: the same keys, in another order, and back in order if asked."""
    ours = AnswerWindow(KeptMemory(64), 0, 64, sliding_window=4)
    theirs = StaticSlidingWindowLayer(64, sliding_window=4)
    for num_tokens in [3, *[1] * 9, 2, 1, 1]:
        keys, values = torch.randn(1, 2, num_tokens, 8), torch.randn(1, 2, num_tokens, 8)
        kept = [tensor.clone() for tensor in ours.state], ours.counts
        found, expected = ours.update(keys, values), theirs.update(keys, values)
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine.sort(2).values, other.sort(2).values)
        if num_tokens == 1:  # once more, as a step is run again
            state, counts = kept
            after = [ours.keys.clone(), ours.counts]
            for tensor, value in zip(ours.state, state, strict=True):
                tensor.copy_(value)
            ours.counts = counts
            ours.update(keys, values)
            assert torch.equal(ours.keys, after[0])
            assert ours.counts == after[1]
    assert ours.get_seq_length() == theirs.get_seq_length() == 16


def test_caches_of_all_sizes_share_their_memory():
    config = make_config("mixtral")
    caches = AnswerCaches(config, 1000)
    keys = torch.randn(1, 2, 1, 8)
    places = []
    for num_tokens in (10, 300, 1000, 20):
        with caches.lend(num_tokens) as cache, caches.lend(num_tokens) as second:
            cache.update(keys, keys, 0)
            second.update(keys, keys, 0)
            places.append((cache.get_max_length(), cache.layers[0].keys.data_ptr()))
            assert second.layers[0].keys.data_ptr() != places[-1][1]
            assert int(cache.get_seq_length()) == 1
            assert caches.keeps(cache)
            assert not caches.keeps(second)
    assert [tokens for tokens, _ in places] == [256, 512, 1000, 256]
    assert len({address for _, address in places}) == 1
