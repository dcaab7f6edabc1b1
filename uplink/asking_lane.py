"""The lane of one pool that asks: who comes and subscribes is read from the log, the far end is asked, answers go to the inbox.

Driven like the worker: clock, jitter, log, book and the way to connect are arguments, and `step` does one thing and says how
long to wait. The cursor in the log moves on also while the far end is away, because what is to be asked is kept as questions;
so the lane never holds the log back. Those who are connected are asked for again every `interval`, so that what a business
system adds reaches them. When the broker takes no answers, nothing is asked.

Invariant: a question is forgotten in the transaction that puts its answer into the inbox, or when its session is gone.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from tidegate.store.entry import Entry
from tidegate.store.inbox import Answer
from tidegate.store.report import INFO, WARNING, Say
from tidegate.store.schema import StoreError

from .asking import Asker, Fetch
from .channel import NotUnderstood, understand
from .crowd import Crowd, Question
from .errors import Misconfigured, NotConnected, Rejected
from .lane_book import LaneStanding
from .rarely import Rarely
from .reading import FETCH, KINDS, LOOKUP, RETAINED, Reading
from .told import Told
from .worker import FIRST_BACK_OFF, GO_ON, MAX_BACK_OFF, MISCONFIGURED_WAIT, SAVE_EVERY, Clock, Wait

READ = 1_000
"""Entries of one look at the log."""
CLIENTS = 500
"""Lookups of one query."""
QUESTIONS, ANSWERS, ANSWER_BYTES = 100, 1_000, 1 << 20
"""Of one transaction, about: questions that are answered in it, and their answers."""
INBOX_ANSWERS, INBOX_BYTES = 20_000, 32 << 20
"""Above these nothing is asked until the broker has taken some."""


class Log(Protocol):
    """What the lane needs of `lane_log.LaneLog`."""

    def births(self) -> list[tuple[str, int, int]]: ...
    def read(self, after: int, limit: int, kinds: Collection[int] | None = None) -> tuple[list[Entry], int]: ...
    def online(self) -> list[str]: ...
    def sessions(self, clients: Collection[str]) -> set[str]: ...
    def subscriptions(self) -> list[tuple[str, str, int]]: ...
    def inbox_cursor(self, identity: str) -> int: ...


class Book(Protocol):
    """What the lane needs of `lane_book.LaneBook`."""

    def standing(self, pool: str) -> LaneStanding | None: ...
    def questions(self, pool: str) -> list[Question]: ...
    def save(
        self,
        pool: str,
        standing: LaneStanding,
        questions: Iterable[tuple[tuple[str, str], Question | None]],
        answers: Sequence[Answer] = (),
    ) -> None: ...
    def identity(self) -> str: ...
    def inbox(self) -> tuple[int, int, int]: ...
    def done(self, through: int) -> None: ...


class Lane(NamedTuple):
    """Which one: its pool, this gateway's code in message ids, what it reads, seconds between two rounds (0: none)."""

    pool: str
    code: str
    reading: Reading
    interval: float


class AskingLane:
    """See the module. `step` until told to stop, then `stop`. `tell` is called when there are new answers."""

    def __init__(
        self,
        lane: Lane,
        connect: Callable[[], Asker],
        log: Log,
        book: Book,
        clock: Clock,
        say: Say,
        chance: random.Random,
        tell: Callable[[], None],
    ) -> None:
        self._lane = lane
        self._connect_to = connect
        self._log = log
        self._book = book
        self._clock = clock
        self._say = say
        self._chance = chance
        self._tell = tell
        self._asker: Asker | None = None
        self._back_off = FIRST_BACK_OFF
        self._identity = book.identity()
        self._told = Told(lane.pool, lane.code)
        self._say_rarely = Rarely(say, clock.monotonic)
        self._told_lost = False
        self._lookups: deque[str] = deque()
        """Of the round that is under way: whose subscriptions are looked up again."""
        self._again: deque[Question] = deque()
        """Of the round that is under way: whose messages are asked for again."""
        self._next_round = float("-inf")
        self._saved_at = float("-inf")
        known = book.standing(lane.pool)
        self._standing = self._begin(known)
        self._crowd = self._gather(is_new=known is None)
        self._saved = self._standing._replace(state="")
        book.done(log.inbox_cursor(self._identity))
        self._save()
        tell()  # of what the life before put there

    def step(self) -> Wait:
        """Do one thing. Never raises for what a far end does."""
        try:
            if self._take_in():
                return GO_ON
            if self._asker is None:
                self._connect()
                return GO_ON
            self._hear(self._asker)
            has_room = self._has_room()
            asked = has_room and self._ask(self._asker)
            self._well()  # not before: of a cluster some answer although what is asked cannot be answered
            if not has_room:
                return Wait(None, True)
            return GO_ON if asked else self._rest()
        except (NotConnected, Rejected) as error:  # refused, but no question: an error that we do not know, when we connected
            return self._lost(str(error))
        except Misconfigured as error:
            return self._refused_because_of_us(error)

    @property
    def fileno(self) -> int:
        """Becomes readable when the far end has something to say, or goes away; -1 without one."""
        return self._asker.fileno() if self._asker is not None else -1

    def stop(self) -> None:
        """Save where we are and let go of the far end."""
        self._drop_asker()
        self._standing = self._standing._replace(state="stopped")
        self._save()

    # -- the log ---------------------------------------------------------------------------------------------------

    def _begin(self, standing: LaneStanding | None) -> LaneStanding:
        """Where the lane was; a new one begins where the gateway did, whose devices were here before it. After a lost tail the
        numbers name other entries."""
        births = self._log.births()
        gateway, epoch, first = births[-1] if births else ("", 0, 1)
        if standing is None:
            return LaneStanding(first - 1, gateway, epoch)
        mine = [number for number, (*name, _) in enumerate(births) if tuple(name) == standing[1:3]]
        later = [seq for _, _, seq in (births[mine[-1] + 1 :] if mine else births)]
        cursor = min([standing.cursor, *(seq - 1 for seq in later)])
        return standing._replace(cursor=cursor, gateway=gateway, epoch=epoch, state="starting", error="", hint="")

    def _gather(self, is_new: bool) -> Crowd:
        """Who is there: what was kept, and the sessions whose subscriptions were made before there were such rules.

        A new lane asks everything for them all: its file may have been lost with questions in it.
        """
        reading = self._lane.reading
        crowd = Crowd(reading, self._log.online(), self._book.questions(self._lane.pool))
        while is_new and self._read(crowd):
            pass
        for client, text, qos in self._log.subscriptions():
            crowd.add(Question(client, text, qos, reading.asked_for(text, qos) if is_new else 0))
        return crowd

    def _read(self, crowd: Crowd) -> bool:
        """The next entries; whether there were any."""
        entries, through = self._log.read(self._standing.cursor, READ, KINDS)
        if through == self._standing.cursor:
            return False
        for entry in entries:
            crowd.take(entry)
        crowd.settle(self._log.sessions)
        self._standing = self._standing._replace(cursor=through)
        return True

    def _take_in(self) -> bool:
        """What is new in the log; whether there was anything."""
        crowd = self._crowd
        if not self._read(crowd):
            return False
        for key in crowd.new:
            self._told.forget(key)
        crowd.new.clear()
        if crowd.changed or self._clock.monotonic() - self._saved_at >= SAVE_EVERY:
            self._save()
        return True

    # -- the far end -----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._asker = self._connect_to()
        self._told.interrupted()
        self._next_round = self._clock.monotonic()

    def _well(self) -> None:
        if self._standing.state == "connected":
            return
        if self._told_lost:
            self._told_lost = False
            self._say("lookup_connected", "lookups are answered again")
        self._say_rarely.well()
        self._standing = self._standing._replace(state="connected", error="", hint="")
        self._save()

    def _hear(self, asker: Asker) -> None:
        """What a channel said since the last time."""
        for message in asker.heard():
            try:
                wish = understand(message)
            except NotUnderstood as fault:
                self._refused("what the channel said is not understood", reason=fault)
                continue
            if wish.client not in self._crowd.online and not self._log.sessions([wish.client]):
                self._refused("the channel names a client that is not here", client=wish.client)
                continue
            answers, remember = self._told.heard(*wish)
            self._save(answers)
            remember()

    def _ask(self, asker: Asker) -> bool:
        """Ask something; whether there was anything to ask."""
        if self._clock.monotonic() >= self._next_round and not self._lookups and not self._again:
            self._begin_round(asker)
        if waiting := self._still_there(self._crowd.due(LOOKUP, CLIENTS)):
            self._look_up(asker, [question.client for question in waiting], waiting)
        elif self._lookups:
            clients = [self._lookups.popleft() for _ in range(min(CLIENTS, len(self._lookups)))]
            self._look_up(asker, [client for client in clients if client in self._crowd.online], [])
        elif waiting := self._still_there(self._crowd.due(FETCH | RETAINED, QUESTIONS)):
            self._fetch(asker, waiting)
        elif self._again:
            questions = [self._again.popleft() for _ in range(min(QUESTIONS, len(self._again)))]
            known = [now for one in questions if (now := self._crowd.get(one.key)) and now.client in self._crowd.online]
            asked = self._fetch(asker, [one._replace(due=FETCH) for one in known])
            self._again.extendleft(reversed(known[asked:]))
        else:
            return False
        self._back_off = FIRST_BACK_OFF
        return True

    def _begin_round(self, asker: Asker) -> None:
        """Everybody who is connected is asked for again."""
        asker.check()
        self._next_round = self._clock.monotonic() + self._lane.interval if self._lane.interval else float("inf")
        online, reading = self._crowd.online, self._lane.reading
        if reading.rules.lookup:
            self._lookups.extend(sorted(online))
        self._again.extend(one for one in self._crowd if one.client in online and reading.asked_for(*one[1:3]) & FETCH)

    def _still_there(self, questions: list[Question]) -> list[Question]:
        """Those of the questions whose session is there; the others are forgotten."""
        away = {question.client for question in questions} - self._crowd.online
        gone = away - self._log.sessions(away) if away else set()
        if gone:
            self._crowd.forget(gone)
            self._save()
        return [question for question in questions if question.client not in gone]

    def _look_up(self, asker: Asker, clients: list[str], waiting: list[Question]) -> None:
        answers: list[Answer] = []
        remember: list[Callable[[], None]] = []
        for client, rows in self._subscriptions(asker, clients).items():
            news, then = self._told.lookup(client, rows)
            answers += news
            remember.append(then)
        self._keep(answers, waiting, remember)

    def _subscriptions(self, asker: Asker, clients: list[str]) -> dict[str, list[tuple[str, int]]]:
        """Of those whose question is not refused."""
        if not clients:
            return {}
        try:
            found = asker.subscriptions(clients)
            return {client: found.get(client, []) for client in clients}
        except Rejected as error:
            if len(clients) == 1:
                self._refused("the far end refuses a question", reason=error, client=clients[0])
                return {}
        middle = len(clients) // 2
        return self._subscriptions(asker, clients[:middle]) | self._subscriptions(asker, clients[middle:])

    def _fetch(self, asker: Asker, questions: list[Question]) -> int:
        """Ask as many of them as one transaction holds; how many."""
        answers: list[Answer] = []
        remember: list[Callable[[], None]] = []
        size = asked = skipped = 0
        for question in questions:
            news, then, passed = self._answer(asker, question)
            answers += news
            remember += then
            skipped += passed
            asked += 1
            size += sum(len(answer.payload) for answer in news)
            if len(answers) >= ANSWERS or size >= ANSWER_BYTES:
                break
        if skipped:
            text = "stored messages beyond max_returned_count or time_range are not fetched"
            self._say_rarely("fetch_skipped", text, INFO, count=skipped)
        self._standing = self._standing._replace(skipped=self._standing.skipped + skipped)
        self._keep(answers, questions[:asked], remember)
        return asked

    def _answer(self, asker: Asker, question: Question) -> tuple[list[Answer], list[Callable[[], None]], int]:
        """Answers, what remembers them, and how many messages were passed over."""
        answers: list[Answer] = []
        remember: list[Callable[[], None]] = []
        skipped = 0
        client, text = question.key
        rule = self._lane.reading.rules.fetch_for(text)
        try:
            if question.due & FETCH and rule is not None:
                ask = Fetch(client, text, rule.queue, rule.limit, rule.span, rule.window_first)
                answers, then, skipped = self._stored(asker, ask)
                remember.append(then)
            if question.due & RETAINED:
                answers += self._told.retained(client, text, asker.retained(text))
        except Rejected as error:
            self._refused("the far end refuses a question", reason=error, filter=text)
        return answers, remember, skipped

    def _stored(self, asker: Asker, ask: Fetch) -> tuple[list[Answer], Callable[[], None], int]:
        """The last part of the stored messages; those before are kept at once, because all may be too many to hold."""
        skipped = 0
        while True:
            found = asker.fetch(ask)
            news, then = self._told.fetched(ask, found)
            skipped += found.skipped if news else 0
            if not found.further:
                return news, then, skipped
            self._keep(news, [], [then])
            ask = ask._replace(after=found.further)

    # -- what is kept ----------------------------------------------------------------------------------------------

    def _keep(self, answers: list[Answer], answered: list[Question], remember: list[Callable[[], None]]) -> None:
        """The answers go where they stay, and their questions are done; what cannot be kept is asked again."""
        crowd, standing = self._crowd, self._standing
        before = [now for question in answered if (now := crowd.get(question.key)) is not None]
        for question in answered:
            crowd.answered(question)
        self._standing = standing._replace(asked=standing.asked + len(answered), answers=standing.answers + len(answers))
        try:
            if answers or crowd.changed:
                self._save(answers)
        except NotConnected:
            self._standing = standing
            for question in before:
                crowd.restore(question)
            raise
        for then in remember:
            then()

    def _has_room(self) -> bool:
        """Clear what the broker is done with; whether there is room for more."""
        first, count, size = self._book.inbox()
        if count:
            done = self._log.inbox_cursor(self._identity)
            if done >= first:
                self._book.done(done)
                first, count, size = self._book.inbox()
        return count < INBOX_ANSWERS and size < INBOX_BYTES

    def _rest(self) -> Wait:
        """Nothing to ask: save what is not saved a second after the last time, then sleep until news or the next round."""
        now = self._clock.monotonic()
        left = [self._next_round - now]
        if self._standing != self._saved:
            if self._saved_at + SAVE_EVERY <= now:
                self._save()
            else:
                left.append(self._saved_at + SAVE_EVERY - now)
        soonest = min(left)
        return Wait(None if soonest == float("inf") else max(0.001, soonest), True)

    def _save(self, answers: Sequence[Answer] = ()) -> None:
        self._saved_at = self._clock.monotonic()
        crowd = self._crowd
        changed = [(key, crowd.get(key)) for key in crowd.changed]
        try:
            self._book.save(self._lane.pool, self._standing, changed, answers)
        except StoreError as error:
            text = "what far ends answered cannot be kept, so it is asked again later"
            self._say_rarely("answers_not_saved", text, reason=error)
            if answers:
                raise NotConnected(f"cannot keep what was answered: {error}") from error
            return
        crowd.changed.clear()
        self._saved = self._standing
        if answers:
            self._tell()

    # -- trouble ---------------------------------------------------------------------------------------------------

    def _refused(self, text: str, **fields: object) -> None:
        self._standing = self._standing._replace(refused=self._standing.refused + 1)
        self._say_rarely("question_refused", text, WARNING, **fields)

    def _lost(self, text: str) -> Wait:
        self._drop_asker()
        self._told_lost |= self._say_rarely("lookup_unreachable", "the far end cannot be asked; questions wait", reason=text)
        self._stand("unreachable", text, "")
        wait = self._back_off * (0.5 + self._chance.random() / 2)
        self._back_off = min(self._back_off * 2, MAX_BACK_OFF)
        return Wait(wait, False)

    def _refused_because_of_us(self, error: Misconfigured) -> Wait:
        self._drop_asker()
        text = "the far end cannot be asked like this; questions wait"
        self._told_lost |= self._say_rarely("lookup_misconfigured", text, reason=error, hint=error.hint)
        self._stand("misconfigured", str(error), error.hint)
        return Wait(MISCONFIGURED_WAIT, False)

    def _stand(self, state: str, error: str, hint: str) -> None:
        """Saved when it changed: a long outage must not wear the card."""
        before = self._standing
        self._standing = before._replace(state=state, error=error, hint=hint)
        if before != self._standing:
            self._save()

    def _drop_asker(self) -> None:
        if self._asker is not None:
            self._asker.close()
            self._asker = None
        self._lookups.clear()
        self._again.clear()
