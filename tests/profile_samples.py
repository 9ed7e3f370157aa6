"""Profile reports to draw and to read, made by code."""

import random

from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.run_facts import Machine, Rates, RunFacts, SequenceFigures
from moe_offload.offload.profiling.sections import (
    BoundFigures,
    Coactivation,
    CoactivationMap,
    CoactivationPair,
    CurvePoint,
    Curves,
    Exactness,
    ExpertLoad,
    ExpertStatistics,
    Header,
    LayerFigures,
    Lever,
    Levers,
    Missing,
    PolicyCurve,
    Prediction,
    PublishedRepetition,
    Repetition,
    Residency,
    StepSeries,
    TimeSplit,
    Timing,
    Usage,
)


def sample_report() -> ProfileReport:
    """A run of a small model with everything in it."""
    return _report(num_layers=6, experts=8, top_k=2, steps=60)


def large_sample_report() -> ProfileReport:
    """As wide as published models are: 94 layers of 128 experts."""
    return _report(num_layers=94, experts=128, top_k=8, steps=2000)


def bare_sample_report() -> ProfileReport:
    """What a trace of routing alone gives: no outcomes, no times, no predictions."""
    report = _report(num_layers=4, experts=8, top_k=2, steps=30)
    from dataclasses import replace

    unknown = dict.fromkeys(
        ("tokens_per_s", "median_step_s", "time_to_first_token_s", "hit_ratio_decode", "hit_ratio_prefill",
         "disk_bytes_per_token", "pcie_bytes_per_token", "stall_share", "bound")
    )  # fmt: skip
    layers = tuple(
        replace(layer, slots=None, hits=None, late=None, misses=None, hit_ratio=None, hit_ratio_prefill=None,
                miss_share=None, dense_s=None, router_s=None, wait_s=None, experts_s=None, starving=False)
        for layer in report.layers
    )  # fmt: skip
    times = ("wall_s", "dense_s", "router_s", "wait_s", "experts_s", "other_s")
    assert report.curves is not None
    return replace(
        report,
        run=replace(report.run, source="trace", trace_file="trace.npz", num_slots=None, expert_bytes=None,
                    policy=None, prefetch=None, format=None, machine=None, versions={}),
        header=replace(report.header, **unknown, exactness=Exactness(None, "not said by the trace")),
        levers=None,
        usage=replace(report.usage, hits=None, residency=None),
        layers=layers,
        steps=replace(report.steps, hits=None, late=None, misses=None, **dict.fromkeys(times)),
        timing=None,
        curves=replace(report.curves, today=None, measured_hit_ratio=None, measured_resident_ratio=None),
        prediction=None,
        missing=(
            Missing("timing", "the trace has no times"),
            Missing("hits", "the trace has no outcomes"),
            Missing("prediction", "the trace has no predictions"),
        ),
    )  # fmt: skip


def _report(num_layers: int, experts: int, top_k: int, steps: int) -> ProfileReport:
    draw = random.Random(num_layers)
    slots, expert_bytes, num_points = experts // 2, 1_769_472, min(steps, 400)
    per_point = -(-steps // num_points)
    num_points = -(-steps // per_point)
    uses = tuple(
        tuple(int(draw.paretovariate(1.3) * steps * top_k / experts / 4) for _ in range(experts))
        for _ in range(num_layers)
    )
    hits = tuple(tuple(int(n * draw.uniform(0.4, 1)) for n in row) for row in uses)
    requests = per_point * num_layers * top_k
    times = {
        name: tuple(per_point * draw.uniform(low, high) for _ in range(num_points))
        for name, low, high in (
            ("dense_s", 0.011, 0.013),
            ("router_s", 0.001, 0.002),
            ("wait_s", 0.0, 0.02),
            ("experts_s", 0.015, 0.018),
            ("other_s", 0.003, 0.005),
        )
    }
    wall_s = tuple(map(sum, zip(*times.values(), strict=True)))
    misses = tuple(int(requests * draw.uniform(0.1, 0.4)) for _ in range(num_points))
    late = tuple(int(requests * draw.uniform(0.0, 0.1)) for _ in range(num_points))
    layers = tuple(_layer(draw, index, experts, slots, uses[index], hits[index]) for index in range(num_layers))
    sizes = tuple(sorted({max(top_k, experts * step // 16) for step in range(1, 17)}))
    return ProfileReport(
        run=RunFacts(
            model="example/mixture-6x8",
            source="run",
            trace_file=None,
            recorded_at="2026-01-02T03:04:05Z",
            format="nf4",
            dense_format="source",
            device="cpu",
            policy="decay",
            prefetch="auto",
            ram_bytes=2 * 1024**3,
            vram_bytes=None,
            context_tokens=4096,
            num_experts=(experts,) * num_layers,
            num_slots=(slots,) * num_layers,
            expert_bytes=(expert_bytes,) * num_layers,
            top_k=top_k,
            dense_bytes=120_000_000,
            kv_bytes=2_000_000,
            prefill_tokens=90,
            decode_tokens=steps,
            prefill_steps=3,
            decode_steps=steps,
            sequences=tuple(
                SequenceFigures(name, 30, steps // 3, 0.8 + index / 10, 21.5 - index, 0.8 - index / 20)
                for index, name in enumerate(("English", "code", "maths"))
            ),
            rates=Rates(18e9, 2.4e9, None, True),
            machine=Machine("An Example CPU @ 3 GHz", 8, 8, "avx2", None, 16 * 1024**3),
            versions={"moe_offload": "0.1.0", "torch": "2.11.0"},
        ),
        header=Header(
            tokens_per_s=steps / sum(wall_s),
            median_step_s=sorted(wall_s)[num_points // 2] / per_point,
            time_to_first_token_s=0.9,
            hit_ratio_decode=sum(map(sum, hits)) / sum(map(sum, uses)),
            hit_ratio_prefill=0.61,
            disk_bytes_per_token=sum(misses) / steps * expert_bytes,
            pcie_bytes_per_token=None,
            stall_share=sum(times["wait_s"]) / sum(wall_s),
            exactness=Exactness(False, "exact at nf4: identical to the fully resident model in this format"),
            bound=BoundFigures(30.0, "disk", steps / sum(wall_s) / 30.0),
        ),
        levers=Levers(
            "step time = time without waiting + bytes missed / disk rate",
            steps / sum(wall_s),
            (
                Lever(
                    "more_slots", f"{slots + 2} slots a layer instead of {slots}", 27.0, 0.26, 0.88, 3.1e6,
                    "--ram 2.5GiB", "2 more slots a layer (0.5 GiB) would bring 27 tok/s: --ram 2.5GiB", "LRU curve",
                ),
                Lever(
                    "faster_disk", "a disk twice as fast", 25.0, 0.17, None, 6.2e6, None,
                    "A disk twice as fast would bring 25 tok/s", "wait / 2",
                ),
            ),
            "2 more slots a layer (0.5 GiB) would bring 27 tok/s: --ram 2.5GiB",
        ),
        usage=Usage(
            prefill_uses=tuple(tuple(n // 3 for n in row) for row in uses),
            decode_uses=uses,
            requests=uses,
            hits=hits,
            residency=Residency(
                tuple(frame * steps // 12 for frame in range(12)),
                tuple(
                    tuple("".join(draw.choice("000009999248") for _ in range(experts)) for _ in range(num_layers))
                    for _ in range(12)
                ),
            ),
        ),
        layers=layers,
        steps=StepSeries(
            steps_per_point=per_point,
            first_step=tuple(range(0, steps, per_point)),
            num_steps=(per_point,) * num_points,
            num_tokens=tuple(30 if index % 20 == 0 else per_point for index in range(num_points)),
            sequence=tuple(index * 3 // num_points for index in range(num_points)),
            phase=tuple("prefill" if index % 20 == 0 else "decode" for index in range(num_points)),
            requests=(requests,) * num_points,
            hits=tuple(requests - missed for missed in misses),
            late=late,
            misses=misses,
            wall_s=wall_s,
            **times,
        ),
        timing=Timing(
            decode=_split(steps, times, sum(wall_s)),
            prefill=TimeSplit(3, 90, 2.7, 0.9, 0.1, 0.8, 0.7, 0.2, 1.0),
            step_p10_s=0.033,
            step_p50_s=0.041,
            step_p90_s=0.052,
            step_p99_s=0.061,
        ),
        curves=_curves(num_layers, experts, sizes, slots, expert_bytes),
        prediction=_prediction(draw, num_layers, top_k),
        experts=_experts(draw, num_layers, experts, top_k),
        missing=(Missing("pcie_bytes_per_token", "the experts are computed on the CPU"),),
    )  # fmt: skip


def _layer(
    draw: random.Random, index: int, experts: int, slots: int, uses: tuple[int, ...], hits: tuple[int, ...]
) -> LayerFigures:
    requests, num_hits = sum(uses), sum(hits)
    return LayerFigures(
        layer=index,
        experts=experts,
        slots=slots,
        requests=requests,
        hits=num_hits,
        late=num_hits // 20,
        misses=requests - num_hits,
        hit_ratio=num_hits / requests,
        hit_ratio_prefill=draw.uniform(0.4, 0.7),
        miss_share=1 / 6,
        dense_s=draw.uniform(0.1, 0.11),
        router_s=0.01,
        wait_s=draw.uniform(0.05, 0.2),
        experts_s=0.16,
        starving=index in (0, 3),
    )


def _split(steps: int, times: dict[str, tuple[float, ...]], clock_s: float) -> TimeSplit:
    parts = {name: sum(values) for name, values in times.items()}
    return TimeSplit(steps, steps, clock_s, **parts, accounted_share=sum(parts.values()) / clock_s)


def _curves(num_layers: int, experts: int, sizes: tuple[int, ...], slots: int, expert_bytes: int) -> Curves:
    def curve(policy: str, label: str, power: float, is_bound: bool = False) -> PolicyCurve:
        return PolicyCurve(
            policy=policy,
            label=label,
            is_bound=is_bound,
            slots=tuple(size * num_layers for size in sizes),
            resident_share=tuple(size / experts for size in sizes),
            resident_bytes=tuple(size * num_layers * expert_bytes for size in sizes),
            hit_ratio=tuple((size / experts) ** power for size in sizes),
        )

    def point(size: int, power: float) -> CurvePoint:
        return CurvePoint(
            size * num_layers, size / experts, size * num_layers * expert_bytes, (size / experts) ** power
        )

    return Curves(
        curves=(
            curve("lru", "LRU", 0.55),
            curve("lfu", "LFU", 0.6),
            curve("decay", "decayed frequency", 0.5),
            curve("learned", "learned", 0.45),
            curve("belady", "Belady's optimum", 0.3, is_bound=True),
        ),
        today=point(slots, 0.5),
        measured_hit_ratio=0.79,
        measured_resident_ratio=0.7,
        knee=point(experts * 5 // 8, 0.45),
        knee_policy="learned",
    )


def _prediction(draw: random.Random, num_layers: int, top_k: int) -> Prediction:
    def row(index: int) -> tuple[float | None, ...]:
        return tuple(draw.uniform(0.5, 0.9) - distance / 10 if index >= distance else None for distance in (1, 2))

    return Prediction(
        distances=(1, 2),
        predicted_per_layer=top_k,
        recall=(0.78, 0.61),
        precision=(0.78, 0.61),
        layer_recall=tuple(map(row, range(num_layers))),
        layer_precision=tuple(map(row, range(num_layers))),
        used_experts=420,
        late_experts=61,
        wasted_experts=88,
        used_bytes=420 * 1_769_472,
        late_bytes=61 * 1_769_472,
        wasted_bytes=88 * 1_769_472,
        demand_bytes=310 * 1_769_472,
        hidden_s=0.31,
        waited_s=0.2,
    )


def _experts(draw: random.Random, num_layers: int, experts: int, top_k: int) -> ExpertStatistics:
    shown = min(experts, 16)
    return ExpertStatistics(
        load=tuple(
            ExpertLoad(index, 2.5 + draw.random() / 3, 3.0, draw.uniform(0.2, 0.4), draw.randrange(experts), 0, 0.3)
            for index in range(num_layers)
        ),
        repetition=Repetition(
            first=tuple(draw.uniform(0.15, 0.4) for _ in range(num_layers)),
            any=tuple(draw.uniform(0.5, 0.7) for _ in range(num_layers)),
            share=tuple(draw.uniform(0.3, 0.5) for _ in range(num_layers)),
            random_first=(1 / experts,) * num_layers,
            random_any=(0.464,) * num_layers,
            random_share=(top_k / experts,) * num_layers,
        ),
        published=tuple(
            PublishedRepetition("Mixtral 8x7B", "Mixtral of Experts (arXiv 2401.04088), Table 5", *row)
            for row in (
                (0, 0.136, 0.149, 0.449, 0.499),
                (15, 0.236, 0.284, 0.616, 0.670),
                (31, 0.197, 0.263, 0.445, 0.536),
            )
        ),
        coactivation=Coactivation(
            recall=tuple(draw.uniform(0.4, 0.6) for _ in range(num_layers - 1)),
            base_recall=tuple(draw.uniform(0.3, 0.4) for _ in range(num_layers - 1)),
            strongest=tuple(
                CoactivationPair(index % (num_layers - 1), index, 7 - index, 20 - index, 3.1 - index / 5)
                for index in range(5)
            ),
            maps=(
                CoactivationMap(
                    0,
                    1,
                    tuple(range(shown)),
                    tuple(range(shown)),
                    tuple(tuple(draw.random() ** 3 for _ in range(shown)) for _ in range(shown)),
                ),
            ),
        ),
    )
