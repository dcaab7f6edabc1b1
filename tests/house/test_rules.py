"""`tidegate rules` as a person meets it: the real command in a process of its own, with no far end to be reached."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tidegate.gateway import cli_rules
from tidegate.uplink.backend import Shown
from tidegate.uplink.vocabulary import FUNCTIONS, PLACEHOLDERS

from tests.support.gateway import Gateway
from tests.support.ports import free_port
from tests.support.waiting import wait_until

PUBLISH = "backend.redis.hook.message.publish"
RULES = """\
backend.redis.pool1.server = 127.0.0.1:PORT
backend.redis.pool1.password = hunter2
PUBLISH.10 = {"topic": "alarm/#", "action": {"commands": ["RPUSH alarms ${payload}", "INCR n"]}, "pool": "pool1"}
PUBLISH.9 = {"topic": "#", "action": {"function": "on_message_publish"}, "expired_time": 60, "pool": "pool1"}
backend.redis.hook.session.subscribed.1= {"action": {"function": "on_retain_lookup"}, "pool": "pool1"}
""".replace("PUBLISH", PUBLISH)
TOML = '[gateway]\nname = "barn"\n[uplink]\nbackends = ["redis"]\n'
AT = ("--at", "2026-01-31 12:00:00")


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A gateway.toml and rules of Redis at a port where nobody listens."""
    (tmp_path / "gateway.toml").write_text(TOML)
    rules = tmp_path / "emqx_backend_redis.conf"
    rules.touch(0o600)
    rules.write_text(RULES.replace("PORT", str(free_port())))
    return tmp_path


def rules(conf: Path, command: str, *arguments: str, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    place = ("--config", str(conf / "gateway.toml"), "--data", str(conf / "data"))
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.gateway.cli", "rules", command, *place, *map(os.fsencode, arguments)],
        input=typed, capture_output=True, check=False, timeout=20,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"hunter2" not in done.stdout + done.stderr
    return done


def lines(done: subprocess.CompletedProcess[bytes], code: int = 0) -> list[str]:
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode().splitlines()


def answer(done: subprocess.CompletedProcess[bytes], code: int = 0) -> Any:
    assert (done.returncode, done.stderr) == (code, b"")
    return json.loads(done.stdout)


# -- list ------------------------------------------------------------------------------------------------------------


def test_list_shows_every_rule_in_the_order_of_events_and_numbers(conf: Path) -> None:
    done = rules(conf, "list")
    assert [line.split() for line in lines(done)] == [
        ["pool", "rule", "topic", "action", "where", "state"],
        [
            *("redis.pool1", "session.subscribed.1", "every", "topic", "on_retain_lookup", "emqx_backend_redis.conf:5"),
            *("not", "loaded:", "the", "gateway", "does", "not", "run"),
        ],
        [
            *("redis.pool1", "message.publish.9", "#", "on_message_publish", "expired_time=60"),
            *("emqx_backend_redis.conf:4", "not", "loaded:", "the", "gateway", "does", "not", "run"),
        ],
        [
            *("redis.pool1", "message.publish.10", "alarm/#", "RPUSH", "alarms", "${payload};", "INCR", "n"),
            *("emqx_backend_redis.conf:3", "not", "loaded:", "the", "gateway", "does", "not", "run"),
        ],
        ["pool", "redis.pool1:", "not", "loaded:", "the", "gateway", "does", "not", "run"],
    ]
    assert b"warning: " + os.fsencode(conf) + b"/emqx_backend_redis.conf:5: no space before the =" in done.stderr


def test_list_as_json_has_everything(conf: Path) -> None:
    found = answer(rules(conf, "list", "--json"))
    lookup, publish, command = found["rules"]
    assert publish == {
        "backend": "redis",
        "pool": "redis.pool1",
        "rule": "message.publish.9",
        "event": "message.publish",
        "number": 9,
        "topic": "#",
        "action": {"function": "on_message_publish"},
        "options": {"expired_time": 60},
        "file": f"{conf}/emqx_backend_redis.conf",
        "line": 4,
        "state": "not loaded: the gateway does not run",
        "warnings": [],
    }
    assert command["action"] == {"commands": ["RPUSH alarms ${payload}", "INCR n"]}
    assert lookup["topic"] is None
    assert lookup["warnings"] == ["no space before the =: read all the same"]
    assert found["mistakes"] == found["reload_needed"] == []


def test_list_tells_mistakes_and_that_nothing_of_the_file_is_in_force(conf: Path) -> None:
    with (conf / "emqx_backend_redis.conf").open("a") as file:
        file.write(f'{PUBLISH}.11 = {{"action": {{"function": "on_mesage_publish"}}, "pool": "pool1"}}\n')
    done = rules(conf, "list")
    assert [line.split()[-1] for line in lines(done, 2)[1:]] == ["misconfigured"] * 4
    assert b"mistake: " in done.stderr
    assert b':6: unknown function "on_mesage_publish"; did you mean "on_message_publish"?' in done.stderr
    found = answer(rules(conf, "list", "--json"), 2)
    assert [(mistake["line"], mistake["text"].split(";")[0]) for mistake in found["mistakes"]] == [
        (6, 'unknown function "on_mesage_publish"')
    ]
    (pool,) = found["pools"]
    assert (pool["state"], ":6: unknown function" in pool["trouble"]) == ("misconfigured", True)


def test_list_names_the_files_of_backends_that_are_not_configured(conf: Path) -> None:
    (conf / "emqx_backend_mysql.conf").touch()
    told = "emqx_backend_mysql.conf is not loaded: mysql is not in uplink.backends"
    assert lines(rules(conf, "list"))[-1] == told
    assert answer(rules(conf, "list", "--json"))["not_loaded"] == [str(conf / "emqx_backend_mysql.conf")]


def test_a_rule_is_in_force_when_the_running_gateway_has_loaded_its_backend(tmp_path: Path) -> None:
    text = RULES.replace("PORT", str(free_port()))
    local = 'backend.sqlite.hook.message.publish.1 = {"action": {"function": "on_message_publish"}}\n'
    with Gateway(tmp_path, files={"emqx_backend_redis.conf": text, "emqx_backend_sqlite.conf": local}) as gateway:
        wait_until(lambda: " listening: " in gateway.log(), 10.0, gateway.log)
        (tmp_path / "gateway.toml").write_text('[uplink]\nbackends = ["sqlite", "redis"]\n')
        found = {rule["backend"]: rule["state"] for rule in answer(rules(tmp_path, "list", "--json"))["rules"]}
        assert found["sqlite"] == "in force"
        assert found["redis"] == "not loaded: redis was not in uplink.backends when the gateway started; restart it"


def test_list_says_what_the_running_gateway_has_not_read_yet(tmp_path: Path) -> None:
    text = RULES.replace("PORT", str(free_port()))
    with Gateway(tmp_path, toml=TOML, files={"emqx_backend_redis.conf": text}) as gateway:
        wait_until(lambda: "redis.pool1: unreachable" in "\n".join(lines(rules(tmp_path, "list"))), 10.0, gateway.log)
        assert answer(rules(tmp_path, "list", "--json"))["reload_needed"] == []
        path = tmp_path / "emqx_backend_redis.conf"
        path.write_text(text + "# changed\n")
        assert answer(rules(tmp_path, "list", "--json"))["reload_needed"] == [str(path)]
        assert f"{path} was changed after the gateway read it".encode() in rules(tmp_path, "list").stderr


# -- test ------------------------------------------------------------------------------------------------------------


def test_test_shows_the_exact_commands_in_order(conf: Path) -> None:
    head, publish, *writes = lines(rules(conf, "test", "alarm/1", 'say "hi"', "--client", "c1", *AT))
    assert head.split("  ")[:5] == ["message.publish", "alarm/1", "client c1", "qos 1", "8 bytes"]
    assert head.endswith("2026-01-31 12:00:00 UTC")
    msgid = head.split("msgid ")[1].split()[0]
    assert publish == "redis.pool1 message.publish.9 (emqx_backend_redis.conf:4): sends"
    assert writes == [
        f'    HSET mqtt:msg:{msgid} id {msgid} from c1 qos 1 topic alarm/1 retain false payload "say \\"hi\\"" ts 1769860800',
        f"    EXPIRE mqtt:msg:{msgid} 60",
        f"    ZADD mqtt:msg:alarm/1 1 {msgid}",
        "redis.pool1 message.publish.10 (emqx_backend_redis.conf:3): sends",
        '    RPUSH alarms "say \\"hi\\""',
        "    INCR n",
        "rules of other events: session.subscribed 1",
    ]


def test_test_says_why_a_rule_sends_nothing(conf: Path) -> None:
    _, publish, command, others, nothing = lines(rules(conf, "test", "sensor/1", "x", "--qos", "0"))
    assert publish.endswith(
        "writes nothing: on_message_publish stores QoS 1 and 2, and this is QoS 0 (on_message_store stores every QoS)"
    )
    assert command.endswith("other topic: alarm/# does not match sensor/1")
    assert (others, nothing) == ("rules of other events: session.subscribed 1", "nothing would be sent")
    (lookup, *_) = lines(rules(conf, "test", "$share/g/a/+", "--event", "session.subscribed"))[1:]
    assert lookup.endswith("asks the far end: for retained messages")


def test_test_as_json_has_argument_lists(conf: Path) -> None:
    found = answer(rules(conf, "test", "alarm/1", "x", "--retain", "--json", *AT))
    assert (found["event"], found["topic"], found["qos"], found["retain"]) == ("message.publish", "alarm/1", 1, True)
    assert (found["payload"], found["time"]) == ("x", "2026-01-31 12:00:00")
    results = {rule["rule"]: (rule["matches"], rule["result"]) for rule in found["rules"]}
    assert results == {
        "session.subscribed.1": (False, "other event"),
        "message.publish.9": (True, "sends"),
        "message.publish.10": (True, "sends"),
    }
    assert found["rules"][2]["writes"] == [{"argv": ["RPUSH", "alarms", "x"]}, {"argv": ["INCR", "n"]}]


@pytest.mark.parametrize("way", ["-", "@FILE"])
def test_a_payload_of_any_bytes_comes_from_the_input_or_a_file_and_is_written_out(conf: Path, way: str) -> None:
    payload = b"a\xff\x00\x1b[31m\n"
    (conf / "payload").write_bytes(payload)
    argument = way.replace("FILE", str(conf / "payload"))
    shown = lines(rules(conf, "test", "alarm/1", argument, typed=payload))
    assert '    RPUSH alarms "a\\xff\\x00\\x1b[31m\\n"' in shown
    assert all(line.isprintable() for line in shown)
    found = answer(rules(conf, "test", "alarm/1", argument, "--json", typed=payload))
    assert found["payload"] == {"$base64": True, "encoded": "Yf8AG1szMW0K"}


def test_events_without_topic_and_payload_need_none(conf: Path) -> None:
    with (conf / "emqx_backend_redis.conf").open("a") as file:
        file.write('backend.redis.hook.client.connected.1 = {"action": {"commands": ["SET c ${clientid}"]}, "pool": "pool1"}\n')
        file.write('backend.redis.hook.message.delivered.1 = {"action": {"commands": ["SET m ${msgid}"]}, "pool": "pool1"}\n')
    assert "    SET c c1" in lines(rules(conf, "test", "--event", "client.connected", "--client", "c1"))
    assert "    SET c c1" in lines(rules(conf, "test", "ignored", "too", "--event", "client.connected", "--client", "c1"))
    for event in ("message.deliver", "message.delivered"):
        found = answer(rules(conf, "test", "a", "--event", event, "--json"))
        sent = [rule["writes"] for rule in found["rules"] if rule["result"] == "sends"]
        assert sent == [[{"argv": ["SET", "m", found["msgid"]]}]]


def test_a_file_with_a_mistake_is_said_to_send_nothing(conf: Path) -> None:
    with (conf / "emqx_backend_redis.conf").open("a") as file:
        file.write("nonsense\n")
    done = rules(conf, "test", "alarm/1", "x")
    text = lines(done, 2)
    assert sum("misconfigured: its pool waits until the file is mended: " in line for line in text) == 2
    assert text[-1] == "nothing would be sent"
    assert b":6: neither a comment nor" in done.stderr


WRONG = [
    (("a",), "a published message has a payload"),
    ((), "message.publish is about a topic"),
    (("a/#", "x"), "'a/#' is no topic name: a topic name holds no wildcard"),
    (("$SYS/a", "x"), "clients publish nothing below $SYS/"),
    (("a/#b", "--event", "session.subscribed"), "'a/#b' is no topic filter"),
    (("\udcff", "x"), "TOPIC is not UTF-8 text"),
    (("a", "x", "--client", "\udcff"), "--client is not UTF-8 text"),
    (("a", "@/nowhere"), "/nowhere: No such file or directory; PAYLOAD @FILE is read from FILE"),
    (("a", "x", "--event", "message.aked"), "'message.aked' is not one of"),
    (("a", "x", "--qos", "3"), "3 is not in the range"),
    (("a", "x", "--at", "noon"), "'noon' does not match the formats"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_question_that_is_wrong_ends_with_2(conf: Path, arguments: tuple[str, ...], words: str) -> None:
    done = rules(conf, "test", *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert words in done.stderr.decode()


def test_a_statement_is_shown_with_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["it's", 3, b"\xff", None, datetime(2026, 1, 31, 12), ["a b", 1]]
    cli_rules.print_write(Shown("insert into t\x1b values (%s)", values, "unless it is there"))
    assert capsys.readouterr().out.splitlines() == [
        "    insert into t\ufffd values (%s)   (unless it is there)",
        '        1: "it\'s"',
        "        2: 3",
        '        3: "\\xff"',
        "        4: NULL",
        "        5: 2026-01-31 12:00:00",
        '        6: ("a b", 1)',
    ]


def test_help_tells_what_there_is() -> None:
    for command, words in (((), ("list", "test", "sending nothing")), (("test",), ("@FILE", "--at", "message.acked"))):
        done = subprocess.run(
            [sys.executable, "-m", "tidegate.gateway.cli", "rules", *command, "--help"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        assert done.returncode == 0
        for word in words:
            assert word in done.stdout


# -- the page about them ---------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rules.md").read_text()


def rows_of(heading: str) -> list[list[str]]:
    """The table under a heading, cell by cell."""
    table = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line.startswith("| `")]


def test_the_page_names_every_event_with_what_it_offers() -> None:
    found = {}
    for names, _, offered in rows_of("Events, and what they offer"):
        for event in re.findall(r"`([\w.]+)`", names):
            found[event] = set(re.findall(r"\w+", re.sub(r"\(.*?\)|;.*", "", offered)))
    assert found.pop("message.delivered") == found["message.deliver"]
    assert found == {event: set(names) for event, names in PLACEHOLDERS.items()}


def test_the_page_names_every_function_with_its_events() -> None:
    found = {}
    for names, events, _ in rows_of("Functions"):
        for function in re.findall(r"`(\w+)`", names):
            found[function] = set(re.findall(r"`([\w.]+)`", events))
    assert set(found) == set(FUNCTIONS)
    assert all(set(events) <= found[name] for name, events in FUNCTIONS.items())


def test_the_example_of_the_page_is_read(conf: Path) -> None:
    (example,) = re.findall(r"```conf\n(.*?)```", PAGE, re.DOTALL)
    (conf / "emqx_backend_redis.conf").write_text(example)
    assert [line.split()[1] for line in lines(rules(conf, "list"))[1:3]] == ["message.publish.11", "message.publish.12"]


def test_the_commands_of_the_page_work(conf: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    (conf / "payload.bin").write_bytes(b"\x00")
    for command in commands.splitlines():
        tidegate, group, name, *arguments = shlex.split(command, comments=True)
        assert (tidegate, group) == ("tidegate", "rules")
        lines(rules(conf, name, *[argument.replace("@", f"@{conf}/") for argument in arguments]))
