"""A quarantined write to a SQL database as fields with names, for a person to read and to change; pure.

Invariant: changing nothing gives the same bytes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .redis_record import FieldFault
from .sql_rows import Own, Row, decode

__all__ = ["FieldFault", "change", "describe"]

_NAMES = {"Own": "sql"}
_NOT_SHOWN = ("stamp",)
"""Which event it was stays as it is."""


def describe(original: bytes) -> tuple[str, dict[str, bytes]]:
    """What kind of write it is and its fields; those of a statement are its placeholders, in order."""
    row = decode(original)
    kind = type(row).__name__
    return _NAMES.get(kind, kind.lower()), {name: _bytes(value) for name, value in _values(row).items()}


def change(original: bytes, changes: Mapping[str, bytes]) -> bytes:
    """The same write with other values. Raises FieldFault."""
    row = decode(original)
    before = _values(row)
    after = dict(before)
    for name, value in changes.items():
        if name not in before:
            raise FieldFault(f"there is no field {name!r}: its fields are {', '.join(before)}")
        after[name] = _like(name, before[name], value)
    if isinstance(row, Own):
        return row._replace(values=tuple(after.values())).data
    changed: Row = row._replace(**after)
    return changed.data


def _values(row: Row) -> dict[str, Any]:
    if isinstance(row, Own):
        return {f"{number} {name}": row.values[number] for number, name in enumerate(row.statement.names)}
    return {name: value for name, value in row._asdict().items() if name not in _NOT_SHOWN}


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _like(name: str, before: Any, value: bytes) -> Any:
    if isinstance(before, int):
        if not value.isdigit():
            raise FieldFault(f"{name} is a number")
        return int(value)
    if name == "payload":
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
