"""Indexes that processes share: one builds, the others map; nothing torn, nothing old, nobody waits for ever."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from slipstream.drafter import shared_folder
from slipstream.drafter.base import SOURCE_NAMES, DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.shared_folder import SharedFolder, make_folder
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.kernels import _native  # type: ignore[attr-defined]

PROMPTS = ("a", "b")
NEWEST, PER_STEP = 3, 3
PROMPT = np.array([90, 91], np.int32)
# Light on imports: it is started and killed many times.
ENDLESS_WRITER = """
import sys
import numpy as np
from slipstream.kernels import _native

index, rng = _native.SuffixIndexSet(), np.random.default_rng(0)
for i in range(100_000):
    text, path = rng.integers(0, 50, 60_000).astype(np.int32), f"{sys.argv[1]}/{i % 3}.index"
    index.publish("p", text, np.array([0, len(text)]), np.ones(1, np.float32), np.ones(1, np.uint8), path)
    index.wait()
"""
Drafts = list[tuple[str, list[int], int, list[float]]]


def records_of(step: int, length: int = 40) -> list[HistoryRecord]:
    rng = np.random.default_rng(step)
    return [
        HistoryRecord(prompt_id, step, 100 * step + i, rng.integers(10 * j, 10 * j + 4, length).astype(np.int32))
        for j, prompt_id in enumerate(PROMPTS)
        for i in range(PER_STEP)
    ]


def drafter_of(folder: SharedFolder | None, num_steps: int = NEWEST, shared_tokens: int = 10_000) -> SuffixDrafter:
    """Has seen `num_steps` steps; what it builds is built."""
    drafter = SuffixDrafter(min_match=2, index="native", folder=folder, shared_tokens=shared_tokens)
    for step in range(1, num_steps + 1):
        drafter.publish(step, records_of(step))
        drafter.follow_weights("a", [])
    return drafter


def propose(drafter: SuffixDrafter, uids: list[int]) -> Drafts:
    rows = len(uids)
    ones, out = np.ones(rows, np.int32), DraftBatch.empty(rows, 8)
    drafter.propose(LiveBatch(np.array(uids), ones, ones * 50, ones), Price(ones * 8, np.zeros(rows, np.float32)), out)
    return [
        (SOURCE_NAMES[out.source[i]], out.tokens[i, :n].tolist(), int(out.match_len[i]), out.probs[i, :n].tolist())
        for i, n in enumerate(out.count.tolist())
    ]


def extend(drafter: SuffixDrafter, uid: int, tokens: list[int]) -> None:
    one = np.ones(1, np.int32)
    batch = LiveBatch(np.array([uid]), one, one * 50, one)
    drafter.extend(batch, Ragged(np.array(tokens, np.int32), np.array([0, len(tokens)])))


def drafts_of(drafter: SuffixDrafter, first_uid: int = 1) -> Drafts:
    """Of six requests a prompt, and of six of a prompt that is new; closed again."""
    rng, uids = np.random.default_rng(9), list(range(first_uid, first_uid + 18))
    for i, uid in enumerate(uids):
        drafter.begin(uid, (*PROMPTS, "new")[i % 3], PROMPT)
        extend(drafter, uid, rng.integers(10 * (i % 2), 10 * (i % 2) + 4, i).tolist())
    found = propose(drafter, uids)
    for uid in uids:
        drafter.end(uid, finished=True)
    return found


def propose_one(drafter: SuffixDrafter) -> Drafts:
    """Of a new request of the first prompt."""
    drafter.begin(1, "a", PROMPT)
    return propose(drafter, [1])


def as_reader(path: str) -> None:
    """What the other process does."""
    folder = SharedFolder(Path(path), "reader", timeout_s=5.0)
    drafts = drafts_of(drafter_of(folder))
    print(json.dumps({"drafts": drafts, "mapped": folder.num_mapped, "missed": folder.num_missed}))


def files_in(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_another_process_maps_what_one_built_and_drafts_the_same(tmp_path: Path) -> None:
    drafter_of(SharedFolder(tmp_path, "builder"))
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    alone = drafts_of(drafter_of(None))
    assert answer["drafts"] == json.loads(json.dumps(alone))
    assert (answer["mapped"], answer["missed"]) == (len(PROMPTS), 0)
    assert {"history", "shared"} <= {source for source, _, _, _ in alone}


def test_a_reader_really_drafts_from_the_file(tmp_path: Path) -> None:
    """The builder's records differ from the reader's: the reader has what the file says."""
    folder = SharedFolder(tmp_path, "builder")
    builder = SuffixDrafter(index="native", folder=folder)
    text = np.array([70, 71, 72], np.int32)
    builder.publish(NEWEST, [HistoryRecord("a", NEWEST, i, text) for i in range(PER_STEP * NEWEST)])
    builder.follow_weights("a", [])
    reader = drafter_of(SharedFolder(tmp_path, "reader"))
    reader.begin(1, "a", PROMPT)
    assert reader.follow_weights("a", [70]) == {71: 9.0}


def test_without_file_and_promise_a_reader_builds_at_once(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path, "reader", timeout_s=60.0)
    started = time.monotonic()
    assert drafts_of(drafter_of(folder)) == drafts_of(drafter_of(None, shared_tokens=0))
    assert time.monotonic() - started < 10.0
    assert (folder.num_mapped, folder.num_missed) == (0, len(PROMPTS))


def test_workers_may_share_after_their_first_requests(tmp_path: Path) -> None:
    """As where a builder dies, or a second worker comes to a node, while requests are open."""
    builder, reader, alone = drafters = [drafter_of(None) for _ in range(3)]
    before = [propose_one(drafter) for drafter in drafters]
    folder = SharedFolder(tmp_path, "reader", timeout_s=5.0)
    builder.share(SharedFolder(tmp_path, "builder"))
    reader.share(folder)
    assert [propose(drafter, [1]) for drafter in drafters] == before
    for drafter in drafters:
        drafter.publish(NEWEST + 1, records_of(NEWEST + 1))
        drafter.follow_weights("a", [])
    assert [propose(drafter, [1]) for drafter in drafters] == before
    assert drafts_of(builder, 10) == drafts_of(reader, 10) == drafts_of(alone, 10)
    assert (folder.num_mapped, folder.num_missed) == (len(PROMPTS), 0)


def test_a_promise_that_is_never_kept_ends(tmp_path: Path) -> None:
    folder, lock = SharedFolder(tmp_path, "reader", timeout_s=0.3), shared_folder._lock(tmp_path)
    assert lock is not None, "the builder lives"
    SharedFolder(tmp_path, "builder").promise("a", folder.index_file("a", NEWEST, PER_STEP * NEWEST))
    reader = drafter_of(folder)
    started = time.monotonic()
    reader.begin(1, "a", PROMPT)
    assert 0.3 <= time.monotonic() - started < 5.0
    os.close(lock)
    assert folder.num_missed == 1
    assert propose(reader, [1]) == propose_one(drafter_of(None))


def test_a_promise_that_is_kept_late_is_waited_for(tmp_path: Path) -> None:
    elsewhere, shared = tmp_path / "elsewhere", tmp_path / "shared"
    for path in (elsewhere, shared):
        path.mkdir()
    drafter_of(SharedFolder(elsewhere, "builder"))
    folder = SharedFolder(shared, "reader", timeout_s=30.0)
    file = folder.index_file("a", NEWEST, PER_STEP * NEWEST)
    SharedFolder(shared, "builder").promise("a", file)
    reader = drafter_of(folder)
    lock = shared_folder._lock(shared)
    assert lock is not None, "the builder lives"
    timer = threading.Timer(0.2, (elsewhere / file.name).rename, [file])
    timer.start()
    reader.begin(1, "a", PROMPT)
    timer.join()
    os.close(lock)
    assert (folder.num_mapped, folder.num_missed) == (1, 0)
    assert propose(reader, [1]) == propose_one(drafter_of(None))


def damaged_versions(whole: bytes) -> list[bytes]:
    rng, size = random.Random(0), len(whole)
    versions = [whole[:n] for n in (0, 10, 63, 64, size // 2, size - 8, size - 1)]
    versions += [whole + bytes(8), bytes(size), whole[: size // 2] + bytes(size - size // 2)]
    for at in [*range(64), *(rng.randrange(size) for _ in range(60))]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        versions.append(bytes(flipped))
    return versions


def test_a_damaged_file_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    drafter_of(SharedFolder(tmp_path, "builder"))
    file = SharedFolder(tmp_path, "reader").index_file("a", NEWEST, PER_STEP * NEWEST)
    whole = file.read_bytes()
    index = _native.SuffixIndexSet()
    index.attach("a", str(file))
    before = (index.stats(), index.follow_weights("a", [1], False))
    assert before[0]["frozen_tokens"] > 0
    for i, damaged in enumerate(damaged_versions(whole)):
        bad = tmp_path / f"bad-{i}"
        bad.write_bytes(damaged)
        with pytest.raises(_native.BadIndexFileError, match=str(bad)):
            index.attach("a", str(bad))
    assert (index.stats(), index.follow_weights("a", [1], False)) == before
    missing = str(tmp_path / "missing.index")
    for attach in (lambda: index.attach("a", missing), lambda: index.attach_shared(missing)):
        with pytest.raises(FileNotFoundError, match=missing):
            attach()


def test_a_reader_builds_what_was_damaged(tmp_path: Path) -> None:
    drafter_of(SharedFolder(tmp_path, "builder"))
    folder = SharedFolder(tmp_path, "reader")
    for file in tmp_path.glob("*.index"):
        file.write_bytes(file.read_bytes()[:-8])
    assert drafts_of(drafter_of(folder)) == drafts_of(drafter_of(None))
    assert (folder.num_mapped, folder.num_missed) == (0, len(PROMPTS))


def newest_files(folder: SharedFolder, newest: int, text: int) -> set[str]:
    files = [
        *(folder.index_file(prompt_id, newest, PER_STEP * newest).name for prompt_id in PROMPTS),
        folder.text_file(text).name,
    ]
    return {*files, *(name + ".promised" for name in files)}


def test_old_versions_go_and_open_requests_on_them_go_on(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path, "builder")
    builder, reader = drafter_of(folder, 1), drafter_of(SharedFolder(tmp_path, "reader"), 1)
    assert files_in(tmp_path) == newest_files(folder, 1, 1)
    reader.begin(50, "a", PROMPT)
    before = propose(reader, [50])
    assert before[0][0] == "history"
    for step in (2, 3):
        for drafter in (builder, reader):
            drafter.publish(step, records_of(step))
            drafter.follow_weights("a", [])
    assert files_in(tmp_path) == newest_files(folder, 3, 3)
    assert propose(reader, [50]) == before
    extend(reader, 50, before[0][1][:2])
    assert propose(reader, [50])[0][1][:6] == before[0][1][2:]
    assert drafts_of(reader, first_uid=60) == drafts_of(drafter_of(None))


def test_publishing_faster_than_building_leaves_no_old_files(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path, "builder")
    builder = SuffixDrafter(index="native", folder=folder)
    for step in range(1, 5):
        builder.publish(step, records_of(step, length=20_000 if step == 1 else 40))
    builder.follow_weights("a", [])
    indexes = {name for name in files_in(tmp_path) if name.endswith(".index")}
    assert indexes == {folder.index_file(prompt_id, 4, PER_STEP * 4).name for prompt_id in PROMPTS}


def test_a_builder_that_cannot_write_goes_on_alone(tmp_path: Path) -> None:
    """What it promised is taken back, so that no reader waits for it."""
    folder = SharedFolder(tmp_path, "builder")
    for prompt_id in PROMPTS:
        (folder.index_file(prompt_id, 1, PER_STEP) / "in the way").mkdir(parents=True)
    builder = drafter_of(folder, 1)
    assert drafts_of(builder) == drafts_of(drafter_of(None, 1))
    assert not list(tmp_path.glob("*.index.*"))
    assert (tmp_path / (folder.text_file(1).name + ".promised")).exists()


def test_a_killed_builder_leaves_whole_files_only(tmp_path: Path) -> None:
    index, rng = _native.SuffixIndexSet(), random.Random(0)
    attached = 0
    for i in range(5):
        path = tmp_path / str(i)
        path.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", ENDLESS_WRITER, str(path)], cwd=path)
        deadline = time.monotonic() + 20.0
        try:
            while len(files_in(path)) < 2 and time.monotonic() < deadline:
                time.sleep(0.0005)
            seen = files_in(path)
            # Right when a name comes or goes, which is when it is being written, and at any other moment.
            while i % 2 and files_in(path) == seen and time.monotonic() < deadline:
                pass
            time.sleep(rng.uniform(0.0, 0.004 if i % 2 else 0.1))
        finally:
            writer.kill()
            assert writer.wait() == -signal.SIGKILL
        for file in path.glob("*.index"):
            index.attach("p", str(file))
            attached += 1
    assert attached >= 5


def test_folders_of_dead_processes_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_folder, "MEMORY", tmp_path)
    hold = f"import time; from slipstream.drafter import shared_folder as s; s.MEMORY = s.Path({str(tmp_path)!r}); "
    hold += "print(s.make_folder().name, flush=True); time.sleep(60)"
    owners = [subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        names = [owner.stdout.readline().strip() for owner in owners if owner.stdout]
        owners[0].kill()
        owners[0].wait()
        for other in ("slipstream-notes", "other"):
            (tmp_path / other).mkdir()
        made = make_folder()
        assert files_in(tmp_path) == {names[1], "slipstream-notes", "other", made.name}
        assert make_folder() != made
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()


def test_only_the_owner_may_read() -> None:
    path = make_folder()
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        drafter_of(SharedFolder(path, "builder"))
        written = [file for file in path.iterdir() if not file.name.endswith(".promised")]
        assert len(written) == len(PROMPTS) + 1
        assert {stat.S_IMODE(file.stat().st_mode) for file in written} == {0o600}
    finally:
        shutil.rmtree(path)


if __name__ == "__main__":
    as_reader(sys.argv[1])
