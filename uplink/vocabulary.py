"""The specification's words as tables: events, functions, pool keys and rule options of every backend.

`rule.py` looks names up here and nowhere else, so a name that is missing here is an unknown name, reported with the nearest
one that is known.

Invariant: every key that a file in `conf/` shows stands in `POOL_KEYS` with the default the file shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.store.entry import KINDS, PUBLISH

EVENTS = {
    **{name: kind for name, kind in KINDS.items() if name not in ("gap", "position")},
    "message.delivered": KINDS["message.deliver"],
}
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

BACKEND_FUNCTIONS = {"influxdb": ("on_message_publish",), "opentsdb": ("on_message_publish",)}
"""Backend -> the functions it has, where these are not all: a time series holds nothing that could be read back."""

POSITIONS = frozenset(("on_message_acked", "on_message_acked_for_pubsub"))
"""Functions that move a position: carried out when the broker has folded the acknowledgements."""

_STORING = """
on_client_connected on_client_disconnected on_message_publish on_message_store on_message_retain on_retain_delete
"""
LOGGED_FOR_SQLITE = frozenset(_STORING.split())
"""Functions of sqlite for which something is logged; the others read the log (`uplink.local`)."""
READING = frozenset(name for name in FUNCTIONS if name.endswith("_lookup") or name.startswith("on_message_fetch"))
"""Functions that ask a far end (`asking_lane`); they write nothing there."""

RULE_OPTIONS = ("topic", "action", "pool", "expired_time", "offline_opts", "first_fetch", "payload_format")
FIRST_FETCH = ("window", "none")
OFFLINE_OPTIONS = ("max_returned_count", "time_range")
MAX_SECONDS = 100 * 365 * 86_400
"""Of `expired_time` and `time_range`: what every far end can count."""
WITHOUT_TOPIC = ("client.connected", "client.disconnected", "session.created")
"""Events that have no topic to filter by."""
OPTION_USES = {
    "expired_time": ("on_message_publish", "on_message_store", "on_message_retain"),
    "offline_opts": ("on_message_fetch", "on_message_fetch_for_queue", "on_message_fetch_for_pubsub"),
    "first_fetch": ("on_message_fetch", "on_message_fetch_for_pubsub"),
    "payload_format": ("on_message_publish", "on_message_store", "on_message_retain"),
}
"""Option -> the functions on which it has an effect."""
OPTION_BACKENDS = {
    "expired_time": ("redis", "sqlite"),
    "first_fetch": ("sqlite", "redis", "mysql", "pgsql"),
    "payload_format": ("mongo",),
}
"""Option -> the backends that know it, where these are not all."""
PAYLOAD_FORMATS = ("plain_text", "mongo_json")

EXPIRED_TIME = {"redis": 7200, "sqlite": 604_800}
"""Default `expired_time` of stored messages in seconds, where it has a meaning."""


@dataclass(frozen=True, slots=True)
class Key:
    """A pool key: its default, and how its value is read, by the words of `pools._value`."""

    kind: str = "text"
    default: object = ""
    choices: tuple[str, ...] = ()


def _keys(names: str) -> dict[str, Key]:
    """Keys of a backend that comes later: known by name, any value."""
    return {name: Key("secret" if name.endswith(("password", "secret_access_key")) else "text") for name in names.split()}


_SQL = {
    "password": Key("secret"),
    "password_file": Key("secret_file"),
    "database": Key("text", "mqtt"),
    "ssl": Key("flag", False),
    "cacertfile": Key("file"),
    "certfile": Key("file"),
    "keyfile": Key("file"),
    "timeout": Key("seconds", 10.0),
    "lookup_interval": Key("interval", 60.0),
}

POOL_KEYS: dict[str, dict[str, Key]] = {
    "redis": {
        "type": Key("choice", "single", ("single", "sentinel", "cluster")),
        "server": Key("servers", (("127.0.0.1", 6379),)),
        "sentinel": Key(),
        "sentinel_password": Key("secret"),
        "database": Key("number", 0),
        "username": Key(),
        "password": Key("secret"),
        "password_file": Key("secret_file"),
        "ssl": Key("flag", False),
        "cacertfile": Key("file"),
        "certfile": Key("file"),
        "keyfile": Key("file"),
        "channel": Key("text", "mqtt_channel"),
        "timeout": Key("seconds", 10.0),
        "pool_size": Key("number", 8),
        "lookup_interval": Key("interval", 60.0),
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
        "type rs_set_name server pool_size database username password auth_source ssl keyfile certfile cacertfile w_mode r_mode"
    ),
    "cassa": _keys("server pool_size auto_reconnect username password keyspace logger"),
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

KEY_ALIASES = {
    "mongo": {"c_pool_size": "pool_size", "login": "username"},
    "cassa": {"nodes": "server", "size": "pool_size"},
}
"""Backend -> a key as the specification writes it for this backend alone -> its name everywhere else."""

BACKEND_SETTINGS = {"dynamo": ("region",)}
"""Settings that stand without a pool and hold for all of them."""
_TOPOLOGY = """
pool_size max_overflow overflow_ttl overflow_check_period local_threshold_ms connect_timeout_ms socket_timeout_ms
server_selection_timeout_ms wait_queue_timeout_ms heartbeat_frequency_ms min_heartbeat_frequency_ms
"""
SETTING_GROUPS = {"mongo": {"topology": tuple(_TOPOLOGY.split())}}
"""Backend -> a word in the place of the pool -> the keys that go with it; they hold for all pools."""

_READING_BACK = dict.fromkeys(("time_range", "max_returned_count"), "offline_opts")
IN_THE_RULES = {
    "redis": {"msg.expired_after": "expired_time", **_READING_BACK},
    "mysql": _READING_BACK,
    "pgsql": _READING_BACK,
}
"""Backend -> a setting that EMQX's files have for all rules -> the option of a rule that says it here."""

ACTION_KEYS = {
    "redis": ("function", "commands"),
    "mysql": ("function", "sql"),
    "pgsql": ("function", "sql"),
    "cassa": ("function", "cql"),
}
DEFAULT_ACTION_KEYS = ("function",)

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
