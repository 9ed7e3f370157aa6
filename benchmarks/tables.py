"""The tables of docs/benchmarks.md that ``moe-offload bench`` makes: every set of shapes and budgets that stands there.

Prints Markdown; --markdown puts each table between its markers in the document. Packs are written where --packs says,
used again if they are there, and else removed after their set. The set of the whole Mixtral-8x7B takes 25 GB of disk.
With --disk-rate every run, the measuring of the disk's rate in it too, reads the pack's disk no faster than that; those
tables have markers of their own.
"""

import argparse
import dataclasses
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from control_group import SUSTAINED_S, NoLimitError, control_group
from disk_rate import add_disk_rate, read_limit

from moe_offload.offload.bench import BenchReport, RunFigures, Setting, Shape, Workload, cross, run, synthetic_pack

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MIB, MB = 1 << 20, 10**6
# The shapes whose routing a recorded trace is played on, by the beginning of its name; few layers, all alike anyway.
TRACE_SHAPES = {
    "gpt-oss-20b": Shape("gpt-oss-20b", layers=8, dense_format="int4"),
    "gpt-oss-120b": Shape("gpt-oss-20b", layers=4, experts=128, dense_format="int4"),
    "deepseek-v2-lite": Shape("deepseek-v2-lite", layers=9, dense_format="nf4"),
    "olmoe-1b-7b": Shape("olmoe-1b-7b", layers=8, dense_format="nf4"),
}


@dataclass(frozen=True)
class Case:
    """One pack and what is compared on it; ``pack`` is its shape, or a function that says where it is."""

    title: str
    pack: Shape | Callable[[], Path]
    settings: Sequence[Setting]
    workload: Workload = field(default_factory=Workload)


def three_bit_format() -> str | None:
    """The format of three to four bits with the fewest, if there is one."""
    from moe_offload.quant import format_names, get_format

    bits = {name: get_format(name).bits_per_weight() for name in format_names()}
    low = [name for name in bits if 3 <= bits[name] < 4]
    return min(low, key=bits.__getitem__, default=None)


def demo_cases() -> list[Case]:
    """The model that `moe-offload chat` talks with."""

    def demo() -> Path:
        from moe_offload.offload.demo.build import ensure_demo

        return ensure_demo()

    return [Case("demo", demo, cross(resident=[0.25, 0.5, 1.0]))]


def mixtral_cases() -> list[Case]:
    """Eight layers of Mixtral-8x7B with all experts resident, in 4 and in 2 GiB, in four bits and in three."""
    settings = cross(resident=[1.0], ram=["4GiB", "2GiB"])
    formats = [spec for spec in ("nf4", three_bit_format()) if spec]
    return [
        Case(
            f"Mixtral-8x7B, 8 layers, {spec}", Shape("mixtral-8x7b", layers=8, format=spec, dense_format=spec), settings
        )
        for spec in formats
    ]


def qwen_cases() -> list[Case]:
    """Eight layers of Qwen3-30B-A3B with half its experts and a vocabulary in proportion, in eight bits."""
    shape = Shape("qwen3-30b-a3b", layers=8, experts=64, vocab=512, format="int8", dense_format="int8")
    return [Case("Qwen3-30B-A3B, 8 layers x 64 experts, int8", shape, cross(ram=[1200 * MB, 1400 * MB]))]


def prefill_cases() -> list[Case]:
    """A prompt of 512 tokens through eight layers of Mixtral-8x7B in 4 GiB."""
    shape = Shape("mixtral-8x7b", layers=8, dense_format="nf4")
    workload = Workload(kind="prefill", prompt_tokens=512)
    return [Case("Mixtral-8x7B, 8 layers, nf4, 512 tokens", shape, cross(ram=["4GiB"]), workload)]


def full_cases() -> list[Case]:
    """All of Mixtral-8x7B's 46.7 billion weights."""
    shape = Shape("mixtral-8x7b", dense_format="nf4")
    workload = Workload(new_tokens=48, warmup_tokens=24)
    return [Case("Mixtral-8x7B, 32 layers, nf4", shape, cross(ram=["6GiB", "12GiB", "18GiB"]), workload)]


def trace_cases(folder: Path) -> list[Case]:
    """Every trace, with half of the experts resident: LRU against the default policy, prefetch against none."""
    settings = cross(resident=[0.5], policies=["lru", "recall"], prefetch=["off", "auto"])
    cases = []
    for path in sorted(folder.glob("*.npz")):
        name = next((name for name in TRACE_SHAPES if path.stem.startswith(name)), None)
        if name is None:
            print(f"{path.name}: no shape is known for it", file=sys.stderr)
            continue
        workload = Workload(new_tokens=192, warmup_tokens=96, routing=f"trace:{path}")
        cases.append(Case(f"routing of {path.stem}", TRACE_SHAPES[name], settings, workload))
    return cases


SETS: dict[str, Callable[[], list[Case]]] = {
    "demo": demo_cases,
    "mixtral": mixtral_cases,
    "qwen": qwen_cases,
    "prefill": prefill_cases,
    "full": full_cases,
}


@contextmanager
def pack_of(case: Case, packs: Path, keep: bool) -> Iterator[Path]:
    """The case's pack, removed afterwards if it was made for it and is not to be kept."""
    if not isinstance(case.pack, Shape):
        yield case.pack()
        return
    folder = synthetic_pack(case.pack, packs / case.pack.name)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


def measure(case: Case, pack: Path, workload: Workload, repeat: int, disk_rate: int | None) -> BenchReport:
    """All runs of a case, with the pack's disk held to a rate where there is one."""
    if disk_rate is None:
        return run(pack, case.settings, workload, repeat=repeat, on_run=note)
    with control_group([read_limit(pack, disk_rate)]) as group:
        return run(
            pack, case.settings, workload, repeat=repeat, on_run=note, launcher=group.launcher, disk_s=SUSTAINED_S
        )


def note(setting: Setting, figures: RunFigures) -> None:
    """A run as it ends, on the error output."""
    print(f"  {setting}: {figures.tokens_per_s:.2f} tok/s, {figures.hit_ratio:.0%} hits", file=sys.stderr, flush=True)


def markdown(reports: Sequence[tuple[str, BenchReport]]) -> str:
    """One table for all reports of a set, the rates that each is held against in a line above its rows."""
    is_prefill = reports[0][1].workload.kind == "prefill"
    titles = ["shape", "RAM, MiB", "slots", "policy", "prefetch", "peak, MiB", "tok/s", "median", "hits"]
    titles += ["read a token, MiB", "stall", "bound, tok/s", "of bound"]
    if is_prefill:
        titles.insert(6, "first token, s")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for title, report in reports:
        lines.append(f"| *{title}: {rates(report)}* " + "| " * len(titles) + "|")
        for row in report.rows:
            best, limit = row.best, report.bound(row)
            cells = [
                title,
                f"{best.ram_bytes / MIB:.0f}",
                f"{best.resident_share:.0%}",
                row.setting.policy,
                str(row.setting.prefetch),
                "-" if best.peak_bytes is None else f"{best.peak_bytes / MIB:.0f}",
                *([f"{best.time_to_first_token_s:.2f}"] if is_prefill else []),
                f"{best.tokens_per_s:.2f}",
                f"{row.median_tokens_per_s:.2f}",
                f"{best.hit_ratio:.0%}",
                f"{best.bytes_read_per_token / MIB:.0f}",
                f"{best.stall_s / best.elapsed_s:.0%}",
                f"{limit.tokens_per_s:.2f}, {limit.by}",
                f"{report.bound_share(row):.0%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates(report: BenchReport) -> str:
    """What was measured beside the runs."""
    found = report.rates
    texts = [f"memory {found.memory_bytes_per_s / 1e9:.1f} GB/s", f"disk {found.disk_bytes_per_s / 1e9:.2f} GB/s"]
    if found.matrix_ops_per_s is not None:
        texts.append(f"matrix products {found.matrix_ops_per_s / 1e9:.0f} Gop/s")
    return ", ".join(texts)


def between_markers(text: str, name: str, table: str) -> str:
    """``text`` with the table between the markers of its set."""
    begin, end = f"<!-- bench-{name}:begin -->", f"<!-- bench-{name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{DOCUMENT} has no markers {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    """Run the sets that are asked for, each to its end before the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sets", nargs="*", metavar="SET", help=f"which of {', '.join([*SETS, 'traces'])} (default: all)"
    )
    parser.add_argument("--packs", type=Path, help="keep packs in this folder (default: made anew and removed)")
    parser.add_argument("--traces", type=Path, help="a folder of .npz traces, for the set traces")
    parser.add_argument("--repeat", type=int, default=3, help="runs of every line; the best and the median are shown")
    parser.add_argument("--tokens", type=int, help="decode so many tokens instead of each set's own number")
    parser.add_argument("--markdown", action="store_true", help=f"put the tables into {DOCUMENT.name}")
    add_disk_rate(parser)
    options = parser.parse_args()
    makers = SETS | ({"traces": lambda: trace_cases(options.traces)} if options.traces else {})
    names = options.sets or list(makers)
    if unknown := [name for name in names if name not in makers]:
        parser.error(f"no set {', '.join(unknown)}; there are {', '.join(SETS)}, and traces with --traces FOLDER")
    markers = {name: name if options.disk_rate is None else f"{name}-slow-disk" for name in names}
    if options.markdown:
        for name in names:  # told before hours of runs
            between_markers(DOCUMENT.read_text(), markers[name], "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: packs, children and groups go too
    with tempfile.TemporaryDirectory() as scratch:
        packs = options.packs or Path(scratch)
        packs.mkdir(parents=True, exist_ok=True)
        if options.disk_rate is not None:
            try:
                read_limit(packs, options.disk_rate)  # told before packs are written
            except NoLimitError as error:
                parser.error(f"--disk-rate: {error}")
        for name in names:
            reports = []
            for case in makers[name]():
                print(case.title, file=sys.stderr, flush=True)
                workload = case.workload
                if options.tokens is not None:
                    workload = dataclasses.replace(workload, new_tokens=options.tokens)
                with pack_of(case, packs, keep=options.packs is not None) as pack:
                    reports.append((case.title, measure(case, pack, workload, options.repeat, options.disk_rate)))
            table = markdown(reports)
            if options.disk_rate is not None:
                table = f"`tables.py {name} --disk-rate {options.disk_rate / 1e9:g}GB/s`:\n\n{table}"
            print(f"\n{table}\n", flush=True)
            if options.markdown:
                DOCUMENT.write_text(between_markers(DOCUMENT.read_text(), markers[name], table))


if __name__ == "__main__":
    main()
