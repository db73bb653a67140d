"""Picks the implementation of each kernel and can say which and why.

Invariants: an implementation asked for by name is used or refused with a KernelError, never replaced; `auto` may fall
back, and `KernelSet.reason` says so. Every implementation gives the same tokens on the same logits.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import nn

from slipstream.kernels import reference
from slipstream.kernels.layers import adopt_layers
from slipstream.kernels.linear import PackedLinears
from slipstream.kernels.reference import SamplingRows, Verified

try:
    from slipstream.kernels import _native  # type: ignore[attr-defined]

    NATIVE_ERROR = ""
except ImportError as error:
    _native = None
    NATIVE_ERROR = str(error)

KernelChoice = Literal["auto", "native", "reference"]
Backend = Literal["auto", "triton", "reference"]


class KernelError(RuntimeError):
    """A kernel was asked for that this machine, device or dtype cannot run."""


class KernelSet(Protocol):
    """The kernels of one engine; shapes as in kernels/reference.py."""

    name: str
    reason: str

    def adopt(self, model: nn.Module) -> None:
        """Takes over the layers of the model that these kernels compute."""

    def before_pass(self) -> None:
        """Follows weights that were changed in place since the last pass."""

    def append_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """See reference.append_kv."""

    def ragged_attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """See reference.ragged_attention."""

    def sample_verify(
        self, logits: torch.Tensor, offsets: np.ndarray, drafts: np.ndarray, rows: SamplingRows
    ) -> Verified:
        """See reference.sample_verify; logits is a torch tensor on any device."""


class ReferenceKernels:
    """The plain twins, on any device and dtype."""

    name = "reference"

    def adopt(self, model: nn.Module) -> None:
        """torch's own linear layers."""

    def before_pass(self) -> None:
        """Nothing to keep up."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.append_kv = reference.append_kv
        self.ragged_attention = reference.ragged_attention

    def sample_verify(
        self, logits: torch.Tensor, offsets: np.ndarray, drafts: np.ndarray, rows: SamplingRows
    ) -> Verified:
        """Copies the logits to the host and runs the numpy twin."""
        return reference.sample_verify(logits.float().cpu().numpy(), offsets, drafts, rows)


class NativeKernels:
    """C++ on the CPU, float32 cache.

    num_threads: of attention, linear layers and sampling. isa: auto, plain, avx2 or avx512; all give the same bits.
    """

    name = "native"

    def __init__(self, reason: str, num_threads: int = 1, isa: str = "auto") -> None:
        self.context = _native.Context(num_threads, isa=isa)
        self.reason = f"{reason}, {self.context.isa}, {num_threads} threads"
        self._linears: PackedLinears | None = None

    def adopt(self, model: nn.Module) -> None:
        """Packs the weights of the model's linear layers: once more the memory of those, for their speed."""
        self._linears = PackedLinears(
            model, lambda layer: _native.PackedLinear(layer.out_features, layer.in_features), self.context
        )
        adopt_layers(model, _native, self.context)

    def before_pass(self) -> None:
        """Packs anew what was updated."""
        if self._linears is not None:
            self._linears.refresh()

    def append_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Writes the new tokens into the cache in place."""
        _native.append_kv(
            keys.numpy(),
            values.numpy(),
            new_keys.contiguous().numpy(),
            new_values.contiguous().numpy(),
            slots.numpy(),
            positions.numpy(),
        )

    def ragged_attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Attention of packed tokens, bit-equal for every batch they come in."""
        query = query.contiguous()
        out = torch.empty_like(query)
        _native.ragged_attention(
            query.numpy(),
            keys.numpy(),
            values.numpy(),
            slots.numpy(),
            positions.numpy(),
            scale,
            window,
            softcap,
            out.numpy(),
            self.context,
        )
        return out

    def sample_verify(
        self, logits: torch.Tensor, offsets: np.ndarray, drafts: np.ndarray, rows: SamplingRows
    ) -> Verified:
        """Samples and verifies in one call."""
        num_rows, num_requests = logits.shape[0], len(offsets) - 1
        out = Verified(
            tokens=np.zeros(num_rows, np.int32),
            logprobs=np.zeros(num_rows, np.float32),
            count=np.zeros(num_requests, np.int32),
            finish=np.zeros(num_requests, np.int8),
        )
        _native.sample_verify(
            logits.float().contiguous().numpy(),
            offsets,
            drafts,
            rows.seed,
            rows.uid,
            rows.position,
            rows.temperature,
            rows.top_p,
            rows.top_k,
            rows.remaining,
            rows.stop_ids,
            rows.stop_offsets,
            out.tokens,
            out.logprobs,
            out.count,
            out.finish,
            self.context,
        )
        return out


def select(choice: KernelChoice, device: torch.device, dtype: torch.dtype, num_threads: int = 1) -> KernelSet:
    """The kernels for one engine, with their threads. Raises KernelError when `native` is asked for and cannot run."""
    problem = ""
    if _native is None:
        problem = f"the native extension is not built ({NATIVE_ERROR})"
    elif device.type != "cpu" or dtype != torch.float32:
        problem = f"native kernels need float32 on the CPU, not {dtype} on {device}"
    if choice == "native" and problem:
        raise KernelError(f"engine.kernels=native: {problem}")
    if choice == "reference":
        return ReferenceKernels("asked for by engine.kernels=reference")
    return ReferenceKernels(problem) if problem else NativeKernels("built, float32 on the CPU", num_threads)


def pick_backend(backend: Backend, device: torch.device) -> Literal["triton", "reference"]:
    """`auto`: Triton on CUDA, the plain twin elsewhere. Raises ValueError for an unknown name, and where Triton is
    named (or CUDA given) but cannot run."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(get_args(Backend))}")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return "reference"
    try:
        import triton
    except ImportError as error:
        raise ValueError(
            f"backend is {backend!r} on {device}; allowed: reference (the extra slipstream[gpu] brings Triton: {error})"
        ) from error
    # Triton reads TRITON_INTERPRET when it is first imported; its own functions show what it read.
    if device.type != "cuda" and isinstance(triton.language.sum, triton.JITFunction):
        raise ValueError(
            f"backend is {backend!r} on {device}; "
            "allowed: auto, reference, or TRITON_INTERPRET=1 set before Triton is imported"
        )
    return "triton"
