"""Redis Cluster, and Redis behind sentinels, as the campaign's far ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from tests.support.redis_cluster import Cluster, Watched
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from . import far_end
from .far_end import Contents, Door, FarEnd, Fault, between
from .redis_far_end import DURABLE, NO_DEADLOCK, NO_SCHEMA, configured, contents, marks, rules

CALM = 40.0


class ClusterFarEnd(FarEnd):
    """Three nodes; what happens, happens to the one that has the key `list`."""

    name, backend = "cluster", "redis"
    impossible: Mapping[str, str] = {far_end.DEADLOCK: NO_DEADLOCK, far_end.SCHEMA: NO_SCHEMA}

    def __init__(self, directory: Path) -> None:
        self._cluster = Cluster(directory, *DURABLE)

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cluster.__exit__(kind, error, trace)

    def rules(self) -> str:
        servers = ", ".join(f"127.0.0.1:{proxy.port}" for proxy in self._cluster.proxies)
        return rules(f"type = cluster\nserver = {servers}")

    def doors(self) -> Sequence[Door]:
        pairs = zip(self._cluster.proxies, self._cluster.nodes, strict=True)
        return [Door(proxy, lambda node=node: marks(node)) for proxy, node in pairs]  # type: ignore[misc]

    def faults(self) -> Sequence[Fault]:
        return [
            Fault(far_end.KILLED, lambda: self._with(RedisServer.kill, RedisServer.start)),
            Fault(far_end.FROZEN, lambda: self._with(RedisServer.freeze, RedisServer.thaw)),
            Fault(far_end.READ_ONLY, lambda: configured(self._owner(), "min-replicas-to-write", "1", "0")),
            Fault(far_end.MEMORY, lambda: configured(self._owner(), "maxmemory", "1", "0")),
            Fault(far_end.CONNECTIONS, lambda: configured(self._owner(), "maxclients", "1", "10000", self.drop)),
            Fault(
                far_end.PASSWORD,
                lambda: configured(self._owner(), "requirepass", "changed", "", self.drop),
                far_end.MISCONFIGURED,
            ),
            Fault(far_end.RESTORED, lambda: self.set_back(self._keep, self._bring_back), far_end.CONNECTED),
            Fault(far_end.MOVED, self._moving, far_end.CONNECTED),
        ]

    def contents(self) -> Contents:
        with self._cluster.client(decode_responses=False) as client:
            return contents(client)

    def _owner(self) -> RedisServer:
        return self._cluster.owner("list")[1]

    @contextmanager
    def _with(self, begin: Callable[[RedisServer], None], end: Callable[[RedisServer], None]) -> Iterator[None]:
        node = self._owner()
        with between(lambda: begin(node), lambda: end(node)):
            yield
        self._cluster.wait_until_ok()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """The slot of the list is on its way to another node."""
        source, target = self._cluster.begin_move("list")
        with between(lambda: None, lambda: self._cluster.end_move("list", source, target)):
            yield

    def _keep(self) -> None:
        for node in self._cluster.nodes:
            node.keep()
        self._cluster.wait_until_ok()

    def _bring_back(self) -> None:
        for node in self._cluster.nodes:
            node.bring_back()
        self._cluster.wait_until_ok()


class SentinelFarEnd(FarEnd):
    """A master, a replica and three sentinels: most of what happens ends in a fail-over, and what it loses is sent again."""

    name, backend = "sentinel", "redis"
    impossible: Mapping[str, str] = {
        far_end.DEADLOCK: NO_DEADLOCK,
        far_end.SCHEMA: NO_SCHEMA,
        far_end.RESTORED: "a replica that lags behind is the older state here, and a fail-over brings it",
    }

    def __init__(self, directory: Path) -> None:
        self._watched = Watched(directory, *DURABLE)

    def __enter__(self) -> Self:
        self._watched.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watched.__exit__(kind, error, trace)

    def rules(self) -> str:
        return rules(self._watched.settings())

    def doors(self) -> Sequence[Door]:
        leader = self._watched.leader()
        return [Door(self._watched.proxies[leader], lambda: marks(leader))]

    def faults(self) -> Sequence[Fault]:
        configure = self._configured
        return [
            Fault(far_end.KILLED, self._killed),
            Fault(far_end.FROZEN, self._frozen),
            Fault(far_end.READ_ONLY, lambda: configure("min-replicas-to-write", "5", "0")),
            Fault(far_end.MEMORY, lambda: configure("maxmemory", "1", "0")),
            Fault(far_end.CONNECTIONS, lambda: configure("maxclients", "1", "10000", drop=True)),
            Fault(far_end.PASSWORD, lambda: configure("requirepass", "changed", "", drop=True), far_end.MISCONFIGURED),
            Fault(far_end.FAILED_OVER, self._failing_over, far_end.CONNECTED),
        ]

    def contents(self) -> Contents:
        with self._watched.leader().client(decode_responses=False) as client:
            return contents(client)

    @contextmanager
    def _killed(self) -> Iterator[None]:
        """The replica takes over, and the one that was killed follows it."""
        leader = self._watched.leader()
        with self._calm_afterwards():
            leader.kill()
            try:
                yield
                wait_until(lambda: self._watched.leader() is not leader, CALM)
            finally:
                leader.start()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        leader = self._watched.leader()
        with self._calm_afterwards(), between(leader.freeze, leader.thaw):
            yield

    @contextmanager
    def _configured(self, name: str, value: str, back: str, drop: bool = False) -> Iterator[None]:
        leader = self._watched.leader()
        with self._calm_afterwards(), configured(leader, name, value, back, self.drop if drop else lambda: None):
            yield

    @contextmanager
    def _failing_over(self) -> Iterator[None]:
        """As an operator does it, while everything works."""
        leader = self._watched.leader()
        with self._calm_afterwards():
            wait_until(self._asks_for_another, CALM)
            wait_until(lambda: self._watched.leader() is not leader, CALM)
            yield

    def _asks_for_another(self) -> bool:
        """Refused while a fail-over is under way or the replica is not good enough yet."""
        with self._watched.sentinels[0].client() as client, suppress(redis.ResponseError):
            client.execute_command("SENTINEL FAILOVER mymaster")
            return True
        return False

    @contextmanager
    def _calm_afterwards(self) -> Iterator[None]:
        """The next fault meets a master with a replica again."""
        yield
        wait_until(self._watched.is_calm, CALM)
