"""The settings and the machine of the run."""

from collections.abc import Iterator

from moe_offload.offload.profiling.charts.table import table
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.numbers import UNKNOWN, count, duration, percent, size, three_digits
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.run_facts import RunFacts


def settings_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """Three tables: what was set, what went through, on which machine."""
    run = report.run
    figures = (
        Figure("Settings", table(["", ""], _known(_settings(run))), "What the run was asked to do.", half=True),
        Figure(
            "Machine",
            table(["", ""], _known(_machine(run))),
            "Rates are what the bound and the levers are computed from.",
            half=True,
        ),
        *_sequences(run),
    )
    return Section("settings", "Settings and machine", "", figures, missing)


def _known(rows: Iterator[list[str]]) -> list[list[str]]:
    return [row for row in rows if row[1] != UNKNOWN]


def _settings(run: RunFacts) -> Iterator[list[str]]:
    yield ["model", run.model]
    experts, slots = _range(run.num_experts), _range(run.num_slots)
    yield ["experts", f"{len(run.num_experts)} layers of {experts}, {run.top_k} a token"]
    yield ["slots a layer", slots]
    yield [
        "bytes of an expert",
        UNKNOWN if run.expert_bytes is None else f"up to {size(max(run.expert_bytes, default=0))}",
    ]
    for name, value in (
        ("format", run.format),
        ("dense format", run.dense_format),
        ("device", run.device),
        ("policy", run.policy),
        ("prefetch", run.prefetch),
        ("miss path", run.miss_path),
    ):
        yield [name, value or UNKNOWN]
    yield ["RAM budget", size(run.ram_bytes)]
    yield ["VRAM budget", size(run.vram_bytes)]
    yield ["context", UNKNOWN if run.context_tokens is None else f"{count(run.context_tokens)} tokens"]
    yield ["tokens", f"{count(run.prefill_tokens)} prefilled, {count(run.decode_tokens)} decoded"]
    if run.trace_file:
        yield ["trace", run.trace_file]
    yield ["recorded", run.recorded_at or UNKNOWN]


def _machine(run: RunFacts) -> Iterator[list[str]]:
    machine, rates = run.machine, run.rates
    if machine is not None:
        yield ["processor", machine.cpu]
        yield ["cores, threads", f"{machine.cores}, {machine.threads}"]
        yield ["kernels", machine.kernels]
        yield ["GPU", machine.gpu or "none"]
        yield ["memory", size(machine.memory_bytes)]
    yield ["memory rate", _rate(rates.memory_bytes_per_s)]
    yield [
        "disk rate",
        _rate(rates.disk_bytes_per_s)
        + {None: "", True: ", past the page cache", False: ", through the page cache"}[rates.direct],
    ]
    yield ["PCIe rate", _rate(rates.pcie_bytes_per_s)]
    for name, version in sorted(run.versions.items()):
        yield [name, version]


def _sequences(run: RunFacts) -> Iterator[Figure]:
    if not run.sequences:
        return
    rows = [
        [
            each.name,
            count(each.prompt_tokens),
            count(each.decode_tokens),
            duration(each.time_to_first_token_s),
            three_digits(each.tokens_per_s),
            percent(each.hit_ratio),
        ]
        for each in run.sequences[:MOST_SEQUENCES]
    ]
    left = len(run.sequences) - len(rows)
    yield Figure(
        "Prompts",
        table(["prompt", "prompt tokens", "decoded", "first token", "tok/s", "hit ratio"], rows),
        "A prompt that decodes slower or hits less than the others is on another subject than the cache was warmed by.",
        note=f"{left} more are in the JSON." if left else "",
    )


MOST_SEQUENCES = 12


def _rate(bytes_per_s: float | None) -> str:
    return UNKNOWN if bytes_per_s is None else f"{size(bytes_per_s)}/s"


def _range(numbers: tuple[int, ...] | None) -> str:
    if not numbers:
        return UNKNOWN
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
