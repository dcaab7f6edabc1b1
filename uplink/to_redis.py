"""Redis as a far end: a link to one server, single or the master of sentinels, to which a batch is one script.

A server that allows us no script gets WATCH and MULTI instead (`redis_multi.py`); a cluster is another link
(`redis_cluster.py`).

Invariant: a link that raised NotConnected is not used again; the worker closes it and makes another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from .backend import Batch, Link, Mark, Meanwhile, Packed, Refusal, Shown, nothing
from .pools import Pool
from .redis_actions import actions, coalesced, gap_action, pack, unpack
from .redis_answers import answers, forbids_scripts, is_ours, meaning_of_ours
from .redis_asking import connect_asker
from .redis_ledger import Ledger, mark_text
from .redis_multi import plain_commands, write_in_transaction
from .redis_script import BATCH
from .redis_wire import Wire
from .redis_wire import connect as connect_wire

__all__ = ["actions", "connect", "connect_asker", "gap_action", "show"]

_NO_SCRIPTS = "no right to run scripts: batches go through WATCH and MULTI, which is slower"


def connect(pool: Pool) -> Link:
    """Open a connection. Raises NotConnected or Misconfigured."""
    if pool.settings["type"] == "cluster":
        from .redis_cluster import ClusterLink

        return ClusterLink(pool)
    return RedisLink(connect_wire(pool), pool)


def show(packed: Packed, pool: Pool) -> Sequence[Shown]:
    """See `backend.Showing`: every pool gets the same commands."""
    return plain_commands(packed)


class RedisLink:
    """See `backend.Link`."""

    largest = 1000
    whole = True

    def __init__(self, wire: Wire, pool: Pool) -> None:
        self.warning = ""
        self._wire = wire
        self._knows_script = False
        self._pool = pool
        self._ledger = Ledger(pool.name, self._ask, tagged=False)

    def marks(self, gateway: str) -> dict[int, Mark]:
        return self._ledger.marks(gateway)

    def refusals(self, gateway: str) -> list[Refusal]:
        return self._ledger.refusals(gateway)

    def settle(self, gateway: str, refusals: Collection[Refusal]) -> None:
        self._ledger.settle(gateway, refusals)

    def write(self, batch: Batch, meanwhile: Meanwhile = nothing) -> list[Refusal] | None:
        batch = batch._replace(operations=coalesced(batch.operations))
        ledger, refused = self._ledger.key(batch.gateway), self._ledger.refused_key(batch.gateway)
        with answers(self._pool, self._wire.address):
            if self.warning:
                return write_in_transaction(self._wire.exchange, ledger, refused, batch, is_ours)
            try:
                reply = self._run_script(ledger, refused, batch, meanwhile)
            except (NoPermissionError, ResponseError) as error:
                if not forbids_scripts(error):
                    raise
                self.warning = _NO_SCRIPTS
                return write_in_transaction(self._wire.exchange, ledger, refused, batch, is_ours)
        return self._read_reply(reply, batch)

    def repack(self, data: bytes) -> Packed:
        return Packed(data, len(unpack(Packed(data, 0))))

    def fileno(self) -> int:
        return self._wire.fileno()

    def gone(self) -> bool:
        return self._wire.gone()

    def close(self) -> None:
        self._wire.close()

    def _run_script(self, ledger: bytes, refused: bytes, batch: Batch, meanwhile: Meanwhile) -> Any:
        references = " ".join([f"{operation.seq}:{operation.number}" for operation in batch.operations])
        head = (ledger, refused, b"%d" % batch.epoch, mark_text(batch.expected), b"%d" % batch.through, references.encode())
        # What comes back here is what `redis_actions` made.
        packed = cast(list[Packed], [operation.packed for operation in batch.operations])
        body = b"".join([one.data for one in packed])
        count = sum([one.arguments for one in packed]) + len(head) + 3
        tail = b"$1\r\n2\r\n" + pack(head)
        if self._knows_script:
            try:
                return self._wire.send(b"*%d\r\n" % count + pack((b"EVALSHA", BATCH.sha)) + tail + body, meanwhile)
            except NoScriptError:
                pass
        reply = self._wire.send(b"*%d\r\n" % count + pack((b"EVAL", BATCH.source)) + tail + body)
        self._knows_script = True
        return reply

    def _ask(self, *command: bytes) -> Any:
        with answers(self._pool, self._wire.address):
            return self._wire.ask(*command)

    def _read_reply(self, reply: list[Any], batch: Batch) -> list[Refusal] | None:
        status = reply[0]
        if status == b"moved":
            return None
        if status == b"stopped":
            raise meaning_of_ours(reply[2].decode(errors="replace"), self._pool)
        return [
            Refusal(batch.epoch, operation.seq, operation.number, reason.decode(errors="replace"), operation.packed.data)
            for number, reason in zip(reply[1::2], reply[2::2], strict=True)
            for operation in (batch.operations[number - 1],)
        ]
