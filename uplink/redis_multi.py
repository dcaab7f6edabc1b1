"""A batch in WATCH and MULTI, for Redis servers that allow us no script.

The same operations and the same rules as the script: the mark moves by compare-and-set (WATCH guards it until EXEC), and
presence and retained values are written only over older ones, read before and guarded too. What Redis refuses when a command
is queued (unknown, wrong number of arguments) is left out and noted beside the mark; what it refuses in EXEC (wrong type) is
known only from the answer, so a lost answer hides it: that is the price, and the reason for the warning.

`exchange` sends commands and returns their answers, errors as values: this module never sees the wire.

Invariant: EXEC is sent only when every command was queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .backend import Batch, Operation, Refusal
from .redis_actions import unpack
from .redis_ledger import mark_text
from .redis_script import TOMBSTONE_SECONDS

Command = list[bytes]
Exchange = Callable[[Sequence[Sequence[bytes]]], list[Any]]
_TIMES = {b"C": (b"online_at", b"offline_at"), b"D": (b"online_at", b"offline_at"), b"R": (b"ts",), b"X": (b"ts",)}


def write_in_transaction(
    exchange: Exchange, ledger: bytes, refused: bytes, batch: Batch, is_ours: Callable[[str], bool]
) -> list[Refusal] | None:
    """Apply the batch and move the mark; None when the mark was elsewhere. Raises the driver's error for what is ours."""
    operations = [(operation, unpack(operation.packed)) for operation in batch.operations]
    left_out: dict[int, str] = {}
    while True:
        stands, standing = _watch(exchange, ledger, batch.epoch, [arguments for _, arguments in operations])
        if stands != mark_text(batch.expected):
            exchange([[b"UNWATCH"]])
            return None
        commands = [[b"HSET", ledger, b"%d" % batch.epoch, b"%d" % batch.through]]
        owners: list[int | None] = [None]
        for number, (operation, arguments) in enumerate(operations):
            made = [] if number in left_out else _commands(arguments, standing)
            if number in left_out:
                made = [[b"HSET", refused, _reference(batch.epoch, operation), left_out[number].encode()]]
            commands += made
            owners += [number] * len(made)
        answers = exchange([[b"MULTI"], *commands])
        faults = _faults(answers[1:], owners, is_ours, exchange)
        if not faults:
            break
        left_out |= faults
    (results,) = exchange([[b"EXEC"]])
    if isinstance(results, Exception):
        raise results
    if results is None:
        return None
    late = {
        number: str(answer)
        for answer, number in zip(results, owners, strict=True)
        if number is not None and isinstance(answer, Exception)
    }
    return [
        Refusal(batch.epoch, operation.seq, operation.number, reason)
        for number, reason in sorted((late | left_out).items())
        for operation in (batch.operations[number],)
    ]


def _watch(exchange: Exchange, ledger: bytes, epoch: int, operations: Sequence[Command]) -> tuple[bytes, dict[bytes, Any]]:
    """Guard and read the mark and whatever a conditional write depends on: stamp key -> what stands."""
    conditional = {arguments[-2]: arguments for arguments in operations if arguments[0] in _TIMES}
    watched = [ledger, *conditional, *(_key(arguments) for arguments in conditional.values())]
    questions: list[Command] = [[b"WATCH", *watched], [b"HGET", ledger, b"%d" % epoch]]
    for stamp_key, arguments in conditional.items():
        questions += [[b"GET", stamp_key], [b"HMGET", _key(arguments), *_TIMES[arguments[0]]], [b"TYPE", _key(arguments)]]
    answers = exchange(questions)
    for answer in answers[:2]:
        if isinstance(answer, Exception):
            raise answer
    standing: dict[bytes, Any] = {}
    for number, stamp_key in enumerate(conditional):
        standing[stamp_key] = answers[2 + 3 * number : 5 + 3 * number]
    return answers[1] or b"", standing


def _faults(
    answers: Sequence[Any], owners: Sequence[int | None], is_ours: Callable[[str], bool], exchange: Exchange
) -> Mapping[int, str]:
    """Operations that Redis would not queue; when the fault is not theirs, give up the transaction and raise it."""
    faults: dict[int, str] = {}
    for answer, number in zip(answers, owners, strict=True):
        if isinstance(answer, Exception):
            if number is None or number in faults or is_ours(str(answer)) or "permissions" in str(answer):
                exchange([[b"DISCARD"]])
                raise answer
            faults[number] = str(answer)
    if faults:
        exchange([[b"DISCARD"]])
    return faults


def _commands(arguments: Command, standing: dict[bytes, Any]) -> list[Command]:
    """The plain commands of one operation; empty when something newer stands."""
    letter = arguments[0]
    if letter == b"P":
        _, msgid, sender, qos, topic, retain, payload, seconds, expire = arguments
        return [
            [b"HSET", b"mqtt:msg:" + msgid, b"id", msgid, b"from", sender, b"qos", qos, b"topic", topic,
             b"retain", retain, b"payload", payload, b"ts", seconds],
            [b"EXPIRE", b"mqtt:msg:" + msgid, expire],
            [b"ZADD", b"mqtt:msg:" + topic, b"1", msgid],
        ]  # fmt: skip
    if letter == b"U":
        return [arguments[2:]]
    fits = _fits(arguments, standing)
    stamp = [b"SET", arguments[-2], arguments[-1]]
    if letter in (b"C", b"D"):
        return _presence(arguments, fits, stamp)
    if not fits:
        return []
    if letter == b"X":
        return [[b"DEL", _key(arguments)], [*stamp, b"EX", b"%d" % TOMBSTONE_SECONDS]]
    return [*_retain(arguments, standing), stamp]


def _presence(arguments: Command, fits: bool, stamp: Command) -> list[Command]:
    letter, client, node, seconds = arguments[:4]
    if letter == b"C":
        found = [[b"HSET", b"mqtt:node:" + node, client, seconds]]
        values = [b"state", b"1", b"online_at", seconds, b"offline_at", b"undefined"]
    else:
        found = [[b"HDEL", b"mqtt:node:" + node, client]]
        values = [b"state", b"0", b"offline_at", seconds]
    return [*found, [b"HSET", _key(arguments), *values], stamp] if fits else found


def _retain(arguments: Command, standing: dict[bytes, Any]) -> list[Command]:
    _, topic, msgid, sender, qos, payload, seconds, expire, stamp_key, _ = arguments
    key = _key(arguments)
    commands: list[Command] = []
    if standing[stamp_key][2] == b"string":
        # A pointer that EMQX 4 left.
        commands.append([b"DEL", key])
        standing[stamp_key][2] = b"hash"
    commands.append(
        [b"HSET", key, b"id", msgid, b"from", sender, b"qos", qos, b"topic", topic, b"retain", b"true",
         b"payload", payload, b"ts", seconds]
    )  # fmt: skip
    commands.append([b"EXPIRE", key, expire] if expire else [b"PERSIST", key])
    return commands


def _fits(arguments: Command, standing: dict[bytes, Any]) -> bool:
    """Whether this event is newer than what stands; if so it is what stands for the rest of the batch."""
    stamp_key, stamp = arguments[-2:]
    before, times, _ = standing[stamp_key]
    if isinstance(before, bytes):
        fits = _newer(stamp, before)
    else:
        seconds = arguments[3] if arguments[0] in (b"C", b"D") else arguments[6] if arguments[0] == b"R" else arguments[2]
        known = [int(time) for time in times if time and time.isdigit()] if isinstance(times, list) else []
        fits = all(time <= int(seconds) for time in known)
    if fits:
        standing[stamp_key][0] = stamp
    return fits


def _newer(mine: bytes, theirs: bytes) -> bool:
    """As the script's `newer`: one gateway's own order first, then the time."""
    try:
        (ms, gateway, epoch, seq), (ms2, gateway2, epoch2, seq2) = mine.split(b" "), theirs.split(b" ")
        if gateway == gateway2:
            return (int(epoch), int(seq)) >= (int(epoch2), int(seq2))
        return (int(ms), gateway) > (int(ms2), gateway2)
    except ValueError:
        return True


def _key(arguments: Command) -> bytes:
    return (b"mqtt:client:" if arguments[0] in (b"C", b"D") else b"mqtt:retain:") + arguments[1]


def _reference(epoch: int, operation: Operation) -> bytes:
    return b"%d:%d:%d" % (epoch, operation.seq, operation.number)
