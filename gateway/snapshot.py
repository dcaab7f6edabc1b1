"""What the gateway knows of itself at one moment: for `tidegate status` and for the `$SYS` topics.

Invariant: asking changes nothing and never waits for the disk longer than one small read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidegate.store.clock import CONFIRMED
from tidegate.store.lines import Lines
from tidegate.store.store import Store

from . import __version__
from .accounts import overview
from .broker import Broker
from .config import Config
from .trust import Trust


class Snapshot:
    """Gathers figures from the broker, the store and the uplink's own file."""

    def __init__(
        self,
        config: Config,
        store: Store,
        broker: Broker,
        trust: Trust,
        pools: Callable[[], list[dict[str, Any]]],
        started: float,
        lines: Lines,
    ) -> None:
        self._config = config
        self._store = store
        self._broker = broker
        self._trust = trust
        self._pools = pools
        self._started = started
        self._lines = lines
        self.http = "off"
        """Where `/metrics` listens, or why it does not."""

    def status(self) -> dict[str, Any]:
        """The whole state as JSON-ready values; times in seconds, sizes in bytes."""
        broker, store, config = self._broker, self._store, self._config
        delivery = broker.delivery
        return {
            "version": __version__,
            "name": store.identity.node,
            "gateway": store.identity.gateway,
            "epoch": store.identity.epoch,
            "uptime": round(time.monotonic() - self._started, 1),
            "listeners": [str(listener) for listener in config.listeners],
            "http": self.http,
            "clients": {
                "connected": len(broker.clients),
                "sessions": len(broker.sessions),
                "subscriptions": broker.router.subscriptions,
                "refused": self._refused(),
                "protocol_errors": broker.counters["protocol_errors"],
                "slow_readers": broker.counters["slow_readers"],
                "queued_bytes": delivery.queued.bytes,
                "unfinished_packets": broker.counters["unfinished_dropped"],
                "unfinished_bytes": broker.unfinished.bytes,
                "will_bytes": broker.connecting.wills.bytes,
            },
            "messages": {
                "received": broker.received,
                "sent": delivery.sent,
                "stored": broker.stored,
                "refused": broker.pressure.refused,
                "not_retained": broker.retained.refused,
            },
            "answers": {
                "refused": broker.counters["answers_refused"],
                "too_late": broker.counters["answers_too_late"],
            },
            "store": {
                "state": store.gone or broker.store_fault or store.checkpoint_fault or "ok",
                "durability": config.durability,
                "bytes": store.file_bytes(),
                "last_seq": delivery.live,
                "bytes_written": written_bytes(),
                "commits": store.commits,
                "disk_budget": config.disk_budget,
                "free_floor": config.free_floor,
                "retained_bytes": broker.retained.bytes,
                "session_bytes": broker.sessions.bytes,
                "exchanges": broker.rows.exchanges + broker.rows.passing,
                "positions": broker.rows.positions,
                "positions_forgotten": broker.counters["positions_forgotten"],
                "exchanges_full": int(broker.rows.full),
                "refusing_below": broker.router.level,
                "lost": self._lost(),
            },
            "clock": self._clock(),
            "sessions": self._sessions(),
            "backends": list(config.backends),
            "pools": self._pools(),
            "dropped": dict(delivery.dropped),
            "log": {"dropped": self._lines.dropped},
        }

    def _refused(self) -> dict[str, int]:
        found = dict(self._broker.connecting.refused)
        if self._broker.counters["lookup_refused"]:
            found["subscription_made_for_client"] = self._broker.counters["lookup_refused"]
        if self._broker.counters["refused_subscriptions"]:
            found["subscription"] = self._broker.counters["refused_subscriptions"]
        return found

    def _clock(self) -> dict[str, Any]:
        log, trust = self._broker.log, self._trust
        return {
            "trusted": log.clock.level == CONFIRMED,
            "state": trust.state,
            "why": trust.why,
            "since": (trust.since + log.clock.offset) / 1000,
            "time": log.now / 1000,
        }

    def _sessions(self) -> dict[str, Any]:
        """What became of the messages of sessions that outlive their connection."""
        return overview([one for one in self._broker.sessions if one.persistent], self._broker.delivery.live)

    def _lost(self) -> dict[str, dict[str, int]]:
        """What the disk budget ever took from those who waited: reason -> policy -> entries."""
        found: dict[str, dict[str, int]] = {}
        for (reason, policy), count in self._broker.gaps.totals.items():
            found.setdefault(reason, {})[policy] = count
        return found

    def mismatches(self) -> list[tuple[str, dict[str, Any]]]:
        """Whose balance does not add up, and the balance: something was lost and nobody says why."""
        found = [(f"pool {pool['name']}", pool.get("balance", {})) for pool in self._pools()]
        found += [(f"session {one['client']}", one) for one in self._sessions()["most"]]
        return [(name, one) for name, one in found if one.get("mismatch")]

    def sys_values(self) -> dict[str, bytes]:
        """The `$SYS` topics that monitoring tools for mosquitto know, as far as they mean the same here."""
        broker = self._broker
        asleep = sum(1 for session in broker.sessions if session.client is None)
        values = {
            "version": f"tidegate {__version__}",
            "uptime": f"{int(time.monotonic() - self._started)} seconds",
            "clients/connected": len(broker.sessions) - asleep,
            "clients/disconnected": asleep,
            "clients/total": len(broker.sessions),
            "publish/messages/received": broker.received,
            "publish/messages/sent": broker.delivery.sent,
            "publish/messages/dropped": sum(broker.delivery.dropped.values()),
            "retained messages/count": len(broker.retained),
            "subscriptions/count": broker.router.subscriptions,
        }
        return {f"$SYS/broker/{name}": str(value).encode() for name, value in values.items()}


def written_bytes() -> int:
    """Bytes this process handed to the disk since it started (/proc/self/io), 0 where that is not told."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(text.split("\nwrite_bytes: ")[1].split()[0])
