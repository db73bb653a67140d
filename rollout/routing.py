"""Which worker gets which requests: units, and who takes the next one.

Invariants: pure and deterministic; no request is lost or dealt twice; a worker never holds more than its limit; where a
request runs changes no token.

Routing `prompt` sends a prompt to the worker that served it before, as long as that worker is not loaded too much:
consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, SODA 2018, arXiv 1608.01350). The order in
which a prompt prefers workers is that of highest random weights (Thaler and Ravishankar 1998) in place of a ring: when
a worker joins or leaves, only the prompts that it gains or had served move. It pays where workers share no index.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slipstream.rollout.types import Request

Routing = Literal["sample", "group", "prompt"]


@dataclass(frozen=True, slots=True)
class Unit:
    """Requests that go to the same worker. tokens: expected response tokens of each."""

    requests: tuple[Request, ...]
    tokens: float

    @property
    def load(self) -> float:
        """Expected response tokens of all."""
        return self.tokens * len(self.requests)


def make_units(
    requests: Sequence[Request], predicted: Mapping[str, float], routing: Routing, max_requests: int
) -> list[Unit]:
    """Requests in units of at most max_requests, in the order they came.

    routing: `sample` makes single requests, so that a long prompt's samples share the workers evenly; `group` and
    `prompt` keep a group together, so that its prompt is prefilled once and all its siblings draft from each other.
    predicted: expected response tokens per prompt_id; unknown prompts count as the mean of the known ones.
    """
    fallback = sum(predicted.values()) / len(predicted) if predicted else 1.0
    together: dict[tuple[int, str], list[Request]] = defaultdict(list)
    for i, request in enumerate(requests):
        together[(i, "") if routing == "sample" else (request.group, request.prompt_id)].append(request)
    return [
        Unit(tuple(unit[first : first + max_requests]), predicted.get(unit[0].prompt_id, fallback))
        for unit in together.values()
        for first in range(0, len(unit), max_requests)
    ]


def longest_first(units: Iterable[Unit]) -> list[Unit]:
    """By what one of its requests is expected to take: the longest must not be the last to start."""
    return sorted(units, key=lambda unit: -unit.tokens)


@dataclass(frozen=True, slots=True)
class Dealer:
    """max_held: requests that a worker holds at most; load_limit: of `prompt`, times the mean load, above 1."""

    routing: Routing
    max_held: int
    load_limit: float = 1.25

    def deal(self, units: Sequence[Unit], held: Mapping[str, int], load: Mapping[str, float]) -> list[str]:
        """Who takes the units, first things first; shorter than `units` where the next one fits nobody.

        held, load: requests and expected tokens that each worker has. The least loaded worker takes a unit, with
        `prompt` the first in the prompt's order whose load is at most load_limit times the mean, the unit included.
        """
        held_now, load_now = dict(held), dict(load)
        out: list[str] = []
        for unit in units:
            free = [name for name, count in held_now.items() if count + len(unit.requests) <= self.max_held]
            if not free:
                break
            taker = self._choose(unit, free, load_now)
            held_now[taker] += len(unit.requests)
            load_now[taker] += unit.load
            out.append(taker)
        return out

    def _choose(self, unit: Unit, free: Sequence[str], load: Mapping[str, float]) -> str:
        if self.routing == "prompt":
            most = self.load_limit * (sum(load.values()) + unit.load) / len(load)
            for name in preference(unit.requests[0].prompt_id, free):
                if load[name] <= most:
                    return name
        return min(free, key=load.__getitem__)


def preference(prompt_id: str, names: Iterable[str]) -> list[str]:
    """Workers in the order in which a prompt goes to them: by a hash of both, equal on every machine."""

    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{prompt_id}\0{name}".encode(), digest_size=8).digest()

    return sorted(names, key=lambda name: (weight(name), name))
