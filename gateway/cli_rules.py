"""The commands `tidegate rules`: which rules are in force, and what they would do with a message, sending nothing.

The files are read as the gateway reads them at its next start or reload; what the running gateway has read is asked at its
control socket. Nothing heavy is imported before a command needs it.

Invariant: no far end is asked, nothing is sent, and no secret is printed: pools are shown by their names.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from .cli_parts import CONFIG, DATA, SINCE, Failure, as_json_value, load_config

_EVENTS = (
    *("client.connected", "client.disconnected", "session.created", "session.subscribed", "session.unsubscribed"),
    *("message.publish", "message.deliver", "message.delivered", "message.acked"),
)
_PLAIN = re.compile(r"[\w./:#+@$%^&*(){}=,-]+", re.ASCII)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")


def _places(command: Callable[..., None]) -> Callable[..., None]:
    return CONFIG(DATA(command))


@click.group()
def rules() -> None:
    """Which rules are in force, and what they would do with a message."""


@rules.command("list", short_help="Show every rule, where it is written, and whether it is in force.")
@_places
@_JSON
def list_(config_file: Path | None, data: Path | None, as_json: bool) -> None:
    """Show every rule: where it is written, what it does, and whether it is in force.

    Ends with 2 when a file has mistakes.
    """
    config = load_config(config_file, data)
    files = _files(config)
    running = _running(config)
    rows = [_row(file, rule, running) for file in files for rule in file.rules]
    pools = [_pool(file, pool.full_name, running) for file in files for pool in file.pools if file.backend != "sqlite"]
    changed, unused = _changed(files, running), _unused(config)
    if as_json:
        told = {kind: [told._asdict() for file in files for told in getattr(file, kind)] for kind in ("warnings", "mistakes")}
        found = {"rules": rows, "pools": pools, "reload_needed": changed, "not_loaded": unused}
        click.echo(json.dumps(found | told, indent=2, ensure_ascii=False))
    else:
        _print_table(rows)
        for pool in pools:
            click.echo(f"pool {pool['name']}: {pool['state']}")
        for path in unused:
            backend = Path(path).stem.rpartition("_")[2]
            click.echo(f"{Path(path).name} is not loaded: {backend} is not in uplink.backends")
        for path in changed:
            click.echo(f"warning: {path} was changed after the gateway read it: systemctl reload tidegate", err=True)
    _end(files, () if as_json else ("warnings", "mistakes"))


@rules.command(short_help="Show what the rules would do with a message, sending nothing.")
@_places
@click.option("--event", type=click.Choice(_EVENTS), default="message.publish", show_default=True, metavar="EVENT",
              help=f"What happens: {', '.join(_EVENTS)}.")  # fmt: skip
@click.option("--client", default="client-1", show_default=True, help="Client id.")
@click.option("--qos", type=click.IntRange(0, 2), default=1, show_default=True, help="QoS of the message or subscription.")
@click.option("--retain", is_flag=True, help="The message is to be retained.")
@click.option("--at", type=click.DateTime(SINCE), help="When it happens (UTC); now if not given.")
@_JSON
@click.argument("topic", required=False)
@click.argument("payload", required=False)
def test(
    config_file: Path | None, data: Path | None, event: str, client: str, qos: int, retain: bool, at: datetime | None,
    as_json: bool, topic: str | None, payload: str | None,
) -> None:  # fmt: skip
    """Show what the rules would do with PAYLOAD on TOPIC: the commands and statements with their values.

    Nothing is sent and no far end is asked. PAYLOAD - is read from the input, @FILE from a file; write -- before one that
    begins with -. For session.subscribed and session.unsubscribed TOPIC is the topic filter. What an event has not (a
    payload, a topic) is left out. Ends with 2 when a file has mistakes.
    """
    from tidegate.uplink.explain import explain

    config = load_config(config_file, data)
    if not _is_text(client):
        raise Failure("--client is not UTF-8 text", 2)
    event = "message.deliver" if event == "message.delivered" else event
    when = int(at.replace(tzinfo=UTC).timestamp() * 1000) if at else time.time_ns() // 1_000_000
    entry, node = _entry(config, event, client, qos, retain, when, _topic(event, topic), _payload(event, payload))
    files = _files(config)
    verdicts = [verdict for file in files for verdict in explain(file, entry, node, _find)]
    if as_json:
        # What is no JSON value, such as a time, is shown as its text.
        click.echo(json.dumps(_answer(event, entry, verdicts, files), indent=2, ensure_ascii=False, default=str))
    else:
        _print_answer(event, entry, verdicts)
    _end(files, () if as_json else ("mistakes",))


def _files(config: Any) -> Sequence[Any]:
    from tidegate.uplink.rule import load_all

    return load_all(config.conf_dir, config.backends)


def _find(backend: str) -> Any:
    return importlib.import_module(f"tidegate.uplink.to_{backend}")


def _end(files: Sequence[Any], kinds: Sequence[str]) -> None:
    """Say what a person should know of the files, and end with 2 when one has a mistake."""
    for kind in kinds:
        for file in files:
            for told in getattr(file, kind):
                click.echo(f"{kind.removesuffix('s')}: {told}", err=True)
    if any(file.mistakes for file in files):
        sys.exit(2)


# -- list ------------------------------------------------------------------------------------------------------------


def _row(file: Any, rule: Any, running: dict[str, Any] | None) -> dict[str, Any]:
    from tidegate.uplink.explain import IN_FORCE, state

    told = state(file)
    return {
        **_named(file.backend, rule), "state": _not_loaded(file.backend, running) or told if told == IN_FORCE else told,
        "warnings": [told.text for told in file.warnings if told.line == rule.line],
    }  # fmt: skip


def _not_loaded(backend: str, running: dict[str, Any] | None) -> str:
    """Why the running gateway does not go by the rules of this backend; empty when it does."""
    if running is None:
        return "not loaded: the gateway does not run"
    if not running:
        return "not known: the gateway could not be asked"
    if backend not in running["backends"]:
        return f"not loaded: {backend} was not in uplink.backends when the gateway started; restart it"
    return ""


def _unused(config: Any) -> list[str]:
    """Files of far ends that lie there and are not in `uplink.backends`."""
    from tidegate.uplink.vocabulary import BUILT

    paths = [config.conf_dir / f"emqx_backend_{name}.conf" for name in BUILT if name not in config.backends]
    return [str(path) for path in paths if path.exists()]


def _named(backend: str, rule: Any) -> dict[str, Any]:
    """The rule as the file has it, with the options that change what its function does."""
    kind = "function" if rule.function else "commands" if rule.commands else "sql"
    action = rule.function or [one.text for one in rule.commands or rule.statements]
    options = {"expired_time": rule.expired_time} if rule.expired_time else {}
    if rule.function.startswith("on_message_fetch"):
        options |= {"max_returned_count": rule.max_returned_count, "time_range": rule.time_range}
    return {
        "backend": backend, "pool": f"{backend}.{rule.pool}", "rule": rule.name, "event": rule.event, "number": rule.number,
        "topic": None if rule.everywhere else rule.topic_filter, "action": {kind: action}, "options": options,
        "file": rule.file, "line": rule.line,
    }  # fmt: skip


def _print_table(rules: Sequence[dict[str, Any]]) -> None:
    from .status import printable

    rows = [("pool", "rule", "topic", "action", "where", "state")]
    for rule in rules:
        (action,) = rule["action"].values()
        words = [_shortened(action if isinstance(action, str) else "; ".join(action))]
        words += [f"{name}={value}" for name, value in rule["options"].items()]
        topic = "every topic" if rule["topic"] is None else rule["topic"]
        where = f"{Path(rule['file']).name}:{rule['line']}"
        rows.append((rule["pool"], rule["rule"], topic, " ".join(words), where, rule["state"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        click.echo(printable("  ".join([*cells, row[-1]])))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _running(config: Any) -> dict[str, Any] | None:
    """What the running gateway says of itself; None when none runs, nothing when it cannot be asked."""
    from .control import NoAnswer, NoRight, NotRunning, ask

    try:
        return ask(config.data / "control.sock", {"command": "status"})
    except (NoRight, NoAnswer) as error:
        click.echo(f"warning: {error}", err=True)
        return {}
    except NotRunning:
        return None


def _pool(file: Any, name: str, running: dict[str, Any] | None) -> dict[str, Any]:
    from tidegate.uplink.explain import MISCONFIGURED, NOT_BUILT, trouble
    from tidegate.uplink.vocabulary import BUILT

    live = next((pool["state"] for pool in (running or {}).get("pools", ()) if pool["name"] == name), None)
    if file.backend not in BUILT:
        return {"name": name, "state": NOT_BUILT, "trouble": trouble(file)}
    state = MISCONFIGURED if file.mistakes else live or _not_loaded(file.backend, running) or "not loaded"
    return {"name": name, "state": state, "trouble": trouble(file)}


def _changed(files: Sequence[Any], running: dict[str, Any] | None) -> list[str]:
    """The files that were written after the running gateway read them."""
    read = running.get("rules_read") if running else None
    if read is None:
        return []
    found = []
    for file in files:
        try:
            if os.stat(file.path).st_mtime_ns // 1_000_000 > round(read * 1000):
                found.append(str(file.path))
        except OSError:
            continue
    return found


# -- test ------------------------------------------------------------------------------------------------------------


def _topic(event: str, topic: str | None) -> str:
    from tidegate.store.topic import topic_filter_fault, topic_name_fault
    from tidegate.uplink.vocabulary import WITHOUT_TOPIC

    if topic is not None and not _is_text(topic):
        raise Failure("TOPIC is not UTF-8 text", 2)
    if event in WITHOUT_TOPIC:
        return ""
    if topic is None:
        raise Failure(f"{event} is about a topic: tidegate rules test TOPIC PAYLOAD --event {event}", 2)
    is_filter = event.startswith("session.")
    if fault := (topic_filter_fault if is_filter else topic_name_fault)(topic):
        raise Failure(f"{topic!r} is no topic {'filter' if is_filter else 'name'}: {fault}", 2)
    if event == "message.publish" and topic.startswith(("$SYS/", "$share/")):
        raise Failure(f"{topic!r}: clients publish nothing below $SYS/ and $share/, so no rule sees it", 2)
    return topic


def _is_text(argument: str) -> bool:
    """False for an argument that is no UTF-8, which Python hands over as halves of characters."""
    return all(not "\ud800" <= character <= "\udfff" for character in argument)


def _payload(event: str, payload: str | None) -> bytes:
    """The bytes that PAYLOAD means; only a published message has any."""
    if event != "message.publish":
        return b""
    if payload is None:
        raise Failure("a published message has a payload: tidegate rules test TOPIC PAYLOAD ('' for an empty one)", 2)
    if payload == "-":
        return sys.stdin.buffer.read()
    if not payload.startswith("@"):
        return os.fsencode(payload)
    try:
        return Path(payload[1:]).read_bytes()
    except OSError as error:
        raise Failure(f"{payload[1:]}: {error.strerror}; PAYLOAD @FILE is read from FILE", 2) from None


def _entry(
    config: Any, event: str, client: str, qos: int, retain: bool, when: int, topic: str, payload: bytes
) -> tuple[Any, str]:
    """The entry as the next of this gateway's log would be, and the gateway's name."""
    from tidegate.store.entry import ACKED, DELIVERED, PUBLISH, SUBSCRIBED, Entry
    from tidegate.store.msgid import message_id
    from tidegate.uplink.vocabulary import EVENTS

    gateway, code, epoch, node, seq = _identity(config)
    kind = EVENTS[event]
    msgid = message_id(when, code, epoch, seq)
    if kind in (DELIVERED, ACKED):
        payload = msgid.encode()
    entry = Entry(
        seq, when, when, kind, client, topic, qos if kind in (PUBLISH, SUBSCRIBED) else 0, retain and kind == PUBLISH, payload,
        b"", gateway, epoch, msgid,
    )  # fmt: skip
    return entry, node


def _identity(config: Any) -> tuple[str, str, int, str, int]:
    """Gateway id, its code, epoch, name and next seq from the log; an example where there is no log that we may read."""
    import sqlite3

    from tidegate.store.msgid import gateway_code
    from tidegate.store.reader import LogReader
    from tidegate.store.schema import StoreError

    try:
        log = LogReader(config.data / "log.db")
        try:
            run, (_, last) = log.run(), log.bounds()
        finally:
            log.close()
        return run.gateway, run.code, run.epoch, run.node, last + 1
    except (StoreError, sqlite3.Error, TypeError):
        example = "0" * 16
        return example, gateway_code(example), 1, config.name or socket.gethostname(), 1


def _answer(event: str, entry: Any, verdicts: Sequence[Any], files: Sequence[Any]) -> dict[str, Any]:
    found = [
        {
            **_named(verdict.backend, verdict.rule), "matches": verdict.matches, "result": verdict.result,
            "reason": verdict.reason, "writes": [_write(shown) for shown in verdict.writes],
        }
        for verdict in verdicts
    ]  # fmt: skip
    return {
        "event": event, "topic": entry.topic, "client": entry.clientid, "qos": entry.qos, "retain": entry.retain,
        "payload": as_json_value(entry.payload), "msgid": entry.msgid, "time": _utc(entry.when), "rules": found,
        "mistakes": [told._asdict() for file in files for told in file.mistakes],
    }  # fmt: skip


def _write(shown: Any) -> dict[str, Any]:
    values = [as_json_value(value) if isinstance(value, bytes) else value for value in shown.values]
    what = {"sql": shown.statement, "values": values} if shown.statement else {"argv": values}
    return what | ({"condition": shown.condition} if shown.condition else {})


def _print_answer(event: str, entry: Any, verdicts: Sequence[Any]) -> None:
    from tidegate.uplink.explain import OTHER_EVENT, SENDS

    from .status import printable

    facts = [event, entry.topic, f"client {entry.clientid}"]
    if event in ("message.publish", "session.subscribed"):
        facts.append(f"qos {entry.qos}")
    if event == "message.publish":
        facts += [*(["retain"] if entry.retain else []), f"{len(entry.payload)} bytes"]
    click.echo(printable("  ".join([*(fact for fact in facts if fact), f"msgid {entry.msgid}", f"{_utc(entry.when)} UTC"])))
    others = Counter(verdict.rule.event for verdict in verdicts if verdict.result == OTHER_EVENT)
    for verdict in verdicts:
        name = f"{verdict.backend}.{verdict.rule.pool} {verdict.rule.name}"
        where = f"{Path(verdict.rule.file).name}:{verdict.rule.line}"
        if verdict.result == OTHER_EVENT:
            continue
        click.echo(printable(f"{name} ({where}): {verdict.result}{': ' if verdict.reason else ''}{verdict.reason}"))
        for shown in verdict.writes:
            print_write(shown)
    if others:
        click.echo(f"rules of other events: {', '.join(f'{name} {count}' for name, count in others.items())}")
    if not any(verdict.result == SENDS for verdict in verdicts):
        click.echo("nothing would be sent")


def print_write(shown: Any) -> None:
    """One command in a line; or a statement, and under it what is bound."""
    from .status import printable

    values = [_quoted(value) for value in shown.values]
    condition = f"   ({shown.condition})" if shown.condition else ""
    if not shown.statement:
        click.echo(f"    {' '.join(values)}{condition}")
        return
    click.echo(f"    {printable(shown.statement)}{condition}")
    for number, value in enumerate(values, 1):
        click.echo(f"        {number}: {value}")


def _quoted(value: object) -> str:
    """A value in one line: as it is where it is plain, else in quotes with everything unprintable written out."""
    if value is None:
        return "NULL"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_quoted, value))})"
    if not isinstance(value, (bytes, str)):
        return str(value)
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    return text if _PLAIN.fullmatch(text) else f'"{"".join([_escaped(character) for character in text])}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _utc(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"
