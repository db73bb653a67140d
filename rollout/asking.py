"""Whether asking the drafter pays: its own time beside what its drafts have been worth.

Invariants
- The price of a draft token tells which tokens to verify; this tells whether to look for any. It changes no token.
- A drafted step is worth what it saves: every accepted token spares its request a round, which is worth
  c_base P(request finishes last), and every rejected one costs c_tok (rollout.budget, first order; ours).
- Both are seconds, as measured in the last steps that asked; while asking does not pay, every PROBE_EVERY-th step asks
  all the same. A batch of another size (half or double) begins anew: long requests that are left alone are worth more.
"""

from __future__ import annotations

PROBE_EVERY = 8
MIN_SEEN = 4
FADE = 0.9
"""Per step that asked: a memory of about ten."""


class Asking:
    """Sums over the steps that asked, fading. num_skipped: steps that did not ask although the budget would have."""

    def __init__(self) -> None:
        self._worth_s = self._spent_s = 0.0
        self._seen = self._waited = self._num_live = 0
        self.num_skipped = 0

    def pays(self, num_live: int) -> bool:
        """Whether this step asks, with so many live requests."""
        if not self._num_live / 2 < num_live < 2 * self._num_live:
            self._worth_s = self._spent_s = 0.0
            self._seen, self._waited, self._num_live = 0, 0, num_live
        self._waited += 1
        if self._seen < MIN_SEEN or self._worth_s >= self._spent_s or self._waited >= PROBE_EVERY:
            self._waited = 0
            return True
        self.num_skipped += 1
        return False

    def observe(self, worth_s: float, spent_s: float) -> None:
        """A step that asked: what its drafts were worth, and what asking took."""
        self._worth_s = FADE * self._worth_s + worth_s
        self._spent_s = FADE * self._spent_s + spent_s
        self._seen += 1
