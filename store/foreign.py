"""How a message that was not published here is known elsewhere: what an entry with the flag FOREIGN has in `properties`.

JSON text in ASCII, so none of it is taken for an MQTT property: no byte of it is below 32.

Invariant: what `pack` made is found again by `unpack`, whatever characters others put into their ids.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from .entry import FOREIGN
from .msgid import origin


class Known(NamedTuple):
    """`at`: ms since 1970, the time of the event as the far end has it."""

    msgid: str
    sender: str
    at: int


def pack(known: Known) -> bytes:
    return json.dumps(known).encode()


def unpack(properties: bytes) -> Known:
    return Known(*json.loads(properties))


def name_of(flags: int, properties: bytes) -> bytes:
    """The id by which far ends know the message of an entry; empty if it is known by the entry's own."""
    return unpack(properties).msgid.encode() if flags & FOREIGN else b""


def event_time(msgid: str, at: int) -> int:
    """When it happened (ms): far ends keep seconds, and an id of our layout knows better what is within one."""
    found = origin(msgid)
    return found.at if found is not None and found.at // 1000 == at // 1000 else at
