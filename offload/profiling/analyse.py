"""From a trace to a `ProfileReport`."""

from typing import Literal

from moe_offload.cache.trace import RoutingTrace
from moe_offload.errors import ReportError
from moe_offload.offload.profiling.coactivation import coactivation
from moe_offload.offload.profiling.curves import curves
from moe_offload.offload.profiling.facts import run_facts
from moe_offload.offload.profiling.header import header
from moe_offload.offload.profiling.layer_figures import layer_figures
from moe_offload.offload.profiling.levers import levers
from moe_offload.offload.profiling.link import link
from moe_offload.offload.profiling.load import expert_load
from moe_offload.offload.profiling.missing import missing
from moe_offload.offload.profiling.prediction import prediction
from moe_offload.offload.profiling.repetition import PUBLISHED, repetition
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.requests import DECODE, num_experts, phases, requests_of, steps_of
from moe_offload.offload.profiling.run_facts import Rates
from moe_offload.offload.profiling.sections import ExpertStatistics
from moe_offload.offload.profiling.step_series import step_series
from moe_offload.offload.profiling.timing import timing
from moe_offload.offload.profiling.usage import expert_uses, usage


def analyse(
    trace: RoutingTrace,
    *,
    source: Literal["run", "trace"] = "trace",
    trace_file: str | None = None,
    rates: Rates | None = None,
) -> ProfileReport:
    """All figures of a trace; `ReportError` where there is nothing to analyse.

    ``rates`` come before those in the trace's meta. A few times the trace's size of memory is used.
    """
    if not trace.num_layers or not (trace.experts >= 0).any():
        raise ReportError("the trace is empty: no token was given to any expert; record one of a run that decodes")
    sizes = num_experts(trace)
    steps = steps_of(trace)
    requests = requests_of(trace, steps)
    decoded = phases(trace) == DECODE
    shown = trace.experts[decoded] if decoded.any() else trace.experts
    facts = run_facts(trace, steps, requests, source=source, trace_file=trace_file, rates=rates)
    time_split = timing(trace, steps)
    first_figures = header(trace, facts, steps, requests, time_split)
    hit_curves = curves(trace, facts, requests)
    foreseen = prediction(trace, steps, requests)
    statistics = ExpertStatistics(
        load=expert_load(expert_uses(shown, sizes)),
        repetition=repetition(trace, sizes),
        published=PUBLISHED,
        coactivation=coactivation(shown, sizes),
    )
    bits = trace.meta.get("expert_bits")
    advice = levers(
        facts, first_figures, time_split, hit_curves, foreseen, statistics, bits if isinstance(bits, float) else None
    )
    report = ProfileReport(
        run=facts,
        header=first_figures,
        levers=advice,
        usage=usage(trace, steps, requests),
        layers=layer_figures(trace, steps, requests),
        steps=step_series(trace, steps, requests),
        timing=time_split,
        link=link(trace, steps, facts.rates),
        curves=hit_curves,
        prediction=foreseen,
        experts=statistics,
        missing=(),
    )
    return missing(report)
