"""`ProfileReport`: all that a profile tells, as an object and as JSON (docs/profile-report.md)."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from moe_offload.errors import ReportError
from moe_offload.offload.pack.strict_json import JsonShapeError, parse
from moe_offload.offload.profiling.json_codec import decode, encode
from moe_offload.offload.profiling.run_facts import RunFacts
from moe_offload.offload.profiling.sections import (
    Curves,
    ExpertStatistics,
    Header,
    LayerFigures,
    Levers,
    Link,
    Missing,
    Prediction,
    StepSeries,
    Timing,
    Usage,
)
from moe_offload.offload.profiling.shapes import check_shapes

FORMAT, VERSION = "moe-offload profile", 3
_LARGEST_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class ProfileReport:
    """One run, analysed. A section is None where the trace could not give it; ``missing`` says why."""

    run: RunFacts
    header: Header
    levers: Levers | None
    usage: Usage
    layers: tuple[LayerFigures, ...]
    steps: StepSeries
    timing: Timing | None
    link: Link | None
    curves: Curves | None
    prediction: Prediction | None
    experts: ExpertStatistics
    missing: tuple[Missing, ...]

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION} | encode(self), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "ProfileReport":
        """The report that `to_json` wrote; `ReportError` for anything else."""
        try:
            value = parse(text)
            _check_version(value)
            report = decode(cls, value, "the report")
            check_shapes(report)
        except JsonShapeError as error:
            raise ReportError(f"not a profile report: {error}") from error
        return report

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "ProfileReport":
        """The report in a file; `ReportError` names it where it cannot be used."""
        path = Path(path)
        try:
            if path.stat().st_size > _LARGEST_BYTES:
                raise ReportError(f"larger than {_LARGEST_BYTES} bytes")
            return cls.from_json(path.read_bytes())
        except (ReportError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ReportError(f"{path}: {reason}") from error

    def save_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one page that needs no network."""
        from moe_offload.offload.profiling.page import render

        Path(path).write_text(render(self), encoding="utf-8")

    def __str__(self) -> str:
        """As a terminal shows it, 80 columns wide and without colours."""
        from moe_offload.offload.profiling.text import as_text

        return as_text(self)


def _check_version(value: Any) -> None:
    """Take the two keys off that say what the JSON is."""
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise JsonShapeError(f'it lacks "format": "{FORMAT}"')
    if (version := value.pop("version", None)) != VERSION or type(version) is not int:
        raise ReportError(
            f"a profile report of version {version!r:.20}; this moe-offload reads version {VERSION}: "
            f"make the report again, or use the version that wrote it"
        )
