"""The worker of one pool: read entries after the cursor, make operations, write one batch with its mark, move the cursor.

Back-off, batching, halving, quarantine and log limits live here; the backend only knows its far end. Clock, jitter, log,
progress and the way to connect are arguments, and `step` does one thing and says how long to wait, so a simulation can
drive it. The mark at the far end is the truth: it is read on every connect; entries at or below it are skipped, and when it
is behind what was confirmed, the far end lost data and the cursor goes back to it.

Invariant: the cursor moves past an entry only when the far end's mark has, or the entry means nothing to this pool.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from tidegate.store.entry import Entry
from tidegate.store.report import INFO, WARNING, Say
from tidegate.store.schema import StoreError

from .backend import Batch, Link, Mark, Operation, Packed, Refusal
from .balance import Tally, named_by
from .errors import Misconfigured, NotConnected, Rejected
from .pace import Pace
from .plan import Plan
from .progress import Quarantined, Standing
from .rarely import Rarely
from .retry import Due, send_again, settle_again
from .stretch import Log as StretchLog
from .stretch import Stretch, Stretches

FIRST_BATCH = 100
QUICK, SLOW = 0.5, 2.0
"""Seconds: a batch answered faster may grow, one answered slower shrinks."""
FIRST_BACK_OFF, MAX_BACK_OFF = 0.1, 5.0
MISCONFIGURED_WAIT = 60.0
CHANGED_RULE = "a rule that was changed since"
SAVE_EVERY = 1.0


class Wait(NamedTuple):
    """How long to wait before the next `step`: for ever if None; `for_news` ends it early when entries come."""

    seconds: float | None
    for_news: bool


GO_ON = Wait(0.0, True)


class Log(StretchLog, Protocol):
    """What the worker needs of `store.reader.LogReader`."""

    def births(self) -> list[tuple[str, int, int]]: ...
    def bounds(self) -> tuple[int, int]: ...
    def beginning(self) -> int: ...


class Book(Protocol):
    """What the worker needs of `progress.Progress`."""

    def standing(self, pool: str) -> Standing: ...
    def marks(self, pool: str) -> dict[tuple[str, int], int]: ...
    def save(self, pool: str, standing: Standing, marks: dict[tuple[str, int], int], at: int) -> None: ...
    def quarantine(self, pool: str, rows: Sequence[Quarantined], at: int) -> int: ...
    def due(self, pool: str) -> Due | None: ...
    def sent(self, due: Due) -> None: ...
    def refused_again(self, due: Due, reason: str, at: int) -> None: ...


class Clock(Protocol):
    """Seconds that never go back, and the time of day in ms."""

    def monotonic(self) -> float: ...
    def wall(self) -> int: ...


class Worker:
    """See the module. `step` until told to stop, then `stop`."""

    def __init__(
        self,
        pool: str,
        plan: Plan,
        connect: Callable[[], Link],
        log: Log,
        book: Book,
        clock: Clock,
        say: Say,
        chance: random.Random,
    ) -> None:
        self._pool = pool
        self._plan = plan
        self._connect_to = connect
        self._log = log
        self._book = book
        self._clock = clock
        self._say = say
        self._chance = chance
        self._link: Link | None = None
        self._limit = FIRST_BATCH
        self._back_off = FIRST_BACK_OFF
        self._marks: dict[tuple[str, int], Mark] = {}
        self._keeps_marks = True
        self._confirmed = book.marks(pool)
        self._moved: dict[tuple[str, int], int] = {}
        self._begun = 0
        """Entries before this one are done with, because an epoch that began later has a mark. What the rules of then passed
        over left none, and must not come after it when the rules have changed and the cursor was not saved."""
        self._tally = Tally()
        self._stretches = Stretches(plan, log)
        self._standing = book.standing(pool)._replace(state="starting", error="", hint="", rate=0.0)
        self._saved = self._standing._replace(state="")
        self._saved_at = float("-inf")
        self._say_rarely = Rarely(say, clock.monotonic)
        self._told_lost = False
        self._retry_after = float("-inf")
        self._pace = Pace(clock.monotonic)
        if not self._standing.cursor:
            self._account_begins()
        self._hold_before_lost_tail()
        self._save()

    def step(self) -> Wait:
        """Do one thing: connect, or carry one batch. Never raises for what a far end does."""
        try:
            if self._link is None:
                self._connect()
                return GO_ON
            due = self._book.due(self._pool)
            if due is not None and self._clock.monotonic() >= self._retry_after:
                self._send_again(self._link, due)
                return GO_ON
            wait = self._carry(self._link)
            return wait if due is None or wait.seconds is not None else Wait(MAX_BACK_OFF, True)
        except (NotConnected, Rejected) as error:
            # Refused, but no record: an error that we do not know, when we connected or asked for our own rows.
            return self._lost(str(error))
        except Misconfigured as error:
            return self._refused_because_of_us(error)

    @property
    def fileno(self) -> int:
        """Becomes readable when the far end goes away; -1 without one."""
        return self._link.fileno() if self._link is not None else -1

    def stop(self) -> None:
        """Save where we are and let go of the far end."""
        self._drop_link()
        self._standing = self._standing._replace(state="stopped", rate=0.0)
        self._save()

    def _account_begins(self) -> None:
        account = self._standing.account
        self._standing = self._standing._replace(account=account._replace(solid=max(account.solid, self._log.beginning())))

    def _go_back(self, back: int, lost_tail: bool = False) -> None:
        standing = self._standing
        account = standing.account.gone_back(standing.cursor, back, lost_tail)
        self._standing = standing._replace(cursor=back, account=account)

    def _hold_before_lost_tail(self) -> None:
        """A log that lost its tail begins a new epoch at numbers the cursor may have passed: go back before them."""
        births = self._log.births()
        mine = [number for number, (gateway, epoch, _) in enumerate(births) if (gateway, epoch) == self._standing[5:7]]
        first = [seq for _, _, seq in (births[mine[-1] + 1 :] if mine else births)]
        if first and min(first) <= self._standing.cursor:
            self._go_back(min(first) - 1, lost_tail=True)

    def _connect(self) -> None:
        self._link = link = self._connect_to()
        gateways = dict.fromkeys(gateway for gateway, _, _ in self._log.births())
        self._marks = {}
        for gateway in gateways:
            self._marks |= self._read_marks(link, gateway)
            self._settle(link, gateway, link.refusals(gateway))
        self._go_back_to_marks()

    def _read_marks(self, link: Link, gateway: str) -> dict[tuple[str, int], Mark]:
        """The gateway's marks. A far end that keeps none confirms none, so it is not taken for one that lost them later."""
        marks = link.marks(gateway)
        self._keeps_marks = marks is not None
        if marks is None:
            # Nor has it lost what it confirmed when it kept some: an empty ledger that is made later is no older state.
            for key in [key for key in self._confirmed if key[0] == gateway]:
                del self._confirmed[key]
                self._moved[key] = 0
        return {(gateway, epoch): mark for epoch, mark in (marks or {}).items()}

    def _well(self, link: Link) -> None:
        """Connected is who got something through or has nothing to send; a server may answer and still refuse to write."""
        before = self._standing
        if before.state == "connected" and before.warning == link.warning:
            return
        if link.warning and before.warning != link.warning:
            self._say("pool_warning", link.warning, WARNING)
        if self._told_lost:
            # Whoever read of the loss is told of its end; of a link that flaps both are held back.
            self._told_lost = False
            self._say("pool_connected", "connected again")
        if before.state != "connected":
            self._say_rarely.well()
        self._back_off = FIRST_BACK_OFF
        self._standing = before._replace(state="connected", error="", hint="", warning=link.warning)
        self._save()

    def _go_back_to_marks(self) -> None:
        """Where the far end stands behind what it confirmed it lost data: send again what the log still holds."""
        firsts: dict[tuple[str, int], int] = {}
        for gateway, epoch, seq in self._log.births():
            firsts.setdefault((gateway, epoch), seq)
        # A mark below the epoch's first entry is that of a lost life which had the same number.
        marked = [seq for key, seq in firsts.items() if (mark := self._marks.get(key)) and (mark.seq >= seq or mark.done)]
        self._begun = max(marked, default=0)
        is_behind = False
        low, _ = self._log.bounds()
        for key, confirmed in self._confirmed.items() if self._keeps_marks else ():
            far = self._marks.get(key, Mark()).seq
            if far >= confirmed or key not in firsts or confirmed < low:
                continue
            back = max(far, firsts[key] - 1)
            self._begun = min(self._begun, firsts[key])
            text = "the far end lost what it had confirmed: sending again from where it stands"
            self._say_rarely("pool_set_back", text, stands=far, confirmed=confirmed)
            if back < self._standing.cursor:
                self._go_back(back)
                self._standing = self._standing._replace(gateway=key[0], epoch=key[1])
            self._confirmed[key] = self._moved[key] = far
            is_behind = True
        if is_behind:
            self._save()  # before anything is sent again: told a second time, it would come after what follows it now

    def _carry(self, link: Link) -> Wait:
        """One read of the log, and what it holds for us as one batch."""
        stretch = self._stretches.next(self._standing.cursor, self._limit, self._marks, self._begun, link.tried)
        if stretch is None:
            return self._rest(link)
        key, mark, entries = stretch.key, stretch.mark, stretch.entries
        arrived = self._arrived(self._confirmed.get(key, 0), entries, mark)
        self._pace.begins(stretch.is_full)
        self._tally = Tally(len(entries), arrived + stretch.wanted, named_by(entries), stretch.left_out)
        if stretch.operations:
            self._write(link, Batch(*key, mark, stretch.through, stretch.operations, stretch.tries), stretch)
        else:
            if self._keeps_marks and mark.seq > self._confirmed.get(key, 0):
                self._confirmed[key] = self._moved[key] = min(mark.seq, entries[-1].seq)
            self._move(key, stretch.through)
        return GO_ON

    def _arrived(self, confirmed: int, entries: Sequence[Entry], mark: Mark) -> int:
        """Entries that the far end has without our having heard so: their answer was lost."""
        if mark.seq <= confirmed:
            return 0
        return self._plan.ask([entry for entry in entries if confirmed < entry.seq <= mark.seq]).wanted

    def _write(self, link: Link, batch: Batch, stretch: Stretch) -> None:
        look_ahead = partial(self._stretches.look_ahead, stretch, self._limit, self._marks, self._begun, link.tried)
        started = self._clock.monotonic()
        try:
            refusals = link.write(batch, look_ahead)
        except Rejected as error:
            if error.rows:
                self._set_aside(link, batch, error.rows, stretch)
            else:
                self._halve(link, batch, str(error), stretch)
            return
        if refusals is None:
            self._look_again(link, batch.gateway)
            return
        self._settle(link, batch.gateway, refusals)
        self._applied(link, batch)
        self._adapt(len(stretch.entries), link.largest, self._clock.monotonic() - started)

    def _send_again(self, link: Link, due: Due) -> None:
        """A record from quarantine, because a person asked for it; what waits in the log follows."""
        refusal = send_again(link, due)
        try:
            if refusal is None:
                self._book.sent(due)
            else:
                self._book.refused_again(due, refusal.reason, self._clock.wall())
                settle_again(link, due, refusal)
        except StoreError as error:
            # The far end knows it: asked again later, nothing arrives twice.
            self._retry_after = self._clock.monotonic() + MAX_BACK_OFF
            self._say_rarely("retry_not_saved", "what became of a retried record cannot be saved", reason=error)
            return
        if refusal is None:
            self._say_rarely("retry_arrived", "a retried record arrived", INFO, record=due.id)
        else:
            self._say_rarely("retry_refused", "a retried record was refused again", record=due.id, reason=refusal.reason)

    def _look_again(self, link: Link, gateway: str) -> None:
        """Our own late tail, or an answer we did not get: the far end knows better how far we are."""
        others = {key: mark for key, mark in self._marks.items() if key[0] != gateway}
        self._marks = others | self._read_marks(link, gateway)

    def _applied(self, link: Link, batch: Batch) -> None:
        key = (batch.gateway, batch.epoch)
        self._marks[key] = Mark(batch.through)
        if self._keeps_marks:
            self._confirmed[key] = self._moved[key] = batch.through
        self._move(key, batch.through)
        self._well(link)

    def _halve(self, link: Link, batch: Batch, reason: str, stretch: Stretch) -> None:
        """Something in the batch is refused: half of it next, and an entry that stands alone goes to quarantine."""
        if len(stretch.entries) > 1:
            self._limit = max(1, len(stretch.entries) // 2)
        else:
            self._set_aside(link, batch, dict.fromkeys(range(len(batch.operations)), reason), stretch)

    def _set_aside(self, link: Link, batch: Batch, rows: Mapping[int, str], stretch: Stretch) -> None:
        """These operations go to quarantine, and the batch is sent without them."""
        nothing = batch._replace(operations=(), through=batch.expected.seq)
        try:
            moved = link.write(nothing) if not batch.expected.done else []
        except Rejected as error:
            raise Misconfigured(
                f"the far end refuses even an empty batch: {error}", "look into the far end's own log"
            ) from error
        if moved is None:
            self._look_again(link, batch.gateway)
            return
        msgids = {entry.seq: entry.msgid for entry in stretch.entries}
        refused = [(batch.operations[place], reason) for place, reason in rows.items()]
        self._keep(
            batch.gateway,
            [(Refusal(batch.epoch, op.seq, op.number, reason), msgids[op.seq], op) for op, reason in refused],
        )
        rest = [operation for place, operation in enumerate(batch.operations) if place not in rows]
        self._write(link, batch._replace(operations=rest), stretch)

    def _settle(self, link: Link, gateway: str, refusals: Sequence[Refusal]) -> None:
        """Refusals noted at the far end go to quarantine here, then the far end may forget them."""
        if not refusals:
            return
        found: list[tuple[Refusal, str, Operation | None]] = []
        for refusal in refusals:
            entries, _ = self._log.read(refusal.seq - 1, 1)
            entry = entries[0] if entries and entries[0].seq == refusal.seq else None
            found.append((refusal, entry.msgid if entry else "", self._refused(refusal, entry)))
        self._keep(gateway, found)
        link.settle(gateway, refusals)

    def _refused(self, refusal: Refusal, entry: Entry | None) -> Operation | None:
        """The write that was refused, as the far end noted it; the rules that made it may have changed since."""
        operations = self._plan.operations(entry) if entry else []
        if not refusal.original:  # noted by an older version
            return operations[refusal.number] if refusal.number < len(operations) else None
        target = next((op.target for op in operations if op.packed.data == refusal.original), CHANGED_RULE)
        return Operation(refusal.seq, refusal.number, target, Packed(refusal.original, 0))

    def _keep(self, gateway: str, refused: Sequence[tuple[Refusal, str, Operation | None]]) -> None:
        rows = [
            Quarantined(
                gateway, refusal.epoch, refusal.seq, refusal.number, msgid, operation.target if operation else "",
                refusal.reason, operation.packed.data if operation else b"",
            )
            for refusal, msgid, operation in refused
        ]  # fmt: skip
        try:
            new = self._book.quarantine(self._pool, rows, self._clock.wall())
        except StoreError as error:
            # What is refused must be kept here before the far end forgets it: nothing moves until it can be.
            raise NotConnected(f"cannot keep what was refused: {error}") from error
        self._standing = self._standing._replace(refused=self._standing.refused + new)
        last = rows[-1]
        text = "the far end refused records; they are kept in quarantine (tidegate dead)"
        self._say_rarely("quarantined", text, count=len(rows), target=last.target, reason=last.reason)

    def _move(self, key: tuple[str, int], through: int) -> None:
        """The cursor goes on over what was tallied."""
        standing, tally = self._standing, self._tally
        account = standing.account.moved(standing.cursor, through, tally)
        self._pace.carried(through - standing.cursor)
        self._standing = standing._replace(
            cursor=through, gateway=key[0], epoch=key[1], account=account,
            delivered=standing.delivered + tally.delivered, rate=self._pace.rate,
        )  # fmt: skip
        self._tally = Tally()
        if self._clock.monotonic() - self._saved_at >= SAVE_EVERY:
            self._save()

    def _rest(self, link: Link) -> Wait:
        """Nothing to carry: save when a second has passed since the last time, then sleep until there are news."""
        if link.gone():
            raise NotConnected("the far end closed the connection")
        self._well(link)
        self._pace.begins(backlog=False)
        self._standing = self._standing._replace(rate=self._pace.rate)
        if self._standing == self._saved and not self._moved:
            return Wait(None, True)
        left = self._saved_at + SAVE_EVERY - self._clock.monotonic()
        if left > 0:
            return Wait(left, True)
        self._save()
        return Wait(None, True)

    def _lost(self, text: str) -> Wait:
        if self._link is not None:  # it may have been too much at once; who was never reached did not say so
            self._limit = max(1, self._limit // 2)
        self._drop_link()
        self._told_lost |= self._say_rarely("pool_unreachable", "cannot reach the far end", reason=text)
        self._standing = self._standing._replace(state="unreachable", error=text, hint="", rate=0.0)
        self._save_soon()
        wait = self._back_off * (0.5 + self._chance.random() / 2)
        self._back_off = min(self._back_off * 2, MAX_BACK_OFF)
        return Wait(wait, False)

    def _refused_because_of_us(self, error: Misconfigured) -> Wait:
        self._drop_link()
        self._told_lost |= self._say_rarely(
            "pool_misconfigured", "the far end cannot be used like this", reason=error, hint=error.hint
        )
        self._standing = self._standing._replace(state="misconfigured", error=str(error), hint=error.hint, rate=0.0)
        self._save_soon()
        return Wait(MISCONFIGURED_WAIT, False)

    def _drop_link(self) -> None:
        self._stretches.forget()
        self._pace.begins(backlog=False)
        if self._link is not None:
            self._link.close()
            self._link = None

    def _adapt(self, sent: int, largest: int, seconds: float) -> None:
        # What was sent may have been made ready before the last time the limit grew.
        if seconds < QUICK and sent * 2 >= self._limit:
            self._limit = min(largest, self._limit * 2)
        elif seconds > SLOW:
            self._limit = max(1, self._limit // 2)

    def _save_soon(self) -> None:
        """Save when the state changed or the last time is long ago; a long outage must not wear the card."""
        if self._standing != self._saved:
            self._save()

    def _save(self) -> None:
        self._saved_at = self._clock.monotonic()
        try:
            self._book.save(self._pool, self._standing, self._moved, self._clock.wall())
        except StoreError as error:
            # The mark at the far end knows how far we are, so carrying goes on: it is what can free the disk.
            self._say_rarely("progress_not_saved", "the progress cannot be saved", reason=error)
            return
        self._moved = {}
        self._saved = self._standing
