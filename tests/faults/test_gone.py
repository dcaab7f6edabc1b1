"""`log.db` deleted or replaced under a running gateway: it is told, and nothing is acknowledged that would be lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.waiting import wait_until


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_nothing_is_acknowledged_until_the_file_is_back(tmp_path: Path, replaced: bool) -> None:
    with Gateway(tmp_path) as gateway, MqttClient(gateway.port, "p") as client:
        client.publish_and_wait("t", b"before")
        log, aside = gateway.data / "log.db", gateway.data / "aside"
        log.rename(aside)
        if replaced:
            shutil.copy(aside, log)
        wait_until(lambda: "log_gone" in gateway.log(), 10, gateway.log)
        packet_id = client.publish("t", b"while it is gone", 1)
        assert client.ping() == [], "withheld"
        wait_until(lambda: "store_refuses" in gateway.log(), 10, gateway.log)
        aside.rename(log)
        assert client.expect(Kind.PUBACK).packet_id == packet_id
        assert gateway.stop() == 0
