"""Real Redis servers together: a cluster of three nodes, or a master with a replica and three sentinels."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.cluster import ClusterNode

from .ports import BUS, free_port, free_ports_of_nodes
from .proxy import Proxy
from .redis_server import RedisServer
from .waiting import wait_until


class Cluster:
    """Use as a context manager; `client()` talks to all, `nodes` are the servers, each announced behind its proxy.

    `options` are those of every server beside its own.
    """

    def __init__(self, directory: Path, *options: str, password: str = "", certificates: Path | None = None) -> None:
        ports = free_ports_of_nodes(3)
        self.proxies = [Proxy(port) for port in ports]
        self.nodes = [
            RedisServer(
                directory,
                *_options(port, proxy.port, certificates),
                *options,
                port=port,
                password=password,
                certificates=certificates,
            )
            for port, proxy in zip(ports, self.proxies, strict=True)
        ]
        self._options: dict[str, Any] = {"password": password} if password else {}
        self._login = ["-a", password] if password else []
        if certificates is not None:
            self._options |= {"ssl": True, "ssl_ca_certs": str(certificates / "ca.pem")}
            self._login += ["--tls", "--cacert", str(certificates / "ca.pem")]
        self._stack = ExitStack()

    @property
    def port(self) -> int:
        return self.nodes[0].port

    def __enter__(self) -> Self:
        with self._stack:
            for proxy, node in zip(self.proxies, self.nodes, strict=True):
                self._stack.enter_context(proxy)
                self._stack.enter_context(node)
            addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
            create = ["redis-cli", *self._login, "--cluster", "create", *addresses, "--cluster-replicas", "0", "--cluster-yes"]
            subprocess.run(create, check=True, capture_output=True)
            self.wait_until_ok()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def wait_until_ok(self) -> None:
        """Every node knows all the others."""
        wait_until(lambda: all(self._is_ok(node) for node in self.nodes))

    def client(self, **options: Any) -> redis.RedisCluster:
        """A client that decodes answers to text, unless asked otherwise."""
        options.setdefault("decode_responses", True)
        nodes = [ClusterNode("127.0.0.1", node.port) for node in self.nodes]  # type: ignore[no-untyped-call]
        return redis.RedisCluster(startup_nodes=nodes, **(self._options | options))

    def owner(self, key: str) -> tuple[int, RedisServer]:
        """The key's slot and the node that has it."""
        with self.client() as client:
            slot = client.keyslot(key)
            announced = client.get_node_from_key(key).port
        return slot, next(node for node, proxy in zip(self.nodes, self.proxies, strict=True) if proxy.port == announced)

    def begin_move(self, key: str) -> tuple[RedisServer, RedisServer]:
        """The key's slot is on its way: from, to. What is there stays until `end_move`."""
        slot, source = self.owner(key)
        target = next(node for node in self.nodes if node is not source)
        with source.client() as old, target.client() as new:
            new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", old.cluster("MYID"))
            old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", new.cluster("MYID"))
        return source, target

    def end_move(self, key: str, source: RedisServer, target: RedisServer) -> None:
        """Every key of the slot goes over, then the slot itself."""
        with source.client() as old, target.client() as new:
            slot = old.execute_command("CLUSTER KEYSLOT", key)
            while keys := old.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
                old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            owner = new.cluster("MYID")
            for node in (new, old):
                node.execute_command("CLUSTER SETSLOT", slot, "NODE", owner)

    @staticmethod
    def _is_ok(node: RedisServer) -> bool:
        with node.client() as client:
            info: Any = client.execute_command("CLUSTER INFO")
            return bool(info.get("cluster_state") == "ok")


class Watched:
    """A master, its replica, and three sentinels that watch it under the name mymaster; both announced behind proxies."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        password: str = "",
        sentinel_password: str = "",
        certificates: Path | None = None,
    ) -> None:
        self._directory = directory
        self._password = password
        self._sentinel_password = sentinel_password
        self._certificates = certificates
        self._secrets = f"sentinel auth-pass mymaster {password}\n" if password else ""
        if password:
            options += ("--masterauth", password)
        if certificates is not None:
            options += ("--tls-replication", "yes")
        self.proxies: dict[RedisServer, Proxy] = {}
        self.master = self._server(options)
        leader = ("--replicaof", f"127.0.0.1 {self.proxies[self.master].port}", "--repl-diskless-sync-delay", "0")
        self.replica = self._server((*options, *leader))
        self.sentinels: list[RedisServer] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            for server, proxy in self.proxies.items():
                self._stack.enter_context(proxy)
                self._stack.enter_context(server)
            wait_until(lambda: is_linked(self.replica))
            for _ in range(3):
                sentinel = RedisServer(
                    self._directory,
                    *(("--tls-replication", "yes") if self._certificates is not None else ()),
                    password=self._sentinel_password,
                    sentinel=self._conf(),
                    certificates=self._certificates,
                )
                self.sentinels.append(self._stack.enter_context(sentinel))
            wait_until(lambda: all(self._knows_all(sentinel) for sentinel in self.sentinels))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def settings(self) -> str:
        """The pool's, for `Rig`."""
        servers = ", ".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"type = sentinel\nserver = {servers}\nsentinel = mymaster"

    def leader(self) -> RedisServer:
        """Who is master as the first sentinel has it."""
        with self.sentinels[0].client() as client:
            _, port = client.sentinel_get_master_addr_by_name("mymaster")
        return next(server for server, proxy in self.proxies.items() if proxy.port == port)

    def is_calm(self) -> bool:
        """All sentinels agree, and the other server follows their master."""
        leader = self.leader()
        (other,) = [server for server in self.proxies if server is not leader]
        return is_linked(other) and not is_linked(leader) and all(self._knows_all(sentinel) for sentinel in self.sentinels)

    def _server(self, options: Sequence[str]) -> RedisServer:
        port = free_port()
        proxy = Proxy(port)
        announced = ("--replica-announce-ip", "127.0.0.1", "--replica-announce-port", str(proxy.port))
        server = RedisServer(
            self._directory, *announced, *options, port=port, password=self._password, certificates=self._certificates
        )
        self.proxies[server] = proxy
        return server

    def _conf(self) -> str:
        return (
            f"sentinel monitor mymaster 127.0.0.1 {self.proxies[self.master].port} 2\n"
            "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 3000\n"
            f"{self._secrets}"
        )

    @staticmethod
    def _knows_all(sentinel: RedisServer) -> bool:
        with sentinel.client() as client:
            state: Any = client.sentinel_master("mymaster")
            return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 1)


def is_linked(server: RedisServer) -> bool:
    """Whether it is a replica that has a master."""
    with server.client() as client:
        return bool(client.info("replication").get("master_link_status") == "up")


def _options(port: int, announced: int, certificates: Path | None) -> tuple[str, ...]:
    tls = ("--tls-cluster", "yes", "--cluster-announce-tls-port", str(announced)) if certificates is not None else ()
    return (
        "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "1000",
        "--cluster-announce-ip", "127.0.0.1", "--cluster-announce-port", str(announced),
        "--cluster-announce-bus-port", str(port + BUS), "--cluster-require-full-coverage", "no", *tls,
    )  # fmt: skip
