"""A batch as a SQL database takes it: many rows of one table at once, and what a client or topic is left with.

Rows of our tables go together in bulk, because their order between tables cannot be seen from outside the transaction; of one
client's presence, of one topic's retained message and of a client's position in a topic only the last counts. The user's
statements run in order after them, unless one of them reads or changes our tables: then what comes after it waits for it.

Invariant: applying the groups in order leaves the tables as applying the rows one by one would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .sql_rows import Drop, Gap, Message, Own, Position, Presence, Retained, Row, Stamp, Taken

NO_STAMP = Stamp(0, "", 0, 0)


@dataclass(slots=True)
class Client:
    """What a batch leaves of a client: the times it tells, and whose event was the last."""

    clientid: str
    state: int
    node: str
    created: int
    online_at: int | None
    offline_at: int | None
    when: int
    stamp: Stamp
    came: Presence | None
    """The last coming."""


@dataclass(slots=True)
class Group:
    """Rows that may be applied table by table, and the statements that follow them."""

    messages: list[Message] = field(default_factory=list)
    clients: dict[str, Client] = field(default_factory=dict)
    retained: dict[str, Retained] = field(default_factory=dict)
    drops: dict[tuple[str, str], Drop] = field(default_factory=dict)
    positions: dict[tuple[str, str, str], Position] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    own: list[Own] = field(default_factory=list)
    closed: bool = False

    @property
    def has_more(self) -> bool:
        """Whether there is anything but messages."""
        return any((self.clients, self.retained, self.drops, self.positions, self.taken, self.gaps, self.own))


def arrange(rows: Iterable[Row]) -> list[Group]:
    """The rows in groups."""
    group = Group()
    groups = [group]
    stored = ""
    for row in rows:
        if type(row) is Message and not group.closed:
            # Two rules of one entry may both store it.
            if row.msgid != stored:
                group.messages.append(row)
                stored = row.msgid
        elif isinstance(row, Own):
            group.own.append(row)
            group.closed = group.closed or row.statement.touches_our_tables
        else:
            if group.closed or _comes_after(group, row):
                group = Group()
                groups.append(group)
            stored = _add(group, row, stored)
    return groups


def _comes_after(group: Group, row: Row) -> bool:
    """Whether the row must see what the group has written: positions go in before the group's drops of them."""
    return isinstance(row, Position) and (row.clientid, row.topic) in group.drops


def _add(group: Group, row: Message | Presence | Retained | Position | Drop | Taken | Gap, stored: str) -> str:
    """Put the row where it belongs; the message stored last comes back."""
    if isinstance(row, Message):
        if row.msgid != stored:
            group.messages.append(row)
        return row.msgid
    if isinstance(row, Presence):
        group.clients[row.clientid] = _after(group.clients.get(row.clientid), row)
    elif isinstance(row, Retained):
        group.retained[row.topic] = row
    elif isinstance(row, Position):
        _move(group, row)
    elif isinstance(row, Drop):
        group.drops[row.clientid, row.topic] = row
    elif isinstance(row, Taken):
        group.taken.append(row)
    else:
        group.gaps.append(row)
    return stored


def _move(group: Group, row: Position) -> None:
    """Of ids that others made the far end knows the order."""
    key = (row.clientid, row.topic, row.gateway or row.msgid)
    before = group.positions.get(key)
    if before is None or (row.at, row.seq) > (before.at, before.seq):
        group.positions[key] = row


def fits(stamp: Stamp, when: int, stands: Stamp | None, times: Iterable[int]) -> bool:
    """Whether this event is newer than what stands: one gateway's own order first, then the time. Without a stamp the
    specification's times (in ms, cut to seconds) decide."""
    if stands is None or stands == NO_STAMP:
        return all(time <= when // 1000 * 1000 for time in times)
    if stamp.gateway == stands.gateway:
        return (stamp.epoch, stamp.seq) >= (stands.epoch, stands.seq)
    return (stamp.ms, stamp.gateway) > (stands.ms, stands.gateway)


def fitting_clients(group: Group, stands: Mapping[str, Stamp], times: Mapping[str, list[int]]) -> list[Client]:
    """Those whose presence is newer than what stands; in the order of their ids, so that two gateways do not deadlock."""
    chosen = [_fitting(one, stands.get(name, NO_STAMP), times.get(name, ())) for name, one in sorted(group.clients.items())]
    return [one for one in chosen if one is not None]


def _fitting(client: Client, stands: Stamp, times: Iterable[int]) -> Client | None:
    """A going counts only at the gateway where the client came last, and leaves the time of that coming in the stamp: that it
    had left this gateway may have been noticed long after it came to another."""
    ms = stands.ms
    if client.came is not None and fits(client.came.stamp, client.came.when, stands, times):
        ms = client.came.stamp.ms
    elif client.state or not fits(client.stamp, client.when, stands, times):
        return None
    elif stands == NO_STAMP:
        return client
    elif stands.gateway != client.stamp.gateway:
        return None
    return replace(client, stamp=client.stamp._replace(ms=ms))


def fitting_retained(group: Group, stands: Mapping[str, Stamp], times: Mapping[str, list[int]]) -> list[Retained]:
    """Those whose value or deletion is newer than what stands, in the order of their topics."""
    chosen = sorted(group.retained.values(), key=lambda row: row.topic)
    return [one for one in chosen if fits(one.stamp, one.when, stands.get(one.topic), times.get(one.topic, ()))]


def _after(before: Client | None, row: Presence) -> Client:
    online = row.when if row.state else (before.online_at if before else None)
    offline = None if row.state else row.when
    created = before.created if before else row.when
    came = row if row.state else before.came if before else None
    return Client(row.clientid, row.state, row.node, created, online, offline, row.when, row.stamp, came)
