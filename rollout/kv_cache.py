"""A slot KV cache behind transformers' public Cache interface, written in place.

Invariants
- One slot holds one live request; a token's place is (slot, position) and is written before it is read. A slot may
  read the start of its text in another one, whose tokens there nobody writes while it does.
- Rewinding is free: what lies beyond a request's length is never attended to, so rejected drafts need no clearing.
- What was accepted of a draft tree moves to the places that are its positions (`move`) before the next pass.
- The cache keeps every position, also for sliding-window layers (the window is applied by the attention), so a
  rewind never meets an evicted key.
- Packed layout: a step is one sequence [1, T] whose token t belongs to `StepPlaces.slots[t]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from slipstream.kernels.cache_layout import LayerCache, PrefixPlaces, StepPlaces
from slipstream.kernels.dispatch import KernelSet

ATTENTION_NAME = "slipstream_ragged"


class SlotLayer(CacheLayerMixin):
    """One layer's slots, in the layout of the engine's kernels."""

    is_compileable = False
    is_sliding = False

    def __init__(self, owner: SlotKVCache) -> None:
        super().__init__()
        self.owner = owner
        self.stored: LayerCache = (torch.empty(0), torch.empty(0))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates on the first write, when the layer's head count and width are known."""
        owner = self.owner
        self.stored = owner.kernels.new_layer_cache(owner.num_slots, owner.max_len, key_states, value_states)
        self.keys, self.values = self.stored
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [1, Hkv, T, D] new keys and values at the step's places; returns the whole layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self.owner.places
        self.owner.kernels.append_kv(
            *self.stored,
            key_states[0].transpose(0, 1),
            value_states[0].transpose(0, 1),
            places.slots,
            places.positions,
        )
        return self.stored

    def get_seq_length(self) -> int:
        """Requests differ in length; positions are always given explicitly, so nothing may rely on this."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask tensor is ever built: causality comes from the positions."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Positions per slot."""
        return self.owner.max_len

    # Older releases of transformers ask the same question under this name.
    get_max_cache_shape = get_max_length


class SlotKVCache(Cache):
    """`num_slots` requests of up to `max_len` tokens each, over all layers of the model."""

    def __init__(self, num_layers: int, num_slots: int, max_len: int, kernels: KernelSet) -> None:
        self.num_slots, self.max_len, self.kernels = num_slots, max_len, kernels
        empty = torch.zeros(0, dtype=torch.int64)
        self.places = StepPlaces(empty, empty)
        self.slot_layers = [SlotLayer(self) for _ in range(num_layers)]
        # By slot: where the start of its text lies, if not in itself, and how long that is.
        self.prefix_arrays = np.arange(num_slots), np.zeros(num_slots, np.int64)
        self._prefix_places = PrefixPlaces(*map(torch.from_numpy, self.prefix_arrays))
        self._num_sharing = 0
        super().__init__(layers=list(self.slot_layers))

    @property
    def prefixes(self) -> PrefixPlaces | None:
        """Which slots read the start of their text elsewhere, if any do; always the same tensors."""
        return self._prefix_places if self._num_sharing else None

    def share(self, slot: int, owner: int, length: int) -> None:
        """From now on `slot` reads its first `length` positions in `owner`, which holds them itself."""
        self.unshare(slot)
        owners, lengths = self.prefix_arrays
        owners[slot], lengths[slot] = owner, length
        self._num_sharing += length > 0

    def unshare(self, slot: int) -> None:
        """From now on `slot` reads nothing but itself."""
        owners, lengths = self.prefix_arrays
        self._num_sharing -= bool(lengths[slot] > 0)
        owners[slot], lengths[slot] = slot, 0

    def owner(self, slot: int) -> int:
        """Where the start of the slot's text lies."""
        return int(self.prefix_arrays[0][slot])

    def snapshot(self, slot: int, length: int) -> list[LayerCache]:
        """A copy of at least the first `length` positions that a slot itself holds."""
        return [self.kernels.snapshot(*layer.stored, slot, length) for layer in self.slot_layers]

    def restore(self, slot: int, prefix: list[LayerCache]) -> None:
        """Writes a snapshot to the start of a slot."""
        for layer, saved in zip(self.slot_layers, prefix, strict=True):
            self.kernels.restore(*layer.stored, slot, saved)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions that one slot itself holds to another, in all layers."""
        for layer in self.slot_layers:
            self.kernels.copy_prefix(*layer.stored, source, target, length)

    def move(self, slots: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
        """Brings tokens to other places of their slots, in all layers. [n] int64 each."""
        places = [torch.from_numpy(array).to(self.slot_layers[0].stored[0].device) for array in (slots, source, target)]
        for layer in self.slot_layers:
            self.kernels.move_kv(*layer.stored, *places)

    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(part.nbytes for layer in self.slot_layers for part in layer.stored)


def ragged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    slot_cache: SlotKVCache | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over the slot cache. query: [1, H, T, D]; returns [1, T, H, D].

    key and value are what SlotLayer.update returned; `slot_cache` arrives as a keyword of the model's forward call.
    """
    if slot_cache is None:
        raise RuntimeError(f"attention {ATTENTION_NAME} needs slot_cache=... in the model's forward call")
    if s_aux is not None:
        raise NotImplementedError("models with attention sinks (s_aux) are not supported by the torch engine")
    out = slot_cache.kernels.attention(
        query[0].transpose(0, 1),
        key,
        value,
        slot_cache.places,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, ragged_attention_forward)
