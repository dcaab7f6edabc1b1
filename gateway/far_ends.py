"""The far ends as the broker knows them: the supervised uplink process, and what it writes down of its pools.

Nothing of it is imported where only the box itself stores.

Invariant: nothing here waits for a far end.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tidegate.store.report import WARNING, Say
from tidegate.store.schema import StoreError

from .broker import Broker
from .config import Config
from .trimming import Reach, reach

_UNKNOWN = {"waiting": 0, "oldest_age": None, "rate": 0.0, "drain": None, "delivered": 0, "refused": 0}
"""Of a pool that nothing is known of."""


class FarEnds:
    """See the module. `answers` is called when some have come down."""

    def __init__(self, config: Config, broker: Broker, report: Say, answers: Callable[[], None]) -> None:
        self._config = config
        self._broker = broker
        self._report = report
        self._own_mistake = ""
        self._named: list[str] = []
        """The pools that the rules name."""
        self._uplink = _uplink(config, report, answers)
        self._restarting: asyncio.Task[None] | None = None
        """Held, or it might be collected before it is done."""

    def read(self, files: Iterable[Any]) -> None:
        """The rules, as they are in force now."""
        mistakes = [str(file.mistakes[0]) for file in files if file.backend == "sqlite" and file.mistakes]
        self._own_mistake = mistakes[0] if mistakes else ""
        self._named = [pool.full_name for file in files if file.backend != "sqlite" for pool in file.pools]

    # -- the process -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        if self._uplink is not None:
            await self._uplink.start()

    async def stop(self, timeout: float) -> None:
        if self._uplink is not None:
            await self._uplink.stop(timeout)

    def wake(self) -> bool:
        """There is something new in the log; whether anybody wants to know."""
        if self._uplink is not None:
            self._uplink.wake()
        return self._uplink is not None

    def restart(self) -> bool:
        """Have the rules read again and the far ends tried at once; whether there is a process for them."""
        if self._uplink is not None:
            self._restarting = asyncio.get_running_loop().create_task(self._uplink.restart(), name="restart uplink")
        return self._uplink is not None

    # -- what it writes down ---------------------------------------------------------------------------------------

    def reach(self) -> Reach:
        """Where the cursors of all who wait are: sessions as stored, pools as they report."""
        if self._uplink is None:
            return reach(self._broker, ())
        from tidegate.uplink.progress import held

        try:
            return reach(self._broker, held(self._config.data, self._named))
        except StoreError as error:
            self._report("uplink_db_unusable", str(error), WARNING)
            return Reach(0, ())

    def pools(self) -> list[dict[str, Any]]:
        """For `status`: the box itself where it does not do what its rules say, and each far end."""
        return self._own_pool() + self._others()

    def _own_pool(self) -> list[dict[str, Any]]:
        if not self._own_mistake:
            return []
        hint = "what the box gives back is off until this is mended and read again (SIGHUP); messages are kept"
        return [{"name": "sqlite", "state": "misconfigured", "error": self._own_mistake, "hint": hint, **_UNKNOWN}]

    def _others(self) -> list[dict[str, Any]]:
        if self._uplink is None:
            return []
        from tidegate.uplink.lane_book import read_lanes
        from tidegate.uplink.progress import read_pools

        try:
            found = read_pools(self._config.data, self._broker.gaps.ahead)
            lanes = read_lanes(self._config.data)
        except StoreError as error:
            return [{"name": "uplink", "state": "misconfigured", "error": str(error), "hint": "", **_UNKNOWN}]
        pools = [pool.as_dict(self._broker.log.now) for pool in found]
        return [pool | {"lookups": lanes[name]._asdict()} if (name := str(pool["name"])) in lanes else pool for pool in pools]

    def stranded(self, served: list[str]) -> list[dict[str, object]]:
        """What is in quarantine of pools that are not configured any more."""
        from tidegate.uplink.progress import stranded

        try:
            return stranded(self._config.data, served)
        except StoreError:
            return []  # `pools` tells it


def _uplink(config: Config, report: Say, answers: Callable[[], None]) -> Any:
    """The supervisor of the uplink process; None if there is no far end."""
    backends = [name for name in config.backends if name != "sqlite"]
    if not backends:
        return None
    from .supervisor import Supervisor

    command = [sys.executable, "-m", "tidegate.uplink.child", "--data", str(config.data), "--conf", str(config.conf_dir)]
    command += ["--log-format", config.log_format, "--log-level", config.log_level]
    for name in backends:
        command += ["--backend", name]
    return Supervisor(command, report, answers)
