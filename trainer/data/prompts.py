"""From rows to prompts ready for the engine, and the order in which training visits them.

Invariants
- A prompt_id is a pure function of data source and messages: the same over epochs, restarts and machines.
- Every row is either a prompt or counted under one reason with an example; an empty split is a DataError.
- The order of training prompts is a pure function of (seed, step), so a resumed job needs no saved cursor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError

from slipstream.conf.schema import DataConfig
from slipstream.trainer.data.chain_sum import make_rows
from slipstream.trainer.data.parquet import read_table
from slipstream.trainer.data.tokenizer import ChatTokenizer
from slipstream.trainer.errors import DataError

MAX_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem.

    tokens: [p] int32, the chat template applied with its generation prompt. style, ground_truth: verl's
    reward_model. level: difficulty where the data set states one, else 0.
    """

    prompt_id: str
    tokens: np.ndarray = field(repr=False)
    data_source: str
    style: str
    ground_truth: str
    level: int
    extra_info: dict[str, Any]


@dataclass(slots=True)
class LeftOut:
    """Rows of one split that were left out for one reason; `examples` holds the first few."""

    split: str
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line for the console and the report."""
        return f"{self.split}: {self.count} rows left out, {self.reason} (e.g. {'; '.join(self.examples)})"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a job. `seed` and `shuffle` fix the order in which `train` is visited."""

    train: list[Prompt]
    validation: list[Prompt]
    left_out: list[LeftOut]
    seed: int
    shuffle: bool

    def order(self, num_prompts_per_step: int) -> PromptOrder:
        """The visiting order of `train`."""
        return PromptOrder(len(self.train), num_prompts_per_step, self.seed, self.shuffle)


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """Which prompts a step trains on: every epoch visits every prompt once; a step may straddle epochs."""

    num_prompts: int
    num_per_step: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.num_per_step < 1:
            given = f"num_prompts={self.num_prompts}, num_per_step={self.num_per_step}"
            raise ValueError(f"{given}; allowed: at least 1")

    def indices(self, step: int) -> np.ndarray:
        """[num_per_step] int64 indices into the training prompts for step 1, 2, ..."""
        first = self._first(step)
        places = np.arange(first, first + self.num_per_step)
        epochs = places // self.num_prompts
        parts = [self._epoch_order(e)[places[epochs == e] % self.num_prompts] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def at(self, number: int) -> int:
        """Index of the prompt of group 0, 1, ... of the whole job: step s begins with group (s - 1) * num_per_step."""
        return int(self.indices(number // self.num_per_step + 1)[number % self.num_per_step])

    def epoch(self, step: int) -> int:
        """The epoch, from 0, of the first prompt of step 1, 2, ..."""
        return self._first(step) // self.num_prompts

    def _first(self, step: int) -> int:
        if step < 1:
            raise ValueError(f"step={step}; steps count from 1")
        return (step - 1) * self.num_per_step

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        return np.random.default_rng([self.seed, int(epoch)]).permutation(self.num_prompts)


def load_prompts(data: DataConfig, tokenizer: ChatTokenizer, seed: int) -> PromptSet:
    """Reads or generates, checks and tokenises the prompts of a job.

    seed: fixes the visiting order (run.seed). Raises DataError, one line, for data that cannot be used.
    """
    left_out: list[LeftOut] = []
    train = _to_prompts(_rows(data, "train"), data, tokenizer, "train", left_out)
    has_validation = data.source == "task" or data.validation_path is not None
    rows = _rows(data, "validation") if has_validation else []
    validation = _to_prompts(rows, data, tokenizer, "validation", left_out)
    return PromptSet(train, validation, left_out, seed, data.shuffle)


def _rows(data: DataConfig, split: Any) -> list[dict[str, Any]]:
    if data.source == "task":
        return [{data.prompt_key: row.pop("prompt"), **row} for row in make_rows(data.task, split)]
    path = data.train_path if split == "train" else data.validation_path
    return read_table(str(path), data.prompt_key, f"data.{split}_path").to_pylist()


def _to_prompts(
    rows: Sequence[dict[str, Any]],
    data: DataConfig,
    tokenizer: ChatTokenizer,
    split: str,
    left_out: list[LeftOut],
) -> list[Prompt]:
    reasons: dict[str, LeftOut] = {}
    prompts = []
    for index, row in enumerate(rows):
        try:
            prompts.append(to_prompt(row, data.prompt_key, data.max_prompt_tokens, tokenizer))
        except RowError as error:
            entry = reasons.setdefault(error.reason, LeftOut(split, error.reason))
            entry.count += 1
            if len(entry.examples) < MAX_EXAMPLES:
                entry.examples.append(f"row {index}: {error.detail}")
    left_out.extend(reasons.values())
    if rows and not prompts:
        lines = "; ".join(entry.line() for entry in reasons.values())
        raise DataError(f"data: no usable row among the {len(rows)} of the {split} split; {lines}")
    return prompts


class RowError(ValueError):
    """A row that cannot become a prompt: `reason` is a countable class of fault, `detail` this row's case."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def to_prompt(row: dict[str, Any], prompt_key: str, max_prompt_tokens: int, tokenizer: ChatTokenizer) -> Prompt:
    """One verl-format row as a Prompt; raises RowError when it has to be left out."""
    messages = check_messages(row.get(prompt_key))
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
        raise RowError("malformed reward_model", f"{reward_model!r:.60} has no ground_truth")
    if not isinstance(row.get("data_source"), str):
        raise RowError("malformed data_source", f"{row.get('data_source')!r:.60} is not a string")
    try:
        tokens = tokenizer.chat_tokens(messages)
    except TemplateError as error:
        raise RowError("refused by the chat template", str(error)) from error
    if len(tokens) > max_prompt_tokens:
        raise RowError("prompt too long", f"{len(tokens)} tokens, data.max_prompt_tokens={max_prompt_tokens}")
    truth = reward_model["ground_truth"]
    extra_info = row.get("extra_info") or {}
    level = extra_info.get("level")
    return Prompt(
        prompt_id=prompt_id(row["data_source"], messages),
        tokens=tokens,
        data_source=row["data_source"],
        style=str(reward_model.get("style") or ""),
        ground_truth=truth if isinstance(truth, str) else json.dumps(truth, default=str),
        level=level if isinstance(level, int) else 0,
        extra_info=extra_info,
    )


def check_messages(value: Any) -> list[dict[str, str]]:
    """The messages of a row, role and content alone; raises RowError when there is nothing to ask."""
    if not isinstance(value, list) or not value:
        raise RowError("empty prompt", f"{value!r:.60}")
    for message in value:
        parts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(part, str) for part in parts):
            raise RowError("malformed prompt", f"{message!r:.60} is not {{role: string, content: string}}")
    if not any(message["content"].strip() for message in value):
        raise RowError("empty prompt", "no message has text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def prompt_id(data_source: str, messages: list[dict[str, str]]) -> str:
    """`data_source/` and 16 hex digits of the messages' blake2b."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    # A lone surrogate cannot be encoded strictly, and two prompts that differ in one are still two prompts.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{data_source}/{digest}"
