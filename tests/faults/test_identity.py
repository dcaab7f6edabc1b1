"""Who wrote it: cards that are copied, moved and laid back never make a new message look like an old one at the far end.

Real gateways and a real redis-server, into which every message also pushes its payload and its id: the one write that shows
what was sent twice, and what was taken for something else. A copy of a card that finds itself on another machine is one whose
log names another machine; how a machine is known is the store's business.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.uplink.progress import read_pools

from tests.house.test_cli import tidegate
from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway, running
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

DRAIN_DEADLINE = 30.0
TOML = '[uplink]\nbackends = ["sqlite", "redis"]\n'
RULES = """\
backend.redis.pool1.server = 127.0.0.1:{port}
backend.redis.hook.message.publish.1 = {{"action": {{"function": "on_message_publish"}}, "pool": "pool1"}}
backend.redis.hook.message.publish.2 = {{"action": {{"commands": ["RPUSH payloads ${{payload}}"]}}, "pool": "pool1"}}
backend.redis.hook.message.publish.3 = {{"action": {{"commands": ["RPUSH ids ${{msgid}}"]}}, "pool": "pool1"}}
backend.redis.hook.message.publish.4 = {{"action": {{"function": "on_message_retain"}}, "pool": "pool1"}}
backend.redis.hook.client.connected.1 = {{"action": {{"function": "on_client_connected"}}, "pool": "pool1"}}
backend.redis.hook.client.disconnected.1 = {{"action": {{"function": "on_client_disconnected"}}, "pool": "pool1"}}
"""


class Card:
    """A directory that holds a gateway's data, and the gateway that runs from it."""

    def __init__(self, directory: Path, server: RedisServer) -> None:
        rules = {"emqx_backend_redis.conf": RULES.format(port=server.port)}
        self.gateway = Gateway(directory, data=directory / "data", toml=TOML, files=rules)
        self.sent: list[str] = []
        self.states: list[str] = []
        """What was retained under `state`, one after the other."""

    @property
    def data(self) -> Path:
        return self.gateway.data

    def publish(self, name: str, count: int) -> None:
        with MqttClient(self.gateway.port, f"sensor-{name}") as client:
            for number in range(count):
                client.publish_and_wait(f"t/{name}", f"{name}-{number}".encode())
                self.sent.append(f"{name}-{number}")
            client.publish_and_wait("state", name.encode(), retain=True)
            self.states.append(name)

    def drain(self) -> None:
        def drained() -> bool:
            return [(pool.state, pool.waiting) for pool in read_pools(self.data)] == [("connected", 0)]

        wait_until(drained, DRAIN_DEADLINE, lambda: (read_pools(self.data), self.gateway.log()))

    def end(self, how: str) -> None:
        if how == "stopped":
            assert self.gateway.stop() == 0
        else:
            children = self.gateway.children()
            self.gateway.kill()
            wait_until(lambda: not any(map(running, children)))

    def copy_to(self, place: Path, names: str = "*.db*") -> None:
        place.mkdir(parents=True, exist_ok=True)
        for file in self.data.glob(names):
            shutil.copy(file, place / file.name)

    def lay_back(self, image: Path) -> None:
        for file in image.iterdir():
            for old in self.data.glob(f"{file.name.partition('-')[0]}*"):
                old.unlink()
        for file in image.iterdir():
            shutil.copy(file, self.data / file.name)

    def move_to_another_machine(self) -> None:
        with closing(sqlite3.connect(self.data / "log.db")) as db:
            db.execute("UPDATE meta SET value = 'serial-number:another' WHERE key = 'machine'")
            db.commit()

    def identity(self) -> tuple[str, int]:
        with closing(sqlite3.connect(self.data / "log.db")) as db:
            gateway, epoch = db.execute("SELECT gateway, epoch FROM run ORDER BY id DESC LIMIT 1").fetchone()
        return gateway, epoch


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path, "--appendonly", "yes") as server:
        yield server


@pytest.fixture
def card(tmp_path: Path, server: RedisServer) -> Iterator[Card]:
    card = Card(tmp_path / "first", server)
    with card.gateway:
        yield card


def check(server: RedisServer, payloads: list[str]) -> None:
    """Every message once, each with an id and a hash of its own."""
    with server.client() as far:
        found = far.lrange("payloads", 0, -1)
        assert Counter(found) == Counter(payloads)
        ids = far.lrange("ids", 0, -1)
        assert len(set(ids)) == len(payloads)
        assert [far.hget(f"mqtt:msg:{msgid}", "payload") for msgid in ids] == found


def check_state(server: RedisServer, last: str) -> None:
    """The last retained value stands there, and who spoke last is known to be away."""
    with server.client() as far:
        assert far.hget("mqtt:retain:state", "payload") == last
        assert far.hget(f"mqtt:client:sensor-{last}", "state") == "0"


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("where", ["another machine", "a container of the same machine"])
def test_a_cloned_card_and_its_original_write_to_one_far_end(
    tmp_path: Path, server: RedisServer, card: Card, where: str, how: str
) -> None:
    card.publish("before", 20)
    card.drain()
    server.kill()
    card.publish("waiting", 10)
    card.end(how)
    clone = Card(tmp_path / "clone", server)
    card.copy_to(clone.data)
    if where == "another machine":
        clone.move_to_another_machine()
    server.start()
    card.gateway.start()
    with clone.gateway:
        assert clone.identity() != card.identity()
        assert (clone.identity()[0] != card.identity()[0]) == (where == "another machine")
        for part in range(3):
            card.publish(f"original{part}", 10)
            clone.publish(f"clone{part}", 10)
        for one in (card, clone):
            one.drain()
        assert clone.gateway.stop() == 0
    check(server, [*card.sent, *card.states, *clone.sent, *clone.states])
    assert card.gateway.stop() == 0


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_card_in_a_replacement_board_goes_on_as_another_gateway(server: RedisServer, card: Card, how: str) -> None:
    with MqttClient(card.gateway.port, "display", clean=False) as display:
        display.subscribe(("t/#", 1))
    card.publish("before", 20)
    card.drain()
    server.kill()
    card.publish("waiting", 10)
    before = card.identity()
    card.end(how)
    card.move_to_another_machine()
    server.start()
    card.gateway.start()
    assert card.identity()[0] != before[0]
    card.publish("after", 20)
    with MqttClient(card.gateway.port, "display", clean=False) as display:
        got = [display.expect(Kind.PUBLISH) for _ in card.sent]
    assert [message.payload.decode() for message in got] == [name for name in card.sent if "-" in name], (
        "the session has moved with the card"
    )
    card.drain()
    check(server, [*card.sent, *card.states])
    assert card.gateway.stop() == 0


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("what", ["*.db*", "log.db*"], ids=["the whole card", "the log alone, as a disk that lied leaves it"])
def test_an_older_image_laid_back_sends_all_that_is_new(
    tmp_path: Path, server: RedisServer, card: Card, what: str, how: str
) -> None:
    card.publish("before", 20)
    card.drain()
    card.end(how)
    card.copy_to(tmp_path / "image", what)
    card.gateway.start()
    card.publish("lost", 30)
    card.drain()
    card.end(how)
    card.lay_back(tmp_path / "image")
    card.gateway.start()
    card.publish("after", 40)
    card.drain()
    check(server, [*card.sent, *card.states])
    check_state(server, "after")
    assert card.gateway.stop() == 0


def test_a_restored_backup_sends_all_that_is_new(tmp_path: Path, server: RedisServer, card: Card) -> None:
    card.publish("before", 20)
    card.drain()
    assert tidegate("backup", "--data", card.data, tmp_path / "backup.db").returncode == 0
    card.publish("lost", 30)
    card.drain()
    assert card.gateway.stop() == 0
    assert tidegate("restore", "--data", card.data, tmp_path / "backup.db").returncode == 0
    card.gateway.start()
    card.publish("after", 40)
    card.drain()
    check(server, [*card.sent, *card.states])
    check_state(server, "after")
    assert card.gateway.stop() == 0
