"""Recording a model: what the trace says is what happened, and recording changes nothing."""

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from family_runs import example_inputs
from loaded_models import PROMPT, check_health, loaded, make_pack

from moe_offload import OffloadedModel
from moe_offload.cache import (
    DEFAULT_POLICY,
    Admit,
    EventKind,
    ExpertCache,
    Outcome,
    RoutingTrace,
    StatsSnapshot,
    TransferKind,
    read_trace,
)
from moe_offload.cache.trace_frames import pack_arrays
from moe_offload.cli.main import cli
from moe_offload.errors import ConfigError
from moe_offload.offload.experts.expert_choice import ExpertChoiceBlock
from moe_offload.offload.tracing import recording as recording_module

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("tracing"), "mixtral")


@pytest.fixture
def model(pack: Path) -> Iterator[OffloadedModel]:
    with loaded(pack, [4] * NUM_LAYERS, prefetch=0) as model:
        yield model


def num_tokens(model: OffloadedModel, prompt: str = PROMPT) -> int:
    return len(model.tokenizer(prompt)["input_ids"])


def watch_choices(model: OffloadedModel) -> list[list[tuple[int, Any, Any]]]:
    """By forward pass, what each layer's experts are called with."""
    seen: list[list[tuple[int, Any, Any]]] = []
    model.model.register_forward_pre_hook(lambda *_: seen.append([]))
    for layer_idx, layer in enumerate(model.manifest.layers):

        def called(module: Any, args: Any, layer_idx: int = layer_idx) -> None:
            seen[-1].append((layer_idx, args[1].clone(), args[2].clone()))

        model.model.get_submodule(layer.module).register_forward_pre_hook(called)
    return seen


def replayed(trace: RoutingTrace, policy: str) -> StatsSnapshot:
    """The counts of a cache that is asked what the trace says the recorded one was asked, in that order."""
    assert trace.num_experts is not None
    assert trace.num_slots is not None
    assert trace.event_kind is not None
    cache = ExpertCache(trace.num_experts.tolist(), trace.num_slots.tolist(), policy)
    begin = 0
    for kind, layer_idx, size in zip(
        trace.event_kind.tolist(), trace.event_layer.tolist(), trace.event_size.tolist(), strict=True
    ):
        ids = trace.event_experts[begin : begin + size].tolist()
        weights = trace.event_weights[begin : begin + size].tolist()
        begin += size
        match EventKind(kind):
            case EventKind.ACQUIRE | EventKind.ACQUIRE_IF_HOTTER:
                prompt = kind == EventKind.ACQUIRE_IF_HOTTER
                lease = cache.acquire(
                    layer_idx,
                    ids,
                    weights=weights,
                    admit=Admit.IF_HOTTER if prompt else Admit.ALWAYS,
                    phase="prefill" if prompt else "decode",
                )
                for placement in lease.hits + lease.misses:
                    if placement.loading:
                        cache.mark_loaded(layer_idx, placement.expert_idx)
                cache.release(lease)
            case EventKind.NEW_SEQUENCE:
                cache.new_sequence()
            case EventKind.PREFETCH | EventKind.PREFETCH_EVICTING:
                cache.admit_prefetch(layer_idx, ids, evict=kind == EventKind.PREFETCH_EVICTING)
            case EventKind.LOADED:
                cache.mark_loaded(layer_idx, ids[0])
            case EventKind.DROPPED:
                cache.drop_prefetch(layer_idx, ids[0])
            case EventKind.FAILED:
                cache.mark_failed(layer_idx, ids[0])
            case EventKind.WARM:
                cache.admit_warm(layer_idx, ids)
            case EventKind.REMEMBER:
                cache.remember(layer_idx, ids)
            case EventKind.RESIZE:
                cache.resize(layer_idx, ids[0])
    cache.check_integrity()
    return cache.stats.snapshot()


def test_the_trace_says_what_the_routers_chose(model: OffloadedModel) -> None:
    seen = watch_choices(model)
    with model.tracing() as recording:
        model.generate(PROMPT, max_new_tokens=6)
        model.generate("w7 w8", max_new_tokens=3)
    trace = recording.trace
    choices = [[index for _, index, _ in layers] for layers in seen]
    expected = np.concatenate([np.stack([index.numpy() for index in layers], axis=1) for layers in choices])
    weights = np.concatenate([np.stack([w.float().numpy() for _, _, w in layers], axis=1) for layers in seen])
    np.testing.assert_array_equal(trace.experts, expected)
    np.testing.assert_array_equal(trace.probs, weights.astype(np.float16))
    prompt, second = num_tokens(model), num_tokens(model, "w7 w8")
    more = trace.num_tokens - prompt - 5 - second
    assert trace.phase.tolist() == [0] * prompt + [1] * 5 + [0] * second + [1] * more
    assert trace.sequence.tolist() == [0] * (prompt + 5) + [1] * (second + more)
    assert trace.step_tokens.tolist() == [prompt, 1, 1, 1, 1, 1, second, *[1] * more]
    assert trace.step.tolist() == np.repeat(np.arange(len(trace.step_tokens)), trace.step_tokens).tolist()
    assert trace.num_experts.tolist() == [NUM_EXPERTS] * NUM_LAYERS
    assert trace.num_slots.tolist() == [4] * NUM_LAYERS
    assert trace.token_ids is None
    assert trace.meta["format"] == "nf4"
    assert trace.meta["expert_bits"] > 4
    assert [answer["new_tokens"] for answer in trace.meta["answers"]] == [6, 1 + more]
    assert all(first_s > 0 for first_s in trace.meta["time_to_first_token_s"])


def test_tokens_are_told_when_asked_for(model: OffloadedModel) -> None:
    with model.tracing(tokens=True) as recording:
        model.generate(PROMPT, max_new_tokens=4)
    ids = recording.trace.token_ids.tolist()
    prompt_ids = model.tokenizer(PROMPT)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    assert len(ids) == len(prompt_ids) + 3
    assert recording.trace.num_tokens == len(ids)


@pytest.mark.parametrize("policy", ["lru", "lfu", "decay", "recall"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_cache_that_is_asked_the_same_counts_the_same(pack: Path, policy: str, slots: int) -> None:
    """Prompts in pieces, prefetches and answers one after the other included."""
    with (
        loaded(pack, [slots] * NUM_LAYERS, prefetch=1, policy=policy, trace=None) as model,
        model.tracing() as recording,
    ):
        long_prompt = " ".join(f"w{i}" for i in range(3, 40))
        for prompt in (PROMPT, long_prompt, "w9 w10"):
            model.generate(prompt, max_new_tokens=8)
        check_health(model)
        stats = model._residency.cache.stats.snapshot()
        report = model.stats
    trace = recording.trace
    assert replayed(trace, policy) == stats
    assert EventKind.ACQUIRE_IF_HOTTER in trace.event_kind
    found, asked = np.zeros(256, int), 0
    begin = 0
    for step, count in enumerate(trace.step_tokens):
        for layer_idx in range(NUM_LAYERS):
            rows = slice(begin, begin + count)
            pairs = dict(zip(trace.experts[rows, layer_idx].flat, trace.outcome[rows, layer_idx].flat, strict=True))
            found += np.bincount(list(pairs.values()), minlength=256)
            asked += len(pairs)
        assert trace.step[begin] == step
        begin += count
    assert found.sum() == asked == report.hits + report.misses
    assert found[[Outcome.RESIDENT, Outcome.PREFETCHED, Outcome.LATE]].sum() == report.hits
    assert found[Outcome.PREFETCHED] + found[Outcome.LATE] == report.prefetch_used
    assert found[Outcome.LATE] == report.prefetch_late


def test_times_add_up(model: OffloadedModel) -> None:
    with model.tracing() as recording:
        begin_s = time.perf_counter()
        model.generate(PROMPT, max_new_tokens=10)
        elapsed_us = (time.perf_counter() - begin_s) * 1e6
        stall_us = model.stats.stall_s * 1e6
    trace = recording.trace
    ends = trace.step_begin_us + trace.step_us
    np.testing.assert_array_equal(ends[:-1], trace.step_begin_us[1:])
    assert (trace.layer_us.sum(axis=(1, 2)) <= trace.step_us).all()
    assert trace.step_us.sum() <= elapsed_us
    assert abs(trace.layer_us[:, :, 2].sum() - stall_us) <= trace.layer_us[:, :, 2].size
    assert (trace.layer_us[:, :, :2] > 0).all()  # dense and router


def test_reads_are_told(model: OffloadedModel) -> None:
    with model.tracing() as recording:
        model.generate(PROMPT, max_new_tokens=10)
    trace, report = recording.trace, model.last_run
    assert report is not None
    assert trace.transfer_bytes.sum() == report.bytes_read
    assert (trace.transfer_kind == TransferKind.DEMAND).all()
    assert (trace.transfer_begin_us <= trace.transfer_end_us).all()
    assert len(trace.transfer_kind) == report.misses


def test_predictions_are_told_with_their_distance(pack: Path) -> None:
    with loaded(pack, [4] * NUM_LAYERS, prefetch=2) as model, model.tracing() as recording:
        model.generate(PROMPT, max_new_tokens=12)
        counts = model._meter.read().lookahead
    trace = recording.trace
    assert trace.distance.tolist() == [1, 2]
    predicted = trace.predicted
    assert (predicted[:, 0] == -1).all()
    assert (predicted[:, 1, 1] == -1).all()
    chosen = [set(row) - {-1} for row in trace.experts.reshape(-1, TOP_K).tolist()]
    # Of two predictions for a layer the nearer one counts.
    rows = np.where((predicted[:, :, :1] >= 0).any(-1, keepdims=True), predicted[:, :, :1], predicted[:, :, 1:2])
    named = [set(row) - {-1} for row in rows.reshape(-1, rows.shape[-1]).tolist()]
    decoding = np.repeat(trace.step_tokens[trace.step] == 1, NUM_LAYERS)
    assert sum(len(c & n) for c, n, d in zip(chosen, named, decoding, strict=True) if d) == counts.right
    kinds = set(trace.transfer_kind.tolist())
    assert TransferKind.USED in kinds or TransferKind.WASTED in kinds


def test_a_warm_start_is_told(pack: Path, tmp_path: Path) -> None:
    for name in ("cold", "warm"):
        path = tmp_path / f"{name}.npz"
        with loaded(pack, [4] * NUM_LAYERS, warm_start=True, trace=path) as model:
            if name == "warm":
                deadline_s = time.monotonic() + 10
                while model.stats.warmed < 4 * NUM_LAYERS and time.monotonic() < deadline_s:
                    time.sleep(0.01)
            model.generate(PROMPT, max_new_tokens=4)
            stats = model._residency.cache.stats.snapshot()
        trace = read_trace(path)
        assert replayed(trace, DEFAULT_POLICY) == stats
        assert (TransferKind.WARM in trace.transfer_kind) == (name == "warm")
    (pack / ".hot-set.json").unlink()


def test_answers_are_the_same_while_recording(pack: Path) -> None:
    answers = []
    for is_recording in (False, True):
        with loaded(pack, [2] * NUM_LAYERS, prefetch=1) as model:
            inputs = example_inputs(model.model.config, 1, 6)
            if is_recording:
                with model.tracing():
                    answers.append((model.generate(PROMPT, max_new_tokens=9), model.model(**inputs).logits))
            else:
                answers.append((model.generate(PROMPT, max_new_tokens=9), model.model(**inputs).logits))
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


def test_nothing_is_left_after_a_recording(model: OffloadedModel) -> None:
    model.generate(PROMPT, max_new_tokens=2)  # the first pass finds out which norm feeds which router
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.model.modules()]
    threads = set(threading.enumerate())
    with model.tracing() as recording:
        with pytest.raises(ConfigError, match="is being recorded already"), model.tracing():
            pass
        with pytest.raises(ConfigError, match="has not ended"):
            _ = recording.trace
        model.generate(PROMPT, max_new_tokens=2)
    assert model._residency.observer is None
    assert model._residency.cache._observer is None
    assert model._residency._tier._reader.observer is None  # type: ignore[attr-defined]
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.model.modules()]
    assert set(threading.enumerate()) <= threads
    assert gc.get_freeze_count() == 0
    model.generate(PROMPT, max_new_tokens=2)
    with model.tracing() as second:
        model.generate(PROMPT, max_new_tokens=2)
    assert recording.trace.num_tokens == second.trace.num_tokens


def test_a_batch_is_several_sequences(model: OffloadedModel) -> None:
    with model.tracing() as recording:
        inputs = example_inputs(model.model.config, 3, 5)
        model.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        model.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    trace = recording.trace
    assert trace.step_tokens.tolist() == [15, 3, 3, 3, 15, 3]
    prompt, step = [0] * 5 + [1] * 5 + [2] * 5, [0, 1, 2]
    assert trace.sequence.tolist() == prompt + step * 3 + [3 + s for s in prompt + step]
    assert trace.phase.tolist() == [0] * 15 + [1] * 9 + [0] * 15 + [1] * 3
    assert (trace.experts >= 0).all()
    assert (trace.outcome != Outcome.UNKNOWN).all()


def test_a_model_without_a_cache_reads_its_text_again(model: OffloadedModel) -> None:
    inputs = example_inputs(model.model.config, 1, 4)
    with model.tracing() as recording:
        model.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
    assert recording.trace.step_tokens.tolist() == [4, 5, 6]
    assert (recording.trace.experts >= 0).all()


def test_prompts_in_pieces_are_whole(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_offload.offload.experts import layer

    seen = watch_choices(model)
    monkeypatch.setattr(layer, "ROUTED_BUFFER_BYTES", 5 * TOP_K * model.model.config.hidden_size * 4)
    with model.tracing() as recording:
        model.generate(" ".join(f"w{i}" for i in range(3, 40)), max_new_tokens=2)
    trace = recording.trace
    for layer_idx, index, _ in seen[0]:
        np.testing.assert_array_equal(trace.experts[: len(index), layer_idx], index.numpy())
    assert (trace.outcome != Outcome.UNKNOWN).all()
    assert replayed(trace, DEFAULT_POLICY) == model._residency.cache.stats.snapshot()


def test_an_interrupted_pass_leaves_no_tokens(model: OffloadedModel) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with model.tracing() as recording:
        hook = model.model.get_submodule(model.manifest.layers[1].module).register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, max_new_tokens=2)
        hook.remove()
        model.generate(PROMPT, max_new_tokens=2)
        stats = model._residency.cache.stats.snapshot()
    trace = recording.trace
    assert trace.num_tokens == num_tokens(model) + 1
    assert trace.event_token.min() == -1  # what the interrupted pass had asked for is told all the same
    assert replayed(trace, DEFAULT_POLICY) == stats


def test_experts_that_choose_tokens_break_nothing(model: OffloadedModel) -> None:
    experts = model.model.get_submodule(model.manifest.layers[1].module)
    router = torch.nn.Linear(model.model.config.hidden_size, NUM_EXPERTS, bias=False, dtype=torch.bfloat16)
    block = ExpertChoiceBlock.on(experts, router)
    with model.tracing() as recording, torch.no_grad():
        block(torch.randn(1, 6, model.model.config.hidden_size, dtype=torch.bfloat16))
        model.model.model.layers[1].mlp = block
        model.model(**example_inputs(model.model.config, 1, 6))
    trace = recording.trace
    assert trace.num_tokens == 6
    assert (trace.experts[:, 1] == -1).all()
    assert (trace.experts[:, [0, 2]] >= 0).all()
    assert [size for size, layer in zip(trace.event_size, trace.event_layer, strict=True) if layer == 1] == [8, 8]
    assert replayed(trace, DEFAULT_POLICY) == model._residency.cache.stats.snapshot()


@pytest.mark.parametrize("family", ["llama4", "jetmoe", "switch_transformers", "longcat_flash", "nllb_moe", "dbrx"])
def test_families_of_other_kinds_are_recorded(family: str, tmp_path: Path) -> None:
    folder = make_pack(tmp_path, family)
    with OffloadedModel.from_pretrained(folder, device="cpu", ram="1GiB", context_tokens=64, warm_start=False) as model:
        with model.tracing() as recording:
            inputs = example_inputs(model.model.config, 1, 5)
            model.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        stats = model._residency.cache.stats.snapshot()
    trace = recording.trace
    assert replayed(trace, DEFAULT_POLICY) == stats
    assert (trace.experts >= 0).any()
    assert (trace.step_tokens > 0).all()


def test_several_threads_at_once(model: OffloadedModel) -> None:
    with model.tracing() as recording:
        threads = [
            threading.Thread(target=model.generate, args=(prompt,), kwargs={"max_new_tokens": 6})
            for prompt in (PROMPT, "w7 w9 w11")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = recording.trace
    assert set(trace.sequence.tolist()) == {0, 1}
    for sequence, phase in ((0, 0), (1, 0)):
        assert (trace.phase[trace.sequence == sequence][:2] == phase).all()
    assert (trace.experts >= 0).all()
    assert sorted(np.bincount(trace.step, minlength=len(trace.step_tokens)).tolist()) == sorted(trace.step_tokens)


# -- files --


def test_a_trace_goes_to_a_file(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "FLUSH_EVERY_S", 0.01)
    path = tmp_path / "run.npz"
    with loaded(pack, [3] * NUM_LAYERS, trace=path, trace_tokens=True) as model:
        model.generate(PROMPT, max_new_tokens=8)
        deadline_s = time.monotonic() + 10
        while not read_trace(f"{path}.partial").num_tokens and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert read_trace(f"{path}.partial").num_tokens
    trace = read_trace(path)
    assert trace.num_tokens == len(trace.token_ids) == num_tokens(model) + 7
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]
    assert trace.meta["policy"] == DEFAULT_POLICY
    assert trace.meta["prefetch"] == "auto"


def test_a_path_that_cannot_be_written_is_refused_before_loading(pack: Path, tmp_path: Path) -> None:
    def on_plan(plan: Any) -> None:
        raise AssertionError("the model was being loaded")

    with pytest.raises(ConfigError, match=r"none.run\.npz cannot be written"):
        OffloadedModel.from_pretrained(pack, device="cpu", trace=tmp_path / "none" / "run.npz", on_plan=on_plan)


def test_tokens_without_a_trace_are_refused(pack: Path) -> None:
    with pytest.raises(ConfigError, match="name its file"):
        OffloadedModel.from_pretrained(pack, device="cpu", trace_tokens=True)


def test_the_command_line_records(pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    arguments = [
        "generate",
        str(pack),
        "--raw",
        "-p",
        PROMPT,
        "--max-new-tokens",
        "3",
        "--ram",
        "1GiB",
        "--context",
        "64",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--trace", str(path)])
    assert result.exit_code == 0, result.output
    assert f"trace written to {path}" in result.stderr.replace("\n", "")
    trace = read_trace(path)
    assert trace.token_ids is None
    assert trace.step_tokens[1:].tolist() == [1, 1]
    (pack / ".hot-set.json").unlink()


def test_a_model_that_cannot_be_loaded_leaves_no_trace(pack: Path, tmp_path: Path) -> None:
    from moe_offload.errors import BudgetError

    with pytest.raises(BudgetError):
        OffloadedModel.from_pretrained(pack, device="cpu", ram=1000, trace=tmp_path / "run.npz")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_the_trace_and_not_the_run(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "FLUSH_EVERY_S", 0.01)
    with loaded(pack, [3] * NUM_LAYERS, trace=tmp_path / "run.npz") as model:
        writer = model._recording._sink  # type: ignore[union-attr]
        writer._file.close()  # type: ignore[attr-defined]
        writer._file = open("/dev/full", "wb", buffering=0)  # type: ignore[attr-defined] # noqa: SIM115
        assert model.generate(PROMPT, max_new_tokens=8)
        with pytest.warns(UserWarning, match=r"the trace ended early: .*No space left"):
            model.close()
    assert read_trace(tmp_path / "run.npz.partial").num_tokens == 0


# -- size --


@pytest.mark.parametrize("num_experts", [64, 512])
def test_a_layer_and_token_take_less_than_a_hundred_bytes(num_experts: int) -> None:
    """A second of decoding with 8 experts a token and two prediction distances, before compression."""
    from moe_offload.cache import Lease, Placement
    from moe_offload.offload.tracing.blocks import BlockMaker
    from moe_offload.offload.tracing.recorder import Recorder

    layers, top_k, steps = 32, 8, 40
    rng, recorder = np.random.default_rng(0), Recorder(lambda: False)
    module = object()
    recorder.told(EventKind.NEW_SEQUENCE, -1, ())
    for _ in range(steps + 1):
        recorder.begin_pass(module, torch.zeros(1, 1, dtype=torch.long))
        for layer_idx in range(layers):
            ids = rng.permutation(num_experts)[:top_k].tolist()
            weights = rng.random(top_k).tolist()
            recorder.router_called()
            recorder.begin_layer(layer_idx, torch.tensor([ids]), torch.tensor([weights]))
            hits = [Placement(e, 0, None, False) for e in ids[:5]]
            misses = [Placement(e, 0, None, True) for e in ids[5:]]
            lease = Lease(layer_idx, hits, misses, [], 0, None, is_open=False)  # type: ignore[arg-type]
            recorder.acquired(lease, ids, weights, Admit.ALWAYS)
            recorder.waited(3_000_000)
            for target_idx in range(layer_idx + 1, min(layers, layer_idx + 3)):
                named = rng.permutation(num_experts)[:top_k].tolist()
                recorder.predicted(layer_idx, target_idx, named, torch.tensor([named]))
            recorder.end_layer()
        recorder.end_pass(module)
    passes, events = recorder.take()
    assert len(passes) == steps
    arrays = BlockMaker([num_experts] * layers, recorder.begin_ns).block(passes, events, [])
    assert {"experts", "probs", "outcome", "predicted", "layer_us", "event_kind"} <= arrays.keys()
    assert arrays["predicted"].shape == (steps, layers, 2, top_k)
    assert len(pack_arrays(arrays)) / (steps * layers) < 100
