"""A profile report as JSON: what is written is read back, and nothing else is."""

import json
import re
from pathlib import Path

import profile_samples
import pytest

from moe_offload.errors import ReportError
from moe_offload.offload.profiling.report import ProfileReport

SAMPLES = [
    profile_samples.sample_report,
    profile_samples.long_sample_report,
    profile_samples.large_sample_report,
    profile_samples.bare_sample_report,
    profile_samples.gpu_sample_report,
]


@pytest.mark.parametrize("make", SAMPLES)
def test_what_is_written_is_read_back(make):
    report = make()
    assert ProfileReport.from_json(report.to_json()) == report


def test_a_file_is_read_and_named_in_errors(tmp_path):
    report = profile_samples.sample_report()
    (tmp_path / "a.json").write_text(report.to_json())
    assert ProfileReport.load(tmp_path / "a.json") == report
    with pytest.raises(ReportError, match=r"b\.json: No such file"):
        ProfileReport.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(ReportError, match=r"c\.json: not a profile report"):
        ProfileReport.load(tmp_path / "c.json")


def change(values, path, value):
    *keys, last = path
    for key in keys:
        values = values[key]
    if value is ...:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "version 2; this moe-offload reads version 3"),
        (["version"], True, "version True"),
        (["format"], "another", 'lacks "format"'),
        (["header"], ..., "lacks 'header'"),
        (["header", "surprise"], 1, "unknown keys: 'surprise'"),
        (["header", "tokens_per_s"], "fast", "header.tokens_per_s is not a number"),
        (["header", "tokens_per_s"], 10**400, "not a finite number"),
        (["header", "exactness", "lossless"], 1, "lossless is not true or false"),
        (["run", "num_experts", 2], -1, r"run.num_experts\[2\] is not a whole number"),
        (["run", "source"], "rumour", "must be one of run, trace"),
        (["run", "versions"], [], "not an object"),
        (["usage", "hits", 1], [], "a layer of usage.hits has 0 entries instead of 8"),
        (["usage", "residency", "frames", 0, 0], "0000000x", "other than digits"),
        (["steps", "wait_s"], [0.1], "steps.wait_s has 1 entries instead of 63"),
        (["curves", "curves", 0, "hit_ratio"], [], "has 0 entries"),
        (["prediction", "layer_recall", 0], [0.1], "instead of 2"),
        (["experts", "coactivation", "maps", 0, "probability", 0], [], "instead of 8"),
        (["layers"], {}, "layers is not a list"),
    ],
)
def test_anything_else_is_refused(path, value, message):
    values = json.loads(profile_samples.sample_report().to_json())
    change(values, path, value)
    with pytest.raises(ReportError, match=message):
        ProfileReport.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"format": 1, "format": 2}', "NaN"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ReportError, match="not a profile report"):
        ProfileReport.from_json(text)


def test_every_field_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "profile-report.md").read_text()
    names: set[str] = set()

    def collect(value):
        if isinstance(value, dict):
            names.update(value)
            for item in value.values():
                collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    for report in (profile_samples.sample_report(), profile_samples.gpu_sample_report()):
        values = json.loads(report.to_json())
        values["run"]["versions"] = {}
        collect(values)
    assert not [name for name in sorted(names) if not re.search(rf'[`"]{name}[`"]', text)]
