"""Topic names and topic filters: validity and matching.

Rules of MQTT 3.1.1 and 5.0, section 4.7. Everything here works on text that is already valid UTF-8. A filter that
begins with a wildcard never matches a topic that begins with `$` [MQTT-4.7.2-1]. `FilterTree` answers "which values
belong to filters that match this topic" in the number of levels, not in the number of filters.

Invariant: a tree never holds an empty branch; removing the last value of a filter removes its nodes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Generic, TypeVar

from .few import NO_DICT, Few, One, added, without

Key = TypeVar("Key")
Value = TypeVar("Value")

MAX_TOPIC_BYTES = 65_535
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""U+0000 must not be there; the others should not and may be refused (1.5.4), as mosquitto does."""
MAX_LEVELS = 201
"""As many as mosquitto takes."""


def topic_name_fault(topic: str) -> str | None:
    """Say why `topic` is no legal topic name, or None when it is one (4.7.1, 4.7.3)."""
    if not topic:
        return "a topic name has at least one character"
    if "+" in topic or "#" in topic:
        return "a topic name holds no wildcard"
    return _text_fault(topic)


def topic_filter_fault(topic_filter: str) -> str | None:
    """Say why `topic_filter` is no legal topic filter, or None when it is one (4.7.1, 4.7.3, 4.8.2)."""
    if not topic_filter:
        return "a topic filter has at least one character"
    levels = topic_filter.split("/")
    if levels[0] == "$share":
        if len(levels) < 3 or not levels[1] or "+" in levels[1] or "#" in levels[1]:
            return "a shared subscription is $share/NAME/FILTER"
        levels = levels[2:]
        if levels == [""]:
            return "a shared subscription is $share/NAME/FILTER"
    for number, level in enumerate(levels):
        if "#" in level and (level != "#" or number != len(levels) - 1):
            return "# stands alone in the last level"
        if "+" in level and level != "+":
            return "+ stands alone in its level"
    return _text_fault(topic_filter)


def _text_fault(text: str) -> str | None:
    if found := _CONTROL.search(text):
        return f"the control character U+{ord(found[0]):04X} is not allowed"
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TOPIC_BYTES:
        return "longer than 65535 bytes"
    if text.count("/") >= MAX_LEVELS:
        return f"more than {MAX_LEVELS} levels"
    return None


def matches(topic_filter: str, topic: str) -> bool:
    """Whether `topic` is matched by `topic_filter` (4.7.1); `$share/group/` is not looked through."""
    wanted = topic_filter.split("/")
    have = topic.split("/")
    if topic.startswith("$") and wanted[0] in ("#", "+"):
        return False
    for number, level in enumerate(wanted):
        if level == "#":
            return True
        if number >= len(have) or level not in ("+", have[number]):
            return False
    return len(wanted) == len(have)


def is_wild(topic_filter: str) -> bool:
    """Whether it can match more than one topic."""
    return not {"+", "#"}.isdisjoint(topic_filter.split("/"))


def without_share(topic_filter: str) -> str:
    """The filter of a shared subscription without `$share/NAME/`; any other as it is."""
    return topic_filter.split("/", 2)[2] if topic_filter.startswith("$share/") else topic_filter


def filters_overlap(one: str, other: str) -> bool:
    """Whether some topic is matched by both filters."""
    ours, theirs = one.split("/"), other.split("/")
    wild = ("#", "+")
    if any(a[0] in wild and b[0].startswith("$") for a, b in ((ours, theirs), (theirs, ours))):
        return False
    for mine, yours in zip(ours, theirs, strict=False):
        if "#" in (mine, yours):
            return True
        if mine != yours and "+" not in (mine, yours):
            return False
    longer, shorter = sorted((ours, theirs), key=len, reverse=True)
    return len(longer) == len(shorter) or longer[len(shorter) :] == ["#"]


def covers(wide: str, narrow: str) -> bool:
    """Whether every topic that `narrow` matches is matched by `wide`."""
    ours, theirs = wide.split("/"), narrow.split("/")
    if narrow.startswith("$") and ours[0] in ("#", "+"):
        return False
    for number, level in enumerate(ours):
        if level == "#":
            return True
        if number >= len(theirs) or theirs[number] == "#" or level not in ("+", theirs[number]):
            return False
    return len(ours) == len(theirs)


class _Node(Generic[Key, Value]):
    __slots__ = ("children", "values")

    def __init__(self) -> None:
        self.children: Few[str, _Node[Key, Value]] = NO_DICT
        self.values: Few[Key, Value] = NO_DICT


class FilterTree(Generic[Key, Value]):
    """Maps (topic filter, key) to a value; found again by topic. Filters without wildcards are no branches: found at once."""

    def __init__(self) -> None:
        self._exact: dict[str, Few[Key, Value]] = {}
        self._root: _Node[Key, Value] = _Node()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, topic_filter: str, key: Key, value: Value) -> None:
        if not _has_wildcard(topic_filter):
            values = self._exact.get(topic_filter, NO_DICT)
            self._size += key not in values
            self._exact[topic_filter] = added(values, key, value)
            return
        node = self._root
        for level in topic_filter.split("/"):
            found = node.children.get(level)
            if found is None:
                found = _Node()
                node.children = added(node.children, sys.intern(level), found)
            node = found
        self._size += key not in node.values
        node.values = added(node.values, key, value)

    def remove(self, topic_filter: str, key: Key) -> bool:
        """Take (topic_filter, key) out; whether it was there."""
        there = self._remove(topic_filter, key) if _has_wildcard(topic_filter) else self._remove_exact(topic_filter, key)
        self._size -= there
        return there

    def _remove_exact(self, topic: str, key: Key) -> bool:
        values = self._exact.get(topic, NO_DICT)
        if key not in values:
            return False
        self._exact[topic] = values = without(values, key)
        if not values:
            del self._exact[topic]
        return True

    def _remove(self, topic_filter: str, key: Key) -> bool:
        path: list[tuple[_Node[Key, Value], str]] = []
        node = self._root
        for level in topic_filter.split("/"):
            path.append((node, level))
            found = node.children.get(level)
            if found is None:
                return False
            node = found
        if key not in node.values:
            return False
        node.values = without(node.values, key)
        while path and not node.values and not node.children:
            node, level = path.pop()
            node.children = without(node.children, level)
        return True

    def find(self, topic: str) -> Iterator[tuple[Key, Value]]:
        """Every (key, value) whose filter matches `topic`; one key once per matching filter."""
        for values in self._matching(topic):
            yield from values.items()

    def of(self, key: Key, topic: str) -> Iterator[Value]:
        """The values that this key has for filters that match `topic`; how many others match costs nothing."""
        for values in self._matching(topic):
            if key in values:
                yield values[key]

    def _matching(self, topic: str) -> Iterator[Few[Key, Value]]:
        """What stands at each filter that matches."""
        if (exact := self._exact.get(topic)) is not None:
            yield exact
        levels = topic.split("/")
        nodes = [self._root]
        plain = not topic.startswith("$")
        for number, level in enumerate(levels):
            wild = plain or number > 0
            below: list[_Node[Key, Value]] = []
            for node in nodes:
                children = node.children
                if wild and (rest := children.get("#")) is not None:
                    yield rest.values
                if (same := children.get(level)) is not None:
                    below.append(same)
                if wild and (any_level := children.get("+")) is not None:
                    below.append(any_level)
            nodes = below
            if not nodes:
                return
        for node in nodes:
            if node.values:
                yield node.values
            if (rest := node.children.get("#")) is not None:
                yield rest.values


def _has_wildcard(topic_filter: str) -> bool:
    return "+" in topic_filter or "#" in topic_filter


class TopicTree(Generic[Value]):
    """Maps topic names to values; found again by topic filter, in the number of branches that it matches."""

    def __init__(self) -> None:
        self._root: _Node[None, Value] = _Node()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, topic: str, value: Value) -> None:
        node = self._root
        for level in topic.split("/"):
            found = node.children.get(level)
            if found is None:
                found = _Node()
                node.children = added(node.children, level, found)
            node = found
        self._size += not node.values
        node.values = One(None, value)

    def remove(self, topic: str) -> bool:
        """Take the topic out; whether it was there."""
        path: list[tuple[_Node[None, Value], str]] = []
        node = self._root
        for level in topic.split("/"):
            path.append((node, level))
            found = node.children.get(level)
            if found is None:
                return False
            node = found
        if not node.values:
            return False
        node.values = NO_DICT
        self._size -= 1
        while path and not node.values and not node.children:
            node, level = path.pop()
            node.children = without(node.children, level)
        return True

    def find(self, topic_filter: str) -> Iterator[Value]:
        """The value of every topic that `topic_filter` matches (4.7.1); `$` topics only by a filter that names them."""
        nodes = [self._root]
        for number, wanted in enumerate(topic_filter.split("/")):
            if wanted == "#":
                for node in nodes:
                    yield from _all_values(node, hide_dollar=number == 0)
                return
            if wanted == "+":
                nodes = [
                    child for node in nodes for level, child in node.children.items() if number or not level.startswith("$")
                ]
            else:
                nodes = [node.children[wanted] for node in nodes if wanted in node.children]
        for node in nodes:
            yield from node.values.values()


def _all_values(top: _Node[None, Value], hide_dollar: bool) -> Iterator[Value]:
    yield from top.values.values()
    waiting = [child for level, child in top.children.items() if not (hide_dollar and level.startswith("$"))]
    while waiting:
        node = waiting.pop()
        yield from node.values.values()
        waiting.extend(node.children.values())
