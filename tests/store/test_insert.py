"""Whichever statement a group of entries gets, it leaves them in the log as they were given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.insert import LARGEST, insert
from tidegate.store.log import Name, Row
from tidegate.store.schema import LOG, open_writer

CLIENT, TOPIC = Name("c", 7), Name("t", 9)


def entry(seq: int) -> Row:
    return (seq, 1000 + seq // 3, 20 + seq // 3, 4, 1, CLIENT, TOPIC, 1, b"%d" % seq, None)


def changed(column: int, value: object) -> Callable[[Row], Row]:
    return lambda row: (*row[:column], value, *row[column + 1 :])


def stored(row: Row) -> tuple[Any, ...]:
    return tuple(value.id if isinstance(value, Name) else value for value in row)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 100, LARGEST - 1, LARGEST])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda row: row, id="alike"),
        pytest.param(changed(0, 100_000), id="a gap before the last"),
        pytest.param(changed(1, 5), id="another at"),
        pytest.param(changed(3, 5), id="another run"),
        pytest.param(changed(4, 2), id="another kind"),
        pytest.param(changed(5, None), id="no client"),
        pytest.param(changed(6, None), id="no topic"),
        pytest.param(changed(7, 2), id="other flags"),
        pytest.param(changed(8, None), id="no payload"),
        pytest.param(changed(8, b""), id="an empty payload"),
        pytest.param(changed(9, b"\x01\x01"), id="properties"),
    ],
)
def test_entries_are_stored_as_they_are_given(tmp_path: Path, change: Callable[[Row], Row], count: int) -> None:
    rows = [entry(seq) for seq in range(1, count)] + [change(entry(count))]
    db = open_writer(tmp_path / "log.db", LOG, "OFF")
    db.execute(*insert(rows, {}))
    assert db.execute("SELECT * FROM entry ORDER BY seq").fetchall() == [stored(row) for row in rows]
    db.close()


def test_a_name_without_a_number_is_refused_or_looked_up() -> None:
    new = Name("new")
    rows = [changed(6, new)(entry(1))]
    with pytest.raises(KeyError):
        insert(rows, {})
    assert 12 in insert(rows, {new: 12})[1]
