"""Packages oapl_engine and oapl_kernels, and the optional C++ epilogue (pybind11, without CUDA or torch headers)."""

from pathlib import Path

from setuptools import find_packages, setup


def extensions():
    """Optional: without a compiler the package installs all the same, and oapl_kernels uses its torch backend."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    return [
        Pybind11Extension(
            "oapl_kernels._cpu",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread", "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


setup(
    packages=find_packages(".", include=["oapl_engine*"]) + find_packages("kernels", include=["oapl_kernels*"]),
    package_dir={"oapl_kernels": "kernels/oapl_kernels"},
    package_data={"oapl_engine": ["py.typed"], "oapl_kernels": ["py.typed"]},
    ext_modules=extensions(),
)
