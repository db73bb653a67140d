"""The embedded engine: continuous batching over any Hugging Face causal LM.

Invariants
- One step is one forward pass over a packed sequence [1, T]: pending tokens of every live request (a prompt chunk or
  the last sampled token) followed by its draft tokens. The model sees positions; slots and causality are the cache's.
- A runner (runners.py, graphs.py) carries the pass out; the engine's tables on the host are the same for all.
- A request's tokens depend on its own rows only. With native kernels that holds to the bit: attention and products sum
  in a fixed order. What torch multiplies itself is packed to a multiple of ROW_MULTIPLE rows, which leaves out most of
  the numbers of rows for which its products round differently; batch_invariant=true leaves out the rest.
- Every submitted request leaves exactly once: as a rollout, or unstarted from `take_queued`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.drafter.base import DraftBatch, Drafter, LiveBatch, Price, Ragged
from slipstream.kernels.dispatch import KernelChoice, ProductChoice, select
from slipstream.kernels.reference import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, Verified
from slipstream.rollout.acceptance import AcceptanceBuffer, AcceptanceModel, calibrates_after
from slipstream.rollout.bookkeeping import Committed, make_books, spread
from slipstream.rollout.budget import BudgetPolicy
from slipstream.rollout.engine import EngineError, EngineStats, Patch
from slipstream.rollout.kv_cache import ATTENTION_NAME, SlotKVCache
from slipstream.rollout.packing import StepPlan
from slipstream.rollout.prefix import PrefixStore
from slipstream.rollout.pricing import Pricing
from slipstream.rollout.runner_choice import RunnerOptions, make_runner
from slipstream.rollout.slots import SlotTable
from slipstream.rollout.types import FinishReason, Request, Rollout
from slipstream.rollout.weights import WeightTable

FINISH_NAMES: dict[int, FinishReason] = {FINISH_STOP: "stop", FINISH_LENGTH: "length", FINISH_ERROR: "error"}


class TorchEngine:
    """Engine over one model on one device; see rollout.engine.Engine.

    model: any causal LM of transformers whose attention goes through its attention interface.
    max_live_requests: slots of the KV cache. max_len: tokens of one request, prompt included; 0 takes the model's
    context. max_forward_tokens: packed tokens of a pass, at least max_live_requests. kernels, cpu_products: see
    kernels.dispatch.select. drafter, budget: both or neither. pricing: what the budget is shown, and what watches it.
    cuda_graphs, compile, batch_invariant: see runner_choice.make_runner. admitting: false keeps queued requests
    waiting; the live go on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_live_requests: int = 64,
        max_len: int = 0,
        max_forward_tokens: int = 512,
        drafter: Drafter | None = None,
        budget: BudgetPolicy | None = None,
        max_draft_tokens: int = 32,
        kernels: KernelChoice = "auto",
        cpu_products: ProductChoice = "auto",
        cuda_graphs: bool = True,
        compile: bool = False,
        batch_invariant: bool = False,
        policy_version: int = 0,
        pricing: Pricing | None = None,
    ) -> None:
        config = model.config.get_text_config()
        context = int(config.max_position_embeddings)
        if max_len > context:
            raise EngineError(f"max_len={max_len} is above the model's context of {context} tokens")
        if max_forward_tokens < max_live_requests:
            raise EngineError(
                f"engine.max_forward_tokens={max_forward_tokens} is below "
                f"engine.max_live_requests={max_live_requests}: every live request needs a token per pass"
            )
        if (drafter is None) != (budget is None):
            raise EngineError("a drafter needs a budget policy and the other way round")
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model.eval()
        self.device, self.dtype = model.device, model.dtype
        self.kernels = select(kernels, self.device, self.dtype, torch.get_num_threads(), cpu_products)
        self.kernels.adopt(self.model)
        self.vocab_size = int(config.vocab_size)
        self.max_len = max_len or context
        self.max_forward_tokens, self.max_draft_tokens = max_forward_tokens, max_draft_tokens
        self.drafter, self.budget = drafter, budget
        self.policy_version = policy_version
        self.admitting = True
        self.pricing = Pricing(max_live_requests) if pricing is None else pricing
        # One slot more than requests: the padding tokens of a pass live there.
        self.cache = SlotKVCache(config.num_hidden_layers, max_live_requests + 1, self.max_len, self.kernels)
        self.table = SlotTable(max_live_requests, self.max_len)
        options = RunnerOptions(cuda_graphs, compile, batch_invariant)
        self.runner, self.runner_reason = make_runner(self.model, self.cache, self.kernels, options)
        # The plain twins on a GPU have their places from the host.
        shares = self.kernels.shares_prefixes and (self.kernels.on_device or self.device.type == "cpu")
        self.prefixes = PrefixStore(self.table, self.cache, shares)
        self._books = make_books(self.kernels)
        self._queue: deque[Request] = deque()
        self._queued_uids: set[int] = set()
        self._refused: list[Rollout] = []
        self._drafts = DraftBatch.empty(max_live_requests, max_draft_tokens)
        self._stats = EngineStats()
        self._observed = AcceptanceBuffer(AcceptanceModel())
        self._observed_steps = 0
        self._late: tuple[LiveBatch, Ragged] | None = None
        if drafter is not None:
            drafter.calibrate(self.acceptance.probabilities())
        self._weights = WeightTable(model)
        self._adopts = self.device.type == "cpu" and not compile

    # ---- the queue

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests; one that can never run comes back from the next step with finish "error".

        Raises EngineError for a uid that is queued or live already.
        """
        for request in requests:
            if request.uid in self._queued_uids or request.uid in self.table.slot_of:
                raise EngineError(f"uid {request.uid} was submitted twice")
            problem = self._problem(request)
            if problem:
                empty = np.zeros(0, np.int32)
                self._refused.append(Rollout(request, empty, empty.astype(np.float32), empty, "error", error=problem))
                self._stats.failed += 1
                continue
            self._queue.append(request)
            self._queued_uids.add(request.uid)
            self.prefixes.enqueue(request)

    def _problem(self, request: Request) -> str:
        prompt, context = request.prompt, len(request.prompt) + len(request.prefill)
        if len(prompt) == 0:
            return f"prompt {request.prompt_id} is empty"
        if context >= self.max_len:
            return (
                f"prompt {request.prompt_id} has {context} tokens; the context holds {self.max_len} with the response"
            )
        if len(request.prefill) >= request.sampling.max_new_tokens:
            return f"uid {request.uid} continues {len(request.prefill)} tokens; max_new_tokens leaves none to sample"
        for name, ids in (("prompt", prompt), ("prefill", request.prefill)):
            outside = ids[(ids < 0) | (ids >= self.vocab_size)]
            if len(outside):
                return f"{name} of {request.prompt_id} holds token {outside[0]}; the vocabulary has {self.vocab_size}"
        return ""

    @property
    def num_unfinished(self) -> int:
        """Requests queued or live, and refused ones not yet returned."""
        return len(self._queue) + len(self.table.order) + len(self._refused)

    @property
    def num_live(self) -> int:
        """Requests that hold a slot of the KV cache."""
        return len(self.table.order)

    def _admit(self) -> None:
        if not (self.admitting and self._queue and self.prefixes.num_free):
            return
        waiting: list[Request] = []
        self.prefixes.begin_pass()
        # What is left of the pass once all that is pending is in it.
        room = self.max_forward_tokens - self.table.num_pending()
        while self._queue and self.prefixes.num_free:
            request = self._queue.popleft()
            if self.prefixes.must_wait(request, room):
                waiting.append(request)
                continue
            slot = self.prefixes.admit(request)
            room -= int(self.table.length[slot] - self.table.cached[slot])
            self._queued_uids.discard(request.uid)
            if self.drafter is not None:
                self.drafter.begin(request.uid, request.prompt_id, request.prompt)
                if len(request.prefill):
                    live = self.table.live_batch(np.array([slot]))
                    self.drafter.extend(live, Ragged(request.prefill, np.array([0, len(request.prefill)])))
        self._queue.extendleft(reversed(waiting))
        shared, copied = self.prefixes.take_counts()
        self._stats.shared_prompt_tokens += shared
        self._stats.copied_prompt_tokens += copied

    # ---- one step

    @torch.inference_mode()
    def step(self) -> list[Rollout]:
        """One forward pass: every live request advances by a prompt chunk or by at least one token."""
        started = time.perf_counter()
        refused, self._refused = self._refused, []
        self._admit()
        if not len(self.table.order):
            return refused
        drafting_from = time.perf_counter()
        price = self._propose()
        drafted_at = time.perf_counter()
        plan, invalid = self._books.plan(self.table, self._drafts, price, self.max_forward_tokens, self.vocab_size)
        self._stats.invalid_drafts += invalid
        self.runner.launch(plan, self._books.sampling_rows(self.table, plan.sampling_slots))
        self._extend_late()
        result = self.runner.collect()
        verified = result.verified
        self._stats.graph_steps += result.graphed
        committed = self._commit(plan, verified)
        extended_from = time.perf_counter()
        self._extend(plan, verified, committed.new)
        extend_s = time.perf_counter() - extended_from
        done = refused + self._retire(plan, verified.finish)
        draft_s = drafted_at - drafting_from + extend_s
        total_s = time.perf_counter() - started
        self._account(plan, draft_s, result.forward_s, result.sample_s, total_s)
        self.pricing.account(self.budget, self.table, plan, verified.count, sum(committed.accepted), total_s)
        return done

    def _propose(self) -> Price | None:
        slots = self.table.order
        self._drafts.clear(len(slots))
        if self.drafter is None or self.budget is None:
            return None
        live = self._books.live_batch(self.table, slots)
        price = self.pricing.price(self.budget, live, self.table, len(self._queue), self._observed.model)
        limit, drafting = self._books.draft_limits(self.table, price.max_draft, self.max_draft_tokens)
        price = Price(limit, price.min_accept_prob, price.branching if self.kernels.trees else None)
        if drafting:
            self._extend_late()
            self.drafter.propose(live, price, self._drafts)
        return price

    def _commit(self, plan: StepPlan, verified: Verified) -> Committed:
        """Writes the new tokens."""
        if len(plan.chunk_slots):
            self.table.cached[plan.chunk_slots] += plan.chunk_sizes
        if verified.path is not None:
            self._gather_path(plan, verified.count, verified.path)
        done = self._books.commit(self.table, plan, verified, self.policy_version)
        self._stats.generated_tokens += len(done.new.values)
        self._stats.rounds += done.rounds
        if plan.num_drafted:
            self._stats.count_drafts(done.draft_rounds, done.drafted, done.accepted)
        return done

    def _gather_path(self, plan: StepPlan, count: np.ndarray, path: np.ndarray) -> None:
        """Brings the accepted path of trees to where a chain would have been."""
        row_of, nth = spread(count)
        row = path[plan.row_offsets[row_of] + nth]
        slots, last = plan.sampling_slots[row_of], (self.table.length[plan.sampling_slots] - 1)[row_of]
        moved = row != nth
        if moved.any():
            self.cache.move(slots[moved], (last + row)[moved], (last + nth)[moved])

    def _extend(self, plan: StepPlan, verified: Verified, new: Ragged) -> None:
        if self.drafter is None or not len(plan.sampling_slots):
            return
        if plan.num_drafted:
            self._books.observe(self._observed, self._drafts, plan, verified)
            self._observed_steps += 1
            if calibrates_after(self._observed_steps):
                self.drafter.calibrate(self.acceptance.probabilities())
        self._late = self._books.live_batch(self.table, plan.sampling_slots), new
        if not self.runner.overlaps:
            self._extend_late()

    def _extend_late(self) -> None:
        """Tells the drafter what the last pass committed. Beside a GPU this waits until the next pass is launched,
        or until the drafter is asked for drafts or told of a request's end."""
        late, self._late = self._late, None
        if late is not None and self.drafter is not None:
            self.drafter.extend(*late)

    @property
    def acceptance(self) -> AcceptanceModel:
        """Everything observed so far."""
        return self._observed.flush()

    def learn_acceptance(self, acceptance: AcceptanceModel) -> None:
        """Goes on from what others have observed."""
        self._observed = AcceptanceBuffer(acceptance)
        if self.drafter is not None:
            self.drafter.calibrate(acceptance.probabilities())

    def _retire(self, plan: StepPlan, finish: np.ndarray) -> list[Rollout]:
        done = []
        for i in np.flatnonzero(finish):
            reason = FINISH_NAMES[int(finish[i])]
            error = "the model returned NaN, +inf or no finite logit" if reason == "error" else ""
            done.append(self._release(int(plan.sampling_slots[i]), reason, error))
        return done

    def _release(self, slot: int, reason: FinishReason, error: str = "") -> Rollout:
        self._extend_late()
        self.prefixes.leave(slot)
        rollout = self.table.retire(slot, reason, error)
        if self.drafter is not None:
            self.drafter.end(rollout.request.uid, finished=reason in ("stop", "length"))
        self._stats.failed += reason == "error"
        self._stats.finished += reason in ("stop", "length")
        return rollout

    def _account(self, plan: StepPlan, draft_s: float, forward_s: float, sample_s: float, total_s: float) -> None:
        stats, live = self._stats, plan.live_slots
        stats.steps += 1
        stats.live_sum += len(live)
        stats.prefill_tokens += plan.num_prefill_tokens
        stats.forward_tokens += len(plan.token_ids)
        stats.forward_s += forward_s
        stats.sample_s += sample_s
        stats.draft_s += draft_s
        stats.other_s += total_s - draft_s - forward_s - sample_s
        self.table.spend(draft_s / len(live), (forward_s + sample_s) / len(live))

    # ---- weights, aborting, draining

    def check_policy(self, shapes: Mapping[str, tuple[int, ...]], version: int) -> None:
        """Raises EngineError naming a missing, unknown or misshapen tensor of weights to come."""
        self._weights.check(shapes, version)

    def update_policy(
        self,
        weights: Mapping[str, torch.Tensor],
        version: int,
        adopt: bool = False,
        patches: Sequence[Mapping[str, Patch]] = (),
    ) -> None:
        """Copies the weights in place. Raises EngineError naming a missing, unknown or misshapen tensor.

        adopt: on the CPU the model computes with the given tensors instead, which nobody may write while they are
        referenced; elsewhere, and under engine.compile, they are copied all the same: graphs read fixed places.
        patches: changes on top; with no weights they change what is served. See rollout/weights.py.
        """
        if weights and adopt and self._adopts:
            self._weights.adopt(weights, version)
        elif weights:
            self._weights.copy_from(weights, version)
        for patch in patches:
            self._weights.patch(patch)
        self.policy_version = version
        self.prefixes.forget()

    def recompute_live(self) -> None:
        """Drops the keys and values of the live requests: they are computed again, under the weights served now."""
        self.prefixes.restart()
        self.table.cached[self.table.order] = 0

    def update_draft(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """History drafters have no weights: nothing to do."""

    def abort(self, uids: Iterable[int]) -> list[Rollout]:
        """Takes requests out, queued or live; unknown uids are ignored."""
        wanted, out = set(uids), []
        for request in [r for r in self._queue if r.uid in wanted]:
            self._queue.remove(request)
            self._queued_uids.discard(request.uid)
            self.prefixes.dequeue(request)
            empty = np.zeros(0, np.int32)
            out.append(Rollout(request, empty, empty.astype(np.float32), empty, "abort"))
        return out + [self._release(self.table.slot_of[u], "abort") for u in wanted if u in self.table.slot_of]

    def take_queued(self, max_count: int) -> list[Request]:
        """Up to max_count requests that hold no slot yet, those that would start last, in the order of the queue."""
        taken = [self._queue.pop() for _ in range(min(max_count, len(self._queue)))]
        for request in taken:
            self._queued_uids.discard(request.uid)
            self.prefixes.dequeue(request)
        return taken[::-1]

    def drain(self, timeout_s: float) -> list[Rollout]:
        """Steps until all requests are finished."""
        deadline, done = time.monotonic() + timeout_s, []
        while self.num_unfinished:
            done += self.step()
            if time.monotonic() > deadline and self.num_unfinished:
                left = [r.uid for r in self._queue] + list(self.table.slot_of)
                raise EngineError(f"drain: {len(left)} requests unfinished after {timeout_s:g} s, first uid {left[0]}")
        return done

    def stats(self, reset: bool = False) -> EngineStats:
        """Totals since the last reset."""
        current = self._stats
        if reset:
            self._stats = EngineStats()
        return current
