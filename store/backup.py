"""A copy of `log.db` while it is written, and a copy put in its place.

The running gateway copies a few pages at a time on the one connection that writes the log (`copy`): between two steps it
commits as always, and SQLite carries what a commit changes into the copy too. So the copy never has to begin again, holds no
transaction open, and is the log as of its last step. It gets its name only when it is whole, checked and synced.

A restored log is marked as stopped uncleanly, whatever it was when copied, so that the next start begins a new epoch: what
was named after the copy was made must never be mistaken for what is named after it is restored.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from .exchange import exchange, make_part, part_of, remove_part, sync, verify
from .schema import (
    LOG,
    LOG_NAME,
    TAILS,
    StoreError,
    close_unmoved,
    explain,
    is_ours,
    refuse_lost,
    sync_directory,
    uri_path,
)

STEP_PAGES = 64
"""Pages (4 KiB) that one step copies: what a commit waits for at most."""
PATIENCE = 4
"""So many times its size may be copied before a backup gives up: a disk that fails makes SQLite begin again each time."""

Between = Callable[[int, int], None]
"""Called after each step with the pages that are copied and those there are; an exception gives up."""


def backup_to(source: sqlite3.Connection, file: Path, between: Between) -> None:
    """Copy what `source` holds to the part of `file`; it has no name yet. Raises StoreError."""
    with _words(file):
        log = _place_of(source)
        check_target(file, log)
        part = make_part(file)
        try:
            _copy(source, part, between)
        except sqlite3.DatabaseError as error:
            remove_part(file)
            if error.sqlite_errorname.startswith("SQLITE_CORRUPT"):
                raise StoreError(_damaged(log)) from error
            raise
        except BaseException:
            remove_part(file)
            raise


def finish(file: Path, log: Path) -> int:
    """Check the part, sync it and give it its name; returns its bytes. Raises StoreError."""
    with _words(file):
        try:
            part = part_of(file)
            _verify_copy(part, log)
            sync(part)
            size = part.stat().st_size
            os.replace(part, file)
        except BaseException:
            remove_part(file)
            raise
        sync_directory(file.parent)
        return size


def _verify_copy(part: Path, log: Path) -> None:
    """What the copy lacks the log lacks: SQLite copies damaged pages too."""
    try:
        verify(part)
    except StoreError as error:
        if "is damaged" not in str(error):
            raise
        raise StoreError(_damaged(log)) from error


def _damaged(log: Path) -> str:
    salvage = f"stop the gateway; `tidegate salvage --data {log.parent}` saves what can be read"
    return f"{log} is damaged (or the disk that its copy went to): {salvage}"


def check_target(file: Path, log: Path) -> None:
    """Only an earlier backup may be written over, and never the gateway's own files. Raises StoreError, OSError."""
    if not file.parent.is_dir():
        raise StoreError(f"there is no directory {file.parent}: make it first")
    if file.parent.samefile(log.parent) and file.name.startswith((LOG_NAME, "uplink.db", "broker.lock", "uplink.lock")):
        raise StoreError(f"{file} belongs to the running log: choose another name")
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(f"file:{uri_path(file)}?mode=ro&immutable=1", uri=True)) as found:
            ours = is_ours(found, file, LOG)
    except (sqlite3.Error, StoreError):
        ours = False
    if not ours:
        raise StoreError(f"{file} is there already and is not a backup of a log: choose another name")


def backup_stopped(path: Path, file: Path, between: Between) -> int:
    """Back up a log that nobody writes; the lock of its directory is held. Returns the bytes. Raises StoreError."""
    refuse_lost(path)
    if not path.exists():
        raise StoreError(f"there is no log in {path.parent}: name its directory with --data DIR")
    try:
        source = sqlite3.connect(path, isolation_level=None)
        try:
            if not is_ours(source, path, LOG):
                raise StoreError(f"{path} is empty, not a log of tidegate")
            backup_to(source, file, between)
        finally:
            close_unmoved(source, path)
    except sqlite3.Error as error:
        raise StoreError(explain(path, error)) from error
    return finish(file, path)


def restore(file: Path, path: Path) -> Path | None:
    """Put the backup in the place of the log `path`, whose directory's lock is held; where the old log went, if any.

    Raises StoreError; then the old log is where it was.
    """
    with _words(path, file):
        _check_source(file, path)
        part = make_part(path)
        try:
            shutil.copyfile(file, part)
            verify(part)
            _mark_unclean(part)
            sync(part)
        except StoreError as error:
            remove_part(path)
            raise StoreError(_no_backup(file, str(error).removeprefix(str(part)))) from None
        except BaseException:
            remove_part(path)
            raise
        return exchange(path, "before-restore")


def _check_source(file: Path, path: Path) -> None:
    if not file.is_file():
        raise StoreError(f"there is no file {file}")
    if path.exists() and file.samefile(path):
        raise StoreError(f"{file} is the present log itself: name a backup")
    beside = [f"{file}{tail}" for tail in TAILS[1:] if Path(f"{file}{tail}").exists() and os.path.getsize(f"{file}{tail}")]
    if beside:
        raise StoreError(f"{file} is not a backup but a log in use or copied with it ({beside[0]} stands beside it)")


def _no_backup(file: Path, fault: str) -> str:
    """Of what is wrong with the copy the fact, without the advice for a log that a gateway runs on."""
    if "newer tidegate" in fault:
        return f"{file}{fault}"
    fact, advice = fault.partition(": ")[0], "name a file that `tidegate backup` made; nothing was changed"
    return f"{file}{fact}, so it cannot be put back: {advice}"


def _mark_unclean(part: Path) -> None:
    with closing(sqlite3.connect(part, isolation_level=None)) as copied:
        copied.execute("PRAGMA journal_mode = DELETE")
        copied.execute("UPDATE run SET clean = 0 WHERE id = (SELECT max(id) FROM run)")


def _copy(source: sqlite3.Connection, part: Path, between: Between) -> None:
    copied = 0

    def step(_: int, remaining: int, total: int) -> None:
        nonlocal copied
        copied += STEP_PAGES
        if copied > PATIENCE * (total + STEP_PAGES):
            raise StoreError("the log could not be copied: it had to begin again and again; is its disk well?")
        between(total - remaining, total)

    with closing(sqlite3.connect(part, isolation_level=None)) as target:
        target.execute("PRAGMA journal_mode = OFF")
        target.execute("PRAGMA synchronous = OFF")  # nobody may trust the file before `finish` has synced it
        source.backup(target, pages=STEP_PAGES, progress=step, sleep=0.05)


def _place_of(connection: sqlite3.Connection) -> Path:
    return Path(connection.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()[0])


@contextmanager
def _words(file: Path, source: Path | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = str(error.filename2 or error.filename or file)
        verb = "read" if name == str(source) else "write"
        raise StoreError(f"cannot {verb} {name}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise StoreError(f"cannot write {part_of(file)}: {error}") from error
