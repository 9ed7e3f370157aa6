"""What a profile foretells of each change, beside what a run with that change then does.

python benchmarks/profile_levers.py PACK [--ram 720MiB] [--prefetch off] [--tokens 64] [--repeat 3]

The run and each change take turns, A B C A B C, and the fastest of each counts: others only take from a machine.
Changes of the format need another pack and are left out; so is a faster disk.
"""

import argparse
from pathlib import Path
from typing import Any

from kernel_timing import print_table
from transformers.utils import logging

from moe_offload import OffloadedModel
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import Lever


def run(pack: Path, settings: dict[str, Any], tokens: int) -> ProfileReport:
    """A profile of the built-in prompts, from an empty cache."""
    with OffloadedModel.from_pretrained(pack, device="cpu", warm_start=False, **settings) as model:
        return model.profile(max_new_tokens=tokens, measure_rates=False)


def settings_of(lever: Lever) -> dict[str, Any] | None:
    """The option of a lever as an argument; None if it has none that this pack can take."""
    if lever.option is None or lever.kind == "fewer_bits":
        return None
    name, value = lever.option.removeprefix("--").split()
    return {name: value}


def fastest(reports: list[ProfileReport]) -> ProfileReport:
    return max(reports, key=lambda report: report.header.tokens_per_s or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--ram", default="720MiB")
    parser.add_argument("--prefetch", default="off")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = {"ram": options.ram, "prefetch": options.prefetch}
    reports = [run(options.pack, settings, options.tokens)]
    assert reports[0].levers is not None
    changes = {lever.kind: change for lever in reports[0].levers.levers if (change := settings_of(lever)) is not None}
    changed: dict[str, list[ProfileReport]] = {kind: [] for kind in changes}
    for turn in range(options.repeat):
        if turn:
            reports.append(run(options.pack, settings, options.tokens))
        for kind, change in changes.items():
            changed[kind].append(run(options.pack, settings | change, options.tokens))
    base = fastest(reports)
    assert base.levers is not None
    print(f"{base.run.model}, {options.ram}, prefetch {options.prefetch}: {base.header.tokens_per_s:.2f} tok/s, "
          f"{base.header.hit_ratio_decode:.1%} hits, {base.header.stall_share:.0%} waiting")  # fmt: skip
    rows = []
    for lever in base.levers.levers:
        if lever.kind in changed:
            header = fastest(changed[lever.kind]).header
            foretold = "" if lever.hit_ratio is None else f"{lever.hit_ratio:.1%}"
            rows.append([f"{lever.option}", f"{lever.tokens_per_s:.2f}", f"{header.tokens_per_s:.2f}", foretold,
                         f"{header.hit_ratio_decode:.1%}"])  # fmt: skip
    print_table(["change", "tok/s foretold", "tok/s", "hits foretold", "hits"], rows)


if __name__ == "__main__":
    main()
