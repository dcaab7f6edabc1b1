"""The box's own log with no remote at all, as devices and people meet it: real clients, the real command, kill -9."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway.control import NoAnswer, ask

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until

SHIPPED = (Path(__file__).resolve().parents[2] / "conf" / "emqx_backend_sqlite.conf").read_text()
ALL_RULES = re.sub(r"^## backend", "backend", SHIPPED, flags=re.M)
"""As `sed 's/^## backend/backend/'` makes it."""


def gateway_on(directory: Path, rules: str = ALL_RULES) -> Gateway:
    return Gateway(directory, files={"emqx_backend_sqlite.conf": rules})


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with gateway_on(tmp_path) as gateway:
        yield gateway


def tidegate(gateway: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    places = ("--data", str(gateway.data), "--config", str(gateway.data.parent / "gateway.toml"))
    full = [sys.executable, "-m", "tidegate.gateway.cli", *arguments, *places]
    return subprocess.run(full, capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL)


def sub(gateway: Gateway, action: str, *arguments: str) -> str:
    done = tidegate(gateway, "sub", action, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def select(gateway: Gateway, sql: str) -> list[dict[str, Any]]:
    done = tidegate(gateway, "export", "--sql", sql)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def publish(gateway: Gateway, topic: str, *payloads: bytes, qos: int = 1) -> None:
    with MqttClient(gateway.port, "publisher") as publisher:
        for payload in payloads:
            publisher.publish_and_wait(topic, payload, qos)
        publisher.disconnect()


def take(client: MqttClient, count: int) -> list[bytes]:
    """So many messages and no more, each exchange to its end."""
    found: list[bytes] = []
    unreleased = 0
    while len(found) < count or unreleased:
        packet = client.receive()
        if packet.kind is Kind.PUBLISH:
            found.append(packet.payload)
            unreleased += packet.qos == 2
            client.answer(Kind.PUBACK if packet.qos == 1 else Kind.PUBREC, packet.packet_id)
        else:
            assert packet.kind is Kind.PUBREL
            unreleased -= 1
            client.answer(Kind.PUBCOMP, packet.packet_id)
    assert client.ping() == []
    return found


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_positions_and_queues_through_a_restart(gateway: Gateway, end: str) -> None:
    publish(gateway, "pubsub/a", b"1", b"2", b"3")
    publish(gateway, "queue/a", b"q1", b"q2")
    with MqttClient(gateway.port, "reader") as reader:
        assert reader.subscribe(("pubsub/#", 1), ("queue/#", 1)) == (1, 1)
        assert take(reader, 5) == [b"1", b"2", b"3", b"q1", b"q2"]
        folded = "SELECT m.payload FROM mqtt_acked a JOIN mqtt_msg m ON m.id = a.mid WHERE a.clientid = 'reader'"
        wait_until(lambda: [row["payload"] for row in select(gateway, folded)] == ["3"], 10, gateway.log)
        reader.disconnect()
    publish(gateway, "pubsub/a", b"4")
    publish(gateway, "queue/a", b"q3")
    gateway.stop() if end == "stop" else gateway.kill()
    gateway.start()
    with MqttClient(gateway.port, "reader") as reader, MqttClient(gateway.port, "second") as second:
        reader.subscribe(("pubsub/#", 1))
        assert take(reader, 1) == [b"4"]
        second.subscribe(("queue/a", 1), ("pubsub/a", 1))
        assert take(second, 5) == [b"q3", b"1", b"2", b"3", b"4"]


def test_a_fetch_with_qos_2_arrives_once_over_kill_9(gateway: Gateway) -> None:
    publish(gateway, "pubsub/a", b"1", b"2", b"3", qos=2)
    reader = MqttClient(gateway.port, "reader", clean=False)
    reader.subscribe(("pubsub/#", 2))
    first, second, third = (reader.expect(Kind.PUBLISH) for _ in range(3))
    assert (first.payload, second.payload, third.payload) == (b"1", b"2", b"3")
    reader.answer(Kind.PUBREC, second.packet_id)
    assert reader.expect(Kind.PUBREL).packet_id == second.packet_id
    gateway.kill()
    gateway.start()
    with MqttClient(gateway.port, "reader", clean=False) as reader:
        released = reader.expect(Kind.PUBREL)
        assert released.packet_id == second.packet_id
        reader.answer(Kind.PUBCOMP, released.packet_id)
        assert take(reader, 2) == [b"1", b"3"]


def test_a_subscription_made_for_a_client(gateway: Gateway) -> None:
    publish(gateway, "pubsub/a", b"stored", qos=2)
    with MqttClient(gateway.port, "device") as device, MqttClient(gateway.port, "p") as publisher:
        said = sub(gateway, "add", "--qos", "2", "device", "pubsub/+")
        assert said == "device is subscribed to pubsub/+ with QoS 2, now\n"
        assert take(device, 1) == [b"stored"]
        publisher.publish_and_wait("pubsub/b", b"live", 2)
        assert take(device, 1) == [b"live"]
        gateway.kill()
    gateway.start()
    assert sub(gateway, "list", "device") == "device  pubsub/+  QoS 2\n"
    with MqttClient(gateway.port, "device") as device, MqttClient(gateway.port, "p") as publisher:
        publisher.publish_and_wait("pubsub/b", b"after", 1)
        assert take(device, 1) == [b"after"]
        assert sub(gateway, "del", "device", "pubsub/+") == "device: pubsub/+ is taken away\n"
        publisher.publish_and_wait("pubsub/b", b"gone", 1)
        assert device.ping() == []
    assert sub(gateway, "list", "--json") == ""


def test_what_sub_refuses(gateway: Gateway, tmp_path: Path) -> None:
    for arguments, code, words in (
        (("add", "device", "a/#/b"), 2, "is no topic filter: # stands alone in the last level"),
        (("add", "", "a"), 2, "a client id has at least one character"),
        (("add", "--qos", "3", "device", "a"), 2, "3 is not in the range 0<=x<=2"),
        (("del", "device", "a"), 1, "no subscription to a was made for device"),
    ):
        done = tidegate(gateway, "sub", *arguments)
        assert (done.returncode, done.stdout) == (code, "") and words in done.stderr and "Traceback" not in done.stderr
    done = tidegate(gateway, "sub", "add", "device", "$share/group/a")
    assert done.returncode == 2 and "shared subscriptions come with a later version" in done.stderr
    assert tidegate(gateway, "sub", "list", "device").stdout == "none for device\n"
    asked = {"command": "sub", "action": "add", "client": "device", "filter": "$share/group/a", "qos": 1}
    with pytest.raises(NoAnswer, match="shared subscriptions come with a later version"):
        ask(gateway.data / "control.sock", asked)
    gateway.stop()
    done = tidegate(gateway, "sub", "add", "device", "a")
    assert done.returncode == 1 and "no gateway is running" in done.stderr
    assert tidegate(gateway, "sub", "list", "other").stdout == "none for other\n"


def test_without_the_rule_sub_says_that_it_has_no_effect(tmp_path: Path) -> None:
    with gateway_on(tmp_path, SHIPPED) as gateway:
        done = tidegate(gateway, "sub", "add", "device", "a")
        assert (done.returncode, done.stdout) == (0, "stored\n") and "on_subscribe_lookup" in done.stderr


def test_sub_add_says_when_it_takes_effect(gateway: Gateway) -> None:
    told = " ".join(tidegate(gateway, "sub", "add", "--help").stdout.split())
    assert "A rule on_subscribe_lookup of emqx_backend_sqlite.conf says when it takes effect" in told
    assert "Without one it is only stored." in told


def test_check_knows_the_rules(gateway: Gateway) -> None:
    done = tidegate(gateway, "check")
    assert done.returncode == 0 and "later version" not in done.stderr and "later version" not in gateway.log()


def test_the_specification_s_selects_answer_on_the_box(gateway: Gateway) -> None:
    sub(gateway, "add", "--qos", "1", "test", "test_topic1")
    sub(gateway, "add", "--qos", "2", "test", "test_topic2")
    with MqttClient(gateway.port, "test") as client:
        client.publish_and_wait("hello", b"hello", 1)
        client.publish_and_wait("world", b"world", 1)
        client.publish_and_wait("retain", b"www", 1, retain=True)
        (online,) = select(gateway, "select * from mqtt_client where clientid = 'test'")
        assert (online["state"], online["offline_at"]) == ("1", None) and online["online_at"] and online["node"]
        client.disconnect()
    offline = "select * from mqtt_client where clientid = 'test'"
    wait_until(lambda: select(gateway, offline)[0]["state"] == "0", 10, gateway.log)
    (gone,) = select(gateway, offline)
    assert list(gone) == ["id", "clientid", "state", "node", "online_at", "offline_at", "created"]
    assert gone["online_at"] == online["online_at"] and gone["offline_at"]
    made = select(gateway, "select * from mqtt_sub where clientid = 'test'")
    assert [list(row.values())[1:4] for row in made] == [["test", "test_topic1", 1], ["test", "test_topic2", 2]]
    assert list(made[0]) == ["id", "clientid", "topic", "qos", "created"] and made[0]["created"]
    sent = select(gateway, "select * from mqtt_msg where sender = 'test'")
    assert list(sent[0]) == ["id", "msgid", "topic", "sender", "node", "qos", "retain", "payload", "arrived"]
    told = [(row["topic"], row["qos"], row["retain"], row["payload"]) for row in sent]
    assert told == [("hello", 1, 0, "hello"), ("world", 1, 0, "world"), ("retain", 1, 1, "www")]
    (kept,) = select(gateway, "select * from mqtt_retain where topic = 'retain'")
    assert list(kept) == ["id", "topic", "msgid", "sender", "node", "qos", "payload", "arrived"]
    assert (kept["sender"], kept["payload"], kept["msgid"]) == ("test", "www", sent[2]["msgid"])
    with MqttClient(gateway.port, "test2") as client:
        client.subscribe(("pubsub/x", 1))
        publish(gateway, "pubsub/x", b"read")
        assert take(client, 1) == [b"read"]
        acked = "select clientid, topic, mid from mqtt_acked where clientid = 'test2' and topic = 'pubsub/x'"
        (message,) = select(gateway, "select id from mqtt_msg where topic = 'pubsub/x'")
        wait_until(lambda: [row["mid"] for row in select(gateway, acked)] == [message["id"]], 10, gateway.log)
        client.unsubscribe("pubsub/x")
        assert select(gateway, acked) == []


def test_a_row_that_is_no_subscription_is_counted_in_the_status(gateway: Gateway) -> None:
    gateway.stop()
    with closing(sqlite3.connect(gateway.data / "log.db")) as db, db:
        db.execute("INSERT INTO proxy_subscription (clientid, topic, qos, created) VALUES ('device', 'a', 7, 0)")
    gateway.start()
    with MqttClient(gateway.port, "device") as device:
        device.ping()
        status = json.loads(tidegate(gateway, "status", "--json").stdout)
    assert status["clients"]["refused"] == {"subscription_made_for_client": 1}
