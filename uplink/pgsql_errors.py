"""What PostgreSQL's error codes mean for us, by SQLSTATE; pure.

Invariant: what says something about the server, the line or our rights is never taken for a fault of a record.
"""

from __future__ import annotations

from .errors import Misconfigured, NotConnected, Rejected

_OF_THE_RECORD = ("21", "22", "23", "27", "2F", "38", "39", "44", "54", "P0")
"""Classes: data, integrity, triggers, routines, check options, limits, errors raised by functions."""
_OF_OURS = ("0A", "28", "3D", "3F", "42")
_LOGIN = ("28000", "28P01")


def meaning(code: str, text: str, pool: str) -> Exception:
    """Which of the three it is; `pool` is its full name."""
    first = text.strip().partition("\n")[0]
    if code[:2] in _OF_OURS:
        return Misconfigured(f"PostgreSQL says: {first}", _hint(code, pool))
    if code[:2] in _OF_THE_RECORD:
        return Rejected(f"{code}: {first}")
    return NotConnected(first)


def of_a_refused_connection(text: str, pool: str) -> Exception:
    """Before there is a session the driver hands over text without a code."""
    first = text.strip().partition("\n")[0].removeprefix("connection failed: ")
    if "authentication failed" in text or "pg_hba.conf" in text or "no password supplied" in text:
        return Misconfigured(f"PostgreSQL refused the login: {first}", _hint(_LOGIN[0], pool))
    if "does not exist" in text and "database" in text:
        return Misconfigured(f"PostgreSQL says: {first}", _hint("3D000", pool))
    if "role" in text and ("does not exist" in text or "not permitted to log in" in text):
        return Misconfigured(f"PostgreSQL refused the login: {first}", _hint(_LOGIN[0], pool))
    if "does not support SSL" in text or "certificate" in text or ("SSL error:" in text and "unexpected eof" not in text):
        hint = f"set backend.{pool}.ssl (and cacertfile, certfile, keyfile) to what the server has"
        return Misconfigured(f"no encrypted line: {first}", hint)
    return NotConnected(first)


def _hint(code: str, pool: str) -> str:
    if code in _LOGIN:
        return f"set backend.{pool}.username and .password (or password_file) to what the server expects"
    if code in ("3D000", "3F000"):
        return f"create the database (createdb mqtt -E UTF8) or set backend.{pool}.database"
    if code == "42501":
        return f"grant the user of {pool} SELECT, INSERT, UPDATE and DELETE on the tables and USAGE on their sequences"
    if code in ("42P01", "42703", "42P10"):
        return (
            f"`tidegate uplink init {pool}` creates what is missing of emqx_backend_pgsql.sql; a table of your own sql is yours"
            " to create"
        )
    return "correct the sql of the rule, then reload; `tidegate status` shows this text until then"
