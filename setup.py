"""Builds the C++ libraries; everything else about the package is in pyproject.toml."""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# fp-contract=off: multiply and add stay two operations where the source says so, as in the torch reference.
if sys.platform == "win32":
    COMPILE_ARGS, LINK_ARGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"], []
else:
    COMPILE_ARGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"]
    LINK_ARGS = ["-pthread"]


class BuildLibraries(build_ext):
    """Plain shared libraries that ctypes loads: they have no module init function to export."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """What the linker must export by name; the source marks its own."""
        return ext.export_symbols


def library(package: str) -> Extension:
    """All sources of the package's ``csrc``, as its ``_kernels``."""
    return Extension(
        f"moe_offload.{package}._kernels",
        sources=sorted(glob(f"{package}/csrc/*.cpp")),
        depends=sorted(glob(f"{package}/csrc/*.h") + glob(f"{package}/csrc/*.inl")),
        language="c++",
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=LINK_ARGS,
        # without a compiler the package works through torch and Python, and says so
        optional=True,
    )


setup(cmdclass={"build_ext": BuildLibraries}, ext_modules=[library("quant"), library("cache")])
