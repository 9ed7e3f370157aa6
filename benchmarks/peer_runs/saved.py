"""Figures as JSON: written after every case, and read again, so that cases measured apart stand in one table."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_offload.offload.bench.report import MachineRates
from peer_runs.cases import Case, Entry
from peer_runs.results import CaseResult, EntryResult
from peer_runs.shapes import Shape


class DifferentMachinesError(Exception):
    """Results that cannot stand in one table; the message says why."""


def save(path: Path, results: Sequence[CaseResult]) -> None:
    """Write everything that was measured, and the bounds."""
    cases = [
        dataclasses.asdict(result)
        | {"entries": [dataclasses.asdict(one) | {"bound": result.bound(one)} for one in result.entries]}
        for result in results
    ]
    path.write_text(json.dumps(cases, indent=1))


def load(paths: Sequence[Path]) -> list[CaseResult]:
    """The cases of all files, a later one in the place of an earlier one of its name.

    `DifferentMachinesError` where some were measured with a limited disk and some were not, or with another limit.
    """
    results: dict[str, CaseResult] = {}
    for path in paths:
        for values in json.loads(path.read_text()):
            result = _case_result(values)
            results[result.case.name] = result
    limits = {result.disk_limit for result in results.values()}
    if len(limits) > 1:
        rates = sorted("no limit" if limit is None else f"{limit / 1e9:g} GB/s" for limit in limits)
        raise DifferentMachinesError(f"the files are of disks held to different rates: {', '.join(rates)}")
    return list(results.values())


def _case_result(values: dict[str, Any]) -> CaseResult:
    case = values["case"]
    entries = tuple(Entry(**entry) for entry in case["entries"])
    rates = values["rates"] and MachineRates(**values["rates"])
    return CaseResult(
        Case(**case | {"shape": Shape(**case["shape"]), "entries": entries}),
        [_entry_result(entry) for entry in values["entries"]],
        rates or None,
        values.get("disk_limit"),
    )


def _entry_result(values: dict[str, Any]) -> EntryResult:
    own = {field.name: values[field.name] for field in dataclasses.fields(EntryResult)}
    return EntryResult(**own | {"entry": Entry(**values["entry"])})
