"""What a person should know before a job starts, although nothing forbids it.

Invariants: a warning is one sentence, names the keys it is about and never changes the job; only a local
cluster is compared with this machine, because an existing one has nodes of its own.
"""

from __future__ import annotations

import os
import shutil

from slipstream.conf.cluster_config import ClusterConfig
from slipstream.conf.schema import Settings


def find_warnings(settings: Settings, num_train_prompts: int | None, max_positions: int | None) -> list[str]:
    """All warnings. num_train_prompts, and max_positions the model was made for, are None when unknown."""
    return [
        *_machine(settings.cluster),
        *_batch(settings, num_train_prompts),
        *_length(settings, max_positions),
        *_speculation(settings),
    ]


def _machine(cluster: ClusterConfig) -> list[str]:
    if cluster.address is not None:
        return []
    warnings, cores = [], len(os.sched_getaffinity(0))
    cpus, gpus = cluster.num_cpus, cluster.num_gpus
    if cpus > cores:
        warnings.append(f"the actors ask for {cpus:g} CPUs and this machine has {cores}: they share its cores")
    threads = max(cluster.num_workers * cluster.threads_per_worker, cluster.num_learners * cluster.threads_for_learner)
    if threads > cores:
        warnings.append(f"{threads} torch threads compute at once and this machine has {cores} CPUs")
    if gpus > 0 and shutil.which("nvidia-smi") is None:
        warnings.append(f"the actors ask for {gpus:g} GPUs and this machine shows none")
    return warnings


def _batch(settings: Settings, num_train_prompts: int | None) -> list[str]:
    if num_train_prompts is None:
        return []
    warnings, per_step = [], settings.algo.num_prompts_per_step
    if num_train_prompts < per_step:
        warnings.append(f"algo.num_prompts_per_step={per_step} repeats some of the {num_train_prompts} prompts")
    if settings.drafter.name == "suffix" and per_step * settings.algo.num_steps <= num_train_prompts:
        warnings.append("no prompt is seen twice: the suffix drafter has only live siblings to learn from")
    return warnings


def _length(settings: Settings, max_positions: int | None) -> list[str]:
    longest = settings.data.max_prompt_tokens + settings.sampling.max_new_tokens
    if max_positions is None or longest <= max_positions:
        return []
    return [
        f"data.max_prompt_tokens + sampling.max_new_tokens = {longest:,}, and the model was made for "
        f"{max_positions:,} positions"
    ]


def _speculation(settings: Settings) -> list[str]:
    drafter, budget, proof = settings.drafter, settings.budget, settings.proof
    drafting = drafter.name != "off" and budget.name != "off"
    warnings = []
    if drafter.name != "off" and budget.name == "off":
        warnings.append(f"budget.name=off: the {drafter.name} drafter learns, but nothing is drafted")
    if proof.every_steps and settings.algo.streams:
        warnings.append(
            f"proof.every_steps={proof.every_steps} is not followed: rollouts that are collected as they finish "
            "(algo.max_staleness_steps, algo.num_extra_groups, algo.filter_uniform_groups) cannot be replayed"
        )
    if proof.every_steps and not drafting:
        warnings.append(f"proof.every_steps={proof.every_steps} replays steps in which nothing is drafted")
    if proof.every_steps and not proof.steps(settings.algo.num_steps):
        warnings.append(f"proof.first_step={proof.first_step} comes after the last step, so nothing is replayed")
    if drafting and budget.name == "fixed" and budget.num_draft_tokens > drafter.max_draft_tokens:
        warnings.append(
            f"budget.num_draft_tokens={budget.num_draft_tokens} is above drafter.max_draft_tokens="
            f"{drafter.max_draft_tokens}, which limits it"
        )
    if drafting and budget.name == "class" and max(budget.class_draft_tokens) > drafter.max_draft_tokens:
        warnings.append(
            f"budget.class_draft_tokens={budget.class_draft_tokens} goes above drafter.max_draft_tokens="
            f"{drafter.max_draft_tokens}, which limits it"
        )
    if drafting and budget.draft_widths and min(budget.draft_widths) > drafter.max_draft_tokens:
        warnings.append(
            f"budget.draft_widths={budget.draft_widths} holds nothing up to drafter.max_draft_tokens="
            f"{drafter.max_draft_tokens}: nothing is drafted"
        )
    return warnings
