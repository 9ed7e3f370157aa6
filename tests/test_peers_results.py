"""The side-by-side benchmark without its peers: what is run, and what is made of the figures."""

import sys

import pytest
from peer_runs import engines
from peer_runs.cases import Entry, make_cases
from peer_runs.document import between_markers, document, marker_name
from peer_runs.engines import EngineError, Run, measure, missing_reason, settings
from peer_runs.results import CaseResult, EntryResult, decode_table, prefill_table
from peer_runs.saved import DifferentMachinesError, load, save

from moe_offload.offload.bench.report import MachineRates

RUN = Run(seed=0, threads=2, decode_tokens=4, warmup_tokens=1, prompt_tokens=2, prefetch="auto", timeout_s=60)


@pytest.fixture
def case():
    return next(case for case in make_cases("nf4", "int8", None) if case.name == "4GiB")


def result(entry, case, step_s, **figures):
    rounds = [None if seconds is None else {"step_s": [seconds] * 4, **figures} for seconds in step_s]
    return EntryResult(entry, file_bytes=case.shape.num_weights // 2, num_weights=case.shape.num_weights, rounds=rounds)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_medians_and_ratios_within_a_round(case):
    theirs, ours = case.entries[:2]
    both = CaseResult(
        case,
        [
            result(theirs, case, [0.5, 1.0, 4.0], read_bytes=1 << 30, peak_bytes=4 << 30),
            result(ours, case, [0.25, 0.25, 2.0], missed_bytes=1 << 29, read_bytes=1 << 30, share=0.5, hit_ratio=0.75),
        ],
        MachineRates(1 << 50, 1 << 30, True),
    )
    first, second = (cells(line) for line in decode_table([both]).splitlines()[2:])
    speed = "1.00 (0.25-2.00)"
    assert first[1:] == ["llama.cpp, mmap", "Q4_0", "4.00", "-", "-", speed, "1.00", "1024", "4096", "1.00", "100%"]
    # The ratios are 2, 4 and 2; the bound is that of what was missed.
    speed = "4.00 (0.50-4.00)"
    assert second[1:] == ["moe-offload", "nf4", "4.00", "50%", "75%", speed, "2.00", "1024", "-", "2.00", "200%"]


def test_memory_bounds_what_misses_nothing(case):
    ours = result(case.entries[1], case, [1.0], missed_bytes=0)
    active_bytes = case.shape.active_weights / 2
    both = CaseResult(case, [ours], MachineRates(2 * active_bytes, 1.0, True))
    assert both.bound(ours) == pytest.approx(2.0, rel=1e-6)


def test_a_failed_engine_leaves_the_others(case):
    theirs, ours = case.entries[:2]
    failed = result(theirs, case, [None, None])
    failed.failure = "was killed"
    table = decode_table([CaseResult(case, [failed, result(ours, case, [1.0, 1.0])], None)])
    first, second = (cells(line) for line in table.splitlines()[2:])
    assert first[6] == "failed: was killed"
    assert (second[6], second[7]) == ("1.00 (1.00-1.00)", "-")


def test_prefill_is_shown_where_it_was_measured(case):
    entries = [
        result(case.entries[0], case, [1.0], prefill_s=128.0),
        result(case.entries[1], case, [1.0], prefill_s=16.0, prefill_read_bytes=3 << 20),
    ]
    # The disk would take 6 s for what was read, the products 8 s.
    operations = 2 * 512 * (case.shape.active_weights - case.shape.vocab_size * case.shape.hidden_size)
    rates = MachineRates(1e9, 1 << 19, True, operations / 8)
    line = prefill_table([CaseResult(case, entries, rates)]).splitlines()[-1]
    assert cells(line)[3:] == ["512", "32.00", "8.00", "3", "64.0", "50%"]
    without = next(case for case in make_cases("nf4", "int8", None) if case.name == "2GiB")
    assert prefill_table([CaseResult(without, [result(without.entries[0], without, [1.0])], None)]) == ""


def test_tables_replace_what_is_between_the_markers():
    text = "before\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nafter\n"
    assert between_markers(text, "new", "peers") == "before\n<!-- peers:begin -->\nnew\n<!-- peers:end -->\nafter\n"
    with pytest.raises(ValueError, match="no pair of markers"):
        between_markers("nothing", "new", "peers")


def measured(case, step_s, disk_limit=None):
    ours = result(case.entries[1], case, [step_s], version="moe-offload 1", missed_bytes=0)
    return CaseResult(case, [ours], MachineRates(4e10, 8.1e8, True), disk_limit)


def test_cases_that_were_measured_apart_stand_in_one_table(case, tmp_path):
    other = next(case for case in make_cases("nf4", "int8", None) if case.name == "resident")
    save(tmp_path / "first.json", [measured(case, 0.5), measured(other, 0.25)])
    save(tmp_path / "second.json", [measured(case, 0.125)])
    results = load([tmp_path / "first.json", tmp_path / "second.json"])
    assert results == [measured(case, 0.125), measured(other, 0.25)]
    assert marker_name(results) == "peers"
    text = document(results)
    assert "\n- Mixtral-8x7B, 8 layers, limit 4 GiB: 1 round of 4 tokens, disk read 0.81 GB/s, memory read 40.0" in text
    assert decode_table(results) in text


def test_a_limited_disk_has_markers_of_its_own(case, tmp_path):
    slow = measured(case, 0.5, disk_limit=800_000_000)
    save(tmp_path / "slow.json", [slow])
    assert load([tmp_path / "slow.json"]) == [slow]
    assert marker_name([slow]) == "peers-slow-disk"
    assert "disk read 0.81 GB/s under a limit of 0.8, memory" in document([slow])
    other = next(case for case in make_cases("nf4", "int8", None) if case.name == "2GiB")
    save(tmp_path / "fast.json", [measured(other, 0.5)])
    with pytest.raises(DifferentMachinesError, match=r"different rates: 0\.8 GB/s, no limit"):
        load([tmp_path / "slow.json", tmp_path / "fast.json"])


def test_three_bits_are_compared_with_three_bits():
    cases = {case.name: case for case in make_cases("nf4", "int8", "int3")}
    assert [entry.weights for entry in cases["2GiB"].entries] == ["Q4_0", "nf4", "Q3_K", "int3"]
    assert cases["busy"].busy_processes == 1
    assert all(len(set(case.entries)) == len(case.entries) for case in cases.values())


def test_settings_tell_the_limit_to_us_and_not_to_peers(case, tmp_path):
    theirs, ours = (settings(entry, case, tmp_path, RUN) for entry in case.entries[:2])
    assert ours["limit_bytes"] == case.limit_bytes
    assert not theirs["repack"]
    assert "limit_bytes" not in theirs
    assert settings(Entry("llama.cpp", "Q4_0", threads=1), case, tmp_path, RUN)["threads"] == 1


def test_a_missing_peer_is_told_with_the_way_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(engines._MODULES, "fastllm", "no_such_module")
    assert "pip install" in missing_reason("fastllm", sys.executable)
    assert "does not run" in missing_reason("llama.cpp", str(tmp_path / "python"))
    assert missing_reason("moe-offload", sys.executable) is None


def test_the_child_of_an_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "HERE", tmp_path)
    script = tmp_path / "llama_child.py"
    script.write_text("import sys; print('noise'); print('{\"step_s\": [1.0]}'); print(sys.argv[1][:0])")
    entry = Entry("llama.cpp", "Q4_0")
    assert measure(entry, sys.executable, {}, 60) == {"step_s": [1.0]}
    script.write_text("import sys; print('why'); sys.exit(3)")
    with pytest.raises(EngineError, match=r"ended with 3\nwhy"):
        measure(entry, sys.executable, {}, 60)
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EngineError, match="killed, most likely for memory"):
        measure(entry, sys.executable, {}, 60)
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(EngineError, match="took more than"):
        measure(entry, sys.executable, {}, 0.2)
