"""What every drafter promises, and the flat arrays it works on.

Invariants
- A drafter only proposes. Nothing it returns, and no exception-free behaviour of it, can change a sampled
  token (law 1): the engine accepts a draft token iff it equals the token the target samples anyway.
- One call per engine step for the whole batch; rows of every array are the live requests in batch order.
- Ragged data is flat: `values[offsets[i]:offsets[i + 1]]` belongs to row i.
- `begin` opens a uid, `end` closes it; `propose` and `extend` only ever see open uids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

SOURCE_NAMES = ("none", "self", "sibling", "history", "prompt", "shared")
"""Where a draft came from; `DraftBatch.source` holds indices into this tuple. `shared` is the text of other prompts."""
SOURCE_NONE, SOURCE_SELF, SOURCE_SIBLING, SOURCE_HISTORY, SOURCE_PROMPT, SOURCE_SHARED = range(len(SOURCE_NAMES))


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different lengths in one array.

    values: [total] any dtype; offsets: [rows + 1] int64, offsets[0] == 0, non-decreasing.
    """

    values: np.ndarray
    offsets: np.ndarray

    def row(self, i: int) -> np.ndarray:
        """Row i as a view."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class LiveBatch:
    """The requests that decode in this engine step.

    uids: [B] int64, the request uids (see rollout.types.Request).
    num_generated: [B] int32, response tokens so far.
    num_remaining: [B] int32, response tokens still allowed by max_new_tokens; at least 1.
    context_len: [B] int32, prompt plus response tokens.
    """

    uids: np.ndarray
    num_generated: np.ndarray
    num_remaining: np.ndarray
    context_len: np.ndarray

    def __len__(self) -> int:
        return len(self.uids)


@dataclass(frozen=True, slots=True)
class Price:
    """What the budget policy allows in this step.

    max_draft: [B] int32, the most draft tokens for each row (0: do not draft).
    min_accept_prob: [B] float32, a draft token whose probability of being accepted is estimated below this is
        not worth verifying. Drafters that estimate no probability ignore it.
    branching: [B] int32, most children of a node of the draft: 1 asks for a chain, more for a tree, None for chains
        everywhere. A drafter that knows no trees drafts a chain.
    """

    max_draft: np.ndarray
    min_accept_prob: np.ndarray
    branching: np.ndarray | None = None


@dataclass(slots=True)
class DraftBatch:
    """Caller-owned output buffers of `Drafter.propose`; a drafter fills them and never replaces them.

    Of row i, the first count[i] places of the two-dimensional buffers are the draft; the others are scratch.

    tokens: [rows, width] int32.
    count: [rows] int32, how many draft tokens each row got; at most Price.max_draft[i] and width.
    source: [rows] int8, index into SOURCE_NAMES, of the first draft token.
    age: [rows] int32, visits since the source was sampled, for source "history" (1: the visit before this one).
    match_len: [rows] int32, length of the context suffix that the draft continues.
    probs: [rows, width] float32, estimated probability that this token and all on the path to it are accepted; NaN
        from drafters that estimate none.
    cells: [rows, width] int16, the calibration cell of each token (see drafter/calibration.py), -1 without one.
    parents: [rows, width] int16, index of the token before each in the same row; -1 is the request's last token.
    """

    tokens: np.ndarray
    count: np.ndarray
    source: np.ndarray
    age: np.ndarray
    match_len: np.ndarray
    probs: np.ndarray
    cells: np.ndarray
    parents: np.ndarray

    @classmethod
    def empty(cls, rows: int, width: int) -> DraftBatch:
        """Buffers for up to `rows` requests and `width` draft tokens each."""
        return cls(
            tokens=np.zeros((rows, width), np.int32),
            count=np.zeros(rows, np.int32),
            source=np.zeros(rows, np.int8),
            age=np.zeros(rows, np.int32),
            match_len=np.zeros(rows, np.int32),
            probs=np.full((rows, width), np.nan, np.float32),
            cells=np.full((rows, width), -1, np.int16),
            parents=np.tile(np.arange(-1, width - 1, dtype=np.int16), (rows, 1)),
        )

    def clear(self, rows: int) -> None:
        """Marks the first `rows` rows as having no draft."""
        self.count[:rows] = 0
        self.source[:rows] = SOURCE_NONE
        self.age[:rows] = 0
        self.match_len[:rows] = 0


@dataclass(frozen=True, slots=True)
class HistoryRecord:
    """One finished rollout as the drafter keeps it.

    prompt_id: stable name of the prompt; step: the training step that sampled it; uid: the request's; tokens: [n]
    int32 response; reward: its score, NaN where it has none; version: of the policy that sampled the last token, -1
    where it is not known; censored: the length limit cut it (the token log does not keep this: lengths are learned
    when a rollout finishes).
    """

    prompt_id: str
    step: int
    uid: int
    tokens: np.ndarray = field(repr=False)
    reward: float = float("nan")
    version: int = -1
    censored: bool = False


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft tokens for a batch and learns from what was accepted."""

    name: str

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """Opens a request. prompt: [p] int32. Response tokens it continues from arrive by `extend` right after."""

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """Fills `out` for the rows of `batch`: one call per engine step."""

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """Row i of `accepted` ([total] int32) holds the tokens just committed to `batch.uids[i]`."""

    def end(self, uid: int, finished: bool) -> None:
        """Closes a request. `finished`: it ended by itself; False when it was aborted."""

    def calibrate(self, probabilities: np.ndarray) -> None:
        """[NUM_CELLS] float32: what was measured of every calibration cell; drafters without cells ignore it."""

    def publish(self, step: int, records: list[HistoryRecord]) -> None:
        """Step boundary: rolls the window; `records` are all finished rollouts of the step, from every worker."""
