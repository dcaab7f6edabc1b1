"""What the error numbers of MySQL and MariaDB mean for us; pure.

Invariant: what says something about the server, the line or our rights is never taken for a fault of a record.
"""

from __future__ import annotations

from .errors import Misconfigured, NotConnected, Rejected

_ENVIRONMENT = frozenset(
    (
        *(1015, 1021, 1028, 1030, 1037, 1038, 1040, 1041, 1047, 1053, 1114, 1129, 1152, 1156, 1158, 1159, 1160, 1161, 1180),
        *(1181, 1203, 1205, 1206, 1213, 1226, 1290, 1297, 1317, 1613, 1614, 1637, 1792, 1836, 1874, 1878, 1927, 1969),
        *(3024, 3032, 3100, 3101, 3168, 3169, 3170, 3572, 3579, 4031, 4081, 4082),
    )
)
"""Server or line: shutting down, read-only, offline, full, too many connections, deadlock, time-outs, memory, a group of
servers that is not ready or decided otherwise."""
_CLIENT = range(2000, 2100)
"""The driver's own: no connection, connection lost."""
_LOGIN = (1045, 1251, 1275, 1698, 1820, 1862, 2049, 2054, 2059, 2061, 3118, 3159)
_RIGHTS = (1044, 1142, 1143, 1227, 1370)
_MISSING = (1051, 1054, 1146)
_OURS = (1049, 1064, 1103, 1130, 1136, 1149, 1235, 1305, 1318, 1347, 1364, 1471, 1630, 1665, *_LOGIN, *_RIGHTS, *_MISSING)
"""Login, rights, tables, columns, the text of a statement, and what only a setting of the server mends."""


def meaning(number: int, text: str, pool: str) -> Exception:
    """Which of the three it is; `pool` is its full name."""
    if number in _OURS:
        what = "refused the login" if number in _LOGIN else "says"
        return Misconfigured(f"MySQL {what}: {text} ({number})", _hint(number, pool))
    if number in _ENVIRONMENT or number in _CLIENT or number == 0:
        return NotConnected(f"{text} ({number})" if number else text)
    return Rejected(f"{number}: {text}")


def _hint(number: int, pool: str) -> str:
    if number == 3159:
        return f"set backend.{pool}.ssl = true (and cacertfile): the server takes encrypted connections alone"
    if number == 1665:
        return "set binlog_format = ROW (or MIXED) on the server: we read what is committed, which STATEMENT cannot log"
    if number in _LOGIN:
        return f"set backend.{pool}.user and .password (or password_file) to what the server expects"
    if number in (1044, 1049):
        return f"create the database and grant the user of {pool} rights in it, or set backend.{pool}.database"
    if number == 1130:
        return f"allow the user of {pool} to come from this machine (CREATE USER ...@'host')"
    if number in _RIGHTS:
        return f"grant the user of {pool} SELECT, INSERT, UPDATE and DELETE on its database"
    if number in _MISSING:
        return (
            f"`tidegate uplink init {pool}` creates what is missing of emqx_backend_mysql.sql; a table of your own sql is yours"
            " to create"
        )
    return "correct the sql of the rule, then reload; `tidegate status` shows this text until then"
