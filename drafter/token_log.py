"""The drafter's memory on disk: every finished rollout, appended to a checksummed log.

Invariants
- What `append` has returned for is in the hands of the operating system: a killed process loses at most the append it
  was in. After `sync` a power loss takes nothing of it away either.
- Every byte that is read as a record is covered by a checksum. A tail that an interrupted write explains is cut off and
  counted; any other fault is a LogError, and nothing on disk has changed.
- Segments 000001.log, 000002.log, ... have no holes; the oldest may have been dropped. A segment gets its name with its
  header on disk, and is synced before the next one starts, so that only the last can be torn.
- Bytes in front of a position are never rewritten: it stays valid while the log grows and its oldest segments go.
- One process writes to a log at a time.

Segment: magic (8 bytes), format version u32, records. Record: payload length u32, CRC-32 of the payload u32, CRC-32 of
these first 8 bytes u32, payload. Payload: step i64, uid i64, version i64, reward f64, bytes of prompt_id u32, number of
tokens u32, prompt_id (UTF-8), tokens (int32). All little endian.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

from slipstream.drafter.base import HistoryRecord

FORMAT = 1
MAX_SEGMENT_BYTES = 64 << 20
MAX_TOKENS, MAX_PROMPT_ID_BYTES = 1 << 24, 1 << 16
"""Bounds of one record, far above any rollout: a length beyond them is a mistake of the caller."""

_MAGIC = b"sliplog\n"
_SEGMENT = struct.Struct("<8sI")
_RECORD = struct.Struct("<III")
_PAYLOAD = struct.Struct("<qqqdII")
_NAME = re.compile(r"\d{6,}\.log")
_UNNAMED = ".new"
_log = logging.getLogger(__name__)


class LogError(ValueError):
    """A log that cannot be read, or a record that cannot be written; one line: file, byte offset, what is wrong."""


class LogPosition(NamedTuple):
    """The end of a record (or of a segment's header); ordered as written. segment: 1-based; offset: bytes."""

    segment: int
    offset: int


class _TornError(LogError):
    """A fault that a write which was cut short explains, if it is the last one of the log."""


class TokenLog:
    """An open log; made by `open` or `create`.

    folder: where the segments lie; position: where the next record goes; cut_at, num_bytes_cut: from where `open` cut
    how many bytes off (None and 0: nothing), torn or behind its `end`.
    """

    def __init__(self, folder: Path, segments: list[int], position: LogPosition, max_segment_bytes: int) -> None:
        self.folder, self.position = folder, position
        self.cut_at: LogPosition | None = None
        self.num_bytes_cut = 0
        self._segments, self._max_segment_bytes = segments, max_segment_bytes
        self._file = os.open(_path(folder, position.segment), os.O_WRONLY)

    @classmethod
    def create(cls, folder: Path, first_segment: int = 1, max_segment_bytes: int = MAX_SEGMENT_BYTES) -> TokenLog:
        """An empty log in `folder`, which is made if need be; segments that lie there are deleted unread."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder, _numbers(folder)[::-1])
        _start_segment(folder, first_segment)
        return cls(folder, [first_segment], LogPosition(first_segment, _SEGMENT.size), max_segment_bytes)

    @classmethod
    def open(cls, folder: Path, end: LogPosition | None = None, max_segment_bytes: int = MAX_SEGMENT_BYTES) -> TokenLog:
        """The log in `folder`, checked from its first byte to its last.

        end: None keeps every whole record, and a folder without segments becomes an empty log. A position that was
        synced keeps exactly what lies in front of it: what comes after is cut off unread, because a power loss may
        have left anything there. When the segment of `end` was dropped, the log carries on empty behind it.
        max_segment_bytes: a segment is closed before an append would make it longer; a longer append gets a segment of
        its own. Raises LogError for a fault that no interrupted write explains, OSError when a file cannot be read.
        """
        folder = Path(folder)
        numbers = _numbers(folder)
        if not numbers and end is None:
            return cls.create(folder, max_segment_bytes=max_segment_bytes)
        kept = [number for number in numbers if end is None or number <= end.segment]
        if not kept:
            assert end is not None
            if not numbers:
                raise _fault(folder, 0, f"no segment lies here; the log should reach {_place(end)}")
            _log.warning("%s: everything up to %s was dropped; the log carries on empty", folder, _place(end))
            return cls.create(folder, end.segment + 1, max_segment_bytes)
        if end is not None and kept[-1] < end.segment:
            raise _fault(_path(folder, end.segment), 0, f"no such file; it should reach byte {end.offset}")
        for number in range(kept[0], kept[-1]):
            if number not in kept:
                raise _fault(_path(folder, number), 0, f"no such file, although there is {kept[-1]:06d}.log")
        for number in kept[:-1]:
            _check(_path(folder, number))
        last = _path(folder, kept[-1])
        offset, torn = _check(last, may_be_torn=True) if end is None else _check(last, end.offset)
        log = cls(folder, kept, LogPosition(kept[-1], offset), max_segment_bytes)
        log._cut(numbers[len(kept) :], torn)
        return log

    def append(self, records: Iterable[HistoryRecord]) -> LogPosition:
        """Writes records in one go and returns the position behind them.

        Raises LogError, before anything is written, for a record the format cannot hold; an OSError (disk full) passes
        through, and what was written of these records is cut off again.
        """
        data = b"".join(_encode(record) for record in records)
        if not data:
            return self.position
        start = self.position
        if _SEGMENT.size < start.offset and start.offset + len(data) > self._max_segment_bytes:
            start = self._next_segment()
        try:
            left = memoryview(data)
            while left:
                left = left[os.pwrite(self._file, left, start.offset + len(data) - len(left)) :]
            self.position = LogPosition(start.segment, start.offset + len(data))
        except BaseException:
            # An interrupt may come when the position has moved on already.
            self.position = start
            try:
                os.ftruncate(self._file, start.offset)
            except OSError:
                self.close()  # a later append would leave the rest of this one behind itself
            raise
        return self.position

    def sync(self) -> None:
        """Brings everything up to `position` to disk."""
        os.fsync(self._file)

    def records(self) -> Iterator[HistoryRecord]:
        """Every record in the log when the iteration starts, oldest first; LogError when a file has changed since."""
        end = self.position
        for number in list(self._segments):
            limit = end.offset if number == end.segment else None
            for _, record in _read(_path(self.folder, number), limit):
                yield record

    def drop_segments(self, keep: Callable[[HistoryRecord], bool]) -> int:
        """Deletes the oldest segments, up to the first that has a record to keep; returns how many.

        The segment being written stays. Raises LogError when a segment cannot be read: it stays, too.
        """
        dropped = 0
        while len(self._segments) > 1:
            oldest = self._segments[0]
            if any(keep(record) for _, record in _read(_path(self.folder, oldest))):
                break
            _remove(self.folder, [oldest])
            del self._segments[0]
            dropped += 1
        return dropped

    def close(self) -> None:
        """Ends the use of the log; calling it twice is fine."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _next_segment(self) -> LogPosition:
        os.fsync(self._file)
        number = self.position.segment + 1
        _start_segment(self.folder, number)
        file, position = os.open(_path(self.folder, number), os.O_WRONLY), LogPosition(number, _SEGMENT.size)
        old, segments = self._file, [*self._segments, number]
        self._file, self.position, self._segments = file, position, segments
        os.close(old)
        return position

    def _cut(self, later: list[int], torn: str) -> None:
        """Deletes `later` segments and what lies behind the position; all that is kept has been checked."""
        offset, size = self.position.offset, os.fstat(self._file).st_size
        self.num_bytes_cut = size - offset + sum(_path(self.folder, number).stat().st_size for number in later)
        _remove(self.folder, later[::-1])
        for unnamed in self.folder.glob(f"*.log{_UNNAMED}"):
            unnamed.unlink()
        if size > offset:
            os.ftruncate(self._file, offset)
            os.fsync(self._file)
        if self.num_bytes_cut:
            self.cut_at = self.position
        if torn:
            _log.warning("%s; %d bytes cut off", torn, size - offset)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"


def _place(position: LogPosition) -> str:
    return f"byte {position.offset} of {position.segment:06d}.log"


def _numbers(folder: Path) -> list[int]:
    """The segments in a folder, ascending."""
    found = (int(path.stem) for path in folder.glob("*.log") if _NAME.fullmatch(path.name))
    return sorted(number for number in found if _path(folder, number).is_file())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _start_segment(folder: Path, number: int) -> None:
    """Puts an empty segment in place by one rename: under its name it always has its header."""
    path = _path(folder, number)
    unnamed = path.with_name(path.name + _UNNAMED)
    with open(unnamed, "wb") as file:
        file.write(_SEGMENT.pack(_MAGIC, FORMAT))
        file.flush()
        os.fsync(file.fileno())
    os.rename(unnamed, path)
    _sync_folder(folder)


def _remove(folder: Path, numbers: list[int]) -> None:
    """Deletes segments in this order, each for good before the next: a crash in between leaves no hole."""
    for number in numbers:
        _path(folder, number).unlink()
        _sync_folder(folder)


def _encode(record: HistoryRecord) -> bytes:
    tokens = record.tokens
    who = f"record of uid {record.uid}"
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype != np.int32:
        kind = f"{tokens.dtype}{list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise LogError(f"{who}: tokens are {kind}; allowed: int32[n]")
    if len(tokens) > MAX_TOKENS:
        raise LogError(f"{who}: it has {len(tokens)} tokens; allowed: {MAX_TOKENS} at most")
    if len(tokens) and tokens.min() < 0:
        raise LogError(f"{who}: a token is {tokens.min()}; allowed: 0 or above")
    try:
        name = record.prompt_id.encode()
        numbers = (record.step, record.uid, record.version, record.reward, len(name), len(tokens))
        payload = _PAYLOAD.pack(*numbers) + name + tokens.astype("<i4").tobytes()
    except UnicodeEncodeError:
        raise LogError(f"{who}: prompt_id is {record.prompt_id!r}; allowed: text that UTF-8 can hold") from None
    except struct.error as error:
        raise LogError(f"{who}: a number does not fit ({error}); allowed: 64-bit integers, a float reward") from None
    if len(name) > MAX_PROMPT_ID_BYTES:
        raise LogError(f"{who}: prompt_id has {len(name)} bytes; allowed: {MAX_PROMPT_ID_BYTES} at most")
    head = struct.pack("<II", len(payload), crc32(payload))
    return head + struct.pack("<I", crc32(head)) + payload


def _decode(payload: memoryview) -> HistoryRecord:
    """The record of a payload; ValueError when the sizes, the text or the tokens cannot be."""
    if len(payload) < _PAYLOAD.size:
        raise ValueError(f"{len(payload)} bytes are too few")
    step, uid, version, reward, name_bytes, num_tokens = _PAYLOAD.unpack_from(payload)
    start = _PAYLOAD.size + name_bytes
    if start + 4 * num_tokens != len(payload):
        raise ValueError(f"{name_bytes} bytes of text and {num_tokens} tokens in {len(payload)} bytes")
    # A view would keep the whole segment in memory.
    tokens = np.frombuffer(payload[start:], "<i4").astype(np.int32)
    if num_tokens and tokens.min() < 0:
        raise ValueError(f"a token is {tokens.min()}")
    return HistoryRecord(str(payload[_PAYLOAD.size : start], "utf-8"), step, uid, tokens, reward, version)


def _fault(path: Path, offset: int, what: str, torn: bool = False) -> LogError:
    return (_TornError if torn else LogError)(f"{path}: byte {offset}: {what}")


def _record_at(path: Path, data: bytes, offset: int) -> tuple[int, HistoryRecord]:
    """(where it ends, the record at `offset`); LogError when there is none."""
    start = offset + _RECORD.size
    if start > len(data):
        raise _fault(path, offset, "the header of a record runs past the end of the file", torn=True)
    length, checksum, head_checksum = _RECORD.unpack_from(data, offset)
    if crc32(data[offset : offset + 8]) != head_checksum:
        # After a power loss the file may have its length already and zeros where the data was to come.
        torn = len(data[offset:].rstrip(b"\0")) < _RECORD.size
        raise _fault(path, offset, "zeros up to the end" if torn else "the checksum of a record's header differs", torn)
    end = start + length
    if end > len(data):
        raise _fault(path, offset, f"a record of {length} bytes runs past the end of the file", torn=True)
    payload = memoryview(data)[start:end]
    if crc32(payload) != checksum:
        torn = data.count(0, end) == len(data) - end
        raise _fault(path, offset, f"the checksum of a record of {length} bytes differs", torn)
    try:
        return end, _decode(payload)
    except ValueError as error:
        raise _fault(path, offset, f"the record is none of format {FORMAT}: {error}") from None


def _read(path: Path, limit: int | None = None) -> Iterator[tuple[int, HistoryRecord]]:
    """(where it ends, record) of a segment's records up to byte `limit`; None: all."""
    data = path.read_bytes()
    magic, version = _SEGMENT.unpack_from(data) if len(data) >= _SEGMENT.size else (data, FORMAT)
    if magic != _MAGIC:
        raise _fault(path, 0, f"the segment starts with {magic[:8]!r}; allowed: {_MAGIC!r}")
    if version != FORMAT:
        raise _fault(path, len(_MAGIC), f"the segment has format {version}; allowed: {FORMAT}")
    stop = len(data) if limit is None else limit
    if stop > len(data):
        raise _fault(path, len(data), f"the segment ends here; it should reach byte {stop}")
    offset = _SEGMENT.size
    while offset < stop:
        offset, record = _record_at(path, data, offset)
        yield offset, record
    if offset != stop:
        raise _fault(path, stop, "no record ends here, although the log should")


def _check(path: Path, limit: int | None = None, may_be_torn: bool = False) -> tuple[int, str]:
    """(where the good records end, what is torn behind them: empty for nothing); LogError for any other fault."""
    offset = _SEGMENT.size
    try:
        for end, _ in _read(path, limit):
            offset = end
    except _TornError as error:
        if not may_be_torn:
            raise
        return offset, str(error)
    return offset, ""
