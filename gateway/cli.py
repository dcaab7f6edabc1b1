"""The command `tidegate`: what a person types. Parses, asks or starts, prints one clear answer, and ends with an exit code.

Exit codes: 0 all is well; 1 it could not be done (the text says why and what to do); 2 the command line or the configuration is
wrong. Nothing heavy is imported before a command needs it, and a user's mistake never ends in a traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click

from . import __version__, cli_dead, cli_doctor, cli_rules, cli_store, cli_sub, cli_uplink
from .cli_parts import CONFIG, DATA, SINCE
from .cli_parts import Failure as _Failure
from .cli_parts import load_config as _load
from .config import Config, ConfigError, load
from .config_places import default_conf, find_config


class _Commands(click.Group):
    """The commands; what cannot be printed ends them in one sentence, or in none when nobody reads any more (`| head`)."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().main(*arguments, **options)
        except OSError as error:
            if not _output_failed():
                raise
            with contextlib.suppress(OSError):
                click.echo(f"tidegate: cannot write the output: {error.strerror}", err=True)
            # What is still buffered would be tried once more when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)


def _output_failed() -> bool:
    """Whether it was the output; if not, a traceback follows, which an empty line does not hurt."""
    try:
        os.write(1, b"\n")
    except OSError:
        return True
    return False


VIEWS = ("mqtt_client", "mqtt_sub", "mqtt_msg", "mqtt_retain", "mqtt_acked")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="tidegate %(version)s")
def main() -> None:
    """Tidegate: an MQTT gateway that stores before it says "received" and syncs when the link returns."""


@main.command()
@CONFIG
@DATA
@click.option("--listen", "-l", multiple=True, metavar="HOST:PORT", help="Listen here instead (may be repeated).")
def run(config_file: Path | None, data: Path | None, listen: tuple[str, ...]) -> None:
    """Run the gateway in the foreground; logs go to stderr."""

    def read() -> Config:
        return load(config_file or find_config(os.environ), data, listen)

    try:
        config = read()
    except ConfigError as error:
        _cannot_start(error.beside.log_format, error, 2)
    from tidegate.store.schema import StoreError

    from . import app
    from .access import PasswordFileError

    try:
        code = app.run(config, read)
    except PasswordFileError as error:
        _cannot_start(config.log_format, error, 2)
    except (app.StartError, StoreError) as error:
        _cannot_start(config.log_format, error, 1)
    sys.exit(code)


def _cannot_start(log_format: str, error: Exception, code: int) -> NoReturn:
    """The last words, for whoever reads the log: a program gets them as it gets the others."""
    if log_format != "json":
        raise _Failure(str(error), code) from None
    from tidegate.store.report import ERROR, Report

    report = Report(log_format)
    for line in str(error).splitlines():
        report("cannot_start", line, ERROR, line)
    report.close()
    sys.exit(code)


@main.command()
@CONFIG
@DATA
def check(config_file: Path | None, data: Path | None) -> None:
    """Check the configuration, the password file and every backend's rules; start nothing."""
    from tidegate.uplink.rule import load_all

    from .access import PasswordFileError, read_passwords
    from .doctor_rights import unreadable

    mistakes: list[str] = []
    warnings: list[str] = []
    try:
        config = load(config_file or find_config(os.environ), data)
    except ConfigError as error:
        mistakes += map(str, error.mistakes)
        beside = error.beside
    else:
        warnings += config.warnings
        beside = config.beside
    if beside.password_file is not None:
        try:
            read_passwords(beside.password_file)
        except PasswordFileError as error:
            mistakes += str(error).splitlines()
    for file in load_all(beside.conf_dir, beside.backends):
        mistakes += map(str, file.mistakes)
        warnings += map(str, file.warnings)
    mistakes += [f"{found.text}; {found.advice}" for found in unreadable(beside)]
    read = f"{beside.file}" if beside.file else f"none at {default_conf(os.environ) / 'gateway.toml'}: the defaults"
    click.echo(f"configuration: {read}", err=bool(mistakes))
    for text in warnings:
        click.echo(f"warning: {text}", err=True)
    for text in mistakes:
        click.echo(f"mistake: {text}", err=True)
    if mistakes:
        click.echo(_count(mistakes, "mistake"), err=True)
        sys.exit(2)
    click.echo(f"no mistakes, {_count(warnings, 'warning')}" if warnings else "all is well")


@main.command()
@CONFIG
@DATA
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of JSON lines.")
@click.option("--since", type=click.DateTime(SINCE), help="Only from this time on (UTC).")
@click.option("--sql", metavar="SELECT", help="Print what this SELECT answers instead of a view.")
@click.argument("view", required=False, type=click.Choice(VIEWS))
def export(
    config_file: Path | None, data: Path | None, as_csv: bool, since: datetime | None, sql: str | None, view: str | None
) -> None:
    """Print the log's rows, a JSON object or a CSV line each; the gateway may be running."""
    if (view is None) == (sql is None):
        raise _Failure(f"name a view ({', '.join(VIEWS)}), or give --sql SELECT", 2)
    if since is not None and view is None:
        raise _Failure("--since goes with a view; a SELECT of your own says it itself", 2)
    path = _load(config_file, data, ()).data / "log.db"
    from tidegate.store.export import export_select, export_view
    from tidegate.store.schema import StoreError

    try:
        if view is not None:
            export_view(path, view, f"{since:%Y-%m-%d %H:%M:%S}" if since else "", as_csv, sys.stdout)
        else:
            export_select(path, sql or "", as_csv, sys.stdout)
        sys.stdout.flush()
    except StoreError as error:
        raise _Failure(str(error)) from None


@main.command()
@click.option("-c", "create", is_flag=True, help="Make the file (refused where one holds other users).")
@click.option("-D", "delete", is_flag=True, help="Take the user out.")
@click.option("-b", "batch", is_flag=True, help="Take the password from the command line (others can see it there).")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("user")
@click.argument("password", required=False)
def passwd(create: bool, delete: bool, batch: bool, file: Path, user: str, password: str | None) -> None:
    """Set a user's password in FILE, in mosquitto's format; -c makes the file."""
    from .access import password_line, set_user, user_fault

    if fault := user_fault(user):
        raise _Failure(f"user {user!r}: {fault}", 2)
    if batch != (password is not None):
        raise _Failure("a password on the command line goes with -b, and -b with a password", 2)
    if (create or batch) and delete:
        raise _Failure("-D goes alone", 2)
    if not delete and password is None:
        password = _ask_password()
    if not delete and not password:
        raise _Failure("an empty password is none: give one", 2)
    try:
        line = None if delete else password_line(user, (password or "").encode())
        was_there = set_user(file, user, line, create)
    except OSError as error:
        hint = "; make it with -c" if error.filename is not None and isinstance(error, FileNotFoundError) else ""
        raise _Failure(f"{file}: {error.strerror}{hint}") from None
    if delete and not was_there:
        raise _Failure(f"{file}: there is no user {user!r}")
    click.echo(f"{file}: {'removed' if delete else 'set'} {user}; a running gateway reads it again on SIGHUP", err=True)


def _ask_password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    answer: str = click.prompt("Password", hide_input=True, confirmation_prompt="Again")
    return answer


@main.group()
def service() -> None:
    """Run the gateway as a systemd service."""


@service.command()
@click.option("--print", "only_print", is_flag=True, help="Show the unit file and change nothing.")
def install(only_print: bool) -> None:
    """Write the systemd unit, the user `tidegate` and /etc/tidegate."""
    from .service import ServiceError, install_service, this_command, unit_file

    if only_print:
        click.echo(unit_file(this_command()), nl=False)
        return
    try:
        for step in install_service():
            click.echo(step)
    except ServiceError as error:
        raise _Failure(str(error)) from None


@main.command()
@click.option("--seconds", type=float, help="End after this long instead of staying up.")
@click.option("--port", type=click.IntRange(0, 65_535), default=1883, show_default=True, help="Where devices connect.")
@DATA
def demo(seconds: float | None, port: int, data: Path | None) -> None:
    """Show the main job: devices publish, the far end is cut off and comes back, nothing is missing."""
    from .demo import run_demo

    sys.exit(run_demo(seconds, data, port))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"tidegate {__version__}")


def _count(things: list[str], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) > 1 else ''}"


for command in (
    *(cli_doctor.status, cli_doctor.doctor, cli_store.backup, cli_store.restore, cli_store.salvage, cli_dead.dead),
    *(cli_rules.rules, cli_sub.sub, cli_uplink.uplink),
):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name="tidegate")
