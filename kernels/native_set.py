"""The native kernels as the engine's kernel set.

Invariant: sums are float32 in a fixed order, also for bfloat16 models (what those round are weights, logits and the
outputs of layers), so that a row's bits depend on nothing but the row.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from slipstream.kernels.cache_layout import BlockedCache, LayerCache
from slipstream.kernels.native import _native
from slipstream.kernels.native_layers import adopt_layers
from slipstream.kernels.packed_linear import as_numpy, pack_linears
from slipstream.kernels.reference import SamplingRows, Verified

Products = Literal["fma", "tiles"]
"""How linear layers multiply. fma: one chain of fused multiply-adds in float32. tiles: 32 bfloat16 factors at a time,
as AMX does, float32 factors as sums of two bfloat16: an error of some 1e-5 of the largest output."""

PACKED: dict[tuple[Products, torch.dtype], Any] = (
    {}
    if _native is None
    else {
        ("fma", torch.float32): _native.PackedLinear,
        ("fma", torch.bfloat16): _native.PackedLinearBf16,
        ("tiles", torch.float32): _native.TiledLinear,
        ("tiles", torch.bfloat16): _native.TiledLinearBf16,
    }
)
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def new_packed(layer: nn.Linear, products: Products = "fma") -> Any:
    """An empty native layer of the sizes and dtype of `layer`."""
    return PACKED[products, layer.weight.dtype](layer.out_features, layer.in_features)


def best_products() -> Products:
    """Tiles where this machine computes them with AMX; without it they cost more than chains do."""
    return "tiles" if _native.Context(1).amx else "fma"


def _rows(x: torch.Tensor) -> Any:
    """[T, H, D] in float32 as it lies in memory, copied only where the last axis is not side by side."""
    x = x.float()
    return (x if x.stride(-1) == 1 else x.contiguous()).numpy()


class NativeKernels(BlockedCache):
    """C++ on the CPU, for float32 and bfloat16 models.

    num_threads: of attention, linear layers and sampling. isa: auto, plain, avx2 or avx512; all give the same bits.
    products: of linear layers; each has its own bits, the same on every machine.
    """

    name = "native"
    own_threads = False
    """Whether all products of the model run on these kernels' threads: torch's own would only stand in their way."""

    def __init__(self, reason: str, num_threads: int = 1, isa: str = "auto", products: Products = "fma") -> None:
        self.context, self.products = _native.Context(num_threads, isa=isa), products
        unit = self.context.isa + (" and AMX" if products == "tiles" and self.context.amx else "")
        self.reason = f"{reason}, {unit}, products by {products}, {num_threads} threads"

    def new_layer_cache(
        self, num_slots: int, length: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> LayerCache:
        """Keys and values rest in float32 whatever the model's dtype: attention reads them many times."""
        return super().new_layer_cache(num_slots, length, key_states.float(), value_states.float())

    def adopt(self, model: nn.Module) -> None:
        """Packs the weights of the model's linear layers: once more the memory of those, for their speed."""
        adopt_layers(model, _native, self.context)
        pack_linears(model, partial(new_packed, products=self.products), self.context)
        self.own_threads = not any(
            tensor.dim() >= 2
            for layer in model.modules()
            if "forward" not in vars(layer) and not isinstance(layer, nn.Embedding)
            for tensor in layer.parameters(recurse=False)
        )

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
            _rows(new_keys),
            _rows(new_values),
            slots.numpy(),
            positions.numpy(),
        )

    def move_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        """Moves tokens to other places of their slots, one after the other."""
        _native.move_kv(keys.numpy(), values.numpy(), slots.numpy(), source.numpy(), target.numpy())

    def ragged_attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        places: torch.Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        positions: torch.Tensor | None = None,
        parents: torch.Tensor | None = None,
        prefix_slots: torch.Tensor | None = None,
        prefix_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of packed tokens, bit-equal for every batch they come in, for trees and chains, and wherever a
        prefix lies."""
        out = torch.empty(query.shape)
        _native.ragged_attention(
            _rows(query),
            keys.numpy(),
            values.numpy(),
            slots.numpy(),
            places.numpy(),
            scale,
            window,
            softcap,
            out.numpy(),
            self.context,
            None if positions is None else positions.numpy(),
            None if parents is None else parents.numpy(),
            None if prefix_slots is None else prefix_slots.numpy(),
            None if prefix_lens is None else prefix_lens.numpy(),
        )
        return out.to(query.dtype)

    def sample_verify(
        self,
        logits: torch.Tensor,
        offsets: np.ndarray,
        drafts: np.ndarray,
        rows: SamplingRows,
        parents: np.ndarray | None = None,
    ) -> Verified:
        """Samples and verifies in one call."""
        num_rows, num_requests = logits.shape[0], len(offsets) - 1
        out = Verified(
            tokens=np.zeros(num_rows, np.int32),
            logprobs=np.zeros(num_rows, np.float32),
            count=np.zeros(num_requests, np.int32),
            finish=np.zeros(num_requests, np.int8),
            path=None if parents is None else np.zeros(num_rows, np.int32),
        )
        logits = logits.contiguous() if logits.dtype in NATIVE_DTYPES else logits.float()
        sample = _native.sample_verify_bf16 if logits.dtype == torch.bfloat16 else _native.sample_verify
        sample(
            as_numpy(logits),
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
            parents,
            out.path,
        )
        return out
