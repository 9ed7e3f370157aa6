"""The C++ libraries of packages: found beside their Python code, and refused if they were built from other sources.

``setup.py`` runs this file, so it imports nothing of the package.
"""

import ctypes
import hashlib
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TypeVar

LIBRARY_NAME = "_kernels"
SOURCES_NAME = "csrc"
SOURCE_SUFFIXES = (".cpp", ".h", ".inl")
# The function that library_stamp.cpp adds to every library, and the macro that tells it what to answer.
_STAMP_FUNCTION = "moe_offload_library_stamp"
STAMP_MACRO = "MOE_OFFLOAD_LIBRARY_STAMP"

Library = TypeVar("Library", bound=ctypes.CDLL)


def sources_of(package: Path) -> list[Path]:
    """The sources of a package's library; none where only what was built from them is installed."""
    return sorted(path for path in (package / SOURCES_NAME).glob("*") if path.suffix in SOURCE_SUFFIXES)


def sources_stamp(package: Path) -> str:
    """Digits that change with any byte of the sources, and with their names."""
    digest = hashlib.sha256()
    for path in sources_of(package):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def load_library(package: Path, kind: type[Library]) -> Library | None:
    """The library in a package's folder; None if there is none, or, with a warning, a stale one.

    A library that another version of its sources made is no use: its structs and functions may have other arguments.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = package / (LIBRARY_NAME + suffix)
        if not path.exists():
            continue
        library = kind(str(path))
        stamp = _stamp_of(library)
        if sources_of(package) and stamp != sources_stamp(package):
            warnings.warn(
                f"{path} is not used: it was built from other sources (stamp {stamp or 'missing'}) than those in "
                f"{path.with_name(SOURCES_NAME)} (stamp {sources_stamp(package)}); what it would compute runs slower "
                "without it; build it again with `pip install -e .`",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return library
    return None


def _stamp_of(library: ctypes.CDLL) -> str | None:
    try:
        function = library[_STAMP_FUNCTION]
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return str(function().decode())
