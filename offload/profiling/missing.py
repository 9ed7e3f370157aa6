"""What a report lacks, said in words instead of zeros."""

from collections.abc import Iterator
from dataclasses import replace

from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import Missing

_NO_TIMES = "the trace has no times of steps and layers"
_NO_OUTCOMES = "the trace does not tell what each expert's request found (outcome)"
_NO_DECODE = "nothing was decoded"


def missing(report: ProfileReport) -> ProfileReport:
    """The report, with a reason for every section and figure that it could not have."""
    return replace(report, missing=tuple(_missing(report)))


def _missing(report: ProfileReport) -> Iterator[Missing]:
    header, has_outcomes = report.header, report.steps.hits is not None
    has_decode, has_times = report.run.decode_steps > 0, report.steps.wall_s is not None
    if header.tokens_per_s is None:
        yield Missing("tokens_per_s", _NO_DECODE if has_times else _NO_TIMES)
    if header.time_to_first_token_s is None:
        yield Missing("time_to_first_token_s", _NO_TIMES if not has_times else "the trace has no prompt")
    if header.hit_ratio_decode is None:
        yield Missing("hit_ratio_decode", _NO_DECODE if has_outcomes else _NO_OUTCOMES)
    if header.hit_ratio_prefill is None:
        yield Missing("hit_ratio_prefill", "the trace has no prompt" if has_outcomes else _NO_OUTCOMES)
    if header.disk_bytes_per_token is None:
        reason = "the trace has neither transfers nor outcomes with the size of experts"
        yield Missing("disk_bytes_per_token", reason if has_decode else _NO_DECODE)
    if header.pcie_bytes_per_token is None:
        yield Missing("pcie_bytes_per_token", _no_link(report))
    if header.bound is None:
        no_rates = "no rates were measured or given (--disk, --memory, --pcie)"
        yield Missing("bound", _NO_TIMES if not has_times else no_rates if has_decode else _NO_DECODE)
    if report.timing is None:
        yield Missing("timing", _NO_TIMES)
    if report.link is None:
        yield Missing("link", _no_link(report))
    if report.levers is None:
        yield Missing("levers", "to predict times takes times: " + _NO_TIMES if not has_times else _NO_DECODE)
    if report.prediction is None:
        off = report.run.is_prefetch_off
        yield Missing(
            "prediction", "nothing was prefetched (--prefetch off)" if off else "the trace has no predictions"
        )
    if report.usage.residency is None:
        yield Missing("residency", _NO_OUTCOMES if not has_outcomes else "the trace does not tell the number of slots")


def _no_link(report: ProfileReport) -> str:
    if report.run.device is not None and not report.run.is_cuda:
        return "the experts are computed on the CPU"
    return "the trace does not tell of copies to a GPU"
