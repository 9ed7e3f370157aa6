"""Benchmarks with a limited disk: who is put into the group, and what stands in the document."""

import contextlib
import signal
import sys

import peers
import pytest
import tables
from control_group import SUSTAINED_S, ControlGroup, MemoryLimit, NoLimitError, ReadLimit
from peer_runs import conditions
from peer_runs.cases import make_cases
from peer_runs.conditions import Conditions
from peer_runs.engines import Run
from peer_runs.results import CaseResult, EntryResult
from peer_runs.saved import save


class LaunchedGroup(ControlGroup):
    """Says only who is put into it."""

    @property
    def launcher(self):
        return ["launch"]


SLOW = ReadLimit("254:0", 800_000_000)


@pytest.fixture
def groups(monkeypatch):
    """The limits of every group that is made, none of them real."""
    made = []

    @contextlib.contextmanager
    def group(limits, root=None):
        made.append(limits)
        yield LaunchedGroup({})

    monkeypatch.setattr(conditions, "control_group", group)
    monkeypatch.setattr(tables, "control_group", group)
    return made


def test_engines_and_rates_read_the_same_disk(groups):
    with Conditions(True, SLOW).engine_group(1 << 30), Conditions(True, SLOW).rates_group():
        assert groups == [[MemoryLimit(1 << 30), SLOW], [SLOW]]
    assert Conditions(True, SLOW).disk_s == SUSTAINED_S > Conditions(True).disk_s


def test_without_a_disk_rate_only_memory_is_limited(groups):
    with Conditions(True).engine_group(None), Conditions(True).rates_group(), Conditions(False).engine_group(1 << 30):
        assert groups == [[MemoryLimit(None)], [], []]


def test_rates_are_measured_in_a_process_of_the_group(groups, monkeypatch, tmp_path):
    def child(label, python, script, values, timeout_s, launcher):
        assert groups == [[SLOW]]
        assert (script, values["disk_s"], values["threads"]) == ("rates_child.py", SUSTAINED_S, 2)
        assert launcher == ["launch"]
        return {"memory_bytes_per_s": 4e10, "disk_bytes_per_s": 8e8, "direct": True, "matrix_ops_per_s": None}

    monkeypatch.setattr(peers, "child_figures", child)
    (tmp_path / "experts").write_bytes(bytes(1000))
    case = next(case for case in make_cases("nf4", "int8", None) if case.name == "4GiB")
    run = Run(seed=0, threads=2, decode_tokens=1, warmup_tokens=1, prompt_tokens=1, prefetch="auto", timeout_s=60)
    assert peers.measure_rates(case, tmp_path, run, Conditions(True, SLOW)).disk_bytes_per_s == 8e8


def test_runs_of_the_tables_enter_the_group_of_their_disk(groups, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(tables, "run", lambda *_, **options: told.append(options))
    monkeypatch.setattr(tables, "read_limit", lambda pack, rate: ReadLimit(pack.name, rate))
    (case,) = tables.prefill_cases()
    tables.measure(case, tmp_path, case.workload, 1, None)
    tables.measure(case, tmp_path, case.workload, 1, 800_000_000)
    assert groups == [[ReadLimit(tmp_path.name, 800_000_000)]]
    assert "launcher" not in told[0]
    assert (told[1]["launcher"], told[1]["disk_s"]) == (["launch"], SUSTAINED_S)


def called(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own ways to end
    module.main()


@pytest.mark.parametrize("module", [peers, tables])
def test_a_rate_that_cannot_be_is_refused_with_the_reason(module, monkeypatch, capsys, tmp_path):
    def refuse(path, rate):
        raise NoLimitError(f"{path} is on tmpfs")

    with pytest.raises(SystemExit):
        called(module, monkeypatch, "--disk-rate", "80%")
    assert "'80%' is not a rate; write it as 3.5GB/s" in capsys.readouterr().err
    monkeypatch.setattr(module, "read_limit", refuse)
    folder = "--work" if module is peers else "--packs"
    with pytest.raises(SystemExit):
        called(module, monkeypatch, folder, tmp_path, "--disk-rate", "0.8GB")
    assert f"--disk-rate: {tmp_path} is on tmpfs" in capsys.readouterr().err


def test_a_table_without_markers_is_told_before_it_is_measured(monkeypatch):
    with pytest.raises(SystemExit, match="no markers <!-- bench-demo-slow-disk:begin -->"):
        called(tables, monkeypatch, "demo", "--disk-rate", "0.8GB", "--markdown")


@pytest.mark.parametrize("name", ["peers", *(f"bench-{name}" for name in ("mixtral", "qwen", "prefill", "traces"))])
def test_the_document_has_a_place_for_slow_disks(name):
    text = tables.DOCUMENT.read_text()
    assert text.count(f"<!-- {name}-slow-disk:begin -->") == text.count(f"<!-- {name}-slow-disk:end -->") == 1


def test_saved_figures_go_between_the_markers_of_their_disk(monkeypatch, tmp_path, capsys):
    case = next(case for case in make_cases("nf4", "int8", None) if case.name == "2GiB")
    ours = EntryResult(case.entries[1], 1 << 30, 1 << 31, [{"step_s": [0.5], "version": "moe-offload 1"}])
    save(tmp_path / "slow.json", [CaseResult(case, [ours], None, 800_000_000)])
    document = tmp_path / "benchmarks.md"
    document.write_text(
        "<!-- peers:begin -->\nfast\n<!-- peers:end -->\n<!-- peers-slow-disk:begin -->\n<!-- peers-slow-disk:end -->\n"
    )
    monkeypatch.setattr(peers, "DOCUMENT", document)
    called(peers, monkeypatch, "--from-json", tmp_path / "slow.json", "--markdown")
    fast, slow = document.read_text().split("<!-- peers:end -->")
    assert "fast" in fast
    assert "| 2.00 |" in slow
    assert "2.00" in capsys.readouterr().out
