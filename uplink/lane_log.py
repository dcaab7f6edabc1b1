"""`log.db` as a lane that asks sees it: entries, and the tables that tell who is there and how far the broker is in the inbox.

Invariant: every question is one short transaction of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from tidegate.store.entry import QOS_MASK
from tidegate.store.inbox import cursor_name
from tidegate.store.reader import LogReader


class LaneLog(LogReader):
    """See the module."""

    def online(self) -> list[str]:
        """Who is connected."""
        return [name for (name,) in self._db.execute("SELECT clientid FROM client WHERE state = 1")]

    def sessions(self, clients: Collection[str]) -> set[str]:
        """Which of them have a session that outlives its connection."""
        sql = (
            "SELECT c.clientid FROM json_each(?) j JOIN client c ON c.clientid = j.value"
            " WHERE EXISTS (SELECT 1 FROM session s WHERE s.client = c.id)"
        )
        return {name for (name,) in self._db.execute(sql, (json.dumps(list(clients)),))}

    def subscriptions(self) -> list[tuple[str, str, int]]:
        """(client, filter, QoS) of every session that outlives its connection."""
        sql = f"SELECT c.clientid, s.filter, s.options & {QOS_MASK} FROM subscription s JOIN client c ON c.id = s.client"
        return self._db.execute(sql).fetchall()

    def inbox_cursor(self, identity: str) -> int:
        """The last answer that the broker is done with."""
        row = self._db.execute("SELECT seq FROM cursor WHERE name = ?", (cursor_name(identity),)).fetchone()
        return int(row[0]) if row else 0
