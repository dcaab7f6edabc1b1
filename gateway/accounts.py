"""What a session was to get, and what became of it: wanted = delivered + in flight + waiting + expired + dropped.

A message counts as wanted when it is found for the session: when it is sent, or when it is found that it never will be. What
waits in the log is counted in entries that were not looked at for it: how many of them are for a session that sleeps nobody
knows without reading them, and to count at each publish would cost every message a write for every sleeper (fan-out to a
thousand of them costs one row). The counters are saved with the session's cursor; what the disk budget takes from a session, in
the transaction that takes it.

Invariant: of what was found, everything is delivered, in flight, expired or dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tidegate.store.entry import KIND_NAMES, PUBLISH
from tidegate.store.thinning import Lost

from .routing import Router
from .session import Session

SHOWN = 20
"""Sessions that `status` names."""


def charge(router: Router, found: Iterable[Lost]) -> set[Session]:
    """Of what the disk budget takes, each session's part: what lies before it. Who lost something.

    A session that stands within what is taken is charged in proportion.
    """
    charged: set[Session] = set()
    for lost in found:
        if lost.event != KIND_NAMES[PUBLISH]:
            continue
        for session in router.sleepers(lost.topic):
            span = lost.last_seq - lost.first_seq + 1
            count = lost.count * min(span, lost.last_seq - session.next_seq + 1) // span
            if count > 0:
                session.taken += count
                session.drop(lost.reason, count)
                charged.add(session)
    return charged


def mismatch(session: Session) -> int:
    """What of what was found is nowhere; 0 is right."""
    done = session.delivered + session.expired + sum(session.dropped.values())
    return session.taken - done - len(session.inflight) - len(session.releasing)


def sheet(session: Session, live: int) -> dict[str, Any]:
    """For `status`; `waiting` in entries of the log that were not looked at for it."""
    waiting = max(0, live + 1 - session.next_seq) + len(session.backlog) if session.behind else 0
    return {
        "client": session.name.text,
        "wanted": session.taken + waiting,
        "delivered": session.delivered,
        "in_flight": len(session.inflight) + len(session.releasing),
        "waiting": waiting,
        "expired": session.expired,
        "dropped": dict(session.dropped),
        "mismatch": abs(mismatch(session)),
    }


def overview(sessions: Iterable[Session], live: int) -> dict[str, Any]:
    """All sessions together, and those that lost most or are farthest behind by name."""
    sheets = [sheet(session, live) for session in sessions]
    dropped: Counter[str] = Counter()
    for one in sheets:
        dropped.update(one["dropped"])
    worst = sorted(sheets, key=lambda one: (-one["mismatch"], -sum(one["dropped"].values()), -one["waiting"]))
    return {
        **{key: sum(one[key] for one in sheets) for key in ("wanted", "delivered", "in_flight", "expired", "mismatch")},
        "dropped": dict(dropped),
        "most": [one for one in worst[:SHOWN] if one["mismatch"] or one["dropped"] or one["waiting"]],
    }
