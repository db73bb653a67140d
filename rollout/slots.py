"""The live requests as flat arrays, so that a step needs no Python per request.

Invariants
- A slot is free or taken, and holds a request only if taken; `order` lists those with requests in order of admission.
- tokens[s, :length[s]] is prompt plus response; 0 <= cached[s] < length[s]: the keys and values of the first
  cached[s] tokens are in the cache, the others are pending.
- What lies beyond length[s] in any array is scratch (draft tokens are written there before they are verified).
"""

from __future__ import annotations

import numpy as np

from slipstream.drafter.base import SOURCE_NAMES, LiveBatch
from slipstream.kernels.reference import SamplingRows
from slipstream.rollout.types import FinishReason, Request, Rollout, SpecStats


class SlotTable:
    """State of up to `num_slots` requests of up to `max_len` tokens."""

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots, self.max_len = num_slots, max_len
        self.requests: list[Request | None] = [None] * num_slots
        self.order = np.zeros(0, np.int64)
        self.slot_of: dict[int, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self.tokens = np.zeros((num_slots, max_len), np.int32)
        self.logprobs = np.zeros((num_slots, max_len), np.float32)
        self.versions = np.zeros((num_slots, max_len), np.int32)
        self.prompt_len = np.zeros(num_slots, np.int64)
        self.length = np.zeros(num_slots, np.int64)
        self.cached = np.zeros(num_slots, np.int64)
        self.end = np.zeros(num_slots, np.int64)
        self.uid = np.zeros(num_slots, np.int64)
        self.seed = np.zeros(num_slots, np.uint64)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_p = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int32)
        self.stop_ids = np.zeros((num_slots, 1), np.int32)
        self.num_stops = np.zeros(num_slots, np.int64)
        self.rounds = np.zeros(num_slots, np.int64)
        self.drafted = np.zeros(num_slots, np.int64)
        self.accepted = np.zeros((num_slots, len(SOURCE_NAMES)), np.int64)
        # Seconds of one request among the live, over all steps so far; and what they were when a slot was taken.
        self._spent = (0.0, 0.0)
        self._spent_before = [self._spent] * num_slots

    @property
    def num_free(self) -> int:
        """Slots that nobody has taken."""
        return len(self._free)

    def take(self) -> int:
        """A free slot, which is not free any more."""
        return self._free.pop()

    def free(self, slot: int) -> None:
        """A slot without a request is free again."""
        self._free.append(slot)

    def admit(self, request: Request, slot: int) -> None:
        """`request` holds the slot that was taken; nothing is cached yet."""
        prompt_len, prefill_len = len(request.prompt), len(request.prefill)
        sampling = request.sampling
        self.requests[slot] = request
        self.slot_of[request.uid] = slot
        self.order = np.append(self.order, slot)
        self.tokens[slot, :prompt_len] = request.prompt
        self.tokens[slot, prompt_len : prompt_len + prefill_len] = request.prefill
        self.prompt_len[slot] = prompt_len
        self.length[slot] = prompt_len + prefill_len
        self.cached[slot] = 0
        self.end[slot] = min(prompt_len + sampling.max_new_tokens, self.max_len)
        self.uid[slot], self.seed[slot] = request.uid, sampling.seed
        self.temperature[slot], self.top_p[slot], self.top_k[slot] = (
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
        )
        self._set_stops(slot, sampling.stop_token_ids)
        for counter in (self.rounds, self.drafted, self.accepted):
            counter[slot] = 0
        self._spent_before[slot] = self._spent

    def num_pending(self) -> int:
        """Tokens of live requests whose keys and values are not in the cache."""
        return int((self.length[self.order] - self.cached[self.order]).sum())

    def spend(self, draft_s: float, verify_s: float) -> None:
        """Every live request took part in a step and spent this much on it."""
        self._spent = self._spent[0] + draft_s, self._spent[1] + verify_s

    def _set_stops(self, slot: int, ids: tuple[int, ...]) -> None:
        missing = len(ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)))
        self.stop_ids[slot, : len(ids)] = ids
        self.num_stops[slot] = len(ids)

    def live_batch(self, slots: np.ndarray) -> LiveBatch:
        """What drafters and budgets see of these slots."""
        length = self.length[slots]
        return LiveBatch(
            uids=self.uid[slots],
            num_generated=(length - self.prompt_len[slots]).astype(np.int32),
            num_remaining=(self.end[slots] - length).astype(np.int32),
            context_len=length.astype(np.int32),
        )

    def sampling_rows(self, slots: np.ndarray) -> SamplingRows:
        """Sampling parameters of these slots; noise positions are response indices."""
        length = self.length[slots]
        num_stops = self.num_stops[slots]
        offsets = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(num_stops, out=offsets[1:])
        used = np.arange(self.stop_ids.shape[1]) < num_stops[:, None]
        return SamplingRows(
            seed=self.seed[slots],
            uid=self.uid[slots].view(np.uint64),
            position=(length - self.prompt_len[slots]).astype(np.int32),
            temperature=self.temperature[slots],
            top_p=self.top_p[slots],
            top_k=self.top_k[slots],
            remaining=(self.end[slots] - length).astype(np.int32),
            stop_ids=self.stop_ids[slots][used],
            stop_offsets=offsets,
        )

    def retire(self, slot: int, finish: FinishReason, error: str = "") -> Rollout:
        """Takes the request from the slot, which stays taken, and returns what it holds as a rollout."""
        request = self._request(slot)
        first, last = self.prompt_len.item(slot) + len(request.prefill), self.length.item(slot)
        accepted = self.accepted[slot].tolist()
        spec = SpecStats(
            rounds=self.rounds.item(slot),
            drafted=self.drafted.item(slot),
            accepted=sum(accepted),
            by_source={name: n for name, n in zip(SOURCE_NAMES, accepted, strict=True) if n},
            draft_seconds=self._spent[0] - self._spent_before[slot][0],
            verify_seconds=self._spent[1] - self._spent_before[slot][1],
        )
        rollout = Rollout(
            request=request,
            tokens=self.tokens[slot, first:last].copy(),
            logprobs=self.logprobs[slot, first:last].copy(),
            policy_versions=self.versions[slot, first:last].copy(),
            finish=finish,
            spec=spec,
            error=error,
        )
        self.requests[slot] = None
        del self.slot_of[request.uid]
        self.order = self.order[self.order != slot]
        return rollout

    def _request(self, slot: int) -> Request:
        request = self.requests[slot]
        if request is None:
            raise RuntimeError(f"slot {slot} holds no request")
        return request
