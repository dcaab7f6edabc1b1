"""`tidegate status` for people: the gateway's answer as a few lines that fit a terminal.

Invariant: pure functions of the answer; every number carries its unit, and what strangers sent cannot steer the terminal.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

_PARTS = ("delivered", "in_flight", "waiting", "parked", "cancelled", "expired")


def render(status: dict[str, Any]) -> str:
    """The lines to print, without a final line break."""
    clients, messages, store = status["clients"], status["messages"], status["store"]
    lines = [
        f"{status['name']}  tidegate {status['version']}  up {duration(status['uptime'])}"
        f"  gateway {status['gateway']} epoch {status['epoch']}",
        f"listening   {', '.join(status['listeners'])}; http {status['http']}",
        f"clients     {clients['connected']} connected, {clients['sessions']} sessions,"
        f" {clients['subscriptions']} subscriptions",
        f"messages    {messages['received']} received, {messages['stored']} entries stored, {messages['sent']} sent",
        f"store       {store['state']}, durability {store['durability']},"
        f" {size(store['bytes'])} of {size(store['disk_budget'])},"
        f" {size(store['bytes_written'])} written in {store['commits']} commits",
        f"clock       {clock(status['clock'])}",
    ]
    for pool in status["pools"]:
        lines += _pool(pool)
    for one in status.get("quarantine", ()):
        waiting = f", {one['waiting']} wait to be sent again" if one["waiting"] else ""
        lines.append(
            f"quarantine  {one['pool']}, which is not configured: {one['records']} records{waiting} (tidegate dead list)"
        )
    if not status["pools"]:
        remote = [name for name in status["backends"] if name != "sqlite"]
        lines.append(f"pools       {'starting: ' + ', '.join(remote) if remote else 'none: no remote backend is configured'}")
    refused = dict(clients["refused"])
    refused |= {name: clients[name] for name in ("protocol_errors", "slow_readers", "unfinished_packets") if clients.get(name)}
    lines += _sessions(status.get("sessions", {}))
    if (level := store.get("refusing_below")) is not None:
        lines.append(f"refusing    publishes below priority {level} with reject_new: {messages['refused']} so far")
    if store.get("exchanges_full"):
        lines.append(
            f"refusing    new exchanges of QoS 2, max_exchange_bytes is used up: {messages['refused']} publishes so far"
        )
    if not_kept := messages.get("not_retained"):
        lines.append(f"not kept    {not_kept} retained messages, which were delivered: max_retained_bytes is used up")
    for title, counts in (("dropped", status["dropped"]), ("refused", refused)):
        shown = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        lines.append(f"{title:<12}{shown or 'nothing'}")
    config = status.get("config", {})
    if changed := config.get("changed"):
        lines.append(f"restart     gateway.toml was changed: {', '.join(changed)}")
    if fault := config.get("error"):
        lines += [f"restart     it would not start: {printable(line)}" for line in fault.splitlines()]
    if unheard := status["log"]["dropped"]:
        lines.append(f"log         {unheard} lines dropped: nobody reads standard error, or too slowly")
    return "\n".join(lines)


def clock(told: dict[str, Any]) -> str:
    """Whether the time is trusted, since when, and why."""
    now, since = (f"{datetime.fromtimestamp(told[key], UTC):%Y-%m-%d %H:%M:%S}" for key in ("time", "since"))
    trusted = "trusted" if told["trusted"] else "not trusted"
    return f"{now} UTC, {trusted} ({told['state']} since {since}): {told['why']}"


def _pool(pool: dict[str, Any]) -> list[str]:
    waiting = f"{pool['waiting']} waiting"
    if pool["waiting"] and pool.get("oldest_age") is not None:
        waiting += f" (oldest {duration(pool['oldest_age'])})"
    if pool["waiting"] and pool.get("drain") is not None:
        waiting += f", drained in {duration(pool['drain'])}"
    sheet = pool.get("balance", {})
    delivered, parked = sheet.get("delivered", pool["delivered"]), sheet.get("parked", 0)
    refused = f"{pool['refused']} refused" + (f", {parked} in quarantine (tidegate dead list)" if parked else "")
    lines = [f"pool        {pool['name']}: {pool['state']}, {waiting}, {delivered} delivered, {refused}"]
    lines += [f"            {pool[key]}" for key in ("error", "hint", "warning") if pool.get(key)]
    if asking := pool.get("lookups"):
        counts = f"{asking['questions']} questions and {asking['inbox']} answers waiting, {asking['refused']} refused"
        lines.append(f"            lookups: {asking['state']}, {counts}")
        lines += [f"            {asking[key]}" for key in ("error", "hint") if asking[key]]
    return lines + _balance("            ", sheet)


def _sessions(sessions: dict[str, Any]) -> list[str]:
    """Those that lost something, a line each."""
    lines: list[str] = []
    for one in sessions.get("most", ()):
        lines += _balance(f"session     {printable(one['client'])}: ", one)
    return lines


def _balance(head: str, sheet: dict[str, Any]) -> list[str]:
    """The sheet of whoever lost something or whose sheet does not add up, on one line."""
    if not (sheet.get("dropped") or sheet.get("mismatch")):
        return []
    parts = [f"{sheet[key]} {key.replace('_', ' ')}" for key in _PARTS if sheet.get(key)]
    parts += [f"{count} dropped ({reason})" for reason, count in sorted(sheet["dropped"].items())]
    text = f"{head}{sheet['wanted']} wanted: {', '.join(parts)}"
    unread = f"; {sheet['unread_entries']} entries of the log not looked at for it" if sheet.get("unread_entries") else ""
    return [text + (f"; {sheet['mismatch']} UNEXPLAINED" if sheet["mismatch"] else "") + unread]


def render_refused(answer: dict[str, Any]) -> str:
    """Who was refused lately, a line each, newest last; without a final line break."""
    rows: list[tuple[str, ...]] = [("when", "from", "client id", "user name", "why")]
    for refusal in answer["refusals"]:
        when = f"{datetime.fromtimestamp(refusal['at'] / 1000):%Y-%m-%d %H:%M:%S}"
        rows.append((when, *(printable(refusal[key]) or "-" for key in ("peer", "client_id", "username", "reason"))))
    if len(rows) == 1:
        return "nobody was refused since the gateway started"
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(f"{text:<{width}}" for text, width in zip(row, widths, strict=False)), row[4]]) for row in rows]
    if answer["fell_out"]:
        lines.insert(1, f"({answer['fell_out']} earlier ones are not kept)")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 12 s, 3 min, 5.2 h, 12 d."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}".replace(".0 ", " ")
    return f"{seconds:.1f} s".replace(".0 ", " ")


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}".replace(".0 ", " ")
        count /= 1024
    return f"{count:.1f} TiB".replace(".0 ", " ")
