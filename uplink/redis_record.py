"""A quarantined write to Redis as fields with names, for a person to read and to change; pure.

Invariant: changing nothing gives the same bytes back.
"""

from __future__ import annotations

from collections.abc import Mapping

from .backend import Packed
from .redis_actions import pack, unpack
from .vocabulary import NOT_IN_A_BATCH

_FIELDS = {
    "P": ("message", ["msgid", "from", "qos", "topic", "retain", "payload", "ts", "expire"]),
    "R": ("retain", ["topic", "msgid", "from", "qos", "payload", "ts", "expire"]),
    "X": ("retain delete", ["topic", "ts"]),
    "C": ("connected", ["clientid", "node", "ts"]),
    "D": ("disconnected", ["clientid", "node", "ts"]),
    "V": ("position", ["clientid", "topic", "gateway", "place"]),
    "A": ("acked", ["clientid", "topic", "msgid"]),
}
_NUMBERS = ("qos", "ts", "expire")


class FieldFault(Exception):
    """A change that cannot be made; the text says what is allowed."""


def describe(original: bytes) -> tuple[str, dict[str, bytes]]:
    """What kind of write it is and its fields; those of a command are numbered, 0 is the command itself."""
    letter, *arguments = unpack(Packed(original, 0))
    if letter == b"U":
        return "command", {str(number): argument for number, argument in enumerate(arguments[1:])}
    kind, names = _FIELDS[letter.decode()]
    return kind, dict(zip(names, arguments, strict=False))


def change(original: bytes, changes: Mapping[str, bytes]) -> bytes:
    """The same write with other values. Raises FieldFault."""
    kind, fields = describe(original)
    for name, value in changes.items():
        if name not in fields:
            hint = "; in a command name the argument by its number (--set 2=VALUE)" if kind == "command" else ""
            raise FieldFault(f"there is no field {name!r}: its fields are {', '.join(fields)}{hint}")
        if name in _NUMBERS and value != fields[name] and not value.isdigit():
            raise FieldFault(f"{name} is a number")
    arguments = unpack(Packed(original, 0))
    changed = fields | dict(changes)
    if kind == "command" and changed["0"].decode(errors="replace").lower() in NOT_IN_A_BATCH:
        raise FieldFault(f"{changed['0'].decode()} cannot run inside a batch; use a command that only reads or changes keys")
    first = 2 if kind == "command" else 1
    arguments[first : first + len(changed)] = changed.values()
    return pack(arguments)
