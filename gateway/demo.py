"""`tidegate demo`: the main job, shown on the user's own machine in half a minute.

A real gateway runs as a child process on embedded defaults; real MQTT clients publish readings at QoS 1; the line to a Redis of
the demo's own is cut and mended; then Redis is read back and compared with every reading that was acknowledged: each there,
once, in order. Afterwards the gateway stays up for the user's own devices until Ctrl-C.

Nothing here knows the gateway from inside: it is configured by files, asked through its control socket, and judged by what its
far end holds. The exit code is 0 only if nothing is missing.

Invariant: `missing` is never guessed: a reading counts as delivered when it was read back from Redis.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .control import NotRunning, ask
from .demo_far_end import FarEnd, Line, accepts, free_port
from .demo_remains import bound, own_directory
from .demo_screen import Figures, OutputError, Screen, make_screen

DEVICES = ("barn", "cellar", "greenhouse", "pump", "silo")
PAUSE_BETWEEN_READINGS = 0.1
UP, CUT, UP_AGAIN = 6.0, 10.0, 4.0
"""Seconds of each act, made shorter when `--seconds` asks for less."""
ARRIVAL_DEADLINE = 60.0
STOP_DEADLINE = 8.0

TOML = """\
[gateway]
name = "demo"

[uplink]
backends = ["sqlite", "redis"]
"""

RULES = """\
backend.redis.pool1.server = 127.0.0.1:{port}
backend.redis.pool1.timeout = 3s
backend.redis.hook.client.connected.1    = {{"action": {{"function": "on_client_connected"}}, "pool": "pool1"}}
backend.redis.hook.client.disconnected.1 = {{"action": {{"function": "on_client_disconnected"}}, "pool": "pool1"}}
backend.redis.hook.message.publish.1     = {{"topic": "#", "action": {{"function": "on_message_publish"}}, "pool": "pool1"}}
backend.redis.hook.message.publish.2     = {{"topic": "#", "action": {{"function": "on_message_retain"}}, "pool": "pool1"}}
backend.redis.hook.message.publish.3     = {{"topic": "#", "action": {{"function": "on_retain_delete"}}, "pool": "pool1"}}
"""


class DemoError(Exception):
    """The demo cannot go on; the text is for the user."""


class Balance(NamedTuple):
    """What Redis holds against what was acknowledged."""

    found: int
    missing: int
    extra: int
    in_order: bool

    @property
    def is_right(self) -> bool:
        """Everything there, once, in order."""
        return not self.missing and not self.extra and self.in_order


def run_demo(seconds: float | None, data: Path | None, port: int) -> int:
    """Show it; `seconds` ends it by itself (None: stay up), `data` keeps the log (None: a directory that goes with the demo).

    Returns 0 if readings were acknowledged and every one of them arrived, else 1. Raises OutputError.
    """
    if fault := _missing_extra() or _used(data):
        print(f"tidegate: {fault}", file=sys.stderr)
        return 1
    with own_directory() as directory:
        screen = make_screen()
        try:
            return asyncio.run(_Demo(screen, directory, data, port, seconds).main())
        except (DemoError, RuntimeError) as error:
            screen.close()
            print(f"tidegate: {error}", file=sys.stderr)
            return 1
        finally:
            screen.close()


def _missing_extra() -> str:
    needed = ["aiomqtt"] if shutil.which("redis-server") else ["aiomqtt", "fakeredis", "lupa"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    install = f"{sys.prefix}/bin/pip install '.[demo]' in the clone of Tidegate"
    return f"the demo needs {' and '.join(missing)}: {install}" if missing else ""


def _used(data: Path | None) -> str:
    """What lies there is not ours to mix with; of a log, Redis would be sent an earlier showing's readings too."""
    try:
        there = sorted(path.name for path in data.iterdir()) if data is not None and data.exists() else []
    except OSError as error:
        return f"{data} cannot be read: {error.strerror}; give --data a new directory"
    if not there:
        return ""
    holds = "already holds a log (log.db)" if "log.db" in there else f"is not empty ({', '.join(there[:3])})"
    return f"{data} {holds} and the demo begins with a new log: give --data a new directory"


class _Demo:
    """One showing, from the first process started to the last one stopped."""

    def __init__(self, screen: Screen, directory: Path, data: Path | None, port: int, seconds: float | None) -> None:
        self._screen = screen
        self._directory = directory
        self._data = data or directory / "data"
        self._keeps_data = data is not None
        self._port = port
        self._seconds = seconds
        self._started = time.monotonic()
        self._acknowledged: dict[str, list[bytes]] = {f"demo/{device}/temperature": [] for device in DEVICES}
        self._line_is_up = True
        self._own = 0
        self._ended = asyncio.Event()
        self._publishing = True
        self._publishers = len(DEVICES)
        self._waiting = 0
        self._balance: Balance | None = None

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._ended.set)
        self._far_end = FarEnd(self._directory)
        self._line = Line(self._far_end.port)
        gateway: subprocess.Popen[bytes] | None = None
        try:
            await self._far_end.start()
            await self._line.start()
            gateway = self._start_gateway()
            await self._until_it_listens(gateway)
            return await self._watch_over(gateway)
        finally:
            loop.set_exception_handler(lambda *_: None)  # clients lose a gateway that is stopped, and nobody asks them any more
            if gateway is not None:
                await asyncio.to_thread(_stop, gateway)
            self._line.stop()
            self._far_end.stop()

    # -- the gateway, as a user would run it -----------------------------------------------------------------------

    def _start_gateway(self) -> subprocess.Popen[bytes]:
        conf = self._directory / "conf"
        conf.mkdir()
        (conf / "gateway.toml").write_text(TOML)
        (conf / "emqx_backend_redis.conf").write_text(RULES.format(port=self._line.port))
        if not self._port or accepts(self._port):
            busy, self._port = self._port, free_port()
            if busy:
                self._screen.say(f"port {busy} is taken by another program, so this gateway listens on {self._port}")
        command = [sys.executable, "-m", "tidegate.gateway.cli", "run", "--config", str(conf / "gateway.toml")]
        command += ["--data", str(self._data), "--listen", f"127.0.0.1:{self._port}"]
        with self._log().open("wb") as log:
            return subprocess.Popen(bound(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    async def _until_it_listens(self, gateway: subprocess.Popen[bytes]) -> None:
        while not accepts(self._port):
            if self._ended.is_set():
                raise DemoError("stopped before the gateway listened")
            if gateway.poll() is not None:
                raise DemoError(f"the gateway does not start:\n{self._gateway_said()}")
            await asyncio.sleep(0.02)
        self._screen.say(f"gateway   listens on 127.0.0.1:{self._port}, keeps its log in {self._data}")
        self._screen.say(f"far end   {self._far_end.name} on 127.0.0.1:{self._far_end.port}, reached through a line we can cut")

    def _log(self) -> Path:
        return self._directory / "gateway.log"

    def _gateway_said(self) -> str:
        return self._log().read_text(errors="replace")[-2000:]

    # -- the story -------------------------------------------------------------------------------------------------

    async def _watch_over(self, gateway: subprocess.Popen[bytes]) -> int:
        """Tell the story while the devices publish and the screen follows; stop all when it ends or any of them fails."""
        story = asyncio.create_task(self._story(gateway), name="story")
        ended = asyncio.create_task(self._ended.wait(), name="end")
        tasks: list[asyncio.Task[Any]] = [
            story,
            ended,
            asyncio.create_task(self._follow(), name="screen"),
            asyncio.create_task(self._listen_to_user(), name="user's devices"),
            *(asyncio.create_task(self._device(device), name=device) for device in DEVICES),
        ]
        running = set(tasks)
        try:
            while not ended.done() and not story.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    _raise_fault(task, self._gateway_said)
        finally:
            # More than once: a client that is just connecting can swallow it.
            while left := [task for task in tasks if not task.done()]:
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=1.0)
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._balance is None:
            self._screen.say("stopped before everything was compared")
        return 0 if self._balance is not None and self._balance.is_right and self._stored() else 1

    async def _story(self, gateway: subprocess.Popen[bytes]) -> None:
        share = 1.0 if self._seconds is None else min(1.0, self._seconds / (2 * (UP + CUT + UP_AGAIN)))
        self._screen.say(
            f"act 1     {len(DEVICES)} devices publish readings at QoS 1; each is on disk before it is acknowledged"
        )
        await asyncio.sleep(UP * share)
        self._screen.say("act 2     the line to Redis is CUT; the devices notice nothing, readings wait on disk")
        self._set_line(False)
        await asyncio.sleep(CUT * share)
        self._screen.say("act 3     the line is back; the uplink tries again by itself within seconds")
        self._set_line(True)
        await asyncio.sleep(UP_AGAIN * share)
        self._publishing = False
        self._balance = await self._until_all_arrived()
        self._say_verdict(self._balance)
        await self._stay_up(gateway)

    def _set_line(self, up: bool) -> None:
        self._line_is_up = up
        if up:
            self._line.mend()
        else:
            self._line.cut()

    async def _until_all_arrived(self) -> Balance:
        deadline = time.monotonic() + ARRIVAL_DEADLINE
        while True:
            balance = await asyncio.to_thread(self._compare)
            is_complete = balance.is_right and not self._publishers and not self._waiting
            if is_complete or time.monotonic() > deadline:
                return balance
            await asyncio.sleep(0.2)

    def _compare(self) -> Balance:
        """Read every reading back from Redis, in the order of the message ids, and compare with what was acknowledged."""
        found = missing = extra = 0
        in_order = True
        with self._far_end.client() as client:
            for topic, expected in self._acknowledged.items():
                msgids = client.zrange(f"mqtt:msg:{topic}", 0, -1)
                pipeline = client.pipeline(transaction=False)
                for msgid in msgids:
                    pipeline.hget(b"mqtt:msg:" + msgid, "payload")
                there = pipeline.execute()
                missing += (Counter(expected) - Counter(there)).total()
                extra += (Counter(there) - Counter(expected)).total()
                in_order = in_order and there == expected
                found += len(there)
        return Balance(found, missing, extra, in_order)

    def _say_verdict(self, balance: Balance) -> None:
        stored = self._stored()
        if not stored:
            self._screen.say("verdict   no reading was acknowledged, so nothing was shown; --seconds 5 is long enough")
            return
        order = "in order" if balance.in_order else "NOT in order"
        verdict = "nothing is missing" if balance.is_right else "this is a fault: please report it"
        self._screen.say(
            f"verdict   {stored} readings acknowledged, {balance.found} read back from Redis, {balance.missing} missing,"
            f" {balance.extra} twice, {order}: {verdict}"
        )
        if not balance.is_right:
            self._screen.say(self._gateway_said())

    async def _stay_up(self, gateway: subprocess.Popen[bytes]) -> None:
        """Until Ctrl-C, the end of `--seconds`, or the end of the gateway."""
        say = self._screen.say
        if self._seconds is None:
            say(f"now you   the gateway stays up; publish to 127.0.0.1:{self._port}, for example:")
            say(f"          mosquitto_pub -p {self._port} -q 1 -t kitchen/temperature -m 21.5")
            say(f"          redis-cli -p {self._far_end.port} keys 'mqtt:msg:*'")
            say(f"          tidegate status --data {self._data}")
            kept = "is kept" if self._keeps_data else "goes with the demo; --data DIR keeps it"
            say(f"          Ctrl-C ends it; the log {kept}. Devices in your network: see First steps in the README")
        left = None if self._seconds is None else max(0.0, self._seconds - (time.monotonic() - self._started))
        try:
            async with asyncio.timeout(left):
                while gateway.poll() is None:
                    await asyncio.sleep(0.5)
        except TimeoutError:
            return
        raise DemoError(f"the gateway ended:\n{self._gateway_said()}")

    # -- the clients -----------------------------------------------------------------------------------------------

    async def _device(self, device: str) -> None:
        import aiomqtt

        topic = f"demo/{device}/temperature"
        acknowledged = self._acknowledged[topic]
        temperature = random.uniform(5, 25)
        async with aiomqtt.Client("127.0.0.1", self._port, identifier=f"demo-{device}") as client:
            while self._publishing:
                temperature += random.uniform(-0.2, 0.2)
                payload = json.dumps({"n": len(acknowledged) + 1, "celsius": round(temperature, 1)}).encode()
                await client.publish(topic, payload, qos=1)
                acknowledged.append(payload)
                await asyncio.sleep(PAUSE_BETWEEN_READINGS)
            self._publishers -= 1
            await self._ended.wait()

    async def _listen_to_user(self) -> None:
        import aiomqtt

        async with aiomqtt.Client("127.0.0.1", self._port, identifier="demo-screen") as client:
            await client.subscribe("#")
            async for message in client.messages:
                if not message.topic.matches("demo/#"):
                    self._own += 1

    # -- the figures -----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            self._screen.show(await asyncio.to_thread(self._figures))
            await asyncio.sleep(0.25)

    def _stored(self) -> int:
        return sum(map(len, self._acknowledged.values()))

    def _figures(self) -> Figures:
        """In this order: what was acknowledged by now either still waits when the gateway is asked, or was delivered before
        Redis is looked at. So `missing` is never shown because of a moment between two questions. The gateway counts entries
        (presence too) and up to a second late; of what it counts, the readings not in Redis are shown."""
        stored = self._stored()
        pool = self._pool()
        self._waiting = int(pool.get("waiting", stored))
        with self._far_end.client() as client:
            delivered = sum(client.zcard(f"mqtt:msg:{topic}") for topic in self._acknowledged)
        # What was acknowledged after the first question may be in Redis already: of what is shown as stored, all is there.
        shown = min(stored, delivered)
        return Figures(
            elapsed=time.monotonic() - self._started,
            line_is_up=self._line_is_up,
            stored=stored,
            waiting=min(self._waiting, stored - shown),
            oldest_age=pool.get("oldest_age"),
            delivered=shown,
            missing=max(0, stored - self._waiting - delivered),
            own=self._own,
            pool_says=str(pool.get("state", "starting")),
        )

    def _pool(self) -> dict[str, Any]:
        try:
            pools = ask(self._data / "control.sock", {"command": "status"})["pools"]
        except NotRunning:
            return {}
        return pools[0] if pools else {}


def _raise_fault(task: asyncio.Task[Any], gateway_said: Callable[[], str]) -> None:
    """Any part that fails ends the demo with its reason; none is left to fail in silence."""
    error = task.exception()
    if error is None:
        return
    if isinstance(error, (DemoError, OutputError)):
        raise error
    raise DemoError(f"{task.get_name()}: {type(error).__name__}: {error}\nthe gateway said:\n{gateway_said()}") from error


def _stop(gateway: subprocess.Popen[bytes]) -> None:
    gateway.terminate()
    try:
        gateway.wait(STOP_DEADLINE)
    except subprocess.TimeoutExpired:
        gateway.kill()
        gateway.wait()
