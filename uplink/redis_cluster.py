"""A Redis Cluster as a far end: a batch falls apart into slots, and still every write is applied once and in its slot's order.

Messages are written by plain commands, which may be repeated. Everything else goes slot by slot: one script for each slot,
which keeps a mark of its own there (`tidegate:mark:{tag}`) and skips what it has applied, so a batch that was cut off or
arrives late is harmless. When all slots have answered, each node gets a mark that shows a fail-over which lost writes, and
the pool's ledger moves by compare-and-set.

Invariant: the ledger moves past a write only when its slot has answered.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import NamedTuple, cast

from redis.crc import key_slot
from redis.exceptions import ResponseError

from .backend import Batch, Mark, Meanwhile, Operation, Packed, Refusal, nothing
from .errors import Misconfigured
from .pools import Pool
from .redis_actions import coalesced, pack, unpack
from .redis_answers import answers, is_ours, meaning_of_ours
from .redis_ledger import Ledger, mark_text, read_marks
from .redis_script import FINISH, SLOT
from .redis_slots import Command, CommandKeys, Slots, command
from .retry import SUFFIX

SWEPT_TOPICS = 5
"""Topics per batch whose index is freed of ids that expired."""
_TAGS = b"tags"
"""The ledger's field with the hash tags of the nodes' marks."""
_Refused = dict[tuple[int, int], str]
"""(seq, number) -> reason."""


class _Write(NamedTuple):
    """One write in one slot: `keys` are what the script names of it."""

    operation: Operation
    packed: Packed
    keys: tuple[bytes, ...]


class ClusterLink:
    """See `backend.Link`."""

    warning = ""
    largest = 1000
    whole = False

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._slots = Slots(pool)
        self._ledger = Ledger(pool.name, self._slots.ask, tagged=True)
        self._command_keys = CommandKeys(self._slots.any_wire)
        self._beyond: dict[tuple[str, int], Mark] = {}
        """(gateway, epoch) -> where the ledger stands, if a node that lost its data has put the mark before that."""

    def marks(self, gateway: str) -> dict[int, Mark]:
        ledger = self._ledger.ask(b"HGETALL", self._ledger.key(gateway))
        fields = dict(zip(ledger[::2], ledger[1::2], strict=True))
        tags = fields.pop(_TAGS, b"").split()
        stands = found = read_marks([part for field in fields.items() for part in field])
        for tag in tags:
            there = read_marks(self._ledger.ask(b"HGETALL", self._node_key(tag, gateway)))
            # A node whose mark is gone has lost all; one that has not heard of an epoch joined after it.
            found = {epoch: min(mark, there.get(epoch, mark)) if there else Mark() for epoch, mark in found.items()}
        self._beyond = {key: mark for key, mark in self._beyond.items() if key[0] != gateway}
        self._beyond |= {(gateway, epoch): mark for epoch, mark in stands.items() if mark != found[epoch]}
        return found

    def refusals(self, gateway: str) -> list[Refusal]:
        return self._ledger.refusals(gateway)

    def settle(self, gateway: str, refusals: Collection[Refusal]) -> None:
        self._ledger.settle(gateway, refusals)

    def write(self, batch: Batch, meanwhile: Meanwhile = nothing) -> list[Refusal] | None:
        batch = batch._replace(operations=coalesced(batch.operations))
        messages: list[tuple[Operation, Command]] = []
        by_slot: dict[int, list[_Write]] = {}
        refused: _Refused = {}
        topics: dict[bytes, int] = {}
        for operation in batch.operations:
            arguments = unpack(operation.packed)
            if arguments[0] == b"P":
                messages += [(operation, each) for each in _message(arguments)]
                topics[arguments[4]] = topics.get(arguments[4], 0) + 1
                continue
            for write in self._writes(operation, arguments):
                slots = {key_slot(key) for key in write.keys or (self._ledger.key(batch.gateway),)}
                if len(slots) == 1:
                    by_slot.setdefault(slots.pop(), []).append(write)
                else:
                    refused[operation.seq, operation.number] = "CROSSSLOT the keys of the command are in different slots"
        refused |= self._write_messages(messages)
        refused |= self._write_slots([self._script(batch, slot, writes) for slot, writes in by_slot.items()])
        self._sweep(topics, batch.through)
        return self._finish(batch, refused)

    def repack(self, data: bytes) -> Packed:
        return Packed(data, len(unpack(Packed(data, 0))))

    def fileno(self) -> int:
        return self._slots.any_wire().fileno()

    def gone(self) -> bool:
        return any(wire.gone() for wire in self._slots.wires())

    def close(self) -> None:
        self._slots.close()

    def _writes(self, operation: Operation, arguments: list[bytes]) -> list[_Write]:
        letter = arguments[0]
        packed = cast(Packed, operation.packed)  # what comes back here is what `redis_actions` made
        if letter == b"U":
            with answers(self._pool, self._slots.any_wire().address):
                return [_Write(operation, packed, self._command_keys.of(arguments[2:]))]
        if letter in (b"R", b"X"):
            return [_Write(operation, packed, (b"mqtt:retain:" + arguments[1], arguments[-2]))]
        if letter == b"V":
            return [_Write(operation, packed, (arguments[5],))]
        if letter == b"A":
            return [_Write(operation, packed, (b"mqtt:acked:" + arguments[1] + b":" + arguments[2], arguments[-2]))]
        _, client, node, seconds, *_ = arguments
        key = b"mqtt:node:" + node
        listed = (b"HSET", key, client, seconds) if letter == b"C" else (b"HDEL", key, client)
        arguments[2] = b""  # the hash of the node is in another slot and written by itself
        return [
            _Write(operation, _packed(b"U", b"%d" % len(listed), *listed), (key,)),
            _Write(operation, _packed(*arguments), (b"mqtt:client:" + client, arguments[-2])),
        ]

    def _script(self, batch: Batch, slot: int, writes: Sequence[_Write]) -> Command:
        # Retries have random numbers for epochs, which have no order: each has its mark for itself.
        name = f"{batch.gateway}:{self._pool.name}" + (f":{batch.epoch}" if batch.gateway.endswith(SUFFIX) else "")
        keys = [b"tidegate:mark:{%b}" % self._slots.tag(slot), *dict.fromkeys(key for write in writes for key in write.keys)]
        references = " ".join(f"{write.operation.seq}:{write.operation.number}" for write in writes)
        head = (
            b"%d" % len(keys), *keys, name.encode(), references.encode(), b"%d" % batch.expected.seq, b"%d" % batch.epoch,
        )  # fmt: skip
        body = b"".join([write.packed.data for write in writes])
        return Command(slot, len(head) + sum(write.packed.arguments for write in writes), pack(head) + body, SLOT)

    def _write_messages(self, messages: Sequence[tuple[Operation, Command]]) -> _Refused:
        refused: _Refused = {}
        found = self._slots.exchange([each for _, each in messages])
        for (operation, _), answer in zip(messages, found, strict=True):
            if isinstance(answer, Exception):
                refused[operation.seq, operation.number] = self._refusal(answer)
        return refused

    def _write_slots(self, scripts: Sequence[Command]) -> _Refused:
        refused: _Refused = {}
        for answer in self._slots.exchange(scripts):
            status, *pairs = self._of_ours(answer)
            if status != b"done":
                raise meaning_of_ours(status.decode(errors="replace"), self._pool)
            for reference, reason in zip(pairs[::2], pairs[1::2], strict=True):
                _, seq, number = reference.split(b":")
                refused[int(seq), int(number)] = reason.decode(errors="replace")
        return refused

    def _finish(self, batch: Batch, refused: _Refused) -> list[Refusal] | None:
        """Only now, with every slot's answer: the nodes' marks, then the pool's."""
        epoch, through = b"%d" % batch.epoch, b"%d" % batch.through
        tags = self._slots.tags()
        for answer in self._slots.exchange(
            [command(b"HSET", self._node_key(tag, batch.gateway), epoch, through) for tag in tags]
        ):
            self._of_ours(answer)
        ledger = self._ledger.key(batch.gateway)
        writes = {(operation.seq, operation.number): operation.packed.data for operation in batch.operations}
        # What a late tail of ours had refused beyond this batch is told again with its own.
        refusals = [Refusal(batch.epoch, *key, refused[key], write) for key, write in writes.items() if key in refused]
        notes: list[bytes] = []
        for refusal in refusals:
            notes += (b"%d:%d:%d" % refusal[:3], b"%b\0%b" % (refusal.reason.encode(), refusal.original))
        expected = self._beyond.pop((batch.gateway, batch.epoch), batch.expected)
        arguments = [
            b"2", ledger, self._ledger.refused_key(batch.gateway), epoch, mark_text(expected), through,
            _TAGS, b" ".join(tags),
            *notes,
        ]  # fmt: skip
        finish = Command(key_slot(ledger), len(arguments), pack(arguments), FINISH)
        (answer,) = self._slots.exchange([finish])
        if self._of_ours(answer)[0] == b"moved":
            return None
        return refusals

    def _sweep(self, topics: dict[bytes, int], through: int) -> None:
        """Index entries go when their hash is gone, and only then."""
        names = list(topics)
        chosen = [names[(through + number) % len(names)] for number in range(min(len(names), SWEPT_TOPICS))]
        oldest = self._slots.exchange(
            [command(b"ZRANGE", b"mqtt:msg:" + name, b"0", b"%d" % (2 * topics[name])) for name in chosen]
        )
        for name, ids in zip(chosen, oldest, strict=True):
            if isinstance(ids, Exception):
                continue
            alive = self._slots.exchange([command(b"EXISTS", b"mqtt:msg:" + msgid) for msgid in ids])
            gone = list(takewhile(lambda pair: pair[1] == 0, zip(ids, alive, strict=True)))
            if gone:
                self._slots.exchange([command(b"ZREM", b"mqtt:msg:" + name, *(msgid for msgid, _ in gone))])

    def _refusal(self, answer: Exception) -> str:
        """Why a record is refused. Raises our errors when it is about the server or us."""
        if type(answer) is ResponseError and not is_ours(str(answer)):
            return str(answer)
        with answers(self._pool, "the cluster"):
            raise answer

    def _of_ours(self, answer: object) -> list[bytes]:
        """The answer about keys of ours; who refuses it has something else there, or refuses us."""
        if isinstance(answer, Exception):
            raise Misconfigured(
                f"a key of ours is not ours: {self._refusal(answer)}",
                "rename or delete what is not a hash among tidegate:mark:* and tidegate:ledger:*: our progress stands there",
            )
        return answer if isinstance(answer, list) else []

    def _node_key(self, tag: bytes, gateway: str) -> bytes:
        return b"tidegate:ledger:{%b}:%b:%b" % (tag, gateway.encode(), self._pool.name.encode())


def _packed(*arguments: bytes) -> Packed:
    return Packed(pack(arguments), len(arguments))


def _message(arguments: Sequence[bytes]) -> list[Command]:
    """The commands of one message, each of which may be repeated."""
    _, msgid, sender, qos, topic, retain, payload, seconds, expire = arguments
    key = b"mqtt:msg:" + msgid
    return [
        command(b"HSET", key, b"id", msgid, b"from", sender, b"qos", qos, b"topic", topic, b"retain", retain,
                b"payload", payload, b"ts", seconds),
        command(b"EXPIRE", key, expire),
        command(b"ZADD", b"mqtt:msg:" + topic, b"1", msgid),
    ]  # fmt: skip
