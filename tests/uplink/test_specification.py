"""The specification's own eight blocks, as it prints them: each loads, with exactly the warnings that its defects deserve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tidegate.uplink.rule import RuleFile, load
from tidegate.uplink.vocabulary import BUILT, POOL_KEYS

BLOCKS = Path(__file__).parent / "specification"
NO_SPACE = "no space before the =: read all the same"

WARNINGS: dict[str, list[tuple[int, str]]] = {
    "redis": [(28, NO_SPACE)],
    "mysql": [(21, NO_SPACE)],
    "pgsql": [(24, NO_SPACE)],
    "mongo": [(11, "c_pool_size is called pool_size elsewhere: read all the same"), (60, NO_SPACE)],
    "cassa": [
        (
            2,
            "ecql is the cassa of the rules, a pool is written backend.cassa.: read all the same;"
            " so in lines 5, 8, 11, 12, 15, 18",
        ),
        (2, "nodes is called server elsewhere: read all the same"),
        (5, "size is called pool_size elsewhere: read all the same"),
        (28, "on_subscription_lookup is called on_subscribe_lookup: read all the same"),
        (43, NO_SPACE),
        (43, "a quote is missing before a name in the rule: read all the same"),
    ],
    "dynamo": [(2, "region stands without a pool and holds for all of them: read all the same"), (22, NO_SPACE)],
    "influxdb": [(14, "message.publish.1 again: this one replaces line 11")],
    "opentsdb": [
        (39, "message.publish.1 again: this one replaces line 36"),
        (39, "the rule is written for influxdb and taken as one of opentsdb: read all the same; so in line 42"),
    ],
}  # fmt: skip
RULES = {"redis": 13, "mysql": 11, "pgsql": 11, "mongo": 10, "cassa": 11, "dynamo": 10, "influxdb": 2, "opentsdb": 2}


def load_text(tmp_path: Path, backend: str, text: str) -> RuleFile:
    """Load it from a file that only we can read, so that the passwords in it are no matter."""
    path = tmp_path / f"emqx_backend_{backend}.conf"
    path.touch(0o600)
    path.write_text(text, encoding="utf-8")
    return load(path, backend)


def block(backend: str) -> str:
    return (BLOCKS / f"emqx_backend_{backend}.conf").read_text(encoding="utf-8")


def mistakes(file: RuleFile) -> list[str]:
    """Without the one that says that the backend itself comes later."""
    not_built = f"the backend {file.backend} comes with a later version; take it out of [uplink] backends"
    texts = [mistake.text for mistake in file.mistakes]
    if file.backend not in BUILT:
        texts.remove(not_built)
    return texts


def test_there_is_a_block_of_every_remote_backend() -> None:
    assert set(WARNINGS) == set(RULES) == set(POOL_KEYS) - {"sqlite"}


@pytest.mark.parametrize("backend", WARNINGS)
def test_the_block_loads_verbatim_with_a_warning_for_each_defect(tmp_path: Path, backend: str) -> None:
    file = load_text(tmp_path, backend, block(backend))
    assert mistakes(file) == []
    assert [(w.line, w.text) for w in file.warnings] == WARNINGS[backend]
    assert {warning.file for warning in file.warnings} == {str(file.path)}
    assert [pool.name for pool in file.pools] == ["pool1"]
    assert len(file.rules) == RULES[backend]


@pytest.mark.parametrize("backend", WARNINGS)
def test_what_the_block_shows_as_a_comment_loads_too(tmp_path: Path, backend: str) -> None:
    shown = re.sub(r"^##? (backend\.)", r"\1", block(backend), flags=re.MULTILINE)
    file = load_text(tmp_path, backend, shown)
    assert mistakes(file) == []


def test_settings_of_redis_and_names_of_the_other_backends_mean_the_same(tmp_path: Path) -> None:
    pools = {backend: load_text(tmp_path, backend, block(backend)).pools[0].settings for backend in WARNINGS}
    assert pools["redis"]["server"] == (("127.0.0.1", 6379),)
    assert pools["cassa"]["server"] == "127.0.0.1:9042"
    assert str(pools["cassa"]["pool_size"]) == str(pools["mongo"]["pool_size"]) == "8"


def test_rules_keep_their_options_and_order(tmp_path: Path) -> None:
    redis = load_text(tmp_path, "redis", block("redis")).rules
    assert [rule.name for rule in redis[:3]] == ["client.connected.1", "client.connected.3", "client.disconnected.1"]
    assert [rule.expired_time for rule in redis if rule.event == "message.publish"] == [3600, 3600, None]
    assert [rule.topic_filter for rule in redis if rule.event == "session.subscribed"] == ["queue/#", "pubsub/#", "#"]
    fetch = next(rule for rule in load_text(tmp_path, "mongo", block("mongo")).rules if rule.function == "on_message_fetch")
    assert (fetch.max_returned_count, fetch.time_range) == (500, 7200)
    statement = next(rule for rule in load_text(tmp_path, "cassa", block("cassa")).rules if rule.statements)
    assert [one.text for one in statement.statements] == ["insert into conn(clientid) values(${clientid})"]


def test_the_last_of_repeated_rules_is_in_force(tmp_path: Path) -> None:
    rules = load_text(tmp_path, "opentsdb", block("opentsdb")).rules
    assert [(rule.number, rule.topic_filter) for rule in rules] == [(1, "sensor/#"), (2, "stat/#")]


def test_no_secret_of_a_block_shows_itself(tmp_path: Path) -> None:
    for backend, secret in (("mysql", "public"), ("cassa", "password='cassandra'"), ("dynamo", "wJalrXUtnFEMI")):
        file = load_text(tmp_path, backend, block(backend))
        assert secret not in repr(file)
