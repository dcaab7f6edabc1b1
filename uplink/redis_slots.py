"""Which node of a Redis Cluster has a key, and sending commands to those that have theirs.

The map is read when the link is made. A node that answers MOVED has another map: the worker connects again and reads it anew.
A slot on its way (ASK) is asked for where it goes. A node that does not know a script is sent its text.

Invariant: commands of one slot are applied in the order they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple

from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, NoScriptError

from .errors import Misconfigured, NotConnected
from .pools import Pool
from .redis_actions import pack
from .redis_answers import answers
from .redis_script import Script
from .redis_wire import Wire, connect_to, packed

Address = tuple[str, int]


class Command(NamedTuple):
    """A command for the node that has `slot`: `arguments` of them packed in `data`, behind the script if there is one."""

    slot: int
    arguments: int
    data: bytes
    script: Script | None = None

    def by_name(self) -> bytes:
        """As it is sent first: a script is called by its name."""
        return self._packed(b"EVALSHA", self.script.sha) if self.script else b"*%d\r\n%b" % (self.arguments, self.data)

    def in_full(self) -> bytes:
        """With the script's text, for a node that does not know it."""
        return self._packed(b"EVAL", self.script.source) if self.script else self.by_name()

    def _packed(self, *head: bytes) -> bytes:
        return b"*%d\r\n%b%b" % (self.arguments + len(head), pack(head), self.data)


def command(*arguments: bytes) -> Command:
    """A plain command, by its key, the second argument."""
    return Command(key_slot(arguments[1]), len(arguments), pack(arguments))


class Slots:
    """The map of a cluster and the connections to its nodes, each opened when it is needed. Raises our three errors."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._open: dict[Address, Wire] = {}
        self._tags: dict[int, bytes] = {}
        self._untried = count()
        try:
            self._ranges = self._read_map()
        except BaseException:
            self.close()
            raise

    def ask(self, *arguments: bytes) -> Any:
        """One command by its key; a refusal is raised."""
        (answer,) = self.exchange([command(*arguments)])
        if isinstance(answer, Exception):
            with answers(self._pool, self._node(key_slot(arguments[1])).address):
                raise answer
        return answer

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send each to its node, all nodes at once; the answers in order, a refusal as the error it is."""
        found: list[Any] = [None] * len(commands)
        at_node: dict[Wire, list[int]] = {}
        for number, each in enumerate(commands):
            at_node.setdefault(self._node(each.slot), []).append(number)
        for wire, numbers in at_node.items():
            with answers(self._pool, wire.address):
                wire.put([commands[number].by_name() for number in numbers])
        for wire, numbers in at_node.items():
            with answers(self._pool, wire.address):
                for number in numbers:
                    found[number] = wire.take()
        for number, each in enumerate(commands):
            found[number] = self._again(each, found[number])
        return found

    def any_wire(self) -> Wire:
        """The connection whose end shows that the cluster has changed."""
        return next(iter(self._open.values()))

    def listener(self) -> Wire:
        """Another connection to a node that answered: each is told what is said to any of them."""
        return connect_to(self._pool, *next(iter(self._open)))

    def wires(self) -> list[Wire]:
        """All open connections."""
        return list(self._open.values())

    def masters(self) -> list[Wire]:
        """A connection to each node that has slots."""
        return [self._wire(address) for address in dict.fromkeys(address for *_, address in self._ranges)]

    def tags(self) -> list[bytes]:
        """For each node that has slots a hash tag of its first one."""
        first: dict[Address, int] = {}
        for low, _, address in sorted(self._ranges):
            first.setdefault(address, low)
        return [self.tag(slot) for slot in first.values()]

    def tag(self, slot: int) -> bytes:
        """The first number whose slot it is: a hash tag that is the same for every gateway."""
        while slot not in self._tags:
            text = b"%d" % next(self._untried)
            self._tags.setdefault(key_slot(text), text)
        return self._tags[slot]

    def close(self) -> None:
        for wire in self._open.values():
            wire.close()
        self._open.clear()

    def _again(self, each: Command, answer: Any) -> Any:
        """Where the first answer sends us elsewhere: the answer from there."""
        for _ in range(3):
            if isinstance(answer, MovedError):
                raise NotConnected(f"slot {each.slot} has moved to {answer.host}:{answer.port}")
            if isinstance(answer, AskError):
                wire = self._wire((answer.host or self._address(each.slot)[0], answer.port))
                with answers(self._pool, wire.address):
                    wire.put([packed((b"ASKING",)), each.in_full()])
                    _, answer = wire.take(), wire.take()
            elif isinstance(answer, NoScriptError):
                wire = self._node(each.slot)
                with answers(self._pool, wire.address):
                    wire.put([each.in_full()])
                    answer = wire.take()
            else:
                return answer
        raise NotConnected(f"slot {each.slot} is on its way: {answer}")

    def _read_map(self) -> list[tuple[int, int, Address]]:
        trouble: NotConnected | None = None
        for address in self._pool.settings["server"]:
            try:
                wire = self._wire(address)
                with answers(self._pool, wire.address):
                    slots = wire.ask(b"CLUSTER", b"SLOTS")
            except NotConnected as error:
                trouble = error
                continue
            if slots:  # without a host it is the one we asked
                return [(low, high, ((host or b"").decode() or address[0], port)) for low, high, (host, port, *_), *_ in slots]
            trouble = NotConnected(f"{wire.address} is in a cluster without slots")
        raise trouble or Misconfigured("no server is named", f"set backend.redis.{self._pool.name}.server")

    def _node(self, slot: int) -> Wire:
        return self._wire(self._address(slot))

    def _address(self, slot: int) -> Address:
        for low, high, address in self._ranges:
            if low <= slot <= high:
                return address
        raise NotConnected(f"no node of the cluster has slot {slot}")

    def _wire(self, address: Address) -> Wire:
        wire = self._open.get(address)
        if wire is None:
            wire = self._open[address] = connect_to(self._pool, *address)
        return wire


class CommandKeys:
    """Which arguments of a command are keys, as the server tells it."""

    def __init__(self, wire: Callable[[], Wire]) -> None:
        self._wire = wire
        self._places: dict[bytes, tuple[int, int, int] | None] = {}

    def of(self, arguments: Sequence[bytes]) -> tuple[bytes, ...]:
        """The keys; none for a command without, or one that the server does not know."""
        if not self._places:
            self._places = dict(_places(self._wire().ask(b"COMMAND")))
        place = self._places.get(arguments[0].lower(), (0, 0, 0))
        if place is None:
            (found,) = self._wire().exchange([(b"COMMAND", b"GETKEYS", *arguments)])
            return () if isinstance(found, Exception) else tuple(found)
        first, last, step = place
        if not first:
            return ()
        return tuple(arguments[first : (last if last >= 0 else len(arguments) + last) + 1 : step])


def _places(table: Iterable[Any]) -> Iterable[tuple[bytes, tuple[int, int, int] | None]]:
    """Of COMMAND's answer: name -> first key, last key, step; None where the place depends on the arguments."""
    for name, _, flags, first, last, step, *_ in table:
        yield name, None if b"movablekeys" in flags else (first, last, step)
