"""The commands that copy, put back and mend the log: `backup`, `restore`, `salvage`.

`backup` asks the running gateway to make the copy; where none runs it makes it itself. The other two exchange the log, and
hold the lock of the data directory so that no gateway runs meanwhile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .cli_parts import CONFIG, DATA, Failure, load_config

FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
ASK_EVERY = 0.2


@click.command()
@CONFIG
@DATA
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@FILE
def backup(config_file: Path | None, data: Path | None, quiet: bool, file: Path) -> None:
    """Copy the log to FILE, checked and whole; the gateway may be running."""
    from tidegate.store.backup import backup_stopped

    place = load_config(config_file, data).data
    show = _Progress(quiet)
    file = Path(os.path.abspath(file))
    size = _backup_running(place, file, show)
    if size is None:
        if not (place / "log.db").is_file() and not (place / "log.db-wal").exists():
            raise Failure(f"there is no log in {place}: name its directory with --data DIR")
        with _locked(place):
            size = backup_stopped(place / "log.db", file, show)
    show.end()
    click.echo(f"{file}: {size / 1e6:.1f} MB, checked")


@click.command()
@CONFIG
@DATA
@FILE
def restore(config_file: Path | None, data: Path | None, file: Path) -> None:
    """Put the backup FILE in the place of the log; the gateway must not be running."""
    from tidegate.store.backup import restore as put_back

    place = load_config(config_file, data).data
    with _locked(place):
        aside = put_back(file, place / "log.db")
    click.echo(f"{place / 'log.db'} is now what {file} holds")
    if aside is not None:
        click.echo(f"the log that was there is kept as {aside}: delete it when you are sure")
    click.echo(
        "The next start begins a new epoch: new messages are never taken for those that came after the backup was made.\n"
        "What far ends have had of the backup is not sent to them twice; what they have and it lacks stays with them.\n"
        "Sessions stand where they stood when it was made: subscribers may get again what they had already."
    )


@click.command()
@CONFIG
@DATA
def salvage(config_file: Path | None, data: Path | None) -> None:
    """Move a damaged log aside and save every row of it that can be read; the gateway must not be running."""
    from tidegate.store.salvage import salvage as save

    place = load_config(config_file, data).data
    if not place.is_dir():
        raise Failure(f"there is no log in {place}: name its directory with --data DIR")
    with _locked(place):
        report = save(place / "log.db", time.time_ns() // 1_000_000, _Progress(False).rows)
    for line in report:
        click.echo(line)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the data directory. Every fault of the store inside is a sentence."""
    from tidegate.store.lock import hold
    from tidegate.store.schema import StoreError

    try:
        lock = hold(place)
        try:
            yield
        finally:
            os.close(lock)
    except StoreError as error:
        raise Failure(str(error)) from None


def _backup_running(place: Path, file: Path, show: _Progress) -> int | None:
    """Have the gateway on `place` make it: the bytes, or None where no gateway runs."""
    from tidegate.store.lock import is_held

    from .control import NotRunning, ask

    def question(**more: str) -> dict[str, Any]:
        return ask(place / "control.sock", {"command": "backup", **more})

    try:
        question()
    except NotRunning as error:
        if not is_held(place):
            return None
        if not os.access(place / "broker.lock", os.R_OK):
            raise Failure(f"{place / 'broker.lock'} cannot be read: run this as the user of the gateway") from None
        raise Failure(str(error)) from None
    try:
        answer = question(file=str(file))
        while answer["state"] in ("copying", "checking"):
            show(int(answer.get("copied", 0)), int(answer.get("total", 0)))
            time.sleep(ASK_EVERY)
            answer = question()
    except NotRunning as error:
        raise Failure(str(error)) from None
    if answer["state"] != "done":
        reason = str(answer.get("reason", answer))
        refused = any(words in reason for words in ("Permission denied", "Read-only file system", "there is no directory"))
        hint = f"; the gateway's own user writes it, not you: name a file below {place}" if refused else ""
        raise Failure(f"no backup was made: {reason}{hint}")
    if not file.exists():
        raise Failure(f"the gateway wrote {file} where only its service sees it: name a file below {place}")
    return int(answer["bytes"])


class _Progress:
    """A line on a terminal that is written over; nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._on = not quiet and sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        self._say(f"{100 * done // max(1, total)} % of {total * 4096 / 1e6:.0f} MB")

    def rows(self, table: str, rows: int) -> None:
        self._say(f"{table}: {rows} rows")

    def end(self) -> None:
        if self._on:
            self._say("")

    def _say(self, text: str) -> None:
        if self._on:
            click.echo(f"\r{text:60}\r", nl=False, err=True)
