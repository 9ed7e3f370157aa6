"""The option --disk-rate: every process that is measured reads the disk that holds its weights at no more than that."""

import argparse
import os
from pathlib import Path

from control_group import NoLimitError, ReadLimit, check_limits


def add_disk_rate(parser: argparse.ArgumentParser) -> None:
    """Bytes a second, or None."""
    parser.add_argument(
        "--disk-rate", type=_rate, metavar="RATE", help="hold the disk to so much a second, like 0.8GB/s; as root"
    )


def read_limit(path: Path, bytes_per_s: int) -> ReadLimit:
    """The limit of the disk that holds ``path``; NoLimitError, saying why, where it cannot be set."""
    limit = ReadLimit(disk_of(path), bytes_per_s)
    check_limits([limit])
    return limit


def disk_of(path: Path, root: Path = Path("/")) -> str:
    """The numbers of the whole disk that holds ``path``, as "254:0"; NoLimitError where no block device does.

    Limits are of disks, not of their partitions.
    """
    device = path.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    folder = (root / "sys/dev/block" / numbers).resolve()
    if not folder.exists():
        raise NoLimitError(
            f"{path} is on {_file_system(numbers, root)}, which is no block device whose rate has a limit"
        )
    if (folder / "partition").exists():
        folder = folder.parent
    return (folder / "dev").read_text().strip()


def _rate(text: str) -> int:
    from moe_offload.errors import ConfigError
    from moe_offload.offload.planning.sizes import parse_rate

    try:
        return parse_rate(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _file_system(numbers: str, root: Path) -> str:
    """Its kind: the first word behind the dash of the mount with these numbers."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == numbers:
            return source.split()[0]
    return "a file system without a mount"
