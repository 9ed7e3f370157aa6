"""Decoding and reading prompts beside llama.cpp and fastllm: the same shapes, bits and memory limits, in one run.

Every engine runs in a process of its own on random weights, which route almost uniformly, and on random tokens; the
engines take turns (A B A B ...), the page cache is dropped before each, and the machine given time to settle. A limit
is a control group's, which counts the page cache too and so is fair to memory maps; without root, cases with a limit
are skipped. --disk-rate holds the disk of --work to a rate, for every engine and for the reading that the bound is made
of. Neither peer is needed by the project: name the interpreters of the environments that have them.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from control_group import MemoryLimit, NoLimitError, check_limits
from disk_rate import add_disk_rate, read_limit
from peer_runs.cases import Case, make_cases
from peer_runs.conditions import Conditions
from peer_runs.document import between_markers, document, marker_name
from peer_runs.engines import EngineError, Run, child_figures, default_pythons, measure, missing_reason, settings
from peer_runs.page_cache import drop_page_cache
from peer_runs.results import CaseResult, EntryResult
from peer_runs.saved import DifferentMachinesError, load, save
from peer_runs.weights import WeightFiles, weight_bytes

from moe_offload.offload.bench.report import MachineRates

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
# A virtual machine is returning what a process has freed to its host for many seconds. Steps take up to eight times as
# long meanwhile, and an engine that loads fast would have them counted.
SETTLE_S = 20
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


def measure_rates(case: Case, pack: Path, run: Run, conditions: Conditions) -> MachineRates:
    """In a process of its own, with the disk as the engines have it."""
    token_share = case.shape.active_weights / case.shape.num_weights
    values = {
        "pack": str(pack),
        "threads": run.threads,
        "disk_s": conditions.disk_s,
        "token_bytes": int(token_share * weight_bytes(pack)),
        "prefill_tokens": case.prefill_tokens,
        "matrix_shape": [case.shape.expert_size, case.shape.hidden_size],
    }
    with conditions.rates_group() as group:
        figures = child_figures(
            "measuring rates", sys.executable, "rates_child.py", values, run.timeout_s, group.launcher
        )
    return MachineRates(**figures)


def run_once(
    case: Case, result: EntryResult, weights: Path, python: str, run: Run, conditions: Conditions
) -> dict[str, Any]:
    """One process of one engine, in a group of its own where that is possible."""
    values = settings(result.entry, case, weights, run)
    drop_page_cache(sorted(weights.iterdir()) if weights.is_dir() else [weights])
    time.sleep(SETTLE_S)
    with busy_processes(case.busy_processes):
        limit_bytes = None if result.entry.unlimited else case.limit_bytes
        with conditions.engine_group(limit_bytes) as group:
            figures = measure(result.entry, python, values, run.timeout_s, group.launcher)
            return figures | {"peak_bytes": group.peak_bytes, "num_reclaims": group.num_reclaims}


def run_case(
    case: Case, files: WeightFiles, pythons: dict[str, str], run: Run, num_rounds: int, conditions: Conditions
) -> CaseResult:
    """All rounds of a case; an engine that fails is not tried again."""
    paths = {entry: files.path(entry, case) for entry in case.entries}
    results = [EntryResult(entry, weight_bytes(paths[entry]), case.shape.num_weights) for entry in case.entries]
    pack = next((path for path in paths.values() if path.is_dir()), None)
    rates = measure_rates(case, pack, run, conditions) if pack else None
    result = CaseResult(case, results, rates, conditions.reading and conditions.reading.bytes_per_s)
    for round_idx in range(num_rounds):
        for one in results:
            if one.failure:
                one.rounds.append(None)
                continue
            this_run = dataclasses.replace(run, seed=run.seed + round_idx)
            try:
                figures = run_once(case, one, paths[one.entry], pythons[one.entry.engine], this_run, conditions)
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
            result.rates = result.rates.best(measure_rates(case, pack, run, conditions))
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


def limits_memory() -> bool:
    """Whether memory can be limited here; says why not."""
    try:
        check_limits([MemoryLimit(None)])
    except NoLimitError as error:
        print(f"cases with a limit are skipped: {error}")
        return False
    return True


def run_cases(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[CaseResult]:
    """All cases that are asked for and can run here."""
    cases = make_cases(arguments.format, "int8", three_bit_format())
    if unknown := set(arguments.only or ()) - {case.name for case in cases}:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(case.name for case in cases)}")
    conditions = Conditions(limits_memory())
    pythons = default_pythons()
    pythons["llama.cpp"] = arguments.llama_python or pythons["llama.cpp"]
    pythons["fastllm"] = arguments.ftllm_python or pythons["fastllm"]
    cases = [case for case in cases if not arguments.only or case.name in arguments.only]
    cases = select_cases(cases, pythons, conditions.limits_memory)
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
    results: list[CaseResult] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: children and groups go too
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-offload-peers-")))
        work.mkdir(parents=True, exist_ok=True)
        if arguments.disk_rate is not None:
            try:
                conditions = dataclasses.replace(conditions, reading=read_limit(work, arguments.disk_rate))
            except NoLimitError as error:
                parser.error(f"--disk-rate: {error}")
        for case in cases:
            results.append(run_case(case, WeightFiles(work), pythons, run, arguments.rounds, conditions))
            if arguments.json:  # after every case, so that an interrupted run keeps what it has
                save(arguments.json, results)
    return results


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
    parser.add_argument(
        "--from-json", type=Path, nargs="+", metavar="FILE", help="run nothing, show these figures; later files win"
    )
    parser.add_argument("--markdown", action="store_true", help="put the tables into docs/benchmarks.md")
    add_disk_rate(parser)
    arguments = parser.parse_args()
    for name in ("rounds", "tokens", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    try:
        results = load(arguments.from_json) if arguments.from_json else run_cases(arguments, parser)
    except DifferentMachinesError as error:
        parser.error(str(error))
    if not results:
        parser.error("none of the cases can run here")
    text = document(results)
    print(text)
    if arguments.markdown:
        DOCUMENT.write_text(between_markers(DOCUMENT.read_text(), text, marker_name(results)))


if __name__ == "__main__":
    main()
