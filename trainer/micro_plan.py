"""Which samples go into which micro-batch of which learner: pure, and the same on every learner.

Invariants
- Every sample is in exactly one micro-batch. A micro-batch has at most `max_tokens` tokens, or is a single sample.
- Every learner has the same number of micro-batches, because sharded weights are gathered in each by all of them
  together; an empty one stands where there is nothing left to do.
- A plan is a function of the lengths alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Plan = list[list[list[int]]]
"""[learner][micro-batch] -> places of the samples in the list that was planned."""


def token_cost(length: int, hidden_size: int) -> float:
    """Work of a sequence, in tokens of a short one.

    A layer's matrices cost 24 h^2 operations for a token, causal attention over `length` tokens 2 h length on average
    (Kaplan et al., arXiv 2001.08361, table 1, with d_attn = h and 12 h^2 parameters to a layer): length / 12 h on top.
    """
    return length * (1.0 + length / (12.0 * hidden_size))


def plan_padded(lengths: Sequence[int], max_tokens: int, num_learners: int) -> Plan:
    """Rows of similar length together, so that padding is small; the padded area counts against `max_tokens`.

    The sorted samples are dealt in turns, so the learners' sums differ by at most the longest sample.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return _even([_cut(order[first::num_learners], lengths, max_tokens) for first in range(num_learners)])


def plan_packed(lengths: Sequence[int], max_tokens: int, num_learners: int, hidden_size: int) -> Plan:
    """As few micro-batches as keep to `max_tokens`, of even cost; those that run together are the most alike.

    The costliest samples first, each to the cheapest micro-batch (LPT): the costliest micro-batch is at most 4/3 of
    the optimum's (Graham 1969).
    """
    costs = [token_cost(length, hidden_size) for length in lengths]
    rounds = max(1, -(-sum(lengths) // (num_learners * max_tokens)))
    while not _fits(parts := balance(costs, rounds * num_learners), lengths, max_tokens):
        rounds += 1
    parts.sort(key=lambda part: -sum(costs[i] for i in part))
    return [parts[learner::num_learners] for learner in range(num_learners)]


def balance(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Deals the places of `costs` to `num_parts` parts of similar sum: the largest first, to the smallest part."""
    heap = [(0.0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, part = heapq.heappop(heap)
        parts[part].append(i)
        heapq.heappush(heap, (load + costs[i], part))
    return parts


def _fits(parts: list[list[int]], lengths: Sequence[int], max_tokens: int) -> bool:
    return all(len(part) <= 1 or sum(lengths[i] for i in part) <= max_tokens for part in parts)


def _cut(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cuts samples that come in order of their lengths."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def _even(plan: Plan) -> Plan:
    rounds = max(1, *map(len, plan))
    return [batches + [[] for _ in range(rounds - len(batches))] for batches in plan]
