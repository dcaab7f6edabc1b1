"""What each rule function writes to a SQL database, as rows; pure, and the same for every dialect.

The tables are the specification's: mqtt_client, mqtt_msg, mqtt_retain, mqtt_acked. Times are the event's.

Invariant: the same entry and rule give the same rows, today and after a restart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from tidegate.store.entry import Entry, forgotten
from tidegate.store.msgid import origin

from .backend import Action, Write
from .rule import Rule
from .sql_rows import Drop, Gap, Message, Own, Position, Presence, Retained, Stamp, Taken
from .sql_statement import Statement

_NOTHING: tuple[Write, ...] = ()


def actions(rule: Rule, node: str) -> Action:
    """The action of a rule: a function of the specification, or the user's own statements."""
    if rule.statements:
        return _own(rule.statements)
    return ACTIONS[rule.function](node)


def gap_action() -> Action:
    """A gap record becomes a row of tidegate_gap."""

    def gap(entry: Entry) -> Sequence[Write]:
        fields = json.loads(entry.payload)
        first, last = (int(fields.get(name, 0)) for name in ("first_seq", "last_seq"))
        first_at, last_at = (int(fields.get(name, entry.when)) for name in ("first_at", "last_at"))
        topic, reason = (str(fields.get(name, "")) for name in ("topic", "reason"))
        return (Gap(entry.gateway, first, last, first_at, last_at, topic, reason, int(fields.get("count", 0))),)

    return gap


def _message(least_qos: int) -> Callable[[str], Action]:
    def make(node: str) -> Action:
        def store(entry: Entry) -> Sequence[Write]:
            # Taken apart at once, and made as Message(...) is, both in a third of the time.
            _, _, when, _, client, topic, qos, retain, payload, _, _, _, msgid = entry
            if qos < least_qos or (retain and not payload):
                return _NOTHING
            return (tuple.__new__(Message, (msgid, topic, client, node, qos, int(retain), payload, when)),)

        return store

    return make


def _retained(wants_payload: bool) -> Callable[[str], Action]:
    def make(node: str) -> Action:
        def retain(entry: Entry) -> Sequence[Write]:
            if not entry.retain or bool(entry.payload) != wants_payload:
                return _NOTHING
            return (
                Retained(
                    entry.topic, entry.msgid, entry.clientid, node, entry.qos, entry.payload, entry.when, _stamp(entry)
                ),
            )  # fmt: skip

        return retain

    return make


def _presence(state: int) -> Callable[[str], Action]:
    def make(node: str) -> Action:
        def presence(entry: Entry) -> Sequence[Write]:
            return (Presence(entry.clientid, state, node, entry.when, _stamp(entry)),)

        return presence

    return make


def _position(node: str) -> Action:
    def position(entry: Entry) -> Sequence[Write]:
        msgid = entry.payload.decode()
        code, epoch, seq, at = "", 0, 0, entry.when
        if made := origin(msgid):
            at, code, epoch, seq = made
        return (Position(entry.clientid, entry.topic, code, epoch, seq, at, msgid, entry.when),)

    return position


def _drop(node: str) -> Action:
    return lambda entry: [Drop(entry.clientid, topic, entry.when) for topic in forgotten(entry)]


def _taken(node: str) -> Action:
    return lambda entry: (Taken(entry.payload.decode()),)


def _own(statements: Sequence[Statement]) -> Action:
    def fill(entry: Entry) -> Sequence[Write]:
        return [Own(statement, statement.values(entry)) for statement in statements]

    return fill


def _stamp(entry: Entry) -> Stamp:
    return Stamp(entry.when, entry.gateway, entry.epoch, entry.seq)


ACTIONS: dict[str, Callable[[str], Action]] = {
    "on_client_connected": _presence(1),
    "on_client_disconnected": _presence(0),
    "on_message_publish": _message(1),
    "on_message_store": _message(0),
    "on_message_retain": _retained(True),
    "on_retain_delete": _retained(False),
    "on_message_acked": _position,
    "on_message_acked_for_pubsub": _position,
    "on_message_acked_for_queue": _taken,
    "on_acked_delete": _drop,
}
