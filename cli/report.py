"""Figures of a run, as one line, as a table and as JSON."""

from typing import Any

from moe_offload.cli.model_api import Run
from moe_offload.offload.planning.sizes import format_size

_SEPARATOR = " · "


def report_line(run: Run, *, max_new_tokens: int | None = None) -> str:
    """The line after an answer: speed, first token, hits, bytes read, time spent waiting for the disk."""
    parts = [f"{run.tokens_per_s:.1f} tok/s"] if run.new_tokens > 1 else []
    parts += [
        f"first {format_seconds(run.time_to_first_token_s)}",
        f"{_hits(run)} hits",
        f"{format_size(run.bytes_read)} read",
        f"{format_seconds(run.stall_s)} stalled",
        f"{run.new_tokens} {'token' if run.new_tokens == 1 else 'tokens'}",
    ]
    if max_new_tokens is not None and run.new_tokens >= max_new_tokens:
        parts[-1] += " (the limit; --max-new-tokens)"
    if run.num_ranks > 1:
        parts.append(f"{format_seconds(run.peer_wait_s)} for other ranks, {format_size(run.peer_bytes)} exchanged")
    return _SEPARATOR.join(parts)


def totals(stats: Run) -> list[tuple[str, str]]:
    """Names and values of a session's figures, for /stats."""
    copied = f", {format_size(stats.bytes_copied)} copied to the GPU" if stats.bytes_copied else ""
    if stats.link_use:
        copied += f" ({stats.link_use:.0%} of what its link can carry)"
    on_cpu = f", {stats.computed_on_cpu} of them computed on the CPU" if stats.computed_on_cpu else ""
    foreseen = f"; {stats.prefetch_recall:.0%} of what was asked for was foreseen" if stats.prefetch_recall else ""
    return [
        ("tokens", f"{stats.prompt_tokens} read, {stats.new_tokens} written"),
        ("speed", f"{stats.tokens_per_s:.1f} tok/s over {format_seconds(stats.decode_s)} of decoding"),
        ("experts", f"{stats.hits + stats.misses} asked for, {_hits(stats)} found in memory{on_cpu}"),
        ("read", f"{format_size(stats.bytes_read)} from the disk{copied}"),
        *([("warm start", f"{stats.warmed} experts")] if stats.warmed else []),
        *(
            [("ranks", f"{stats.num_ranks}; waited {format_seconds(stats.peer_wait_s)} for others")]
            if stats.num_ranks > 1
            else []
        ),
        ("stalled", format_seconds(stats.stall_s)),
        (
            "prefetched",
            f"{stats.prefetch_issued} experts, {stats.prefetch_used} of them used, {stats.prefetch_wasted} in vain"
            f"{foreseen}",
        ),
    ]


def timings(run: Run) -> dict[str, Any]:
    """The times of a run, for JSON."""
    return {
        "time_to_first_token_s": run.time_to_first_token_s,
        "decode_s": run.decode_s,
        "tokens_per_s": run.tokens_per_s,
        "stall_s": run.stall_s,
    }


def cache_figures(run: Run) -> dict[str, Any]:
    """What the expert cache did in a run, for JSON."""
    return {
        "hits": run.hits,
        "misses": run.misses,
        "hit_ratio": run.hit_ratio,
        "bytes_read": run.bytes_read,
        "bytes_copied": run.bytes_copied,
        "bytes_copied_ahead": run.bytes_copied_ahead,
        "link_peak_bytes_per_s": run.link_peak_bytes_per_s,
        "link_busy_s": run.link_busy_s,
        "link_use": run.link_use,
        "link_use_steps": [round(share, 4) for share in run.link_use_steps],
        "prefetch_issued": run.prefetch_issued,
        "prefetch_used": run.prefetch_used,
        "prefetch_wasted": run.prefetch_wasted,
        "prefetch_recall": run.prefetch_recall,
        "warmed": run.warmed,
        "computed_on_cpu": run.computed_on_cpu,
        "num_ranks": run.num_ranks,
        "peer_wait_s": run.peer_wait_s,
        "peer_bytes": run.peer_bytes,
    }


def format_seconds(seconds: float) -> str:
    """A duration in two or three digits: "84 ms", "3.2 s", "4 min 10 s"."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _hits(run: Run) -> str:
    asked = run.hits + run.misses
    return f"{100 * run.hits / asked:.0f}%" if asked else "no"
