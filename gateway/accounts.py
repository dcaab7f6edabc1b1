"""What a session was to get, and what became of it: wanted = delivered + in flight + waiting + expired + dropped.

A message counts as wanted when it is found for the session: when it is read or sent, or when it is found that it never will be.
Of the entries after that nobody knows which are for a session that sleeps without reading them, and to count at each publish
would cost every message a write for every sleeper (fan-out to a thousand of them costs one row); so they stand beside the sum.
Where what may wait is limited, they are read for that, and counted. The counters are saved with the session's cursor; what the
disk budget takes from a session, in the transaction that takes it.

Invariant: of what was found, everything is delivered, in flight, expired or dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tidegate.store.thinning import Plan, Taken

from .routing import Router
from .session import Session

SHOWN = 20
"""Sessions that `status` names."""


def charge(router: Router, plan: Plan) -> set[Session]:
    """Of what the disk budget takes, each session's part: what it was to get and has not come to. Who lost something."""
    charged: set[Session] = set()
    for taken in plan.messages:
        for session in router.waiting(taken.topic):
            count = _missed(router, session, taken)
            if count:
                session.taken += count
                session.drop(plan.lost[0].reason, count)
                charged.add(session)
    return charged


def _missed(router: Router, session: Session, taken: Taken) -> int:
    """How many of these messages the session would have got."""
    topic, number = router.topics[taken.topic.encode()], session.name.id
    target = router.match(session, topic)
    if target is None or not target.qos or taken.only not in (0, number):
        return 0
    first = bisect_left(taken.seqs, session.unread())
    ahead = taken.seqs[first:]
    if target.no_local and not taken.only and not ((own := router.own(session, topic)) and own.qos):
        ahead = [seq for seq, sender in zip(ahead, taken.senders[first:], strict=True) if sender != number]
    if ahead and ahead[0] <= target.since:
        ahead = [seq for seq in ahead if (found := router.match(session, topic, seq)) is not None and found.qos]
    return len(ahead) if not session.handled else sum(seq not in session.handled for seq in ahead)


def mismatch(session: Session) -> int:
    """What of what was found is nowhere; 0 is right."""
    done = session.delivered + session.expired + sum(session.dropped.values())
    return session.taken - done - len(session.inflight) - len(session.releasing)


def sheet(session: Session, live: int) -> dict[str, Any]:
    """For `status`; `waiting` is what was found in the log for it, `unread_entries` is what nobody has looked at for it."""
    waiting, looked = len(session.backlog), session.next_seq - 1 if session.behind else live
    if session.waiting is not None:  # it is away, and its limits had it counted
        waiting, looked = waiting + session.waiting.messages, session.waiting.through
    return {
        "client": session.name.text,
        "wanted": session.taken + waiting,
        "delivered": session.delivered,
        "in_flight": len(session.inflight) + len(session.releasing),
        "waiting": waiting,
        "expired": session.expired,
        "dropped": dict(session.dropped),
        "mismatch": abs(mismatch(session)),
        "unread_entries": max(0, live - looked),
    }


def overview(sessions: Iterable[Session], live: int) -> dict[str, Any]:
    """All sessions together, and those that lost most or are farthest behind by name."""
    sheets = [sheet(session, live) for session in sessions]
    dropped: Counter[str] = Counter()
    for one in sheets:
        dropped.update(one["dropped"])
    worst = sorted(sheets, key=lambda one: (-one["mismatch"], -sum(one["dropped"].values()), -one["unread_entries"]))
    return {
        **{
            key: sum(one[key] for one in sheets)
            for key in ("wanted", "delivered", "in_flight", "waiting", "expired", "mismatch")
        },
        "dropped": dict(dropped),
        "most": [one for one in worst[:SHOWN] if one["mismatch"] or one["dropped"] or one["unread_entries"]],
    }
