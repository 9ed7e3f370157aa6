"""Runs small synthetic models and asks whether ``moe-offload plan`` would have foretold their speed.

    python benchmarks/plan_check.py [--repeat 3] [--packs FOLDER] [--markdown]

Each case is planned from its shape, with the rates that were measured beside its runs, and measured by ``moe-offload
bench``; the median of the runs is held against the band. Measurements go to benchmarks/plan_check.json, which a test
holds the current planner to; --again only holds them, and measures nothing. --markdown puts the table into
docs/planning.md. Takes about ten minutes, and 2 GB of disk at a time.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_offload.offload.bench import RunFigures, Setting, Shape, Workload, run, synthetic_pack
from moe_offload.offload.forecast.band import Band
from moe_offload.offload.forecast.candidate import candidate
from moe_offload.offload.forecast.decode_time import decode_time
from moe_offload.offload.forecast.hit_ratio import EVEN, hit_curve
from moe_offload.offload.forecast.model_shape import shape_of
from moe_offload.offload.forecast.outcome import cpu_machine

DOCUMENT = Path(__file__).parent.parent / "docs" / "planning.md"
MEASURED = Path(__file__).with_suffix(".json")
BEGIN, END = "<!-- plan-check:begin -->", "<!-- plan-check:end -->"
_WORDS = 512


@dataclass(frozen=True)
class Case:
    """One configuration; ``routing`` as bench has it, ``statistics`` as plan has it."""

    shape: Shape
    setting: Setting
    routing: str = "model"
    statistics: str = EVEN
    new_tokens: int = 64

    @property
    def workload(self) -> Workload:
        """What is run."""
        return Workload(new_tokens=self.new_tokens, warmup_tokens=24, routing=self.routing)

    @property
    def name(self) -> str:
        """For people."""
        prefetch = "" if self.setting.prefetch == "auto" else f", prefetch {self.setting.prefetch}"
        routing = "" if self.routing == "model" else f", {self.routing}"
        return f"{self.shape.name}, {self.setting.resident:.0%}{prefetch}{routing}"


def _mixtral(spec: str) -> Shape:
    return Shape("mixtral-8x7b", layers=2, vocab=_WORDS, format=spec, dense_format="nf4")


CASES = (
    Case(_mixtral("nf4"), Setting(resident=0.25)),
    Case(_mixtral("nf4"), Setting(resident=0.5)),
    Case(_mixtral("nf4"), Setting(resident=0.5, prefetch="off")),
    Case(_mixtral("nf4"), Setting(resident=1.0)),
    Case(_mixtral("nf4"), Setting(resident=0.5), "synthetic:mixtral", "mixtral-8x7b"),
    Case(_mixtral("nf3"), Setting(resident=0.5)),
    Case(_mixtral("mixed:3.5"), Setting(resident=0.5)),
    Case(Shape("gpt-oss-20b", layers=3, vocab=_WORDS, dense_format="int8"), Setting(resident=0.5)),
    Case(Shape("qwen3-30b-a3b", layers=6, vocab=_WORDS, format="nf4", dense_format="nf4"), Setting(resident=0.5)),
    Case(Shape("qwen3-30b-a3b", layers=6, vocab=_WORDS, format="nf4", dense_format="nf4"), Setting(resident=1.0)),
    Case(Shape("olmoe-1b-7b", layers=4, vocab=_WORDS, format="int8"), Setting(resident=0.25)),
    Case(Shape("deepseek-v2-lite", layers=4, vocab=_WORDS, format="int4", dense_format="nf4"), Setting(resident=0.5)),
)


@dataclass(frozen=True)
class Landing:
    """A case's measured speed and hits beside what was foretold; ``tokens_per_s`` is the runs' median."""

    name: str
    tokens_per_s: float
    band: Band
    hit_ratio: float
    hits: Band
    ram_bytes: int
    bound_by: str = field(default="")

    @property
    def inside(self) -> bool:
        """Whether the speed landed in the band."""
        return self.band.contains(self.tokens_per_s)


def landing(case: Case, measured: dict[str, Any]) -> Landing:
    """Plan the case from its shape, for the budget and the rates of its runs, and compare."""
    runs = [RunFigures.from_dict(figures) for figures in measured["runs"]]
    rates = runs[0].rates
    for figures in runs[1:]:
        rates = rates.best(figures.rates)
    machine = cpu_machine(runs[0].ram_bytes, rates.memory_bytes_per_s, rates.disk_bytes_per_s)
    item = candidate(shape_of(case.shape.config()), machine, case.shape.expert_format, case.shape.dense_format)
    plan = item.plan(machine, context_tokens=case.workload.context_tokens)
    load = item.token_load(plan, context_tokens=case.workload.context_tokens - case.new_tokens // 2)
    first = item.layers[0]
    curve = hit_curve(
        case.statistics, model_type=item.config.model_type, num_experts=first.num_experts, top_k=item.top_k
    )
    hits = load.hit_ratio(curve)
    time = decode_time(load, machine, hits, hits)
    ordered = sorted(runs, key=lambda figures: figures.tokens_per_s)
    middle = ordered[len(ordered) // 2]
    return Landing(
        case.name,
        middle.tokens_per_s,
        time.tokens_per_s,
        1 - middle.bytes_missed_per_token / middle.expert_bytes_per_token,
        hits,
        runs[0].ram_bytes,
        time.bound_by,
    )


def measure(cases: Sequence[Case], packs: Path, repeat: int) -> Iterator[dict[str, Any]]:
    """Every case, its pack made for it and removed when the next case needs another."""
    for index, case in enumerate(cases):
        folder = synthetic_pack(case.shape, packs / case.shape.name)
        report = run(folder, [case.setting], case.workload, name=case.shape.name, repeat=repeat)
        (row,) = report.rows
        yield {
            "case": {"shape": _plain(case.shape), "setting": asdict(case.setting), "routing": case.routing},
            "machine": report.machine,
            "runs": [figures.to_dict() for figures in row.runs],
        }
        if index + 1 == len(cases) or cases[index + 1].shape != case.shape:
            shutil.rmtree(folder)


def _plain(shape: Shape) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(shape).items()}


def recorded() -> list[tuple[Case, dict[str, Any]]]:
    """The committed measurements of the cases that are still cases."""
    by_case = {json.dumps(entry["case"], sort_keys=True): entry for entry in json.loads(MEASURED.read_text())["runs"]}
    found = []
    for case in CASES:
        key = {"shape": _plain(case.shape), "setting": asdict(case.setting), "routing": case.routing}
        if (entry := by_case.get(json.dumps(key, sort_keys=True))) is not None:
            found.append((case, entry))
    return found


def table(landings: Sequence[Landing], machine: dict[str, Any]) -> str:
    """As Markdown."""
    inside = sum(item.inside for item in landings)
    lines = [
        f"{inside} of {len(landings)} in the band; {machine['threads']} threads, kernels {machine['kernels']}:",
        "",
        "| configuration, share of the experts | RAM, MiB | tok/s | foretold | | hits | foretold | by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in landings:
        band, hits = item.band, item.hits
        lines.append(
            f"| {item.name} | {item.ram_bytes >> 20} | {item.tokens_per_s:.1f} | {band.low:.1f}-{band.high:.1f} | "
            f"{'in' if item.inside else '**out**'} | {item.hit_ratio:.0%} | {hits.low:.0%}-{hits.high:.0%} | "
            f"{item.bound_by} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, or take what was measured, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--packs", type=Path, help="folder for the packs")
    parser.add_argument("--again", action="store_true", help="only compare what is recorded with the planner of now")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/planning.md")
    arguments = parser.parse_args()
    if not arguments.again:
        entries = []
        with tempfile.TemporaryDirectory(dir=arguments.packs) as packs:
            for case, entry in zip(CASES, measure(CASES, Path(packs), arguments.repeat), strict=True):
                entries.append(entry)
                item = landing(case, entry)
                print(f"{item.name}: {item.tokens_per_s:.2f} of {item.band.low:.2f}-{item.band.high:.2f}", flush=True)
        MEASURED.write_text(json.dumps({"runs": entries}, indent=1) + "\n")
    pairs = recorded()
    text = table([landing(case, entry) for case, entry in pairs], pairs[0][1]["machine"])
    print(text)
    if arguments.markdown:
        page = DOCUMENT.read_text()
        begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        DOCUMENT.write_text(f"{page[:begin]}\n{text}\n{page[end:]}")
    if "**out**" in text:
        print("outside the band: see above", file=sys.stderr)


if __name__ == "__main__":
    main()
