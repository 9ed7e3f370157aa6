"""Builds the C++ libraries; everything else about the package is in pyproject.toml."""

import runpy
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARIES = runpy.run_path("src/moe_offload/libraries.py")

# fp-contract=off: multiply and add stay two operations where the source says so, as in the torch reference.
if sys.platform == "win32":
    COMPILE_ARGS, LINK_ARGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"], []
else:
    COMPILE_ARGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"]
    LINK_ARGS = ["-pthread"]


class BuildLibraries(build_ext):
    """Plain shared libraries that ctypes loads: they have no module init function to export."""

    def run(self) -> None:
        """Build; an older library beside the sources goes first, lest it stay where the new one does not compile."""
        if self.inplace:
            for ext in self.extensions:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().run()

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """What the linker must export by name; the source marks its own."""
        return ext.export_symbols


def library(package: str) -> Extension:
    """All sources of the package's ``csrc``, as its ``_kernels``."""
    return Extension(
        f"moe_offload.{package}._kernels",
        sources=[*sorted(glob(f"{package}/csrc/*.cpp")), "src/moe_offload/library_stamp.cpp"],
        depends=sorted(glob(f"{package}/csrc/*.h") + glob(f"{package}/csrc/*.inl")),
        define_macros=[(LIBRARIES["STAMP_MACRO"], LIBRARIES["sources_stamp"](Path(package)))],
        language="c++",
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=LINK_ARGS,
        # without a compiler the package works through torch and Python, and says so
        optional=True,
    )


setup(cmdclass={"build_ext": BuildLibraries}, ext_modules=[library("quant"), library("cache")])
