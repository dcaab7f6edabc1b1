"""The commands `tidegate uplink`: what a person does at a far end by way of the gateway's own settings.

Invariant: nothing is created at a far end before it was shown, and agreed to (`--yes` agrees beforehand).
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
@click.option("--yes", is_flag=True, help="Create without asking.")
@click.argument("pool_name", metavar="BACKEND.POOL")
def init(config_file: Path | None, data: Path | None, yes: bool, pool_name: str) -> None:
    """Show which tables a database lacks (mysql.pool1, pgsql.pool1), ask, and create them."""
    from tidegate.uplink import sql_schema
    from tidegate.uplink.errors import Misconfigured, NotConnected, Rejected

    pool = _pool(config_file, data, pool_name)
    backend = importlib.import_module(f"tidegate.uplink.to_{pool.backend}")
    try:
        session = backend.schema_session(pool)
        try:
            steps = sql_schema.missing(pool.backend, session.existing())
            if not steps:
                click.echo(f"{pool_name} lacks nothing")
                return
            for step in steps:
                click.echo(f"{step.statement};\n")
            if not yes and not click.confirm(f"Create {', '.join(step.name for step in steps)} in {pool_name}?"):
                raise Failure("nothing was created")
            for step in steps:
                session.run(step.statement)
                click.echo(f"created {step.name}")
        finally:
            session.close()
    except Misconfigured as error:
        raise Failure(f"{error}; {error.hint}") from None
    except (NotConnected, Rejected) as error:
        raise Failure(str(error)) from None


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
