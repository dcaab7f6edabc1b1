"""The commands `tidegate sub`: subscriptions made for a client, the rows of `mqtt_sub`.

Changes go to the running gateway through the control socket, because only the broker writes `log.db`; the list is read.

Invariant: when a command says that it is done, it is on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from .cli_parts import CONFIG, DATA, Failure, load_config
from .status import printable

INACTIVE = (
    "it has no effect yet: put the rule on_subscribe_lookup into emqx_backend_sqlite.conf (docs/sqlite.md), then send the"
    " gateway SIGHUP"
)


def _places(command: Callable[..., None]) -> Callable[..., None]:
    return CONFIG(DATA(command))


CLIENT = click.argument("client")
FILTER = click.argument("topic_filter", metavar="FILTER")


@click.group()
def sub() -> None:
    """Subscriptions made for clients (mqtt_sub): add, delete, list."""


@sub.command()
@_places
@click.option("--qos", type=click.IntRange(0, 2), default=1, show_default=True, help="Greatest QoS of what it gets.")
@CLIENT
@FILTER
def add(config_file: Path | None, data: Path | None, qos: int, client: str, topic_filter: str) -> None:
    """Subscribe CLIENT to FILTER.

    A rule on_subscribe_lookup of emqx_backend_sqlite.conf says when it takes effect: now if the client is connected, and when
    its session is created (session.created) or whenever it connects (client.connected). Without one it is only stored.
    """
    answer = _ask(config_file, data, {"action": "add", "client": client, "filter": topic_filter, "qos": qos})
    if answer["refused"]:
        raise Failure(f"the row is stored, but {client} may not subscribe to {topic_filter}")
    now = ", now" if answer["active"] and answer["connected"] else ""
    click.echo(f"{client} is subscribed to {topic_filter} with QoS {qos}{now}" if answer["active"] else "stored")
    if not answer["active"]:
        click.echo(INACTIVE, err=True)


@sub.command("del")
@_places
@CLIENT
@FILTER
def delete(config_file: Path | None, data: Path | None, client: str, topic_filter: str) -> None:
    """Take it away, also from a client that is connected."""
    answer = _ask(config_file, data, {"action": "del", "client": client, "filter": topic_filter})
    if not answer["found"]:
        raise Failure(f"no subscription to {topic_filter} was made for {client}; see `tidegate sub list {client}`")
    click.echo(f"{client}: {topic_filter} is taken away")


@sub.command("list")
@_places
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@click.argument("client", required=False)
def list_(config_file: Path | None, data: Path | None, as_json: bool, client: str | None) -> None:
    """Show the subscriptions made for all clients, or for CLIENT; the gateway need not run."""
    rows = _rows(load_config(config_file, data).data / "log.db", client)
    for row in rows:
        origin = f"  from {row['source']}" if row["source"] else ""
        text = printable(f"{row['clientid']}  {row['topic']}  QoS {row['qos']}{origin}")
        click.echo(json.dumps(row, ensure_ascii=False) if as_json else text)
    if not rows and not as_json:
        click.echo("none" + (f" for {client}" if client else ""))


def _rows(path: Path, client: str | None) -> list[dict[str, Any]]:
    import sqlite3

    from tidegate.store.schema import StoreError, explain, open_reader

    if not path.exists():
        raise Failure(f"there is no log in {path.parent}: name its directory with --data DIR")
    try:
        with closing(open_reader(path)) as db:
            db.row_factory = sqlite3.Row
            where, values = ("WHERE clientid = ?", (client,)) if client else ("", ())
            (new,) = db.execute("SELECT count(*) FROM pragma_table_info('proxy_subscription') WHERE name = 'source'").fetchone()
            origin = "p.source" if new else "'' AS source"  # a file that no start has moved forward yet
            source = f"SELECT v.*, {origin} FROM mqtt_sub v JOIN proxy_subscription p ON p.id = v.id"
            found = db.execute(f"SELECT * FROM ({source}) {where} ORDER BY clientid, topic", values).fetchall()
    except (sqlite3.Error, StoreError) as error:
        raise Failure(explain(path, error) if isinstance(error, sqlite3.Error) else str(error)) from None
    return [dict(row) for row in found]


def _ask(config_file: Path | None, data: Path | None, request: dict[str, Any]) -> dict[str, Any]:
    from .control import NotRunning, ask
    from .made import fault, fault_of_new

    if why := (fault_of_new if request["action"] == "add" else fault)(
        request["client"], request["filter"], request.get("qos", 0)
    ):
        raise Failure(why, 2)
    try:
        return ask(load_config(config_file, data).data / "control.sock", {"command": "sub", **request})
    except NotRunning as error:
        raise Failure(str(error)) from None
