"""Libraries that were built from other sources are refused, and a build that fails leaves none behind."""

import ctypes
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import xxhash._xxhash  # some library that is not ours

import moe_offload.quant
from moe_offload.libraries import load_library, sources_stamp
from moe_offload.quant import kernels

REPO = Path(__file__).parent.parent
BUILT = next((path for suffix in EXTENSION_SUFFIXES for path in (REPO / "quant").glob(f"_kernels{suffix}")), None)

built = pytest.mark.skipif(BUILT is None, reason="no compiler was there when this was installed")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package's folder with the sources of the kernels, and no library."""
    shutil.copytree(Path(moe_offload.quant.__path__[0]) / "csrc", tmp_path / "csrc")
    return tmp_path


def with_library(package: Path, library: Path | str | None) -> Path:
    assert library is not None
    shutil.copy(library, package / f"_kernels{EXTENSION_SUFFIXES[-1]}")
    return package


def test_the_stamp_follows_what_is_compiled_and_nothing_else(package: Path):
    before = sources_stamp(package)
    (package / "csrc" / "notes.txt").write_text("of no consequence")
    assert sources_stamp(package) == before
    header = package / "csrc" / "packed.h"
    header.write_text(header.read_text() + "\n")
    edited = sources_stamp(package)
    header.rename(header.with_name("other.h"))
    assert len({before, edited, sources_stamp(package)}) == 3


def test_without_a_library_there_is_none(package: Path):
    assert load_library(package, ctypes.CDLL) is None


@built
def test_a_library_of_these_sources_is_loaded(package: Path):
    assert load_library(with_library(package, BUILT), ctypes.CDLL) is not None
    assert kernels.available() != ("torch",)


@built
def test_where_the_sources_are_not_installed_the_library_is_what_was_made_of_them(package: Path):
    shutil.rmtree(with_library(package, BUILT) / "csrc")
    assert load_library(package, ctypes.CDLL) is not None


@built
def test_a_library_of_other_sources_is_refused(package: Path):
    (with_library(package, BUILT) / "csrc" / "new.h").write_text("struct Other {};\n")
    with pytest.warns(RuntimeWarning, match=r"_kernels\S* is not used.*stamp [0-9a-f]{16}\).*pip install -e ."):
        assert load_library(package, ctypes.CDLL) is None


def test_a_library_without_a_stamp_is_refused(package: Path):
    with pytest.warns(RuntimeWarning, match=r"stamp missing"):
        assert load_library(with_library(package, xxhash._xxhash.__file__), ctypes.CDLL) is None


def test_a_build_that_fails_leaves_no_older_library(tmp_path: Path):
    pytest.importorskip("setuptools")
    shutil.copy(REPO / "setup.py", tmp_path)
    for name in ("libraries.py", "library_stamp.cpp"):
        (tmp_path / "src" / "moe_offload").mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / "src" / "moe_offload" / name, tmp_path / "src" / "moe_offload")
    stale = []
    for name in ("quant", "cache"):
        sources, package = tmp_path / name / "csrc", tmp_path / "moe_offload" / name
        sources.mkdir(parents=True)
        (sources / "broken.cpp").write_text("#error this does not compile\n")
        package.mkdir(parents=True)
        stale.append(package / f"_kernels{EXTENSION_SUFFIXES[0]}")
        stale[-1].write_text("stale")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # without kernels the package works too
    assert not any(path.exists() for path in stale)
