"""A quarantined SQL write as a person sees and changes it, without a server."""

from __future__ import annotations

import pytest
from tidegate.uplink import sql_record
from tidegate.uplink.sql_rows import ALL_NAMES, Message, Own, Retained, Stamp, decode
from tidegate.uplink.sql_statement import compile_statement

MESSAGE = Message("0id", "t/ü", "c", "barn", 1, 0, b"\xff", 1_700_000_000_000)
RETAINED = Retained("t", "0id", "c", "barn", 1, b"text", 1_700_000_000_000, Stamp(1, "g", 2, 3))
OWN = Own(compile_statement("insert into t values (${qos}, ${payload}, ${topic})", ALL_NAMES), (1, b"\x00", "a"))


@pytest.mark.parametrize("row", [MESSAGE, RETAINED, OWN], ids=["message", "retained", "sql"])
def test_a_row_survives_the_quarantine(row: Message | Retained | Own) -> None:
    assert decode(row.data) == row


def test_fields_have_names_and_can_be_changed() -> None:
    kind, fields = sql_record.describe(MESSAGE.data)
    assert (kind, fields["topic"], fields["qos"], fields["payload"]) == ("message", "t/ü".encode(), b"1", b"\xff")
    changed = decode(sql_record.change(MESSAGE.data, {"topic": b"short", "qos": b"2", "payload": b"\x00new"}))
    assert changed == MESSAGE._replace(topic="short", qos=2, payload=b"\x00new")


def test_which_event_it_was_cannot_be_changed() -> None:
    assert "stamp" not in sql_record.describe(RETAINED.data)[1]
    changed = decode(sql_record.change(RETAINED.data, {"payload": b"other"}))
    assert changed == RETAINED._replace(payload=b"other")


def test_a_statement_s_values_are_numbered_and_named() -> None:
    assert sql_record.describe(OWN.data) == ("sql", {"0 qos": b"1", "1 payload": b"\x00", "2 topic": b"a"})
    assert decode(sql_record.change(OWN.data, {"1 payload": b"text"})) == OWN._replace(values=(1, "text", "a"))


@pytest.mark.parametrize(
    ("name", "value", "words"), [("topc", b"x", "its fields are msgid, topic, sender"), ("qos", b"two", "qos is a number")]
)
def test_a_change_that_cannot_be_made_says_what_is_allowed(name: str, value: bytes, words: str) -> None:
    with pytest.raises(sql_record.FieldFault, match=words):
        sql_record.change(MESSAGE.data, {name: value})
