"""The native extension, declared beside the package mapping in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

SOURCES = Path("kernels/csrc")


class BuildNative(build_ext):
    """Builds `slipstream.kernels._native`; a missing compiler is one line, not a traceback."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f"slipstream: building kernels/csrc needs a C++17 compiler (g++ or clang++): {error}"
            ) from error


setup(
    ext_modules=[
        Pybind11Extension(
            "slipstream.kernels._native",
            [
                str(SOURCES / name)
                for name in (
                    "binding.cpp",
                    "checksum_binding.cpp",
                    "layers_binding.cpp",
                    "step_binding.cpp",
                    "suffix_binding.cpp",
                )
            ],
            depends=sorted(str(path) for path in SOURCES.iterdir()),
            cxx_std=17,
            # -ffp-contract=off: a fused multiply-add would round differently from the reference.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
