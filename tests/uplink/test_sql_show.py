"""What `tidegate rules test` shows of a SQL far end: the link's own statements, written down instead of sent."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from tidegate.store.entry import ACKED, PUBLISH, Entry
from tidegate.uplink.explain import SENDS, explain

from .logfile import GATEWAY, START
from .test_specification import block, load_text


def importer(name: str) -> Any:
    return importlib.import_module(f"tidegate.uplink.to_{name}")


@pytest.mark.parametrize("backend", ["mysql", "pgsql"])
def test_the_statements_are_shown_with_their_values(tmp_path: Path, backend: str) -> None:
    statement = "insert into t values (${payload}, 'x%', ${qos})"
    rule = f'backend.{backend}.hook.message.publish.9 = {{"action": {{"sql": "{statement}"}}, "pool": "pool1"}}\n'
    file = load_text(tmp_path, backend, block(backend) + rule)
    assert file.mistakes == ()
    about = Entry(7, START, START, PUBLISH, "c1", "a/b", 1, True, b"it's", b"", GATEWAY, 1, "0" * 20)
    found = explain(file, about, "barn", importer)
    sent = {verdict.rule.number: verdict.writes for verdict in found if verdict.result == SENDS}
    assert list(sent) == [1, 2, 9]
    (message,) = sent[1]
    assert message.statement.startswith("INSERT INTO mqtt_msg (msgid, topic, sender")
    if backend == "mysql":  # many rows go as one text, each value escaped
        values = f"('{'0' * 20}','a/b','c1','barn',1,1,'it\\'s','2023-11-14 22:13:20')"
        assert message.statement.endswith(f" VALUES {values}")
    else:
        assert list(message.values)[:3] == ["0" * 20, "a/b", "c1"]
    assert [shown.statement.split()[:3] for shown in sent[2] if "mqtt_retain" in shown.statement] == [
        ["SELECT", "topic,", "arrived"],
        ["INSERT", "INTO", "mqtt_retain"],
    ]
    acked = about._replace(kind=ACKED, payload=("0" * 20).encode())
    (verdict,) = [one for one in explain(file, acked, "barn", importer) if one.rule.function == "on_message_acked"]
    assert [shown.statement.split()[:3] for shown in verdict.writes] == [
        ["INSERT", "INTO", "tidegate_position"],
        ["INSERT", "INTO", "mqtt_acked"],
    ]
    (own,) = sent[9]
    assert (own.statement, own.values) == ("insert into t values (%s, 'x%%', %s)", ("it's", 1))
