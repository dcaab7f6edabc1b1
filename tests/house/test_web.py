"""`/healthz`, `/readyz` and `/metrics` of the real gateway, asked by real clients and read by Prometheus' own parser."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from tidegate.gateway.health import SILENCE, Health
from tidegate.gateway.metrics import METRICS, exposition
from tidegate.gateway.web import CONNECTIONS, HEAD_LIMIT, Web

from tests.support.client import MqttClient
from tests.support.gateway import Gateway
from tests.support.ports import free_port
from tests.support.waiting import wait_until

DEADLINE = 10.0
NAME = r"""barn "7" \n \ north"""
SHOWN_AS_LABEL = {"version", "name", "gateway", "durability", "state", "http", "error", "hint", "warning", "why"}
"""Texts of the status; what is left of it are numbers, and each is a metric."""


@pytest.fixture(scope="module")
def web() -> int:
    """The port that the gateway of this module answers HTTP on."""
    return free_port()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, web: int) -> Iterator[Gateway]:
    """A gateway with HTTP and with a far end that is not there."""
    directory = tmp_path_factory.mktemp("web")
    toml = f'[gateway]\nname = \'{NAME}\'\n[http]\nbind = "127.0.0.1:{web}"\n[uplink]\nbackends = ["sqlite", "redis"]\n'
    rules = (
        f"backend.redis.pool1.server = 127.0.0.1:{free_port()}\n"
        'backend.redis.hook.message.publish.1 = {"topic": "#", "action": {"function": "on_message_publish"}, "pool": "pool1"}\n'
    )
    with Gateway(directory, toml=toml, files={"emqx_backend_redis.conf": rules}) as gateway:
        wait_until(lambda: f"http=http://127.0.0.1:{web}" in gateway.log())
        yield gateway
        assert not gateway.faults()


def get(port: int, path: str, method: str = "GET") -> requests.Response:
    return requests.request(method, f"http://127.0.0.1:{port}{path}", timeout=DEADLINE)


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(port: int, name: str, **labels: str) -> float | None:
    """One sample of the metrics as they are now."""
    for family in text_string_to_metric_families(get(port, "/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


def status(gateway: Gateway) -> dict[str, Any]:
    command = [sys.executable, "-m", "tidegate.gateway.cli", "status", "--json", "--data", str(gateway.data)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return answer


def raw(port: int, data: bytes) -> bytes:
    """Send bytes and read until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(65_536), b""))


# -- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/healthz?verbose=1"])
def test_a_gateway_that_runs_is_alive_and_ready(gateway: Gateway, web: int, path: str) -> None:
    answer = get(web, path)
    assert (answer.status_code, answer.text) == (200, "ok\n")
    assert answer.headers["Content-Type"].startswith("text/plain")


def test_a_disk_that_does_not_answer_is_told_and_forgotten_when_it_does() -> None:
    health = Health(100.0)
    assert health.faults(100.0 + SILENCE) == []
    assert health.faults(101.0 + SILENCE) == [f"the disk has not answered for {SILENCE + 1:.0f} s"]
    health.answered(101.0 + SILENCE)
    assert health.faults(102.0 + SILENCE) == []


def test_the_word_of_each_fault_is_in_the_answer() -> None:
    async def main(path: str) -> bytes:
        server = await Web(dict, lambda: ["the disk hangs"], lambda: ["not listening"]).listen("127.0.0.1", 0)
        async with server:
            return await _ask(server.sockets[0].getsockname()[1], f"GET {path} HTTP/1.1\r\n\r\n")

    healthz, readyz = asyncio.run(main("/healthz")), asyncio.run(main("/readyz"))
    assert healthz.startswith(b"HTTP/1.0 503 ")
    assert healthz.endswith(b"\r\n\r\nthe disk hangs\n")
    assert readyz.startswith(b"HTTP/1.0 503 ")
    assert readyz.endswith(b"\r\n\r\nthe disk hangs\nnot listening\n"), "what does not live is not ready"


async def _ask(port: int, text: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text.encode())
    answer = await reader.read()
    writer.close()
    return answer


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_prometheus_reads_every_metric_with_type_and_help(gateway: Gateway, web: int) -> None:
    answer = get(web, "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = families(answer.text)
    for metric in METRICS:
        family = found[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert len(found) == len(METRICS)


def test_the_metrics_that_the_documentation_names_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    named = set(re.findall(r"\btidegate_\w+", page))
    assert len(named) > 5
    assert named <= {metric.name for metric in METRICS}


def test_label_values_come_out_as_they_went_in(gateway: Gateway, web: int) -> None:
    (sample,) = families(get(web, "/metrics").text)["tidegate_info"].samples
    assert sample.labels["name"] == NAME


def test_a_line_break_in_a_label_does_not_break_the_page(gateway: Gateway) -> None:
    (sample,) = families(exposition(status(gateway) | {"name": 'a\n"b\\'}))["tidegate_info"].samples
    assert sample.labels["name"] == 'a\n"b\\'


def test_what_happens_is_counted(gateway: Gateway, web: int) -> None:
    before = value(web, "tidegate_messages_received_total")
    assert before is not None
    with MqttClient(gateway.port, "meter") as client:
        assert value(web, "tidegate_clients_connected") == 1
        for number in range(3):
            client.publish_and_wait("t", b"%d" % number)
    assert value(web, "tidegate_messages_received_total") == before + 3
    raw(gateway.port, b"GET / HTTP/1.1\r\n\r\n")
    assert value(web, "tidegate_protocol_errors_total") == 1
    with MqttClient(gateway.port, "", clean=False, refused=True):
        assert value(web, "tidegate_connects_refused_total", reason="client_identifier_not_valid") == 1
    wait_until(lambda: value(web, "tidegate_pool_state", pool="redis.pool1", state="unreachable") == 1)
    wait_until(lambda: (value(web, "tidegate_pool_waiting", pool="redis.pool1") or 0) >= 3)


def test_a_moment_is_in_seconds(gateway: Gateway, web: int) -> None:
    read = value(web, "tidegate_rules_read_timestamp_seconds")
    assert read is not None
    assert abs(time.time() - read) < 3600


def test_every_reason_to_drop_is_there_before_the_first_drop_and_what_expired_is_none(gateway: Gateway) -> None:
    def samples(dropped: dict[str, int]) -> dict[str, float]:
        found = families(exposition(status(gateway) | {"dropped": dropped}))
        (expired,) = found["tidegate_messages_expired"].samples
        return {sample.labels["reason"]: sample.value for sample in found["tidegate_messages_dropped"].samples} | {
            "messages_expired": expired.value
        }

    before = samples({})
    assert {"disk_budget", "queue_full", "max_waiting_age"} < before.keys()
    assert set(before.values()) == {0}
    assert samples({"expired": 3, "disk_budget": 2}) == before | {"disk_budget": 2, "messages_expired": 3}


def test_every_number_of_the_status_is_a_metric(gateway: Gateway, web: int) -> None:
    """Each number is made unmistakable; all of them must be on the page."""
    numbered, numbers = _numbered(status(gateway), 1_000_003)
    page = exposition(numbered)
    values = {sample.value for family in text_string_to_metric_families(page) for sample in family.samples}
    assert numbers.keys() - values == set(), {numbers[number] for number in numbers.keys() - values}
    assert len(numbers) > 15


def _numbered(status: dict[str, Any], start: int) -> tuple[dict[str, Any], dict[int, str]]:
    numbers: dict[int, str] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: text if (text := walk(item, f"{path}.{key}")) is not None else None for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, path) for item in value]
        if isinstance(value, str):
            assert path.rpartition(".")[2] in SHOWN_AS_LABEL | {"listeners", "backends"}, f"{path}: shown by which metric?"
            return value
        numbers[start + len(numbers)] = path
        return start + len(numbers) - 1

    return walk(status, ""), numbers


# -- what strangers may send -----------------------------------------------------------------------------------------


def test_head_is_answered_without_a_body(gateway: Gateway, web: int) -> None:
    answer = get(web, "/metrics", "HEAD")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(("method", "path", "code"), [("GET", "/", 404), ("GET", "/%zz", 404), ("POST", "/metrics", 405)])
def test_what_is_not_there_is_told(gateway: Gateway, web: int, method: str, path: str, code: int) -> None:
    answer = get(web, path, method)
    assert answer.status_code == code
    assert answer.text in ("there is /healthz, /readyz and /metrics\n", "only GET and HEAD are answered\n")


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"GET http://x/metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/3\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"get /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 4 * HEAD_LIMIT + b"\r\n\r\n",
    ],
    ids=["no HTTP", "a proxy's form", "another version", "bytes", "a small method", "a long head"],
)
def test_nonsense_is_refused(gateway: Gateway, web: int, data: bytes) -> None:
    try:
        answer = raw(web, data)
    except ConnectionResetError:  # it closed before it had read everything
        answer = b""
    assert answer.startswith(b"HTTP/1.0 400 ") or (not answer and len(data) > HEAD_LIMIT)
    assert get(web, "/healthz").status_code == 200


def test_idle_connections_are_few_and_do_not_keep_others_out_for_long(gateway: Gateway, web: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", web), timeout=DEADLINE) for _ in range(CONNECTIONS)]
    wait_until(lambda: get(web, "/healthz").status_code == 503)
    with MqttClient(gateway.port, "device") as device:
        device.publish_and_wait("t", b"served all the same")
    for sock in idle:
        sock.close()
    wait_until(lambda: get(web, "/healthz").status_code == 200)


def test_who_says_nothing_is_sent_away() -> None:
    async def main() -> bytes:
        server = await Web(dict, list, list, patience=0.05).listen("127.0.0.1", 0)
        async with server:
            return await asyncio.wait_for(_ask(server.sockets[0].getsockname()[1], "GET /healthz HTTP/1.1\r\n"), DEADLINE)

    assert asyncio.run(main()) == b""


# -- the listener ----------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken_does_not_stop_the_gateway(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Gateway(tmp_path, toml=f'[http]\nbind = "127.0.0.1:{port}"\n') as gateway:
            text = f"cannot listen on 127.0.0.1:{port}: Address already in use"
            assert status(gateway)["http"] == text
            assert "choose another address under [http]" in gateway.log()
            assert f'reason="{text}"' in gateway.log()
            MqttClient(gateway.port, "device").publish_and_wait("t", b"served all the same")


def test_an_address_of_ipv6(tmp_path: Path) -> None:
    port = free_port()
    with Gateway(tmp_path, toml=f'[http]\nbind = "[::1]:{port}"\n') as gateway:
        wait_until(lambda: f"http=http://[::1]:{port}" in gateway.log())
        assert requests.get(f"http://[::1]:{port}/healthz", timeout=DEADLINE).text == "ok\n"
        assert status(gateway)["http"] == f"[::1]:{port}"


def test_without_an_address_nothing_listens(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        assert status(gateway)["http"] == "off"
        assert gateway.stop() == 0
