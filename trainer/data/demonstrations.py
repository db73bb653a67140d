"""Worked answers to learn from: endless documents for supervised fine-tuning.

Invariants: a stream is a pure function of its source and seed; the built-in task streams train-split problems
only, so its validation problems stay unseen; a row without an answer, or longer than a row of tokens, is
counted and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from jinja2 import TemplateError

from slipstream.trainer.data.chain_sum import stream_problems, worked_with_slips
from slipstream.trainer.data.packing import Document
from slipstream.trainer.data.parquet import read_table
from slipstream.trainer.data.prompts import RowError, check_messages
from slipstream.trainer.data.tokenizer import ChatTokenizer
from slipstream.trainer.errors import DataError


def to_document(tokenizer: ChatTokenizer, messages: list[dict[str, str]], answer: str) -> Document:
    """The prompt as the policy will see it, then the answer and the end token.

    Raises DataError when the tokenizer has no end token, and jinja2.TemplateError when its template refuses.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"--model={tokenizer.name_or_path!r}: its tokenizer_config.json names no eos_token")
    prompt = tokenizer.chat_tokens(messages)
    response = [*tokenizer.encode(answer), tokenizer.eos_token_id]
    return Document(np.concatenate([prompt, np.asarray(response, np.int32)]), len(prompt))


def stream_task(tokenizer: ChatTokenizer, seed: int, slip_rate: float = 0.0) -> Iterator[Document]:
    """chain_sum, every document a new draw; `slip_rate`: share of sums that are stated wrongly."""
    rng = np.random.default_rng([seed, 4])
    for problem in stream_problems(seed):
        answer = worked_with_slips(problem, rng, slip_rate)
        yield to_document(tokenizer, [{"role": "user", "content": problem.question}], answer)


def stream_rows(documents: list[Document], seed: int) -> Iterator[Document]:
    """A finite set, over and over, each epoch in a new order."""
    rng = np.random.default_rng([seed, 3])
    while True:
        for index in rng.permutation(len(documents)):
            yield documents[index]


def load_documents(
    path: str, prompt_key: str, tokenizer: ChatTokenizer, row_tokens: int
) -> tuple[list[Document], Counter[str]]:
    """The documents of a verl-format table, and why others of its rows were left out.

    A row has to state its worked answer in `extra_info.answer`, as verl's GSM8K rows do. Raises
    DataError when nothing is left.
    """
    documents: list[Document] = []
    left_out: Counter[str] = Counter()
    for row in read_table(path, prompt_key, "--data").to_pylist():
        answer = (row.get("extra_info") or {}).get("answer")
        if not isinstance(answer, str) or not answer.strip():
            left_out["no text in extra_info.answer"] += 1
            continue
        try:
            document = to_document(tokenizer, check_messages(row[prompt_key]), answer)
        except RowError as error:
            left_out[error.reason] += 1
            continue
        except TemplateError:
            left_out["refused by the chat template"] += 1
            continue
        if len(document.tokens) > row_tokens:
            left_out[f"longer than --row-tokens {row_tokens}"] += 1
        else:
            documents.append(document)
    if not documents:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.items())
        raise DataError(f"--data={path!r}: nothing to learn from ({reasons})")
    return documents, left_out
