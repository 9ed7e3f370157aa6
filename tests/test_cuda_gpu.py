"""What only a real device can show. Skipped without one."""

import gc
import random
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import make_config
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model
from tiny_packs import IDENTITY, expert_bytes, finish

from moe_offload import OffloadedModel
from moe_offload.cache import ExpertCache
from moe_offload.errors import BudgetError
from moe_offload.offload.experts.layer import ExpertLayer, StepState
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.experts.weights import ExpertWeights
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.pack.writer import PackWriter
from moe_offload.offload.planning import demand
from moe_offload.offload.planning.caching_allocator import Block, CachingAllocator
from moe_offload.offload.planning.plan import Plan
from moe_offload.offload.streaming.reader import ExpertReader
from moe_offload.offload.streaming.slab import Slab
from moe_offload.offload.tiers.cuda_queue import CudaQueue
from moe_offload.offload.tiers.cuda_tier import CudaTier
from moe_offload.quant import format_names, get_format, kernels

pytestmark = pytest.mark.gpu
FORMATS = [*format_names(), "fp16", "fp32", "fp8-32x32", "bnb-nf4-64", "bnb-fp4-64"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(make_config("mixtral"), tmp_path_factory.mktemp("gpu") / "checkpoint")


@pytest.fixture(scope="module", params=["source", "nf4"])
def pack(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_model(str(checkpoint), tmp_path_factory.mktemp("gpu") / "pack", format=request.param)


def load(pack: Path, *, slots: int = 0, host_slots: int = 0, **kwargs: object) -> OffloadedModel:
    """On the device, with so many slots beyond the smallest budgets."""
    settings = {"device": "cuda", "dtype": "float32", "context_tokens": CONTEXT_TOKENS} | kwargs
    with pytest.raises(BudgetError) as vram:
        OffloadedModel.from_pretrained(pack, vram=1, ram="80%", **settings)
    vram_bytes = vram.value.needed_bytes + slots * 16384
    with pytest.raises(BudgetError) as ram:
        OffloadedModel.from_pretrained(pack, vram=vram_bytes, ram=1, **settings)
    ram_bytes = ram.value.needed_bytes + host_slots * 16384
    return OffloadedModel.from_pretrained(pack, vram=vram_bytes, ram=ram_bytes, **settings)


def tier_of(model: OffloadedModel) -> CudaTier:
    tier = model._residency._tier
    assert isinstance(tier, CudaTier)
    return tier


def test_logits_are_the_cpus_to_rounding_and_no_budget_changes_a_bit(pack: Path):
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        inputs = example_inputs(resident.model.config)
        _, expected = run_logits(resident.model, inputs)
    results = []
    for slots, host_slots, prefetch in [(0, 0, 0), (0, 12, 1), (6, 6, 2), (1000, 0, 0)]:
        with load(pack, slots=slots, host_slots=host_slots, prefetch=prefetch) as model:
            on_device = {name: tensor.to(model.model.device) for name, tensor in inputs.items()}
            results.append(run_logits(model.model, on_device))
    tokens, logits = results[0]
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    for other_tokens, other_logits in results[1:]:
        assert torch.equal(other_tokens, tokens)
        assert torch.equal(other_logits, logits)


def test_experts_come_through_page_locked_memory(pack: Path):
    with load(pack, host_slots=12) as model:
        tier = tier_of(model)
        assert tier.host.pageable_bytes == 0
        run_logits(model.model, {k: v.to("cuda") for k, v in example_inputs(model.model.config).items()})
        assert tier.bytes_copied > tier.bytes_read > 0
        assert any(tier.host.resident(layer_idx) for layer_idx in range(len(model.manifest.layers)))
        model._residency.cache.check_integrity()
        tier.host.check_integrity()


def test_every_copy_is_in_the_trace(pack: Path):
    with load(pack, host_slots=12, prefetch=0, warm_start=False) as model:
        inputs = {k: v.to("cuda") for k, v in example_inputs(model.model.config).items()}
        with model.tracing() as recording:
            run_logits(model.model, inputs)
            torch.cuda.synchronize()
        trace, tier = recording.trace, tier_of(model)
        assert trace.copy_bytes is not None
        assert trace.copy_ns is not None
        assert trace.copy_bytes.sum() == tier.bytes_copied
        assert (trace.copy_ns > 0).all(), "all were over when the recording ended"
        assert trace.copy_ns.sum() == tier.link_totals.busy_ns


def test_the_budget_of_vram_is_kept(pack: Path):
    def run() -> Plan:
        with load(pack, slots=6, host_slots=6) as model:
            run_logits(model.model, {k: v.to("cuda") for k, v in example_inputs(model.model.config).items()})
            return model.plan

    def allocated_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    run()  # what the libraries take once and keep counts as the context's, not as ours
    before_bytes = allocated_bytes()
    torch.cuda.reset_peak_memory_stats()
    plan = run()
    peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert plan.overhead is not None
    assert peak_bytes <= plan.total_bytes("VRAM") - plan.overhead.context_bytes
    assert allocated_bytes() - before_bytes < 1 << 20


def test_two_threads_on_two_streams(pack: Path):
    with load(pack, host_slots=6, prefetch=1) as model:
        inputs = [
            {k: v.to("cuda") for k, v in example_inputs(model.model.config, 1, 5 + turn).items()} for turn in range(2)
        ]
        alone = [run_logits(model.model, each) for each in inputs]
        together: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def run(turn: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                together[turn] = run_logits(model.model, inputs[turn])
                torch.cuda.current_stream().synchronize()

        torch.cuda.synchronize()
        threads = [threading.Thread(target=run, args=(turn,)) for turn in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        for turn in range(2):
            assert torch.equal(together[turn][1], alone[turn][1])


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("num_rows", [1, 5, 200])
def test_every_format_computes_on_the_device(spec: str, num_rows: int):
    packed_format = get_format(spec)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 128, generator=generator), torch.randn(num_rows, 128, generator=generator)
    with kernels.forced("torch"):
        if spec.startswith("bnb"):  # no quantiser of its own: any codes and sane scales will do
            packed = torch.randint(0, 256, (packed_format.nbytes((96, 128)),), dtype=torch.uint8, generator=generator)
            packed[96 * 64 :].view(torch.float32).uniform_(0.5, 2.0, generator=generator)
        else:
            packed = packed_format.quantize(weight)
        expected_weight = packed_format.dequantize(packed, (96, 128), torch.float32)
        expected = packed_format.linear(x, packed, (96, 128))
    on_device = packed_format.dequantize(packed.cuda(), (96, 128), torch.float32)
    assert torch.equal(on_device.cpu(), expected_weight)
    result = packed_format.linear(x.cuda(), packed.cuda(), (96, 128))
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(packed_format.linear(x.cuda(), packed.cuda(), (96, 128)), result)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """What makes this thread wait for the device, as torch's own check sees it."""
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits.extend(str(warning.message) for warning in caught if "synchroniz" in str(warning.message))


def random_tier(folder: Path, *, num_slots: int, num_host_slots: list[int]) -> CudaTier:
    """Two layers of four experts with known bytes."""
    with PackWriter(folder, identity=IDENTITY) as writer:
        for layer_idx in range(2):
            layout = LayerLayout.of(f"layers.{layer_idx}", 4, [("weight", (4096,), "bf16", 8192)])
            with writer.layer(layer_idx, layout) as layer:
                for expert_idx in range(4):
                    layer.write_expert(expert_idx, expert_bytes(layer_idx, expert_idx))
        writer.dense_file("dense-00000.safetensors", [("norm", "F32", (4,), bytes(16))])
        manifest = finish(writer)
    return CudaTier(
        manifest,
        ExpertReader(manifest, folder),
        [CudaQueue(torch.device("cuda"))],
        num_slots=[num_slots] * 2,
        num_staging_slots=1,
        num_host_slots=num_host_slots,
        num_host_staging_slots=2,
    )


class Foreseen:
    """Predicts, on the device, that all layers choose the same."""

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None
        self.brought: list[tuple[int, Sequence[int]]] = []

    def ask(self, layer_idx: int) -> Iterator[tuple[int, torch.Tensor]]:
        assert self.index is not None
        yield layer_idx + 1, self.index + 0

    def fetched(self, layer_idx: int, predictions: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.brought = list(predictions)

    def after_routing(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        assert [target_idx for target_idx, _ in self.brought] == [layer_idx + 1]

    def in_prompt(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        raise AssertionError


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_a_layer_waits_once_for_the_device(tmp_path: Path, num_tokens: int, looks_ahead: bool):
    tier = random_tier(tmp_path / "pack", num_slots=4, num_host_slots=[0, 0])
    residency = Residency(ExpertCache([4, 4], [4, 4]), tier)
    foreseen, step = Foreseen(), StepState()
    step.predictor = foreseen if looks_ahead else None
    try:
        layer = ExpertLayer(0, 4, residency, step)
        x = torch.randn(num_tokens, 16, device="cuda")
        index = torch.stack([torch.randperm(4)[:2] for _ in range(num_tokens)]).cuda()
        foreseen.index = index
        weights = torch.rand(num_tokens, 2, device="cuda")
        args = (x, index, weights, lambda expert, rows: rows * 2)
        expected = layer.routed(*args)
        torch.cuda.synchronize()
        with counted_waits() as waits:
            result = layer.routed(*args)
        assert len(waits) == 1, waits
        assert torch.equal(result, expected)
        assert foreseen.brought == ([(1, index.flatten().tolist())] if looks_ahead else [])
    finally:
        residency.close()


def test_slots_get_their_experts_bytes(tmp_path: Path):
    tier = random_tier(tmp_path / "pack", num_slots=1, num_host_slots=[2, 0])
    residency = Residency(ExpertCache([4, 4], [1, 1]), tier)
    try:
        seen: dict[tuple[int, int], torch.Tensor] = {}
        for turn in range(50):
            layer_idx = turn % 2

            def compute(expert_idx: int, weights: ExpertWeights, layer_idx: int = layer_idx) -> None:
                torch.cuda._sleep(200_000)  # the kernels are late, so that copies would overtake them
                seen[layer_idx, expert_idx] = weights.tensor("weight", torch.bfloat16).clone()

            residency.run(layer_idx, [turn % 4, (turn + 1) % 4], compute)
        torch.cuda.synchronize()
        assert len(seen) == 8
        for key, data in seen.items():
            assert data.view(torch.uint8).cpu().numpy().tobytes() == expert_bytes(*key)
    finally:
        residency.close()


def test_slabs_are_page_locked_and_copies_do_not_wait():
    queue = CudaQueue(torch.device("cuda"))
    with Slab(4, 1 << 20, page_lock=queue.page_lock) as slab:
        assert slab.num_pinned_slots == 4, slab.pin_failure
        assert slab.tensor(3).is_pinned()
        target = queue.allocate(1 << 20)
        slab.tensor(2).fill_(7)
        event, called = queue.new_event(), threading.Event()
        torch.cuda._sleep(100_000_000)
        late = queue.new_event()
        queue.record(late)
        queue.copy(slab.tensor(2), target, after=[late], event=event)
        assert not event.is_over(), "the copy is behind the sleeping kernel, and this thread did not wait for it"
        queue.when_over(event, called.set)
        queue.wait(event)
        total = target.sum(dtype=torch.int64)
        assert called.wait(60)
        assert event.is_over()
        assert int(total) == 7 << 20
        carried = queue.link.totals()
        assert carried.num_bytes == 1 << 20
        assert 1e8 < queue.link.peak_bytes_per_s < 1e12
        assert carried.busy_ns == pytest.approx((1 << 20) / queue.link.peak_bytes_per_s * 1e9, rel=1e-3)
        queue.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["mixtral", "nllb_moe"])
def test_layers_on_two_gpus_give_what_one_gives(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # torch's segments are larger than all of a tiny model
    monkeypatch.setattr(demand, "fragmentation_bytes", lambda *args, **kwargs: 0)
    config = make_config(family)
    pack = pack_model(str(save_random_model(config, tmp_path / "checkpoint")), tmp_path / "pack", format="source")
    settings = {"dtype": "float32", "context_tokens": CONTEXT_TOKENS, "ram": "1GiB"}
    with OffloadedModel.from_pretrained(pack, device="cuda:0", **settings) as model:
        inputs = {name: tensor.to("cuda:0") for name, tensor in example_inputs(model.model.config).items()}
        expected = run_logits(model.model, inputs)
        overhead_bytes = model.plan.total_bytes("VRAM") - model.plan.dense_bytes - model.manifest.expert_bytes
    half = overhead_bytes + (model.plan.dense_bytes + model.manifest.expert_bytes) // 2
    with OffloadedModel.from_pretrained(pack, vram={0: half, 1: half}, **settings) as model:
        assert {part.index for part in model.plan.parts} == {0, 1}
        tokens, logits = run_logits(model.model, inputs)
        assert torch.equal(tokens.cpu(), expected[0].cpu())
        torch.testing.assert_close(logits.cpu(), expected[1].cpu(), rtol=1e-4, atol=1e-4)


def test_the_budget_is_enough_when_the_allocator_gets_no_more(pack: Path):
    """As the allocator reserves memory: rounded, in blocks, and with what lies between them."""
    with load(pack, slots=6, host_slots=6) as model:
        inputs = {k: v.to("cuda") for k, v in example_inputs(model.model.config).items()}
        run_logits(model.model, inputs)
        plan = model.plan
    gc.collect()
    torch.cuda.empty_cache()
    assert plan.vram_bytes is not None
    assert plan.overhead is not None
    limit_bytes = torch.cuda.memory_reserved() + plan.vram_bytes - plan.overhead.context_bytes
    _, total_bytes = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes)
    try:
        with load(pack, slots=6, host_slots=6) as model:
            run_logits(model.model, inputs)
            assert torch.cuda.memory_reserved() <= limit_bytes
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_the_allocator_loses_is_in_the_plan(pack: Path):
    """What lies free between tensors that are in use, and what blocks are larger than was asked for."""
    with load(pack, slots=6, host_slots=6) as model:
        inputs = {k: v.to("cuda") for k, v in example_inputs(model.model.config).items()}
        run_logits(model.model, inputs)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # segments of which nothing is used: what torch gives back before it runs out
        stats = torch.cuda.memory_stats()
        lost_bytes = stats["reserved_bytes.all.current"] - stats["requested_bytes.all.current"]
        assert model.plan.overhead is not None
        assert 0 < lost_bytes <= model.plan.overhead.total_bytes - model.plan.overhead.context_bytes


def test_the_accounts_of_the_allocator_are_torchs():
    """The rules that the plan's fragmentation is computed by, against torch's own allocator on a stream of its own."""
    draw = random.Random(0)
    stream = torch.cuda.Stream()
    torch.cuda.empty_cache()
    with torch.cuda.stream(stream):
        accounts, before = CachingAllocator(), torch.cuda.memory_stats()
        tensors: list[tuple[torch.Tensor, Block]] = []
        for _ in range(200):
            if tensors and draw.random() < 0.4:
                block = tensors.pop(draw.randrange(len(tensors)))[1]  # nothing keeps the tensor
                accounts.free(block)
            else:
                size_bytes = int(2 ** draw.uniform(9, 25))
                tensors.append(
                    (torch.empty(size_bytes, dtype=torch.uint8, device="cuda"), accounts.allocate(size_bytes))
                )
            now = torch.cuda.memory_stats()
            for ours, theirs in [(accounts.allocated_bytes, "allocated"), (accounts.reserved_bytes, "reserved")]:
                name = f"{theirs}_bytes.all.current"
                assert now[name] - before[name] == ours


def test_slots_given_up_are_the_allocators_again(pack: Path):
    with load(pack, slots=60) as model:
        residency = model._residency
        inputs = {k: v.to("cuda") for k, v in example_inputs(model.model.config, 1).items()}  # a batch takes slots
        expected = run_logits(model.model, inputs)
        before_bytes = torch.cuda.memory_allocated()
        for layer_idx in range(residency.cache.num_layers):
            assert residency.resize(layer_idx, 1)
        assert torch.cuda.memory_allocated() < before_bytes
        assert torch.equal(run_logits(model.model, inputs)[1], expected[1])
