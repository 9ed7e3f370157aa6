"""Asking later layers' routers ahead of time: what is predicted, what it brings, and when it is left off."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import example_inputs
from faulty_disk import FaultyDisk
from loaded_models import PROMPT, check_health, loaded, make_pack

from moe_offload import OffloadedModel
from moe_offload.errors import ConfigError
from moe_offload.offload.experts.lookahead import LookaheadCounts
from moe_offload.offload.experts.prefetch_tuning import parse_prefetch

NUM_LAYERS, TOP_K = 3, 2


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("lookahead"), "mixtral")


def make_predictable(model: Any) -> None:
    """Attention and experts add nothing, and all norms and routers are one: each layer chooses what the first did."""
    layers = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        layer.post_attention_layernorm.weight.data.copy_(layers[0].post_attention_layernorm.weight.data)
        layer.mlp.gate.weight.data.copy_(layers[0].mlp.gate.weight.data)


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def model(pack: Path, disk: FaultyDisk) -> Iterator[OffloadedModel]:
    with loaded(pack, [4] * NUM_LAYERS, disk, prefetch=1) as model:
        yield model


def decode(model: OffloadedModel, num_tokens: int = 20) -> None:
    inputs = example_inputs(model.model.config, 1, 1)
    model.model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)


def test_a_predictable_router_is_predicted(model: OffloadedModel) -> None:
    make_predictable(model.model)
    decode(model)
    stats = model.stats
    assert stats.prefetch_recall == 1.0
    counts = model._meter.read().lookahead
    # All but the first pass, which finds out how; each layer but the first is predicted by the one before.
    assert counts.chosen == counts.predicted == counts.right == 19 * (NUM_LAYERS - 1) * TOP_K
    assert stats.prefetch_used > 0
    assert stats.prefetch_wasted == 0
    check_health(model)


def test_prefetched_experts_are_hits(pack: Path) -> None:
    """With prefetching, only the first layer still waits for experts that nobody foresaw."""
    misses = {}
    for depth in (0, 2):
        with loaded(pack, [4] * NUM_LAYERS, prefetch=depth) as model:
            make_predictable(model.model)
            decode(model, 3)
            before = model._meter.read()
            decode(model)
            counts = model._meter.read().cache.diff(before.cache)
            misses[depth] = counts.layers[0].decode.misses, model._meter.since(before).misses
    first_layer, all_layers = misses[2]
    assert first_layer == all_layers == misses[0][0] > 0
    assert misses[0][1] > misses[0][0]


def test_what_was_wrong_is_counted(model: OffloadedModel) -> None:
    """A router that chooses at random is predicted at random."""
    gate = model.model.model.layers[1].mlp.gate
    generator = torch.Generator().manual_seed(0)
    chosen: list[list[int]] = []

    def choose(module: Any, args: Any, output: Any) -> Any:
        logits, weights, _ = output
        index = torch.stack([torch.randperm(8, generator=generator)[:TOP_K] for _ in range(len(weights))])
        chosen.extend(index.tolist())
        return logits, weights, index

    gate.register_forward_hook(choose)
    decode(model, 30)
    assert chosen
    assert 0 < model.stats.prefetch_recall < 0.9
    assert model.stats.prefetch_wasted > 0
    check_health(model)


def test_prompts_and_large_batches_are_not_predicted(model: OffloadedModel) -> None:
    config = model.model.config
    with torch.inference_mode():
        model.model(**example_inputs(config, 1, 3))
        model.model(**example_inputs(config, 1, 30))
        model.model(**example_inputs(config, 9, 1))
    assert model._meter.read().lookahead == LookaheadCounts()


@pytest.mark.parametrize(("num_tokens", "prefetch", "is_early"), [(30, 1, True), (30, 0, False), (3, 1, False)])
def test_a_prompt_begins_with_the_first_layer_before_its_router(
    pack: Path, num_tokens: int, prefetch: int, is_early: bool
) -> None:
    with loaded(pack, [4] * NUM_LAYERS, prefetch=prefetch) as model, torch.inference_mode():
        begun: list[tuple[int, int]] = []
        begin = model._residency._tier.begin

        def noted(layer_idx: int, expert_idx: int, *args: Any, **kwargs: Any) -> Any:
            begun.append((layer_idx, expert_idx))
            return begin(layer_idx, expert_idx, *args, **kwargs)

        model._residency._tier.begin = noted  # type: ignore[method-assign]
        before_router: list[tuple[int, int]] = []
        model.model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda *_: before_router.extend(begun))
        model.model(**example_inputs(model.model.config, 1, num_tokens))
        assert bool(before_router) == is_early
        assert {layer_idx for layer_idx, _ in before_router} <= {0}
        check_health(model)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth_is_how_many_layers_are_asked(pack: Path, depth: int) -> None:
    with loaded(pack, [8] * NUM_LAYERS, prefetch=depth) as model:
        lookahead = model._meter._lookahead
        asked: list[int] = []
        lookahead._prefetch = lambda layer_idx, target_idx, ids: asked.append(target_idx)  # type: ignore[method-assign]
        decode(model, 2)
        # Each layer asks as far ahead as the depth reaches, again where the layer before has asked from further away.
        assert asked == {1: [1, 2], 2: [1, 2, 2], 5: [1, 2, 2]}[depth]
        assert lookahead.num_sites == NUM_LAYERS


def test_off_asks_nobody(pack: Path) -> None:
    with loaded(pack, [2] * NUM_LAYERS, prefetch="off") as model:
        model.generate(PROMPT, max_new_tokens=12)
        assert model.stats.prefetch_issued == 0
        assert model.stats.prefetch_recall == 0.0


def test_a_late_prefetch_is_waited_for(model: OffloadedModel, disk: FaultyDisk) -> None:
    """On a slow disk steps find prefetches under way, and wait for them instead of reading the expert once more."""
    make_predictable(model.model)
    decode(model, 2)
    disk.delay_reads(0.005)
    disk.log.clear()
    before = model._meter.read()
    decode(model, 20)
    check_health(model)
    report = model._meter.since(before)
    assert report.prefetch_late > 0
    assert len(disk.log) == report.misses + report.prefetch_issued
    slot_bytes = model.manifest.layers[0].slot_bytes
    assert report.prefetch_used_bytes == report.prefetch_used * slot_bytes
    assert report.bytes_read == report.misses * slot_bytes + report.prefetch_used_bytes + report.prefetch_wasted_bytes


def test_slots_for_one_token_leave_room_in_staging(pack: Path) -> None:
    """Nothing has to be evicted for a guess: where it is right, its staging slot takes the place of a slot."""
    misses = {}
    for depth in (0, 1):
        with loaded(pack, [TOP_K] * NUM_LAYERS, prefetch=depth) as model:
            make_predictable(model.model)
            decode(model)
            misses[depth] = model.stats.misses
            assert model._residency.cache.stats.snapshot().prefetch.issued == 0
            check_health(model)
    assert misses[1] < misses[0] / 2


# -- auto --


def test_auto_gives_the_same_tokens_whatever_it_finds(pack: Path) -> None:
    with loaded(pack, [8] * NUM_LAYERS, prefetch="off") as model:
        answer = model.generate(PROMPT, max_new_tokens=50)
    with loaded(pack, [4] * NUM_LAYERS, prefetch="auto") as model:
        assert model.generate(PROMPT, max_new_tokens=50) == answer
        assert model.stats.prefetch_issued > 0


@pytest.mark.parametrize(("prefetch", "depth"), [("off", 0), ("auto", 2), (0, 0), (3, 3)])
def test_prefetch_settings(prefetch: str | int, depth: int) -> None:
    assert parse_prefetch(prefetch) == depth


@pytest.mark.parametrize("prefetch", ["on", "2", -1, True, 1.5])
def test_wrong_prefetch_settings(prefetch: Any) -> None:
    with pytest.raises(ConfigError, match="use off, auto or a number of layers"):
        parse_prefetch(prefetch)
