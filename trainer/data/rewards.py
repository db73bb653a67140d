"""From a response to a number.

Invariants: `score` never raises and never waits longer than reward.timeout_s, plus the start of a process, for each
of its 1 + reward.max_retries attempts; what cannot be scored has value None and a reason, so that it is left out of the
loss and counted, never trained on as 0. Only what gave no answer at all is tried again: a hang and a dead process may
pass, an error of the rule would come again. Whatever may hang runs in a process of its own, because no thread can be
stopped inside sympy or a user's function.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from slipstream.conf.schema import RewardConfig
from slipstream.trainer.data.prompts import Prompt
from slipstream.trainer.data.reward_process import RewardProcess
from slipstream.trainer.errors import ConfigError, DataError

MATH_SOURCES = ("math", "gsm8k", "aime", "numina")
"""A data_source that holds one of these words is scored by math-verify under rule `auto`."""

THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True, slots=True)
class Score:
    """value: the reward, or None when the sample must be left out of the loss; error: why."""

    value: float | None
    error: str = ""


class RewardScorer:
    """Scores responses by one rule; usable from any thread. `close` ends its helper process."""

    def __init__(self, reward: RewardConfig) -> None:
        """Raises ConfigError when reward.function cannot be imported or called."""
        self._rule = reward.rule
        self._function = reward.function if reward.rule == "custom" else None
        self._process = RewardProcess(self._function, reward.timeout_s, reward.max_retries)
        if self._function:
            problem = self._process.start()
            if problem:
                raise ConfigError(f"reward.function={self._function!r}: {problem}")

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises DataError when a prompt has no rule under rule=auto; call it before the first step."""
        sources = sorted({prompt.data_source for prompt in prompts if self._rule_for(prompt) is None})
        if sources:
            raise DataError(
                f"reward.rule=auto knows no rule for data_source {', '.join(map(repr, sources))}; "
                "set reward.rule to math, exact or custom"
            )

    def score(self, prompt: Prompt, response: str) -> Score:
        """The reward of one response, without its end token."""
        rule = self._rule_for(prompt)
        if rule == "exact":
            return Score(float(is_exact(response, prompt.ground_truth)))
        if rule == "math":
            # Most right answers are right letter by letter, and this costs microseconds where math-verify
            # costs milliseconds.
            if is_exact(response, prompt.ground_truth):
                return Score(1.0)
            return to_score(*self._process.call("math", final_part(response), prompt.ground_truth))
        if rule == "custom":
            arguments = (prompt.data_source, response, prompt.ground_truth, prompt.extra_info)
            return to_score(*self._process.call("custom", *arguments))
        return Score(None, f"reward.rule=auto knows no rule for data_source {prompt.data_source!r}")

    def close(self) -> None:
        """Ends the helper process; a later score starts it again."""
        self._process.stop()

    def _rule_for(self, prompt: Prompt) -> Literal["exact", "math", "custom"] | None:
        if self._rule != "auto":
            return self._rule
        source = prompt.data_source.lower()
        if prompt.style == "exact" or source.startswith("slipstream/"):
            return "exact"
        if prompt.style == "math" or any(word in source for word in MATH_SOURCES):
            return "math"
        return None


def normalize_answer(text: str) -> str:
    """Drops the commas that group thousands, then all whitespace: `1,234 ` is `1234`, `(1, 2)` is `(1,2)`."""
    return "".join(THOUSANDS_COMMA.sub("", text).split())


def boxed_answer(text: str) -> str | None:
    r"""The inside of the last \boxed{...} whose braces balance."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for i in range(start + len(r"\boxed"), len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + len(r"\boxed{") : i]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def final_part(response: str) -> str:
    r"""The answer a response offers: the text after the last `####`, else its last \boxed, else all of it."""
    if "####" in response:
        return response.rsplit("####", 1)[1].strip()
    boxed = boxed_answer(response)
    return response.strip() if boxed is None else rf"\boxed{{{boxed}}}"


def is_exact(response: str, ground_truth: str) -> bool:
    """Whether the final part, as it is or out of its box, equals the ground truth after normalisation."""
    part = final_part(response)
    boxed = boxed_answer(part)
    return normalize_answer(ground_truth) in {normalize_answer(part), normalize_answer(boxed or part)}


def to_score(value: Any, error: str) -> Score:
    """A rule's raw result as a Score; anything but a finite number is a reason to leave the sample out."""
    if error:
        return Score(None, error)
    if isinstance(value, dict):
        if "score" not in value:
            return Score(None, f"the reward function returned a dict without 'score': {value!r:.80}")
        value = value["score"]
    if not isinstance(value, numbers.Real):
        return Score(None, f"the reward function returned {value!r:.80}, not a number")
    if not math.isfinite(value):
        return Score(None, f"the reward function returned {float(value)}")
    return Score(float(value))
