"""The specification's words as tables: events, functions, pool keys and rule options of every backend.

`rule.py` looks names up here and nowhere else, so a name that is missing here is an unknown name, reported with the nearest
one that is known. Functions in `LATER` are words of the specification whose work is not built yet: they load with a warning.

Invariant: every key that a file in `conf/` shows stands in `POOL_KEYS` with the default the file shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.store.entry import KINDS, PUBLISH

EVENTS = {**{name: kind for name, kind in KINDS.items() if name != "gap"}, "message.delivered": KINDS["message.deliver"]}
"""Hook name -> kind of entry."""

PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "client.connected": ("clientid",),
    "client.disconnected": ("clientid",),
    "session.created": ("clientid",),
    "session.subscribed": ("clientid", "topic", "qos"),
    "session.unsubscribed": ("clientid", "topic"),
    "message.publish": ("msgid", "topic", "payload", "qos", "retain", "timestamp", "clientid"),
    "message.deliver": ("msgid", "topic", "clientid"),
    "message.acked": ("msgid", "topic", "clientid"),
}

FUNCTIONS: dict[str, tuple[str, ...]] = {
    "on_client_connected": ("client.connected",),
    "on_client_disconnected": ("client.disconnected",),
    "on_subscribe_lookup": ("session.created", "client.connected"),
    "on_message_fetch": ("session.subscribed",),
    "on_message_fetch_for_queue": ("session.subscribed",),
    "on_message_fetch_for_pubsub": ("session.subscribed",),
    "on_retain_lookup": ("session.subscribed",),
    "on_acked_delete": ("session.unsubscribed",),
    "on_message_publish": ("message.publish",),
    "on_message_store": ("message.publish",),
    "on_message_retain": ("message.publish",),
    "on_retain_delete": ("message.publish",),
    "on_message_acked": ("message.acked",),
    "on_message_acked_for_queue": ("message.acked",),
    "on_message_acked_for_pubsub": ("message.acked",),
}
"""Function -> the events whose rules may name it."""

FUNCTION_ALIASES = {"on_subscription_lookup": "on_subscribe_lookup"}

WRITING = frozenset(
    ("on_client_connected", "on_client_disconnected", "on_message_publish", "on_message_retain", "on_retain_delete")
)
LATER = frozenset(FUNCTIONS) - WRITING
"""Known names whose work comes with a later version."""
LATER_OF = {name: LATER - {"on_message_store"} for name in ("mysql", "pgsql")}
"""The same for a backend that is further."""

RULE_OPTIONS = ("topic", "action", "pool", "expired_time", "offline_opts", "payload_format")
OFFLINE_OPTIONS = ("max_returned_count", "time_range")
PAYLOAD_FORMATS = ("plain_text", "mongo_json")

EXPIRED_TIME = {"redis": 7200, "sqlite": 604_800}
"""Default `expired_time` of `on_message_publish` in seconds, where it has a meaning."""


@dataclass(frozen=True, slots=True)
class Key:
    """A pool key: how its value is read (`text`, `number`, `flag`, `seconds`, `servers`, `choice`, `file`) and its default."""

    kind: str = "text"
    default: object = ""
    choices: tuple[str, ...] = ()


def _keys(names: str) -> dict[str, Key]:
    """Keys of a backend that comes later: known by name, any value."""
    return {name: Key() for name in names.split()}


_SQL = {
    "password": Key(),
    "password_file": Key(),
    "database": Key("text", "mqtt"),
    "ssl": Key("flag", False),
    "cacertfile": Key("file"),
    "certfile": Key("file"),
    "keyfile": Key("file"),
    "timeout": Key("seconds", 10.0),
}

POOL_KEYS: dict[str, dict[str, Key]] = {
    "redis": {
        "type": Key("choice", "single", ("single", "sentinel", "cluster")),
        "server": Key("servers", (("127.0.0.1", 6379),)),
        "sentinel": Key(),
        "database": Key("number", 0),
        "username": Key(),
        "password": Key(),
        "password_file": Key(),
        "channel": Key("text", "mqtt_channel"),
        "timeout": Key("seconds", 10.0),
        "pool_size": Key("number", 8),
    },
    "sqlite": {},
    "mysql": {
        "server": Key("servers", (("127.0.0.1", 3306),)),
        "pool_size": Key("number", 8),
        "user": Key("text", "root"),
        **_SQL,
    },
    "pgsql": {
        "server": Key("servers", (("127.0.0.1", 5432),)),
        "pool_size": Key("number", 8),
        "username": Key("text", "root"),
        **_SQL,
        "binary_payload": Key("choice", "hex", ("hex", "base64", "quarantine")),
    },
    "mongo": _keys(
        "type rs_set_name server c_pool_size pool_size database login password auth_source ssl keyfile certfile"
        " cacertfile w_mode r_mode"
    ),
    "cassa": _keys("nodes server size pool_size auto_reconnect username password keyspace logger"),
    "dynamo": _keys("server pool_size region aws_access_key_id aws_secret_access_key"),
    "influxdb": _keys("server pool_size set_timestamp"),
    "opentsdb": _keys("server pool_size summary details sync sync_timeout max_batch_size"),
}
"""Backend -> key -> how it is read. Backends that come later take any value."""

BUILT = ("redis", "sqlite", "mysql", "pgsql")
"""Backends whose values are checked and whose rules do their work in this version."""

DRIVERS = {"mysql": ("pymysql", "mysql"), "pgsql": ("psycopg", "postgresql")}
"""Backend -> the module of its driver and the extra that installs it; what is not here is always installed."""

POOL_PREFIXES = {"ecql": "cassa"}
"""Pools of Cassandra are written `backend.ecql.*` while its hooks are `backend.cassa.*`."""

BACKEND_SETTINGS = {"dynamo": ("region",)}
SETTING_GROUPS = {"mongo": ("topology",)}

ACTION_KEYS = {"redis": ("function", "commands"), "sqlite": ("function",), "cassa": ("function", "cql")}
DEFAULT_ACTION_KEYS = ("function", "sql")

_NOT_IN_A_BATCH = """
auth blmove blmpop blpop brpop brpoplpush bzmpop bzpopmax bzpopmin client config debug discard eval evalsha exec fcall hello
monitor multi psubscribe punsubscribe quit reset script select shutdown ssubscribe subscribe sunsubscribe unsubscribe
unwatch wait waitaof watch
"""
NOT_IN_A_BATCH = frozenset(_NOT_IN_A_BATCH.split())
"""Redis commands that block, change the connection or cannot run inside a script."""


def placeholders(backend: str, event: str) -> tuple[str, ...]:
    """The `${name}`s a rule of this event may use."""
    names = PLACEHOLDERS[event]
    return ("message", *names) if backend == "redis" and EVENTS[event] == PUBLISH else names
