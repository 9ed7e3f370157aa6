"""The band is honest: what was measured lands in it, and `plan --check` tells what was off."""

import json
from dataclasses import replace

import plan_check
import pytest
from click.testing import CliRunner

from moe_offload.cli.main import cli
from moe_offload.errors import ConfigError
from moe_offload.offload.bench import Shape, Workload, cross, run, synthetic_pack
from moe_offload.offload.forecast import open_shape
from moe_offload.offload.forecast.band import Band
from moe_offload.offload.forecast.candidate import candidate
from moe_offload.offload.forecast.decode_time import decode_time
from moe_offload.offload.forecast.outcome import cpu_machine, read_outcomes
from moe_offload.offload.forecast.verdict import check_outcome, judge
from moe_offload.offload.model import OffloadedModel

CONFIG = {
    "model_type": "mixtral", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
MACHINE = cpu_machine(1 << 30, 5e10, 3e9)


@pytest.fixture(scope="module")
def landings():
    return [plan_check.landing(case, entry) for case, entry in plan_check.recorded()]


def test_every_configuration_was_measured(landings):
    assert len(plan_check.recorded()) == len(plan_check.CASES) >= 10


def test_nine_of_ten_recorded_runs_lie_in_the_band(landings):
    outside = [item.name for item in landings if not item.inside]
    assert len(outside) <= len(landings) / 10, outside


def test_the_band_is_narrow_enough_to_be_of_use(landings):
    for item in landings:
        assert item.band.high <= 2 * item.band.low, item.name


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of a tiny model, which nobody times."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    pack = synthetic_pack(Shape(folder / "config.json", format="int4", dense_format="nf4"), folder / "pack")
    workload = Workload(prompt_tokens=4, new_tokens=8, warmup_tokens=4, threads=1)
    return run(pack, cross(resident=[0.5], prefetch=["off"]), workload, isolated=False).to_dict()


def at_speed(report, folder, factor):
    """A report whose speed is ``factor`` of the best guess."""
    path = folder / "run.json"
    path.write_text(json.dumps(report))
    speed = judge(path).checks[0].lines[0].band.mid
    (row,) = report["rows"]
    path.write_text(json.dumps(report | {"rows": [row | {"median_tokens_per_s": factor * speed}]}))
    return path


def test_a_run_at_the_best_guess_is_in_the_band(report, tmp_path):
    verdict = judge(at_speed(report, tmp_path, 1.0))
    assert verdict.checks[0].inside
    assert verdict.sentence == "1 of 1 runs landed in the band."


def test_a_slow_machine_is_told_from_few_hits(report, tmp_path):
    slow = judge(at_speed(report, tmp_path, 0.2))
    assert not slow.checks[0].inside
    assert "slower than its rates" in slow.sentence
    assert "below" in slow.checks[0].lines[0].side
    (outcome,) = read_outcomes(tmp_path / "run.json")
    many = replace(outcome, load=wide(outcome.load), hit_ratio=0.05)
    hits = Band.exactly(0.05)
    starved = replace(many, tokens_per_s=decode_time(many.load, many.machine, hits, hits).tokens_per_s.mid)
    check = check_outcome(starved, starved.machine)
    assert not check.inside
    assert "repeated less" in check.reason


def wide(load):
    """With experts so large that the disk decides."""
    return replace(load, layers=[replace(layer, expert_bytes=100 << 20) for layer in load.layers])


def test_an_answer_is_checked_too(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    pack = synthetic_pack(Shape(folder / "config.json", format="int4", dense_format="nf4"), folder / "pack")
    with OffloadedModel.from_pretrained(pack, ram="1GiB", device="cpu", context_tokens=64) as model:
        figures = model.load_figures(context_tokens=40)
    answer = {
        "model": "tiny",
        "format": "int4",
        "prompt_tokens": 30,
        "new_tokens": 10,
        "timings": {"tokens_per_s": 1e-3, "time_to_first_token_s": 0.5},
        "load": figures,
    }
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(answer))
    (check,) = judge(path, given={"memory": 1e10, "disk": 1e9, "matrix": 1e11, "device": "cpu"}).checks
    assert [line.what for line in check.lines] == ["tokens a second", "first token, s"]
    assert not check.inside
    planned = candidate(open_shape(str(folder / "config.json")), MACHINE, "int4", "nf4")
    plan = planned.plan(MACHINE, context_tokens=64)
    assert figures["dense_bytes"] == pytest.approx(planned.step_dense_bytes, rel=0.01)  # buffers
    assert figures["kv_bytes"] == planned.token_load(plan, context_tokens=40).kv_bytes
    assert figures["operations_per_token"] == pytest.approx(planned.operations_per_token, rel=0.2)


def test_a_profile_is_checked_too(tmp_path):
    rates = {"memory_bytes_per_s": 5e10, "disk_bytes_per_s": 3e9}
    facts = {
        "model": "mine", "decode_tokens": 64, "device": "cpu", "ram_bytes": 1 << 30, "top_k": 2,
        "num_experts": [8, 8], "num_slots": [4, 4], "expert_bytes": [50_000_000] * 2, "dense_bytes": 10_000_000,
        "kv_bytes": 0, "rates": rates,
    }  # fmt: skip
    header = {"tokens_per_s": 20.0, "disk_bytes_per_token": 1e8}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"format": "moe-offload profile", "version": 1, "run": facts, "header": header}))
    (outcome,) = read_outcomes(path)
    assert outcome.hit_ratio == 0.5
    assert outcome.load.expert_bytes == 200_000_000
    assert judge(path).checks[0].lines[0].band.low > 1
    path.write_text(json.dumps({"format": "moe-offload profile", "run": facts | {"num_slots": None}, "header": header}))
    with pytest.raises(ConfigError, match="lacks num_slots"):
        judge(path)


def test_the_command_checks_a_report(report, tmp_path):
    path = at_speed(report, tmp_path, 1.0)
    text = CliRunner().invoke(cli, ["plan", "--check", str(path)])
    assert text.exit_code == 0, text.output
    assert "in the band" in text.output
    found = json.loads(CliRunner().invoke(cli, ["plan", "--check", str(path), "--json"]).stdout)
    assert found["runs"][0]["inside"]
    assert [line["what"] for line in found["runs"][0]["lines"]] == ["tokens a second", "hits in slots"]


def test_what_is_no_report_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="no report of a run"):
        judge(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"rows": [], "pack": {}}')
    with pytest.raises(ConfigError, match="lacks what a check needs"):
        judge(tmp_path / "y.json")
