"""`slipstream sft`: supervised fine-tuning on worked answers, the warm start before RL.

Invariants: the loss is on answers alone, end token included; documents of a row do not see each other; equal
arguments on an equal machine give equal weights; the folder it writes loads with `from_pretrained`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F

from slipstream.conf.schema import DataConfig, RewardConfig, TaskConfig
from slipstream.trainer.data.byte_tokenizer import write_byte_tokenizer
from slipstream.trainer.data.demonstrations import load_documents, stream_rows, stream_task
from slipstream.trainer.data.packing import IGNORE, Document, PackedRows, pack
from slipstream.trainer.data.prompts import Prompt, load_prompts
from slipstream.trainer.data.rewards import RewardScorer
from slipstream.trainer.data.tokenizer import TOKENIZER_FILES, ChatTokenizer, load_tokenizer
from slipstream.trainer.errors import ConfigError, SlipstreamError

FINAL_LEARNING_RATE_SHARE = 0.1
CURRICULUM_START_SHARE = 0.1
"""Longest document at the start of the curriculum, as a share of row_tokens."""
MAX_PASSED_OVER = 256
FILL = 0.95
"""Documents are drawn up to this share of a step's tokens; first-fit wastes about the rest."""


def tiny_model(tokenizer: ChatTokenizer, seed: int) -> Any:
    """A randomly initialised Qwen3 with 0.8 M parameters, small enough to ship and to train on a laptop."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def pad_id(tokenizer: ChatTokenizer) -> int:
    """What fills rows: the pad token, or 0 where there is none (padding is masked, its id has no effect)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def packed_logits(model: Any, rows: PackedRows) -> torch.Tensor:
    """[rows, row_tokens, vocab] logits; the mask is additive, so every attention implementation takes it."""
    allowed = torch.from_numpy(rows.attention_mask())
    mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)
    return model(
        input_ids=torch.from_numpy(rows.tokens),
        position_ids=torch.from_numpy(rows.position_ids),
        attention_mask=mask,
        use_cache=False,
    ).logits


def packed_loss(model: Any, rows: PackedRows) -> torch.Tensor:
    """Mean cross-entropy, in nats, over the answer tokens of all rows."""
    logits = packed_logits(model, rows)
    return F.cross_entropy(logits.flatten(0, 1).float(), torch.from_numpy(rows.labels).flatten(), ignore_index=IGNORE)


def learning_rate_share(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine from 1 to FINAL_LEARNING_RATE_SHARE; step counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def longest_document(step: int, num_steps: int, curriculum: float, row_tokens: int) -> int:
    """Tokens of the longest document learned at `step`: linear over the first `curriculum` of the run."""
    progress = 1.0 if curriculum == 0 else min(1.0, step / (num_steps * curriculum))
    return round(row_tokens * (CURRICULUM_START_SHARE + (1 - CURRICULUM_START_SHARE) * progress))


def draw_documents(stream: Iterator[Document], num_tokens: int, longest: int) -> list[Document]:
    """Documents of at most `longest` tokens each, up to `num_tokens` together; at least one.

    Where a stream has none that short, the shortest of the first MAX_PASSED_OVER.
    """
    documents: list[Document] = []
    passed_over: list[Document] = []
    for document in stream:
        if len(document.tokens) <= longest:
            num_tokens -= len(document.tokens)
            if documents and num_tokens < 0:
                break
            documents.append(document)
        elif not documents:
            passed_over.append(document)
            if len(passed_over) == MAX_PASSED_OVER:
                return [min(passed_over, key=lambda one: len(one.tokens))]
    return documents


@torch.no_grad()
def sample_responses(
    model: Any, tokenizer: ChatTokenizer, prompts: Sequence[Prompt], max_new_tokens: int, greedy: bool
) -> list[list[int]]:
    """One response per prompt as token ids, end token included where it was reached."""
    width = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id(tokenizer))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens)
        mask[row, width - len(prompt.tokens) :] = 1
    options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model.eval()
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(tokenizer.stop_token_ids),
        pad_token_id=pad_id(tokenizer),
        **options,
    )[:, width:]
    model.train()
    return [_until_end(row, tokenizer.stop_token_ids) for row in output.tolist()]


def _until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


def evaluate(
    model: Any, tokenizer: ChatTokenizer, prompts: Sequence[Prompt], max_new_tokens: int, greedy: bool
) -> dict[str, Any]:
    """Accuracy, overall and by level, share of responses that end, and their lengths in tokens."""
    scorer = RewardScorer(RewardConfig())
    responses = sample_responses(model, tokenizer, prompts, max_new_tokens, greedy)
    by_level: dict[int, list[float]] = {}
    for prompt, tokens in zip(prompts, responses, strict=True):
        score = scorer.score(prompt, tokenizer.decode(tokens))
        if score.value is not None:
            by_level.setdefault(prompt.level, []).append(score.value)
    lengths = np.array([len(tokens) for tokens in responses])
    scored = [value for values in by_level.values() for value in values]
    return {
        "accuracy": round(float(np.mean(scored)), 4) if scored else None,
        "by_level": {str(level): round(float(np.mean(values)), 4) for level, values in sorted(by_level.items())},
        "num_unscored": len(prompts) - len(scored),
        "ended": float(np.mean([tokens[-1] in tokenizer.stop_token_ids for tokens in responses])),
        "length_p50": float(np.percentile(lengths, 50)),
        "length_p99": float(np.percentile(lengths, 99)),
    }


def train(
    model: Any,
    tokenizer: ChatTokenizer,
    stream: Iterator[Document],
    prompts: Sequence[Prompt],
    args: Any,
    log: TextIO,
) -> None:
    """Runs the fine-tuning; a JSON line per log_every steps and per evaluation goes to `log` and console."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=args.weight_decay
    )
    tokens_seen, start, losses = 0, time.perf_counter(), []
    model.train()
    for step in range(args.num_steps):
        longest = longest_document(step, args.num_steps, args.curriculum, args.row_tokens)
        documents = draw_documents(stream, int(args.num_rows * args.row_tokens * FILL), longest)
        # Rows only as long as the curriculum needs: attention is quadratic in them.
        row_tokens = max(longest, max(len(document.tokens) for document in documents))
        rows = pack(documents, row_tokens, pad_id(tokenizer))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_share(step, args.num_steps, args.warmup_steps)
        loss = packed_loss(model, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens_seen += rows.num_tokens
        losses.append(loss.item())
        record: dict[str, Any] = {"step": step + 1, "tokens": tokens_seen}
        if (step + 1) % args.log_every == 0:
            record |= {
                "loss": round(float(np.mean(losses)), 4),
                "seconds": round(time.perf_counter() - start, 1),
            }
            losses.clear()
        if prompts and ((step + 1) % args.eval_every == 0 or step + 1 == args.num_steps):
            record["sampled"] = evaluate(model, tokenizer, prompts, args.max_new_tokens, greedy=False)
            record["greedy"] = evaluate(model, tokenizer, prompts, args.max_new_tokens, greedy=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.num_steps:
            save_model(model, args.out)
        if len(record) > 2:
            line = json.dumps(record)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command; argparse prints its own one-line errors and exits with 2."""
    parser = argparse.ArgumentParser("slipstream sft", description="Supervised fine-tuning on worked answers.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for weights, tokenizer and sft_log.jsonl")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--task", choices=["chain_sum"], default="chain_sum", help="built-in task to learn")
    source.add_argument("--data", help="verl-format parquet whose rows state a worked answer in extra_info.answer")
    add("--prompt-key", default="prompt", help="column with the messages (--data)")
    add(
        "--model",
        default="tiny",
        help="`tiny` (0.8 M parameters, random weights), a model folder, or a hub id",
    )
    add("--num-steps", type=int, default=1000)
    add("--num-rows", type=int, default=2, help="packed rows in one step")
    add("--row-tokens", type=int, default=576, help="length of a row; longer documents are left out")
    add("--learning-rate", type=float, default=2e-3)
    add("--warmup-steps", type=int, default=30)
    add("--weight-decay", type=float, default=0.01)
    add(
        "--curriculum",
        type=float,
        default=0.6,
        help="share of the run over which documents grow to full length",
    )
    add("--slip-rate", type=float, default=0.0, help="share of wrong sums in the demonstrations (--task)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="torch threads; a model this small gains little from more")
    add("--log-every", type=int, default=50, help="steps")
    add("--eval-every", type=int, default=500, help="steps; the last step is always evaluated")
    add("--num-eval", type=int, default=128, help="fresh problems to evaluate on (--task); 0: none")
    add("--max-new-tokens", type=int, default=512, help="cap of an evaluated response")
    args = parser.parse_args(argv)
    for name in ("num_steps", "num_rows", "row_tokens", "log_every", "eval_every", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)}; allowed: 1 or more")
    for name in ("curriculum", "slip_rate"):
        if not 0 <= getattr(args, name) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)}; allowed: 0 (off) to 1")
    return args


def load_model(name: str, out: Path, seed: int) -> tuple[Any, ChatTokenizer]:
    """A model in float32 and its tokenizer; puts the tokenizer's files into `out`, which it makes."""
    out.mkdir(parents=True, exist_ok=True)
    if name == "tiny":
        write_byte_tokenizer(out)
        tokenizer = load_tokenizer(out)
        return tiny_model(tokenizer, seed), tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name, "--model")
    for file in TOKENIZER_FILES:
        if (tokenizer.folder / file).is_file() and tokenizer.folder.resolve() != out.resolve():
            shutil.copyfile(tokenizer.folder / file, out / file)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model={name!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error


def save_model(model: Any, out: Path) -> None:
    """Weights and config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(out)
    # safetensors writes for the owner alone; a shared folder and a wheel need the usual permissions.
    (out / "model.safetensors").chmod(0o644)


def run(args: argparse.Namespace) -> None:
    """Builds or loads the model, trains it, and writes `args.out`."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, args.out, args.seed)
    prompts: Sequence[Prompt] = []
    if args.data:
        documents, left_out = load_documents(args.data, args.prompt_key, tokenizer, args.row_tokens)
        for reason, count in left_out.items():
            print(f"slipstream: {count} rows left out: {reason}", file=sys.stderr)
        stream = stream_rows(documents, args.seed)
    else:
        stream = stream_task(tokenizer, args.seed, args.slip_rate)
        if args.num_eval:
            task = TaskConfig(num_train=1, num_validation=args.num_eval, seed=args.seed)
            prompts = load_prompts(DataConfig(task=task), tokenizer, args.seed).validation
    with (args.out / "sft_log.jsonl").open("w") as log:
        train(model, tokenizer, stream, prompts, args, log)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, and prints a user's mistake as one line."""
    try:
        run(parse_args(argv))
    except SlipstreamError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return error.exit_code
    return 0
