"""Entries on pages that no path leads to any more: the rows are there, the tree above them is destroyed.

Every page of the file that looks like a leaf of a table is taken apart by SQLite's file format ("Database File Format",
sections 1.6 and 2.1), and what fits the table and is asked for is a row. An entry never changes, so a copy that an older page
holds is as good as another.

Invariant: whatever the bytes are, the worst is that a row is not found.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Row = tuple[Any, ...]
PAGE = 4096
LEAF = 13
LOCAL = PAGE - 35
LEAST = (PAGE - 12) * 32 // 255 - 23
_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)
"""Bytes of a value by its serial type."""


def entries_of(path: Path, wanted: list[tuple[int, int]], is_row: Callable[[Row], bool]) -> Iterator[Row]:
    """Rows of the table `entry` whose seq lies in one of the `wanted` ranges (in order), wherever they stand in the file."""
    firsts = [first for first, _ in wanted]
    with path.open("rb") as file:
        number = 0
        while len(page := _page(file, number)) == PAGE:
            number += 1
            if page[0] != LEAF:
                continue
            for rowid, start, size in _cells(page):
                place = bisect_right(firsts, rowid) - 1
                if place < 0 or rowid > wanted[place][1]:
                    continue
                try:
                    row = (rowid, *_values(_payload(file, page, start, size))[1:])
                except (IndexError, ValueError):
                    continue
                if is_row(row):
                    yield row


def _page(file: BinaryIO, number: int) -> bytes:
    file.seek(number * PAGE)
    return file.read(PAGE)


def _cells(page: bytes) -> Iterator[tuple[int, int, int]]:
    """(rowid, where its payload begins, how long it is) of each cell."""
    count = min(page[3] << 8 | page[4], (PAGE - 8) // 2)
    for place in range(8, 8 + 2 * count, 2):
        try:
            size, at = _varint(page, page[place] << 8 | page[place + 1])
            rowid, at = _varint(page, at)
        except IndexError:
            continue
        yield rowid, at, size


def _payload(file: BinaryIO, page: bytes, start: int, size: int) -> bytes:
    """The payload with what overflowed to other pages. Raises ValueError."""
    if size <= LOCAL:
        local = size
    else:
        local = LEAST + (size - LEAST) % (PAGE - 4)
        local = local if local <= LOCAL else LEAST
    end = start + local
    if end > PAGE - (4 if size > local else 0):
        raise ValueError("a cell beyond its page")
    parts, missing = [page[start:end]], size - local
    following = int.from_bytes(page[end : end + 4], "big") if missing else 0
    while missing:
        page = _page(file, following - 1) if following > 1 else b""
        if len(page) < PAGE:
            raise ValueError("a chain beyond the file")
        part = page[4 : 4 + min(missing, PAGE - 4)]
        parts.append(part)
        missing -= len(part)
        following = int.from_bytes(page[:4], "big")
    return b"".join(parts)


def _values(record: bytes) -> list[Any]:
    """The columns of a record. Raises ValueError, IndexError."""
    head, at = _varint(record, 0)
    body = head
    values: list[Any] = []
    while at < head:
        kind, at = _varint(record, at)
        size = _SIZES[kind] if kind < 10 else (kind - 12) // 2
        data = record[body : body + size]
        if size < 0 or len(data) < size:
            raise ValueError("a value beyond its record")
        body += size
        values.append(_value(kind, data))
    if body != len(record):
        raise ValueError("a record that is longer than its values")
    return values


def _value(kind: int, data: bytes) -> Any:
    if kind == 0:
        return None
    if kind < 7:
        return int.from_bytes(data, "big", signed=True)
    if kind in (8, 9):
        return kind - 8
    if kind < 12:
        raise ValueError("a value of no type that an entry has")
    return data if kind % 2 == 0 else data.decode()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number and where it ends. Raises IndexError."""
    number = 0
    for count in range(9):
        byte = data[at]
        at += 1
        if count == 8:
            return number << 8 | byte, at
        number = number << 7 | byte & 127
        if byte < 128:
            break
    return number, at
