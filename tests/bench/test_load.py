"""The benchmark's load generator notices whatever a broker does wrong.

The broker is the other end of a socket pair, and says what the case has prepared.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import wire
from load import Load, Mirror, Publisher, Subscriber, WrongAnswer

COUNT = 20
STREAM = wire.stream(0, 1, COUNT)
SIZE = STREAM.size
PACKETS = [STREAM.packets[at : at + SIZE] for at in range(0, COUNT * SIZE, SIZE)]
ACKS = [STREAM.acks[at : at + 4] for at in range(0, COUNT * 4, 4)]

WRONG_ANSWERS = {
    "an acknowledgement is missing": ACKS[:4] + ACKS[5:],
    "an acknowledgement comes twice": ACKS[:5] + ACKS[4:],
    "acknowledgements are out of order": [ACKS[1], ACKS[0], *ACKS[2:]],
    "one acknowledgement too many": [*ACKS, ACKS[-1]],
    "another packet": [b"\x50\x02\x00\x01", *ACKS[1:]],
    "the connection ends": ACKS[:10],
}
WRONG_DELIVERIES = {
    "a message is missing": PACKETS[:4] + PACKETS[5:],
    "a message comes twice": PACKETS[:5] + PACKETS[4:],
    "messages are out of order": [PACKETS[1], PACKETS[0], *PACKETS[2:]],
    "one message too many": [*PACKETS, PACKETS[-1]],
    "a payload has changed": [*PACKETS[:7], PACKETS[7][:-1] + b"?", *PACKETS[8:]],
    "a topic has changed": [*PACKETS[:7], PACKETS[7].replace(b"bench/000", b"bench/001"), *PACKETS[8:]],
    "a message is marked as a duplicate": [*PACKETS[:7], b"\x3a" + PACKETS[7][1:], *PACKETS[8:]],
    "the connection ends": PACKETS[:10],
}


Receive = Callable[[list[bytes], bytes], bytes]


def _publish(answers: list[bytes], late: bytes = b"") -> None:
    load, ours, theirs = Load(), *socket.socketpair()
    Publisher(load, ours, STREAM, COUNT)
    _run(load, theirs, answers, late)


def _subscribe(deliveries: list[bytes], late: bytes = b"") -> bytes:
    load, ours, theirs = Load(), *socket.socketpair()
    Subscriber(load, ours, 1, [COUNT])
    return _run(load, theirs, deliveries, late)


def _mirror(deliveries: list[bytes], late: bytes = b"") -> bytes:
    load, ours, theirs = Load(), *socket.socketpair()
    Mirror(load, ours, STREAM, lambda before, after: None)
    return _run(load, theirs, deliveries, late)


def _run(load: Load, theirs: socket.socket, says: list[bytes], late: bytes) -> bytes:
    """Let the broker say this, answer a ping and hang up; returns what the load said before the ping."""
    heard = bytearray()

    def answer() -> None:
        while data := theirs.recv(1 << 16):
            heard.extend(data)
            if heard.endswith(wire.PINGREQ):
                theirs.sendall(late + wire.PINGRESP)

    theirs.sendall(b"".join(says))
    broker = threading.Thread(target=answer, name="broker")
    if len(says) < COUNT:
        theirs.shutdown(socket.SHUT_WR)
    else:
        broker.start()
    try:
        load.run(lambda: 0.0)
    finally:
        load.close()
        if broker.ident:
            broker.join()
        theirs.close()
    return bytes(heard.removesuffix(wire.PINGREQ))


RECEIVERS: list[Receive] = [_subscribe, _mirror]


def test_publisher_accepts_every_acknowledgement_in_order() -> None:
    _publish(ACKS)


@pytest.mark.parametrize("answers", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())
def test_publisher_refuses_when(answers: list[bytes]) -> None:
    with pytest.raises(WrongAnswer):
        _publish(answers)


@pytest.mark.parametrize("receive", RECEIVERS, ids=["subscriber", "mirror"])
def test_receiver_accepts_and_acknowledges_every_message(receive: Receive) -> None:
    assert receive(PACKETS, b"") == STREAM.acks


@pytest.mark.parametrize("deliveries", WRONG_DELIVERIES.values(), ids=WRONG_DELIVERIES.keys())
@pytest.mark.parametrize("receive", RECEIVERS, ids=["subscriber", "mirror"])
def test_receiver_refuses_when(receive: Receive, deliveries: list[bytes]) -> None:
    with pytest.raises(WrongAnswer):
        receive(deliveries, b"")


def test_publisher_refuses_an_acknowledgement_after_the_last() -> None:
    with pytest.raises(WrongAnswer):
        _publish(ACKS, late=ACKS[-1])


@pytest.mark.parametrize("receive", RECEIVERS, ids=["subscriber", "mirror"])
def test_receiver_refuses_a_message_after_the_last(receive: Receive) -> None:
    with pytest.raises(WrongAnswer):
        receive(PACKETS, PACKETS[-1])
