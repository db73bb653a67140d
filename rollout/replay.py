"""Replays rollouts against a cost model: the makespan of a policy without a model or a GPU, for thousands of workers.

Invariants
- Pure numbers: a trace holds lengths and how well drafts fit, a policy is the very object that an engine would use.
- Between two events of a worker (a tenth of its live requests done, at least one) its prices stand still and requests
  advance at their mean speed: steps are then linear in time and are summed, not simulated one by one. With few live
  requests every end is an event of its own. What is lost is the chance in a single round, not the tail of the lengths.
- Workers share nothing but the clock's zero; the makespan is the longest of their times.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from slipstream.drafter.base import LiveBatch
from slipstream.rollout.budget import BudgetPolicy
from slipstream.rollout.closed_form import ClosedFormBudget
from slipstream.rollout.cost_model import CostModel, StepCost
from slipstream.rollout.lengths import LengthModel, LiveLengths

H100_7B = StepCost(base=7.5e-3, live=0.0, kv=0.0, tok=2.6e-5)
"""DAS, Fig 8 (DeepSeek-R1-Distill-Qwen-7B on an H100), read off the plot: 7.5 ms at no tokens, 34 ms at 1,000, 98 ms at
3,600. Its axis mixes more requests with more tokens per request, so attention is inside tok."""
CPU_QUICKSTART = StepCost(base=1.8e-3, live=5e-6, kv=0.0, tok=3.0e-5)
"""Fitted on our own runs: the quickstart's policy, one thread of a shared AMD EPYC core, up to 32 live requests."""
EVENT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of one batch.

    prompt: [n] int64, index into history. prompt_tokens, length: [n] tokens. accept: [n, m] the chance that a draft
    token is accepted given its path, in each of m kinds of context; share: [m] how often a round meets each kind. A
    kind with accept 0 offers no draft. history: earlier response lengths of each prompt. cap_tokens: the length limit.
    """

    prompt: np.ndarray
    prompt_tokens: np.ndarray
    length: np.ndarray
    accept: np.ndarray
    share: np.ndarray
    history: list[np.ndarray]
    cap_tokens: int

    def __post_init__(self) -> None:
        count = len(self.length)
        if not count or (self.length < 1).any():
            raise ValueError("a trace needs requests, and every one at least one token")
        if self.accept.shape != (count, len(self.share)) or not ((self.accept >= 0) & (self.accept < 1)).all():
            raise ValueError(f"accept is {self.accept.shape}; allowed: [{count}, {len(self.share)}] values in [0, 1)")

    def length_model(self) -> LengthModel:
        """What the history teaches."""
        model = LengthModel()
        visits = max((len(values) for values in self.history), default=0)
        for visit in range(visits):
            known = [(f"{i}", int(values[visit])) for i, values in enumerate(self.history) if visit < len(values)]
            model.observe([n for n, _ in known], [v for _, v in known], [v >= self.cap_tokens for _, v in known])
        return model


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """worker_s: [workers] seconds each was busy; rounds: of the worker with the most passes; the others are totals."""

    worker_s: np.ndarray
    rounds: float
    drafted: float
    accepted: float
    forward_tokens: float

    @property
    def makespan_s(self) -> float:
        """Seconds until the last worker is done."""
        return float(self.worker_s.max())


@dataclass(slots=True)
class _State:
    """Requests in the order of their workers; in each, the order in which they start."""

    trace: Trace
    order: np.ndarray
    owner: np.ndarray
    generated: np.ndarray
    started: np.ndarray
    seconds: np.ndarray
    passes: np.ndarray
    totals: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def live(self) -> np.ndarray:
        return np.flatnonzero(self.started & (self.generated < self.trace.length[self.order]))


def replay(
    trace: Trace,
    cost: StepCost,
    policy: BudgetPolicy,
    *,
    num_workers: int = 1,
    max_live: int = 256,
    max_draft_tokens: int = 32,
) -> ReplayResult:
    """Runs the trace with a fresh policy object; every worker has max_live slots and a cost model like `cost`."""
    model = trace.length_model()
    tables = np.stack([model.table(f"{i}") for i in range(len(trace.history))])
    initial = np.array([model.initial_class(f"{i}") for i in range(len(trace.history))], np.int64)
    state = _deal(trace, model, num_workers)
    known = KnownCost(cost)
    _start(state, cost, max_live)
    speed, width = np.ones(len(state.order)), np.zeros(len(state.order))
    while len(rows := state.live()):
        request = state.order[rows]
        prompt = trace.prompt[request]
        waiting = np.bincount(state.owner[~state.started], minlength=num_workers)[state.owner[rows]]
        view = LiveLengths(model, tables, prompt, initial[prompt], speed[rows], waiting, state.owner[rows], width[rows])
        done = state.generated[rows].astype(np.int32)
        # What decides is not shown: the length that the trace knows.
        live = LiveBatch(request, done, np.maximum(trace.cap_tokens - done, 1), done + trace.prompt_tokens[request])
        drafted, accepted = _drafts(trace, request, policy, live, known, view, max_draft_tokens)
        # A policy that looks at its own speed settles within a few rounds: half the way at every event.
        speed[rows] = (speed[rows] + 1.0 + accepted) / 2
        width[rows] = (width[rows] + drafted) / 2
        _advance(state, rows, cost, drafted, accepted)
        _start(state, cost, max_live)
    drafted_sum, accepted_sum, tokens = state.totals.tolist()
    return ReplayResult(state.seconds, float(state.passes.max()), drafted_sum, accepted_sum, tokens)


class KnownCost(CostModel):
    """A cost model that needs no measuring: it says what it was given."""

    def __init__(self, step: StepCost) -> None:
        super().__init__()
        self._given = step

    @property
    def cost(self) -> StepCost:
        """What was given."""
        return self._given


def _deal(trace: Trace, model: LengthModel, num_workers: int) -> _State:
    """Longest predicted first, each to the worker with the least predicted tokens, as rollout.pool deals."""
    means = np.array([values.mean() if len(values) else np.nan for values in trace.history])
    usual = float(np.nanmean(means)) if np.isfinite(means).any() else 1.0
    predicted = np.nan_to_num(means, nan=usual)[trace.prompt]
    ranked = np.argsort(-predicted, kind="stable")
    worker = np.zeros(len(ranked), np.int64)
    load = [(0.0, i) for i in range(num_workers)]
    for i in ranked:
        tokens, mine = heapq.heappop(load)
        worker[i] = mine
        heapq.heappush(load, (tokens + predicted[i], mine))
    order = ranked[np.argsort(worker[ranked], kind="stable")]
    count = len(order)
    zeros = np.zeros(num_workers)
    return _State(trace, order, worker[order], np.zeros(count), np.zeros(count, bool), zeros, zeros.copy())


def _start(state: _State, cost: StepCost, max_live: int) -> None:
    """Fills free slots in order; a starting request pays for its prompt."""
    waiting = np.flatnonzero(~state.started)
    if not len(waiting):
        return
    workers = len(state.seconds)
    free = max_live - np.bincount(state.owner[state.live()], minlength=workers)
    owner = state.owner[waiting]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    nth = np.arange(len(owner)) - np.repeat(starts, np.diff(starts, append=len(owner)))
    chosen = waiting[nth < free[owner]]
    state.started[chosen] = True
    prefill = cost.tok * state.trace.prompt_tokens[state.order[chosen]]
    state.seconds += np.bincount(state.owner[chosen], prefill, workers)


def _drafts(
    trace: Trace,
    request: np.ndarray,
    policy: BudgetPolicy,
    live: LiveBatch,
    cost: CostModel,
    view: LiveLengths,
    max_draft_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """([B], [B]) mean draft tokens and accepted ones of a round."""
    accept = trace.accept[request]
    if isinstance(policy, ClosedFormBudget):
        width, least = _closed_form(policy, live, cost, view), np.zeros(len(request))
    else:
        price = policy.price(live, cost, view)
        width, least = price.max_draft.astype(np.float64), price.min_accept_prob.astype(np.float64)
    width = np.minimum(width, max_draft_tokens)[:, None]
    with np.errstate(divide="ignore"):
        deep = np.floor(np.log(np.maximum(least, 1e-12))[:, None] / np.log(accept) + 1e-9)
    depth = np.where(accept > 0.0, np.minimum(width, deep), 0.0)
    kept = accept * (1.0 - accept**depth) / (1.0 - accept)
    drafted, accepted = depth @ trace.share, kept @ trace.share
    # Judged tokens are the kept ones and the first rejected; what follows says nothing.
    judged = ((1.0 - accept**depth) / (1.0 - accept)) @ trace.share
    policy.observe(judged, accepted)
    return drafted, accepted


def _closed_form(policy: ClosedFormBudget, live: LiveBatch, cost: CostModel, view: LiveLengths) -> np.ndarray:
    """The closed form is one programme per worker."""
    owner = np.zeros(len(live), np.int64) if view.owner is None else view.owner
    out = np.zeros(len(live))
    for mine in np.split(np.arange(len(live)), np.flatnonzero(np.diff(owner)) + 1):
        part = LiveBatch(live.uids[mine], live.num_generated[mine], live.num_remaining[mine], live.context_len[mine])
        lengths = LiveLengths(view.model, view.tables, view.rows[mine], view.initial[mine])
        out[mine] = policy.budget(part, cost.cost, lengths, policy.chain.rate)
    return out


def _advance(state: _State, rows: np.ndarray, cost: StepCost, drafted: np.ndarray, accepted: np.ndarray) -> None:
    """Lets every worker run until a tenth of its live requests are done."""
    owner, request = state.owner[rows], state.order[rows]
    left = np.ceil((state.trace.length[request] - state.generated[rows]) / (1.0 + accepted) - 1e-9)
    left = np.maximum(left, 1.0)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    sizes = np.diff(starts, append=len(owner))
    by_end = np.lexsort((left, owner))
    event = left[by_end[starts + (EVENT_SHARE * sizes).astype(np.int64)]]
    ran = np.minimum(left, np.repeat(event, sizes))
    gained = np.minimum(ran * (1.0 + accepted), state.trace.length[request] - state.generated[rows])
    context = state.trace.prompt_tokens[request] + state.generated[rows] + gained / 2
    per_round = cost.live + cost.kv * context + cost.tok * (1.0 + drafted)
    workers = len(state.seconds)
    passes = np.zeros(workers)
    passes[owner[starts]] = np.maximum.reduceat(ran, starts)
    state.seconds += cost.base * passes + np.bincount(owner, ran * per_round, workers)
    state.passes += passes
    ends = ran >= left
    state.generated[rows] = np.where(ends, state.trace.length[request], state.generated[rows] + gained)
    state.totals += [(ran * drafted).sum(), (ran * accepted).sum(), (ran * (1.0 + drafted)).sum()]


def synthetic_trace(
    num_prompts: int,
    num_samples: int,
    *,
    median_tokens: float = 2000.0,
    spread: float = 0.9,
    within: float = 0.5,
    cap_tokens: int = 16384,
    visits: int = 3,
    accept: tuple[float, ...] = (0.0, 0.55, 0.85, 0.97),
    share: tuple[float, ...] = (0.25, 0.3, 0.25, 0.2),
    prompt_tokens: int = 200,
    seed: int = 0,
) -> Trace:
    """Lognormal lengths with a set tail: `spread` is sigma of the prompts' log medians, `within` that of a prompt's
    responses, cut at cap_tokens. visits: earlier visits in the history, with num_samples responses each. accept, share:
    kinds of context as in Trace, the same for all but a factor of 0.9 to 1 per prompt."""
    rng = np.random.default_rng(seed)
    middle = median_tokens * rng.lognormal(0.0, spread, num_prompts)

    def draw(count: int) -> np.ndarray:
        drawn = middle[:, None] * rng.lognormal(0.0, within, (num_prompts, count))
        return np.clip(drawn, 1, cap_tokens).astype(np.int64)

    now, past = draw(num_samples), draw(num_samples * visits)
    prompt = np.repeat(np.arange(num_prompts), num_samples)
    chances = np.array(accept) * rng.uniform(0.9, 1.0, (num_prompts, 1))
    return Trace(
        prompt=prompt,
        prompt_tokens=np.full(len(prompt), prompt_tokens),
        length=now.ravel(),
        accept=chances[prompt],
        share=np.array(share),
        history=list(past),
        cap_tokens=cap_tokens,
    )
