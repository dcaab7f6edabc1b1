"""More bugs planted on purpose: in the change of rules, in wills, expiries, sizes and windows; some were real once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tidegate.gateway.session import Client, Session
from tidegate.store.entry import Entry
from tidegate.uplink import child
from tidegate.uplink.backend import Link, Mark, Operation, Refusal
from tidegate.uplink.pools import Pool
from tidegate.uplink.progress import Progress
from tidegate.uplink.rule import RuleFile
from tidegate.uplink.stretch import Key, Stretch, Stretches
from tidegate.uplink.worker import Wait, Worker

from tests.broker.world import World

from .model import Model
from .plants import spoilt
from .simulation import Box, Simulation
from .trimming import TrimmedSimulation, TrimmedUplink
from .uplink import Uplink


class ImpatientWorker(Worker):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._standing = self._standing._replace(cursor=self._log.bounds()[1])


class ChangeSkipsWaiting(Simulation):
    """A start of the uplink, for new rules too, begins at the end of the log."""

    worker_type = ImpatientWorker


class DeafUplink(Uplink):
    def tell(self, box: World) -> None:
        due = self.due
        super().tell(box)
        self.due = due


class ChangeReachesOnlyTheBroker(Simulation):
    """The uplink goes on by the rules it read at its start."""

    uplink_type = DeafUplink


class ForgettingUplink(TrimmedUplink):
    def start(self) -> None:
        def only_what_is_read(rule_file: RuleFile, progress: Progress) -> list[tuple[RuleFile, Pool]]:
            return [(rule_file, pool) for pool in rule_file.pools] or pools(rule_file, progress)

        pools = child._pools
        with spoilt(child, "_pools", only_what_is_read):
            super().start()


class MistakeForgetsPool(TrimmedSimulation):
    """Of a file with a mistake only the pools are kept that can be read."""

    uplink_type = ForgettingUplink


class RereadingWorker(Worker):
    def _refused(self, refusal: Refusal, entry: Entry | None) -> Operation | None:
        return super()._refused(refusal._replace(original=b""), entry)


class RefusedByNewRules(Simulation):
    """What was refused is looked up in the rules that are in force when the refusal is heard of."""

    worker_type = RereadingWorker


class CarefreeWorker(Worker):
    def _carry(self, link: Link) -> Wait:
        self._begun = 0
        return super()._carry(link)


class PassedOverComesLate(Simulation):
    """What the rules passed over is looked at again after a crash, though later epochs have been carried."""

    worker_type = CarefreeWorker

    def weights(self) -> tuple[list[Callable[[], None]], list[int]]:
        """It shows only where rules change and the child is killed before its cursor is saved."""
        steps, weights = super().weights()
        often = (self._restart_uplink, self._edit_rules, self._reload)
        return steps, [weight * 6 if step in often else weight for step, weight in zip(steps, weights, strict=True)]


class TrustingStretches(Stretches):
    def next(self, after: int, limit: int, marks: Mapping[Key, Mark], begun: int, whole: bool) -> Stretch | None:
        return self._ahead or super().next(after, limit, marks, begun, whole)


class TrustingWorker(Worker):
    def _carry(self, link: Link) -> Wait:
        self._stretches.__class__ = TrustingStretches
        return super()._carry(link)


class MadeReadyIsSent(Simulation):
    """What was made ready while a batch was on its way is sent whatever became of that."""

    worker_type = TrustingWorker


def box_with(spoil: Callable[[Box], None]) -> type[Box]:
    """A gateway with something of it spoilt in each of its lives."""

    class Spoilt(Box):
        def __init__(self, path: Path, model: Model, wall: int, mono: int) -> None:
            super().__init__(path, model, wall, mono)
            spoil(self)

    return Spoilt


def _always_with_will(box: Box) -> None:
    detach = box.broker.connecting.detach

    def with_will(client: Client, with_will: bool) -> None:
        detach(client, with_will=True)

    box.broker.connecting.detach = with_will  # type: ignore[method-assign]


class WillAfterDisconnect(Simulation):
    """A will is published although its client said good-bye."""

    box_type = box_with(_always_with_will)


def _never_settled(box: Box) -> None:
    box.broker.connecting.wills.settle = lambda session, publish: None  # type: ignore[method-assign]


class WillOfWhoIsBack(Simulation):
    """A delayed will is published although its client came back in time."""

    box_type = box_with(_never_settled)


def _never_expired(box: Box) -> None:
    box.broker.delivery._expired = lambda properties, at, mono, run: False  # type: ignore[method-assign]


class ExpiredIsSent(Simulation):
    """Messages are sent after their expiry."""

    box_type = box_with(_never_expired)


def _never_too_large(box: Box) -> None:
    box.broker.delivery._too_large = lambda client, head, tail: False  # type: ignore[method-assign]


class LargeIsSent(Simulation):
    """Packets are sent that their client does not take."""

    box_type = box_with(_never_too_large)


def _for_ever(box: Box) -> None:
    box.broker.sessions.expired = lambda now: []  # type: ignore[method-assign]


class SessionNeverEnds(Simulation):
    """Sessions outlive their expiry."""

    box_type = box_with(_for_ever)


def _half(box: Box) -> None:
    sleep = box.broker.sessions.sleep

    def short(session: Session, live: int, now: float) -> None:
        sleep(session, live, now - session.expiry / 2)

    box.broker.sessions.sleep = short  # type: ignore[method-assign]


class SessionEndsEarly(Simulation):
    """Sessions end in half of their time."""

    box_type = box_with(_half)


def _one_more(box: Box) -> None:
    attach = box.broker.connecting._attach

    def generous(client: Client, session: Session, packet: Any) -> None:
        attach(client, session, packet)
        session.window += 1

    box.broker.connecting._attach = generous  # type: ignore[method-assign]


class OneMoreThanTheWindow(Simulation):
    """One message more is in flight than the client takes."""

    box_type = box_with(_one_more)


MORE_PLANTS = (
    ChangeSkipsWaiting, ChangeReachesOnlyTheBroker, MistakeForgetsPool, RefusedByNewRules, PassedOverComesLate,
    MadeReadyIsSent,
    WillAfterDisconnect, WillOfWhoIsBack, ExpiredIsSent, LargeIsSent, SessionNeverEnds, SessionEndsEarly, OneMoreThanTheWindow,
)  # fmt: skip
