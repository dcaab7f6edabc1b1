"""What the worker and a backend say to each other: operations go down, refusals come back.

A backend is a module `to_<kind>.py` with `actions` (rule -> action), `gap_action`, `connect` and, for people, `show`. An action
is pure: entry in, packed operations out. Only a `Link` touches the wire, and it raises nothing but `NotConnected`, `Rejected`
and `Misconfigured`.

Invariant: a batch holds entries of one (gateway, epoch) only, because the far end keeps one mark for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

from tidegate.store.entry import Entry

from .pools import Pool
from .rule import Rule


class Write(Protocol):
    """One write as its backend made it; the worker never looks inside."""

    @property
    def data(self) -> bytes:
        """What the quarantine keeps of it, and `Link.repack` reads again."""
        ...


class Packed(NamedTuple):
    """One write, encoded for the far end; `arguments` is how many the encoding holds."""

    data: bytes
    arguments: int


Action = Callable[[Entry], Sequence[Write]]


class Shown(NamedTuple):
    """A command or statement as the far end gets it, for a person to read. Without `statement` the values are the command."""

    statement: str
    """Text with markers where the values are bound."""
    values: Sequence[object]
    condition: str = ""
    """What must be so at the far end, else it is left out."""


class Operation(NamedTuple):
    """One write of one entry; `number` counts the operations of its entry, `target` names the rule."""

    seq: int
    number: int
    target: str
    packed: Write


class Mark(NamedTuple):
    """How far an epoch stands at the far end: all through `seq`, and `done` operations of what comes after."""

    seq: int = 0
    done: int = 0


class Batch(NamedTuple):
    """What is applied at once: the operations, and the mark's way from `expected` to `through`."""

    gateway: str
    epoch: int
    expected: Mark
    through: int
    operations: Sequence[Operation]


class Refusal(NamedTuple):
    """The far end refused operation `number` of the entry `seq`; everything else of the batch is applied."""

    epoch: int
    seq: int
    number: int
    reason: str
    original: bytes = b""
    """What was refused, as the far end noted it: the rules may have changed since. Empty from who does not note it."""


Meanwhile = Callable[[], None]


def nothing() -> None:
    """There is nothing to do meanwhile."""


class Link(Protocol):
    """A connection to a far end."""

    warning: str
    """What a person should know about how this link works, empty if nothing."""
    largest: int
    """Entries that a batch may have: what the far end likes best."""
    whole: bool
    """Whether a batch whose mark did not move left nothing there."""

    def marks(self, gateway: str) -> dict[int, Mark] | None:
        """Epoch -> mark, as the far end has it; None when it keeps none, then a batch may be applied twice."""
        ...

    def refusals(self, gateway: str) -> list[Refusal]:
        """Refusals noted beside the mark whose answer may have been lost."""
        ...

    def settle(self, gateway: str, refusals: Collection[Refusal]) -> None:
        """These refusals are in quarantine here: the far end may forget them."""
        ...

    def write(self, batch: Batch, meanwhile: Meanwhile = nothing) -> list[Refusal] | None:
        """Apply the batch and move the mark; None when the mark was not where expected and nothing was done.

        `meanwhile` may be called once, while the far end is at work and its answer is not there yet."""
        ...

    def repack(self, data: bytes) -> Write:
        """A write as the quarantine keeps it, ready to be sent again."""
        ...

    def fileno(self) -> int:
        """What becomes readable when the far end goes away while nothing is asked; -1 if nothing does."""
        ...

    def gone(self) -> bool:
        """Whether it has: asked only while no answer is awaited."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """The module of a far end."""

    def actions(self, rule: Rule, node: str) -> Action:
        """What the rule does to an entry."""
        ...

    def gap_action(self) -> Action:
        """How a gap record is written."""
        ...

    def connect(self, pool: Pool) -> Link: ...


class Showing(Backend, Protocol):
    """A backend that can say what its writes are."""

    def show(self, packed: Any, pool: Pool) -> Sequence[Shown]:
        """The commands or statements of one write, as this pool would get them."""
        ...
