"""How much of a rollout each drafter guesses: every arm decodes the same texts after the same history.

Invariants: an arm has seen exactly the steps before the one it decodes; all texts of a step are live together; arms
differ in the drafter alone. Arms in plain Python that cannot take a whole corpus take its first prompts, next to the
native index on those same prompts, and bear their number in their name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import NamedTuple

import numpy as np

from slipstream.drafter.base import Drafter, HistoryRecord
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.drafter_index.arctic import DEEP, DEEP_FACTOR, ArcticDrafter, Peer
from slipstream.experiments.drafter_index.corpus import Corpus
from slipstream.experiments.drafter_index.decode import MIN_ACCEPT_PROB, decode
from slipstream.experiments.drafter_index.recorded import Recording
from slipstream.rollout.acceptance import AcceptanceModel

NUM_LIVE = 4
"""Held-out rollouts of each synthetic prompt that are decoded together."""
NUM_PLAIN_PROMPTS = 4
EVERYTHING = "all"


class Arm(NamedTuple):
    """make: a fresh drafter. one_scope: all prompts are one prompt to it. min_accept_prob: as in Price."""

    make: Callable[[], Drafter]
    one_scope: bool = False
    min_accept_prob: float = MIN_ACCEPT_PROB


@dataclass(frozen=True, slots=True)
class Step:
    """A training step. labels: where each record is counted, "" throughout for a step that is history only."""

    number: int
    records: list[HistoryRecord]
    labels: list[str]


@dataclass(frozen=True, slots=True)
class Material:
    """What the arms decode. prompts: [p] int32 by prompt_id; steps_per_epoch: steps from a prompt's visit to its next;
    max_tokens: the longest response."""

    steps: list[Step]
    prompts: Mapping[str, np.ndarray]
    steps_per_epoch: int
    max_tokens: int

    def first_prompts(self, number: int) -> Material:
        """The same with the first `number` prompts only."""
        names = list(dict.fromkeys(record.prompt_id for step in self.steps for record in step.records))[:number]
        steps = []
        for step in self.steps:
            kept = [i for i, record in enumerate(step.records) if record.prompt_id in names]
            if kept:
                steps.append(Step(step.number, [step.records[i] for i in kept], [step.labels[i] for i in kept]))
        return replace(self, steps=steps)

    def num_prompts(self) -> int:
        """Different prompts."""
        return len({record.prompt_id for step in self.steps for record in step.records})


def from_corpus(corpus: Corpus, num_prompts: int) -> Material:
    """The synthetic corpus: its visits are history, NUM_LIVE held-out rollouts of each prompt are decoded."""
    part = Corpus(corpus.rollouts[:num_prompts], corpus.held_out[:num_prompts])
    steps = [Step(number, records, [""] * len(records)) for number, records in part.visits()]
    texts = part.texts(NUM_LIVE)
    steps.append(Step(texts[0].step, texts, ["synthetic"] * len(texts)))
    return Material(steps, {}, 1, part.held_out.shape[2])


def from_recording(recording: Recording, name: str) -> Material:
    """A recorded job: every step is decoded and then published; first visits are counted as `name`_cold."""
    first_visit: dict[str, int] = {}
    steps = []
    for number, records in recording.by_step():
        for record in records:
            first_visit.setdefault(record.prompt_id, number)
        labels = [f"{name}_cold" if first_visit[record.prompt_id] == number else name for record in records]
        steps.append(Step(number, records, labels))
    visits = len({(record.prompt_id, record.step) for record in recording.records}) / len(first_visit)
    longest = max(len(record.tokens) for record in recording.records)
    return Material(steps, recording.prompts, max(1, round(len(steps) / visits)), longest)


def make_arms(steps_per_epoch: int, peer: Peer | None) -> dict[str, Arm]:
    """Arms that take a whole corpus. In one scope every step is a visit, hence its longer window and slower decay.

    Unpriced: MIN_ACCEPT_PROB cuts each drafter by its own estimate of acceptance, and those are not alike.
    """
    defaults = {name: parameter.default for name, parameter in signature(SuffixDrafter).parameters.items()}
    window, decay = defaults["window_epochs"] * steps_per_epoch, defaults["decay"] ** (1 / steps_per_epoch)
    arms = {
        "suffix": Arm(lambda: SuffixDrafter(index="native")),
        "suffix_prompt_only": Arm(lambda: SuffixDrafter(shared_tokens=0, index="native")),
        "suffix_decay_0.8": Arm(lambda: SuffixDrafter(decay=0.8, index="native")),
        "suffix_decay_1": Arm(lambda: SuffixDrafter(decay=1.0, index="native")),
        "ngram": Arm(NgramDrafter),
        "last_epoch_only": Arm(lambda: SuffixDrafter(window_epochs=1, index="native")),
        "global_scope": Arm(lambda: SuffixDrafter(window_epochs=window, decay=decay, index="native"), one_scope=True),
    }
    for name in ("suffix", "global_scope"):
        arms[f"{name}_unpriced"] = arms[name]._replace(min_accept_prob=0.0)
    if peer is not None:
        arms["arctic"] = Arm(lambda: ArcticDrafter(peer))
        arms["arctic_deep"] = Arm(lambda: ArcticDrafter(peer, DEEP, DEEP_FACTOR))
    return arms


def measure(material: Material, width: int, peer: Peer | None) -> dict[str, dict[str, dict[str, float]]]:
    """accepted_per_round and drafted_per_round, each by label and arm. width: most draft tokens of a request."""
    arms = make_arms(material.steps_per_epoch, peer)
    runs = [(name, arm, material) for name, arm in arms.items()]
    few = material.first_prompts(NUM_PLAIN_PROMPTS)
    suffix = f"{few.num_prompts()}_prompts"
    runs.append((f"suffix_{suffix}", arms["suffix"], few))
    runs.append((f"suffix_reference_{suffix}", Arm(lambda: SuffixDrafter(index="reference")), few))
    accepted: dict[str, dict[str, float]] = {}
    drafted: dict[str, dict[str, float]] = {}
    for name, arm, part in runs:
        for label, totals in decode_steps(arm, part, width).items():
            accepted.setdefault(label, {})[name] = totals[2] / totals[0]
            drafted.setdefault(label, {})[name] = totals[1] / totals[0]
    return {"accepted_per_round": accepted, "drafted_per_round": drafted}


def decode_steps(arm: Arm, material: Material, width: int) -> dict[str, np.ndarray]:
    """Rounds, drafted and accepted tokens by label, each [3] int64, of one fresh drafter over all steps."""
    drafter = arm.make()
    totals: dict[str, np.ndarray] = {}
    acceptance = AcceptanceModel()
    for step in material.steps:
        records: Sequence[HistoryRecord] = step.records
        prompts = material.prompts
        if arm.one_scope:
            records, prompts = [replace(record, prompt_id=EVERYTHING) for record in records], {}
        if any(step.labels):
            done = decode(
                drafter,
                records,
                width,
                prompts,
                max_tokens=material.max_tokens,
                min_accept_prob=arm.min_accept_prob,
                acceptance=acceptance,
            )
            columns = np.stack([done.rounds, done.drafted, done.accepted], axis=1)
            for label, column in zip(step.labels, columns, strict=True):
                totals[label] = totals.get(label, 0) + column
            acceptance.fade()
        drafter.publish(step.number, list(records))
    return totals
