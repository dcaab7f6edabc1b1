"""What one write to a SQL database is, before a backend binds it: a row of the specification's tables, or a user's statement.

A row carries the event's own values (payload as bytes, times in ms); how they become columns is the backend's matter.

Invariant: `decode(row.data) == row`, because a row may come back from quarantine.
"""

from __future__ import annotations

import base64
import functools
import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .sql_statement import Statement, Value, compile_statement, text_or_bytes


class Stamp(NamedTuple):
    """Which event wrote a client's presence or a retained message."""

    ms: int
    gateway: str
    epoch: int
    seq: int


class Message(NamedTuple):
    """A row of mqtt_msg."""

    msgid: str
    topic: str
    sender: str
    node: str
    qos: int
    retain: int
    payload: bytes
    when: int

    @property
    def data(self) -> bytes:
        return _encode("message", self._asdict())


class Presence(NamedTuple):
    """A client came (`state` 1) or went (0)."""

    clientid: str
    state: int
    node: str
    when: int
    stamp: Stamp

    @property
    def data(self) -> bytes:
        return _encode("presence", self._asdict())


class Retained(NamedTuple):
    """A topic's retained message; with an empty payload it is deleted."""

    topic: str
    msgid: str
    sender: str
    node: str
    qos: int
    payload: bytes
    when: int
    stamp: Stamp

    @property
    def data(self) -> bytes:
        return _encode("retained", self._asdict())


class Position(NamedTuple):
    """A client has read a topic through this message. `at`: the time in its id; of an id that others made there is no gateway,
    and the event's time stands for it. `when`: the event's."""

    clientid: str
    topic: str
    gateway: str
    epoch: int
    seq: int
    at: int
    msgid: str
    when: int

    @property
    def data(self) -> bytes:
        return _encode("position", self._asdict())


class Drop(NamedTuple):
    """A client's position in a topic is dropped."""

    clientid: str
    topic: str
    when: int

    @property
    def data(self) -> bytes:
        return _encode("drop", self._asdict())


class Taken(NamedTuple):
    """A queue has given the message away: it goes for everybody."""

    msgid: str

    @property
    def data(self) -> bytes:
        return _encode("taken", self._asdict())


class Gap(NamedTuple):
    """What was dropped before it could be sent."""

    gateway: str
    first_seq: int
    last_seq: int
    first_at: int
    last_at: int
    topic: str
    reason: str
    dropped: int

    @property
    def data(self) -> bytes:
        return _encode("gap", self._asdict())


class Own(NamedTuple):
    """A statement of the user with what is bound."""

    statement: Statement
    values: tuple[Value, ...]

    @property
    def data(self) -> bytes:
        return _encode("sql", {"sql": self.statement.text, "values": list(self.values)})


Row = Message | Presence | Retained | Position | Drop | Taken | Gap | Own


ALL_NAMES = ("clientid", "topic", "qos", "retain", "payload", "msgid", "timestamp")
_KINDS: dict[str, Any] = {
    "message": Message,
    "presence": Presence,
    "retained": Retained,
    "position": Position,
    "drop": Drop,
    "taken": Taken,
    "gap": Gap,
}


def decode(data: bytes) -> Row:
    """The row that `data` was made of."""
    fields: dict[str, Any] = json.loads(data)
    kind = fields.pop("write")
    if kind == "sql":
        return Own(compile_statement(fields["sql"], ALL_NAMES), tuple([_plain(value) for value in fields["values"]]))
    if "stamp" in fields:
        fields["stamp"] = Stamp(*fields["stamp"])
    if "payload" in fields:
        payload = _plain(fields["payload"])
        fields["payload"] = payload.encode() if isinstance(payload, str) else payload
    row: Row = _KINDS[kind](**fields)
    return row


@functools.lru_cache(maxsize=1024)
def utc(seconds: int) -> datetime:
    """The time as columns without a zone hold it."""
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


def milliseconds(*times: object) -> list[int]:
    """Times of such columns; what is none (NULL) is left out."""
    return [round(time.replace(tzinfo=UTC).timestamp() * 1000) for time in times if isinstance(time, datetime)]


def _encode(kind: str, fields: dict[str, Any]) -> bytes:
    if "payload" in fields:
        fields["payload"] = text_or_bytes(fields["payload"])
    return json.dumps({"write": kind} | fields, default=_tagged, ensure_ascii=False).encode()


def _tagged(value: bytes) -> dict[str, Any]:
    return {"$base64": True, "encoded": base64.b64encode(value).decode()}


def _plain(value: Any) -> Any:
    return base64.b64decode(value["encoded"]) if isinstance(value, dict) else value
