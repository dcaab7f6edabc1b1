"""What a business system says on a channel: subscriptions that are to be made or taken away at once. Pure.

    {"type": "subscribe" | "unsubscribe", "topic": "a/b", "clientid": "c1", "qos": 1}

Invariant: what is not understood raises `NotUnderstood`, whose text shows it safely.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tidegate.store.inbox import SUBSCRIBE, UNSUBSCRIBE
from tidegate.store.topic import topic_filter_fault

_KINDS = {"subscribe": SUBSCRIBE, "unsubscribe": UNSUBSCRIBE}
_SHOWN = 120


class NotUnderstood(Exception):
    """Not a message for us."""


class Wish(NamedTuple):
    """`kind` is that of the answer: SUBSCRIBE or UNSUBSCRIBE."""

    kind: int
    client: str
    filter: str
    qos: int


def understand(message: bytes) -> Wish:
    """Raises NotUnderstood."""
    try:
        found = json.loads(message)
        if not isinstance(found, dict):
            raise NotUnderstood(f"not a JSON object: {_show(message)}")
        wish = Wish(_KINDS[found["type"]], found["clientid"], found["topic"], _qos(found.get("qos", 0)))
    except (ValueError, RecursionError) as error:
        raise NotUnderstood(f"not JSON as it should be ({error}): {_show(message)}") from None
    except (KeyError, TypeError):
        raise NotUnderstood(f'not "type": "subscribe" or "unsubscribe" with "topic" and "clientid": {_show(message)}') from None
    for text in (wish.client, wish.filter):
        if not isinstance(text, str) or not text or any("\ud800" <= character <= "\udfff" for character in text):
            raise NotUnderstood(f'"topic" and "clientid" are texts, not empty: {_show(message)}')
    if fault := topic_filter_fault(wish.filter):
        raise NotUnderstood(f"{fault}: {_show(message)}")
    return wish


def _qos(value: Any) -> int:
    if value in ("", None):
        return 0
    if isinstance(value, bool) or str(value) not in ("0", "1", "2"):
        raise ValueError("the QoS is 0, 1 or 2")
    return int(value)


def _show(message: bytes) -> str:
    return message[:_SHOWN].decode(errors="replace")
