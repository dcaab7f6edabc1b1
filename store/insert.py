"""The statement that puts entries into the log, many with one step.

Binding values is what an entry costs most, and it is done with the interpreter lock held. The usual group, messages without
properties that differ in client, topic, payload and moment alone, binds what is common to them once: an eighth cheaper. Their
payloads go in as bytearrays, because `sqlite3` looks up an adapter for every bytes and None that it is given.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import chain
from typing import Any

from .log import Name, Row

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows that one statement inserts; a group between two sizes is filled up with rows that are left out."""
LARGEST = SIZES[-1]
COLUMNS = 10


def _statement(columns: str, values: list[str], there: str) -> str:
    return f"INSERT INTO entry SELECT {columns} FROM (VALUES {','.join(values)}) {there}"


_ANY = {n: _statement("*", ["(?,?,?,?,?,?,?,?,?,?)"] * n, "WHERE column1 > 0") for n in SIZES}
"""Row by row, as they are; a row that fills up has the seq 0."""
_ALIKE = {
    n: _statement(
        "?1 + column1, column2, column3, ?2, ?3, column4, column5, ?4, column6, NULL",
        [f"({place},?,?,?,?,?)" for place in range(n)],
        "WHERE column1 < ?",
    )
    for n in SIZES
}
"""First the first seq, run, kind, flags; then at, mono, client, topic, payload of each row; at last how many there are."""


def insert(rows: list[Row], numbers: dict[Name, int]) -> tuple[str, list[Any]]:
    """SQL and values for up to `LARGEST` rows. Raises KeyError for a name that has no number yet."""
    size, count = SIZES[bisect_left(SIZES, len(rows))], len(rows)
    seqs, at, mono, runs, kinds, clients, topics, flags, payloads, properties = zip(*rows, strict=True)
    alike = runs.count(runs[0]) == kinds.count(kinds[0]) == flags.count(flags[0]) == properties.count(None) == count
    if not alike or seqs[-1] - seqs[0] != count - 1 or None in payloads:
        values = list(chain.from_iterable(rows))
        values[5::COLUMNS] = _numbers(clients, numbers)
        values[6::COLUMNS] = _numbers(topics, numbers)
        return _ANY[size], values + [0] * ((size - count) * COLUMNS)
    values = [seqs[0], runs[0], kinds[0], flags[0]] + [0] * (5 * size) + [count]
    end = 4 + 5 * count
    values[4:end:5] = at
    values[5:end:5] = mono
    values[6:end:5] = _numbers(clients, numbers)
    values[7:end:5] = _numbers(topics, numbers)
    values[8:end:5] = map(bytearray, payloads)
    return _ALIKE[size], values


def _numbers(names: tuple[Name | None, ...], numbers: dict[Name, int]) -> list[Any]:
    return [name and (name.id or numbers[name]) for name in names]
