"""The commands `tidegate dead`: what the far ends refused, and what a person makes of it.

Reading goes to `uplink.db` read-only. A change is a request in `DATA/dead/` (`uplink/requests.py`): the uplink process takes it
up, or this command does when none runs. Nothing heavy is imported before a command needs it.

Invariant: no command here sends anything; what is to be sent again is sent by the uplink when the far end can be reached.
"""

from __future__ import annotations

import base64
import importlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from .cli_parts import CONFIG, DATA, Failure, as_json_value, load_config

TAKE_UP_WAIT = 5.0
SHOWN_IDS = 10
"""Ids, or runs of them, that `dead list` names of one group."""
RECORDS = {"redis": "redis_record", "mysql": "sql_record", "pgsql": "sql_record"}


def _places(command: Callable[..., None]) -> Callable[..., None]:
    return CONFIG(DATA(command))


POOL = click.option("--pool", help="Only of this pool (redis.pool1).")
REASON = click.option("--reason", help="Only those whose reason holds this text.")
IDS = click.argument("ids", nargs=-1, type=int, metavar="[ID]...")


@click.group()
def dead() -> None:
    """What a far end refused: look at it, send it again, change it, drop it."""


@dead.command("list")
@_places
@POOL
@click.option("--json", "as_json", is_flag=True, help="Print the groups as JSON.")
def list_(config_file: Path | None, data: Path | None, pool: str | None, as_json: bool) -> None:
    """Show the quarantine grouped by pool and reason."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in _rows(_data(config_file, data), pool):
        groups.setdefault((row.pool, row.reason), []).append(row)
    found = [
        {
            "pool": name, "reason": reason, "count": len(rows), "waiting": sum(row.due for row in rows),
            "first": _utc(min(row.at for row in rows)), "last": _utc(max(row.at for row in rows)),
            "ids": [row.id for row in rows], "example": {"id": rows[-1].id, "target": rows[-1].target},
        }
        for (name, reason), rows in groups.items()
    ]  # fmt: skip
    found.sort(key=lambda group: -group["count"])
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for group in found:
        waiting = f", {group['waiting']} wait to be sent again" if group["waiting"] else ""
        click.echo(f"{group['pool']}: {group['reason']}")
        click.echo(f"  {group['count']} record{'s' * (group['count'] != 1)}{waiting}, {group['first']} to {group['last']} UTC")
        click.echo(f"  ids: {_in_short(group['ids'])}")
        click.echo(f"  for example {group['example']['id']}: {group['example']['target']}")
    if not found:
        click.echo("nothing is in quarantine" + (f" of {pool}" if pool else ""))


def _in_short(ids: Sequence[int]) -> str:
    """Rising numbers as a person reads them: 1-3, 7."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:SHOWN_IDS])
    return shown + (", … (tidegate dead export has them all)" if len(runs) > SHOWN_IDS else "")


@dead.command()
@_places
@click.argument("number", type=int, metavar="ID")
def show(config_file: Path | None, data: Path | None, number: int) -> None:
    """Show one record: the write, why it was refused, and the entry it came from."""
    place = _data(config_file, data)
    (row,) = _chosen(_rows(place), [number])
    click.echo(json.dumps(_as_dict(row) | {"entry": _entry(place, row)}, indent=2, ensure_ascii=False))


@dead.command()
@_places
@POOL
def export(config_file: Path | None, data: Path | None, pool: str | None) -> None:
    """Print the records as JSON lines."""
    for row in _rows(_data(config_file, data), pool):
        click.echo(json.dumps(_as_dict(row), ensure_ascii=False))


@dead.command()
@_places
@POOL
@REASON
@click.option("--all", "everything", is_flag=True, help="All of them.")
@IDS
def retry(
    config_file: Path | None, data: Path | None, pool: str | None, reason: str | None, everything: bool, ids: tuple[int, ...]
) -> None:
    """Send records again, each once; one leaves the quarantine when the far end has it."""
    config = load_config(config_file, data)
    place = config.data
    rows = _selection(place, pool, reason, everything, ids)
    lost = [row for row in rows if not row.original]
    if ids and lost:
        raise _failure(f"{lost[0].id}: its write is not known any more, because the log had dropped the entry; only drop it")
    _ask_for(place, "retry", [row.id for row in rows if row.original and not row.due], "to be sent again")
    for name in sorted({row.pool for row in rows} - _configured(config)):
        click.echo(f"{name} is not configured: they wait until it is, or until you drop them", err=True)


@dead.command()
@_places
@POOL
@REASON
@click.option("--all", "everything", is_flag=True, help="All of them.")
@IDS
def drop(
    config_file: Path | None, data: Path | None, pool: str | None, reason: str | None, everything: bool, ids: tuple[int, ...]
) -> None:
    """Remove records for good; they are counted.

    What waits to be sent again stays, unless its pool is not configured (any more), or ID names it while no gateway runs.
    """
    config = load_config(config_file, data)
    place = config.data
    if (pool is None) != (reason is None):
        raise _failure("what is dropped is lost: name both --pool and --reason, or --all, or ID...", 2)
    rows = _selection(place, pool, reason, everything, ids)
    sending = _sending(config) if ids else _configured(config)
    if ids:
        _must_not_wait(rows, sending)
    gone = [row for row in rows if not row.due or row.pool not in sending]
    _ask_for(place, "drop", [row.id for row in gone], "dropped" + _may_have_arrived(gone))


@dead.command()
@_places
@click.option("--payload", help="The new payload.")
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="A new value (may be repeated).")
@click.argument("number", type=int, metavar="ID")
def edit(config_file: Path | None, data: Path | None, payload: str | None, changes: tuple[str, ...], number: int) -> None:
    """Change a record and send it, once; without options in $EDITOR. The original is kept until it has arrived."""
    config = load_config(config_file, data)
    place = config.data
    (row,) = _chosen(_rows(place), [number])
    _must_not_wait([row], _sending(config))
    record = _record(row.pool)
    if record is None or not row.original:
        raise _failure(f"{number}: it cannot be edited, because how it is written is not known here")
    before = row.original if row.edited is None else row.edited
    wanted = {} if payload is None else {"payload": payload.encode()}
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise _failure(f"--set {text}: write FIELD=VALUE", 2)
        wanted[name] = value.encode()
    try:
        after = record.change(before, wanted or _in_editor(record.describe(before)[1]))
    except record.FieldFault as error:
        raise _failure(f"{number}: {error}", 2) from None
    _ask_for(place, "edit", [number], "to be sent as changed" + _may_have_arrived([row]), base64.b64encode(after).decode())


def _in_editor(fields: dict[str, bytes]) -> dict[str, bytes]:
    """The fields as a person left them."""
    text = click.edit(
        json.dumps({name: as_json_value(value) for name, value in fields.items()}, indent=2, ensure_ascii=False),
        extension=".json",
    )
    if text is None:
        raise _failure("nothing was changed in the editor: the record stays as it is")
    try:
        found = json.loads(text)
        return {name: _bytes(value) for name, value in found.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _failure(f"what was saved in the editor is no JSON object of texts: {error}", 2) from None


def _data(config_file: Path | None, data: Path | None) -> Path:
    return load_config(config_file, data).data


def _failure(text: str, code: int = 1) -> click.ClickException:
    return Failure(text, code)


def _rows(data: Path, pool: str | None = None) -> list[Any]:
    from tidegate.store.schema import StoreError
    from tidegate.uplink.progress import read_dead

    if not (data / "log.db").exists():
        raise _failure(f"there is no log in {data}: name its directory with --data DIR")
    try:
        return [row for row in read_dead(data) if pool is None or row.pool == pool]
    except StoreError as error:
        raise _failure(str(error)) from None


def _chosen(rows: Iterable[Any], ids: Sequence[int]) -> list[Any]:
    found = {row.id: row for row in rows}
    if missing := [number for number in ids if number not in found]:
        raise _failure(f"there is no record {missing[0]} in quarantine: `tidegate dead export` lists them")
    return [found[number] for number in dict.fromkeys(ids)]


def _selection(data: Path, pool: str | None, reason: str | None, everything: bool, ids: Sequence[int]) -> list[Any]:
    if bool(ids) + everything + (pool is not None or reason is not None) != 1:
        raise _failure("say which: ID..., or --pool and --reason, or --all", 2)
    rows = _rows(data, pool)
    return _chosen(rows, ids) if ids else [row for row in rows if reason is None or reason in row.reason]


def _must_not_wait(rows: Iterable[Any], sending: Collection[str]) -> None:
    for row in rows:
        if row.due and row.pool in sending:
            text = "it waits to be sent again and may have arrived; wait until it has or is refused, or stop the gateway"
            raise _failure(f"{row.id}: {text}")


def _may_have_arrived(rows: Iterable[Any]) -> str:
    waited = [row for row in rows if row.due]
    return f" ({len(waited)} waited to be sent again, and may have arrived)" if waited else ""


def _sending(config: Any) -> set[str]:
    """The pools that an uplink process may be sending to right now."""
    from tidegate.store.schema import StoreError
    from tidegate.uplink.progress import cursors
    from tidegate.uplink.requests import uplink_runs

    try:
        return set(cursors(config.data)) if uplink_runs(config.data) else set()
    except StoreError as error:
        raise _failure(str(error)) from None


def _configured(config: Any) -> set[str]:
    """The pools of the running gateway; of one that does not run, those of its next start."""
    from tidegate.uplink.progress import cursors
    from tidegate.uplink.rule import load_all

    if running := _sending(config):
        return running
    files = load_all(config.conf_dir, config.backends)
    hidden = [file.backend for file in files if file.mistakes]
    kept = {name for name in cursors(config.data) if name.partition(".")[0] in hidden}
    return kept | {pool.full_name for file in files for pool in file.pools}


def _ask_for(data: Path, action: str, ids: list[int], what: str, edited: str = "") -> None:
    """Leave the request and see that it is taken up."""
    if not ids:
        click.echo(f"0 records {what}")
        return
    from tidegate.store.schema import StoreError
    from tidegate.uplink.requests import leave, take_up_alone

    try:
        path = leave(data, action, ids, edited)
        taken = take_up_alone(data) or _taken_by_the_uplink(data, path)
    except OSError as error:
        raise _failure(f"{data}: {error.strerror}: run this as the user of the gateway") from None
    except StoreError as error:
        raise _failure(f"{error}; the request is kept and done later") from None
    later = "" if taken else "; the uplink is busy and takes it up later"
    click.echo(f"{len(ids)} record{'s' if len(ids) > 1 else ''} {what}{later}")


def _taken_by_the_uplink(data: Path, path: Path) -> bool:
    from .control import NotRunning, ask

    try:
        ask(data / "control.sock", {"command": "wake"})
    except NotRunning:
        return False
    deadline = time.monotonic() + TAKE_UP_WAIT
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not path.exists()


def _as_dict(row: Any) -> dict[str, object]:
    values: dict[str, object] = row._asdict() | {"at": _utc(row.at)}
    record = _record(row.pool)
    for name in ("original", "edited"):
        value = getattr(row, name)
        if value and record is not None:
            kind, fields = record.describe(value)
            values[name] = {"write": kind} | {field: as_json_value(part) for field, part in fields.items()}
        else:
            values[name] = None if not value else as_json_value(value)
    return values


def _entry(data: Path, row: Any) -> dict[str, object] | None:
    """The entry in the log, while that holds it."""
    from tidegate.store.reader import LogReader
    from tidegate.store.schema import StoreError

    try:
        log = LogReader(data / "log.db")
        try:
            entries, _ = log.read(row.seq - 1, 1)
        finally:
            log.close()
    except StoreError:
        return None
    for entry in entries:
        if (entry.seq, entry.gateway, entry.epoch) == (row.seq, row.gateway, row.epoch):
            return {
                "clientid": entry.clientid, "topic": entry.topic, "qos": entry.qos, "retain": entry.retain,
                "payload": as_json_value(entry.payload), "time": _utc(entry.when),
            }  # fmt: skip
    return None


def _record(pool: str) -> Any:
    """The module that reads what is written to this kind of far end."""
    name = RECORDS.get(pool.partition(".")[0])
    return importlib.import_module(f"tidegate.uplink.{name}") if name else None


def _bytes(value: Any) -> bytes:
    return base64.b64decode(value["encoded"]) if isinstance(value, dict) else str(value).encode()


def _utc(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"
