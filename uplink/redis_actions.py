"""What each rule function writes to Redis, as packed operations for the script; pure, and nothing here knows the wire.

An operation is a letter and its arguments, encoded the way Redis reads arguments, so that a batch is one join of bytes:
`P` a message, `C`/`D` presence, `R`/`X` a retained value set or cleared, `V` an entry of a client's position vector and `A` the
specification's single position (both dropped when what they name is empty), `U` any command. The layout is the
specification's: `mqtt:client:*`, `mqtt:node:*`, `mqtt:msg:*`, `mqtt:retain:*`, `mqtt:acked:*`; times are the event's, in
seconds.

Invariant: every letter packs exactly as many arguments as the script's `size` table says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import cast

from tidegate.store.entry import Entry, forgotten
from tidegate.store.msgid import Origin, origin

from .backend import Action, Operation, Packed, Write
from .commands import Command
from .rule import Rule

_NOTHING: tuple[Packed, ...] = ()


def actions(rule: Rule, node: str) -> Action:
    """The action of a rule: a function of the specification, or the user's own commands."""
    if rule.commands:
        return _user_commands(rule.commands)
    return ACTIONS[rule.function](rule, node)


def gap_action() -> Action:
    """A gap record becomes an entry of the stream `tidegate:gap:{gateway}`."""

    def gap(entry: Entry) -> Sequence[Packed]:
        fields: dict[str, object] = json.loads(entry.payload)
        arguments = [b"XADD", f"tidegate:gap:{entry.gateway}".encode(), b"*"]
        for name, value in fields.items():
            arguments += (name.encode(), str(value).encode())
        return (_command(arguments),)

    return gap


def coalesced(operations: Sequence[Operation]) -> Sequence[Operation]:
    """Without the presence of a client that a later one of the batch makes void: its last coming stays, and a going after it.

    A command of the user that names keys of ours finds them as they were.
    """
    letters = [cast(Packed, operation.packed).data[4:5] for operation in operations]
    if letters.count(b"C") + letters.count(b"D") < 2:
        return operations
    kept: list[Operation] = []
    came: set[bytes] = set()
    went: set[bytes] = set()
    for operation, letter in zip(reversed(operations), reversed(letters), strict=True):
        data = cast(Packed, operation.packed).data
        if letter in (b"C", b"D"):
            client = _first(data)
            if client in came or (letter == b"D" and client in went):
                continue
            (came if letter == b"C" else went).add(client)
        elif letter == b"U" and b"mqtt:" in data:
            came.clear()
            went.clear()
        kept.append(operation)
    return kept[::-1]


def _first(data: bytes) -> bytes:
    """The argument after the letter."""
    start = data.index(b"\r\n", 7)
    return data[start + 2 : start + 2 + int(data[8:start])]


def pack(arguments: Sequence[bytes]) -> bytes:
    """Arguments as Redis reads them."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


def unpack(packed: Write) -> list[bytes]:
    """The arguments again: for quarantine, and for servers that allow us no script."""
    data, position = packed.data, 0
    arguments: list[bytes] = []
    while position < len(data):
        end = data.index(b"\r\n", position)
        start = end + 2
        position = start + int(data[position + 1 : end]) + 2
        arguments.append(data[start : position - 2])
    return arguments


def stamp_key(key: bytes) -> bytes:
    """Where the stamp of a key stands: in the key's own hash slot."""
    _, brace, rest = key.partition(b"{")
    if brace and rest.find(b"}") > 0:
        return b"tidegate:stamp:" + key
    return b"tidegate:stamp:{" + key + b"}"


def _operation(*arguments: bytes) -> Packed:
    return Packed(pack(arguments), len(arguments))


def _command(arguments: list[bytes]) -> Packed:
    return _operation(b"U", b"%d" % len(arguments), *arguments)


def _stamp(entry: Entry) -> bytes:
    return f"{entry.when} {entry.gateway} {entry.epoch} {entry.seq}".encode()


def _seconds(entry: Entry) -> bytes:
    return b"%d" % (entry.when // 1000)


def _message_store(rule: Rule, node: str) -> Action:
    expire = b"%d" % (rule.expired_time or 0)
    tail = b"$%d\r\n%b\r\n" % (len(expire), expire)
    least_qos = 1 if rule.function == "on_message_publish" else 0

    def publish(entry: Entry) -> Sequence[Packed]:
        payload = entry.payload
        if entry.qos < least_qos or (entry.retain and not payload):
            return _NOTHING
        sender, topic = entry.clientid.encode(), entry.topic.encode()
        retain = b"true" if entry.retain else b"false"
        seconds = b"%d" % (entry.when // 1000)
        data = (
            b"$1\r\nP\r\n$20\r\n%b\r\n$%d\r\n%b\r\n$1\r\n%d\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n%b"
            % (
                entry.msgid.encode(), len(sender), sender, entry.qos, len(topic), topic, len(retain), retain,
                len(payload), payload, len(seconds), seconds, tail,
            )
        )  # fmt: skip
        return (Packed(data, 9),)

    return publish


def _message_retain(rule: Rule, node: str) -> Action:
    expire = b"%d" % rule.expired_time if rule.expired_time else b""

    def retain(entry: Entry) -> Sequence[Packed]:
        if not entry.retain or not entry.payload:
            return _NOTHING
        topic = entry.topic.encode()
        return (
            _operation(
                b"R", topic, entry.msgid.encode(), entry.clientid.encode(), b"%d" % entry.qos, entry.payload,
                _seconds(entry), expire, stamp_key(b"mqtt:retain:" + topic), _stamp(entry),
            ),
        )  # fmt: skip

    return retain


def _retain_delete(rule: Rule, node: str) -> Action:
    def delete(entry: Entry) -> Sequence[Packed]:
        if not entry.retain or entry.payload:
            return _NOTHING
        topic = entry.topic.encode()
        return (_operation(b"X", topic, _seconds(entry), stamp_key(b"mqtt:retain:" + topic), _stamp(entry)),)

    return delete


def _position(rule: Rule, node: str) -> Action:
    """The message that the entry names is the last one that the client has read, of those of its gateway."""

    def position(entry: Entry) -> Sequence[Packed]:
        made = origin(entry.payload.decode())
        single = _single(entry, entry.topic, entry.payload)
        return (single,) if made is None else (_vector(entry, entry.topic, made), single)

    return position


def _acked_delete(rule: Rule, node: str) -> Action:
    def delete(entry: Entry) -> Sequence[Packed]:
        return [drop for topic in forgotten(entry) for drop in (_vector(entry, topic, None), _single(entry, topic, b""))]

    return delete


def _vector(entry: Entry, name: str, made: Origin | None) -> Packed:
    client, topic = entry.clientid.encode(), name.encode()
    code, place = (made.code, f"{made.epoch}:{made.seq}:{made.at}") if made else ("", "")
    key = b"tidegate:position:" + client + b":" + topic
    return _operation(b"V", client, topic, code.encode(), place.encode(), key, _stamp(entry))


def _single(entry: Entry, name: str, msgid: bytes) -> Packed:
    client, topic = entry.clientid.encode(), name.encode()
    key = stamp_key(b"mqtt:acked:" + client + b":" + topic)
    return _operation(b"A", client, topic, msgid, key, _stamp(entry))


def _queue_acked(rule: Rule, node: str) -> Action:
    def remove(entry: Entry) -> Sequence[Packed]:
        topic, msgid = entry.topic.encode(), entry.payload
        return (_command([b"DEL", b"mqtt:msg:" + msgid]), _command([b"ZREM", b"mqtt:msg:" + topic, msgid]))

    return remove


def _presence(letter: bytes) -> Callable[[Rule, str], Action]:
    def make(rule: Rule, node: str) -> Action:
        name = node.encode()

        def presence(entry: Entry) -> Sequence[Packed]:
            client = entry.clientid.encode()
            key = stamp_key(b"mqtt:client:" + client)
            return (_operation(letter, client, name, _seconds(entry), key, _stamp(entry)),)

        return presence

    return make


def _user_commands(commands: tuple[Command, ...]) -> Action:
    def fill(entry: Entry) -> Sequence[Packed]:
        return [_command(command.fill(entry)) for command in commands]

    return fill


ACTIONS: dict[str, Callable[[Rule, str], Action]] = {
    "on_client_connected": _presence(b"C"),
    "on_client_disconnected": _presence(b"D"),
    "on_message_publish": _message_store,
    "on_message_store": _message_store,
    "on_message_retain": _message_retain,
    "on_retain_delete": _retain_delete,
    "on_message_acked": _position,
    "on_message_acked_for_pubsub": _position,
    "on_message_acked_for_queue": _queue_acked,
    "on_acked_delete": _acked_delete,
}
