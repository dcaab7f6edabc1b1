"""Redis command templates: `"HSET sub:${clientid} ${topic} ${qos}"` becomes a list of arguments for each entry.

A template is split on single spaces first and filled in afterwards, so a payload with spaces, quotes or line breaks stays
one argument and can never become a second command. Inside a token substitution is textual; `${message}` stands alone and
becomes the field/value pairs of the message hash. Unknown names are found when the template is made, not when it is used.

Invariant: a compiled template fills every entry of its event without failing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tidegate.store.entry import ACKED, DELIVERED, Entry

from .vocabulary import NOT_IN_A_BATCH

_ABOUT_A_MESSAGE = (DELIVERED, ACKED)
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")

_VALUES: dict[str, Callable[[Entry], bytes]] = {
    "clientid": lambda entry: entry.clientid.encode(),
    "topic": lambda entry: entry.topic.encode(),
    "qos": lambda entry: b"%d" % entry.qos,
    "retain": lambda entry: b"true" if entry.retain else b"false",
    "payload": lambda entry: entry.payload,
    "msgid": lambda entry: message_id(entry),
    "timestamp": lambda entry: b"%d" % (entry.when // 1000),
}


class TemplateFault(Exception):
    """The template cannot be used; the text says why. `unknown` is the name that is not known, if that is the fault."""

    def __init__(self, text: str, unknown: str = "") -> None:
        super().__init__(text)
        self.unknown = unknown


class Command(NamedTuple):
    """A compiled template: each token a list of literal bytes and names; `("message",)` alone means the pairs."""

    text: str
    tokens: tuple[tuple[bytes | str, ...], ...]

    def fill(self, entry: Entry) -> list[bytes]:
        """The arguments of this command for `entry`."""
        arguments: list[bytes] = []
        for token in self.tokens:
            if token == ("message",):
                arguments += message_fields(entry)
            else:
                arguments.append(b"".join([p if isinstance(p, bytes) else _VALUES[p](entry) for p in token]))
        return arguments


def compile_command(text: str, known: Sequence[str]) -> Command:
    """Read a template whose event offers the names `known`. Raises TemplateFault."""
    words = text.split(" ")
    if "" in words:
        raise TemplateFault("arguments are separated by exactly one space, none before the first or after the last")
    if "${" in words[0] and _PLACEHOLDER.search(words[0]):
        raise TemplateFault("the command itself cannot be a placeholder")
    if words[0].lower() in NOT_IN_A_BATCH:
        raise TemplateFault(f"{words[0]} cannot run inside a batch; use a command that only reads or changes keys")
    return Command(text, tuple(_token(word, known) for word in words))


def message_fields(entry: Entry) -> list[bytes]:
    """The message as field/value pairs, in the order of the specification's `mqtt:msg` hash."""
    value = _VALUES
    return [
        b"id", value["msgid"](entry), b"from", value["clientid"](entry), b"qos", value["qos"](entry),
        b"topic", value["topic"](entry), b"retain", value["retain"](entry), b"payload", entry.payload,
        b"ts", value["timestamp"](entry),
    ]  # fmt: skip


def message_id(entry: Entry) -> bytes:
    """The id of the message the entry speaks of: its own, or of the message delivered or acknowledged."""
    return entry.payload if entry.kind in _ABOUT_A_MESSAGE else entry.msgid.encode()


def _token(word: str, known: Sequence[str]) -> tuple[bytes | str, ...]:
    parts: list[bytes | str] = []
    end = 0
    for match in _PLACEHOLDER.finditer(word):
        name = match.group(1)
        if name not in known:
            raise TemplateFault(f"unknown placeholder ${{{name}}}", unknown=name)
        if name == "message" and match.group(0) != word:
            raise TemplateFault("${message} stands alone, it becomes several arguments")
        if match.start() > end:
            parts.append(word[end : match.start()].encode())
        parts.append(name)
        end = match.end()
    rest = word[end:]
    if "${" in rest:
        raise TemplateFault("a placeholder has no closing brace")
    if rest:
        parts.append(rest.encode())
    return tuple(parts)
