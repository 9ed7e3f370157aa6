"""Layers on several GPUs: who gets which, what is planned, and that activations follow; without any GPU."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from accelerate import init_empty_weights
from fake_device import FakeDevice
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model
from torch import nn

from moe_offload import OffloadedModel
from moe_offload.errors import BudgetError
from moe_offload.offload import model as model_module
from moe_offload.offload.checkpoint.transformers_loading import auto_class
from moe_offload.offload.device_boundaries import DeviceBoundaries
from moe_offload.offload.experts.containers import find_expert_containers
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.planning import demand
from moe_offload.offload.planning.kv_cache import cache_bytes_per_layer
from moe_offload.offload.planning.place_model import place_model
from moe_offload.offload.planning.placement import Placement
from moe_offload.offload.planning.plan import Plan, make_plan
from moe_offload.offload.tiers import choice as tiers

SLOT_BYTES = 65536


def place(config: Any, budgets_bytes: Mapping[int, int], overhead_bytes: int = 30000) -> Placement:
    with init_empty_weights(include_buffers=True):
        model = auto_class(config).from_config(config)
    containers = find_expert_containers(model)
    experts = tuple(f"{container.name}." for container in containers)
    dense = {name: p.numel() * 4 for name, p in model.named_parameters() if not name.startswith(experts)}
    layers: Any = [
        SimpleNamespace(module=container.name, num_experts=container.num_experts, slot_bytes=SLOT_BYTES)
        for container in containers
    ]
    cache_bytes = cache_bytes_per_layer(config, context_tokens=64, dtype_bytes=4)
    placement = place_model(
        config, layers, dense, cache_bytes, budgets_bytes=budgets_bytes, overhead_bytes=overhead_bytes
    )
    assert sum(placement.dense_bytes) == sum(dense.values())
    return placement


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next", "dbrx", "jetmoe", "deepseek_v3"])
@pytest.mark.parametrize(
    "budgets", [{0: 150_000, 1: 200_000}, {0: 150_000, 2: 400_000}, {2: 10**5, 0: 10**5, 1: 10**5}]
)
def test_layers_go_to_devices_in_order(family: str, budgets: dict[int, int]):
    placement = place(families.make_config(family), budgets)
    assert len(placement.devices) > 1
    for on in (placement.device_of_layer, placement.device_of_cache_layer):
        assert list(on) == sorted(on), "a token passes from each device to the next once"
    assert list(placement.devices) == sorted(placement.devices)
    assert placement.device_map["model.embed_tokens" if family != "dbrx" else "transformer.wte"] == 0


def test_layers_are_shared_out_by_budget():
    config = families.make_config("qwen3_moe")
    config.num_hidden_layers, config.layer_types = 12, None
    budget = 12 * 8 * SLOT_BYTES // 4
    equal = place(config, {0: budget, 1: budget})
    assert abs(equal.device_of_layer.count(0) - 6) <= 1
    third = place(config, {0: budget // 2, 1: budget})
    assert abs(third.device_of_layer.count(0) - 4) <= 1
    roomy = place(config, {0: 1 << 30, 1: 1 << 30})
    assert roomy.devices == (0,), "what fits on one device needs no other"


def test_rotary_embeddings_are_where_the_model_begins():
    placement = place(families.make_config("mixtral"), {0: 200_000, 1: 200_000})
    assert placement.device_map["model.rotary_emb"] == 0
    assert placement.device_map["lm_head"] == 1


def test_tied_heads_stay_with_the_embedding():
    config = families.make_config("mixtral")
    config.tie_word_embeddings = True
    placement = place(config, {0: 200_000, 1: 200_000})
    assert placement.device_map["lm_head"] == placement.device_map["model.embed_tokens"] == 0


@pytest.mark.parametrize("family", ["nllb_moe", "switch_transformers"])
@pytest.mark.parametrize("budgets", [{0: 150_000, 1: 200_000}, {0: 300_000, 1: 400_000}])
def test_an_encoder_and_its_decoder_go_to_devices_in_order(family: str, budgets: dict[int, int]):
    placement = place(families.make_config(family), budgets)
    assert placement.devices == (0, 1)
    for on in (placement.device_of_layer, placement.device_of_cache_layer):
        assert list(on) == sorted(on), "the encoder's layers come before the decoder's"
    assert set(placement.device_of_layer) == {0, 1}
    tied = [index for name, index in placement.device_map.items() if name.endswith(("shared", "embed_tokens"))]
    assert set(tied) == {placement.device_map["lm_head"]} == {0}, "one table serves both sides and the head"


# -- the plan --


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpus")
    checkpoint = save_random_model(families.make_config("mixtral"), folder / "checkpoint")
    return pack_model(str(checkpoint), folder / "pack", format="source")


class Gpus:
    """As many fake devices as a plan asks for, whose modules lie in RAM all the same."""

    def __init__(self, patch: pytest.MonkeyPatch, budgets_bytes: Mapping[int, int]) -> None:
        self.queues: list[FakeDevice] = []
        self.overhead_bytes = 0

        def queue(device: torch.device) -> FakeDevice:
            fake = FakeDevice(len(self.queues), eager=True)
            fake.run_in_background()
            self.queues.append(fake)
            return fake

        def plan(*args: Any, **kwargs: Any) -> Plan:
            def place(cache_bytes: Any, overhead_bytes: int) -> Placement:
                self.overhead_bytes = overhead_bytes
                return kwargs["place"](cache_bytes, overhead_bytes)

            return make_plan(*args, **kwargs | {"device": "cuda", "ram_bytes": 1 << 30, "place": place})

        # torch's segments are larger than all of a tiny model
        patch.setattr(demand, "fragmentation_bytes", lambda *args, **kwargs: 0)
        patch.setattr(model_module, "_first_device", lambda name, sizes: torch.device("cpu"))
        patch.setattr(model_module, "vram_budgets_bytes", lambda sizes: dict(budgets_bytes))
        patch.setattr(model_module, "make_plan", plan)
        patch.setattr(tiers, "CudaQueue", queue)
        patch.setattr(
            Plan, "device_map", property(lambda plan: {m: torch.device("cpu") for p in plan.parts for m in p.modules})
        )


def load(pack: Path, **kwargs: Any) -> OffloadedModel:
    settings = {"vram": "0=1GiB,1=1GiB", "dtype": "float32", "context_tokens": CONTEXT_TOKENS}
    return OffloadedModel.from_pretrained(pack, **settings | kwargs)


def overhead_of(pack: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """What plans take of a GPU's memory for themselves, as is known once one was refused."""
    with monkeypatch.context() as patch:
        tried = Gpus(patch, {0: 1, 1: 1})
        with pytest.raises(BudgetError):
            load(pack)
    return tried.overhead_bytes


def test_a_model_on_two_devices(pack: Path, monkeypatch: pytest.MonkeyPatch):
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        inputs = example_inputs(resident.model.config)
        expected = run_logits(resident.model, inputs)
    overhead_bytes = overhead_of(pack, monkeypatch)
    results = []
    for room_bytes, prefetch in [(110_000, 0), (150_000, 1), (180_000, 2)]:
        with monkeypatch.context() as patch:
            budget_bytes = overhead_bytes + room_bytes
            gpus = Gpus(patch, {0: budget_bytes, 1: budget_bytes})
            with load(pack, prefetch=prefetch) as model:
                plan = model.plan
                assert set(plan.device_of_layer) == {0, 1}
                for part in plan.parts:
                    planned = sum(line.size_bytes for line in plan.lines() if line.tier == f"GPU {part.index}")
                    assert planned <= part.vram_bytes == budget_bytes
                assert plan.total_bytes("VRAM") <= 2 * budget_bytes == plan.vram_bytes
                results.append(run_logits(model.model, inputs))
                assert len(gpus.queues) == 2
                assert all(queue.num_copies for queue in gpus.queues)
                assert not [hazard for queue in gpus.queues for hazard in queue.hazards]
                model._residency._tier.host.check_integrity()
                text = plan.render()
                assert "GPU 0" in text
                assert "GPU 1" in text
    torch.testing.assert_close(results[0][1], expected[1], rtol=1e-4, atol=1e-4)
    for tokens, logits in results[1:]:
        assert torch.equal(tokens, results[0][0])
        assert torch.equal(logits, results[0][1])


@pytest.mark.parametrize("family", ["nllb_moe", "switch_transformers"])
def test_an_encoder_decoder_on_two_devices(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every module that was placed is given its activations by its own device's hook; all lie in RAM here."""
    checkpoint = save_random_model(families.make_config(family), tmp_path / "checkpoint")
    pack = pack_model(str(checkpoint), tmp_path / "pack", format="source")
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        inputs = example_inputs(resident.model.config)
        expected = run_logits(resident.model, inputs)
    overhead_bytes = overhead_of(pack, monkeypatch)
    gpus = Gpus(monkeypatch, {0: overhead_bytes + 200_000, 1: overhead_bytes + 400_000})
    with load(pack) as model:
        assert set(model.plan.device_of_layer) == {0, 1}
        placed = [model.model.get_submodule(name) for part in model.plan.parts for name in part.modules]
        called = [child for module in placed for child in (module if isinstance(module, nn.ModuleList) else [module])]
        assert all(module._forward_pre_hooks_with_kwargs for module in called)
        tokens, logits = run_logits(model.model, inputs)
        assert not [hazard for queue in gpus.queues for hazard in queue.hazards]
        assert all(queue.num_copies for queue in gpus.queues)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_by_device(pack: Path, monkeypatch: pytest.MonkeyPatch):
    Gpus(monkeypatch, {0: 1000, 1: 1000})
    with pytest.raises(BudgetError, match=r"GPU \d needs .* of VRAM for its part .*--vram \d="):
        load(pack)


# -- boundaries --


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor, *, mask: torch.Tensor, cache: Any, rotary: Any = None) -> torch.Tensor:
        self.seen = {"hidden": hidden, "mask": mask, "cos": rotary[0]}
        assert cache == "cache"
        return hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rotary = (mask + 1, mask + 2)
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, cache="cache", rotary=rotary)
        return hidden


def test_activations_follow_the_layers():
    """The meta device stands for a second one."""
    model = Model()
    here, there = torch.device("cpu"), torch.device("meta")
    boundaries = DeviceBoundaries(model, {f"layers.{i}": there if i >= 2 else here for i in range(4)})
    model(torch.ones(2, 3), torch.ones(3))
    first, second, third, fourth = (layer.seen for layer in model.layers)
    assert {tensor.device for tensor in [*first.values(), *second.values()]} == {here}
    assert {tensor.device for tensor in [*third.values(), *fourth.values()]} == {there}
    assert third["mask"] is fourth["mask"], "what all layers get crosses once"
    assert third["cos"] is fourth["cos"]
    assert not boundaries._pass.moved, "nothing is kept after the pass"


def test_layers_that_were_placed_together_bring_their_activations():
    model = Model()
    DeviceBoundaries(model, {"layers": torch.device("meta")})
    model(torch.ones(2, 3), torch.ones(3))
    assert {tensor.device.type for layer in model.layers for tensor in layer.seen.values()} == {"meta"}


def test_nothing_is_kept_after_a_pass_that_failed():
    model = Model()
    boundaries = DeviceBoundaries(model, {"layers.0": torch.device("cpu"), "layers.1": torch.device("meta")})
    model.layers[2].forward = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        model(torch.ones(1), torch.ones(1))
    assert not boundaries._pass.moved
