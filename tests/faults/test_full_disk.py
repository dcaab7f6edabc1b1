"""A disk that is full: what cannot be stored is not acknowledged, QoS 0 still flows, and the gateway
recovers by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.support.client import Closed, Kind, MqttClient
from tests.support.gateway import Gateway
from tests.support.ports import free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root (to mount it)")

SMALL, LARGE = "4m", "64m"
PAYLOAD = bytes(20_000)
ENOUGH = 2_000
"""Messages that do not fit."""
SILENCE = 2.0
RECOVERY = 30.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    at = tmp_path / "small"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(at)], check=True)
    yield at
    subprocess.run(["umount", str(at)], check=True)


def test_full_disk_withholds_acknowledgements_and_recovers(tmp_path: Path, small_disk: Path) -> None:
    with Gateway(tmp_path / "gateway", data=small_disk / "data") as gateway:
        other = MqttClient(gateway.port, "other")
        other.subscribe(("fast", 0))
        acknowledged = _fill(MqttClient(gateway.port, "filler"))
        assert 0 < acknowledged < ENOUGH
        other.publish("fast", b"still flowing")
        assert [packet.payload for packet in other.ping()] == [b"still flowing"]
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(small_disk)], check=True)
        wait_until(lambda: _is_acknowledged(gateway.port), RECOVERY)
        assert gateway.stop() == 0


def test_a_full_disk_is_alive_and_not_ready_and_every_way_of_asking_says_so(tmp_path: Path, small_disk: Path) -> None:
    directory, port = tmp_path / "gateway", free_port()
    with Gateway(directory, data=small_disk / "data", toml=f'[http]\nbind = "127.0.0.1:{port}"\n') as gateway:
        assert _fill(MqttClient(gateway.port, "filler")) < ENOUGH
        ready = requests.get(f"http://127.0.0.1:{port}/readyz", timeout=10)
        assert (ready.status_code, ready.text) == (
            503,
            "the store refuses to write: database or disk is full (make room on it)\n",
        )
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=10).status_code == 200
        assert "\ntidegate_store_ok 0\n" in requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        doctor = [sys.executable, "-m", "tidegate.gateway.cli", "doctor", "--config", str(directory / "gateway.toml")]
        done = subprocess.run([*doctor, "--data", str(gateway.data)], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "PROBLEM  gateway" in done.stdout
        assert "the store refuses to write: database or disk is full" in done.stdout
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(small_disk)], check=True)
        wait_until(lambda: requests.get(f"http://127.0.0.1:{port}/readyz", timeout=10).status_code == 200, RECOVERY)
        assert gateway.stop() == 0


def _fill(client: MqttClient) -> int:
    """Publish until the acknowledgements stop, or the gateway hangs up; returns how many came."""
    acknowledged = 0
    with client:
        try:
            for _ in range(ENOUGH):
                client.publish("fill", PAYLOAD, 1)
                packet = client.receive(SILENCE)
                if packet.kind is not Kind.PUBACK:
                    break
                acknowledged += 1
        except (Closed, ConnectionError, TimeoutError):
            pass
    return acknowledged


def _is_acknowledged(port: int) -> bool:
    try:
        with MqttClient(port, "after") as client:
            client.publish("after", b"x", 1)
            return client.receive(SILENCE).kind is Kind.PUBACK
    except (Closed, ConnectionError, TimeoutError):
        return False
