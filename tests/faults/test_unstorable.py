"""One message that the database refuses for ever, under load: only its sender is held up, and only until it may be stored."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from tidegate.gateway.control import ask

from tests.support.client import Kind, MqttClient
from tests.support.gateway import Gateway

from .traffic import Receiver, Sender, check, run, settle

LOAD = 300
IMPLEMENTATION_SPECIFIC_ERROR = 0x83


def _execute(gateway: Gateway, sql: str) -> None:
    with closing(sqlite3.connect(gateway.data / "log.db", isolation_level=None)) as log:
        log.execute(sql)


def _status(gateway: Gateway) -> dict[str, Any]:
    return ask(gateway.data / "control.sock", {"command": "status"})


def test_a_message_that_can_never_be_stored_holds_nobody_else_up(tmp_path: Path) -> None:
    senders = [Sender("one", "t/one", 1), Sender("two", "t/two", 2, version=5)]
    receivers = [Receiver("all", "t/#", 2)]
    peers = [*receivers, *senders]
    with Gateway(tmp_path) as gateway:
        gateway.stop()
        _execute(
            gateway,
            "CREATE TRIGGER no BEFORE INSERT ON entry WHEN new.payload = CAST('bad' AS BLOB)"
            " BEGIN SELECT RAISE(ABORT, 'not this one'); END",
        )
        gateway.start()
        for peer in peers:
            peer.connect(gateway.port)
        for number in range(1, 4):
            run(peers, lambda number=number: _acknowledged(senders) > number * LOAD)  # type: ignore[misc]
            with MqttClient(gateway.port, "sinner", version=5) as sinner:
                sinner.publish("t/bad", b"bad", 1)
                run(peers, lambda number=number: _status(gateway)["dropped"].get("cannot_be_stored") == number)  # type: ignore[misc]
                (said,) = sinner.expect_closed()
                assert (said.kind, said.reason) == (Kind.DISCONNECT, IMPLEMENTATION_SPECIFIC_ERROR)
        settle(senders, receivers)
        check(senders, receivers)
        assert _status(gateway)["store"]["state"] == "ok"
        assert "not this one" in gateway.log()
        gateway.stop()
        _execute(gateway, "DROP TRIGGER no")
        gateway.start()
        with MqttClient(gateway.port, "sinner", version=5) as sinner:
            sinner.publish_and_wait("t/bad", b"bad")


def _acknowledged(senders: list[Sender]) -> int:
    return sum(len(sender.acknowledged) for sender in senders)
