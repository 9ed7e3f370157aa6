"""``moe-offload bench``: synthetic shapes, what is counted, and what the bound is computed from."""

import io
import json
import os
from dataclasses import replace

import pytest
from click.testing import CliRunner

from moe_offload.cache import read_trace
from moe_offload.cli.main import cli
from moe_offload.errors import BudgetError, ConfigError
from moe_offload.offload.bench import compare, measure, run
from moe_offload.offload.bench.packs import Shape, synthetic_pack
from moe_offload.offload.bench.presets import PUBLISHED_FORMATS, preset_config, preset_names
from moe_offload.offload.bench.report import MachineRates, RunFigures, bound
from moe_offload.offload.bench.settings import Job, Setting, Workload, cross
from moe_offload.offload.model import OffloadedModel
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.planning.rates import Rate
from moe_offload.offload.planning.workspace import experts_per_token
from moe_offload.quant import get_format

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
SHORT = Workload(prompt_tokens=4, new_tokens=6, warmup_tokens=3, threads=1)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tiny") / "config.json"
    file.write_text(json.dumps(TINY))
    return file


@pytest.fixture(scope="module")
def pack(config_file, tmp_path_factory):
    return synthetic_pack(
        Shape(config_file, format="int4", dense_format="nf4"), tmp_path_factory.mktemp("packs") / "tiny"
    )


# Numbers of weights as the models' cards have them, in billions: a wrong dimension would show.
CARDS = {
    "mixtral-8x7b": (46.7, 32, 8, 2),
    "qwen3-30b-a3b": (30.5, 48, 128, 8),
    "deepseek-v2-lite": (15.7, 26, 64, 6),
    "gpt-oss-20b": (20.9, 24, 32, 4),
    "olmoe-1b-7b": (6.9, 16, 64, 8),
    "mixtral-8x22b": (140.6, 56, 8, 2),
    "qwen3-235b-a22b": (235.1, 94, 128, 8),
    "qwen3.5-35b-a3b": (34.7, 40, 256, 8),
    "gpt-oss-120b": (116.8, 36, 128, 4),
    "deepseek-v3": (671.0, 58, 256, 8),
    "kimi-k2": (1026.4, 60, 384, 8),
}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_the_size_of_its_model(name):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from moe_offload.offload.experts.containers import find_expert_containers

    config = preset_config(name)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    containers = find_expert_containers(model)
    weights, layers, experts, top_k = CARDS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(weights, rel=0.005)
    assert (len(containers), {item.num_experts for item in containers}) == (layers, {experts})
    assert experts_per_token(config) == top_k


@pytest.mark.parametrize("name", preset_names())
def test_the_numbers_of_a_preset_can_be_changed(name):
    config = preset_config(name, layers=4, experts=4, top_k=2, vocab=1000)
    assert config.vocab_size == 1000
    assert all(value is None or value < 1000 for value in (config.pad_token_id, config.eos_token_id))
    assert config.num_hidden_layers == 4
    assert experts_per_token(config) == 2
    assert Shape(name).expert_format == PUBLISHED_FORMATS.get(name, "nf4")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"top_k": 9}, "9 experts a token of 8"), ({"experts": 1}, "2 experts a token of 1")],
)
def test_impossible_shapes_are_refused(numbers, message):
    with pytest.raises(ConfigError, match=message):
        preset_config("mixtral-8x7b", **numbers)


def test_unknown_shapes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there are: mixtral-8x7b"):
        preset_config("gpt-9")
    with pytest.raises(ConfigError, match="cannot be read"):
        Shape(tmp_path / "none.json").config()
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="not the configuration"):
        Shape(tmp_path / "list.json").config()
    with pytest.raises(ConfigError, match="use --layers 2 or more"):
        preset_config("deepseek-v2-lite", layers=1)


def test_a_synthetic_pack_is_used_again_and_never_replaced(config_file, pack):
    before = (pack / "pack.json").stat().st_mtime_ns
    assert synthetic_pack(Shape(config_file, format="int4", dense_format="nf4"), pack) == pack
    assert (pack / "pack.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds another pack"):
        synthetic_pack(Shape(config_file, format="nf4", dense_format="nf4"), pack)


def test_figures_of_a_run_with_everything_resident(pack):
    (row,) = run(pack, cross(resident=[1.0], prefetch=["off"]), SHORT, isolated=False).rows
    figures, manifest = row.best, read_manifest(pack)
    assert (figures.bytes_read, figures.hit_ratio, figures.resident_share) == (0, 1.0, 1.0)
    packed_bytes = sum(part.size_bytes for part in manifest.layers[0].parts)
    assert figures.expert_bytes_per_token == 3 * 2 * packed_bytes
    attention = 2 * [(128, 128), (64, 128)]
    linear_bytes = sum(map(get_format("nf4").nbytes, [(512, 128), *3 * attention]))
    plain_bytes = 2 * (3 * (8 * 128 + 2 * 128) + 128)  # routers and norms
    assert figures.dense_bytes_per_token == pytest.approx(linear_bytes + plain_bytes, rel=0.01), "no embedding table"
    assert figures.kv_bytes_per_token < 3 * SHORT.context_tokens * 2 * 2 * 32 * 2
    assert figures.tokens == 6
    assert 0 < figures.median_step_s <= figures.elapsed_s


def test_counts_depend_on_the_budget_alone_and_the_text_is_the_same(pack):
    report = run(pack, cross(resident=[0.25, 0.5], prefetch=["off"]), SHORT, repeat=2, isolated=False)
    quarter, half = report.rows
    assert len({run.bytes_read for run in quarter.runs}) == 1, "the same tokens, and so the same misses"
    assert quarter.best.bytes_read > half.best.bytes_read > 0
    assert (quarter.best.resident_share, half.best.resident_share) == (0.25, 0.5)
    assert half.best.bytes_read % read_manifest(pack).layers[0].slot_bytes == 0
    assert half.best.bytes_missed == half.best.bytes_read


def test_a_share_of_the_experts_is_met_to_the_byte(pack):
    report = run(pack, cross(resident=[0.5], prefetch=["off"]), replace(SHORT, new_tokens=1), isolated=False)
    with OffloadedModel.from_pretrained(
        pack,
        device="cpu",
        ram=report.rows[0].best.ram_bytes,
        context_tokens=replace(SHORT, new_tokens=1).context_tokens,
    ) as model:
        assert model.plan.total_bytes("RAM") == model.plan.ram_bytes
        assert model.plan.num_slots == (4, 4, 4)


RUN = RunFigures(
    routing="by the model",
    ram_bytes=1,
    resident_share=0.5,
    load_s=1.0,
    peak_bytes=1,
    time_to_first_token_s=1.0,
    tokens=10,
    elapsed_s=5.0,
    median_step_s=0.5,
    hit_ratio=0.5,
    bytes_read=60,
    bytes_missed=40,
    stall_s=1.0,
    prefetch_recall=0.0,
    prefetch_issued=0,
    prefetch_wasted=0,
    expert_bytes_per_token=50,
    dense_bytes_per_token=40,
    kv_bytes_per_token=10,
    operations=2000,
    rates=MachineRates(1000.0, 20.0, True, 400.0),
)


def test_the_bound_is_the_slower_of_both():
    assert bound(RUN, RUN.rates, "decode").tokens_per_s == pytest.approx(20 / 4)
    assert bound(RUN, RUN.rates, "decode").by == "disk"
    assert bound(replace(RUN, bytes_missed=0), RUN.rates, "decode").tokens_per_s == pytest.approx(1000 / 100)
    assert bound(replace(RUN, bytes_missed=0), RUN.rates, "decode").by == "memory"
    assert bound(RUN, RUN.rates, "prefill").tokens_per_s == pytest.approx(400 / 200)
    assert bound(RUN, RUN.rates, "prefill").by == "compute"


def test_the_best_rates_are_the_best_of_each():
    best = MachineRates(1.0, 9.0, True).best(MachineRates(2.0, 3.0, False, 5.0))
    assert best == MachineRates(2.0, 9.0, False, 5.0)


def test_jobs_and_figures_survive_json():
    job = Job("pack", Setting(resident=0.5, prefetch=2), SHORT, 1)
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    assert RunFigures.from_dict(json.loads(json.dumps(RUN.to_dict()))) == RUN


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Setting(),
        lambda: Setting(ram="1GiB", resident=0.5),
        lambda: Setting(resident=1.5),
        lambda: Workload(new_tokens=0),
        lambda: Workload(warmup_tokens=-1),
        lambda: Workload(recall=1.1),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


def test_too_small_a_budget_is_refused_as_loading_refuses_it(pack):
    with pytest.raises(BudgetError, match=r"needs .* of RAM"):
        run(pack, [Setting(ram="1MiB")], SHORT, isolated=False)


def test_each_run_is_recorded_to_a_file_of_its_own(pack, tmp_path):
    settings = cross(resident=[0.5, 1.0], prefetch=["off"])
    run(pack, settings[:1], SHORT, isolated=False, trace=tmp_path / "one.npz")
    report = run(pack, settings, SHORT, isolated=False, trace=tmp_path / "two.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"one.npz", "two-1-1.npz", "two-2-1.npz"}
    trace = read_trace(tmp_path / "two-1-1.npz")
    assert trace.num_tokens == SHORT.context_tokens - 1
    assert trace.num_slots.tolist() == [4] * 3
    assert report.rows[0].best.bytes_read <= trace.transfer_bytes.sum()


def test_prefill_times_the_second_prompt(pack):
    report = run(pack, cross(resident=[0.5]), replace(SHORT, kind="prefill", prompt_tokens=20), isolated=False)
    (row,) = report.rows
    weights = 3 * (2 * 3 * 128 * 256 + 128 * 128 * 2 + 2 * 128 * 64 + 8 * 128)
    assert row.best.operations == 2 * (20 * weights + 512 * 128)
    assert row.best.tokens == 20
    assert report.bound(row).by in ("disk", "compute")


def test_the_command_measures_in_processes_of_their_own(pack):
    arguments = ["bench", str(pack), "--ram", "400MiB", "--prompt-tokens", "4", "--new-tokens", "4"]
    result = CliRunner().invoke(cli, [*arguments, "--warmup-tokens", "1", "--threads", "1", "--json", "-"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"schema", "machine", "pack", "workload", "rates", "rows"}
    assert report["schema"] == 1
    assert report["pack"] | {"folder": ""} == {
        "name": "tiny",
        "folder": "",
        "format": "int4",
        "dense_format": "nf4",
        "layers": 3,
        "experts": 8,
        "top_k": 2,
        "expert_bytes": sum(part.size_bytes for part in read_manifest(pack).layers[0].parts),
        "all_expert_bytes": read_manifest(pack).expert_bytes,
        "dense_bytes": read_manifest(pack).dense_bytes,
    }
    (row,) = report["rows"]
    assert row["setting"] == {"ram": "400MiB", "resident": None, "policy": "recall", "prefetch": "auto"}
    assert row["bound_share"] == pytest.approx(row["best_tokens_per_s"] / row["bound_tokens_per_s"])
    assert set(row["best"]) == set(RUN.to_dict())
    assert "400MiB, recall, prefetch auto: " in result.stderr


def test_the_command_shows_a_table(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_run_isolated", lambda job, launcher: compare._run_here(job))
    arguments = ["bench", str(config_file), "--keep", str(tmp_path / "pack"), "--layers", "2", "--format", "int4"]
    arguments += ["--resident", "50%", "--prompt-tokens", "4", "--new-tokens", "2", "--warmup-tokens", "0"]
    result = CliRunner().invoke(cli, arguments, terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "2 layers of 8 experts, 2 a token" in result.stdout
    assert "50%" in result.stdout
    assert "stays there for the next time" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a pack or a config.json"),
        (["x", "--like", "mixtral-8x7b"], "one of the two"),
        (["--like", "gpt-9"], "is not one of"),
        (["x", "--resident", "0%"], "is not a share"),
        (["x", "--ram", "many"], "is not a size"),
    ],
)
def test_wrong_usage(arguments, message):
    result = CliRunner().invoke(cli, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_pack_has_its_own_shape(pack):
    result = CliRunner().invoke(cli, ["bench", str(pack), "--layers", "2"])
    assert result.exit_code == 2
    assert "--layers shapes a synthetic pack" in result.output


def test_a_child_that_is_refused_tells_why(pack, monkeypatch, capsys):
    job = Job(str(pack), Setting(ram="1MiB"), SHORT)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(job.to_dict())))
    measure.main()
    assert json.loads(capsys.readouterr().out)["error"].startswith("needs ")


def test_a_run_is_launched_as_it_is_told(pack, tmp_path):
    entered = tmp_path / "cgroup.procs"
    launcher = ["/bin/sh", "-c", f'echo $$ > {entered} && exec "$@"', "sh"]
    report = run(pack, cross(ram=["400MiB"]), SHORT, launcher=launcher, disk_s=0.0)
    assert int(entered.read_text()) != os.getpid()
    assert report.rates.disk_bytes_per_s > 0


def test_the_disk_is_read_as_long_as_the_job_says(pack, monkeypatch):
    seconds = []

    def read(manifest, folder, *, seed, longest_s):
        seconds.append(longest_s)
        return Rate(1, 1.0), True

    monkeypatch.setattr(measure, "expert_read_rate", read)
    run(pack, cross(ram=["400MiB"]), SHORT, isolated=False, disk_s=5.0)
    assert seconds == [5.0, 5.0]


def test_replayed_tokens_are_the_ones_given(pack):
    import torch

    with OffloadedModel.from_pretrained(pack, device="cpu", ram="400MiB", context_tokens=32) as model:
        seen = []
        hook = model.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        report = model._generator.replay(torch.tensor([[5, 6, 7]]), [11, 12, 13], lambda count: None)
        hook.remove()
    assert [ids.flatten().tolist() for ids in seen] == [[5, 6, 7], [11], [12]]
    assert report.new_tokens == 3
