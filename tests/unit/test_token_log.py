"""The token log: what is acknowledged survives, torn tails go, every other fault is one line and changes nothing."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.token_log import MAX_TOKENS, LogError, LogPosition, TokenLog

HEADER_BYTES = 12
INT64 = st.integers(-(2**63), 2**63 - 1)
RECORDS = st.builds(
    lambda prompt_id, step, uid, tokens, reward, version: HistoryRecord(
        prompt_id, step, uid, np.array(tokens, np.int32), reward, version
    ),
    st.text(max_size=8),
    INT64,
    INT64,
    st.lists(st.integers(0, 2**31 - 1), max_size=20),
    st.floats(),
    INT64,
)


def key(record: HistoryRecord) -> tuple:
    """All of a record, in a form that compares NaN rewards to the bit."""
    reward = struct.pack("<d", record.reward)
    return record.prompt_id, record.step, record.uid, record.tokens.tolist(), reward, record.version


def keys(log: TokenLog) -> list[tuple]:
    return [key(record) for record in log.records()]


def make(i: int, num_tokens: int = 5) -> HistoryRecord:
    """Record i, a pure function of i."""
    tokens = (np.arange(num_tokens, dtype=np.int32) + i) % 1000
    return HistoryRecord(f"prompt-{i % 3}", i, i + 1, tokens, i / 7, i - 1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def written(folder: Path, count: int, max_segment_bytes: int = 1 << 20) -> list[LogPosition]:
    """A closed log of records 0 .. count - 1; returns the position in front of each and behind the last."""
    log = TokenLog.create(folder, max_segment_bytes=max_segment_bytes)
    positions = [log.position, *(log.append([make(i)]) for i in range(count))]
    log.close()
    return positions


def refused(folder: Path, match: str, end: LogPosition | None = None) -> None:
    """Opening raises one line that matches, and no file has changed."""
    before = files(folder)
    with pytest.raises(LogError, match=match) as caught:
        TokenLog.open(folder, end)
    assert len(str(caught.value).splitlines()) == 1
    assert files(folder) == before


@settings(max_examples=50)
@given(batches=st.lists(st.lists(RECORDS, max_size=3), max_size=6), max_segment_bytes=st.integers(1, 400))
def test_what_goes_in_comes_out(batches: list[list[HistoryRecord]], max_segment_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run" / "history"
        log = TokenLog.open(folder, max_segment_bytes=max_segment_bytes)
        for batch in batches:
            log.append(batch)
        expected = [key(record) for batch in batches for record in batch]
        assert keys(log) == expected
        log.close()
        again = TokenLog.open(folder)
        assert keys(again) == expected
        assert (again.position, again.num_bytes_cut, again.cut_at) == (log.position, 0, None)
        again.close()


def test_records_are_arrays_of_their_own(tmp_path: Path) -> None:
    log = TokenLog.create(tmp_path)
    log.append([make(0)])
    (record,) = log.records()
    assert record.tokens.dtype == np.int32
    assert record.tokens.base is None, "a view would keep the segment in memory"


def test_a_fresh_log_and_the_format_on_disk(tmp_path: Path) -> None:
    """The layout is a promise to later versions: changing it needs another format number."""
    log = TokenLog.create(tmp_path)
    log.append([HistoryRecord("pä", 3, 2**62, np.array([7, 2**31 - 1], np.int32), 0.5, 2)])
    payload = struct.pack("<qqqdII", 3, 2**62, 2, 0.5, 3, 2) + "pä".encode() + struct.pack("<ii", 7, 2**31 - 1)
    head = struct.pack("<II", len(payload), crc32(payload))
    segment = b"sliplog\n" + struct.pack("<I", 1) + head + struct.pack("<I", crc32(head)) + payload
    assert files(tmp_path) == {"000001.log": segment}
    assert log.position == (1, len(segment))


def test_an_append_is_with_the_system_when_it_returns(tmp_path: Path) -> None:
    log = TokenLog.create(tmp_path)
    for i in range(3):
        position = log.append([make(2 * i), make(2 * i + 1)])
        assert (tmp_path / "000001.log").stat().st_size == position.offset
    assert log.append([]) == position == log.position


def test_sync_and_a_new_segment_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    log = TokenLog.create(tmp_path / "history", max_segment_bytes=100)
    monkeypatch.setattr(os, "fsync", record)
    log.append([make(0)])
    assert synced == []
    log.sync()
    assert synced == ["000001.log"]
    log.append([make(1)])
    assert synced[1:] == ["000001.log", "000002.log.new", "history"]


def test_segments_roll_and_a_long_append_has_one_of_its_own(tmp_path: Path) -> None:
    log = TokenLog.create(tmp_path, max_segment_bytes=200)
    size = log.append([make(0)]).offset - HEADER_BYTES
    assert log.append([make(1)]) == (1, HEADER_BYTES + 2 * size)
    assert log.append([make(2)]) == (2, HEADER_BYTES + size)
    assert log.append([make(3, num_tokens=100)]).segment == 3
    assert log.append([make(4)]).segment == 4
    assert keys(log) == [key(make(i, 100 if i == 3 else 5)) for i in range(5)]
    log.close()
    again = TokenLog.open(tmp_path)
    assert again.append([make(5)]) == (4, HEADER_BYTES + 2 * size)
    assert len(keys(again)) == 6


def test_the_last_record_torn_at_any_byte_costs_that_record_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    *_, good, end = written(tmp_path, 4)
    path = tmp_path / "000001.log"
    whole = path.read_bytes()
    for size in range(good.offset, end.offset):
        path.write_bytes(whole[:size])
        caplog.clear()
        log = TokenLog.open(tmp_path)
        assert keys(log) == [key(make(i)) for i in range(3)]
        assert (log.position, log.num_bytes_cut) == (good, size - good.offset)
        assert log.cut_at == (good if size > good.offset else None)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == (size > good.offset)
        assert all(f"{path}: byte {good.offset}: " in warning for warning in warnings)
        assert all(warning.endswith(f"{size - good.offset} bytes cut off") for warning in warnings)
        assert path.stat().st_size == good.offset
        log.append([make(3)])
        log.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", ["nothing", "half the header", "half the payload", "all but the last token"])
def test_zeros_after_a_power_loss_are_a_torn_tail(tmp_path: Path, kept: str) -> None:
    *_, good, end = written(tmp_path, 3)
    path = tmp_path / "000001.log"
    size = {"nothing": 0, "half the header": 6, "half the payload": 40}.get(kept, end.offset - good.offset - 4)
    path.write_bytes(path.read_bytes()[: good.offset + size] + bytes(5000))
    log = TokenLog.open(tmp_path)
    assert keys(log) == [key(make(0)), key(make(1))]
    assert (log.position, log.num_bytes_cut) == (good, size + 5000)


def test_a_last_record_with_a_wrong_checksum_is_torn(tmp_path: Path) -> None:
    *_, good, _ = written(tmp_path, 2)
    path = tmp_path / "000001.log"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    log = TokenLog.open(tmp_path)
    assert (keys(log), log.cut_at) == ([key(make(0))], good)


def test_a_flipped_bit_is_refused_or_costs_the_last_record(tmp_path: Path) -> None:
    """Only the payload of the very last record can be the trace of a crash: there the prefix comes back."""
    positions = written(tmp_path, 4, max_segment_bytes=200)
    assert [position.segment for position in positions] == [1, 1, 1, 2, 2]
    before = files(tmp_path)
    last_payload = positions[3].offset + HEADER_BYTES
    for name, data in before.items():
        for i in range(len(data)):
            changed = bytearray(data)
            changed[i] ^= 1 << 5 * i % 8
            (tmp_path / name).write_bytes(changed)
            if name == "000002.log" and i >= last_payload:
                log = TokenLog.open(tmp_path)
                assert keys(log) == [key(make(i)) for i in range(3)]
                log.close()
            else:
                with pytest.raises(LogError, match=rf"{name}: byte \d+: "):
                    TokenLog.open(tmp_path)
                assert (tmp_path / name).read_bytes() == changed
            (tmp_path / name).write_bytes(data)


def overwrite(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with open(folder / name, "r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (overwrite("000003.log", 0, b"PK"), r"000003\.log: byte 0: the segment starts with b'PKiplog\\n'; allowed"),
        (overwrite("000003.log", 8, b"\2"), r"000003\.log: byte 8: the segment has format 2; allowed: 1"),
        (truncate("000003.log", 7), r"000003\.log: byte 0: the segment starts with"),
        (overwrite("000003.log", 12, b"\xff"), r"000003\.log: byte 12: the checksum of a record's header differs"),
        (overwrite("000003.log", 30, b"\xff"), r"000003\.log: byte 12: the checksum of a record of 68 bytes differs"),
        (overwrite("000002.log", 100, b"\xff"), r"000002\.log: byte 92: the checksum of a record's header differs"),
        (truncate("000001.log", 100), r"000001\.log: byte 92: the header of a record runs past the end"),
        (truncate("000001.log", 120), r"000001\.log: byte 92: a record of 68 bytes runs past the end"),
        (overwrite("000001.log", 172, bytes(9)), r"000001\.log: byte 172: the header of a record runs past the end"),
        (lambda folder: (folder / "000002.log").unlink(), r"000002\.log: byte 0: no such file, .* 000003\.log"),
    ],
)
def test_what_no_crash_explains_is_refused(tmp_path: Path, damage: Callable[[Path], None], fault: str) -> None:
    written(tmp_path, 6, max_segment_bytes=200)
    assert sorted(files(tmp_path)) == ["000001.log", "000002.log", "000003.log"]
    damage(tmp_path)
    refused(tmp_path, fault)


@pytest.mark.parametrize(
    "payload",
    [
        b"short",
        struct.pack("<qqqdII", 0, 0, 0, 0.0, 1, 1) + b"p",
        struct.pack("<qqqdII", 0, 0, 0, 0.0, 1, 0) + b"\xff",
        struct.pack("<qqqdIIi", 0, 0, 0, 0.0, 0, 1, -1),
    ],
    ids=["short", "sizes", "text", "token"],
)
def test_a_payload_of_another_kind_is_refused(tmp_path: Path, payload: bytes) -> None:
    (end,) = written(tmp_path, 0)
    head = struct.pack("<II", len(payload), crc32(payload))
    with open(tmp_path / "000001.log", "ab") as file:
        file.write(head + struct.pack("<I", crc32(head)) + payload)
    refused(tmp_path, rf"000001\.log: byte {end.offset}: the record is none of format 1: ")


def test_opening_up_to_a_position_keeps_what_lies_in_front_of_it(tmp_path: Path) -> None:
    positions = written(tmp_path / "whole", 7, max_segment_bytes=200)
    image = files(tmp_path / "whole")
    for count, end in enumerate(positions):
        folder = tmp_path / str(count)
        folder.mkdir()
        for name, data in image.items():
            (folder / name).write_bytes(data)
        # Behind the position anything may lie: a power loss took what was not synced.
        if end.segment < 4:
            (folder / "000004.log").write_bytes(b"rot")
        log = TokenLog.open(folder, end, max_segment_bytes=200)
        assert keys(log) == [key(make(i)) for i in range(count)]
        assert log.position == end
        assert (log.cut_at, log.num_bytes_cut > 0) == ((end, True) if count < 7 else (None, False))
        for i in range(count, 7):
            log.append([make(i)])
        log.close()
        assert files(folder) == image, "sampled again, the log is the same to the byte"


def test_a_position_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    last = written(tmp_path, 4, max_segment_bytes=200)[-1]
    refused(
        tmp_path, r"000002\.log: byte 172: the segment ends here; it should reach byte 173", last._replace(offset=173)
    )
    refused(tmp_path, r"000002\.log: byte 100: no record ends here", last._replace(offset=100))
    refused(tmp_path, r"000002\.log: byte 3: no record ends here", last._replace(offset=3))
    refused(tmp_path, r"000003\.log: byte 0: no such file; it should reach byte 12", LogPosition(3, 12))
    overwrite("000002.log", 150, b"\xff")(tmp_path)
    refused(tmp_path, r"000002\.log: byte 92: the checksum of a record of 68 bytes differs", last)
    with pytest.raises(LogError, match=r"no segment lies here; the log should reach byte 12 of 000001\.log"):
        TokenLog.open(tmp_path / "missing", LogPosition(1, 12))
    assert not (tmp_path / "missing").exists()


def test_old_segments_are_dropped_and_positions_stay_valid(tmp_path: Path) -> None:
    log = TokenLog.create(tmp_path, max_segment_bytes=200)
    positions = [log.append([make(i)]) for i in range(8)]
    assert log.drop_segments(lambda record: record.step in (3, 7)) == 1
    assert keys(log) == [key(make(i)) for i in range(2, 8)]
    assert log.drop_segments(lambda record: record.step in (2, 7)) == 0, "its other record is wanted"
    assert log.drop_segments(lambda record: record.step == 5) == 1
    log.close()
    again = TokenLog.open(tmp_path, positions[5])
    assert keys(again) == [key(make(i)) for i in (4, 5)]
    assert again.position == positions[5] == (3, 172)
    assert again.drop_segments(lambda record: False) == 0, "the segment being written stays"
    assert again.append([make(6)]).segment == 3
    again.close()
    # A position in a segment that was dropped: nothing in front of it is left, what is behind it is cut off.
    cold = TokenLog.open(tmp_path, positions[2])
    assert (keys(cold), cold.position) == ([], (3, HEADER_BYTES))


def test_a_segment_that_cannot_be_read_is_not_dropped(tmp_path: Path) -> None:
    log = TokenLog.create(tmp_path, max_segment_bytes=200)
    for i in range(4):
        log.append([make(i)])
    overwrite("000001.log", 100, b"\xff")(tmp_path)
    with pytest.raises(LogError, match=r"000001\.log: byte 92"):
        log.drop_segments(lambda record: False)
    with pytest.raises(LogError, match=r"000001\.log: byte 92"):
        list(log.records())
    assert sorted(files(tmp_path)) == ["000001.log", "000002.log"]


def test_a_segment_that_never_got_its_name_is_litter(tmp_path: Path) -> None:
    written(tmp_path, 2)
    (tmp_path / "000002.log.new").write_bytes(b"slip")
    log = TokenLog.open(tmp_path)
    assert (len(keys(log)), log.num_bytes_cut) == (2, 0)
    assert sorted(files(tmp_path)) == ["000001.log"]


def test_create_starts_anew_whatever_lies_there(tmp_path: Path) -> None:
    written(tmp_path, 6, max_segment_bytes=200)
    overwrite("000002.log", 100, b"\xff")(tmp_path)
    log = TokenLog.create(tmp_path, first_segment=9)
    assert (keys(log), log.position) == ([], (9, HEADER_BYTES))
    assert sorted(files(tmp_path)) == ["000009.log"]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (HistoryRecord("p", 1, 8, np.array([1, -2], np.int32)), "uid 8: a token is -2; allowed: 0 or above"),
        (HistoryRecord("p", 1, 8, np.array([1, 2])), r"uid 8: tokens are int64\[2\]; allowed: int32\[n\]"),
        (HistoryRecord("p", 1, 8, np.ones((2, 3), np.int32)), r"tokens are int32\[2, 3\]; allowed: int32\[n\]"),
        (HistoryRecord("p", 1, 8, [1, 2]), "tokens are list; allowed"),
        (HistoryRecord("p", 1, 8, np.zeros(MAX_TOKENS + 1, np.int32)), "16777217 tokens; allowed: 16777216 at most"),
        (HistoryRecord("p" * 65537, 1, 8, np.zeros(1, np.int32)), "prompt_id has 65537 bytes; allowed: 65536 at most"),
        (HistoryRecord("\ud800", 1, 8, np.zeros(1, np.int32)), "prompt_id is .* UTF-8"),
        (HistoryRecord("p", 2**63, 8, np.zeros(1, np.int32)), "a number does not fit"),
        (HistoryRecord("p", 1, 8, np.zeros(1, np.int32), reward=None), "a number does not fit"),
    ],
    ids=["negative", "dtype", "2-D", "list", "long", "long name", "surrogate", "step", "reward"],
)
def test_a_record_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, record: HistoryRecord, fault: str
) -> None:
    log = TokenLog.create(tmp_path)
    position = log.append([make(0)])
    before = files(tmp_path)
    with pytest.raises(LogError, match=fault) as caught:
        log.append([make(1), record])
    assert len(str(caught.value).splitlines()) == 1
    assert files(tmp_path) == before
    assert log.position == position
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


FULL_DISK_JOB = """
import resource, sys
from pathlib import Path
import numpy as np
from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.token_log import TokenLog
log = TokenLog.create(Path(sys.argv[1]))
record = HistoryRecord("p", 1, 1, np.arange(1000, dtype=np.int32))
log.append([record])
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    log.append([record, record, record])
except OSError as error:
    print(error.strerror, log.position == (1, (Path(sys.argv[1]) / "000001.log").stat().st_size))
log.append([record])
print(len(list(log.records())))
"""


def test_a_full_disk_passes_through_and_leaves_the_log_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_JOB, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["File too large True", "2"], done.stderr
    log = TokenLog.open(tmp_path)
    assert (len(keys(log)), log.num_bytes_cut) == (2, 0)


KILL_JOB = f"""
from __future__ import annotations
import os, sys
from pathlib import Path
import numpy as np
from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.token_log import TokenLog

{inspect.getsource(make)}
log = TokenLog.open(Path(sys.argv[1]), max_segment_bytes=200_000)
count = sum(1 for _ in log.records())
while True:
    # Appends from one small record to megabytes, so that kills come in the middle of writes, too.
    size = 200_000 if count % 10 == 0 else 50
    log.append([make(i, size) for i in range(count, count + 3)])
    count += 3
    os.write(1, f"{{count}}\\n".encode())
    if count % 50 == 0:
        log.sync()
"""


def test_kill_at_any_moment_loses_at_most_the_append_under_way(tmp_path: Path) -> None:
    rng = random.Random(0)
    count = 0
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", KILL_JOB, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        first = child.stdout.readline()
        assert first, "the child could not open the log"
        time.sleep(rng.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()
        assert child.wait() == -signal.SIGKILL
        acknowledged = int((first + rest).split(b"\n")[-2])
        assert acknowledged > count
        log = TokenLog.open(tmp_path)
        found = list(log.records())
        log.close()
        count = len(found)
        # A killed append may leave some of its three records whole.
        assert acknowledged <= count <= acknowledged + 3
        for i, record in enumerate(found):
            expected = make(i, len(record.tokens))
            assert (record.step, record.prompt_id) == (i, expected.prompt_id)
            assert np.array_equal(record.tokens, expected.tokens)
    assert count > 60


def test_the_fuzz_target_runs(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repo_root / "tests/fuzz/fuzz_token_log.py"), "--cases", "200", "--seconds", "60"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("200 cases: ")
    assert all(f" {outcome}" in done.stdout for outcome in ("cut", "refused", "whole"))
