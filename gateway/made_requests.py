"""`tidegate sub add|del` as the control socket hears it: checked, done, and answered when it is durable.

A request is `{"command": "sub", "action": "add" | "del", "client": …, "filter": …, "qos": …}`.

Invariant: nothing is changed by a request that is not understood, and none waits for a disk that refuses.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .broker import Broker
from .made import fault, fault_of_new

Future = asyncio.Future[dict[str, Any]]


def answer(broker: Broker, request: dict[str, Any], future: Future) -> dict[str, Any] | Future:
    """What to reply; `future`, when the change has to become durable first."""
    action, clientid, topic_filter, qos = (request.get(name) for name in ("action", "client", "filter", "qos"))
    qos = 0 if action == "del" else qos
    if not isinstance(clientid, str) or not isinstance(topic_filter, str) or not isinstance(qos, int) or isinstance(qos, bool):
        return {"error": "client and filter are texts, qos is a number"}
    if why := (fault_of_new if action == "add" else fault)(clientid, topic_filter, qos):
        return {"error": why}
    if broker.store_fault:
        return {"error": f"the store refuses to write: {broker.store_fault}"}
    reply = {"active": broker.router.local.lookup, "connected": _connected(broker, clientid), "found": True}

    def done() -> None:
        if not future.done():
            future.set_result(reply)

    if action == "add":
        reply["refused"] = not broker.made.add(clientid, topic_filter, qos, done)
    elif action != "del":
        return {"error": f"unknown action {action!r}"}
    elif not broker.made.remove(clientid, topic_filter, done):
        return reply | {"found": False}
    return future


def _connected(broker: Broker, clientid: str) -> bool:
    session = broker.sessions.get(clientid)
    return session is not None and session.client is not None
