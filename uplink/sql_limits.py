"""What does not fit the far end's columns, said record by record before the database says it of a whole batch.

Asked only after a batch was refused, so it costs nothing while all is well. Widths are those the far end has, because people
widen columns.

Invariant: a row that fits everywhere gives an empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .sql_rows import Drop, Message, Position, Presence, Retained, Row


class Column(NamedTuple):
    """A column as the far end describes it; `width` in characters (of a binary one in bytes), None for no limit."""

    type: str
    width: int | None
    collation: str = ""


Columns = Mapping[str, Mapping[str, Column]]
"""Table -> column -> what it is."""
NO_COLUMN = Column("", None)


def gathered(rows: Iterable[tuple[Any, ...]]) -> dict[str, dict[str, Column]]:
    """Rows (table, column, type, width and, where there is one, collation) as `Columns`."""
    found: dict[str, dict[str, Column]] = {}
    for table, name, *column in rows:
        found.setdefault(table, {})[name] = Column(*column)
    return found


def misfit(row: Row, columns: Columns, alter: Callable[[str, str, int], str]) -> str:
    """What of the row does not fit, with the statement that helps; empty if all fits."""
    for table, name, value in _places(row):
        width = columns.get(table, {}).get(name, NO_COLUMN).width
        if width is not None and len(value) > width:
            what = "bytes" if isinstance(value, bytes) else "characters"
            return f"{len(value)} {what} do not fit {table}.{name} ({width}): {alter(table, name, len(value))}"
    return ""


def _places(row: Row) -> Iterator[tuple[str, str, str | bytes]]:
    if isinstance(row, Message):
        for name, value in (("msgid", row.msgid), ("topic", row.topic), ("sender", row.sender), ("node", row.node)):
            yield "mqtt_msg", name, value
        yield "mqtt_msg", "payload", row.payload
    elif isinstance(row, Retained):
        for name, value in (("msgid", row.msgid), ("topic", row.topic), ("sender", row.sender), ("node", row.node)):
            yield "mqtt_retain", name, value
        yield "mqtt_retain", "payload", row.payload
        yield "tidegate_stamp", "name", row.topic
    elif isinstance(row, Position | Drop):
        for table in ("mqtt_acked", "tidegate_position"):
            yield table, "clientid", row.clientid
            yield table, "topic", row.topic
    elif isinstance(row, Presence):
        yield "mqtt_client", "clientid", row.clientid
        yield "mqtt_client", "node", row.node
        yield "tidegate_stamp", "name", row.clientid
