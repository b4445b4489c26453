"""Append-only files of published groups: each group's frame and its payload, one after the other.

Invariant: what `append` has written is read back byte for byte, or the read fails (a checksum; a crash of the machine
without `fsync` leaves files that end early or hold zeros); what a crash or a full disk left half-written at the end
of a file is never read, for `Place`s of it do not exist. A file is deleted when no group in it is held any more.

Groups lie in files of their own because that is 6 x faster than BLOBs in SQLite (3,200 groups of 66 kB in commits
of 16, one core: 2.2 GB/s against 0.36 GB/s).
"""

from __future__ import annotations

import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from broker.store import Buffer, Entry
from common.files import to_disk
from common.messages import GroupId

SEGMENT_BYTES = 256 << 20
READERS_KEPT = 16  # files open for reading
IOV_MAX = 512


class Place(NamedTuple):
    """Where a group lies: number of the file, offset in bytes, sizes in bytes of its frame and its three buffers.

    `crc` is the CRC-32 of them all; it costs 18 us for 65 kB.
    """

    segment: int
    start: int
    sizes: tuple[int, ...]
    crc: int

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.start + sum(self.sizes)


class Segments:
    """The files `payload-*.bin` of a folder.

    Args:
        folder: exists.
        fsync: wait for the disk at each append.
        read_only: `append` and `release` must not be called.
    """

    def __init__(self, folder: Path, *, fsync: bool = False, read_only: bool = False) -> None:
        self.folder, self.fsync = folder, fsync
        self._live: Counter[int] = Counter()  # groups held, by segment
        self._readers: OrderedDict[int, int] = OrderedDict()  # least recently used first
        self._number = max(self._numbers(), default=0)
        self._writer, self._start, self._end = -1, 0, 0
        if not read_only:
            self._open_next()

    def _numbers(self) -> list[int]:
        return [int(path.stem.removeprefix("payload-")) for path in self.folder.glob("payload-*.bin")]

    def _path(self, segment: int) -> Path:
        return self.folder / f"payload-{segment:06d}.bin"

    def _open_next(self) -> None:
        """Begin a new file: whatever a crash left at the end of the last one is never read."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        writer = os.open(self._path(self._number + 1), flags, 0o644)
        if self._writer >= 0:
            os.close(self._writer)
        self._writer, self._number = writer, self._number + 1
        self._start = self._end = 0
        if self.fsync:
            to_disk(self.folder)

    def append(self, entries: Iterable[Entry]) -> list[Place]:
        """Write groups; returns their places, which are not held yet. Raises OSError; `undo` then takes it back."""
        self._start = self._end
        if self._end > SEGMENT_BYTES:
            full = self._number
            self._open_next()
            if self._live[full] <= 0:  # all of it was released while it was still written to
                self._delete(full)
        end = self._end
        places: list[Place] = []
        buffers: list[Buffer] = []
        for entry in entries:
            parts = (entry.frame, *entry.payload)
            sizes = tuple([len(part) for part in parts])
            places.append(Place(self._number, end, sizes, _checksum(parts)))
            buffers += parts
            end += sum(sizes)
        for first in range(0, len(buffers), IOV_MAX):
            _write_all(self._writer, buffers[first : first + IOV_MAX])
        if buffers and self.fsync:
            os.fdatasync(self._writer)
        self._end = end
        return places

    def undo(self) -> None:
        """Take back the last `append`: the file ends where it did."""
        os.ftruncate(self._writer, self._start)
        self._end = self._start

    def read(self, place: Place) -> Entry:
        """A group as it was written. Raises OSError if the file does not have it."""
        wanted = sum(place.sizes)
        data = os.pread(self._reader(place.segment), wanted, place.start)
        if len(data) != wanted or zlib.crc32(data) != place.crc:
            raise OSError(
                f"{self._path(place.segment)} is damaged: of the {wanted} bytes at {place.start} some are missing "
                "or changed"
            )
        view, parts, start = memoryview(data), [], 0
        for size in place.sizes:
            parts.append(view[start : start + size])
            start += size
        return Entry(bytes(parts[0]), parts[1:])

    def _reader(self, segment: int) -> int:
        if segment not in self._readers:
            self._readers[segment] = os.open(self._path(segment), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._readers) > READERS_KEPT:
                os.close(self._readers.popitem(last=False)[1])
        self._readers.move_to_end(segment)
        return self._readers[segment]

    def missing(self, places: Mapping[GroupId, Place]) -> set[GroupId]:
        """Groups that the files end before: a crash of the machine took what was not on the disk yet."""
        ends = {segment: self._path(segment).stat().st_size for segment in self._numbers()}
        return {key for key, place in places.items() if place.end > ends.get(place.segment, 0)}

    def hold(self, places: Iterable[Place]) -> None:
        """Groups at these places are kept."""
        for place in places:
            self._live[place.segment] += 1

    def release(self, places: Iterable[Place]) -> None:
        """Groups at these places are no longer kept; deletes files that hold nothing else."""
        for place in places:
            self._live[place.segment] -= 1
            if self._live[place.segment] <= 0 and place.segment != self._number:
                self._delete(place.segment)

    def sweep(self) -> None:
        """Delete files of an earlier process in which no group is held."""
        for segment in self._numbers():
            if segment != self._number and self._live[segment] <= 0:
                self._delete(segment)

    def _delete(self, segment: int) -> None:
        del self._live[segment]
        if segment in self._readers:
            os.close(self._readers.pop(segment))
        self._path(segment).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        for descriptor in [self._writer, *self._readers.values()]:
            if descriptor >= 0:
                os.close(descriptor)


def _checksum(parts: Iterable[Buffer]) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def _write_all(descriptor: int, buffers: Sequence[Buffer]) -> None:
    written = os.writev(descriptor, buffers)
    left = b"".join(buffers)[written:] if written < sum(len(b) for b in buffers) else b""
    while left:
        left = left[os.write(descriptor, left) :]
