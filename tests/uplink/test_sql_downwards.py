"""End to end on real servers: what a business system wrote into the tables reaches a device, once, over kill -9."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.sql_servers import SqlServer

from .sql_rig import EVERY_SERVER, SERVERS, function_rule, settings, tables

DEADLINE = 30.0
HOOKS = (
    ("client.connected.1", "on_subscribe_lookup"),
    ("session.subscribed.1", "on_message_fetch"),
    ("session.subscribed.2", "on_retain_lookup"),
)


@pytest.fixture(params=EVERY_SERVER)
def server(request: pytest.FixtureRequest) -> Iterator[SqlServer]:
    with SERVERS[request.param]() as server:
        tables(server)
        yield server


def files(server: SqlServer) -> dict[str, str]:
    lines = [f"server = 127.0.0.1:{server.port}", "lookup_interval = 1s", *settings(server).splitlines()]
    text = "".join(f"backend.{server.backend}.pool1.{line}\n" for line in lines)
    return {f"emqx_backend_{server.backend}.conf": text + "".join(function_rule(server.backend, *hook) for hook in HOOKS)}


def insert(server: SqlServer, *msgids: str) -> None:
    now = "utc_timestamp()" if server.backend == "mysql" else "now() AT TIME ZONE 'utc'"
    for msgid in msgids:
        server.run(
            "INSERT INTO mqtt_msg (msgid, topic, sender, qos, retain, payload, arrived)"
            f" VALUES ('{msgid}', 'far/1', 'shop', 1, 0, '{msgid}', {now})"
        )


def next_message(device: MqttClient) -> bytes:
    """Acknowledged."""
    packet = device.receive(DEADLINE)
    assert packet.kind is Kind.PUBLISH
    if packet.packet_id:
        device.answer(Kind.PUBACK, packet.packet_id)
    return packet.payload


def test_rows_of_a_business_system_reach_a_device_that_is_connected_and_one_that_returns(
    tmp_path: Path, server: SqlServer
) -> None:
    toml = f'[gateway]\nname = "barn"\n\n[uplink]\nbackends = ["sqlite", "{server.backend}"]\n'
    insert(server, "first")
    server.run("INSERT INTO mqtt_retain (topic, msgid, qos, payload) VALUES ('far/kept', 'k', 1, 'kept')")
    with Gateway(tmp_path, toml=toml, files=files(server)) as gateway:
        with MqttClient(gateway.port, "device", clean=False) as device:
            server.run("INSERT INTO mqtt_sub (clientid, topic, qos) VALUES ('device', 'far/1', 1), ('device', 'far/kept', 1)")
            assert {next_message(device), next_message(device)} == {b"first", b"kept"}
            insert(server, "second")
            assert next_message(device) == b"second"
            server.stop()
            gateway.kill()
        gateway.start()
        with MqttClient(gateway.port, "device", clean=False) as device:
            server.start()
            insert(server, "third")
            assert next_message(device) == b"third", "and what was acknowledged does not come again"
