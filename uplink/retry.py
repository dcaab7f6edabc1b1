"""Sending a quarantined record again, once: its own batch of one write, with a mark of its own at the far end.

The mark is the ledger's: gateway `GATEWAY.retry`, and for the epoch the random number that the retry was given. So the same
compare-and-set that keeps a batch from being applied twice keeps a retry from it, whatever is killed or lost between.

Invariant: a row leaves the quarantine only after the far end has its mark and no refusal noted beside it.
"""

from __future__ import annotations

from typing import NamedTuple

from .backend import Batch, Link, Mark, Operation, Refusal
from .errors import Rejected

SUFFIX = ".retry"
"""Makes of a gateway's id the name under which its retries are marked."""


class Due(NamedTuple):
    """A row that waits to be sent again; `attempt` is its mark's name at the far end."""

    id: int
    gateway: str
    attempt: int
    target: str
    data: bytes


def send_again(link: Link, due: Due) -> Refusal | None:
    """Send it, or learn that it has arrived; the refusal if it was refused again. Raises NotConnected, Misconfigured."""
    operation = Operation(1, 0, due.target, link.repack(due.data))
    try:
        refusals = link.write(Batch(_name(due), due.attempt, Mark(), 1, (operation,)))
    except Rejected as error:
        return Refusal(due.attempt, 1, 0, error.rows.get(0, str(error)))
    if refusals is None:
        refusals = [refusal for refusal in link.refusals(_name(due)) if refusal.epoch == due.attempt]
    return refusals[0] if refusals else None


def settle_again(link: Link, due: Due, refusal: Refusal) -> None:
    """The refusal is saved here: the far end may forget it."""
    link.settle(_name(due), [refusal])


def _name(due: Due) -> str:
    return due.gateway + SUFFIX
