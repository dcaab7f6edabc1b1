"""The command as a person meets it: a user's mistake is one clear answer with an exit code, never a traceback.

Everything here runs the real command in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
from tidegate.gateway import __version__
from tidegate.gateway.access import password_line

from tests.support.gateway import Gateway
from tests.support.ports import free_port
from tests.support.waiting import wait_until

REDIS_CONF = (Path(__file__).resolve().parents[2] / "conf" / "emqx_backend_redis.conf").read_text()


def tidegate(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tidegate.gateway.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL, env=os.environ | environment,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with this code and one clear text that holds the words."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A directory with an empty gateway.toml."""
    (tmp_path / "gateway.toml").write_text("")
    return tmp_path


# -- last words --------------------------------------------------------------------------------------------------------


def last_words(done: subprocess.CompletedProcess[str], code: int) -> list[str]:
    """What it said as JSON lines when it could not start."""
    assert (done.returncode, done.stdout) == (code, "")
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert {(line["level"], line["event"]) for line in said} == {("error", "cannot_start")}
    return [line["text"] for line in said]


def test_a_start_that_fails_says_so_in_the_format_of_the_log(conf: Path) -> None:
    toml = conf / "gateway.toml"
    toml.write_text('[log]\nformat = "json"\nlevle = "info"\n[limits]\nmax_inflight = 0\n')
    first, second = last_words(tidegate("run", "--config", toml), 2)
    assert "did you mean level?" in first and "max_inflight = 0" in second
    toml.write_text("[log\n")
    assert "is not TOML" in last_words(tidegate("run", "--config", toml, TIDEGATE_LOG__FORMAT="json"), 2)[0]
    toml.write_text('[log]\nformat = "json"\n')
    (conf / "log.db").write_bytes(b"no database at all, for sure" * 100)
    assert "log.db" in last_words(tidegate("run", "--config", toml, "--data", conf), 1)[0]
    toml.write_text('[log]\nformat = "jsn"\n')
    refused(tidegate("run", "--config", toml), 2, "tidegate: ", "log.format")


# -- version, help, usage --------------------------------------------------------------------------------------------


def test_version() -> None:
    assert tidegate("version").stdout == f"tidegate {__version__}\n"
    assert tidegate("--version").stdout == f"tidegate {__version__}\n"


def test_version_and_help_import_nothing_heavy() -> None:
    script = (
        "import sys; from tidegate.gateway.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'asyncio', 'rich', 'redis', 'sqlite3', 'sqlite_utils', 'aiomqtt', 'uvloop', 'fakeredis'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = (
        "run",
        "check",
        "status",
        "doctor",
        "export",
        "backup",
        "restore",
        "salvage",
        "dead",
        "rules",
        "passwd",
        "service",
        "demo",
        "version",
    )
    for command in commands:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("arguments", [["rnu"], ["run", "--listn", "x"], ["passwd"]])
def test_a_command_line_that_is_wrong_ends_with_2(arguments: list[str]) -> None:
    refused(tidegate(*arguments), 2, "Usage:")


@pytest.mark.parametrize("command", ["run", "check", "status", "demo"])
def test_an_empty_directory_name_is_refused(command: str) -> None:
    refused(tidegate(command, "--data", ""), 2, "'--data': it is empty: give a path")


@pytest.mark.parametrize("arguments", [["version"], ["--version"], ["--help"], ["check"], ["status"], ["status", "--json"]])
def test_an_output_that_cannot_be_written_ends_in_one_sentence_or_none(tmp_path: Path, arguments: list[str]) -> None:
    with Gateway(tmp_path) as gateway, open("/dev/full", "wb") as full, open_for_nobody() as nobody:
        places = {"check": ["--config", str(tmp_path / "gateway.toml")], "status": ["--data", str(gateway.data)]}
        command = [sys.executable, "-m", "tidegate.gateway.cli", *arguments, *places.get(arguments[0], [])]
        for output, said in ((full, "tidegate: cannot write the output: No space left on device\n"), (nobody, "")):
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False, timeout=20)
            assert (done.returncode, done.stderr) == (1, said)


def open_for_nobody() -> BinaryIO:
    """A pipe whose reader is gone, as with `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "wb", buffering=0)


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_of_what_is_shipped() -> None:
    shipped = Path(__file__).resolve().parents[2] / "conf" / "gateway.toml"
    done = tidegate("check", "--config", shipped, TIDEGATE_UPLINK__BACKENDS="sqlite,redis")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"configuration: {shipped}\nall is well\n", "")


def test_check_says_which_file_it_read_or_that_it_had_none(conf: Path) -> None:
    toml = conf / "gateway.toml"
    toml.write_text("nonsense = 1\n")
    assert f"configuration: {toml}\n" in tidegate("check", "--config", toml).stderr
    if not Path("/etc/tidegate/gateway.toml").exists():
        done = tidegate("check", XDG_CONFIG_HOME=str(conf))
        assert "/tidegate/gateway.toml: the defaults\nall is well\n" in done.stdout


def test_a_start_says_what_it_reads_and_writes(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        wait_until(lambda: f" data={gateway.data} config={tmp_path}/gateway.toml\n" in gateway.log(), 10.0, gateway.log)


def test_check_tells_all_mistakes_of_all_files_at_once(conf: Path) -> None:
    (conf / "gateway.toml").write_text(
        '[store]\ndurabilty = "full"\n[access]\npassword_file = "passwd"\n[uplink]\nbackends = ["sqlite", "redis"]\n'
    )
    (conf / "passwd").write_text("anna:secret\n")
    (conf / "emqx_backend_redis.conf").write_text(
        "backend.redis.pool1.server = 127.0.0.1\n"
        'backend.redis.hook.message.publish.1 = {"action": {"function": "on_mesage_publish"}, "pool": "pool1"}\n'
    )
    (conf / "emqx_backend_sqlite.conf").write_text("backend.sqlite.hook.client.conected.1 = {}\n")
    done = tidegate("check", "--config", conf / "gateway.toml")
    refused(
        done,
        2,
        f"{conf}/gateway.toml:2: unknown key 'durabilty' in [store]: did you mean durability?",
        f"{conf}/passwd:1: ",
        f"{conf}/emqx_backend_redis.conf:1: ",
        f'{conf}/emqx_backend_redis.conf:2: unknown function "on_mesage_publish"; did you mean "on_message_publish"?',
        f'{conf}/emqx_backend_sqlite.conf:1: unknown event "client.conected"; did you mean "client.connected"?',
        "6 mistakes",
    )


def test_check_names_the_missing_file_of_a_backend(conf: Path) -> None:
    (conf / "gateway.toml").write_text('[uplink]\nbackends = ["redis"]\n')
    refused(tidegate("check", "--config", conf / "gateway.toml"), 2, f"{conf}/emqx_backend_redis.conf: cannot be read")


@pytest.mark.parametrize(
    ("rules", "words"),
    [("", "no pool is set up"), ("backend.redis.pool1.server = 127.0.0.1:6379\n", "there is no rule")],
)
def test_check_and_status_name_a_rule_file_that_carries_nothing(tmp_path: Path, rules: str, words: str) -> None:
    toml = "[uplink]\nbackends = ['sqlite', 'redis']\n"
    with Gateway(tmp_path, toml=toml, files={"emqx_backend_redis.conf": rules}) as gateway:
        refused(
            tidegate("check", "--config", tmp_path / "gateway.toml"),
            2, f"{tmp_path}/emqx_backend_redis.conf: {words}", "take redis out of [uplink] backends",
        )  # fmt: skip
        wait_until(lambda: "misconfigured" in tidegate("status", "--data", gateway.data).stdout, 10.0, gateway.log)
        assert words in tidegate("status", "--data", gateway.data).stdout


def test_check_warns_and_passes(conf: Path) -> None:
    done = tidegate("check", "--config", conf / "gateway.toml", TIDEGATE_GATEWAY__NAME="x")
    assert done.returncode == 0
    (conf / "gateway.toml").write_text('[[listener]]\nbind = "0.0.0.0:1883"\n')
    done = tidegate("check", "--config", conf / "gateway.toml")
    assert (done.returncode, done.stdout) == (0, f"configuration: {conf}/gateway.toml\nno mistakes, 1 warning\n")
    assert f"tidegate passwd -c {conf}/passwd USER" in done.stderr


# -- run: what makes it impossible -----------------------------------------------------------------------------------


def run_refused(conf: Path, code: int, *words: str, data: Path | None = None, listen: str = "") -> None:
    listen = listen or f"127.0.0.1:{free_port()}"
    done = tidegate("run", "--config", conf / "gateway.toml", "--data", data or conf / "data", "--listen", listen)
    refused(done, code, *words)
    assert len([line for line in done.stderr.splitlines() if "listening on" not in line]) == 1, "one sentence"


def test_a_mistake_in_gateway_toml(conf: Path) -> None:
    (conf / "gateway.toml").write_text("[store]\ndurability = 'ful'\n")
    run_refused(conf, 2, f"{conf}/gateway.toml:2: ", "nearest: full")
    assert not (conf / "data").exists()


def test_a_port_in_use(conf: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run_refused(conf, 1, f"cannot listen on {address}: Address already in use", "--listen HOST:PORT", listen=address)


def test_an_address_that_is_not_ours(conf: Path) -> None:
    (conf / "gateway.toml").write_text("[access]\npassword_file = 'passwd'\n")
    (conf / "passwd").write_text("")
    run_refused(conf, 1, "cannot listen on 192.0.2.1:1883: Cannot assign requested address", listen="192.0.2.1:1883")


def test_a_name_that_nobody_knows(conf: Path) -> None:
    (conf / "gateway.toml").write_text("[access]\npassword_file = 'passwd'\n")
    (conf / "passwd").write_text("")
    run_refused(conf, 1, "cannot listen on nowhere.invalid:1883: ", listen="nowhere.invalid:1883")


@pytest.mark.parametrize("place", ["/proc/tidegate", "/dev/null/tidegate"])
def test_a_directory_that_cannot_be_written(conf: Path, place: str) -> None:
    run_refused(conf, 1, f"cannot write in the data directory {place}", "--data DIR", data=Path(place))


def test_a_directory_in_use_by_another_gateway(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gateway:
        run_refused(tmp_path, 1, f"another tidegate is running on {gateway.data}", data=gateway.data)
        assert tidegate("status", "--data", gateway.data).returncode == 0, "the first one goes on"


def test_a_log_that_is_no_database(conf: Path) -> None:
    (conf / "data").mkdir()
    (conf / "data" / "log.db").write_bytes(b"something else entirely\n" * 100)
    before = (conf / "data" / "log.db").read_bytes()
    run_refused(conf, 1, f"{conf}/data/log.db is not a database", "nothing was changed")
    assert (conf / "data" / "log.db").read_bytes() == before


def test_a_log_of_another_program(conf: Path) -> None:
    (conf / "data").mkdir()
    with sqlite3.connect(conf / "data" / "log.db") as other:
        other.execute("CREATE TABLE bookmarks (url)")
    other.close()
    before = (conf / "data" / "log.db").read_bytes()
    run_refused(conf, 1, f"{conf}/data/log.db belongs to another program", "nothing was changed")
    assert (conf / "data" / "log.db").read_bytes() == before


def test_a_log_of_a_newer_version(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    gateway.start()
    gateway.stop()
    with sqlite3.connect(gateway.data / "log.db") as log:
        log.execute("PRAGMA user_version = 99")
    log.close()
    run_refused(tmp_path, 1, "was written by a newer tidegate", "nothing was changed", data=gateway.data)


def test_a_damaged_log(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    gateway.start()
    gateway.stop()
    path = gateway.data / "log.db"
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xa5" * (len(content) - 100))
    damaged = path.read_bytes()
    run_refused(tmp_path, 1, f"{path} is damaged", f"`tidegate salvage --data {gateway.data}`", data=gateway.data)
    assert path.read_bytes() == damaged


def test_a_bad_password_file(conf: Path) -> None:
    (conf / "gateway.toml").write_text("[access]\npassword_file = 'passwd'\n")
    (conf / "passwd").write_text("anna:secret\n")
    run_refused(conf, 2, f"{conf}/passwd:1: ", "tidegate passwd")


# -- run: what does not --------------------------------------------------------------------------------------------


def test_a_mistake_in_a_rule_file_leaves_the_broker_running(tmp_path: Path) -> None:
    broken = REDIS_CONF.replace("on_message_retain", "on_mesage_retain")
    gateway = Gateway(tmp_path, toml="[uplink]\nbackends = ['sqlite', 'redis']\n", files={"emqx_backend_redis.conf": broken})
    with gateway:
        assert f"{tmp_path}/emqx_backend_redis.conf:" in gateway.log()
        assert 'did you mean "on_message_retain"?' in gateway.log()
        wait_until(lambda: "misconfigured" in tidegate("status", "--data", gateway.data).stdout, 10.0, gateway.log)
        assert gateway.stop() == 0
    assert not gateway.faults()


def test_a_mistake_in_the_box_s_own_rules_stands_in_the_status(tmp_path: Path) -> None:
    line = 'backend.sqlite.hook.session.subscribed.1 = {"action": {"function": "on_message_fech"}}\n'
    with Gateway(tmp_path, files={"emqx_backend_sqlite.conf": line}) as gateway:
        status = tidegate("status", "--data", gateway.data).stdout
        assert "pool        sqlite: misconfigured" in status
        assert 'emqx_backend_sqlite.conf:1: unknown function "on_message_fech"' in status
        (tmp_path / "emqx_backend_sqlite.conf").write_text(line.replace("fech", "fetch"))
        os.kill(gateway.pid, signal.SIGHUP)
        wait_until(lambda: "misconfigured" not in tidegate("status", "--data", gateway.data).stdout)


def test_an_uplink_db_that_is_no_database_leaves_the_broker_running_and_stands_in_status(tmp_path: Path) -> None:
    gateway = Gateway(
        tmp_path, toml="[uplink]\nbackends = ['sqlite', 'redis']\n", files={"emqx_backend_redis.conf": REDIS_CONF}
    )
    gateway.data.mkdir()
    (gateway.data / "uplink.db").write_bytes(b"something else entirely\n" * 100)
    with gateway:
        wait_until(lambda: "the uplink waits" in gateway.log(), 10.0, gateway.log)
        status = tidegate("status", "--data", gateway.data)
        assert status.returncode == 0
        assert f"{gateway.data}/uplink.db is not a database" in status.stdout
        assert "uplink_ended" not in gateway.log()
        assert gateway.stop() == 0


def test_a_listener_for_everybody_without_passwords_is_narrowed_and_says_how_to_open_it(tmp_path: Path) -> None:
    port = free_port()
    gateway = Gateway(tmp_path)
    gateway.port = port
    command = gateway.command()
    command[-1] = f"0.0.0.0:{port}"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: _listens("127.0.0.1", port))
            assert not _listens("127.0.0.2", port), "narrowed to 127.0.0.1"
        finally:
            process.terminate()
        assert process.stderr is not None
        log = process.stderr.read()
    assert f"not listening on 0.0.0.0:{port}, only on 127.0.0.1:{port}" in log
    assert f"tidegate passwd -c {tmp_path}/passwd USER" in log
    assert process.returncode == 0


def test_an_address_of_ipv6_is_written_as_people_write_it(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    address = f"[::1]:{gateway.port}"
    with subprocess.Popen([*gateway.command()[:-1], address], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: f"listening   {address};" in tidegate("status", "--data", gateway.data).stdout)
        finally:
            process.terminate()
        assert process.stderr is not None
        assert f" address={address} " in process.stderr.read()


def test_what_is_lacking_to_let_devices_in_is_said_and_nothing_else(tmp_path: Path) -> None:
    toml, users = "[access]\npassword_file = 'users'\n", password_line("anna", b"secret") + "\n"
    with Gateway(tmp_path, toml=toml, files={"users": users}) as gateway:
        wait_until(lambda: "loopback_only" in gateway.log(), 10.0, gateway.log)
        (line,) = [line for line in gateway.log().splitlines() if "loopback_only" in line]
    assert line.endswith('to let devices in: set bind = "0.0.0.0:1883" under [[listener]] in gateway.toml, and restart')


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_a_data_directory_deeper_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["deeper" * 5] * 4)
    with Gateway(tmp_path, data=deep) as gateway:
        assert tidegate("status", "--data", deep).stdout
        assert gateway.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    gateway = Gateway(tmp_path)
    with subprocess.Popen(gateway.command(), stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: _listens("127.0.0.1", gateway.port))
        process.send_signal(number)
        assert process.wait(5) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


# -- status ----------------------------------------------------------------------------------------------------------


def test_status_without_a_gateway(tmp_path: Path) -> None:
    refused(tidegate("status", "--data", tmp_path), 1, f"no gateway is running on {tmp_path}", "tidegate run --data")


def test_status_as_json_and_for_people(tmp_path: Path) -> None:
    with Gateway(tmp_path, toml="[gateway]\nname = 'barn-7'\n") as gateway:
        answer = json.loads(tidegate("status", "--data", gateway.data, "--json").stdout)
        text = tidegate("status", "--data", gateway.data).stdout
    assert answer["version"] == __version__
    assert (answer["name"], answer["epoch"]) == ("barn-7", 1)
    assert answer["listeners"] == [f"127.0.0.1:{gateway.port}"]
    assert {"clients", "messages", "store", "pools", "dropped"} <= set(answer)
    assert text.startswith(f"barn-7  tidegate {__version__}")
    assert f"127.0.0.1:{gateway.port}" in text
