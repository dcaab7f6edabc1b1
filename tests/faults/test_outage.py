"""Three days without a far end at 20 messages/s into 64 MiB, a twentieth of both; `bench/outage.py` is the whole."""

from __future__ import annotations

from pathlib import Path

from tidegate.store.trim import VACUUM_PAGES

from tests.support.redis_server import RedisServer

from .outage import Outage

MESSAGES = 72 * 3600 * 20 // 20
BUDGET = (64 << 20) // 20


def test_a_long_outage_stays_within_the_budget_and_every_loss_is_named(tmp_path: Path) -> None:
    outage = Outage(tmp_path, MESSAGES, BUDGET)
    try:
        outage.publish()
        with RedisServer(tmp_path) as redis:
            outage.come_back(redis)
    finally:
        outage.close()
    sheet = outage.sheet
    said = sheet.text()
    assert sheet.most_on_disk <= BUDGET, said
    assert set(sheet.dropped) == {"low"} and not sheet.dropped_too_high, said
    assert sheet.delivered + sheet.dropped.total() == MESSAGES, said
    assert sheet.counted_by_records == sheet.dropped.total() and not sheet.unnamed and not sheet.named_wrongly, said
    assert sheet.memory_most_later < sheet.memory_early + (8 << 20), said
    assert sheet.on_disk_at_the_end < 4096 * (VACUUM_PAGES + 100), said
