"""The compiled extension where it is built, and why it is missing where it is not. Imports nothing else."""

from __future__ import annotations

try:
    from slipstream.kernels import _native  # type: ignore[attr-defined]

    NATIVE_ERROR = ""
except ImportError as error:
    _native = None
    NATIVE_ERROR = str(error)

__all__ = ["NATIVE_ERROR", "_native"]
