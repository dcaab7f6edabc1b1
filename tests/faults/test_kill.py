"""kill -9 of the broker at a hundred random moments under load.

Senders of QoS 1 and QoS 2 and persistent subscribers of both keep working across all of them. Afterwards
every message that was acknowledged is in the log and at the subscribers, QoS 2 exactly once, extra copies
only of QoS 1 messages that were sent again, and the order of each sender is kept.

The moments come from a seed, which is printed with a failure.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from tests.support.gateway import Gateway

from .traffic import Receiver, Sender, check, run_for, settle

KILLS = 100
PUBLISH = 6


def test_kill_broker_at_a_hundred_random_moments_loses_nothing_acknowledged(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    senders = [Sender("one", "kill/one", 1, version=5), Sender("two", "kill/two", 2, version=4)]
    receivers = [Receiver("first", "kill/#", 1, version=4), Receiver("second", "kill/#", 2, version=5)]
    peers = [*receivers, *senders]
    with Gateway(tmp_path) as gateway:
        for _ in range(KILLS):
            for peer in peers:
                peer.connect(gateway.port)
            run_for(peers, moments.uniform(0.005, 0.12))
            gateway.kill()
            for peer in peers:
                peer.lose()
            gateway.start()
        for peer in peers:
            peer.connect(gateway.port)
        settle(senders, receivers)
        assert gateway.stop() == 0
    assert all(len(sender.acknowledged) > KILLS for sender in senders)
    check(senders, receivers)
    check_log(gateway.data, senders)


def check_log(data: Path, senders: list[Sender]) -> None:
    """Each acknowledged message is in the log, as often as it may be."""
    with closing(sqlite3.connect(data / "log.db")) as log:
        assert log.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = log.execute("SELECT payload FROM entry WHERE kind = ?", (PUBLISH,))
        copies = Counter(payload for (payload,) in rows)
    for sender in senders:
        for number in sender.acknowledged:
            allowed = 1 + (sender.resent[number] if sender.qos == 1 else 0)
            assert 1 <= copies[sender.payload(number)] <= allowed, sender.payload(number)
