"""The commands `tidegate uplink`: what a person does at a far end by way of the gateway's own settings.

Invariant: nothing is created or changed at a far end before it was shown, and agreed to (`--yes` agrees beforehand); what
exists is changed only with `--alter`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from .cli_parts import CONFIG, DATA, Failure, load_config


@click.group()
def uplink() -> None:
    """What concerns the far ends."""


@uplink.command()
@CONFIG
@DATA
@click.option("--yes", is_flag=True, help="Create (and with --alter change) without asking.")
@click.option("--alter", is_flag=True, help="Change tables that exist too, where they lack something or are too narrow.")
@click.argument("pool_name", metavar="BACKEND.POOL")
def init(config_file: Path | None, data: Path | None, yes: bool, alter: bool, pool_name: str) -> None:
    """Show which tables a database lacks (mysql.pool1, pgsql.pool1) and what in others should be changed, ask, and do it."""
    from tidegate.uplink.errors import Misconfigured, NotConnected, Rejected

    pool = _pool(config_file, data, pool_name)
    backend = importlib.import_module(f"tidegate.uplink.to_{pool.backend}")
    try:
        session = backend.schema_session(pool)
        try:
            changed = _init(session, pool, yes, alter)
        finally:
            session.close()
        if changed:
            _tell(load_config(config_file, data).data)
    except Misconfigured as error:
        raise Failure(f"{error}; {error.hint}") from None
    except (NotConnected, Rejected) as error:
        raise Failure(str(error)) from None


def _tell(data: Path) -> None:
    """A pool that waits for what was made looks for itself only each minute."""
    from .control import NotRunning, ask

    try:
        restarted = ask(data / "control.sock", {"command": "reconnect"})["restarted"]
    except NotRunning:
        restarted = False
    click.echo("the running gateway tries again now" if restarted else "a running gateway tries again within a minute")


def _init(session: Any, pool: Any, yes: bool, alter: bool) -> bool:
    """Whether anything was created or changed."""
    from tidegate.uplink.sql_alter import alters
    from tidegate.uplink.sql_schema import missing

    steps = missing(pool.backend, session.existing())
    changes = alters(pool.backend, session.columns(), session.indexes())
    if not steps and not changes:
        click.echo(f"{pool.full_name} lacks nothing")
    if steps:
        _do(session, pool, "create", [(step.name, step.statement) for step in steps], yes)
    if changes and alter:
        _do(session, pool, "change", [(change, change) for change in changes], yes)
    elif changes:
        click.echo("What exists is not changed without --alter, which would run:\n")
        for change in changes:
            click.echo(f"{change};")
    return bool(steps or (changes and alter))


def _do(session: Any, pool: Any, verb: str, steps: list[tuple[str, str]], yes: bool) -> None:
    """Show them, ask, and run them one by one. Raises Failure."""
    for _, statement in steps:
        click.echo(f"{statement};\n")
    what = ", ".join(name for name, _ in steps) if verb == "create" else "this"
    if not yes and not click.confirm(f"{verb.capitalize()} {what} in {pool.full_name}?"):
        raise Failure(f"nothing was {verb}d")
    session.take_time()
    for name, statement in steps:
        session.run(statement)
        click.echo(f"{verb}d {name}")


def _pool(config_file: Path | None, data: Path | None, name: str) -> Any:
    """The pool of this name. Raises Failure."""
    from tidegate.uplink.rule import load
    from tidegate.uplink.sql_schema import BACKENDS

    backend, _, pool_name = name.partition(".")
    if backend not in BACKENDS or not pool_name:
        raise Failure(f"{name}: write {' or '.join(f'{known}.pool1' for known in BACKENDS)}; other far ends need no tables", 2)
    path = load_config(config_file, data).conf_dir / f"emqx_backend_{backend}.conf"
    rule_file = load(path, backend)
    if rule_file.mistakes:
        raise Failure("\n".join(map(str, rule_file.mistakes)), 2)
    for pool in rule_file.pools:
        if pool.name == pool_name:
            return pool
    known = ", ".join(pool.full_name for pool in rule_file.pools)
    raise Failure(f"{path}: there is no {name}, but {known}", 2)
