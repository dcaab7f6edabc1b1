"""The broker process: everything is put together here, started, watched and stopped.

Downward: listeners and timers drive the broker's core; the core hands batches to the committer's thread and questions to the
reader's; a supervised child carries the log away. Upward only "there is something new": the child is woken after commits.

Invariant: one broker per data directory (a lock file of its own), and after a clean stop the run is marked clean.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sqlite3
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from tidegate.store.catchup import CatchUp
from tidegate.store.lock import hold
from tidegate.store.log import Batch, Log
from tidegate.store.msgid import gateway_code, message_id
from tidegate.store.report import EACH, ERROR, WARNING, Report, brief
from tidegate.store.schema import STRANGE, StoreError, disk_fault, explain
from tidegate.store.store import Store, file_bytes, free_bytes
from tidegate.store.trim import Trim
from tidegate.store.worker import Worker

from . import control, made_requests
from .access import OPENED, Access, lacking
from .broker import Broker
from .config import Config, Listener
from .config_changed import ConfigChanged
from .config_keys import join_address
from .connecting import Limits
from .far_ends import FarEnds
from .health import Health
from .held import shares
from .inbox import Inbox
from .online_backup import OnlineBackup
from .rules_told import tell
from .server import OUT_OF, Sockets
from .snapshot import Snapshot
from .trimming import Trimming
from .trust import Trust

DEFAULT_AGE = 604_800
"""Seconds the box keeps messages for a sqlite rule without `expired_time`."""
ALIVE_PAUSE = BALANCE_PAUSE = 60.0
GC_THRESHOLD = 50_000
"""Rows of a batch are thousands of short-lived tuples without cycles; looking through them early finds nothing."""
STOP_DEADLINE = 4.0


class StartError(Exception):
    """The gateway cannot start; the text is for the user."""


def run(config: Config, read: Callable[[], Config]) -> int:
    """Run until SIGTERM or SIGINT; `read` reads the configuration again. Raises StartError or StoreError with one
    sentence for the user."""
    runner: Callable[[Coroutine[Any, Any, int]], int] = asyncio.run
    if not os.environ.get("TIDEGATE_NO_UVLOOP"):
        try:
            import uvloop
        except ImportError:
            pass
        else:
            runner = uvloop.run
    gc.set_threshold(GC_THRESHOLD)
    report = Report(config.log_format, config.log_level)
    try:
        return runner(App(config, read, report).main())
    finally:
        report.close()


class App:
    """One gateway; `main` is its whole life."""

    def __init__(self, config: Config, read: Callable[[], Config], report: Report) -> None:
        self._config = config
        self._changed = ConfigChanged(config, read, report)
        self._report = report
        self._stopping = asyncio.Event()
        self._started = time.monotonic()
        self._next_alive = self._started + ALIVE_PAUSE
        self._health = Health(self._started)
        self._trust = Trust(config.clock_trust, int(config.clock_wait * 1000))

    async def main(self) -> int:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)  # heard at the first await, when all is built
        self._loop.set_exception_handler(self._loop_fault)
        config = self._config
        for warning in config.warnings:
            self._report("config_warning", warning, WARNING, warning)
        lock = hold(config.data)
        wall, mono = _clock()
        self._store = Store.open(config.data / "log.db", config.name, config.durability, wall, mono, self._trust.judge)
        try:
            try:
                self._build(mono)
            except (sqlite3.Error, *STRANGE) as error:
                raise StoreError(explain(self._store.path, error)) from error
            try:
                addresses = [address for listener in config.listeners for address in self._listen(listener)]
            except StartError:
                self._close()  # nothing happened in this run
                raise
            await self._serve(addresses)
        finally:
            os.close(lock)
        return 0

    # -- building --------------------------------------------------------------------------------------------------

    def _build(self, mono: int) -> None:
        config, store = self._config, self._store
        identity = store.identity
        store.bound(config.disk_budget)
        log = Log(identity.next_seq, identity.last_at, identity.run, identity.clock)
        log.tick(mono)
        post = self._loop.call_soon_threadsafe
        self._committer = Worker("committer", post, store.rest)
        self._backup = OnlineBackup(store, self._committer, post)
        self._reader: Worker | None = None
        self._catch_up: CatchUp | None = None
        self._runs: dict[int, tuple[str, int]] = {
            run: (code, epoch) for run, code, epoch in store.connection.execute("SELECT id, code, epoch FROM run")
        }
        self.access = Access(config.password_file)
        held = shares(config.disk_budget, config.max_retained_bytes, config.max_session_bytes, config.max_exchange_bytes)
        self.broker = Broker(
            log,
            self._commit,
            self._read,
            self._loop.call_later,
            self.access,
            Limits(
                max_packet_size=config.max_packet_size,
                max_inflight=config.max_inflight,
                max_queued_bytes=config.max_queued_bytes,
                max_queued_together=config.max_queued_together,
                max_unfinished_together=config.max_unfinished_together,
                max_wills_together=config.max_wills_together,
                max_connections=config.max_connections,
                max_connections_per_address=config.max_connections_per_address,
                max_keep_alive=config.max_keep_alive,
                session_expiry=config.session_expiry,
                max_waiting_messages=config.max_waiting_messages,
                max_waiting_bytes=config.max_waiting_bytes,
                max_waiting_age=config.max_waiting_age,
                max_subscriptions=config.max_subscriptions or 1 << 62,
                max_subscriptions_together=config.max_subscriptions_together,
                max_retained_bytes=held.retained,
                max_session_bytes=held.sessions,
                max_exchange_bytes=held.exchanges,
            ),
            config.durability,
            config.commit_delay,
            self._message_id,
            lambda: f"auto-{uuid.uuid4().hex[:20]}",
            self._report,
        )
        self._sockets = Sockets(self.broker, self._tick_clock, self._report)
        self.broker.now = time.monotonic()
        self.broker.router.policies = config.policies
        self.broker.load(store.connection, identity.clean)
        self._inbox = Inbox(self.broker, config.data / "uplink.db")
        self._far_ends = FarEnds(config, self.broker, self._report, self._inbox.look)
        self._trimming = Trimming(
            self._trim(DEFAULT_AGE), store.connection, self._committer.submit, self.broker, self._far_ends.reach, self._report
        )
        self._load_rules()

    def _load_rules(self) -> None:
        """Take what the rules want logged, and how long the box keeps it. A bad file stops its pools, not the gateway."""
        from tidegate.uplink.local import local_rules
        from tidegate.uplink.progress import saved_wants
        from tidegate.uplink.rule import load_all, wants
        from tidegate.uplink.vocabulary import LOGGED_FOR_SQLITE

        read = _clock()[0]
        files = load_all(self._config.conf_dir, self._config.backends)
        self._rules_usable = tell(self._report, files)
        try:
            saved = saved_wants(self._config.data)
        except StoreError as error:
            self._report("uplink_db_unusable", str(error), WARNING)
            saved = {}
        router = self.broker.router
        local = local_rules(files)
        router.set_wants(wants(files, saved), router.local if local is None else local)
        mine = [rule for file in files if file.backend == "sqlite" for rule in file.rules]
        ages = [rule.expired_time or DEFAULT_AGE for rule in mine if rule.function in LOGGED_FOR_SQLITE]
        self._far_ends.read(files)
        self._trimming.trim = self._trim(max(ages, default=0))
        self._rules_read = read

    def _trim(self, age: int) -> Trim:
        """Of messages that are kept for so many seconds."""
        config = self._config
        return Trim(
            config.disk_budget,
            age * 1000,
            config.policies,
            config.free_floor,
            lambda: free_bytes(config.data),
            lambda: file_bytes(config.data / "uplink.db"),
        )

    def _listen(self, listener: Listener) -> list[str]:
        try:
            return [join_address(host, port) for host, port in self._sockets.listen(listener)]
        except OSError as error:
            raise StartError(
                f"cannot listen on {listener}: {error.strerror}; stop what uses the port, or choose"
                f" another with --listen HOST:PORT"
            ) from error

    async def _listen_http(self) -> asyncio.Server | None:
        """Who only looks on must not stop the gateway: an address that is taken is told, and the devices are served."""
        if self._config.http is None:
            return None
        from .web import Web

        host, port = self._config.http
        try:
            server = await Web(self._status, self._unhealthy, self._not_ready).listen(host, port)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            self._snapshot.http = f"cannot listen on {join_address(host, port)}: {why}"
            text = "health and metrics are not answered; choose another address under [http] in gateway.toml"
            self._report("http_failed", text, WARNING, reason=self._snapshot.http)
            return None
        self._snapshot.http = join_address(*server.sockets[0].getsockname()[:2])
        return server

    # -- running ---------------------------------------------------------------------------------------------------

    async def _serve(self, addresses: list[str]) -> None:
        from . import notify

        await self._far_ends.start()
        self._snapshot = Snapshot(
            self._config, self._store, self.broker, self._trust, self._far_ends.pools, self._started, self._report.lines
        )
        self._inbox.look()
        control_server = await control.serve(self._config.data / "control.sock", self._answer)
        web = await self._listen_http()
        http = {"http": f"http://{self._snapshot.http}"} if web is not None else {}
        where = {"data": self._config.data, "config": self._config.file or "defaults"}
        self._report(
            "listening", "devices may connect", address=",".join(addresses), durability=self._config.durability, **http, **where
        )
        if self._trust.state != "trusted":
            self._report("clock", "the time is not trusted", WARNING, state=self._trust.state, why=self._trust.why)
        if all(listener.loopback for listener in self._config.listeners):
            steps = [*lacking(self._config.password_file, self._config.conf_dir), OPENED]
            self._report("loopback_only", f"only this machine can connect; to let devices in: {', then '.join(steps)}")
        notify.ready()
        ticker = self._loop.create_task(self._tick(), name="tick")
        await self._stopping.wait()
        notify.stopping()
        ticker.cancel()
        self._sockets.stop_listening()
        control_server.close()
        if web is not None:
            web.close()
        await self._stop()

    async def _tick(self) -> None:
        """Once a second: the broker's own timers, the trim, `$SYS`, and the watchdog as long as the disk answers."""
        next_sys = next_balance = 0.0
        while True:
            await asyncio.sleep(1.0)
            self._tick_clock()
            self._judge_clock()
            self.broker.tick()
            if self.broker.now >= next_sys and self._config.sys_interval:
                next_sys = self.broker.now + self._config.sys_interval
                self.broker.publish_sys(self._snapshot.sys_values())
            self._trimming.tick()
            self._inbox.tick()
            if self.broker.now >= next_balance:
                next_balance = self.broker.now + BALANCE_PAUSE
                for name, balance in self._snapshot.mismatches():
                    self._report("balance_mismatch", "a balance does not add up", ERROR, name, of=name, balance=balance)
            self._note_alive()
            self._report.tick()
            self._committer.submit(self._store.look, self._committer_answers)
            if self._store.gone:
                self._report("log_gone", self._store.gone, ERROR, "")

    def _committer_answers(self, _: None) -> None:
        from . import notify

        self._health.answered(time.monotonic())
        notify.watchdog()

    def _unhealthy(self) -> list[str]:
        return self._health.faults(time.monotonic())

    def _not_ready(self) -> list[str]:
        faults = [] if self._sockets.listening else ["not listening"]
        if self._store.gone:
            faults.append(self._store.gone)
        elif self.broker.store_fault:
            faults.append(f"the store refuses to write: {self.broker.store_fault}")
        return faults

    def _judge_clock(self) -> None:
        """Keep in the store what time it really is, as soon as that is known better."""
        log, state = self.broker.log, self._trust.state
        log.step(*self._trust.judge(log.clock, *_clock()))
        if self._trust.state != state:
            self._report("clock", "what is known of the time has changed", state=self._trust.state, why=self._trust.why)

    def _note_alive(self) -> None:
        """While somebody is connected, keep in the store when we were last alive."""
        if self.broker.clients and self.broker.now >= self._next_alive:
            self._next_alive = self.broker.now + ALIVE_PAUSE
            log = self.broker.log
            log.change("UPDATE run SET alive_at = ? WHERE id = ?", log.now, log.run)

    async def _stop(self) -> None:
        deadline = time.monotonic() + STOP_DEADLINE
        self._tick_clock()
        self.broker.stop()
        while self.broker.busy and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await self._far_ends.stop(max(0.5, deadline - time.monotonic()))
        clean = not self.broker.busy
        await asyncio.to_thread(self._committer.stop)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.stop)
        if clean:
            self._close()
        else:
            self._store.abandon()

    def _close(self) -> None:
        try:
            self._store.close(self.broker.log.now)
        except sqlite3.Error as error:
            self._store.abandon()
            text = "the log could not be closed as it should; nothing is lost, the next start takes it for a crash"
            self._report("not_closed", text, WARNING, reason=disk_fault(error))

    def _reload(self) -> None:
        self._report("reload", "SIGHUP: reading rules and passwords again")
        self._changed.look()
        failed = False
        for what, read in (("passwords", self.access.reload), ("rules", self._load_rules)):
            try:
                read()
            except Exception as error:  # noqa: BLE001 - a bad new configuration must leave the old one running
                self._report("reload_failed", f"the {what} stay as they were", WARNING, EACH, reason=error)
                failed = True
        if self._rules_usable and not failed:
            self._report("reloaded", "rules and passwords are in force as they now stand")
        self._far_ends.restart()

    # -- what the core asks for ------------------------------------------------------------------------------------

    def _loop_fault(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio would print by itself, and wait for whoever reads it."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF:
            text = "cannot accept connections of the command line or over HTTP"
            self._report("accept_failed", text, WARNING, reason=os.strerror(error.errno))
            return
        fault = brief(error) if error is not None else ""
        self._report("internal_error", f"a fault in the program: {context['message']}", ERROR, fault=fault)

    def _tick_clock(self) -> None:
        self.broker.now = time.monotonic()
        self.broker.log.tick(_boottime())

    def _commit(self, batch: Batch, done: Callable[[Any], None]) -> None:
        def committed(result: Any) -> None:
            self._tick_clock()
            done(result)
            if self._store.checkpoint_fault:
                self._report("checkpoint_failed", self._store.checkpoint_fault, WARNING)
            if result is None:
                self._trimming.committed(batch.size)
                self._far_ends.wake()

        self._committer.submit(lambda: self._store.apply(batch), committed)

    def _read(self, job: Callable[[Any], Any], done: Callable[[Any], None]) -> None:
        if self._reader is None:
            self._reader = Worker("catch-up", self._loop.call_soon_threadsafe, self._rest_catch_up)
        self._reader.submit(lambda: job(self._open_catch_up()), done)

    def _open_catch_up(self) -> CatchUp:
        if self._catch_up is None:
            self._catch_up = CatchUp(self._store.path)
        return self._catch_up

    def _rest_catch_up(self) -> None:
        if self._catch_up is not None:
            self._catch_up.rest()

    def _message_id(self, seq: int, at: int, run: int) -> bytes:
        identity = self._store.identity
        code, epoch = self._runs.get(run) or (gateway_code(identity.gateway), identity.epoch)
        return message_id(at, code, epoch, seq).encode()

    def _answer(self, request: dict[str, Any]) -> control.Answer:
        if request.get("command") == "status":
            return self._status()
        if request.get("command") == "refused":
            return self.broker.connecting.refusals.as_dict()
        if request.get("command") == "backup":
            return self._backup.answer(request)
        if request.get("command") == "sub":
            return made_requests.answer(self.broker, request, self._loop.create_future())
        if request.get("command") == "wake":
            return {"woken": self._far_ends.wake()}
        if request.get("command") == "reconnect":
            return {"restarted": self._far_ends.restart()}
        return {"error": f"unknown command {request.get('command')!r}"}

    def _status(self) -> dict[str, Any]:
        self._tick_clock()
        config = {"changed": self._changed.changed, "error": self._changed.fault}
        found = self._snapshot.status() | {"rules_read": self._rules_read / 1000, "config": config}
        return found | {"quarantine": self._far_ends.stranded([str(pool["name"]) for pool in found["pools"]])}


def _clock() -> tuple[int, int]:
    """(wall clock, CLOCK_BOOTTIME) in ms."""
    return time.time_ns() // 1_000_000, _boottime()


def _boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
