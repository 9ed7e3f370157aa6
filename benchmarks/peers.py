"""Decoding and reading prompts beside llama.cpp and fastllm: the same shapes, bits and memory limits, in one run.

Every engine runs in a process of its own on random weights, which route almost uniformly, and on random tokens; the
engines take turns (A B A B ...), the page cache is dropped before each. A limit is a control group's, which counts the
page cache too and so is fair to memory maps; without root, cases with a limit are skipped. Neither peer is needed by
the project: name the interpreters of the environments that have them.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer_runs.cases import Case, make_cases
from peer_runs.engines import EngineError, Run, default_pythons, measure, missing_reason, settings
from peer_runs.memory_limit import NoLimitError, check_limits, drop_page_cache, memory_group
from peer_runs.results import (
    CaseResult,
    EntryResult,
    between_markers,
    decode_table,
    prefill_table,
)
from peer_runs.weights import WeightFiles, weight_bytes

if TYPE_CHECKING:
    from moe_offload.offload.bench.report import MachineRates

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BUSY_LOAD = 0.3  # more than this beside us, and figures mean little


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure_rates(case: Case, pack: Path) -> "MachineRates":
    """Of the disk, experts of the pack by the project's reader; of the memory, by its kernels; of matrix products."""
    from moe_offload.offload.bench.rates import expert_read_rate, kernel_read_rate, matrix_rate
    from moe_offload.offload.bench.report import MachineRates
    from moe_offload.offload.pack.manifest import read_manifest

    disk, direct = expert_read_rate(read_manifest(pack), pack, seed=0)
    token_share = case.shape.active_weights / case.shape.num_weights
    memory = kernel_read_rate(int(token_share * weight_bytes(pack)))
    shape = (case.shape.expert_size, case.shape.hidden_size)
    matrix = matrix_rate(case.prefill_tokens, shape) if case.prefill_tokens else None
    return MachineRates(memory.bytes_per_s, disk.bytes_per_s, direct, matrix)


def run_once(case: Case, result: EntryResult, weights: Path, python: str, run: Run, limits: bool) -> dict[str, Any]:
    """One process of one engine, in a group of its own where that is possible."""
    values = settings(result.entry, case, weights, run)
    drop_page_cache(sorted(weights.iterdir()) if weights.is_dir() else [weights])
    with busy_processes(case.busy_processes):
        if not limits:
            return measure(result.entry, python, values, run.timeout_s)
        limit_bytes = None if result.entry.unlimited else case.limit_bytes
        with memory_group(limit_bytes) as group:
            figures = measure(result.entry, python, values, run.timeout_s, group.enter)
            return figures | {"peak_bytes": group.peak_bytes, "num_reclaims": group.num_reclaims}


def run_case(
    case: Case, files: WeightFiles, pythons: dict[str, str], run: Run, num_rounds: int, limits: bool
) -> CaseResult:
    """All rounds of a case; an engine that fails is not tried again."""
    paths = {entry: files.path(entry, case) for entry in case.entries}
    results = [EntryResult(entry, weight_bytes(paths[entry]), case.shape.num_weights) for entry in case.entries]
    pack = next((path for path in paths.values() if path.is_dir()), None)
    result = CaseResult(case, results, measure_rates(case, pack) if pack else None)
    for round_idx in range(num_rounds):
        for one in results:
            if one.failure:
                one.rounds.append(None)
                continue
            this_run = dataclasses.replace(run, seed=run.seed + round_idx)
            try:
                figures = run_once(case, one, paths[one.entry], pythons[one.entry.engine], this_run, limits)
            except EngineError as error:
                print(error, flush=True)
                one.failure = str(error).splitlines()[0]
                one.rounds.append(None)
                continue
            one.rounds.append(figures)
            print(
                f"{case.name}, round {round_idx + 1}, {one.entry.label}, {one.entry.weights}: "
                f"{one.tokens_per_s()[-1]:.2f} tok/s, load average {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        if pack and result.rates:
            result.rates = result.rates.best(measure_rates(case, pack))
    return result


def select_cases(cases: list[Case], pythons: dict[str, str], limits: bool) -> list[Case]:
    """The cases and entries that can run here; says why others cannot."""
    reasons = {name: missing_reason(name, python) for name, python in pythons.items()}  # type: ignore[arg-type]
    for reason in filter(None, reasons.values()):
        print(reason)
    selected = []
    for case in cases:
        entries = tuple(entry for entry in case.entries if reasons[entry.engine] is None)
        if entries and (limits or case.limit_bytes is None):
            selected.append(dataclasses.replace(case, entries=entries))
    return selected


def three_bit_format() -> str | None:
    """This project's format of about three bits, where it has one."""
    from moe_offload.quant import format_names, get_format

    found = [name for name in format_names() if 3 <= get_format(name).bits_per_weight() < 4]
    return found[0] if found else None


def document(results: list[CaseResult], num_rounds: int) -> str:
    """The text between the markers."""
    from moe_offload.quant import backend_name

    versions = {one["version"] for case in results for entry in case.entries for one in entry.rounds if one}
    rates = [case.rates for case in results if case.rates]
    lines = [f"{os.cpu_count()} cores, kernels `{backend_name()}`; {'; '.join(sorted(versions))}; {num_rounds} rounds."]
    if rates:
        disk, memory = (
            max(getattr(rate, name) for rate in rates) / 1e9 for name in ("disk_bytes_per_s", "memory_bytes_per_s")
        )
        lines[0] += f" Disk read {disk:.2f} GB/s, memory read {memory:.1f} GB/s."
    lines += ["", decode_table(results)]
    if prefill := prefill_table(results):
        lines += ["", prefill]
    return "\n".join(["", *lines, ""])


def as_json(results: list[CaseResult]) -> list[dict[str, Any]]:
    """Everything that was measured."""
    return [
        {
            "case": dataclasses.asdict(result.case),
            "rates": result.rates and dataclasses.asdict(result.rates),
            "entries": [dataclasses.asdict(one) | {"bound": result.bound(one)} for one in result.entries],
        }
        for result in results
    ]


def main() -> None:
    """Print the tables; --markdown puts them into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--ftllm-python", help="an interpreter that has ftllm")
    parser.add_argument("--work", type=Path, help="where files of weights are kept (about 25 GB); default: temporary")
    parser.add_argument("--only", action="append", metavar="CASE", help="a case to run; may be repeated")
    parser.add_argument("--format", default="nf4", help="the pack format beside Q4_0")
    parser.add_argument("--rounds", type=int, default=3, help="how often every engine has its turn")
    parser.add_argument("--tokens", type=int, default=24, help="decode steps to time")
    parser.add_argument("--warmup", type=int, default=16, help="decode steps before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every engine")
    parser.add_argument("--prefetch", default="auto", help="of moe-offload: off, auto or a number of layers")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one process may take")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    for name in ("rounds", "tokens", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be 1 or more")

    cases = make_cases(arguments.format, "int8", three_bit_format())
    if unknown := set(arguments.only or ()) - {case.name for case in cases}:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(case.name for case in cases)}")
    limits = True
    try:
        check_limits()
    except NoLimitError as error:
        limits = False
        print(f"cases with a limit are skipped: {error}")
    pythons = default_pythons()
    pythons["llama.cpp"] = arguments.llama_python or pythons["llama.cpp"]
    pythons["fastllm"] = arguments.ftllm_python or pythons["fastllm"]
    cases = select_cases([case for case in cases if not arguments.only or case.name in arguments.only], pythons, limits)
    print(f"load average {os.getloadavg()[0]:.2f}")
    if os.getloadavg()[0] > BUSY_LOAD:
        print("warning: the machine is busy, these figures are not to be published")
    run = Run(
        seed=0,
        threads=arguments.threads,
        decode_tokens=arguments.tokens,
        warmup_tokens=arguments.warmup,
        prompt_tokens=16,
        prefetch=arguments.prefetch,
        timeout_s=arguments.timeout,
    )
    results = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: children and groups go too
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-offload-peers-")))
        work.mkdir(parents=True, exist_ok=True)
        for case in cases:
            results.append(run_case(case, WeightFiles(work), pythons, run, arguments.rounds, limits))
            if arguments.json:  # after every case, so that an interrupted run keeps what it has
                arguments.json.write_text(json.dumps(as_json(results), indent=1))
    text = document(results, arguments.rounds)
    print(text)
    if arguments.markdown:
        DOCUMENT.write_text(between_markers(DOCUMENT.read_text(), text))


if __name__ == "__main__":
    main()
