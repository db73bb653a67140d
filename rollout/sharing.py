"""Who builds the drafter's index on which node, and who maps it.

Invariants
- A node with several workers has one builder at most; who serves alone builds for itself.
- When a builder is gone, the node's first worker that serves takes its place, with a folder of its own; until the
  others have joined it they build for themselves (drafter.shared_folder). No token depends on any of it.
- Plain bookkeeping: whoever asks does the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.rollout.roster import Worker


@dataclass(frozen=True, slots=True)
class Builder:
    """The builder of a node. path: of its folder, "" while it is being made."""

    worker: Worker
    path: str = ""


class IndexSharing:
    """Builders by node; off until `enabled` is set."""

    def __init__(self) -> None:
        self.enabled = False
        self._builders: dict[str, Builder] = {}

    def elect(self, serving: Sequence[Worker]) -> list[Worker]:
        """New builders, one for each node that needs one; they count as builders from now on."""
        if not self.enabled:
            return []
        out = []
        for node in dict.fromkeys(worker.node for worker in serving):
            here = [worker for worker in serving if worker.node == node]
            if len(here) > 1 and node not in self._builders:
                self._builders[node] = Builder(here[0])
                out.append(here[0])
        return out

    def opened(self, worker: Worker, path: str | None) -> None:
        """The builder has made its folder; None: its drafter has nothing to share, and nobody's has."""
        if path is None:
            self.enabled = False
        else:
            self._builders[worker.node] = Builder(worker, path)

    def path_for(self, worker: Worker) -> str:
        """The folder that the worker is to map, "" where there is none or it is the worker's own."""
        builder = self._builders.get(worker.node)
        return "" if builder is None or builder.worker is worker else builder.path

    def gone(self, worker: Worker) -> None:
        """The worker builds no more."""
        self._builders = {node: one for node, one in self._builders.items() if one.worker is not worker}
