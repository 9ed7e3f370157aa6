"""The logits are the same bits whatever the budget, the policy, prefetching, and the order in which reads arrive."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import example_inputs
from faulty_disk import FaultyDisk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaded_models import check_health, loaded, make_pack

from moe_offload import OffloadedModel
from moe_offload.cache import policy_names
from moe_offload.offload.experts import step_tuning

# Rows are whole groups of every format.
_WIDE = {"hidden_size": 64, "num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_WIDE, "intermediate_size": 64},
    "qwen3_moe": {**_WIDE, "moe_intermediate_size": 64, "num_experts_per_tok": 3},
    "gpt_oss": {**_WIDE, "intermediate_size": 64},
}
NUM_EXPERTS, NUM_LAYERS = 8, 3
DECODE_STEPS = 8
PROMPT_TOKENS = 20  # enough to count as a prompt


@dataclass(frozen=True)
class Pack:
    """A packed model, and the logits of all experts resident."""

    folder: Path
    expected: torch.Tensor


@torch.inference_mode()
def all_logits(model: Any) -> torch.Tensor:
    """Of a prompt for two, the steps after it, and of one sequence alone."""
    rows = []
    for batch_size in (2, 1):
        inputs = example_inputs(model.config, batch_size, PROMPT_TOKENS)
        rows.append(model(**inputs).logits.flatten(0, 1))
        output = model.generate(
            **inputs,
            max_new_tokens=DECODE_STEPS + 1,
            min_new_tokens=DECODE_STEPS + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        rows.extend(output.logits)
    return torch.cat([row.float() for row in rows])


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each pack is made when it is asked for first."""
    made: dict[tuple[str, str], Pack] = {}

    def get(family: str, expert_format: str) -> Pack:
        if (family, expert_format) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{expert_format}")
            pack = make_pack(folder, family, expert_format, **FAMILIES[family])
            with loaded(pack, [NUM_EXPERTS] * NUM_LAYERS, prefetch="off") as model:
                made[family, expert_format] = Pack(pack, all_logits(model.model))
                assert model.stats.misses == NUM_EXPERTS * NUM_LAYERS, "every expert is read once"
        return made[family, expert_format]

    return get


@pytest.mark.parametrize("expert_format", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=16, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    num_slots=st.lists(st.integers(1, NUM_EXPERTS), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
    policy=st.sampled_from(policy_names()),
    prefetch=st.sampled_from(["off", 1, 2, "auto"]),
    max_delay_s=st.sampled_from([0.0, 0.0005, 0.003]),
    short_read_ratio=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_logits_are_those_of_all_experts_resident(
    packs: Any,
    family: str,
    expert_format: str,
    num_slots: list[int],
    policy: str,
    prefetch: str | int,
    max_delay_s: float,
    short_read_ratio: float,
    seed: int,
) -> None:
    pack = packs(family, expert_format)
    disk = FaultyDisk(seed=seed)
    disk.delay_reads(max_delay_s)
    disk.shorten_reads(short_read_ratio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_tuning, "TRIAL_STEPS", 2)  # so that "auto" switches within the few steps
        patch.setattr(step_tuning, "LEADING_STEPS", 2)
        with loaded(pack.folder, num_slots, disk, policy=policy, prefetch=prefetch) as model:
            assert torch.equal(all_logits(model.model), pack.expected)
            check_health(model)


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


def reads_by_expert(disk: FaultyDisk) -> Counter[tuple[str, int]]:
    return Counter((name, offset_bytes) for name, offset_bytes, _ in disk.log)


def residents(model: OffloadedModel) -> list[set[int]]:
    return [set(model._residency.cache.resident(layer_idx)) for layer_idx in range(NUM_LAYERS)]


@pytest.fixture
def warm_model(packs: Any, disk: FaultyDisk) -> Iterator[OffloadedModel]:
    """A model that has decoded for a while, with every slot taken by one of the experts that were used last."""
    with loaded(packs("mixtral", "nf4").folder, [4] * NUM_LAYERS, disk, policy="lru", prefetch="off") as model:
        inputs = example_inputs(model.model.config, 1, 1)
        model.model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        assert [len(experts) for experts in residents(model)] == [4] * NUM_LAYERS
        disk.log.clear()
        yield model


@torch.inference_mode()
def test_a_prompt_of_everything_leaves_what_decoding_found_hot(warm_model: OffloadedModel, disk: FaultyDisk) -> None:
    cache, hot = warm_model._residency.cache, residents(warm_model)
    before = cache.stats.snapshot()
    warm_model.model(**example_inputs(warm_model.model.config, 1, 48))
    counts = cache.stats.snapshot().diff(before)
    assert counts.decode.requests == 0
    assert counts.prefill.requests > counts.prefill.hits == 4 * NUM_LAYERS
    assert counts.prefill.hits + len(disk.log) == counts.prefill.requests, "resident ones are not read again"
    assert residents(warm_model) == hot


@torch.inference_mode()
def test_a_prompt_of_cold_experts_leaves_what_decoding_found_hot(warm_model: OffloadedModel) -> None:
    """One word over and over: a token's experts in each layer, some of them cold, while hot ones stand by."""
    cache, hot = warm_model._residency.cache, residents(warm_model)
    before = cache.stats.snapshot()
    warm_model.model(torch.full((1, 48), 7))
    counts = cache.stats.snapshot().diff(before)
    assert counts.prefill.requests == 2 * NUM_LAYERS
    assert counts.prefill.bypassed > 0
    assert residents(warm_model) == hot


@torch.inference_mode()
def test_a_prompt_moves_each_expert_once_per_chunk(packs: Any, disk: FaultyDisk) -> None:
    with loaded(packs("qwen3_moe", "int8").folder, [1] * NUM_LAYERS, disk, prefetch="off") as model:
        inputs = example_inputs(model.model.config, 2, 60)
        model.model(**inputs)
        assert len(disk.log) == NUM_EXPERTS * NUM_LAYERS
        assert set(reads_by_expert(disk).values()) == {1}
        disk.log.clear()
        model.model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=20)
        assert len(disk.log) > NUM_EXPERTS * NUM_LAYERS
        assert max(reads_by_expert(disk).values()) <= 3
