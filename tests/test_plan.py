from dataclasses import replace

import families
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.errors import BudgetError, ConfigError
from moe_offload.offload.pack.manifest import DenseFile, LayerLayout, LayerSpec, PackManifest
from moe_offload.offload.planning.plan import make_plan
from moe_offload.offload.planning.sizes import parse_size
from moe_offload.offload.planning.slot_shares import SlotNeed, fill_slots, fill_slots_beside, slots_bytes
from moe_offload.offload.planning.workspace import prefill_chunk_tokens, workspace_bytes
from moe_offload.quant import get_format

MIB = 1024**2
GIB = 1024**3
CONFIG = families.make_config("mixtral")

needs_strategy = st.lists(
    st.builds(
        lambda num_experts, pages, top_k: SlotNeed(num_experts, 4096 * pages, min(top_k, num_experts)),
        st.integers(1, 16),
        st.integers(1, 9),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=6,
)


def make_manifest(num_experts=(8, 8, 8), width=2048, spec="bf16", dense_bytes=3 * MIB):
    layers = []
    for layer_idx, count in enumerate(num_experts):
        parts = [(name, (width, width), spec, get_format(spec).nbytes((width, width))) for name in ("up", "down")]
        parts.append(("bias", (width,), "bf16", get_format("bf16").nbytes((width,))))
        layout = LayerLayout.of(f"layers.{layer_idx}.mlp", count, parts)
        file = f"experts-{layer_idx:05d}.safetensors"
        layers.append(LayerSpec(layout.module, count, layout.slot_bytes, layout.parts, file, 4096, ("0" * 16,) * count))
    dense = (DenseFile("dense-00000.safetensors", dense_bytes, "0" * 16),)
    return PackManifest("tiny", None, spec, "source", "test", tuple(layers), dense, {})


def plan(manifest, ram_bytes, **kwargs):
    arguments = {"device": "cpu", "vram_bytes": None, "context_tokens": 64, "dtype_bytes": 4, "prefetch_depth": 1}
    arguments |= {"top_k_per_layer": [2] * len(manifest.layers), "config": CONFIG, **kwargs}
    return make_plan(manifest, arguments.pop("config"), ram_bytes=ram_bytes, **arguments)


def all_room_bytes(found):
    """What is used while a text takes all of the context, and a piece of a prompt is read."""
    return replace(found, num_slots=found.fewest_slots).total_bytes("RAM")


def refusal(manifest, ram_bytes, **kwargs):
    with pytest.raises(BudgetError) as caught:
        plan(manifest, ram_bytes, **kwargs)
    return caught.value


@given(needs_strategy, st.integers(0, 400))
def test_slots_fill_the_budget_evenly(needs, spare_pages):
    floor_bytes = slots_bytes(needs, [need.floor for need in needs])
    budget_bytes = floor_bytes + 4096 * spare_pages
    num_slots = fill_slots(needs, budget_bytes)
    left_bytes = budget_bytes - slots_bytes(needs, num_slots)
    assert left_bytes >= 0
    for slots, need in zip(num_slots, needs, strict=True):
        assert need.floor <= slots <= need.num_experts
        # Nothing that would still fit is left out.
        assert slots == need.num_experts or need.slot_bytes > left_bytes


@given(st.integers(1, 12), st.integers(1, 16), st.integers(1, 4), st.integers(0, 200))
def test_layers_alike_differ_by_one_slot_at_most(num_layers, num_experts, top_k, spare_pages):
    needs = [SlotNeed(num_experts, 8192, min(top_k, num_experts))] * num_layers
    num_slots = fill_slots(needs, slots_bytes(needs, [need.floor for need in needs]) + 4096 * spare_pages)
    assert num_slots == sorted(num_slots, reverse=True)
    assert num_slots[0] - num_slots[-1] <= 1


def test_layers_unlike_get_one_share():
    needs = [SlotNeed(8, 4096, 1), SlotNeed(16, 8192, 1), SlotNeed(4, 12288, 1)]
    assert fill_slots(needs, slots_bytes(needs, [4, 8, 2])) == [4, 8, 2]


def test_no_layers_need_no_slots():
    assert fill_slots([], 4096) == []


@given(needs_strategy, st.integers(0, 200), st.integers(0, 200))
def test_more_memory_is_never_fewer_resident_bytes(needs, pages, more_pages):
    floor_bytes = slots_bytes(needs, [need.floor for need in needs])
    less, more = (fill_slots(needs, floor_bytes + 4096 * p) for p in (pages, pages + more_pages))
    assert slots_bytes(needs, less) <= slots_bytes(needs, more) + max(need.slot_bytes for need in needs)


@settings(max_examples=25, deadline=None)
@given(
    num_experts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    top_k=st.integers(1, 4),
    context_tokens=st.integers(1, 5000),
    family=st.sampled_from(["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"]),
    dense_mib=st.integers(0, 900),
)
def test_the_smallest_budget_works_and_one_byte_less_does_not(num_experts, top_k, context_tokens, family, dense_mib):
    manifest = make_manifest(num_experts, width=256)
    kwargs = {
        "config": families.make_config(family),
        "context_tokens": context_tokens,
        "top_k_per_layer": [top_k] * len(num_experts),
        "resident_dense_bytes": dense_mib * MIB,
    }
    needed_bytes = refusal(manifest, 1, **kwargs).needed_bytes
    smallest = plan(manifest, needed_bytes, **kwargs)
    assert smallest.total_bytes("RAM") <= needed_bytes
    assert smallest.fewest_slots == (1,) * len(num_experts)
    assert all_room_bytes(smallest) == needed_bytes
    assert smallest.staging_slots == max(2, top_k - 1), "all of a token's experts can be under way"
    error = refusal(manifest, needed_bytes - 1, **kwargs)
    assert (error.needed_bytes, error.budget_bytes) == (needed_bytes, needed_bytes - 1)


@settings(max_examples=25, deadline=None)
@given(extra_mib=st.integers(0, 500), extra_vram_mib=st.integers(0, 500), prefetch_depth=st.integers(0, 4))
def test_a_plan_never_exceeds_its_budgets(extra_mib, extra_vram_mib, prefetch_depth):
    manifest = make_manifest()
    cuda = {"device": "cuda", "prefetch_depth": prefetch_depth}
    vram_bytes = refusal(manifest, GIB, vram_bytes=1, **cuda).needed_bytes + extra_vram_mib * MIB
    ram_bytes = refusal(manifest, 1, vram_bytes=vram_bytes, **cuda).needed_bytes + extra_mib * MIB
    two_tiers = plan(manifest, ram_bytes, vram_bytes=vram_bytes, **cuda)
    assert two_tiers.total_bytes("VRAM") <= vram_bytes
    assert two_tiers.total_bytes("RAM") <= ram_bytes
    assert sum(line.size_bytes for line in two_tiers.lines()) == sum(map(two_tiers.total_bytes, ("RAM", "VRAM")))
    assert min(two_tiers.num_slots) >= 1
    if extra_mib == 0:
        assert two_tiers.num_host_slots == (0, 0, 0)
    one_tier = plan(manifest, GIB + extra_mib * MIB)
    assert one_tier.total_bytes("RAM") <= GIB + extra_mib * MIB


def test_everything_is_resident_when_there_is_room():
    full = plan(make_manifest(), 10 * GIB)
    assert full.num_slots == (8, 8, 8)
    assert full.resident_share == 1.0
    assert full.num_host_slots == (0, 0, 0)


def test_no_second_tier_for_what_is_whole_on_the_device():
    assert plan(make_manifest(), GIB, device="cuda", vram_bytes=10 * GIB).num_host_slots == (0, 0, 0)


def test_the_chunk_and_the_workspace_are_not_the_budgets_business():
    manifest = make_manifest()
    smallest_bytes = refusal(manifest, 1).needed_bytes
    chunks = {plan(manifest, smallest_bytes + extra).prefill_chunk_tokens for extra in (0, 100 * MIB, 9 * GIB)}
    assert len(chunks) == 1


@given(needs_strategy, st.integers(0, 400), st.integers(1, 40))
def test_slots_fill_what_their_segments_leave(needs, spare_pages, segment_pages):
    """Slabs in whole segments: they fit with what is lost between them, and never less than the floors."""
    floors = [need.floor for need in needs]

    def lost_bytes(num_slots):
        slabs = [need.slot_bytes * slots for need, slots in zip(needs, num_slots, strict=True)]
        return sum(-slab % (4096 * segment_pages) for slab in slabs)

    budget_bytes = slots_bytes(needs, floors) + lost_bytes(floors) + 4096 * spare_pages
    num_slots = fill_slots_beside(needs, budget_bytes, lost_bytes)
    assert slots_bytes(needs, num_slots) + lost_bytes(num_slots) <= budget_bytes
    assert all(slots >= need.floor for slots, need in zip(num_slots, needs, strict=True))
    assert fill_slots_beside(needs, budget_bytes, lambda _: 0) == fill_slots(needs, budget_bytes)


def test_a_long_context_in_written_out_attention_shortens_the_chunk():
    config = families.make_config("gpt_oss", num_attention_heads=64)
    kwargs = {"dtype_bytes": 2, "expert_rows": 144}
    short = prefill_chunk_tokens(config, context_tokens=512, **kwargs)
    long = prefill_chunk_tokens(config, context_tokens=65536, **kwargs)
    assert (short, long) == (512, 32)
    assert workspace_bytes(config, chunk_tokens=32, context_tokens=65536, **kwargs) > 64 * 32 * 65536 * 4


def test_refusal_names_the_parts_and_a_size_that_works_when_typed_back():
    manifest = make_manifest(spec="nf4")
    error = refusal(manifest, 100 * MIB)
    assert "of RAM, budget 100 MiB" in str(error)
    assert "dense weights 3.0 MiB" in str(error)
    typed = str(error).split("use --ram ")[1].split()[0]
    plan(manifest, parse_size(typed, total_bytes=0, free_bytes=0))
    # Neither a shorter context nor another format would do: neither is proposed.
    assert "--context" not in str(error)
    assert "--format" not in str(error)


def test_refusal_proposes_a_shorter_context_that_fits():
    manifest = make_manifest()
    budget_bytes = refusal(manifest, 1, context_tokens=4096).needed_bytes + MIB
    error = refusal(manifest, budget_bytes, context_tokens=100_000)
    context_tokens = int(str(error).split("--context ")[1].split()[0])
    assert context_tokens >= 256
    plan(manifest, budget_bytes, context_tokens=context_tokens)


def test_refusal_proposes_a_smaller_format_that_fits():
    budget_bytes = refusal(make_manifest(spec="nf4"), 1).needed_bytes
    error = refusal(make_manifest(spec="bf16"), budget_bytes)
    assert "a pack made with --format nf4 (needs " in str(error)
    assert plan(make_manifest(spec="nf4"), budget_bytes).num_slots == (1, 1, 1)


def test_refusal_proposes_fewer_bits_than_the_default_only_where_that_does_not_fit():
    budget_bytes = refusal(make_manifest(spec="nf4"), 1).needed_bytes - 1
    assert "a pack made with --format nf3 (needs " in str(refusal(make_manifest(spec="bf16"), budget_bytes))


def test_vram_and_ram_are_refused_apart():
    manifest = make_manifest()
    assert "--vram" in str(refusal(manifest, GIB, device="cuda", vram_bytes=MIB))
    assert "--ram" in str(refusal(manifest, MIB, device="cuda", vram_bytes=2 * GIB))


@pytest.mark.parametrize(
    "wrong",
    [{"top_k_per_layer": [2]}, {"context_tokens": 0}, {"device": "cuda"}, {"vram_bytes": GIB}],
)
def test_inconsistent_arguments_are_refused(wrong):
    with pytest.raises(ConfigError):
        plan(make_manifest(), GIB, **wrong)


def test_the_table_shows_every_line_and_the_share():
    manifest = make_manifest()
    some = plan(manifest, refusal(manifest, 1).needed_bytes + 12 * manifest.layers[0].slot_bytes)
    assert some.num_slots == (5, 5, 5)
    text = some.render().splitlines()
    assert text[-1] == "slots 5 of 8 per layer, 62% of experts resident"
    for line, row in zip(some.lines(), text, strict=False):
        assert row.startswith(line.tier)
        assert line.label in row
    assert len({row.index("iB") for row in text[:-1]}) == 1  # aligned


def test_the_table_of_two_tiers_and_uneven_layers():
    manifest = make_manifest((8, 4))
    cuda = {"device": "cuda", "prefetch_depth": 0}
    vram_bytes = refusal(manifest, GIB, vram_bytes=1, **cuda).needed_bytes + 6 * manifest.layers[0].slot_bytes
    text = plan(manifest, 2 * GIB, vram_bytes=vram_bytes, **cuda).render()
    assert "slots 3 to 5 of 4 to 8 per layer, 67% of experts resident" in text
    assert "second tier in RAM: slots 4 to 8 of 4 to 8 per layer, 100% of experts" in text
    assert "CUDA context" in text
