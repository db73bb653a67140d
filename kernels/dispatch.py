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
from slipstream.kernels.cache_layout import BlockedCache, LayerCache, StepPlaces
from slipstream.kernels.native import NATIVE_ERROR
from slipstream.kernels.native_set import NATIVE_DTYPES, NativeKernels, Products, best_products
from slipstream.kernels.reference import SamplingRows, Verified

KernelChoice = Literal["auto", "native", "triton", "reference"]
ProductChoice = Literal["auto", "fma", "tiles"]
Backend = Literal["auto", "triton", "reference"]


class KernelError(RuntimeError):
    """A kernel was asked for that this machine, device or dtype cannot run."""


class KernelSet(Protocol):
    """The kernels of one engine; shapes as in kernels/reference.py, cache operations as in cache_layout.py.

    products: how linear layers multiply, in a word that is equal only where the bits are. on_device: sampling runs
    where the logits are, and attention takes the step's table. own_threads: see NativeKernels.
    trees: drafts may branch; without it the engine asks for chains. shares_prefixes: a slot may read the start of its
    text in another one; without it the engine copies.
    """

    name: str
    reason: str
    on_device: bool
    own_threads: bool
    trees: bool
    shares_prefixes: bool

    @property
    def products(self) -> str:
        """See above."""

    def new_layer_cache(
        self, num_slots: int, length: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> LayerCache:
        """See BlockedCache.new_layer_cache."""

    def snapshot(self, keys: torch.Tensor, values: torch.Tensor, slot: int, length: int) -> LayerCache:
        """See BlockedCache.snapshot."""

    def restore(self, keys: torch.Tensor, values: torch.Tensor, slot: int, saved: LayerCache) -> None:
        """See BlockedCache.restore."""

    def copy_prefix(self, keys: torch.Tensor, values: torch.Tensor, source: int, target: int, length: int) -> None:
        """See BlockedCache.copy_prefix."""

    def adopt(self, model: nn.Module) -> None:
        """Takes over the layers of the model that these kernels compute."""

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

    def move_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        """See reference.move_kv; only where `trees`."""

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        places: StepPlaces,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """See BlockedCache.attention."""

    def sample_verify(
        self,
        logits: torch.Tensor,
        offsets: np.ndarray,
        drafts: np.ndarray,
        rows: SamplingRows,
        parents: np.ndarray | None = None,
    ) -> Verified:
        """See reference.sample_verify; logits is a torch tensor on any device. parents: only where `trees`."""


class ReferenceKernels(BlockedCache):
    """The plain twins, on any device and dtype."""

    name = "reference"
    products = "torch"
    own_threads = False
    append_kv = staticmethod(reference.append_kv)
    move_kv = staticmethod(reference.move_kv)
    ragged_attention = staticmethod(reference.ragged_attention)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def adopt(self, model: nn.Module) -> None:
        """The model keeps its own layers."""

    def sample_verify(
        self,
        logits: torch.Tensor,
        offsets: np.ndarray,
        drafts: np.ndarray,
        rows: SamplingRows,
        parents: np.ndarray | None = None,
    ) -> Verified:
        """Copies the logits to the host and runs the numpy twin."""
        return reference.sample_verify(logits.float().cpu().numpy(), offsets, drafts, rows, parents)


def select(
    choice: KernelChoice,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int = 1,
    cpu_products: ProductChoice = "auto",
) -> KernelSet:
    """The kernels for one engine: `auto` takes Triton on CUDA, C++ on the CPU in float32 and
    bfloat16, else the plain twins. num_threads, cpu_products: of the C++ kernels, auto takes tiles where the CPU has
    AMX, else fma; others ignore them.

    Raises KernelError when `native` or `triton` is asked for and cannot run, and ValueError for an unknown name.
    """
    if choice not in get_args(KernelChoice):
        raise ValueError(f"engine.kernels is {choice!r}; allowed: {', '.join(get_args(KernelChoice))}")
    if cpu_products not in get_args(ProductChoice):
        raise ValueError(f"engine.cpu_products is {cpu_products!r}; allowed: {', '.join(get_args(ProductChoice))}")
    if choice == "reference":
        return ReferenceKernels("asked for by engine.kernels=reference")
    if choice == "triton" or (choice == "auto" and device.type == "cuda"):
        problem = _triton_problem(device)
        if not problem:
            from slipstream.kernels.triton.kernel_set import TritonKernels

            return TritonKernels("on CUDA" if device.type == "cuda" else "on the CPU, interpreted: for tests only")
        if choice == "triton":
            raise KernelError(f"engine.kernels=triton: {problem}")
        return ReferenceKernels(problem)
    problem = ""
    if NATIVE_ERROR:
        problem = f"the native extension is not built ({NATIVE_ERROR})"
    elif device.type != "cpu" or dtype not in NATIVE_DTYPES:
        problem = f"native kernels need float32 or bfloat16 on the CPU, not {dtype} on {device}"
    if choice == "native" and problem:
        raise KernelError(f"engine.kernels=native: {problem}")
    if problem:
        return ReferenceKernels(problem)
    products: Products = best_products() if cpu_products == "auto" else cpu_products
    reason = f"built, {str(dtype).removeprefix('torch.')} on the CPU"
    return NativeKernels(reason, num_threads, products=products)


def _triton_problem(device: torch.device) -> str:
    """Why Triton kernels cannot run on the device; empty where they can."""
    try:
        import triton
    except ImportError as error:
        return f"the extra slipstream[gpu] brings Triton ({error})"
    # Triton reads TRITON_INTERPRET when it is first imported; its own functions show what it read.
    if device.type != "cuda" and isinstance(triton.language.sum, triton.JITFunction):
        return f"on {device} it needs TRITON_INTERPRET=1, set before Triton is imported"
    return ""


def pick_backend(backend: Backend, device: torch.device) -> Literal["triton", "reference"]:
    """`auto`: Triton on CUDA, the plain twin elsewhere. Raises ValueError for an unknown name, and where Triton is
    named (or CUDA given) but cannot run."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(get_args(Backend))}")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return "reference"
    if problem := _triton_problem(device):
        raise ValueError(f"backend is {backend!r} on {device}; allowed: auto, reference ({problem})")
    return "triton"
