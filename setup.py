"""Builds the C++ kernels; everything else about the package is in pyproject.toml."""

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


class BuildKernels(build_ext):
    """A plain shared library that ctypes loads: it has no module init function to export."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """What the linker must export by name; the source marks its own."""
        return ext.export_symbols


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "moe_offload.quant._kernels",
            sources=sorted(glob("quant/csrc/*.cpp")),
            depends=sorted(glob("quant/csrc/*.h") + glob("quant/csrc/*.inl")),
            language="c++",
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            # without a compiler the package works through torch, and says so
            optional=True,
        )
    ],
)
