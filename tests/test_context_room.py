"""A text that needs more than slots leave it takes some of them, whole ones, between passes; and gives them back."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from families import make_config
from family_runs import save_random_model
from transformers import DynamicCache, StaticCache

from moe_offload import OffloadedModel
from moe_offload.cache.trace import EventKind
from moe_offload.errors import BudgetError
from moe_offload.offload import context_room
from moe_offload.offload import model as model_module
from moe_offload.offload.context_room import ContextRoom
from moe_offload.offload.graphs.answer_cache import AnswerCache
from moe_offload.offload.graphs.answer_layers import KeptMemory
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.planning.plan import Plan, make_plan
from moe_offload.offload.tiers import choice as tiers

PLANNED_TOKENS = 32
PROMPT_TOKENS = 24
LONG_TOKENS = 160
Load = Callable[..., OffloadedModel]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    config = make_config("mixtral")
    config.max_position_embeddings = 1 << 20
    return pack_model(str(save_random_model(config, folder / "checkpoint")), folder / "pack", format="source")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """On a device, with so many slots beyond the least beside all of the context, and nothing else to spare."""
    with ExitStack() as stack:

        def plan(*args: Any, device: str, slots: int, **kwargs: Any) -> Plan:
            budget = "ram_bytes" if device == "cpu" else "vram_bytes"
            settings = kwargs | {"device": device, "ram_bytes": 1 << 40}
            with pytest.raises(BudgetError) as refusal:
                make_plan(*args, **settings | {budget: 1})
            slot_bytes = args[0].layers[0].slot_bytes
            found = make_plan(*args, **settings | {budget: refusal.value.needed_bytes + slots * slot_bytes})
            # What torch's segments leave over is more than the context of a tiny model.
            return found if device == "cpu" else replace(found, vram_bytes=found.total_bytes("VRAM"))

        def queue(device: torch.device) -> FakeDevice:
            fake = FakeDevice(3, eager=True)
            fake.run_in_background()
            return fake

        def load(pack: Path, device: str, *, slots: int, **kwargs: Any) -> OffloadedModel:
            with monkeypatch.context() as patch:
                patch.setattr(
                    model_module, "make_plan", lambda *a, **k: plan(*a, **k | {"device": device, "slots": slots})
                )
                patch.setattr(tiers, "CudaQueue", queue)
                settings = {"dtype": "float32", "context_tokens": PLANNED_TOKENS, "prefetch": "off"} | kwargs
                return stack.enter_context(OffloadedModel.from_pretrained(pack, device="cpu", **settings))

        yield load


def slots_of(model: OffloadedModel) -> list[int]:
    cache = model._residency.cache
    return [cache.num_slots(layer_idx) for layer_idx in range(cache.num_layers)]


def fewest_of(model: OffloadedModel) -> list[int]:
    """Beside all of the context and a piece of a prompt."""
    return list(model.plan.fewest_slots)


def run(model: OffloadedModel, num_tokens: int, watch: Callable[[], None] = lambda: None) -> torch.Tensor:
    """The logits of every token of one text, read one by one after a prompt."""
    ids = torch.randint(3, 90, (1, num_tokens), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.model.config)
    logits = []
    pieces = [*ids[:, :-LONG_TOKENS].split(512, dim=1)] if num_tokens > LONG_TOKENS else [ids[:, :PROMPT_TOKENS]]
    with torch.inference_mode():
        for piece in [*pieces, *ids[:, sum(piece.shape[1] for piece in pieces) :].split(1, dim=1)]:
            logits.append(model.model(input_ids=piece, past_key_values=cache).logits)
            watch()
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_context_that_outgrows_its_plan_takes_slots_and_gives_them_back(pack: Path, load: Load, device: str):
    expected = run(load(pack, device, slots=1000), LONG_TOKENS)
    model = load(pack, device, slots=15)
    planned = slots_of(model)
    assert planned == list(model.plan.num_slots)
    history = [sum(planned)]

    def watch() -> None:
        history.append(sum(slots_of(model)))
        model._residency.cache.check_integrity()

    logits = run(model, LONG_TOKENS, watch)
    assert torch.equal(logits, expected), "whose slots were taken changes no bit"
    decoding, at_full_context = history[2:], history[1 + PLANNED_TOKENS - PROMPT_TOKENS]
    assert decoding == sorted(decoding, reverse=True)
    assert at_full_context >= sum(fewest_of(model)), "as long as the plan holds, no more are given up"
    if device == "cpu":
        assert sum(planned) >= history[2] > history[1], "the prompt takes some for a while"
    else:
        assert at_full_context == history[1] == sum(planned)
    assert history[-1] < sum(fewest_of(model))
    assert min(slots_of(model)) >= 1
    assert max(slots_of(model)) - min(slots_of(model)) <= 1
    assert torch.equal(run(model, 30), expected[:, :30])
    step(model, DynamicCache(config=model.model.config))
    assert slots_of(model) == planned, "the long text is gone"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_when_nothing_is_left_the_pass_is_refused(pack: Path, load: Load, device: str):
    model = load(pack, device, slots=3)
    option = "--ram" if device == "cpu" else "--vram"
    with pytest.raises(BudgetError, match=rf"grown to \d+ tokens, 32 were planned: .*--context \d+ and more {option}"):
        run(model, 20 * LONG_TOKENS)
    run(model, 30)


def test_a_slab_without_room_beside_the_old_one_is_read_anew(pack: Path, load: Load, monkeypatch: pytest.MonkeyPatch):
    expected = run(load(pack, "cuda", slots=1000), LONG_TOKENS)
    model = load(pack, "cuda", slots=15)
    allocate, refused = FakeDevice.allocate, []

    def full(device: FakeDevice, size_bytes: int) -> torch.Tensor:
        if len(refused) % 2 == 0:
            refused.append(size_bytes)
            raise BudgetError("full", needed_bytes=size_bytes, budget_bytes=0)
        refused.append(0)
        return allocate(device, size_bytes)

    monkeypatch.setattr(FakeDevice, "allocate", full)
    assert torch.equal(run(model, LONG_TOKENS), expected)
    assert refused
    model._residency.cache.check_integrity()


def test_memory_of_slots_given_up_goes_back_to_the_system(pack: Path, load: Load):
    model = load(pack, "cpu", slots=15)
    run(model, LONG_TOKENS)
    tier = model._residency._tier
    num_given_up = sum(model.plan.num_slots) - sum(slots_of(model))
    given_up = [memory for memories in tier._given_up for memory in memories]
    assert len(given_up) == num_given_up > 0
    assert not any(any(memory.bytes) for memory in given_up), "untouched again"


def test_slots_come_back_when_the_memory_of_a_text_has_gone_back(
    pack: Path, load: Load, monkeypatch: pytest.MonkeyPatch
):
    model = load(pack, "cpu", slots=15)
    slots_then: list[int] = []
    monkeypatch.setattr(context_room, "return_freed_memory", lambda: slots_then.append(sum(slots_of(model))))
    run(model, LONG_TOKENS)
    slots_then.clear()
    fewest = sum(slots_of(model))
    step(model, DynamicCache(config=model.model.config))
    assert slots_then == [fewest]
    assert slots_of(model) == list(model.plan.num_slots)


@pytest.mark.parametrize(("device", "num_tokens"), [("cpu", 30), ("cuda", LONG_TOKENS)])
def test_slots_on_a_gpu_wait_for_other_threads(pack: Path, load: Load, device: str, num_tokens: int):
    model = load(pack, device, slots=15)
    planned, history = slots_of(model), []
    inside, go_on = threading.Event(), threading.Event()
    ids = torch.ones(1, 4, dtype=torch.long)

    def stop(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)

    handle = model.model.model.layers[1].register_forward_pre_hook(stop)
    thread = threading.Thread(target=partial(model.model, input_ids=ids))
    thread.start()
    assert inside.wait(60)
    try:
        run(model, num_tokens, lambda: history.append(slots_of(model)))
        assert (history[0] == planned) == (device == "cuda")
        assert (history[-1] == planned) == (device == "cuda")
    finally:
        go_on.set()
        thread.join(60)
        handle.remove()
    run(model, LONG_TOKENS)
    assert slots_of(model) != planned


def test_an_interrupted_pass_is_over_for_other_threads(pack: Path, load: Load):
    model = load(pack, "cpu", slots=15)
    planned = slots_of(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    handle.remove()
    thread = threading.Thread(target=run, args=(model, LONG_TOKENS))
    thread.start()
    thread.join(60)
    assert slots_of(model) != planned


def step(model: OffloadedModel, cache: Any, *, batch_size: int = 1, num_tokens: int = 4) -> None:
    with torch.inference_mode():
        model.model(input_ids=torch.ones(batch_size, num_tokens, dtype=torch.long), past_key_values=cache)


def test_a_cache_of_fixed_size_is_counted_whole(pack: Path, load: Load):
    model = load(pack, "cpu", slots=15)
    planned = slots_of(model)
    cache: Any = StaticCache(config=model.model.config, max_cache_len=PLANNED_TOKENS)
    step(model, cache)
    at_full_context = slots_of(model)
    assert sum(fewest_of(model)) <= sum(at_full_context) < sum(planned), "as large as the context that was planned"
    del cache
    cache = StaticCache(config=model.model.config, max_cache_len=LONG_TOKENS)
    step(model, cache)
    given_up = slots_of(model)
    assert sum(given_up) < sum(at_full_context)
    step(model, cache)
    assert slots_of(model) == given_up, "it grows no more"
    del cache
    step(model, DynamicCache(config=model.model.config))
    assert slots_of(model) == planned


def test_answers_of_all_sizes_share_what_was_planned(pack: Path, load: Load):
    """They stay between answers, in the memory of one context."""
    model = load(pack, "cuda", slots=15)
    planned = slots_of(model)
    memory = KeptMemory(-(-PLANNED_TOKENS // 8) * 8)
    caches = [AnswerCache(model.model.config, num_tokens, memory) for num_tokens in (16, memory.max_tokens)]
    for cache in caches:
        step(model, cache)
        assert slots_of(model) == planned
    step(model, DynamicCache(config=model.model.config), num_tokens=PLANNED_TOKENS)
    assert sum(slots_of(model)) < sum(planned), "a text beside them is one more"


def test_a_batch_is_counted_text_by_text(pack: Path, load: Load):
    """Keys and values of all of its texts, and what a pass makes of each of them."""
    slots = []

    def needs(model: OffloadedModel, batch_size: int) -> list[int]:
        room = _room(model)
        room._in_pass[threading.get_ident()] = (batch_size, PLANNED_TOKENS)
        return room._needed_bytes([(batch_size, PLANNED_TOKENS)])

    for batch_size in (1, 2, 3):
        model = load(pack, "cpu", slots=21)
        room = [device.room_bytes for device in _room(model)._devices]
        needed, one = needs(model, batch_size), needs(model, 1)
        workspace = model.plan.workspace_bytes
        if batch_size > 1:
            assert needed[0] - one[0] >= (batch_size - 1) * (one[0] - workspace), "keys and values"
            assert needed[0] > room[0]
        step(model, DynamicCache(config=model.model.config), batch_size=batch_size, num_tokens=PLANNED_TOKENS)
        slots.append(sum(slots_of(model)))
    assert slots[0] > slots[1] >= slots[2]


def _room(model: OffloadedModel) -> ContextRoom:
    (hook,) = [
        hook.__self__
        for hook in model.model._forward_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), ContextRoom)
    ]
    return hook


def test_a_recording_tells_how_many_slots_there_are(pack: Path, load: Load):
    """Also where it begins while a prompt has some of them."""
    model = load(pack, "cpu", slots=15)
    most, cache = slots_of(model), DynamicCache(config=model.model.config)
    step(model, cache, num_tokens=PROMPT_TOKENS)
    during = slots_of(model)
    assert during != most
    with model.tracing() as recording:
        step(model, cache, num_tokens=1)
    trace = recording.trace
    assert trace.num_slots is not None
    assert trace.event_kind is not None
    assert trace.num_slots.tolist() == most
    begin = np.cumsum(trace.event_size) - trace.event_size
    told = list(most)
    seen = []
    for index in np.flatnonzero(trace.event_kind == EventKind.RESIZE):
        told[trace.event_layer[index]] = int(trace.event_experts[begin[index]])
        seen.append(list(told))
    assert during in seen
    assert told == slots_of(model)
