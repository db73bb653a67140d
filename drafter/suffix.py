"""The DAS drafter: continue the longest match in earlier rollouts of the same prompt (arXiv 2511.13841, 4.1).

Invariants
- A request drafts from its prompt's windowed history, from the prompt itself, from every sibling in flight as its
  tokens are accepted, and from its own text. Only where these promise little it drafts from other prompts' rollouts
  (`shared_tokens`; ours: the paper keeps to one prompt and starts cold).
- Occurrences of older visits fade geometrically, by `decay` per visit (the paper asks for a "mild" down-weight without
  a formula; the rule and its default are ours).
- The history log is the only state: indexes are made from it and may be dropped at any time.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from slipstream.drafter.base import DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.history import HistoryLog
from slipstream.drafter.shared_folder import SharedFolder
from slipstream.drafter.suffix_native import NativeSuffixIndexes
from slipstream.drafter.suffix_plain import PlainSuffixIndexes
from slipstream.kernels.dispatch import NATIVE_ERROR

IndexChoice = Literal["auto", "native", "reference"]
INDEX_CHOICES = ("auto", "native", "reference")


class SuffixIndexes(Protocol):
    """The indexes of all prompts, behind the drafter; methods as in drafter/base.py."""

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """See Drafter.begin."""

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """See Drafter.propose."""

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """See Drafter.extend."""

    def end(self, uid: int, finished: bool) -> None:
        """See Drafter.end."""

    def share(self, folder: SharedFolder) -> None:
        """See SuffixDrafter.share."""

    def calibrate(self, probabilities: np.ndarray) -> None:
        """See Drafter.calibrate."""

    def publish(self, records: list[HistoryRecord]) -> None:
        """The history has taken `records` in: make the indexes follow."""

    def wait(self) -> None:
        """See SuffixDrafter.wait."""

    def follow_weights(self, prompt_id: str, context: list[int]) -> dict[int, float]:
        """Weight of every token that followed `context` in what the prompt's requests draft from."""


class SuffixDrafter:
    """History plus siblings in flight, per prompt.

    min_match: tokens of context that must match. decay: weight of a visit relative to the next newer one. escape:
    weight, in newest occurrences, of "something never seen here". index: `native` needs the extension (KernelError
    without it), `reference` is plain Python, `auto` takes native when it is built; `index_name` and `index_reason` tell
    which and why. The rest is of the native index alone. max_index_tokens: cap over all prompts; shared_tokens: of the
    newest rollouts of all prompts together, 0 keeps every prompt to itself; num_threads: for batches of threads_from
    rows and more; folder: where the workers of a node share what one of them builds.
    """

    name = "suffix"

    def __init__(
        self,
        window_epochs: int = 16,
        min_match: int = 1,
        decay: float = 0.95,
        escape: float = 0.5,
        index: IndexChoice = "auto",
        max_index_tokens: int = 64_000_000,
        shared_tokens: int = 4_000_000,
        num_threads: int = 1,
        threads_from: int = 1024,
        folder: SharedFolder | None = None,
    ) -> None:
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay is {decay}; allowed: above 0 and at most 1")
        if index not in INDEX_CHOICES:
            raise ValueError(f"index is {index}; allowed: {', '.join(INDEX_CHOICES)}")
        self.history = HistoryLog(window_epochs)
        self.index_reason = NATIVE_ERROR if index == "auto" and NATIVE_ERROR else f"index={index}"
        self.index_name = "reference" if index == "reference" or (index == "auto" and NATIVE_ERROR) else "native"
        self._indexes: SuffixIndexes
        if self.index_name == "native":
            self._indexes = NativeSuffixIndexes(
                self.history,
                min_match,
                decay,
                escape,
                max_index_tokens,
                shared_tokens,
                num_threads,
                threads_from,
                folder,
            )
        else:
            self._indexes = PlainSuffixIndexes(self.history, min_match, decay, escape)

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """Opens a request. Raises ValueError when the uid is open already."""
        self._indexes.begin(uid, prompt_id, prompt)

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """The continuation of each row's matches that promises most. Raises KeyError for a uid that is not open."""
        self._indexes.propose(batch, price, out)

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """Siblings see accepted tokens from the next step on. Raises KeyError for a uid that is not open."""
        self._indexes.extend(batch, accepted)

    def end(self, uid: int, finished: bool) -> None:
        """Closes a request; what it generated stays visible to its siblings."""
        self._indexes.end(uid, finished)

    def share(self, folder: SharedFolder) -> None:
        """From now on builds for the workers of this node, or maps what their builder builds. A reader may join another
        builder later, or become the builder; what it has built or mapped stays until its prompt's next visit."""
        self._indexes.share(folder)

    def calibrate(self, probabilities: np.ndarray) -> None:
        """From now on the probability of a calibration cell is what was measured of it. [NUM_CELLS] float32."""
        self._indexes.calibrate(probabilities)

    def publish(self, step: int, records: list[HistoryRecord]) -> None:
        """Rolls the window: this step's rollouts join, from every worker, and old visits leave."""
        self.history.add(records)
        self._indexes.publish(records)

    def wait(self) -> None:
        """Returns when everything published is built; nothing needs it but what measures or inspects."""
        self._indexes.wait()

    def follow_weights(self, prompt_id: str, context: list[int]) -> dict[int, float]:
        """Weight of every token that followed `context` in what the prompt's requests draft from: for inspection."""
        return self._indexes.follow_weights(prompt_id, context)
