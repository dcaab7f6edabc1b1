"""Retained messages for new subscriptions: they are found when their turn comes, of one subscription of a session at a time;
only their numbers wait, and they are read from the log when the client takes them.

A stranger may subscribe to ten thousand filters that match ten thousand retained messages: to find them for all of it at once
would stop everybody else, and fill the memory.

What is read shares the memory with what waits for slow clients (`queued`): nobody's socket is known to be slow before something
was written to it, so all who are read for at once have one share together.

Invariant: of a subscription each retained message leaves once, in order of seq, however often it was read.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from tidegate.store.catchup import BYTES, ROWS, Fetched
from tidegate.store.entry import FOREIGN, QOS_MASK
from tidegate.store.few import NO_DICT, NO_LIST
from tidegate.store.log import Log
from tidegate.store.report import ERROR, Say
from tidegate.store.topic import is_wild

from .held import Retained
from .outlet import TURN_BYTES, Outlet
from .queued import Queued
from .routing import Router, Target
from .session import Client, Session
from .walk import ReadLog

FOUND_AT_ONCE = 100
"""With so few retained messages it costs nothing to find that a filter matches none."""


class Due:
    """What a subscription brings: the messages `seqs`, in order, and those found through seq `through`, 0 when that is done."""

    __slots__ = ("seqs", "target", "through")

    def __init__(self, target: Target, through: int, seqs: Iterable[int] = ()) -> None:
        self.target = target
        self.through = through
        self.seqs = array("q", seqs)


class Retaining(Outlet):
    """See the module."""

    def __init__(
        self,
        log: Log,
        router: Router,
        kept: Retained,
        read: ReadLog,
        max_queued_bytes: int,
        queued: Queued,
        message_id: Any,
    ) -> None:
        super().__init__(log, router, max_queued_bytes, queued, message_id)
        self._kept = kept
        self.report: Say = lambda *_, **fields: None
        self._read = read
        self._fetching = 0
        """Reads of retained messages under way."""

    @abstractmethod
    def pump(self, session: Session, its_turn: bool = False) -> None:
        """Send what waits, as much as window and socket take."""

    def queue_retained(self, client: Client, topic_filter: str, due: Due) -> None:
        """Retained messages for a subscription; what waits of the filter already is replaced."""
        session = due.target.session
        if session.retained_due is NO_DICT:
            session.retained_due = {}
        session.retained_due.pop(topic_filter, None)
        session.retained_due[topic_filter] = due
        self._fetch_retained(session, client)

    def add_retained(self, client: Client, topic_filter: str, target: Target, seq: int) -> None:
        """One more for a subscription that is there."""
        before = target.session.retained_due.get(topic_filter, Due(target, 0))
        self.queue_retained(client, topic_filter, Due(target, before.through, sorted([*before.seqs, seq])))

    def _fetch_retained(self, session: Session, client: Client) -> None:
        if session.retained or session.fetching is client or client.blocked:
            return
        while session.retained_due:
            topic_filter, due = next(iter(session.retained_due.items()))
            self._find(topic_filter, due)
            if not due.seqs:
                del session.retained_due[topic_filter]
            if due.seqs or (len(self._kept) > FOUND_AT_ONCE and is_wild(topic_filter)):
                self._read_retained(session, client, topic_filter, due)
                return
        session.retained_due = NO_DICT

    def _find(self, topic_filter: str, due: Due) -> None:
        if due.through:
            found = [seq for seq in self._kept.find(topic_filter) if seq <= due.through]
            if (progress := due.target.session.progress) is not None:
                progress.skip(topic_filter, found)  # a fetch waits until nothing is due
            due.seqs = array("q", sorted({*due.seqs, *found}))
            due.through = 0

    def _read_retained(self, session: Session, client: Client, topic_filter: str, due: Due) -> None:
        """The first messages; if there are none the next filter has its turn after everybody else, too."""
        session.fetching = client
        self._fetching += 1
        seqs = due.seqs[:ROWS]
        self._read(
            # Asked when its turn comes, and for all who ask: nobody's socket is known to be slow yet.
            lambda reader: (
                reader.fetch(seqs, min(BYTES, self.queued.share // max(1, self._fetching))) if seqs else Fetched([], 0)
            ),
            lambda got: self._have_retained(session, client, topic_filter, due.target, got),
        )

    def _have_retained(
        self, session: Session, client: Client, topic_filter: str, target: Target, got: Fetched | Exception
    ) -> None:
        self._fetching -= 1
        if session.fetching is client:
            session.fetching = None
        if session.client is not client:
            return
        if isinstance(got, Exception):
            self.read_failed(session, got)
            return
        due = session.retained_due.get(topic_filter)
        if due is not None and due.target is target:
            due.seqs = due.seqs[bisect_right(due.seqs, got.through) :]
            if not due.seqs:
                del session.retained_due[topic_filter]
            session.retained = [*session.retained, *((topic_filter, target, message) for message in got.messages)]
        self.pump(session)

    def _send_waiting_retained(self, session: Session, client: Client) -> None:
        taken = 0
        while taken < len(session.retained) and client.out_size <= TURN_BYTES and not client.blocked:
            _, target, message = session.retained[taken]
            qos = min(target.qos, message[2] & QOS_MASK)
            if qos and session.room() <= 0:
                break
            taken += 1
            forwarded = b"" if message[2] & FOREIGN else message[4]
            if b"\x02" in forwarded and self._expired(forwarded, *message[6:]):
                continue
            v5 = client.version == 5
            properties = self._properties(forwarded, target.identifiers, *message[6:]) if v5 else b""
            topic = self._router.topics[message[1]]
            parts = self._variant(topic, qos << 2 | 32 | v5, message[3], properties)
            if not self._too_large(client, *parts):
                if qos and session.progress is not None and session.progress.skips(message[0]):
                    session.progress.under_way(message[0])
                self._send_stored(session, client, message[0], qos, parts, retain=True)
                if qos and self._router.watches(topic) and topic.acks and not message[2] & FOREIGN:
                    self._follow(session, topic, message[0], message[6], message[8])
        del session.retained[:taken]
        session.retained = session.retained or NO_LIST
        if client.blocked and session.retained:
            self._put_retained_back(session)
        if len(session.retaining) > 2 * session.window:
            session.retaining = {
                packet_id: seq
                for packet_id, seq in session.retaining.items()
                if packet_id in session.inflight or packet_id in session.releasing
            }

    @staticmethod
    def _put_retained_back(session: Session) -> None:
        """They are read again when the client reads; until then only their numbers wait."""
        topic_filter, target, _ = session.retained[0]
        seqs = [message[0] for _, _, message in session.retained]
        session.retained = NO_LIST
        due = session.retained_due.get(topic_filter)
        if due is None or due.target is target:
            session.retained_due = session.retained_due or {}
            session.retained_due[topic_filter] = Due(target, 0, [*seqs, *(due.seqs if due else ())])

    def read_failed(self, session: Session, error: Exception) -> None:
        """Without its log a session cannot be served; it asks again when it connects again."""
        text = "the log cannot be read for a session; it is disconnected; of a damaged log `tidegate salvage` saves what it can"
        self.report("log_unreadable", text, ERROR, client=session.name.text, reason=error)
        if session.client is not None:
            session.client.link.close()
