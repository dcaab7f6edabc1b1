"""A real gateway with the smallest budget, and clients that leave behind what no trim may take: the disk holds all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tidegate.store.schema import open_reader

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

BUDGET = 16 << 20


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path, toml='[store]\ndisk_budget = "16MiB"\n[limits]\nmax_subscriptions = 0\n') as gateway:
        yield gateway


def disk(gateway: Gateway) -> int:
    return sum(path.stat().st_size for path in gateway.data.iterdir() if path.is_file() and not path.name.endswith("-shm"))


def test_retained_messages_stay_within_the_budget(gateway: Gateway) -> None:
    most = 0
    with MqttClient(gateway.port, "p") as client:
        for number in range(100):
            client.publish_and_wait(f"t/{number}", bytes(500_000), retain=True)
            most = max(most, disk(gateway))
    assert most <= BUDGET
    with closing(open_reader(gateway.data / "log.db")) as db:
        (kept,) = db.execute("SELECT count(*) FROM retained").fetchone()
    assert 1 <= kept <= 4
    assert "retained_full" in gateway.log() and "budget_exceeded" not in gateway.log()


def test_sessions_with_long_client_ids_and_many_subscriptions_stay_within_the_budget(gateway: Gateway) -> None:
    most = refused = 0
    with MqttClient(gateway.port, "greedy", clean=False) as client:
        for batch in range(300):
            codes = client.subscribe(*[(f"{'long' * 90}/{batch}/{number}", 1) for number in range(100)])
            refused += codes.count(0x80)
            most = max(most, disk(gateway))
    assert 0 < refused < 30_000
    for number in range(300):
        name = str(number).rjust(30_000, "x")
        with MqttClient(gateway.port, name, clean=False, refused=True) as client:
            assert client.connack.reason == 3
        with MqttClient(gateway.port, name) as client:
            client.publish_and_wait("t", b"x")
        most = max(most, disk(gateway))
    assert most <= BUDGET
    with MqttClient(gateway.port, "greedy"):
        pass
    with MqttClient(gateway.port, "back", clean=False) as client:
        assert client.subscribe(("t", 1)) == (1,), "a clean start has made room"
    wait_until(lambda: disk(gateway) <= BUDGET, 10)
    assert "sessions_full" in gateway.log() and "budget_exceeded" not in gateway.log()
