"""Topic names and topic filters: validity and matching.

Rules of MQTT 3.1.1 and 5.0, section 4.7. Everything here works on text that is already valid UTF-8. A filter that
begins with a wildcard never matches a topic that begins with `$` [MQTT-4.7.2-1]. `FilterTree` answers "which values
belong to filters that match this topic" in the number of levels, not in the number of filters.

A tree has a node only where values stand or ways part (and before a `#`): a way of two hundred levels that nobody shares is one
node, or a stranger's deep topics would cost a hundred times their bytes, and as many steps for each publish.

Invariant: a tree never holds an empty branch; removing the last value of a filter removes its nodes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import accumulate
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
    """Children by the first level of what leads to them; `rest` is what follows of it, each level after a slash."""

    __slots__ = ("children", "rest", "values")

    def __init__(self, rest: str = "") -> None:
        self.children: Few[str, _Node[Key, Value]] = NO_DICT
        self.rest = rest
        self.values: Few[Key, Value] = NO_DICT


def _grow(root: _Node[Key, Value], text: str) -> _Node[Key, Value]:
    """The node of this topic or filter, made if it is not there. A last `#` is always a node of its own."""
    levels = text.split("/")
    node, number, end = root, 0, len(levels) - (levels[-1] == "#")
    while number < end:
        child = node.children.get(levels[number])
        if child is None:
            child = _Node("".join(["/" + level for level in levels[number + 1 : end]]))
            node.children = added(node.children, sys.intern(levels[number]), child)
            node = child
            break
        have = child.rest.split("/")[1:]
        common = 0
        while common < len(have) and number + 1 + common < end and have[common] == levels[number + 1 + common]:
            common += 1
        if common < len(have):
            child = _part(node, levels[number], child, have, common)
        node, number = child, number + 1 + common
    if end == len(levels):
        return node
    found = node.children.get("#")
    if found is None:
        found = _Node()
        node.children = added(node.children, "#", found)
    return found


def _part(node: _Node[Key, Value], level: str, child: _Node[Key, Value], have: list[str], common: int) -> _Node[Key, Value]:
    """A node between these two, after so many levels of what leads from one to the other."""
    between: _Node[Key, Value] = _Node("".join(["/" + level for level in have[:common]]))
    child.rest = "".join(["/" + level for level in have[common + 1 :]])
    between.children = One(sys.intern(have[common]), child)
    node.children = added(node.children, level, between)
    return between


def _way(root: _Node[Key, Value], text: str) -> list[tuple[_Node[Key, Value], str]]:
    """The nodes to the one of this topic or filter, each with the level it is found by; none if it is not there."""
    way, node, number, levels = [(root, "")], root, 0, text.split("/")
    while number < len(levels):
        child = node.children.get(levels[number])
        if child is None:
            return []
        after = number + 1 + child.rest.count("/")
        if child.rest and child.rest.split("/")[1:] != levels[number + 1 : after]:
            return []
        way.append((child, levels[number]))
        node, number = child, after
    return way


def _prune(way: list[tuple[_Node[Key, Value], str]]) -> None:
    """The last node of the way has lost its values: what is empty goes, and what parts nothing any more is joined."""
    node, level = way.pop()
    while way and not node.values and not node.children:
        above, level_above = way.pop()
        above.children = without(above.children, level)
        node, level = above, level_above
    if way:
        _join(way[-1][0], level, node)


def _join(above: _Node[Key, Value], level: str, node: _Node[Key, Value]) -> None:
    """What only leads on to one other becomes a part of the way to it."""
    if node.values or len(node.children) != 1 or "#" in node.children:
        return
    ((key, child),) = node.children.items()
    child.rest = f"{node.rest}/{key}{child.rest}"
    above.children = added(above.children, level, child)


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
        node = _grow(self._root, topic_filter)
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
        way = _way(self._root, topic_filter)
        if not way or key not in way[-1][0].values:
            return False
        node = way[-1][0]
        node.values = without(node.values, key)
        if not node.values:
            _prune(way)
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
        ends = list(accumulate([1 + len(level) for level in levels], initial=-1))
        waiting = [(self._root, 0)]
        while waiting:
            node, number = waiting.pop()
            children = node.children
            wild = number or not topic.startswith("$")
            if wild and (rest := children.get("#")) is not None:
                yield rest.values
            if number == len(levels):
                if node.values:
                    yield node.values
                continue
            for level in (levels[number], "+") if wild else (levels[number],):
                if (child := children.get(level)) is not None:
                    after = number + 1 + child.rest.count("/")
                    if not child.rest or _leads(child.rest, topic, levels[number + 1 : after], ends[number + 1]):
                        waiting.append((child, after))


def _leads(rest: str, topic: str, levels: list[str], at: int) -> bool:
    """Whether these levels of the topic, from character `at` on, are as `rest` wants them."""
    if "+" not in rest:
        end = at + len(rest)
        return topic.startswith(rest, at) and (end == len(topic) or topic[end] == "/")
    wanted = rest.split("/")
    return len(wanted) == len(levels) + 1 and _same(wanted[1:], levels)


def _same(wanted: list[str], levels: list[str]) -> bool:
    """Whether the levels are as wanted, as far as both go."""
    return all(want == level or want == "+" for want, level in zip(wanted, levels, strict=False))


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
        node = _grow(self._root, topic)
        self._size += not node.values
        node.values = One(None, value)

    def remove(self, topic: str) -> bool:
        """Take the topic out; whether it was there."""
        way = _way(self._root, topic)
        if not way or not way[-1][0].values:
            return False
        way[-1][0].values = NO_DICT
        self._size -= 1
        _prune(way)
        return True

    def find(self, topic_filter: str) -> Iterator[Value]:
        """The value of every topic that `topic_filter` matches (4.7.1); `$` topics only by a filter that names them."""
        wanted = topic_filter.split("/")
        waiting = [(self._root, 0)]
        while waiting:
            node, number = waiting.pop()
            if number == len(wanted):
                yield from node.values.values()
            elif wanted[number] == "#":
                yield from _all_values(node, hide_dollar=number == 0)
            else:
                for child in _children(node, wanted[number], hide_dollar=number == 0):
                    have = child.rest.split("/")[1:]
                    after = number + 1 + len(have)
                    follows = wanted[number + 1 : after]
                    if "#" in follows:
                        if _same(follows[:-1], have):
                            yield from _all_values(child, hide_dollar=False)
                    elif len(follows) == len(have) and _same(follows, have):
                        waiting.append((child, after))


def _children(node: _Node[None, Value], level: str, hide_dollar: bool) -> list[_Node[None, Value]]:
    if level == "+":
        return [child for name, child in node.children.items() if not (hide_dollar and name.startswith("$"))]
    child = node.children.get(level)
    return [] if child is None else [child]


def _all_values(top: _Node[None, Value], hide_dollar: bool) -> Iterator[Value]:
    yield from top.values.values()
    waiting = [child for level, child in top.children.items() if not (hide_dollar and level.startswith("$"))]
    while waiting:
        node = waiting.pop()
        yield from node.values.values()
        waiting.extend(node.children.values())
