"""Damages valid token logs at random, and checks what `TokenLog.open` makes of them.

    python tests/fuzz/fuzz_token_log.py --seconds 20 --seed 0

Invariants that are checked: no error but LogError comes out; after a LogError every file is what it was, byte for
byte; after success every record read is one that was written, and a second open reads the same with nothing to cut.
A case is a pure function of its number, which is printed when it fails: `--seed NUMBER --cases 1` repeats it.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.token_log import LogError, LogPosition, TokenLog

Image = dict[str, bytes]
"""The files of a log: name to content."""
Key = tuple[str, int, int, bytes, str, int]


def key(record: HistoryRecord) -> Key:
    """All of a record in a form that compares NaN rewards."""
    return (
        record.prompt_id,
        record.step,
        record.uid,
        record.tokens.tobytes(),
        repr(record.reward),
        record.version,
    )


def make_record(rng: random.Random) -> HistoryRecord:
    # Small numbers and empty texts make records of many zero bytes, which look most like a torn tail.
    tokens = np.array([rng.choice((0, rng.randrange(2**31))) for _ in range(rng.randrange(12))], np.int32)
    return HistoryRecord(
        rng.choice(("", "p", "prompt/ü")),
        rng.choice((0, rng.randrange(2**63))),
        rng.choice((0, rng.randrange(2**63))),
        tokens,
        rng.choice((0.0, 1.0, float("nan"))),
        rng.choice((-1, 0, 7)),
    )


def make_log(folder: Path, rng: random.Random) -> tuple[list[Key], list[LogPosition]]:
    """Writes a log of a few segments; returns what it holds and the positions between appends."""
    log = TokenLog.create(folder, rng.randrange(1, 4), max_segment_bytes=rng.choice((60, 400, 10_000)))
    keys, positions = [], [log.position]
    for _ in range(rng.randrange(8)):
        records = [make_record(rng) for _ in range(rng.randrange(1, 4))]
        positions.append(log.append(records))
        keys += map(key, records)
    log.close()
    return keys, positions


def read_image(folder: Path) -> Image:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_image(folder: Path, image: Image) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in image.items():
        (folder / name).write_bytes(data)


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def span(data: bytes, rng: random.Random) -> tuple[int, int]:
    first, last = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return first, last


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def remove(data: bytes, rng: random.Random) -> bytes:
    first, last = span(data, rng)
    return data[:first] + data[last:]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    first, last = span(data, rng)
    return data[:last] + data[first:]


def splice(data: bytes, rng: random.Random) -> bytes:
    first, last = span(data, rng)
    where = rng.randrange(len(data) + 1)
    return data[:where] + data[first:last] + data[where:]


def zeros(data: bytes, rng: random.Random) -> bytes:
    first, last = span(data, rng)
    return data[:first] + bytes(last - first) + data[last:]


def zero_tail(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + bytes(rng.randrange(1, 200))


def noise_tail(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 60))


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip,
    cut,
    remove,
    duplicate,
    splice,
    zeros,
    zero_tail,
    noise_tail,
]


def damage(image: Image, rng: random.Random) -> list[str]:
    """Changes the files in place; returns what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        names = sorted(image)
        name = rng.choice((names[-1], rng.choice(names)))
        if len(names) > 1 and rng.random() < 0.1:
            other = rng.choice(names)
            image[name], image[other] = image[other], image[name]
            done.append(f"swap {name} {other}")
        elif len(names) > 1 and rng.random() < 0.1:
            del image[name]
            done.append(f"delete {name}")
        elif image[name]:
            mutation = rng.choice(MUTATIONS)
            image[name] = mutation(image[name], rng)
            done.append(f"{mutation.__name__} {name}")
    return done


def open_and_read(folder: Path, end: LogPosition | None) -> tuple[list[Key], int]:
    log = TokenLog.open(folder, end)
    try:
        return [key(record) for record in log.records()], log.num_bytes_cut
    finally:
        log.close()


def check_case(folder: Path, seed: int) -> str:
    """Runs one case; returns its outcome, raises AssertionError (or what came out) on a failure."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    written, positions = make_log(folder, rng)
    image = read_image(folder)
    end = rng.choice((None, None, rng.choice(positions)))
    done = damage(image, rng)
    write_image(folder, image)
    refusal = None
    try:
        found, num_bytes_cut = open_and_read(folder, end)
    except LogError as error:
        refusal = str(error)
    if refusal is not None:
        assert read_image(folder) == image, f"{done}: {refusal}, and files changed"
        assert len(refusal.splitlines()) == 1, f"{done}: {refusal}"
        return "refused"
    assert set(found) <= set(written), f"{done}: a record that was never written"
    assert open_and_read(folder, None) == (found, 0), f"{done}: the second open differs"
    return "cut" if num_bytes_cut else "whole"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=None, help="cases at most")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # each torn tail is one
    outcomes: Counter[str] = Counter()
    case, deadline = arguments.seed, time.monotonic() + arguments.seconds
    memory = Path("/dev/shm")  # most of the time would go into syncing files to a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as parent:
        while time.monotonic() < deadline and case - arguments.seed != arguments.cases:
            try:
                outcomes[check_case(Path(parent) / "history", case)] += 1
            except BaseException:
                print(f"case {case} failed; repeat it: --seed {case} --cases 1", file=sys.stderr)
                raise
            case += 1
    print(f"{outcomes.total()} cases: {', '.join(f'{n} {what}' for what, n in sorted(outcomes.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
