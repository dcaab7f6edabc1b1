"""The balance sheet of a soak: what was published, acknowledged, stored, delivered and written to the far end.

A copy is explained by DUP: a sender's resend of QoS 1 may be stored again, and a QoS 1 delivery marked DUP repeats one. Every
other copy is an error, as is everything acknowledged that is missing in the log, at a subscriber or at the far end.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import redis

from tests.faults.traffic import Receiver, Sender

DRAIN = 120.0


@dataclass
class Sheet:
    """The figures; the names are those that are printed."""

    clients: int = 0
    published: int = 0
    resent_with_dup: int = 0
    acknowledged: int = 0
    stored: int = 0
    stored_again_after_dup: int = 0
    stored_again_without_dup: int = 0
    missing_in_the_log: int = 0
    delivered: int = 0
    delivered_extra_explained_by_dup: int = 0
    delivered_extra_without_dup: int = 0
    missing_at_subscribers: int = 0
    at_the_far_end: int = 0
    missing_at_the_far_end: int = 0
    extra_or_out_of_order_at_the_far_end: int = 0

    @property
    def good(self) -> bool:
        """Whether every error is zero."""
        errors = [f.name for f in fields(self) if "missing" in f.name or "without" in f.name or "out_of" in f.name]
        return self.published > 0 and not any(getattr(self, name) for name in errors)

    def text(self) -> str:
        """One line per figure."""
        return "\n".join(f"{getattr(self, f.name):>10,}  {f.name.replace('_', ' ')}" for f in fields(self))


def balance(log: Path, redis_port: int, senders: Sequence[Sender], receivers: Sequence[Receiver]) -> Sheet:
    """Look everywhere; waits until the far end has what the log has."""
    sheet = Sheet(clients=len(senders) + len(receivers))
    with closing(sqlite3.connect(f"file:{log}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT msgid, payload FROM mqtt_msg ORDER BY id").fetchall()
    stored = Counter(payload for _, payload in rows)
    for sender in senders:
        sheet.published += sender.sent
        sheet.resent_with_dup += sender.resent.total()
        sheet.acknowledged += len(sender.acknowledged)
        sheet.missing_in_the_log += sum(1 for number in sender.acknowledged if not stored[sender.payload(number)])
        for number in range(sender.sent):
            again = max(0, stored[sender.payload(number)] - 1)
            allowed = min(again, sender.resent[number]) if sender.qos == 1 else 0
            sheet.stored_again_after_dup += allowed
            sheet.stored_again_without_dup += again - allowed
    sheet.stored = len(rows)
    for receiver in receivers:
        _deliveries(sheet, receiver, senders, stored)
    _far_end(sheet, redis_port, [msgid.encode() for msgid, _ in rows])
    return sheet


def _deliveries(sheet: Sheet, receiver: Receiver, senders: Sequence[Sender], stored: Counter[bytes]) -> None:
    copies = Counter(receiver.messages)
    sheet.delivered += len(receiver.messages)
    for sender in senders:
        for number in sender.acknowledged:
            payload = sender.payload(number)
            sheet.missing_at_subscribers += not copies[payload]
        for number in range(sender.sent):
            payload = sender.payload(number)
            extra = max(0, copies[payload] - 1)
            marked = receiver.marked[payload] if min(sender.qos, receiver.qos) == 1 else 0
            explained = min(extra, max(0, stored[payload] - 1) + marked)
            sheet.delivered_extra_explained_by_dup += explained
            sheet.delivered_extra_without_dup += extra - explained


def _far_end(sheet: Sheet, port: int, ids: list[bytes]) -> None:
    end = time.monotonic() + DRAIN
    with closing(redis.Redis(port=port)) as far:
        while int(far.llen("ids")) < len(ids) and time.monotonic() < end:
            time.sleep(0.1)
        there = cast(list[bytes], far.lrange("ids", 0, -1))
    sheet.at_the_far_end = len(there)
    sheet.missing_at_the_far_end = len(set(ids).difference(there))
    if there != ids:
        sheet.extra_or_out_of_order_at_the_far_end = max(1, len(there) - len(set(there)))
