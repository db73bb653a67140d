"""Each prompt of a group is prefilled once; the group's samples read its keys and values where they lie.

Invariants
- A prompt has at most one owner at a time: the slot in which it is prefilled. Samples that come after it read the
  prompt there, all but its last token, whose logits their first token is drawn from; a slot that reads owns nothing.
- What an owner holds of the prompt stays while others read it or are queued with it: when the owner's request has
  ended the slot is kept, without a request, until nobody needs it or its room is. Then the next sample of the prompt
  takes it, the prompt in place; or it is copied once, into the room of one that reads it, or aside for the queued.
- A sample never waits for an owner that is done with the prompt in the pass that the sample first takes part in: all
  keys and values of a pass are stored before any are read.
- Nobody starts to read what was computed with weights that have changed since.
- Kernels that cannot read elsewhere get a copy, and wait until it can be made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slipstream.rollout.kv_cache import SlotKVCache
from slipstream.rollout.slots import SlotTable
from slipstream.rollout.types import Request


@dataclass(slots=True)
class _Entry:
    """A prompt that requests are queued with. snapshot: of a prompt that has lost its slot."""

    queued: int = 0
    owner: int | None = None
    snapshot: Any = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a slot without a request still holds."""

    key: bytes
    length: int


class PrefixStore:
    """Gives requests their slots, and decides who prefills a prompt and who reads it. shares: whether the kernels read
    elsewhere."""

    def __init__(self, table: SlotTable, cache: SlotKVCache, shares: bool) -> None:
        self._table, self._cache, self._shares = table, cache, shares
        self._entries: dict[bytes, _Entry] = {}
        self._readers: dict[int, set[int]] = {}
        self._kept: dict[int, _Kept] = {}
        self._reads_ahead = False
        self._num_shared = self._num_copied = 0

    @property
    def num_free(self) -> int:
        """Slots that a request may be given."""
        return self._table.num_free + len(self._kept)

    def take_counts(self) -> tuple[int, int]:
        """Prompt tokens since the last call that were neither computed nor copied, and those copied."""
        counts = self._num_shared, self._num_copied
        self._num_shared = self._num_copied = 0
        return counts

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
            self._drop_unread(entry.owner)

    def must_wait(self, request: Request, room: int) -> bool:
        """Whether the request has to be admitted later: its prompt is still being prefilled and cannot be read yet, or
        it would take the room in which one is prefilled that others have begun to read. room: tokens that the coming
        pass has left when all pending tokens of the live requests are in it."""
        entry = self._entries[request.prompt.tobytes()]
        owner, pending = entry.owner, 1 + len(request.prefill)
        if owner is None or owner in self._kept or self._prefilled(owner):
            lacking = len(request.prompt) - 1 if owner is None and entry.snapshot is None else 0
            return self._reads_ahead and room < pending + lacking
        return not self._shares or room < pending

    def begin_pass(self) -> None:
        """Requests are about to be admitted to the coming pass."""
        self._reads_ahead = False

    def admit(self, request: Request) -> int:
        """Gives a queued request a slot, with what is there already of its prompt; the slot."""
        entry, length = self._entries[request.prompt.tobytes()], len(request.prompt) - 1
        in_place = entry.owner is not None and entry.owner in self._kept
        slot = self._take_slot(entry)
        self._table.admit(request, slot)
        if in_place:
            self._num_shared += length
        elif entry.owner is None and entry.snapshot is None:
            entry.owner = slot
            length = 0
        elif entry.owner is None:
            self._cache.restore(slot, entry.snapshot)
            entry.owner, entry.snapshot = slot, None
            self._num_copied += length
        elif self._shares:
            self._reads_ahead |= not self._prefilled(entry.owner)
            self._cache.share(slot, entry.owner, length)
            self._readers.setdefault(entry.owner, set()).add(slot)
            self._num_shared += length
        else:
            self._copy(entry.owner, slot, length)
        self._table.cached[slot] = length
        self.dequeue(request)
        return slot

    def leave(self, slot: int) -> None:
        """The request of a slot is about to end: its slot is free, unless others need the prompt in it."""
        request = self._table.requests[slot]
        self._stop_reading(slot)
        key = b"" if request is None else request.prompt.tobytes()
        entry = self._entries.get(key)
        owns = entry is not None and entry.owner == slot
        if entry is not None and owns and not self._prefilled(slot):
            entry.owner, owns = None, False
        if owns or slot in self._readers:
            self._kept[slot] = _Kept(key, int(self._table.prompt_len[slot]) - 1)
        else:
            self._table.free(slot)

    def forget(self) -> None:
        """The weights changed: nobody starts to read what was computed with the old ones. Who reads it goes on."""
        for entry in self._entries.values():
            entry.owner, entry.snapshot = None, None
        for slot in list(self._kept):
            self._drop_unread(slot)

    def restart(self) -> None:
        """All live requests are about to compute everything again, each by itself."""
        self.forget()
        for slots in list(self._readers.values()):
            for slot in slots.copy():
                self._stop_reading(slot)

    def _take_slot(self, entry: _Entry) -> int:
        if entry.owner is not None and self._kept.pop(entry.owner, None) is not None:
            return entry.owner
        if self._table.num_free:
            return self._table.take()
        slot, kept = next(iter(self._kept.items()))
        del self._kept[slot]
        self._give_way(slot, kept)
        return slot

    def _give_way(self, slot: int, kept: _Kept) -> None:
        """Another request needs the slot."""
        entry, readers = self._entries.get(kept.key), self._readers.pop(slot, set())
        owns = entry is not None and entry.owner == slot
        heir = min(readers, default=None)
        if heir is not None:
            self._cache.unshare(heir)
            self._copy(slot, heir, kept.length)
            readers.remove(heir)
            for reader in readers:
                self._cache.share(reader, heir, kept.length)
            if readers:
                self._readers[heir] = readers
        if entry is not None and owns:
            entry.owner = heir
            if heir is None:
                entry.snapshot = self._cache.snapshot(slot, kept.length)
                self._num_copied += kept.length

    def _copy(self, source: int, target: int, length: int) -> None:
        if length:  # before the first pass there is no memory yet
            self._cache.copy_prefix(source, target, length)
        self._num_copied += length

    def _stop_reading(self, slot: int) -> None:
        owner = self._cache.owner(slot)
        if owner == slot:
            return
        self._cache.unshare(slot)
        readers = self._readers[owner]
        readers.remove(slot)
        if not readers:
            del self._readers[owner]
            self._drop_unread(owner)

    def _drop_unread(self, slot: int | None) -> None:
        """A slot that is kept is free if nobody reads it or is queued with its prompt."""
        kept = None if slot is None else self._kept.get(slot)
        if slot is None or kept is None or slot in self._readers:
            return
        entry = self._entries.get(kept.key)
        if entry is None or entry.owner != slot:
            del self._kept[slot]
            self._table.free(slot)

    def _prefilled(self, slot: int) -> bool:
        return bool(self._table.cached[slot] >= self._table.prompt_len[slot] - 1)
