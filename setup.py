"""Packages oapl_engine and oapl_kernels, and the optional C++ epilogue (pybind11, without CUDA or torch headers)."""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc").glob("*.cpp"))


class OptionalBuild(build_ext):
    """Without a compiler the package installs all the same: oapl_kernels then uses its torch backend."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # compilers fail in many ways, and the way out is the same for all
            print(f"oapl_kernels._epilogue was not built ({error}); backend 'torch' takes its place", file=sys.stderr)


def extensions():
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    if not SOURCES:
        return []
    flags = ["-O3", "-pthread", "-fvisibility=hidden"]
    return [
        Pybind11Extension(
            "oapl_kernels._epilogue", SOURCES, cxx_std=17, extra_compile_args=flags, extra_link_args=["-pthread"]
        )
    ]


setup(
    packages=find_packages(".", include=["oapl_engine*"]) + find_packages("kernels", include=["oapl_kernels*"]),
    package_dir={"oapl_kernels": "kernels/oapl_kernels"},
    package_data={"oapl_engine": ["py.typed"], "oapl_kernels": ["py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
)
