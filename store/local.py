"""What the rules of `emqx_backend_sqlite.conf` ask of the broker itself: the functions whose far end is the box's own log.

The broker knows no rule files: `uplink.local` reads them into these values. A rule's filter is matched against a message's
topic, or against a subscription's filter taken as if it were a topic, so `queue/#` means `queue/+` and not `#`.

Invariant: `NO_RULES`, the default, asks for nothing, and then the broker does nothing beyond MQTT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .topic import filters_overlap, matches, without_share

PUBSUB, QUEUE, TOLD = 1, 2, 4
"""What an acknowledgement does: moves the client's position; takes the message away for everyone; moves the position that far
ends are told."""


class FetchRule(NamedTuple):
    """Stored messages for a new subscription. `limit` 0: as many as there are; `span` in ms."""

    topic_filter: str
    queue: bool
    limit: int
    span: int
    window_first: bool
    """Whether a client without a position gets the window, or nothing."""


class Keep(NamedTuple):
    """Messages that count as stored: of this filter, up to an age in ms."""

    topic_filter: str
    age: int
    every_qos: bool = False
    """QoS 0 as well."""


@dataclass(frozen=True, slots=True)
class LocalRules:
    """All rules of the file, in the order of their numbers."""

    lookup_new: bool = False
    """`on_subscribe_lookup` when a session is created."""
    lookup_always: bool = False
    """`on_subscribe_lookup` at every connect."""
    pools_new: frozenset[str] = frozenset()
    pools_always: frozenset[str] = frozenset()
    """The same for what far ends are known to have, by pool."""
    retained: tuple[str, ...] = ()
    """Filters of which far ends are asked for retained messages: an older one must not come back to life."""
    fetches: tuple[FetchRule, ...] = ()
    acks: tuple[tuple[str, int], ...] = ()
    """(filter, PUBSUB or QUEUE)."""
    forgets: tuple[str, ...] = ()
    """Filters of `on_acked_delete`."""
    keeps: tuple[Keep, ...] = ()

    @property
    def lookup(self) -> bool:
        return self.lookup_new or self.lookup_always

    def looks_up(self, source: str, new: bool) -> bool:
        """Whether rows from there become subscriptions at the connect of a session, a `new` one or not."""
        if not source:
            return self.lookup_always or (new and self.lookup_new)
        return source in self.pools_always or (new and source in self.pools_new)

    def fetch_for(self, topic_filter: str) -> FetchRule | None:
        """The rule for a new subscription. Of several the first; one to one before one to many."""
        name = without_share(topic_filter)
        found = [rule for rule in self.fetches if _concerns(rule.topic_filter, name)]
        return min(found, key=lambda rule: not rule.queue, default=None)

    def ack_of(self, topic: str) -> int:
        """PUBSUB, QUEUE, both (3) or 0."""
        done = 0
        for topic_filter, what in self.acks:
            if _concerns(topic_filter, topic):
                done |= what
        return done

    def forgets_position(self, topic_filter: str) -> bool:
        name = without_share(topic_filter)
        return any(_concerns(rule, name) for rule in self.forgets)

    def asks_retained(self, topic: str) -> bool:
        return any(not text or filters_overlap(text, topic) for text in self.retained)

    def age_of(self, topic: str) -> int:
        """How long (ms) messages of the topic are kept for fetching, 0 when no rule stores them."""
        return max((keep.age for keep in self.keeps if _concerns(keep.topic_filter, topic)), default=0)

    def keeps_qos0(self, topic: str) -> bool:
        return any(keep.every_qos and _concerns(keep.topic_filter, topic) for keep in self.keeps)


NO_RULES = LocalRules()


def _concerns(topic_filter: str, name: str) -> bool:
    """A rule without a filter is about every name, those that begin with `$` too."""
    return not topic_filter or matches(topic_filter, name)
