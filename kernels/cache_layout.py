"""How keys and values of one layer lie in memory: the CPU's key-blocked cache, and where a step's tokens live in it.

Invariants
- The kernel set that reads a cache also allocates, saves and restores it: nobody else knows its layout.
- A snapshot holds at least the first `length` positions of a slot; restoring it touches no other place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from slipstream.kernels.reference import KEY_BLOCK

LayerCache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class TreePlaces:
    """A pass with draft trees: positions, parents: [T] int64, as in reference.ragged_attention."""

    positions: torch.Tensor
    parents: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefixPlaces:
    """Slots that read the start of their text in another one: slots, lengths: [S] int64, as in
    reference.ragged_attention."""

    slots: torch.Tensor
    lengths: torch.Tensor


@dataclass(slots=True)
class StepPlaces:
    """Where the tokens of the current forward pass live: slots, positions: [T] int64 on the cache's device.

    table: the requests of the pass as the Triton kernels take them (kernels/triton/step_table.py); None for kernels
    that need positions only. tree: where a token's place in its slot need not be its position; `positions` is then its
    place. prefixes: where some slot reads what another one holds.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    table: Any = None
    tree: TreePlaces | None = None
    prefixes: PrefixPlaces | None = None


class BlockedCache(ABC):
    """The CPU's layout: keys [S, Hkv, L / 16, D, 16], values [S, Hkv, L, D]; see reference.append_kv."""

    on_device = False
    """Whether sampling runs where the logits are, without a host round trip of its own."""
    trees = True
    """Whether drafts may branch."""
    shares_prefixes = True
    """Whether a slot may read the start of its text in another one."""

    def new_layer_cache(
        self, num_slots: int, length: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> LayerCache:
        """Zeroed keys and values of one layer for `num_slots` requests of at least `length` positions.

        key_states, value_states: [1, Hkv, T, D], for head counts, widths, dtype and device.
        """
        heads, blocks = key_states.shape[1], -(-length // KEY_BLOCK)
        keys = key_states.new_zeros(num_slots, heads, blocks, key_states.shape[3], KEY_BLOCK)
        return keys, value_states.new_zeros(num_slots, heads, blocks * KEY_BLOCK, value_states.shape[3])

    def snapshot(self, keys: torch.Tensor, values: torch.Tensor, slot: int, length: int) -> LayerCache:
        """A copy of at least the first `length` positions of a slot."""
        blocks = -(-length // KEY_BLOCK)
        return keys[slot, :, :blocks].clone(), values[slot, :, : blocks * KEY_BLOCK].clone()

    def restore(self, keys: torch.Tensor, values: torch.Tensor, slot: int, saved: LayerCache) -> None:
        """Writes a snapshot to the start of a slot."""
        keys[slot, :, : saved[0].shape[1]] = saved[0]
        values[slot, :, : saved[1].shape[1]] = saved[1]

    def copy_prefix(self, keys: torch.Tensor, values: torch.Tensor, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another, and nothing else."""
        whole, rest = length // KEY_BLOCK, length % KEY_BLOCK
        keys[target, :, :whole] = keys[source, :, :whole]
        if rest:
            keys[target, :, whole, :, :rest] = keys[source, :, whole, :, :rest]
        values[target, :, :length] = values[source, :, :length]

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
        """Attention of the step's tokens, [T, H, D]; see reference.ragged_attention."""
        tree = (None, None) if places.tree is None else (places.tree.positions, places.tree.parents)
        shared = (None, None) if places.prefixes is None else (places.prefixes.slots, places.prefixes.lengths)
        where = places.slots, places.positions
        return self.ragged_attention(query, keys, values, *where, scale, window, softcap, *tree, *shared)

    @abstractmethod
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
        """See reference.ragged_attention."""
