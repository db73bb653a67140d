"""Requests and models that several benches share: the quickstart's own policy, prompts and tokenizer.

Invariant: the same arguments give the same requests, on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from slipstream.drafter.base import Drafter
from slipstream.rollout.model_loader import load_policy
from slipstream.rollout.types import Request, Sampling, request_uid
from slipstream.trainer.config import load_settings, model_folder
from slipstream.trainer.data.prompts import Prompt, PromptSet, load_prompts
from slipstream.trainer.data.tokenizer import ChatTokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Workload:
    """The quickstart's policy folder, tokenizer and prompts."""

    folder: Path
    tokenizer: ChatTokenizer
    prompts: PromptSet

    def model(self) -> PreTrainedModel:
        """A fresh copy of the policy in float32 on the CPU."""
        return load_policy(self.folder)

    def requests(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        max_new_tokens: int,
        step: int = 0,
        stop: bool = True,
    ) -> list[Request]:
        """`num_samples` requests per prompt at temperature 1; stop=False runs every one to max_new_tokens."""
        stops = self.tokenizer.stop_token_ids if stop else ()
        sampling = Sampling(max_new_tokens, temperature=1.0, seed=0, stop_token_ids=stops)
        return [
            Request(request_uid(0, step, group, sample), prompt.prompt_id, group, prompt.tokens, sampling)
            for group, prompt in enumerate(prompts)
            for sample in range(num_samples)
        ]


def quickstart_workload(overrides: Sequence[str] = ()) -> Workload:
    """The workload of `experiment=quickstart`, with more overrides on top."""
    settings = load_settings(["experiment=quickstart", *overrides])
    folder = model_folder(settings.model.path)
    if folder is None:
        raise ValueError(f"model.path={settings.model.path} is no local folder")
    tokenizer = load_tokenizer(folder)
    return Workload(folder, tokenizer, load_prompts(settings.data, tokenizer, settings.run.seed))


def open_prompts(drafter: Drafter, requests: Iterable[Request]) -> None:
    """Tells a drafter that is about to get history that these prompts come again, as visits in a job would have: what
    is published is then indexed in the background, not when the first request comes."""
    for uid, request in enumerate({request.prompt_id: request for request in requests}.values()):
        drafter.begin(uid, request.prompt_id, request.prompt)
        drafter.end(uid, finished=False)
