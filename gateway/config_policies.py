"""`[[store.policy]]` of `gateway.toml`: which messages go first when the disk budget is used up, and which are refused then.

Invariant: whatever stands there, a mistake has its line, what was found and what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tidegate.store.policy import DROP_OLDEST, REJECT_NEW, Policies, Policy
from tidegate.store.topic import topic_filter_fault

from .config_keys import choice, near, number

Say = Callable[[int, str], None]
MAX_POLICIES = 100


def _topic(value: Any) -> str:
    fault = topic_filter_fault(value) if isinstance(value, str) else "a text in quotes"
    if fault is None and value.startswith("$share/"):
        fault = "not $share"
    if fault is not None:
        raise ValueError(f'a topic filter such as "alarm/#" ({fault})')
    return str(value)


POLICY_KEYS: dict[str, Callable[[Any], Any]] = {
    "topic": _topic,
    "priority": number(0, 100),
    "when_full": choice(DROP_OLDEST, REJECT_NEW),
}


def read_policies(tables: Any, blocks: Sequence[tuple[int, Mapping[str, int]]], line: int, say: Say) -> Policies:
    """All policies of the file; `blocks` has of each its line and those of its keys. Mistakes are said."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        say(line, "policies are written [[store.policy]], with two brackets")
        return Policies()
    found: list[Policy] = []
    for place, table in enumerate(tables):
        block, keys = blocks[place] if place < len(blocks) else (line, {})
        values = _read(table, block, keys, say)
        if "topic" not in table:
            say(block, 'a [[store.policy]] needs topic = "a topic filter"')
        elif any(policy.topic == values.get("topic") for policy in found):
            say(keys.get("topic", block), f"store.policy.topic = {table['topic']!r} again: the first one holds, take one out")
        elif "topic" in values:
            found.append(Policy(**values))
    if len(found) > MAX_POLICIES:
        say(line, f"{len(found)} policies: at most {MAX_POLICIES} are allowed")
    return Policies(tuple(found))


def _read(table: Mapping[str, Any], block: int, keys: Mapping[str, int], say: Say) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, given in table.items():
        place = keys.get(name, block)
        if name not in POLICY_KEYS:
            say(place, f"unknown key {name!r} in [[store.policy]]{near(name, POLICY_KEYS)}")
            continue
        try:
            values[name] = POLICY_KEYS[name](given)
        except ValueError as error:
            say(place, f"store.policy.{name} = {given!r}: allowed is {error}")
    return values
