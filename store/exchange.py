"""Another `log.db` in the place of the present one, without a moment in which a start would begin from nothing.

The new file is made as `log.db.part` and renamed `log.db.ready` when it is whole and synced; then the old one is moved aside
under a name with the time, its write-ahead log with it; then the new one takes its name. Nothing is deleted. Cut off in
between, there is a `log.db.ready` and no `log.db`: a start refuses that (`refuse_half`), and the command is run again.

Invariant: what stands under `log.db` is always a whole log with its own write-ahead log.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

from .schema import LOG, TAILS, StoreError, explain, is_ours, sync_directory, uri_path


def part_of(path: Path) -> Path:
    """Where the file that is to become `path` is made."""
    return path.with_name(f"{path.name}.part")


def ready_of(path: Path) -> Path:
    """The file that is about to become `path`."""
    return path.with_name(f"{path.name}.ready")


def make_part(path: Path) -> Path:
    """An empty file for it, in place of one that an earlier try may have left. Raises OSError."""
    part = part_of(path)
    remove_part(path)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640))
    return part


def remove_part(path: Path) -> None:
    """Take away what a try that failed or was killed left; the lock of the directory is held."""
    for tail in (*TAILS, "-journal"):
        with suppress(FileNotFoundError):
            os.unlink(f"{part_of(path)}{tail}")


def verify(path: Path) -> None:
    """A whole log of ours, which nobody writes? Raises StoreError."""
    try:
        with closing(sqlite3.connect(f"file:{uri_path(path)}?mode=ro&immutable=1", uri=True)) as found:
            if not is_ours(found, path, LOG):
                raise StoreError(f"{path} is empty, not a log of tidegate")
            faults = [str(row[0]) for row in found.execute("PRAGMA integrity_check(3)")]
    except sqlite3.Error as error:
        raise StoreError(explain(path, error)) from error
    if faults != ["ok"]:
        raise StoreError(f"{path} is damaged: {'; '.join(faults)}")


def sync(path: Path) -> None:
    """Have the file's content on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(path: Path, why: str) -> Path | None:
    """The part, whole and synced, becomes `path`; where the old file went, None if there was none. Raises OSError.

    `why` goes into the name of the old one. Whoever holds the lock of the directory only.
    """
    own_like(path.parent, part_of(path))
    os.rename(part_of(path), ready_of(path))
    sync_directory(path.parent)
    return finish_exchange(path, why)


def finish_exchange(path: Path, why: str) -> Path | None:
    """The second half of `exchange`, also where the first was cut off."""
    aside = path.with_name(f"{path.name}.{why}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    moved = [tail for tail in TAILS if Path(f"{path}{tail}").exists()]
    if any(Path(f"{aside}{tail}").exists() for tail in TAILS):
        raise FileExistsError(17, "it stands there already; try again in a second", str(aside))
    for tail in moved:
        os.rename(f"{path}{tail}", f"{aside}{tail}")
    sync_directory(path.parent)
    os.rename(ready_of(path), path)
    sync_directory(path.parent)
    return aside if moved else None


def own_like(directory: Path, *files: Path) -> None:
    """Root works for the user of the gateway, whom the directory belongs to."""
    if os.geteuid() == 0:
        owner = directory.stat()
        for file in files:
            os.chown(file, owner.st_uid, owner.st_gid)


def is_half(path: Path) -> bool:
    """Whether an exchange was cut off after the old file was moved."""
    return ready_of(path).exists() and not path.exists()


def refuse_half(path: Path) -> None:
    """Not a fresh start where an exchange was cut off. Raises StoreError."""
    if is_half(path):
        raise StoreError(
            f"a `tidegate restore` or `tidegate salvage` was cut off before {path} was back in its place: run it again; nothing"
            f" was changed"
        )


def refuse_emptied(path: Path) -> None:
    """Not a fresh start where a log has been: a file system that lost a file's content leaves 0 bytes. Raises StoreError."""
    uplink = path.with_name("uplink.db")
    if path.exists() and not path.stat().st_size and uplink.exists() and uplink.stat().st_size:
        raise StoreError(
            f"{path} has 0 bytes, but {uplink.name} beside it says that there was a log: its content was lost."
            f" `tidegate restore` a backup, or move {path} aside to begin a new log; nothing was changed"
        )
