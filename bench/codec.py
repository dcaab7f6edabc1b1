"""How fast the codec takes bytes apart: `python bench/codec.py`.

Rates of `Connection.receive` for reads of 64 KiB full of one kind of packet, beside `mqtt5` (a codec written in Rust) on
the same bytes, and the cost of a read that holds one packet only, as with many clients that wait for each answer. Every
event is counted, and all are compared with what was encoded before the clock starts. A ratio above 1 means that we are faster.

Invariant: a rate is the best of several rounds over the same bytes, both codecs taking turns, so that ratios travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mqtt5
from tidegate.gateway.mqtt.connection import Acks, Connection, Terms, TopicNames
from tidegate.gateway.mqtt.packets import Connect, Packet, PubAck, Publish, PubRec, encode
from tidegate.gateway.mqtt.properties import Property, encode_block

READ = 65_536
TOTAL = 1 << 22
ROUNDS = 5
LARGEST = 1 << 20
SENSOR = {Property.CONTENT_TYPE: "application/json", Property.USER_PROPERTY: [("unit", "K")]}


@dataclass(frozen=True, slots=True)
class Kind:
    """A name for the table, the version, and packets that are repeated to fill the bytes."""

    name: str
    version: int
    packets: tuple[Packet, ...]


def publishes(qos: int, payload: int, topics: int = 1, sensor: bool = False) -> tuple[Packet, ...]:
    """As many PUBLISHes as a window of 1,000 would hold."""
    return tuple(
        Publish(
            f"bench/{number % topics:03d}",
            bytes(payload),
            qos,
            packet_id=number + 1 if qos else 0,
            properties=SENSOR if sensor else {},
        )
        for number in range(1000)
    )


KINDS = (
    Kind("PUBLISH QoS 0, 64 bytes, 3.1.1", 4, publishes(0, 64)),
    Kind("PUBLISH QoS 1, 64 bytes, 3.1.1", 4, publishes(1, 64)),
    Kind("PUBLISH QoS 1, 64 bytes, 50 topics, 3.1.1", 4, publishes(1, 64, 50)),
    Kind("PUBLISH QoS 1, 200 bytes, 3.1.1", 4, publishes(1, 200)),
    Kind("PUBLISH QoS 1, 64 bytes, 5.0", 5, publishes(1, 64)),
    Kind("PUBLISH QoS 1, 64 bytes, properties, 5.0", 5, publishes(1, 64, sensor=True)),
    Kind("PUBACK, runs, 5.0", 5, tuple(PubAck(number + 1) for number in range(1000))),
    Kind("PUBREC, 5.0", 5, tuple(PubRec(number + 1) for number in range(1000))),
)


def main() -> None:
    """Measure and print the table."""
    print(f"{'64 KiB reads':<44}{'M packets/s':>12}{'MB/s':>9}{'mqtt5':>9}{'ratio':>8}{'alone':>10}")
    for kind in KINDS:
        data = b"".join(encode(packet, kind.version) for packet in kind.packets)
        repeats = max(1, TOTAL // len(data))
        count = repeats * len(kind.packets)
        whole = data * repeats
        reads = cut(whole)
        check(kind, data)
        ours = theirs = float("inf")
        for _ in range(ROUNDS):
            ours = min(ours, timed(partial(receive_all, kind.version, reads, count)))
            if kind.version == 5:
                theirs = min(theirs, timed(partial(read_by_mqtt5, whole, count)))
        alone = receive_alone(kind)
        peer, ratio = (f"{count / theirs / 1e6:.2f}", f"{theirs / ours:.2f}") if kind.version == 5 else ("", "")
        rate, volume = count / ours / 1e6, len(data) * repeats / ours / 1e6
        print(f"{kind.name:<44}{rate:>12.2f}{volume:>9.0f}{peer:>9}{ratio:>8}{alone * 1e9:>7.0f} ns")


def cut(data: bytes) -> list[bytes]:
    """`data` as the reads of a socket."""
    return [data[start : start + READ] for start in range(0, len(data), READ)]


def opened(version: int) -> Connection[str]:
    """A server's end past its CONNECT."""
    connection = Connection(Terms(TopicNames(), LARGEST, 10))
    assert len(connection.receive(encode(Connect(version, "bench"), version))) == 1
    return connection


def check(kind: Kind, data: bytes) -> None:
    """What comes out must be what went in."""
    events = opened(kind.version).receive(data)
    if isinstance(kind.packets[0], PubAck):
        assert events == [Acks(tuple(range(1, len(kind.packets) + 1)))]
        return
    assert len(events) == len(kind.packets)
    for event, packet in zip(events, kind.packets, strict=True):
        if isinstance(packet, Publish):
            assert isinstance(event, tuple)
            topic, flags, packet_id, payload, properties = event
            assert (topic, flags >> 1, packet_id, payload) == (packet.topic, packet.qos, packet.packet_id, packet.payload)
            assert properties == encode_block(packet.properties)
        else:
            assert event == packet


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def receive_all(version: int, reads: list[bytes], count: int) -> None:
    """Ours, counting every packet."""
    receive = opened(version).receive
    got = 0
    for read in reads:
        events = receive(read)
        got += len(events)
        for event in events:
            if type(event) is not Acks:
                break
            got += len(event.packet_ids) - 1
    assert got == count, f"{got} of {count} packets"


def read_by_mqtt5(data: bytes, count: int) -> None:
    """The peer, packet by packet over the same bytes (it has no reads to put together)."""
    view, read = memoryview(data), mqtt5.read
    position = got = 0
    while position < len(data):
        _, size = read(view[position:])
        position += size
        got += 1
    assert got == count


def receive_alone(kind: Kind) -> float:
    """Seconds for a read that holds one packet."""
    receive = opened(kind.version).receive
    data = encode(kind.packets[0], kind.version)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(5000):
            receive(data)
        best = min(best, (time.perf_counter() - start) / 5000)
    return best


if __name__ == "__main__":
    main()
