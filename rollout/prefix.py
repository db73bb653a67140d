"""Each prompt of a group is prefilled once; its keys and values are shared by the group's samples.

Invariants: an entry lives as long as requests with its prompt are queued; a prompt has at most one leader (the live
request that prefills it) at a time; everything cached is dropped when the policy's weights change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slipstream.rollout.kv_cache import SlotKVCache
from slipstream.rollout.slots import SlotTable
from slipstream.rollout.types import Request


@dataclass(slots=True)
class _Entry:
    queued: int = 0
    leader_uid: int | None = None
    snapshot: Any = field(default=None, repr=False)


class PrefixStore:
    """Decides who prefills a prompt and who copies it. The last prompt token is always run by every sample: its
    logits are what the sample's first token is drawn from."""

    def __init__(self, table: SlotTable, cache: SlotKVCache) -> None:
        self._table, self._cache = table, cache
        self._entries: dict[bytes, _Entry] = {}

    def enqueue(self, request: Request) -> None:
        """A request with this prompt joined the queue."""
        self._entries.setdefault(request.prompt.tobytes(), _Entry()).queued += 1

    def dequeue(self, request: Request) -> None:
        """A request with this prompt left the queue."""
        key = request.prompt.tobytes()
        entry = self._entries[key]
        entry.queued -= 1
        if entry.queued == 0:
            del self._entries[key]

    def must_wait(self, request: Request) -> bool:
        """Whether another live request is still prefilling this prompt: wait a step, then copy."""
        entry = self._entries[request.prompt.tobytes()]
        slot = self._table.slot_of.get(entry.leader_uid) if entry.leader_uid is not None else None
        return entry.snapshot is None and slot is not None and not self._prefilled(slot)

    def attach(self, request: Request, slot: int) -> None:
        """`request`, still counted as queued, was admitted to `slot`: copies the shared prefix or makes it leader."""
        entry = self._entries[request.prompt.tobytes()]
        if entry.snapshot is None:
            self._take_snapshot(entry)
        if entry.snapshot is not None:
            self._cache.restore(slot, entry.snapshot)
            self._table.cached[slot] = len(request.prompt) - 1
        elif len(request.prompt) > 1:
            entry.leader_uid = request.uid

    def before_retire(self, slot: int) -> None:
        """A slot is about to be freed: saves its prefix when queued siblings still need it."""
        request = self._table.requests[slot]
        entry = self._entries.get(request.prompt.tobytes()) if request is not None else None
        if request is None or entry is None or entry.leader_uid != request.uid:
            return
        if entry.snapshot is None:
            self._take_snapshot(entry)
        entry.leader_uid = None

    def forget(self) -> None:
        """The weights changed: what was computed with the old ones must not be shared any more."""
        for entry in self._entries.values():
            entry.leader_uid, entry.snapshot = None, None

    def _take_snapshot(self, entry: _Entry) -> None:
        slot = self._table.slot_of.get(entry.leader_uid) if entry.leader_uid is not None else None
        if slot is not None and self._prefilled(slot):
            entry.snapshot = self._cache.snapshot(slot, int(self._table.prompt_len[slot]) - 1)

    def _prefilled(self, slot: int) -> bool:
        return bool(self._table.cached[slot] >= self._table.prompt_len[slot] - 1)
