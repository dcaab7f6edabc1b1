"""What a connection to a SQL database does with a batch, whichever dialect it speaks.

Presence and retained values are written only over older ones, under a lock on their stamps; a stamp's row is made where none
is, so that there is something to lock. A dialect brings its statements as a table, and the few steps in which drivers differ.

Invariant: everything between the mark's move and the commit is one transaction, and a refused batch leaves nothing behind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, cast

from .backend import Batch, Mark, Meanwhile, Refusal, Shown, nothing
from .errors import Rejected
from .pools import Pool
from .sql_batch import NO_STAMP, Client, Group, arrange, fitting_clients, fitting_retained
from .sql_limits import Columns, misfit
from .sql_positions import POSITION, Words, drop, put
from .sql_rows import Gap, Message, Own, Retained, Row, Stamp, decode, milliseconds, utc

LEDGER, STAMP, GAP = "tidegate_ledger", "tidegate_stamp", "tidegate_gap"


class Dialect(NamedTuple):
    """The statements, each with the parameters its use below shows."""

    client_times: str
    put_clients: str
    retained_times: str
    drop_retained: str
    put_retained: str
    make_stamps: str
    lock_stamps: str
    put_stamps: str
    mark_gone: str
    sweep: str
    """Deletions that nothing so old can reach any more."""
    positions: Words


MARKS = "SELECT epoch, seq FROM tidegate_ledger WHERE gateway = %s AND pool = %s"
PUT_GAPS = (
    "INSERT INTO tidegate_gap (gateway, first_seq, last_seq, first_at, last_at, topic, reason, count)"
    " VALUES (%s,%s,%s,%s,%s,%s,%s,%s)"
)
TAKE = "DELETE FROM mqtt_msg WHERE msgid = %s"
TOMBSTONE_DAYS = 30


class Paper:
    """In the place of a connection and its cursor: writes down what it is told, and finds nothing."""

    def __init__(self) -> None:
        self.written: list[Shown] = []

    def cursor(self) -> Self:
        return self

    def execute(self, sql: str, values: Sequence[object] = ()) -> Self:
        self.written.append(Shown(sql, values))
        return self

    def executemany(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        self.written += [Shown(sql, row) for row in rows]

    def fetchall(self) -> Sequence[tuple[Any, ...]]:
        return []


class SqlLink(ABC):
    """See `backend.Link`."""

    dialect: Dialect
    largest = 5000

    def __init__(self, pool: Pool, columns: Columns) -> None:
        self._pool = pool
        self._columns = columns
        self._missing = [table for table in (LEDGER, STAMP, POSITION, GAP) if table not in columns]
        self.whole = LEDGER not in self._missing
        self.warning = _warning(self._missing, pool)

    # -- what drivers do differently -------------------------------------------------------------------------------------

    @abstractmethod
    def _ask(self, sql: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]:
        """Run a SELECT and return its rows."""

    @abstractmethod
    def _many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        """Run a statement for each of the rows."""

    @abstractmethod
    def _apply(self, batch: Batch, rows: Sequence[Row], meanwhile: Meanwhile) -> bool:
        """One transaction with the mark; False when that was not where expected. Raises the three words."""

    @abstractmethod
    def _refused_alone(self, rows: Sequence[Row]) -> Mapping[int, str]:
        """Try each row by itself, undo everything, and say which were refused."""

    @abstractmethod
    def _insert(self, messages: Sequence[Message]) -> None:
        """Put messages into mqtt_msg."""

    @abstractmethod
    def _run_own(self, statements: Sequence[Own]) -> None:
        """Run the user's statements in order."""

    @abstractmethod
    def _payload(self, table: str, payload: bytes) -> str | bytes:
        """The payload as the column of that table takes it."""

    @abstractmethod
    def _alter(self, table: str, column: str, size: int) -> str:
        """The statement that widens a column."""

    # -- backend.Link ----------------------------------------------------------------------------------------------------

    def marks(self, gateway: str) -> dict[int, Mark] | None:
        if LEDGER in self._missing:
            return None
        return {epoch: Mark(seq) for epoch, seq in self._ask(MARKS, (gateway, self._pool.name))}

    def refusals(self, gateway: str) -> list[Refusal]:
        return []

    def settle(self, gateway: str, refusals: Collection[Refusal]) -> None:  # noqa: B027 - there is nothing to do
        """Nothing is noted at the far end: what is refused is named before the mark moves."""

    def write(self, batch: Batch, meanwhile: Meanwhile = nothing) -> list[Refusal] | None:
        # What comes back here is what `sql_actions` made.
        rows = self._prepared(cast(list[Row], [operation.packed for operation in batch.operations]))
        try:
            return [] if self._apply(batch, rows, meanwhile) else None
        except Rejected as error:
            raise Rejected(str(error), self._bad(batch, rows)) from error

    def show(self, row: Row, paper: Paper) -> Sequence[Shown]:
        """The statements of one write on a link whose connection is `paper`, if nothing stands at the far end."""
        self._alone(row)
        return paper.written

    def repack(self, data: bytes) -> Row:
        return decode(data)

    # -- for the dialects ------------------------------------------------------------------------------------------------

    def _prepared(self, rows: list[Row]) -> list[Row]:
        """The rows as the driver takes them. Raises Rejected for those that can be seen not to be."""
        return rows

    def _mark_key(self, batch: Batch) -> tuple[str, int, str]:
        return batch.gateway, batch.epoch, self._pool.name

    def _sweep(self) -> None:
        """Once for each connection."""
        if STAMP not in self._missing:
            self._many(self.dialect.sweep, [(TOMBSTONE_DAYS,)])
        if POSITION not in self._missing:
            self._many(self.dialect.positions.sweep, [(TOMBSTONE_DAYS,)])

    def _rest(self, group: Group) -> None:
        """All of the group but its messages."""
        if group.clients:
            self._write_clients(group)
        if group.retained:
            self._write_retained(group)
        if group.positions:
            put(self.dialect.positions, self._many, group.positions.values(), POSITION not in self._missing)
        if group.drops:
            drop(self.dialect.positions, self._many, group.drops.values(), POSITION not in self._missing)
        if group.taken:
            self._many(TAKE, group.taken)
        if group.gaps and GAP not in self._missing:
            self._many(PUT_GAPS, [_gap_values(gap) for gap in group.gaps])
        if group.own:
            self._run_own(group.own)

    def _alone(self, row: Row) -> None:
        (group,) = arrange([row])
        if group.messages:
            self._insert(group.messages)
        self._rest(group)

    def _write_clients(self, group: Group) -> None:
        names = sorted(group.clients)
        stands = self._stamps("client", names)
        times = _times(self._ask(self.dialect.client_times, (names,)))
        clients = fitting_clients(group, stands, times)
        if clients:
            self._many(self.dialect.put_clients, [_client_values(client) for client in clients])
            self._put_stamps("client", [(client.clientid, client.stamp) for client in clients])

    def _write_retained(self, group: Group) -> None:
        names = sorted(group.retained)
        stands = self._stamps("retain", names)
        times = _times(self._ask(self.dialect.retained_times, (names,)))
        rows = fitting_retained(group, stands, times)
        gone = [(row.topic,) for row in rows if not row.payload]
        if gone:
            self._many(self.dialect.drop_retained, gone)
        if kept := [row for row in rows if row.payload]:
            self._many(self.dialect.put_retained, [self._retained_values(row) for row in kept])
        if rows:
            self._put_stamps("retain", [(row.topic, row.stamp) for row in rows])
        if gone and STAMP not in self._missing:
            self._many(self.dialect.mark_gone, gone)

    def _stamps(self, target: str, names: Sequence[str]) -> dict[str, Stamp]:
        """What stands, locked until the end of the transaction."""
        if STAMP in self._missing:
            return {}
        self._many(self.dialect.make_stamps, [(target, name, *NO_STAMP) for name in names])
        return {name: Stamp(*stamp) for name, *stamp in self._ask(self.dialect.lock_stamps, (target, names))}

    def _put_stamps(self, target: str, stamps: Iterable[tuple[str, Stamp]]) -> None:
        if STAMP not in self._missing:
            self._many(self.dialect.put_stamps, [(target, name, *stamp) for name, stamp in stamps])

    def _retained_values(self, row: Retained) -> Sequence[object]:
        payload = self._payload("mqtt_retain", row.payload)
        return (row.topic, row.msgid, row.sender, row.node, row.qos, payload, utc(row.when // 1000))

    def _bad(self, batch: Batch, rows: Sequence[Row]) -> Mapping[int, str]:
        """Which rows it is: those that do not fit, or those of a single entry that fail by themselves; empty if unknown."""
        found = {place: text for place, row in enumerate(rows) if (text := misfit(row, self._columns, self._alter))}
        if found or len({operation.seq for operation in batch.operations}) > 1:
            return found
        return self._refused_alone(rows)


def _times(found: Iterable[tuple[Any, ...]]) -> dict[str, list[int]]:
    return {name: milliseconds(*times) for name, *times in found}


def _client_values(client: Client) -> Sequence[object]:
    times = [None if ms is None else utc(ms // 1000) for ms in (client.online_at, client.offline_at, client.created)]
    return (client.clientid, client.state, client.node, *times)


def _gap_values(gap: Gap) -> Sequence[object]:
    times = (utc(gap.first_at // 1000), utc(gap.last_at // 1000))
    return (gap.gateway, gap.first_seq, gap.last_seq, *times, gap.topic, gap.reason, gap.dropped)


def _warning(missing: Sequence[str], pool: Pool) -> str:
    if not missing:
        return ""
    price = {
        LEDGER: "what is sent again after a lost answer arrives twice",
        STAMP: "which presence or retained value is newer is told by its second alone",
        POSITION: "a client that reads messages of several gateways may miss some",
        GAP: "gaps are not told",
    }[missing[0]]
    return f"without {', '.join(missing)} {price}: `tidegate uplink init {pool.full_name}` creates what is missing"
