"""How far clients have read, in a SQL database: the vector in tidegate_position and the specification's mqtt_acked; pure.

A row of the vector is the last message of one gateway that the client has read: `seq` and `at`, the time in the message's id.
One with an empty gateway is what an UNSUBSCRIBE leaves when it drops the position, `at` being its time, so that what is older
and comes late does not bring it back; such rows go thirty days after they were written (`epoch`, seconds since 1970).
`mqtt_acked.mid` is the row of the newest message, and `created` the time of the event that wrote it last.

Invariant: every statement may be repeated, and none moves a position back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .sql_rows import Drop, Position, utc

POSITION = "tidegate_position"
Many = Callable[[str, Sequence[Sequence[object]]], None]
"""Runs a statement for each of the rows."""


class Words(NamedTuple):
    """What dialects say differently, each with the parameters its use below shows."""

    put_vector: str
    put_single: str
    put_drop: str
    sweep: str


_NOT_DROPPED = (
    " WHERE NOT EXISTS (SELECT 1 FROM tidegate_position d"
    " WHERE d.clientid = %s AND d.topic = %s AND d.gateway = '' AND d.at > %s)"
)
_NEWEST = (
    " AND NOT EXISTS (SELECT 1 FROM tidegate_position p WHERE p.clientid = %s AND p.topic = %s"
    " AND CASE WHEN p.gateway = '' THEN p.at > %s ELSE p.at > %s END)"
)
_PUT_VECTOR = "INSERT INTO tidegate_position (clientid, topic, gateway, epoch, seq, at)"
_PUT_SINGLE = "INSERT INTO mqtt_acked (clientid, topic, mid, created)"
_FOUND = "FROM mqtt_msg m WHERE m.msgid = %s NEWEST HAVING max(m.id) IS NOT NULL"
PGSQL = Words(
    put_vector=f"{_PUT_VECTOR} SELECT %s::varchar, %s::varchar, %s::varchar, %s::bigint, %s::bigint, %s::timestamp"
    f"{_NOT_DROPPED}"
    " ON CONFLICT (clientid, topic, gateway) DO UPDATE SET epoch = EXCLUDED.epoch, seq = EXCLUDED.seq, at = EXCLUDED.at"
    " WHERE (EXCLUDED.at, EXCLUDED.seq) > (tidegate_position.at, tidegate_position.seq)",
    put_single=f"{_PUT_SINGLE} SELECT %s::varchar, %s::varchar, max(m.id), %s::timestamp {_FOUND}"
    " ON CONFLICT (clientid, topic) DO UPDATE SET mid = greatest(mqtt_acked.mid, EXCLUDED.mid),"
    " created = greatest(mqtt_acked.created, EXCLUDED.created)",
    put_drop=f"{_PUT_VECTOR} VALUES (%s, %s, '', extract(epoch FROM now())::bigint, 0, %s)"
    " ON CONFLICT (clientid, topic, gateway) DO UPDATE SET epoch = EXCLUDED.epoch,"
    " at = greatest(tidegate_position.at, EXCLUDED.at)",
    sweep="DELETE FROM tidegate_position WHERE gateway = '' AND epoch < extract(epoch FROM now()) - 86400 * %s",
)
# MySQL assigns from left to right, and the condition of `seq` looks at the old `at`.
_MOVES = "VALUES(at) > tidegate_position.at OR (VALUES(at) = tidegate_position.at AND VALUES(seq) > tidegate_position.seq)"
MYSQL = Words(
    put_vector=f"{_PUT_VECTOR} SELECT %s, %s, %s, %s, %s, %s FROM DUAL{_NOT_DROPPED}"
    f" ON DUPLICATE KEY UPDATE epoch = IF({_MOVES}, VALUES(epoch), tidegate_position.epoch),"
    f" seq = IF({_MOVES}, VALUES(seq), tidegate_position.seq), at = greatest(tidegate_position.at, VALUES(at))",
    put_single=f"{_PUT_SINGLE} SELECT %s, %s, max(m.id), %s {_FOUND}"
    " ON DUPLICATE KEY UPDATE mid = greatest(coalesce(mqtt_acked.mid, 0), VALUES(mid)),"
    " created = greatest(coalesce(mqtt_acked.created, VALUES(created)), VALUES(created))",
    put_drop=f"{_PUT_VECTOR} VALUES (%s, %s, '', unix_timestamp(), 0, %s)"
    " ON DUPLICATE KEY UPDATE epoch = VALUES(epoch), at = greatest(tidegate_position.at, VALUES(at))",
    sweep="DELETE FROM tidegate_position WHERE gateway = '' AND epoch < unix_timestamp() - 86400 * %s",
)
_DROP_VECTOR = (
    "DELETE FROM tidegate_position WHERE clientid = %s AND topic = %s AND gateway <> ''"
    " AND NOT EXISTS (SELECT 1 FROM mqtt_acked a WHERE a.clientid = %s AND a.topic = %s AND a.created > %s)"
)
_DROP_SINGLE = "DELETE FROM mqtt_acked WHERE clientid = %s AND topic = %s AND (created IS NULL OR created <= %s)"


def put(words: Words, many: Many, positions: Iterable[Position], keeps_vector: bool) -> None:
    """Positions of a batch, in the order of their keys, so that two gateways do not deadlock."""
    ordered = sorted(positions)
    if keeps_vector and (rows := [_vector_values(one) for one in ordered if one.gateway]):
        many(words.put_vector, rows)
    put_single = words.put_single.replace("NEWEST", _NEWEST if keeps_vector else "")
    many(put_single, [_single_values(one, keeps_vector) for one in ordered])


def drop(words: Words, many: Many, drops: Iterable[Drop], keeps_vector: bool) -> None:
    """The positions are dropped, unless something newer stands there."""
    rows = [(one.clientid, one.topic, utc(one.when // 1000)) for one in sorted(drops)]
    if keeps_vector:
        many(words.put_drop, rows)
        many(_DROP_VECTOR, [(client, topic, client, topic, at) for client, topic, at in rows])
    many(_DROP_SINGLE, rows)


def _vector_values(one: Position) -> Sequence[object]:
    at = utc(one.at // 1000)
    return (one.clientid, one.topic, one.gateway, one.epoch, one.seq, at, one.clientid, one.topic, utc(one.when // 1000))


def _single_values(one: Position, keeps_vector: bool) -> Sequence[object]:
    when, at = utc(one.when // 1000), utc(one.at // 1000)
    condition = (one.clientid, one.topic, when, at) if keeps_vector else ()
    return (one.clientid, one.topic, when, one.msgid, *condition)
