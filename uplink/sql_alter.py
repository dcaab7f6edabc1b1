"""What of the tables that exist differs from the shipped schema, and the ALTER that helps; pure.

Only what the gateway needs: a column that is missing or too narrow, a unique key that an upsert goes by, an index of ours, and
in MySQL a collation in which `A/x` and `a/x` are one. What is wider, or there in addition, is left as it is.

Invariant: of tables made by the shipped file nothing differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .sql_limits import NO_COLUMN, Column, Columns
from .sql_schema import Step, shipped

_KEY = re.compile(r"(?:PRIMARY KEY|UNIQUE KEY|UNIQUE|KEY|INDEX)\b")
_LINE = re.compile(r"`?(\w+)`?\s+(.+)")
_WIDTH = re.compile(r"(?:varchar|character varying)\((\d+)\)")
_SIZES = {
    "tinyint": 1, "smallint": 2, "int2": 2, "mediumint": 3, "int": 4, "int4": 4, "integer": 4, "bigint": 8, "int8": 8,
    "tinyblob": 1, "blob": 2, "mediumblob": 3, "longblob": 4,
}  # fmt: skip
"""Types and their order among their like; numbers and blobs are never compared with one another."""


class Index(NamedTuple):
    """An index as the database has it."""

    unique: bool
    columns: tuple[str, ...]


class Table(NamedTuple):
    """A table of the shipped file: column -> its line, and the lines of its keys."""

    columns: Mapping[str, str]
    keys: Sequence[str]


def alters(backend: str, columns: Columns, indexes: Mapping[str, Sequence[Index]]) -> list[str]:
    """The statements, in the order in which they can run."""
    found: list[str] = []
    for step in shipped(backend):
        if step.statement.startswith("CREATE TABLE") and step.name in columns:
            table, have = table_of(step), columns[step.name]
            found += _collation(backend, step.name, table, have)
            found += _columns(backend, step.name, table, have)
            found += _keys(step.name, table, have, indexes.get(step.name, ()))
    return found


def table_of(step: Step) -> Table:
    """The statement taken apart."""
    body = step.statement[step.statement.index("(") + 1 : step.statement.rindex(")")]
    columns: dict[str, str] = {}
    keys: list[str] = []
    for line in (part.strip().removesuffix(",").rstrip() for part in body.splitlines()):
        if _KEY.match(line):
            keys.append(line)
        elif match := _LINE.match(line):
            columns[match[1]] = line
    return Table(columns, keys)


def _collation(backend: str, name: str, table: Table, have: Mapping[str, Column]) -> Iterator[str]:
    if backend == "mysql" and any(have.get(column, NO_COLUMN).collation.endswith("_ci") for column in table.columns):
        yield f"ALTER TABLE {name} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"


def _columns(backend: str, name: str, table: Table, have: Mapping[str, Column]) -> Iterator[str]:
    for column, line in table.columns.items():
        if column not in have:
            yield f"ALTER TABLE {name} ADD COLUMN {line}" + (" PRIMARY KEY" if "AUTO_INCREMENT" in line else "")
        elif _is_narrow(have[column], line):
            kind = line.partition(" ")[2].strip().partition(" NOT NULL")[0]
            yield f"ALTER TABLE {name} " + (
                f"MODIFY COLUMN {line}" if backend == "mysql" else f"ALTER COLUMN {column} TYPE {kind}"
            )


def _is_narrow(have: Column, line: str) -> bool:
    if width := _WIDTH.search(line):
        return have.width is not None and have.width < int(width[1])
    kind = re.split(r"[\s(]", line.partition(" ")[2].strip(), maxsplit=1)[0].lower()
    mine, wanted = _SIZES.get(have.type, 0), _SIZES.get(kind, 0)
    return bool(mine and wanted) and ("blob" in have.type) == ("blob" in kind) and mine < wanted


def _keys(name: str, table: Table, have: Mapping[str, Column], indexes: Sequence[Index]) -> Iterator[str]:
    for line in table.keys:
        columns = tuple(re.findall(r"\w+", line[line.index("(") :]))
        unique = line.startswith(("PRIMARY KEY", "UNIQUE"))
        if not unique and "tidegate_" not in line:
            continue
        made_with_its_column = line.startswith("PRIMARY KEY") and set(columns) - set(have)
        there = any(
            one.unique and sorted(one.columns) == sorted(columns) if unique else one.columns[: len(columns)] == columns
            for one in indexes
        )
        if not there and not made_with_its_column:
            yield f"ALTER TABLE {name} ADD {line}"
