"""The writing side of `log.db`: the one connection that writes and checkpoints it.

`Store.open` finds out who we are (gateway id bound to this machine, epoch, run), `apply` commits a batch with a few big
statements, because every statement step gives the interpreter lock away and has to win it back. `rest` and the WAL bound
decide when to checkpoint. All methods but `open` run in the committer's thread.

A commit whose fsync failed is written again and not only synced again: the kernel may have let go of the pages. SQLite does
so when the batch is applied again, because what it did not confirm it overwrites; what a dead run left unconfirmed in the WAL
is moved into the database when the file is opened. For a checkpoint whose fsync failed we see to it (`_move_all_again`).
ext4 takes blocks whose first write failed for written, confirms what is written there again, and shows zeros after the next
mount. So after a refusal the WAL is moved and cut, which gives such blocks back; and of the database the kernel lets go of what
it has in memory before it is written again (`_forget_cached`), which makes it ask where the blocks are.

Invariant: `apply` either commits the whole batch and numbers its names, or changes nothing and raises.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import uuid
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from .clock import Clock, Judge, begin, believe, last_known, this_boot
from .entry import DISCONNECTED
from .exchange import refuse_emptied, refuse_half, remove_part
from .insert import LARGEST, insert
from .log import NAME_BYTES, Batch, Name
from .msgid import gateway_code
from .names import collect
from .schema import LOG, STRANGE, StoreError, close_unmoved, disk_fault, explain, know_topics, open_writer
from .unstorable import find, is_refusal

WAL_LIMIT = 8 << 20
WAL_COMMIT = 12_288
"""Bytes that even a small commit adds to the WAL: about three pages."""
PAGE = 4096
"""Also what a name that comes or goes adds to the WAL: each stands on a page of its own in the index of names."""
MOVED_FRAMES = 96
"""Where the wal-index counts the frames that checkpoints have moved."""
EPOCH_STEP = 100_000
SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL", "memory": "NORMAL"}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who writes, and by which clock: `(gateway, epoch, seq)` is a message's name outside."""

    gateway: str
    node: str
    """The name written to the databases, a label."""
    epoch: int
    run: int
    next_seq: int
    last_at: int
    clean: bool
    clock: Clock


class Store:
    """See the module; `commits`, `checkpoint_busy` and `checkpoint_fault` (why the last one failed) are for `status`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        self.commits = 0
        self.checkpoint_busy = 0
        self.checkpoint_fault = ""
        self._db = connection
        self._unmoved = 0
        self._dirty = False
        self._budget = 1 << 62
        self._wal_limit = WAL_LIMIT
        self._over = False
        self._moved_in_vain = False
        self._index = self._file = -1
        self.gone = ""
        """What is wrong when the file has lost its name: it is gone with the process."""
        self._inode = _inode(path)
        self._refused = False
        """Whether a commit failed since the WAL was cut: its file may have blocks that will not keep what they confirm."""

    def bound(self, budget: int) -> None:
        """What database and WAL may take together: the WAL gets its part, and a reader that holds it cannot break it."""
        self._budget = budget
        self._wal_limit = min(WAL_LIMIT, budget // 4)
        self._db.execute(f"PRAGMA journal_size_limit = {2 * self._wal_limit}").fetchone()

    @classmethod
    def open(
        cls, path: Path, node: str, durability: str, wall: int, mono: int, judge: Judge = believe, boot: str = ""
    ) -> Store:
        """Open or make the file and begin a run. Raises StoreError.

        `node` empty: the host's name and four characters of our id. `wall` and `mono` in ms; `judge` says how far `wall` is
        to be believed. `boot` empty: this machine's.
        """
        refuse_half(path)
        refuse_emptied(path)
        remove_part(path)
        connection = open_writer(path, LOG, SYNCHRONOUS[durability])
        know_topics(connection)
        try:
            identity = _begin_run(connection, node, wall, mono, judge, boot or this_boot())
            if not identity.clean:
                # Recovery reads the WAL through the kernel's cache, which may hold frames that no fsync brought to the disk.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return cls(path, connection, identity)
        except (sqlite3.Error, *STRANGE) as error:
            close_unmoved(connection, path)
            raise StoreError(explain(path, error)) from error

    @property
    def connection(self) -> sqlite3.Connection:
        """The writing connection, for the committer thread's other jobs (trim, backup)."""
        return self._db

    def apply(self, batch: Batch) -> None:
        """Commit the batch. Raises sqlite3.Error (the disk refuses) or Unstorable, and then nothing of it is there."""
        if self.gone:
            raise sqlite3.OperationalError(self.gone)
        if self._over:
            self._relieve()
        try:
            self._commit(batch)
        except Exception as error:
            found = find(self._db, batch, self._write) if is_refusal(error) else None
            if found is not None:
                raise found from error
            self._refused = True
            raise
        self.commits += 1
        self._dirty = True
        if self._refused:
            done = self._checkpoint("TRUNCATE")
            self._refused = done is None or bool(done[0])
        self._bound_wal(batch)

    def _commit(self, batch: Batch) -> None:
        statement = None
        if not (batch.changes or batch.unused) and 0 < len(batch.rows) <= LARGEST:
            with suppress(KeyError):
                statement = insert(batch.rows, {})
        if statement is not None:
            # One statement is its own transaction: the interpreter lock is won back once instead of thrice.
            self._db.execute(*statement)
        else:
            numbers = self._apply_in_transaction(batch)
            for name, number in numbers.items():
                name.id = number
            clients = [name.text.encode() for name in numbers if name.table == "client"]
            batch.size += NAME_BYTES * len(clients) + 2 * sum(map(len, clients))  # in its table and in the index
            self._unmoved += PAGE * (len(numbers) + sum(len(found.topics) + len(found.clients) for found in batch.unused))

    def _apply_in_transaction(self, batch: Batch) -> dict[Name, int]:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            numbers = self._write(batch)
            collect(db, batch.unused, numbers)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return numbers

    def _write(self, batch: Batch) -> dict[Name, int]:
        """Rows and changes, within a transaction; the numbers of the names that are new."""
        numbers = self._number(batch)
        for start in range(0, len(batch.rows), LARGEST):
            self._db.execute(*insert(batch.rows[start : start + LARGEST], numbers))
        for sql, group in groupby(batch.changes, key=itemgetter(0)):
            self._db.executemany(sql, [_values(parameters, numbers) for _, parameters in group])
        return numbers

    def rest(self) -> None:
        """Called when nothing was committed for a while: move the WAL into the database."""
        if self._dirty:
            self._dirty = self._checkpoint("PASSIVE") is None

    def look(self) -> None:
        """Called each second: whether the file still has its name. What goes to a deleted one is not acknowledged."""
        there = _inode(self.path)
        how = "was deleted" if there is None else "was replaced by another file"
        text = f"{self.path} {how} while the gateway runs: stop it, and put the file back or restore a backup"
        self.gone = "" if there == self._inode else text

    def close(self, wall: int) -> None:
        """End the run cleanly: the next start knows that nobody was left online and nothing sent twice."""
        self._db.execute("UPDATE run SET clean = 1, alive_at = ? WHERE id = ?", (wall, self.identity.run))
        top = "SELECT max(value, ifnull((SELECT max(seq) FROM entry), 0)) FROM meta WHERE key = 'seq'"
        self._db.execute(f"UPDATE meta SET value = ({top}) WHERE key = 'seq'")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._db.close()

    def abandon(self) -> None:
        """Close without a word: the next start takes it for a crash."""
        self._db.close()

    def file_bytes(self) -> int:
        """Bytes of the database and its WAL on disk."""
        return file_bytes(self.path)

    def _number(self, batch: Batch) -> dict[Name, int]:
        """The numbers of names that have none yet."""
        used = chain(chain.from_iterable(row[5:7] for row in batch.rows), chain.from_iterable(p for _, p in batch.changes))
        numbers: dict[Name, int] = {}
        for name in dict.fromkeys(value for value in used if isinstance(value, Name) and not value.id):
            column = "name" if name.table == "topic" else "clientid"
            found = self._db.execute(f"SELECT id FROM {name.table} WHERE {column} = ?", (name.text,)).fetchone()
            if found is None:
                found = self._db.execute(
                    f"INSERT INTO {name.table} ({column}) VALUES (?) RETURNING id", (name.text,)
                ).fetchone()
            numbers[name] = found[0]
        return numbers

    def _bound_wal(self, batch: Batch) -> None:
        """Checkpoint every few MiB; a WAL that is wholly in the database is begun anew by the next commit.

        Its file is not cut: overwriting costs less than growing. Readers may hold a checkpoint back; above the limit
        RESTART is tried, and again later, but never waited for.
        """
        self._unmoved += batch.size - 150 * len(batch.rows) + WAL_COMMIT
        if self._unmoved < self._wal_limit // 2:
            return
        self._unmoved = 0
        done = self._checkpoint("PASSIVE")
        if done is not None and done[1] * PAGE > self._wal_limit:
            done = self._checkpoint("RESTART")
            self.checkpoint_busy += done is not None and done[0]
            self._over = self.file_bytes() > self._budget

    def _relieve(self) -> None:
        """Somebody's long read has let the WAL grow until the budget is used up: nothing more until it can be cut."""
        done = self._checkpoint("TRUNCATE")
        if done is None or done[0]:
            raise sqlite3.OperationalError("disk_budget is used up: a long read of log.db keeps its WAL from being cut")
        self._over = False

    def _checkpoint(self, mode: str) -> tuple[int, int, int] | None:
        """(busy, frames, moved); None if the disk refuses. The batch stands: told as failed, it would be written twice."""
        try:
            if self._moved_in_vain:
                self._move_all_again()
            done: tuple[int, int, int] = self._db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        except (sqlite3.Error, OSError) as error:
            self._moved_in_vain = True
            self.checkpoint_fault = f"the write-ahead log cannot be moved into {self.path.name}: {disk_fault(error)}"
            return None
        self.checkpoint_fault = ""
        return done

    def _move_all_again(self) -> None:
        """Have the next checkpoint begin at the start of the WAL. Raises OSError, and then nothing is moved.

        A checkpoint that a reader holds back moves pages without a flush; the flush of the one that completes it is for them
        too. If that fails the kernel may have let go of any of them, and SQLite would not move the earlier ones again. How many
        frames were moved stands in the wal-index (SQLite's "WAL-mode File Format", 2.2.1), which only we, who checkpoint,
        change; a smaller number is true as well while the WAL has not begun anew, and it does not before all is moved.
        The file stays open: with it would go the locks that SQLite holds there.
        """
        if self._index < 0:
            self._index = os.open(f"{self.path}-shm", os.O_RDWR | os.O_CLOEXEC)
        os.pwrite(self._index, bytes(4), MOVED_FRAMES)
        if self._file < 0:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        _forget_cached(self._file)  # all that is in doubt is in the WAL, where every reader finds it
        self._moved_in_vain = False


def _forget_cached(number: int) -> None:
    """Drop the kernel's pages of the file that need not be written: the next write asks the file system for its place."""
    with suppress(OSError):
        os.fdatasync(number)
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def _values(parameters: tuple[Any, ...], numbers: dict[Name, int]) -> tuple[Any, ...]:
    return tuple([(v.id or numbers[v]) if isinstance(v, Name) else v for v in parameters])


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_dev, about.st_ino


def file_bytes(path: Path) -> int:
    """Bytes of a database and its WAL on disk."""
    return sum(_size(Path(f"{path}{tail}")) for tail in ("", "-wal"))


def free_bytes(directory: Path) -> int:
    """Bytes that are free on its file system, for whoever is not root."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _begin_run(db: sqlite3.Connection, node: str, wall: int, mono: int, judge: Judge, boot: str) -> Identity:
    """Write the row of this run: the gateway's id (a copied card gets a new one) and its own epoch."""
    db.execute("BEGIN IMMEDIATE")
    meta: dict[str, str] = dict(db.execute("SELECT key, value FROM meta").fetchall())
    machine = this_machine()
    gateway = meta.get("gateway", "")
    if not gateway or meta.get("machine", machine) != machine:
        gateway = uuid.uuid4().hex[:16]
    node = node or f"{os.uname().nodename}-{gateway[:4]}"
    clock = begin(db, boot, wall, mono, judge)
    last = db.execute("SELECT gateway, epoch, clean, alive_at, boot FROM run ORDER BY id DESC LIMIT 1").fetchone()
    clean = last is None or bool(last[2])
    (top,) = db.execute("SELECT max(seq) FROM entry").fetchone()
    (at,) = db.execute("SELECT at FROM entry WHERE seq = ?", (top,)).fetchone() if top else (0,)
    at = max(at, int(meta.get("at", 0)))
    next_seq = max(top or 0, int(meta.get("seq", 0))) + 1
    # After a clean stop too: an image of the card that was made then may be laid back after the far end has gone on.
    epoch = 1 if last is None else next_epoch(last[1], mono + clock.offset, mono, boot)
    # Later than all before: of an epoch an id holds only the last digits, which do not order it.
    after = max(at, last[3]) + 1 if last is not None else 0
    alive = last_known(db) - clock.offset if last is not None and last[4] == clock.boot else 0
    (run,) = db.execute(
        "INSERT INTO run (gateway, code, epoch, node, boot, clock_offset, clock, first_seq, started_at, alive_at)"
        " VALUES (?,?,?,?,?,?,?,?,?,?) RETURNING id",
        (
            *(gateway, gateway_code(gateway), epoch, node, clock.boot, clock.offset, clock.level),
            *(next_seq, mono + clock.offset, mono + clock.offset),
        ),
    ).fetchone()
    if not clean:
        next_seq = _log_ghosts(db, run, next_seq, after, alive, clock)
    for key, value in (("gateway", gateway), ("machine", machine), ("seq", next_seq - 1)):
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
    db.execute("COMMIT")
    return Identity(gateway, node, epoch, run, next_seq, after, clean, clock)


def next_epoch(last: int, wall: int, mono: int, boot: str) -> int:
    """The epoch of a life that begins at `wall` (ms), after those through `last` that its log knows of.

    An older log that was laid back does not know all: what its lost lives wrote must be older than what it writes now, at the
    far end too. So an epoch is the time of its beginning. Where the clock is behind, it is 1 to EPOCH_STEP above the last,
    another step at each start, so that two lives which begin with the same log do not share one.
    """
    digest = hashlib.sha256(f"{boot} {wall} {mono}".encode()).digest()
    return max(wall, last + 1 + int.from_bytes(digest[:4], "big") % EPOCH_STEP)


def _log_ghosts(db: sqlite3.Connection, run: int, seq: int, at: int, mono: int, clock: Clock) -> int:
    """After an unclean stop whoever was online is logged as gone, at the time we were last known to live.

    `mono` 0: that was before the machine started, so `at` alone tells when, whatever becomes known of this boot's clock.
    """
    when = mono + clock.offset if mono else at
    for (client,) in db.execute("SELECT id FROM client WHERE state = 1 ORDER BY id").fetchall():
        db.execute("INSERT INTO entry VALUES (?,?,?,?,?,?,NULL,0,NULL,NULL)", (seq, at, mono, run, DISCONNECTED, client))
        seq += 1
    db.execute("UPDATE client SET state = 0, offline_at = ? WHERE state = 1", (when,))
    return seq


def this_machine() -> str:
    """What tells this machine from another one with a copy of its card."""
    for source in (
        "/sys/firmware/devicetree/base/serial-number",
        "/sys/class/dmi/id/product_uuid",
        "/sys/class/net/eth0/address",
        "/etc/machine-id",
    ):
        try:
            text = Path(source).read_text(errors="replace").strip("\0 \n")
        except OSError:
            continue
        if text:
            return f"{os.path.basename(source)}:{text}"
    return "unknown"
