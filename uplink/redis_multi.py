"""A batch in WATCH and MULTI, for Redis servers that allow us no script.

The same operations and the same rules as the script: the mark moves by compare-and-set (WATCH guards it until EXEC), and
presence, retained values and positions are written only over older ones, read before and guarded too. What Redis refuses when
a command is queued (unknown, wrong number of arguments) is left out and noted beside the mark; what it refuses in EXEC (wrong
type) is known only from the answer, so a lost answer hides it: that is the price, and the reason for the warning.

`exchange` sends commands and returns their answers, errors as values: this module never sees the wire.

Invariant: EXEC is sent only when every command was queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tidegate.store.msgid import origin

from .backend import Batch, Operation, Packed, Refusal, Shown
from .redis_actions import unpack
from .redis_ledger import mark_text
from .redis_script import TOMBSTONE_SECONDS

Command = list[bytes]
Exchange = Callable[[Sequence[Sequence[bytes]]], list[Any]]
_CONDITION = "unless something newer stands there"
_CONDITIONAL = (b"C", b"D", b"R", b"X", b"V", b"A")
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
                note = left_out[number].encode() + b"\0" + operation.packed.data
                made = [[b"HSET", refused, _reference(batch.epoch, operation), note]]
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
        Refusal(batch.epoch, operation.seq, operation.number, reason, operation.packed.data)
        for number, reason in sorted((late | left_out).items())
        for operation in (batch.operations[number],)
    ]


def plain_commands(packed: Packed) -> list[Shown]:
    """The commands of one write, for a person; what depends on what stands in Redis says so."""
    arguments = unpack(packed)
    nothing: list[Any] = [None if arguments[0] != b"V" else [], [], b"none"]
    made = _commands(arguments, {arguments[-2]: nothing})
    always = 1 if arguments[0] in (b"C", b"D") else 0 if arguments[0] in _CONDITIONAL else len(made)
    return [Shown("", command, "" if number < always else _CONDITION) for number, command in enumerate(made)]


def _watch(exchange: Exchange, ledger: bytes, epoch: int, operations: Sequence[Command]) -> tuple[bytes, dict[bytes, Any]]:
    """Guard and read the mark and whatever a conditional write depends on: stamp key -> what stands."""
    conditional = {arguments[-2]: arguments for arguments in operations if arguments[0] in _CONDITIONAL}
    watched = [ledger, *conditional, *(_key(arguments) for arguments in conditional.values())]
    questions: list[Command] = [[b"WATCH", *watched], [b"HGET", ledger, b"%d" % epoch]]
    for stamp_key, arguments in conditional.items():
        questions += _questions(arguments, stamp_key)
    answers = exchange(questions)
    for answer in answers[:2]:
        if isinstance(answer, Exception):
            raise answer
    standing: dict[bytes, Any] = {}
    for number, stamp_key in enumerate(conditional):
        standing[stamp_key] = answers[2 + 3 * number : 5 + 3 * number]
    return answers[1] or b"", standing


def _questions(arguments: Command, stamp_key: bytes) -> list[Command]:
    """What stands where the operation writes: its stamp, what it is compared with, its kind."""
    key = _key(arguments)
    kind = [b"TYPE", key]
    if arguments[0] == b"V":
        return [[b"HGETALL", key], kind, kind]
    compared = [b"GET", key] if arguments[0] == b"A" else [b"HMGET", key, *_TIMES[arguments[0]]]
    return [[b"GET", stamp_key], compared, kind]


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
    if letter == b"V":
        return _vector(arguments, standing)
    if letter == b"A":
        return _single(arguments, standing)
    fits = _fits(arguments, standing)
    stamp = [b"SET", arguments[-2], arguments[-1]]
    if letter in (b"C", b"D"):
        return _presence(arguments, fits, stamp)
    if not fits:
        return []
    if letter == b"X":
        return [[b"DEL", _key(arguments)], [*stamp, b"EX", b"%d" % TOMBSTONE_SECONDS]]
    return [*_retain(arguments, standing), stamp]


def _vector(arguments: Command, standing: dict[bytes, Any]) -> list[Command]:
    _, _, _, code, place, key, stamp = arguments
    found = standing[key][0]
    if isinstance(found, Exception):
        return [[b"HGET", key, code]]  # refused again, and noted
    there = dict(zip(found[::2], found[1::2], strict=True))
    last, dropped = there.get(b"stamp"), there.get(b"dropped")
    commands: list[Command] = []
    if not code:
        if last is not None and not _newer(stamp, last):
            return []
        there = {b"stamp": stamp, b"dropped": stamp}
        commands = [[b"DEL", key], [b"HSET", key, *_pairs(there)], [b"EXPIRE", key, b"%d" % TOMBSTONE_SECONDS]]
    elif dropped is None or _newer(stamp, dropped):
        new = {} if last is not None and _newer(last, stamp) else {b"stamp": stamp}
        if _further(place, there.get(code)):
            new[code] = place
        there |= new
        commands = [[b"HSET", key, *_pairs(new)]] if new else []
        if dropped is not None:
            commands.append([b"PERSIST", key])
    standing[key][0] = _pairs(there)
    return commands


def _pairs(fields: Mapping[bytes, bytes]) -> list[bytes]:
    return [part for field in fields.items() for part in field]


def _further(mine: bytes, theirs: bytes | None) -> bool:
    """As the script's `further`."""
    (_, seq, ms), (_, seq2, *ms2) = mine.split(b":"), (theirs or b"0:-1").split(b":")
    if ms2 and ms2[0] != ms:
        return int(ms) > int(ms2[0])
    return int(seq) > int(seq2)


def _single(arguments: Command, standing: dict[bytes, Any]) -> list[Command]:
    *_, msgid, stamp_key, stamp = arguments
    before, stands, _ = standing[stamp_key]
    key = _key(arguments)
    if isinstance(stands, Exception):
        return [[b"GET", key]]  # refused again, and noted
    is_late = isinstance(before, bytes) and not _newer(stamp, before)
    if msgid and stands and _is_ours(stands) and _is_ours(msgid):
        if msgid < stands:
            return []
    elif is_late:
        return []
    standing[stamp_key][1] = msgid or None
    if not is_late:
        standing[stamp_key][0] = stamp
    if not msgid:
        return [[b"DEL", key], [b"SET", stamp_key, stamp, b"EX", b"%d" % TOMBSTONE_SECONDS]]
    return [[b"SET", key, msgid], *([] if is_late else [[b"SET", stamp_key, stamp]])]


def _is_ours(msgid: bytes) -> bool:
    return origin(msgid.decode(errors="replace")) is not None


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
    if arguments[0] == b"D":
        if (going := _went(before, stamp)) is None:
            return False
        stamp = arguments[-1] = going
    if isinstance(before, bytes):
        fits = _newer(stamp, before)
    else:
        seconds = arguments[3] if arguments[0] in (b"C", b"D") else arguments[6] if arguments[0] == b"R" else arguments[2]
        known = [int(time) for time in times if time and time.isdigit()] if isinstance(times, list) else []
        fits = all(time <= int(seconds) for time in known)
    if fits:
        standing[stamp_key][0] = stamp
    return fits


def _went(before: Any, stamp: bytes) -> bytes | None:
    """As the script's `went`."""
    match before.split(b" ") if isinstance(before, bytes) else []:
        case [ms, gateway, _, _]:
            _, mine, *rest = stamp.split(b" ")
            return b" ".join([ms, mine, *rest]) if mine == gateway else None
    return stamp


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
    letter = arguments[0]
    if letter == b"V":
        return arguments[5]
    if letter == b"A":
        return b"mqtt:acked:" + arguments[1] + b":" + arguments[2]
    return (b"mqtt:client:" if letter in (b"C", b"D") else b"mqtt:retain:") + arguments[1]


def _reference(epoch: int, operation: Operation) -> bytes:
    return b"%d:%d:%d" % (epoch, operation.seq, operation.number)
