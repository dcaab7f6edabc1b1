"""The user's own SQL: `"insert into msg(msgid, topic) values(${msgid}, ${topic})"` becomes a statement with bound parameters.

Each `${name}` is one parameter, never spliced into the text, so a payload with quotes stays a value. Unknown names, a
placeholder inside quotes (where nothing can be bound), a second statement in the same text and what would end our transaction
are found when the rule is read, not when it is used.

Invariant: a compiled statement has exactly one value for each of its placeholders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tidegate.store.entry import Entry

from .commands import TemplateFault, message_id

Value = str | int | bytes

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")
_NOT_CODE = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)
_NOT_IN_A_TRANSACTION = """
abort alter begin change cluster commit connect copy create discard drop end flush grant handler install kill listen load lock
optimize prepare purge release rename reset revoke rollback savepoint set shutdown start truncate uninstall unlisten unlock use
vacuum xa
"""
NOT_IN_A_TRANSACTION = frozenset(_NOT_IN_A_TRANSACTION.split())
"""First words of statements that end or outlive a transaction, or change the connection, in one of the databases."""
OUR_TABLES = re.compile(r"\bmqtt_(?:client|sub|msg|retain|acked)\b", re.IGNORECASE)

_VALUES: dict[str, Callable[[Entry], Value]] = {
    "clientid": lambda entry: entry.clientid,
    "topic": lambda entry: entry.topic,
    "qos": lambda entry: entry.qos,
    "retain": lambda entry: int(entry.retain),
    "payload": lambda entry: text_or_bytes(entry.payload),
    "msgid": lambda entry: message_id(entry).decode(),
    "timestamp": lambda entry: entry.when // 1000,
}


class Statement(NamedTuple):
    """`pieces` is the SQL around the placeholders, `names` what they stand for."""

    text: str
    pieces: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def touches_our_tables(self) -> bool:
        """Whether it may read or change what the functions of the specification write."""
        return OUR_TABLES.search(self.text) is not None

    def values(self, entry: Entry) -> tuple[Value, ...]:
        """What is bound for `entry`."""
        return tuple([_VALUES[name](entry) for name in self.names])

    def render(self, mark: Callable[[int], str], escape: Callable[[str], str] = str) -> str:
        """The text with `mark(1)`, `mark(2)`, … for the placeholders; what stands between goes through `escape`."""
        parts = [escape(self.pieces[0])]
        for number, piece in enumerate(self.pieces[1:], 1):
            parts += (mark(number), escape(piece))
        return "".join(parts)


def compile_statement(text: str, known: Sequence[str]) -> Statement:
    """Read a statement whose event offers the names `known`. Raises TemplateFault."""
    sql = text.strip().removesuffix(";").rstrip()
    for literal in _NOT_CODE.findall(sql):
        if _PLACEHOLDER.search(literal):
            raise TemplateFault("a placeholder stands inside quotes: write it without them, it is bound as a value")
    code = _NOT_CODE.sub(" ", sql)
    if ";" in code:
        raise TemplateFault('one statement for each text: write ["first", "second"]')
    words = code.split(maxsplit=1)
    first = re.sub(r"\W.*", "", words[0], flags=re.DOTALL).lower() if words else ""
    if first in NOT_IN_A_TRANSACTION:
        raise TemplateFault(f"{first} cannot run inside the transaction of a batch")
    names = tuple(_PLACEHOLDER.findall(sql))
    for name in names:
        if name not in known:
            raise TemplateFault(f"unknown placeholder ${{{name}}}", unknown=name)
    pieces = tuple(_PLACEHOLDER.split(sql)[::2])
    if any("${" in piece for piece in pieces):
        raise TemplateFault("a placeholder has no closing brace")
    return Statement(text, pieces, names)


def text_or_bytes(payload: bytes) -> str | bytes:
    """Text where it is UTF-8 that a database's text can hold, else the bytes."""
    if b"\0" in payload:  # in most that is no text, and found sooner than an error is made
        return payload
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return payload
