"""The rollouts that a training job sampled, in one small file.

Invariants: there are records, in the order of their steps, every response is non-empty, every uid occurs once and every
record's prompt is there. A file is plain arrays (numpy, compressed) and loads without running code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.trainer.errors import ConfigError

QUICKSTART = Path(__file__).parent / "quickstart_rollouts.npz"
RECORD_COMMAND = "python -m slipstream.experiments.drafter_index.record --run RUN_FOLDER --out PATH"


@dataclass(frozen=True, slots=True)
class Recording:
    """prompts: [p] int32 tokens by prompt_id. records: every response."""

    prompts: dict[str, np.ndarray]
    records: list[HistoryRecord]

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("there are no responses")
        steps = [record.step for record in self.records]
        if steps != sorted(steps):
            raise ValueError("records are not in the order of their steps")
        if len({record.uid for record in self.records}) != len(self.records):
            raise ValueError("a uid occurs twice")
        if missing := {record.prompt_id for record in self.records} - self.prompts.keys():
            raise ValueError(f"{len(missing)} prompts have no tokens, such as {min(missing)}")
        if not all(len(record.tokens) for record in self.records):
            raise ValueError("a response is empty")

    def by_step(self) -> list[tuple[int, list[HistoryRecord]]]:
        """(step, its records), in order."""
        return [(step, list(group)) for step, group in groupby(self.records, lambda record: record.step)]

    def save(self, path: Path) -> None:
        """Writes the file. Token ids must be below 65,536 (ValueError)."""
        names = list(self.prompts)
        number = {name: i for i, name in enumerate(names)}
        texts = [*self.prompts.values(), *(record.tokens for record in self.records)]
        tokens = np.concatenate(texts)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 2**16:
            raise ValueError(f"token ids reach {tokens.max()}; allowed: 0 to 65,535")
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                names=np.array(names),
                tokens=tokens.astype(np.uint16),
                lengths=np.array([len(text) for text in texts], np.int32),
                prompts=np.array([number[record.prompt_id] for record in self.records], np.int32),
                steps=np.array([record.step for record in self.records], np.int32),
                uids=np.array([record.uid for record in self.records], np.int64),
            )


def load_recording(path: Path) -> Recording:
    """Reads what `save` wrote. ConfigError, one line, when there is no such file or it holds something else."""
    allowed = f"allowed: a file that `{RECORD_COMMAND}` wrote"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["names"].tolist()
            ends = np.cumsum(arrays["lengths"])[:-1]
            texts = np.split(arrays["tokens"].astype(np.int32), ends)
            columns = [arrays[column].tolist() for column in ("prompts", "steps", "uids")]
        responses = zip(*columns, texts[len(names) :], strict=True)
        records = [HistoryRecord(names[prompt], step, uid, tokens) for prompt, step, uid, tokens in responses]
        return Recording(dict(zip(names, texts, strict=False)), records)
    except (OSError, KeyError, ValueError, IndexError, BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {allowed}") from None
