"""The shipped schema of a SQL far end, statement by statement, and what of it a database lacks; pure.

`tidegate uplink init` shows and runs what `missing` returns; nothing is ever created in silence. What exists is another matter
(`sql_alter`).

Invariant: every statement of a shipped file makes one table or index and names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple, Protocol

from .rule import SHIPPED

BACKENDS = ("mysql", "pgsql")
"""Those that have a schema."""
_COMMENT = re.compile(r"^--.*\n", re.MULTILINE)
_NAME = re.compile(r"CREATE (?:TABLE|INDEX) IF NOT EXISTS `?(\w+)`?")


class Step(NamedTuple):
    """One statement and the name of what it makes."""

    name: str
    statement: str


class Session(Protocol):
    """A connection to the database that is to get its tables; raises the three words of `errors`."""

    def existing(self) -> Collection[str]:
        """Names of the tables and indexes there are."""
        ...

    def take_time(self) -> None:
        """From now on a statement may take as long as it takes: a large table is not changed within the pool's timeout."""
        ...

    def run(self, statement: str) -> None: ...

    def close(self) -> None: ...


def shipped(backend: str) -> list[Step]:
    """The file's statements in order."""
    text = (SHIPPED / f"emqx_backend_{backend}.sql").read_text(encoding="utf-8")
    statements = [part.strip() for part in _COMMENT.sub("", text).split(";\n") if part.strip()]
    return [Step(match[1], statement) for statement in statements if (match := _NAME.match(statement))]


def missing(backend: str, existing: Collection[str]) -> list[Step]:
    """What the database lacks."""
    return [step for step in shipped(backend) if step.name not in existing]
