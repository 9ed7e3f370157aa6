"""The command ``profile``: what it runs, reads and writes, and how it refuses."""

import json
from dataclasses import dataclass, field
from typing import Any

import cli_fake
import pytest
from click.testing import CliRunner
from profile_samples import bare, sample_report, slow_sample_report
from synthetic_trace import synthetic_trace

from moe_offload.cache import write_trace
from moe_offload.cli.main import cli
from moe_offload.offload.profiling.analyse import analyse
from moe_offload.offload.profiling.prompts import Prompt
from moe_offload.offload.profiling.report import VERSION, ProfileReport
from moe_offload.offload.profiling.run_facts import Rates


@dataclass
class ProfiledModel(cli_fake.FakeModel):
    """Says what it was asked to run, and gives the sample."""

    report: ProfileReport | None = None
    profiled: list[Any] = field(default_factory=list)

    def profile(self, prompts: Any, *, on_prompt: Any, **options: Any) -> ProfileReport | None:
        self.profiled.append((prompts, options))
        on_prompt(Prompt("English", "..."), 1, 5)
        return self.report


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*args: str, **options: Any) -> Any:
    return CliRunner().invoke(cli, ["profile", *args], **options)


@pytest.fixture
def model(monkeypatch):
    model = ProfiledModel(report=sample_report())  # made while the real modules are there
    model.loader = cli_fake.install(monkeypatch, model)
    return model


def test_a_run_is_shown_and_the_page_written(model, here):
    result = invoke("some/model", "--ram", "2GiB", "--tokens", "9", "--disk", "3.5GB/s")
    assert result.exit_code == 0, result.output
    assert model.loader.loaded == [("some/model", {"ram": "2GiB"})]
    rates = Rates(None, 3.5e9, None, None)
    assert model.profiled == [(None, {"max_new_tokens": 9, "rates": rates, "trace": None, "perfetto": None})]
    words = " ".join(result.stdout.split())
    assert sample_report().levers.next in words
    assert "English (1 of 5)" in result.stderr
    assert "written: profile.html" in result.stderr
    assert (here / "profile.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert model.closed


def test_without_a_model_it_is_the_demo(model):
    assert invoke("--no-html").exit_code == 0
    assert model.loader.loaded == [("/demo", {"ram": "300MiB"})]


def test_json_takes_the_place_of_the_report(model, here):
    result = invoke("m", "--json", "-", "--no-html")
    assert ProfileReport.from_json(result.stdout) == sample_report()
    assert list(here.iterdir()) == []
    assert invoke("m", "--json", "a.json", "--html", "a.html").exit_code == 0
    assert ProfileReport.load("a.json") == sample_report()
    assert (here / "a.html").exists()


@pytest.mark.parametrize("piped", [False, True])
def test_prompts_of_the_user(model, here, piped):
    text = "One\n\nstill one\n---\n\nTwo\n ---\n"
    (here / "prompts.txt").write_text(text)
    result = invoke("m", "--no-html", "--prompts", "-" if piped else "prompts.txt", input=text if piped else None)
    assert result.exit_code == 0, result.output
    assert [(prompt.name, prompt.text) for prompt in model.profiled[0][0]] == [
        ("prompt 1", "One\n\nstill one"),
        ("prompt 2", "Two"),
    ]


def test_a_trace_is_read(here):
    trace = synthetic_trace()
    write_trace("run.npz", trace)
    result = invoke("--from-trace", "run.npz", "--json", "-", "--disk", "1GB/s", "--perfetto", "times.json")
    assert result.exit_code == 0, result.output
    report = ProfileReport.from_json(result.stdout)
    assert report == analyse(trace, trace_file="run.npz", rates=Rates(None, 1e9, None, None))
    assert report.run.rates.disk_bytes_per_s == 1e9
    assert report.run.rates.memory_bytes_per_s == 18e9
    assert json.loads((here / "times.json").read_text())["traceEvents"]
    assert (here / "profile.html").exists()


def test_a_trace_of_routing_alone(here):
    write_trace("run.npz", bare(synthetic_trace()))
    result = invoke("--from-trace", "run.npz", "--no-html")
    assert result.exit_code == 0
    assert "Not in this report" in result.stdout
    result = invoke("--from-trace", "run.npz", "--no-html", "--perfetto", "times.json")
    assert result.exit_code == 1
    assert "has no times" in result.stderr


def test_two_reports_are_compared(here):
    (here / "a.json").write_text(sample_report().to_json())
    (here / "b.json").write_text(slow_sample_report().to_json())
    result = invoke("--compare", "a.json", "b.json")
    assert result.exit_code == 0
    assert "slots a layer   5   3" in result.stdout
    assert list(here.glob("*.html")) == []


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["m", "--from-trace", "t.npz"], 2, "one of them"),
        (["--from-trace", "t.npz", "--compare", "a", "b"], 2, "one of them"),
        (["--from-trace", "t.npz", "--prompts", "p"], 2, "--prompts has no use with --from-trace"),
        (["--compare", "a", "b", "--trace", "t"], 2, "--trace has no use with --compare"),
        (["--from-trace", "t.npz", "--context", "9"], 2, "--context has no use with --from-trace"),
        (["--compare", "a", "b", "--json", "c"], 2, "--json has no use with --compare"),
        (["--from-trace", "t.npz"], 1, "t.npz"),
        (["--compare", "a.json", "b.json"], 1, "a.json: No such file"),
        (["m", "--prompts", "absent.txt"], 1, "absent.txt"),
        (["m", "--prompts", "-"], 1, "there is no prompt"),
        (["m", "--tokens", "1"], 2, "--tokens"),
        (["m", "--disk", "fast"], 2, "is not a rate"),
        (["m", "--html", "no/such/folder/a.html"], 1, "No such file"),
    ],
)
def test_what_cannot_be_done_is_said(model, args, status, message):
    result = invoke(*args)
    assert result.exit_code == status, result.output
    assert message in " ".join(result.stderr.split())


def test_a_report_of_another_version_is_refused(here):
    values = json.loads(sample_report().to_json())
    (here / "a.json").write_text(json.dumps(values | {"version": 1}))
    result = invoke("--compare", "a.json", "a.json")
    assert result.exit_code == 1
    assert f"a.json: a profile report of version 1; this moe-offload reads version {VERSION}:" in result.stderr
