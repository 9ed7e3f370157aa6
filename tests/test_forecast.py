"""The forecast: its arithmetic, its statistics, what it says of what fits and what does not."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import quantized_checkpoints
from click.testing import CliRunner

from moe_offload.cache import RoutingTrace, write_trace
from moe_offload.cli.main import cli
from moe_offload.errors import ConfigError, SourceError
from moe_offload.offload.bench.packs import Shape, synthetic_pack
from moe_offload.offload.forecast import GivenMachine, Machine, Rate, forecast, machine_of, open_shape
from moe_offload.offload.forecast.band import Band, propagate
from moe_offload.offload.forecast.candidate import candidate
from moe_offload.offload.forecast.decode_time import decode_time, side_by_side
from moe_offload.offload.forecast.hit_ratio import even_curve, hit_curve, recorded_models
from moe_offload.offload.forecast.prompt_time import prompt_time
from moe_offload.offload.forecast.token_load import LayerLoad, TokenLoad
from moe_offload.offload.model import OffloadedModel
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.pack.packer import pack_model

QUANTIZED = (
    quantized_checkpoints.gpt_oss_mxfp4,
    quantized_checkpoints.deepseek_fp8,
    quantized_checkpoints.deepseek_fp4_experts,
)
GIB = 1 << 30
LAPTOP = Machine(
    14 * GIB, None, Rate(50e9, "given"), Rate(3.5e9, "given"), None, Rate(0.5e12, "assumed"), Rate(1e9, "assumed")
)
DESKTOP = Machine(
    30 * GIB,
    8 * GIB,
    Rate(272e9, "given"),
    Rate(3.5e9, "given"),
    Rate(25e9, "given"),
    Rate(20e12, "assumed"),
    Rate(1e9, "assumed"),
)
TINY = {
    "model_type": "mixtral",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def load(share: float, host_share: float = 0.0) -> TokenLoad:
    return TokenLoad([LayerLoad(8, 2, 50_000_000, share, host_share)] * 4, 40_000_000, 1_000_000)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tiny") / "config.json"
    file.write_text(json.dumps(TINY))
    return file


# -- arithmetic --


def test_errors_add_in_quadrature():
    def product(value):
        return value["a"] * value["b"]

    band = propagate(product, {"a": Band(1, 2, 4), "b": Band(1, 2, 4)})
    assert band.mid == 4
    assert math.log(band.high / band.mid) == pytest.approx(math.sqrt(2) * math.log(2))
    assert math.log(band.mid / band.low) == pytest.approx(math.sqrt(2) * math.log(2))


def test_a_factor_that_only_hurts_moves_one_end():
    band = propagate(lambda value: 1 / value["rate"], {"rate": Band(0.5, 1.0, 1.0)})
    assert (band.low, band.mid, band.high) == (1, 1, pytest.approx(2))


def test_a_band_is_in_order():
    with pytest.raises(ValueError, match="not between"):
        Band(2, 1, 3)
    assert Band(1, 2, 4).inverse() == Band(0.25, 0.5, 1)


def test_what_overlaps_is_hidden_behind_the_longest():
    assert side_by_side([3, 1, 2], 1.0) == 3
    assert side_by_side([3, 1, 2], 0.0) == 6
    assert side_by_side([3, 1, 2], 0.5) == 4.5


def test_a_step_costs_its_bytes_over_the_rates():
    known = Band.exactly(0.5)
    time = decode_time(load(0.5), LAPTOP, known, known)
    assert time.bound_by == "disk"
    assert time.ways_s["disk"] == pytest.approx(4 * 2 * 50e6 * 0.5 / (3.5e9 * 0.9))
    faster = decode_time(load(0.5), replace(LAPTOP, disk=Rate(7e9, "given")), known, known)
    assert faster.ways_s["disk"] == pytest.approx(time.ways_s["disk"] / 2)
    assert faster.step_s.mid < time.step_s.mid
    resident = decode_time(load(1.0), LAPTOP, Band.exactly(1.0), Band.exactly(1.0))
    assert resident.bound_by == "memory"
    assert resident.ways_s["disk"] == 0


def test_a_gpu_copies_what_it_misses_and_reads_what_ram_misses_too():
    hits, reach = Band.exactly(0.25), Band.exactly(0.75)
    time = decode_time(load(0.25, 0.5), DESKTOP, hits, reach)
    assert time.ways_s["copy"] == pytest.approx(400e6 * 0.75 / (25e9 * 0.85))
    assert time.ways_s["disk"] == pytest.approx(400e6 * 0.25 / (3.5e9 * 0.9))


def test_less_is_known_of_an_assumed_rate_than_of_a_measured_one():
    def width(origin):
        machine = replace(LAPTOP, disk=Rate(3.5e9, origin))
        band = decode_time(load(0.5), machine, Band.exactly(0.5), Band.exactly(0.5)).tokens_per_s
        return band.high / band.low

    assert width("measured") < width("assumed")


def test_a_long_prompt_reads_what_is_missing_once_a_chunk():
    def seconds(tokens, share=0.5):
        return prompt_time(load(share), LAPTOP, prompt_tokens=tokens, chunk_tokens=512, operations_per_token=1e6).mid

    assert seconds(1024) == pytest.approx(2 * seconds(512), rel=0.01)
    assert seconds(1) < seconds(512)
    assert seconds(512, 1.0) < seconds(512)


# -- hits --


def test_hits_rise_with_the_slots_and_end_at_one():
    for curve in (hit_curve("auto", model_type="?", num_experts=64, top_k=8), even_curve()):
        ratios = [curve.at(step / 20) for step in range(21)]
        assert ratios[-1] == Band.exactly(1.0)
        assert all(before.mid < after.mid for before, after in itertools.pairwise(ratios))


def test_a_recorded_model_is_recognised_and_the_rest_lie_between_models():
    own = hit_curve("auto", model_type="gpt_oss", num_experts=32, top_k=4)
    assert "gpt-oss-20b" in own.note
    assert own.at(0.25).mid == pytest.approx(0.70, abs=0.02)  # LRU: 64.5 %, published beside the trace
    other = hit_curve("auto", model_type="qwen3_moe", num_experts=128, top_k=8)
    band = other.at(0.25)
    quarter = sorted(model.curve.at(0.25).mid for model in recorded_models())
    assert quarter[0] < band.low < band.mid < band.high < quarter[-1]
    with pytest.raises(ConfigError, match="auto, even, trace:FILE"):
        hit_curve("mine", model_type="mixtral", num_experts=8, top_k=2)


def test_recorded_statistics_say_where_they_are_from():
    for model in recorded_models():
        assert "http" in model.source or "arXiv" in model.source


def test_a_trace_of_ones_own_decides(tmp_path):
    experts = np.tile(np.arange(4, dtype=np.int16).reshape(1, 1, 4), (50, 2, 1))  # always the same four of 16
    file = tmp_path / "mine.npz"
    write_trace(file, RoutingTrace(experts=experts, num_experts=np.array([16, 16], dtype=np.int32)))
    curve = hit_curve(f"trace:{file}", model_type="mixtral", num_experts=16, top_k=4)
    assert curve.at(0.5).mid == pytest.approx(49 / 50)
    assert curve.at(1 / 16).mid < 0.3
    file = tmp_path / "prompt.npz"
    write_trace(file, RoutingTrace(experts=experts, phase=np.zeros(50, dtype=np.uint8)))
    with pytest.raises(ConfigError, match="no decode tokens"):
        hit_curve(f"trace:{file}", model_type="mixtral", num_experts=16, top_k=4)


# -- what fits --


def test_a_forecast_agrees_with_the_pack_that_is_made(config_file, tmp_path):
    folder = synthetic_pack(Shape(config_file, format="nf4", dense_format="nf4"), tmp_path / "pack")
    (planned,) = forecast(open_shape(str(config_file)), LAPTOP, formats=["nf4"], dense_format="nf4").formats
    (packed,) = forecast(open_shape(str(folder)), LAPTOP).formats
    assert planned.pack_bytes == pytest.approx(packed.pack_bytes, abs=1 << 17)  # headers, and files end at a block
    assert packed.pack_bytes >= sum(path.stat().st_size for path in folder.glob("experts-*"))
    assert planned.speed.plan == packed.speed.plan
    assert planned.speed.decode.step_s.mid == pytest.approx(packed.speed.decode.step_s.mid)
    assert (packed.format, packed.packing_s) == ("nf4", None)
    with OffloadedModel.from_pretrained(folder, ram=14 * GIB, context_tokens=4096, device="cpu") as model:
        loaded = model.plan
    assert (loaded.num_slots, loaded.dense_bytes, loaded.kv_bytes) == (
        planned.speed.plan.num_slots,
        planned.speed.plan.dense_bytes,
        planned.speed.plan.kv_bytes,
    )


def test_what_does_not_fit_says_what_would_do():
    found = forecast(open_shape("mixtral-8x7b"), replace(LAPTOP, ram_bytes=2 * GIB), formats=["nf4", "nf3"])
    assert all(item.speed is None for item in found.formats)
    least = min(item.refusal.needed_bytes for item in found.formats)
    assert f"--ram {-(-least // (1 << 20))}MiB, in nf3" in found.recommendation.sentence
    assert found.recommendation.command is None
    enough = replace(LAPTOP, ram_bytes=-(-least // (1 << 20)) << 20)
    assert any(item.speed for item in forecast(open_shape("mixtral-8x7b"), enough, formats=["nf4", "nf3"]).formats)


def test_a_prompt_is_foretold_with_the_slots_that_it_leaves():
    machine = replace(LAPTOP, ram_bytes=8 * GIB)
    shape = open_shape("mixtral-8x7b")
    found = forecast(shape, machine, formats=["nf4"], dense_format="nf4", prompt_tokens=2000)
    (item,) = found.to_dict()["formats"]
    assert item["fewest_share"] < item["resident_share"]
    assert sum(line["size_bytes"] for line in item["memory"]) == item["ram_bytes"] <= machine.ram_bytes
    (speed,) = [one.speed for one in found.formats]
    packed = candidate(shape, machine, "nf4", "nf4")

    def first_token_s(num_slots):
        load = packed.token_load(speed.plan, context_tokens=2000, num_slots=num_slots)
        chunks = {"prompt_tokens": 2000, "chunk_tokens": speed.plan.prefill_chunk_tokens}
        return prompt_time(load, machine, operations_per_token=packed.operations_per_token, **chunks).mid

    assert speed.time_to_first_token_s.mid == first_token_s(speed.plan.fewest_slots)
    assert first_token_s(speed.plan.fewest_slots) > first_token_s(speed.plan.num_slots)


def test_more_memory_is_never_slower_and_fewer_bits_need_less():
    shape = open_shape("qwen3-30b-a3b")
    speeds = []
    for gib in (4, 8, 16, 32):
        by_format = {item.format: item for item in forecast(shape, replace(LAPTOP, ram_bytes=gib * GIB)).formats}
        speeds.append(by_format["nf4"].speed.decode.tokens_per_s.mid)
        assert by_format["nf3"].pack_bytes < by_format["nf4"].pack_bytes < by_format["int8"].pack_bytes
    assert speeds == sorted(speeds)


def test_a_quantised_model_is_kept_as_it_is():
    found = forecast(open_shape("gpt-oss-20b"), LAPTOP)
    assert found.recommendation.format == "source"
    assert found.recommendation.command == "moe-offload chat openai/gpt-oss-20b --ram 14GiB"
    by_format = {item.format: item for item in found.formats}
    assert by_format["source"].pack_bytes == pytest.approx(14e9, rel=0.05)  # its card: 12.8 GiB


def test_the_band_of_a_recorded_model_is_narrow():
    for machine in (LAPTOP, DESKTOP):
        found = forecast(open_shape("mixtral-8x7b"), machine, formats=["nf4", "nf3"])
        for item in found.formats:
            band = item.speed.decode.tokens_per_s
            assert band.low < band.mid < band.high < 2 * band.low


def test_an_encoder_takes_no_part_in_a_decode_step(tmp_path):
    config = {
        "model_type": "switch_transformers", "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2,
        "num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4,
        "vocab_size": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = open_shape(str(tmp_path / "config.json"))
    item = candidate(shape, LAPTOP, "nf4", "source")
    assert len(item.layers) == 4
    assert len(item.token_load(item.plan(LAPTOP, context_tokens=64), context_tokens=64).layers) == 2
    assert item.step_dense_bytes < item.dense_bytes


@pytest.mark.parametrize("make", QUANTIZED, ids=lambda make: make.__name__)
def test_a_quantised_checkpoint_is_foreseen_as_it_is_packed(make, tmp_path):
    folder = make(tmp_path).folder
    shape = open_shape(str(folder))
    manifest = read_manifest(pack_model(str(folder), tmp_path / "pack"))
    (item,) = forecast(shape, LAPTOP, formats=["source"], dense_format="source").formats
    assert shape.is_quantized
    assert shape.source_weights in {part.format for layer in manifest.layers for part in layer.parts}
    experts = sum(layer.num_experts * layer.slot_bytes for layer in manifest.layers)
    assert item.pack_bytes == pytest.approx(manifest.dense_bytes + experts, rel=0.05, abs=1 << 17)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(SourceError, match="presets are: mixtral-8x7b"):
        open_shape(str(tmp_path / "no such thing"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not the configuration"):
        open_shape(str(tmp_path / "config.json"))


# -- the machine --


def test_what_is_given_is_not_measured(tmp_path):
    given = GivenMachine(ram="64GiB", vram="24GiB", memory=900e9, disk=7e9, copy=25e9, matrix=1e12)
    machine = machine_of(given, folder=tmp_path / "home", read_bytes=1 << 20)
    assert (machine.ram_bytes, machine.vram_bytes, machine.device) == (64 * GIB, 24 * GIB, "cuda")
    assert {machine.memory.origin, machine.disk.origin, machine.copy.origin} == {"given"}
    assert not (tmp_path / "home").exists()
    with pytest.raises(ConfigError, match="no CUDA device here"):
        machine_of(GivenMachine(device="cuda"), folder=tmp_path, read_bytes=1 << 20)


def test_the_rest_is_measured(tmp_path):
    machine = machine_of(GivenMachine(ram="1GiB", device="cpu"), folder=tmp_path / "home", read_bytes=1 << 20)
    assert {rate.origin for rate in (machine.memory, machine.disk, machine.matrix)} == {"measured"}
    assert min(machine.memory.per_s, machine.disk.per_s, machine.matrix.per_s, machine.quantize.per_s) > 0
    assert machine.copy is None


# -- the command --

RATES = ("--disk", "3.5GB/s", "--memory", "50GB/s")


def plan(*arguments: str) -> SimpleNamespace:
    result = CliRunner().invoke(cli, ["plan", *arguments])
    return SimpleNamespace(code=result.exit_code, text=result.output, out=result.stdout, error=result.stderr)


def test_the_command_shows_formats_and_what_to_run(config_file):
    answer = plan(str(config_file), "--ram", "1GiB", "--vram", "1GiB", "--pcie", "25GB/s", *RATES)
    assert answer.code == 0, answer.text
    assert "3 layers of 8 experts, 2 a token" in answer.out
    assert "disk 3.5 GB/s (given)" in answer.out
    assert "has not run on a GPU" in answer.out
    for spec in ("source", "int8", "nf4", "mixed:3.5", "nf3"):
        assert spec in answer.out
    assert f"moe-offload chat {config_file}" in answer.out


def test_the_command_writes_json(config_file):
    answer = plan(str(config_file), "--ram", "1GiB", "--format", "nf4", "--format", "nf3", "--json", *RATES)
    found = json.loads(answer.out)
    assert found["schema"] == 1
    assert [item["format"] for item in found["formats"]] == ["nf4", "nf3"]
    band = found["formats"][0]["tokens_per_s"]
    assert 0 < band["low"] < band["mid"] < band["high"]
    assert found["machine"]["disk"] == {"per_s": 3.5e9, "origin": "given"}
    assert found["recommendation"]["command"].startswith("moe-offload chat ")


def test_a_full_disk_is_said(config_file, monkeypatch):
    asked = [str(config_file), "--ram", "1GiB", "--format", "nf4", *RATES]
    assert "free; MOE_OFFLOAD_HOME" not in plan(*asked).out
    monkeypatch.setattr("moe_offload.offload.pack.room.free_bytes", lambda folder: 1 << 10)
    assert "the disk of the packs has 1.0 KiB free; MOE_OFFLOAD_HOME" in plan(*asked).out


def test_a_model_that_cannot_be_loaded_has_no_command():
    machine = replace(LAPTOP, ram_bytes=64 * GIB)
    found = forecast(open_shape("kimi-k2"), machine, formats=("nf3",))
    assert found.recommendation.format == "nf3"
    assert found.recommendation.command is None
    assert "code of its own" in found.recommendation.sentence


@pytest.mark.parametrize("rate", ["fast", "50%", "auto", "-1GB/s"])
def test_a_rate_is_bytes_a_second(config_file, rate):
    answer = plan(str(config_file), f"--disk={rate}")
    assert answer.code == 2
    assert "3.5GB/s" in answer.text


def test_nothing_to_plan_is_wrong_usage():
    assert "Name a model" in plan().text


# -- several GPUs --


def test_layers_are_divided_among_gpus(tmp_path):
    shape = open_shape("mixtral-8x7b")
    two = replace(DESKTOP, vram_bytes=18 * GIB, gpus=((0, 8 * GIB), (1, 10 * GIB)))
    found = forecast(shape, two, formats=("nf4",))
    (item,) = found.formats
    plan_ = item.speed.plan
    assert [part.index for part in plan_.parts] == [0, 1]
    assert len(plan_.parts[0].layers) < len(plan_.parts[1].layers)
    for part in plan_.parts:
        lines = {line.label: line.size_bytes for line in plan_.lines() if line.tier == f"GPU {part.index}"}
        assert sum(lines.values()) <= part.vram_bytes
        assert lines["CUDA context"] > 0
        assert lines["fragmentation"] > 0
    one = forecast(shape, replace(DESKTOP, vram_bytes=18 * GIB), formats=("nf4",)).formats[0].speed
    assert plan_.resident_share == pytest.approx(one.plan.resident_share, abs=0.1)
    assert "--vram 0=8GiB,1=10GiB" in found.recommendation.command
    assert found.to_dict()["machine"]["gpus"] == ((0, 8 * GIB), (1, 10 * GIB))
    tiers = {line["tier"] for line in found.to_dict()["formats"][0]["memory"]}
    assert tiers == {"GPU 0", "GPU 1", "RAM"}


def test_several_gpus_that_are_too_small_are_named(tmp_path):
    small = replace(DESKTOP, vram_bytes=2 * GIB, gpus=((0, GIB), (2, GIB)))
    found = forecast(open_shape("mixtral-8x7b"), small, formats=("nf4",))
    assert found.recommendation.command is None
    assert "GPU 2 needs" in found.recommendation.sentence
    assert "--vram 2=" in found.recommendation.sentence


def test_amounts_by_gpu_are_given_as_to_chat(tmp_path):
    rates = {"memory": 900e9, "disk": 7e9, "copy": 25e9, "matrix": 1e12}
    given = GivenMachine(ram="64GiB", vram="1=10GiB,0=8GiB", **rates)
    machine = machine_of(given, folder=tmp_path / "home", read_bytes=1 << 20)
    assert machine.gpus == ((0, 8 * GIB), (1, 10 * GIB))
    assert (machine.vram_bytes, machine.device) == (18 * GIB, "cuda")
    only = machine_of(replace(given, vram={1: "10GiB"}), folder=tmp_path / "home", read_bytes=1 << 20)
    assert (only.gpus, only.vram_bytes) == ((), 10 * GIB)
    with pytest.raises(ConfigError, match="leave out --device cpu"):
        machine_of(replace(given, device="cpu"), folder=tmp_path / "home", read_bytes=1 << 20)


def test_the_command_has_a_table_for_each_gpu(config_file):
    found = plan(str(config_file), "--vram", "0=1GiB,1=1GiB", "--ram", "4GiB", *RATES, "--pcie", "25GB/s")
    assert found.code == 0, found.text
    assert "1.0 GiB on GPU 0, 1.0 GiB on GPU 1" in found.out
    for line in ("CUDA context", "library work", "recorded steps", "fragmentation", "workspace"):
        assert line in found.out
    wrong = plan(str(config_file), "--vram", "0=1GiB,0=1GiB")
    assert wrong.code != 0
    assert "write each GPU once" in wrong.text
