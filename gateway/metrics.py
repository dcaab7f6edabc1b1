"""What `tidegate status` shows, in Prometheus' text format.

One table: a metric's name, type, help and how its samples are taken from the status. Names follow Prometheus' rules: base units
(seconds, bytes), `_total` on what only grows, no label whose values a stranger chooses (client ids, topics, error texts): those
would grow the monitoring system without bound.

Invariant: a pure function of the status; every metric has its HELP and TYPE, with samples or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Status = Mapping[str, Any]
Sample = tuple[Mapping[str, str], float]


class Metric(NamedTuple):
    """One name; `samples` takes (labels, value) from the status."""

    name: str
    kind: str
    help: str
    samples: Callable[[Status], Iterable[Sample]]


def _value(*path: str) -> Callable[[Status], Iterable[Sample]]:
    """One sample without labels: the number at this place of the status."""

    def samples(status: Status) -> Iterable[Sample]:
        found: Any = status
        for key in path:
            found = found[key]
        yield {}, found

    return samples


def _by(label: str, *path: str) -> Callable[[Status], Iterable[Sample]]:
    """A sample for each key of the table at this place."""

    def samples(status: Status) -> Iterable[Sample]:
        found: Any = status
        for key in path:
            found = found[key]
        for name, count in found.items():
            yield {label: name}, count

    return samples


def _pools(key: str) -> Callable[[Status], Iterable[Sample]]:
    """A sample for each pool that knows this number."""

    def samples(status: Status) -> Iterable[Sample]:
        for pool in status["pools"]:
            if pool.get(key) is not None:
                yield {"pool": pool["name"]}, pool[key]

    return samples


PARTS = ("wanted", "delivered", "in_flight", "waiting", "parked", "cancelled", "expired")
"""Of a balance; what is dropped has a reason, and a metric of its own."""


def _pool_parts(status: Status) -> Iterable[Sample]:
    for pool in status["pools"]:
        for part in PARTS:
            if part in pool.get("balance", {}):
                yield {"pool": pool["name"], "part": part}, pool["balance"][part]


def _session_parts(status: Status) -> Iterable[Sample]:
    for part in PARTS:
        if part in status["sessions"]:
            yield {"part": part}, status["sessions"][part]


DROPS = (
    *("disk_budget", "free_floor", "max_waiting_age", "max_waiting_bytes", "max_waiting_messages"),
    *("queue_full", "packet_too_large", "offline_opts", "no_longer_stored", "cannot_be_stored"),
)
"""Reasons that are there from the start: the growth of what was not there before is not seen."""


def _dropped(status: Status) -> Iterable[Sample]:
    for reason, count in (dict.fromkeys(DROPS, 0) | status["dropped"]).items():
        if reason != "expired":
            yield {"reason": reason}, count


def _expired(status: Status) -> Iterable[Sample]:
    yield {}, status["dropped"].get("expired", 0)


def _pools_dropped(status: Status) -> Iterable[Sample]:
    for pool in status["pools"]:
        for reason, count in pool.get("balance", {}).get("dropped", {}).items():
            yield {"pool": pool["name"], "reason": reason}, count


def _lost(status: Status) -> Iterable[Sample]:
    for reason, policies in status["store"]["lost"].items():
        for policy, count in policies.items():
            yield {"reason": reason, "policy": policy}, count


def _refusing(status: Status) -> Iterable[Sample]:
    if status["store"]["refusing_below"] is not None:
        yield {}, status["store"]["refusing_below"]


def _mismatches(status: Status) -> Iterable[Sample]:
    yield {"consumer": "sessions"}, status["sessions"]["mismatch"]
    for pool in status["pools"]:
        yield {"consumer": pool["name"]}, pool.get("balance", {}).get("mismatch", 0)


def _info(status: Status) -> Iterable[Sample]:
    yield (
        {
            "version": status["version"],
            "name": status["name"],
            "gateway": status["gateway"],
            "durability": status["store"]["durability"],
            "backends": ",".join(status["backends"]),
        },
        1,
    )


def _listeners(status: Status) -> Iterable[Sample]:
    for address in status["listeners"]:
        yield {"address": address}, 1


def _store_ok(status: Status) -> Iterable[Sample]:
    yield {}, status["store"]["state"] == "ok"


def _clock_states(status: Status) -> Iterable[Sample]:
    yield {"state": status["clock"]["state"]}, status["clock"]["since"]


def _pool_states(status: Status) -> Iterable[Sample]:
    for pool in status["pools"]:
        yield {"pool": pool["name"], "state": pool["state"]}, 1


METRICS = (
    Metric("tidegate_info", "gauge", "The gateway: version, name, id, durability and backends; always 1.", _info),
    Metric("tidegate_epoch", "gauge", "Epoch of the log.", _value("epoch")),
    Metric("tidegate_uptime_seconds", "gauge", "Seconds since the gateway started.", _value("uptime")),
    Metric("tidegate_listener", "gauge", "Addresses that the gateway was told to listen on; always 1.", _listeners),
    Metric("tidegate_clients_connected", "gauge", "Open MQTT connections.", _value("clients", "connected")),
    Metric("tidegate_sessions", "gauge", "Sessions, connected or asleep.", _value("clients", "sessions")),
    Metric("tidegate_subscriptions", "gauge", "Subscriptions of all sessions.", _value("clients", "subscriptions")),
    Metric("tidegate_connects_refused_total", "counter", "CONNECTs refused, by reason.", _by("reason", "clients", "refused")),
    Metric(
        "tidegate_protocol_errors_total", "counter", "Connections ended because what they sent was no MQTT.",
        _value("clients", "protocol_errors"),
    ),
    Metric(
        "tidegate_slow_readers_disconnected_total", "counter", "Connections ended because they read too slowly.",
        _value("clients", "slow_readers"),
    ),
    Metric("tidegate_queued_bytes", "gauge", "Bytes that wait for slow clients.", _value("clients", "queued_bytes")),
    Metric(
        "tidegate_unfinished_disconnected_total", "counter", "Connections ended because they did not finish a packet.",
        _value("clients", "unfinished_packets"),
    ),
    Metric("tidegate_unfinished_bytes", "gauge", "Bytes of incomplete packets.", _value("clients", "unfinished_bytes")),
    Metric("tidegate_will_bytes", "gauge", "Bytes of the wills of all clients.", _value("clients", "will_bytes")),
    Metric("tidegate_messages_received_total", "counter", "PUBLISH packets received.", _value("messages", "received")),
    Metric("tidegate_messages_sent_total", "counter", "PUBLISH packets sent to subscribers.", _value("messages", "sent")),
    Metric("tidegate_entries_stored_total", "counter", "Entries committed to the log.", _value("messages", "stored")),
    Metric("tidegate_rules_read_timestamp_seconds", "gauge", "When the rules in force were read.", _value("rules_read")),
    Metric("tidegate_messages_dropped_total", "counter", "Messages dropped, by reason.", _dropped),
    Metric("tidegate_messages_expired_total", "counter", "Messages whose sender wanted them no longer delivered.", _expired),
    Metric(
        "tidegate_publishes_refused_total", "counter", "Publishes refused because the disk budget is used up.",
        _value("messages", "refused"),
    ),
    Metric(
        "tidegate_publishes_not_retained_total", "counter", "Publishes delivered and, for lack of room, not kept as retained.",
        _value("messages", "not_retained"),
    ),
    Metric(
        "tidegate_answers_refused_total", "counter", "What far ends had for clients and means nothing here.",
        _value("answers", "refused"),
    ),
    Metric(
        "tidegate_answers_too_late_total", "counter", "What far ends had for clients whose session or subscription is gone.",
        _value("answers", "too_late"),
    ),
    Metric("tidegate_lost_total", "counter", "Entries that the disk budget took from those who waited for them.", _lost),
    Metric("tidegate_sessions_messages", "gauge", "What became of the messages found for sessions.", _session_parts),
    Metric("tidegate_sessions_dropped_total", "counter", "Messages that sessions lost.", _by("reason", "sessions", "dropped")),
    Metric("tidegate_balance_mismatch", "gauge", "What a balance does not explain; 0 is right.", _mismatches),
    Metric("tidegate_log_lines_dropped_total", "counter", "Lines of the log that nobody read.", _value("log", "dropped")),
    Metric("tidegate_store_ok", "gauge", "1 if the disk takes what is written, 0 if acknowledgements are withheld.", _store_ok),
    Metric("tidegate_store_bytes", "gauge", "Bytes of the log on disk.", _value("store", "bytes")),
    Metric("tidegate_store_budget_bytes", "gauge", "Bytes that the log may take.", _value("store", "disk_budget")),
    Metric("tidegate_store_retained_bytes", "gauge", "Of them retained messages, at most.", _value("store", "retained_bytes")),
    Metric("tidegate_store_session_bytes", "gauge", "Of them sessions, at most.", _value("store", "session_bytes")),
    Metric("tidegate_store_exchanges", "gauge", "QoS 2 exchanges under way, at most.", _value("store", "exchanges")),
    Metric("tidegate_store_exchanges_full", "gauge", "1 while new ones are refused.", _value("store", "exchanges_full")),
    Metric("tidegate_store_positions", "gauge", "Positions of clients, at most.", _value("store", "positions")),
    Metric(
        "tidegate_positions_forgotten_total", "counter", "Positions that went because there were too many.",
        _value("store", "positions_forgotten"),
    ),
    Metric("tidegate_store_free_floor_bytes", "gauge", "Bytes left free for others.", _value("store", "free_floor")),
    Metric("tidegate_store_refusing_below", "gauge", "Priority below which reject_new refuses now.", _refusing),
    Metric("tidegate_store_last_seq", "gauge", "Number of the last entry.", _value("store", "last_seq")),
    Metric("tidegate_store_written_bytes_total", "counter", "Bytes handed to the disk.", _value("store", "bytes_written")),
    Metric("tidegate_store_commits_total", "counter", "Commits of the log.", _value("store", "commits")),
    Metric("tidegate_clock_trusted", "gauge", "1 if the time is confirmed, 0 if it is not.", _value("clock", "trusted")),
    Metric("tidegate_clock_seconds", "gauge", "Unix time as far as the gateway knows it.", _value("clock", "time")),
    Metric("tidegate_clock_state_since_seconds", "gauge", "Unix time at which the clock's state began.", _clock_states),
    Metric("tidegate_pool_state", "gauge", "State of each far end; 1 for the one it is in.", _pool_states),
    Metric("tidegate_pool_cursor", "gauge", "Number of the last entry a far end is done with.", _pools("cursor")),
    Metric("tidegate_pool_waiting", "gauge", "Entries that wait for a far end.", _pools("waiting")),
    Metric("tidegate_pool_oldest_age_seconds", "gauge", "Age of the oldest waiting entry.", _pools("oldest_age")),
    Metric("tidegate_pool_rate", "gauge", "Entries done with per second while a backlog is drained, else 0.", _pools("rate")),
    Metric("tidegate_pool_drain_seconds", "gauge", "Time until nothing waits; none if unknown.", _pools("drain")),
    Metric("tidegate_pool_delivered_total", "counter", "Entries a far end has taken.", _pools("delivered")),
    Metric("tidegate_pool_entries", "gauge", "What became of the entries for a far end: its balance.", _pool_parts),
    Metric("tidegate_pool_dropped_total", "counter", "Entries a far end never gets, by reason.", _pools_dropped),
    Metric("tidegate_pool_refused_total", "counter", "Records a far end refused for good.", _pools("refused")),
)  # fmt: skip


def exposition(status: Status) -> str:
    """The whole page."""
    lines: list[str] = []
    for metric in METRICS:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        lines += [f"{metric.name}{_labels(labels)} {_number(value)}" for labels, value in metric.samples(status)]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return repr(float(value)) if isinstance(value, float) else str(int(value))
