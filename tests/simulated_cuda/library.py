"""Builds the simulator's C++ library beside a cache of its own, and loads it."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-w"]


class CannotBuildError(Exception):
    """There is no compiler, or it fails."""


def load() -> ctypes.CDLL:
    """The library, built if these sources were not built for this torch yet."""
    library = _cache_folder() / f"simulated_cuda-{_fingerprint()}.so"
    if not library.exists():
        _build(library)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = home / "moe-offload-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fingerprint() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {sysconfig.get_python_version()} {_FLAGS}".encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CannotBuildError("a simulated CUDA device needs a C++ compiler")
    root = Path(torch.__file__).parent
    flags = [*_FLAGS, f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    flags.append(f"-I{sysconfig.get_path('include')}")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        sources = sorted(_SOURCES.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: _run([compiler, *flags, "-c", *pair]), map(_arguments, sources, objects)))
        built = Path(folder) / library.name
        libraries = [f"-L{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([compiler, "-shared", *map(str, objects), "-o", str(built), *libraries])
        built.replace(library)


def _arguments(source: Path, made: Path) -> list[str]:
    return [str(source), "-o", str(made)]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise CannotBuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
