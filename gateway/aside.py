"""Putting aside what the store can never take (`store.unstorable`), so that everybody else's messages go on.

Who sent it is disconnected and gets no acknowledgement, so it knows better than we do what becomes of the message. All of its
messages in the batch go with it: the guard of a QoS 2 message and the message itself must be there both or not at all. A
session that cannot be kept on disk ends, because what it is promised would not survive us.

Invariant: of what was put aside nothing is acknowledged, delivered or remembered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidegate.store.entry import GAP, PUBLISH
from tidegate.store.log import Batch, Name, Row
from tidegate.store.report import WARNING
from tidegate.store.unstorable import Unstorable

from .mqtt.reasons import ReasonCode
from .session import Client

if TYPE_CHECKING:
    from .broker import Broker

ADD_GUARD = "INSERT OR IGNORE INTO received (client, packet_id) VALUES (?,?)"
SET_RETAINED = "INSERT OR REPLACE INTO retained (topic, seq) VALUES (?,?)"
NOWHERE = 0
"""The seq of a row that is left out of the commit; its place in the batch stays, so that seqs can be counted."""


def put_aside(broker: Broker, batch: Batch, found: Unstorable) -> bool:
    """Take out of the batch what was found and what hangs on it; whether the rest may be committed at once."""
    refused = set(found.rows)
    broken: set[str] = set()
    orderly = True
    for place in found.changes:
        sql, parameters = batch.changes[place]
        if sql == SET_RETAINED:
            refused.add(parameters[1])
            continue
        names = {name.text for name in parameters if isinstance(name, Name) and name.table == "client"}
        broken |= names
        orderly &= bool(names)  # one of our own, such as a step of the trim, which is asked for again at once
    senders = broken | {row[5].text for row in batch.rows if row[0] in refused and row[4] == PUBLISH and row[5]}
    out = [row for row in batch.rows if row[0] in refused or (row[4] == PUBLISH and row[5] and row[5].text in senders)]
    places = set(found.changes)
    places |= {place for group in batch.together if not places.isdisjoint(group) for place in group}
    _take_out(broker, batch, {row[0] for row in out}, senders, places)
    clients = {c for c in (*batch.acks, *broker.clients) if c.session is not None and c.session.name.text in senders}
    _tell(broker, out, clients, found)
    for client in clients:
        batch.acks.pop(client, None)
        broker.connecting.note_unstorable(client, str(found))
        broker.connecting.drop(client, ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR)
    for session in filter(None, map(broker.sessions.get, broken)):
        broker.sessions.drop(session)
    return orderly


def _take_out(broker: Broker, batch: Batch, seqs: set[int], senders: set[str], places: set[int]) -> None:
    changes: list[tuple[str, tuple[Any, ...]]] = []
    moved: list[int] = []
    """Where each change stands now."""
    for place, (sql, parameters) in enumerate(batch.changes):
        moved.append(len(changes))
        if sql == SET_RETAINED and parameters[1] in seqs:
            broker.when_durable(_restore_retained, broker, parameters[0].text, parameters[1])
        elif sql == ADD_GUARD and parameters[0].text in senders:
            if (session := broker.sessions.get(parameters[0].text)) is not None:
                session.received.pop(parameters[1], None)
        elif place not in places:
            changes.append((sql, parameters))
    moved.append(len(changes))
    batch.together = [range(moved[group.start], moved[group.stop]) for group in batch.together]
    batch.changes[:] = changes
    batch.rows[:] = [_nothing(row) if row[0] in seqs else row for row in batch.rows]


def _nothing(row: Row) -> Row:
    return (NOWHERE, *row[1:4], GAP, None, None, 0, None, None)


def _tell(broker: Broker, out: list[Row], clients: set[Client], found: Unstorable) -> None:
    messages = sum(1 for row in out if row[4] == PUBLISH)
    broker.stored -= len(out)  # it will be counted with its batch
    broker.delivery.dropped["cannot_be_stored"] += messages
    names = ", ".join(client.session.name.text for client in clients if client.session is not None)
    broker.report(
        "cannot_be_stored",
        "the store can never take this; it is put aside, not acknowledged, and who sent it is disconnected",
        WARNING,
        reason=found,
        clients=names,
        messages=messages,
        changes=len(found.changes),
    )


def _restore_retained(broker: Broker, topic: str, seq: int) -> None:
    """The retained message of this topic is again the one that the store has."""

    def have(got: Any) -> None:
        if next(broker.retained.find(topic), None) != seq or isinstance(got, BaseException):
            return  # another one came meanwhile; or a message is named that is not there, which nobody gets
        if got is None:
            broker.retained.remove(topic)
        else:
            broker.retained.put(topic, *got)

    broker.read(lambda reader: reader.retained(topic), have)
