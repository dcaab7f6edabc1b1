"""What PostgreSQL, MariaDB and MySQL answer on behalf of clients, on real servers; rows are also those that others wrote."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest
from tidegate.store.msgid import message_id
from tidegate.uplink import sql_asking
from tidegate.uplink.asking import Asker, AskingBackend, Fetch
from tidegate.uplink.errors import Misconfigured, NotConnected, Rejected
from tidegate.uplink.pools import Pool
from tidegate.uplink.rule import load

from tests.support.sql_servers import SqlServer
from tests.support.waiting import wait_until

from .logfile import START
from .sql_rig import EVERY_SERVER, SERVERS, settings, tables, utc

NARROW = {
    "pgsql": ("ALTER TABLE mqtt_acked ALTER topic TYPE varchar(64), ALTER mid TYPE integer", "DROP TABLE tidegate_position"),
    "mysql": (
        "ALTER TABLE mqtt_msg DROP KEY tidegate_msgid, MODIFY topic varchar(20) NOT NULL",
        "DROP TABLE tidegate_position",
    ),
}
"""As the specification has it, and no table of ours to read."""


@pytest.fixture
def pool(tmp_path: Path, server: SqlServer) -> Pool:
    return pool_of(tmp_path, server)


@pytest.fixture
def asker(pool: Pool) -> Iterator[Asker]:
    with closing(connect(pool)) as asker:
        yield asker


def pool_of(folder: Path, server: SqlServer) -> Pool:
    lines = [f"server = 127.0.0.1:{server.port}", "timeout = 2s", *settings(server).splitlines()]
    path = folder / f"emqx_backend_{server.backend}.conf"
    path.write_text("".join(f"backend.{server.backend}.pool1.{line}\n" for line in lines))
    (pool,) = load(path, server.backend).pools
    return pool


def connect(pool: Pool) -> Asker:
    return cast(AskingBackend, importlib.import_module(f"tidegate.uplink.to_{pool.backend}")).connect_asker(pool)


def own(code: str, seq: int, epoch: int = 1, at: int = START) -> str:
    return message_id(at, code, epoch, seq)


def store(server: SqlServer, *messages: str, topic: str = "t", qos: str = "1", arrived: str = "'2023-11-14 22:13:20'") -> None:
    """Messages known by their ids; the payload is the id."""
    rows = ",".join(f"('{msgid}', '{topic}', 'shop', {qos}, 0, '{msgid}', {arrived})" for msgid in messages)
    server.run(f"INSERT INTO mqtt_msg (msgid, topic, sender, qos, retain, payload, arrived) VALUES {rows}")


def row_of(server: SqlServer, msgid: str) -> int:
    ((number,),) = server.rows(f"SELECT id FROM mqtt_msg WHERE msgid = '{msgid}'")
    return int(number)


def acked(server: SqlServer, mid: int, client: str = "c", topic: str = "t") -> None:
    """A position as the specification has it."""
    server.run(f"INSERT INTO mqtt_acked (clientid, topic, mid) VALUES ('{client}', '{topic}', {mid})")


def position(server: SqlServer, code: str, seq: int, epoch: int = 1, client: str = "c", topic: str = "t") -> None:
    """An entry of the vector."""
    server.run(f"INSERT INTO tidegate_position VALUES ('{client}', '{topic}', '{code}', {epoch}, {seq}, '2023-11-15 00:00:00')")


def pubsub(topic: str = "t", limit: int = 500, span: int = 0, window_first: bool = True, after: int = 0) -> Fetch:
    return Fetch("c", topic, False, limit, span, window_first, after)


def queue(topic: str = "t", after: int = 0) -> Fetch:
    return Fetch("c", topic, True, 0, 0, True, after)


def ids(asker: Asker, question: Fetch) -> list[str]:
    return [one.msgid for one in asker.fetch(question).messages]


# -- subscriptions -----------------------------------------------------------------------------------------------------


def test_subscriptions_of_many_clients_as_a_business_system_wrote_them(asker: Asker, server: SqlServer) -> None:
    rows = "('a', 'x/#', 1), ('a', 'y', 7), ('b', 'ü', 2), ('a', 'z', NULL), ('a', NULL, 1), (NULL, 'n', 1), ('d', 'n', 1)"
    server.run(f"INSERT INTO mqtt_sub (clientid, topic, qos) VALUES {rows}")
    assert asker.subscriptions(["a", "b", "nobody", "%"]) == {"a": [("x/#", 1), ("y", 7), ("z", 0)], "b": [("ü", 2)]}
    assert asker.subscriptions([]) == {}


def test_the_specification_s_select_finds_the_same_subscriptions(asker: Asker, server: SqlServer) -> None:
    server.run("insert into mqtt_sub(clientid, topic, qos) values('test', 'test_topic1', 1)")
    server.run("insert into mqtt_sub(clientid, topic, qos) values('test', 'test_topic2', 2)")
    found = server.rows("select topic, qos from mqtt_sub where clientid = 'test'")
    assert asker.subscriptions(["test"]) == {"test": found}
    assert found == [("test_topic1", 1), ("test_topic2", 2)]


# -- one to many -------------------------------------------------------------------------------------------------------


def test_a_stored_message_with_all_its_fields(asker: Asker, server: SqlServer) -> None:
    store(server, "53F98F80F66017005000004A60003", qos="2")
    (found,) = asker.fetch(pubsub()).messages
    assert found == ("53F98F80F66017005000004A60003", "t", "shop", 2, START, b"53F98F80F66017005000004A60003")


@pytest.mark.parametrize("window_first", [True, False])
def test_without_a_position_the_window_or_nothing(asker: Asker, server: SqlServer, window_first: bool) -> None:
    store(server, *(f"m{number}" for number in range(5)))
    store(server, "other", topic="t/t")
    answer = asker.fetch(pubsub(limit=3, window_first=window_first))
    assert [one.msgid for one in answer.messages] == (["m2", "m3", "m4"] if window_first else [])
    assert answer.skipped == (2 if window_first else 0)
    assert answer.positions == {} and answer.further == 0


def test_of_the_window_none_is_older_than_the_time_range(asker: Asker, server: SqlServer) -> None:
    now = "utc_timestamp()" if server.backend == "mysql" else "now() AT TIME ZONE 'utc'"
    store(server, "old", arrived=f"{now} - INTERVAL '3' HOUR")
    store(server, "young", arrived=f"{now} - INTERVAL '1' HOUR")
    assert ids(asker, pubsub(span=7_200_000)) == ["young"]
    assert ids(asker, pubsub()) == ["old", "young"]


def test_after_the_specification_s_position_while_only_it_exists(asker: Asker, server: SqlServer) -> None:
    store(server, "x1", own("aaaa", 1), own("BBBB", 5), "x2", own("aaaa", 2))
    acked(server, row_of(server, own("BBBB", 5)))
    answer = asker.fetch(pubsub(window_first=False))
    assert [one.msgid for one in answer.messages] == ["x2", own("aaaa", 2)]
    assert answer.positions == {"BBBB": (1, 5)}, "the message read last tells where its gateway stands"


def test_two_gateways_interleaved_each_have_their_place(asker: Asker, server: SqlServer) -> None:
    """BBBB was away and brought late what sorts below what was read of aaaa."""
    a, b = [own("aaaa", seq) for seq in range(1, 5)], [own("BBBB", seq, at=START - 999) for seq in range(1, 4)]
    store(server, b[0], a[0], "foreign1", b[1], a[1], b[2], a[2], "foreign2", a[3], own("bbbb", 9))
    acked(server, row_of(server, a[2]))
    position(server, "aaaa", 3)
    position(server, "BBBB", 1)
    answer = asker.fetch(pubsub())
    assert [one.msgid for one in answer.messages] == [b[1], b[2], "foreign2", a[3], own("bbbb", 9)]
    assert answer.positions == {"aaaa": (1, 3), "BBBB": (1, 1)}


def test_a_gateway_that_is_not_in_the_vector_was_never_read(asker: Asker, server: SqlServer) -> None:
    store(server, own("BBBB", 7), own("aaaa", 1), own("aaaa", 2))
    acked(server, row_of(server, own("aaaa", 1)))
    position(server, "aaaa", 1)
    assert ids(asker, pubsub()) == [own("BBBB", 7), own("aaaa", 2)]


def test_a_position_counts_epochs_before_numbers(asker: Asker, server: SqlServer) -> None:
    late = [own("aaaa", 100_000, 61), own("aaaa", 100_001, 62), own("aaaa", 100_003, 62), own("aaaa", 3_000_000, 63)]
    store(server, *late)
    position(server, "aaaa", 100_001, 62)
    assert ids(asker, pubsub()) == late[2:]


@pytest.mark.parametrize("how", ["deleted", "of another topic", "of a table that was emptied"])
def test_a_position_whose_message_is_gone_gives_the_window_again(asker: Asker, server: SqlServer, how: str) -> None:
    store(server, "m1", "m2", "m3")
    acked(server, row_of(server, "m3") if how != "of a table that was emptied" else 4_000_000)
    if how == "deleted":
        server.run("DELETE FROM mqtt_msg WHERE msgid = 'm3'")
    elif how == "of another topic":
        server.run("UPDATE mqtt_msg SET topic = 'u' WHERE msgid = 'm3'")
    expected = ["m1", "m2"] if how != "of a table that was emptied" else ["m1", "m2", "m3"]
    assert ids(asker, pubsub(window_first=False)) == expected


def test_the_vector_holds_when_the_message_of_the_position_is_gone(asker: Asker, server: SqlServer) -> None:
    store(server, own("aaaa", 1), "foreign", own("aaaa", 3))
    acked(server, 4_000_000)
    position(server, "aaaa", 2)
    assert ids(asker, pubsub()) == ["foreign", own("aaaa", 3)]


def test_positions_of_other_clients_and_topics_are_not_ours(asker: Asker, server: SqlServer) -> None:
    store(server, own("aaaa", 1))
    for client, topic in (("d", "t"), ("c", "u"), ("C", "t")):
        position(server, "aaaa", 9, client=client, topic=topic)
        acked(server, row_of(server, own("aaaa", 1)), client, topic)
    assert ids(asker, pubsub()) == [own("aaaa", 1)]


def test_rows_that_others_left_half_empty(asker: Asker, server: SqlServer) -> None:
    nulls = "NULL, 't', NULL, 0, NULL, NULL" if server.backend == "mysql" else "NULL, 't', NULL, NULL, NULL, NULL"
    arrived = "'2023-11-14 22:13:20'" if server.backend == "mysql" else "NULL"
    columns = "msgid, topic, sender, qos, retain, payload, arrived"
    server.run(f"INSERT INTO mqtt_msg ({columns}) VALUES ({nulls}, {arrived})")
    store(server, "odd", qos="9")
    store(server, "less", qos="-3")
    ((number,),) = server.rows("SELECT id FROM mqtt_msg WHERE msgid IS NULL")
    nothing, odd, less = asker.fetch(pubsub()).messages
    assert nothing == (f"row:{number}", "t", "", 0, START if server.backend == "mysql" else 0, b"")
    assert (odd.qos, less.qos) == (2, 0)
    position(server, "aaaa", 1)
    assert len(ids(asker, pubsub(span=1))) == (0 if server.backend == "mysql" else 1), "of no known age is not too old"


# -- one to one, and bounds --------------------------------------------------------------------------------------------


def test_a_queue_is_everything_that_is_stored_whatever_the_position(asker: Asker, server: SqlServer) -> None:
    store(server, own("aaaa", 1), "foreign", own("BBBB", 2))
    acked(server, row_of(server, own("BBBB", 2)))
    position(server, "aaaa", 9)
    answer = asker.fetch(queue())
    assert [one.msgid for one in answer.messages] == [own("aaaa", 1), "foreign", own("BBBB", 2)]
    assert (answer.skipped, answer.positions) == (0, {})


@pytest.mark.parametrize("question", [queue, pubsub])
def test_what_one_answer_cannot_hold_comes_in_parts(
    asker: Asker, server: SqlServer, monkeypatch: pytest.MonkeyPatch, question: Callable[..., Fetch]
) -> None:
    monkeypatch.setattr(sql_asking, "PAGE", 3)
    monkeypatch.setattr(sql_asking, "PAGE_BYTES", 1000)
    wanted = [f"m{number}" for number in range(7)]
    store(server, *wanted)
    server.run("UPDATE mqtt_msg SET payload = repeat('x', 1500) WHERE msgid = 'm4'")
    parts, after = [], 0
    while True:
        answer = asker.fetch(question(after=after))
        parts.append([one.msgid for one in answer.messages])
        after = answer.further
        if not after:
            break
    assert [one for part in parts for one in part] == wanted
    assert max(map(len, parts)) == 3 and ["m3"] in parts, "the large one does not share a part with what came before"


def test_a_part_goes_on_where_the_limit_began(asker: Asker, server: SqlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_asking, "PAGE", 2)
    store(server, *(f"m{number}" for number in range(6)))
    first = asker.fetch(pubsub(limit=3))
    rest = asker.fetch(pubsub(limit=3, after=first.further))
    assert [one.msgid for one in (*first.messages, *rest.messages)] == ["m3", "m4", "m5"]
    assert (first.skipped, rest.skipped) == (3, 0)


# -- retained ----------------------------------------------------------------------------------------------------------


def retained(server: SqlServer, *topics: str) -> None:
    rows = ",".join(f"('{topic}', 'id of {topic}', 'shop', 1, 'v', '2023-11-14 22:13:20')" for topic in topics)
    server.run(f"INSERT INTO mqtt_retain (topic, msgid, sender, qos, payload, arrived) VALUES {rows}")


def test_a_retained_message_with_all_its_fields(asker: Asker, server: SqlServer) -> None:
    retained(server, "r/1", "r/2")
    assert asker.retained("r/1") == [("id of r/1", "r/1", "shop", 1, START, b"v")]
    assert asker.retained("r") == []


@pytest.mark.parametrize("topic_filter", ["#", "a/#", "a/+", "+/b", "a/+/c", "a%/#", "a_/+", "a|/#", "+/+/#", "$SYS/#", "a/b"])
def test_wildcards_match_as_they_do_on_the_box(asker: Asker, server: SqlServer, topic_filter: str) -> None:
    from tidegate.store.topic import matches

    topics = ["a", "a/b", "a/b/c", "A/b", "ab/x", "a%/x", "a_/x", "a|/x", "$SYS/x", "b", "aé/b", "a/"]
    retained(server, *topics)
    assert [one.topic for one in asker.retained(topic_filter)] == [one for one in topics if matches(topic_filter, one)]


def test_empty_retained_rows_are_none_and_nameless_ones_have_a_name(asker: Asker, server: SqlServer) -> None:
    arrived = "'2023-11-14 22:13:20'"
    rows = f"('e', '', {arrived}), ('n', NULL, {arrived}), (NULL, 'x', {arrived}), ('k', 'kept', {arrived})"
    server.run(f"INSERT INTO mqtt_retain (topic, payload, arrived) VALUES {rows}")
    ((number,),) = server.rows("SELECT id FROM mqtt_retain WHERE topic = 'k'")
    assert asker.retained("#") == [(f"retained:{number}", "k", "", 0, START, b"kept")]


def test_pages_of_retained_messages_and_too_many_of_them(
    asker: Asker, server: SqlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_asking, "PAGE", 4)
    topics = [f"{'ab'[number % 2]}/{number}" for number in range(10)]
    retained(server, *topics)
    assert [one.topic for one in asker.retained("a/#")] == topics[::2]
    monkeypatch.setattr(sql_asking, "MOST_RETAINED", 4)
    with pytest.raises(Rejected, match=r"more than 4 retained messages .* match a/#: subscribe to less"):
        asker.retained("a/#")


# -- schemas and servers -----------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text(asker: Asker, server: SqlServer) -> None:
    if server.backend == "pgsql":
        server.run("ALTER TABLE mqtt_msg ALTER payload TYPE bytea USING payload::bytea")
    store(server, "m")
    server.run("UPDATE mqtt_msg SET payload = " + (r"'\xff00'::bytea" if server.backend == "pgsql" else "x'ff00'"))
    assert [one.payload for one in asker.fetch(pubsub()).messages] == [b"\xff\x00"]


def test_the_specification_s_narrow_tables_without_ours(pool: Pool, server: SqlServer) -> None:
    server.run(*NARROW[server.backend])
    long = "t" * 250
    store(server, "m1", own("aaaa", 2), "m3")
    acked(server, row_of(server, own("aaaa", 2)))
    with closing(connect(pool)) as asker:
        answer = asker.fetch(pubsub())
        assert [one.msgid for one in answer.messages] == ["m3"]
        assert answer.positions == {"aaaa": (1, 2)}
        assert asker.fetch(pubsub(long)).messages == ()
        assert asker.subscriptions([long]) == {}
        assert asker.retained(long) == []


def test_what_a_collation_without_case_or_padding_finds_too_much_is_left_out(pool: Pool, server: SqlServer) -> None:
    for table in ("mqtt_sub", "mqtt_msg", "mqtt_acked", "mqtt_retain"):
        server.run(*_without_case(server, table))
    # One of each: for these tables they are one.
    server.run("INSERT INTO mqtt_sub (clientid, topic, qos) VALUES ('ADMIN', 'x', 1), ('c', 'y', 1)")
    store(server, "upper", topic="A/x")
    store(server, own("aAaA", 1), own("AaAa", 1), topic="a/x")
    store(server, "padded", topic="a/x ")
    acked(server, row_of(server, "upper"), "C", "a/x")
    position(server, "aAaA", 1, topic="a/x")
    retained(server, "R", "s ")
    with closing(connect(pool)) as asker:
        assert asker.subscriptions(["admin", "c"]) == {"c": [("y", 1)]}
        assert ids(asker, pubsub("a/x")) == [own("AaAa", 1)]
        assert ids(asker, queue("A/x")) == ["upper"]
        assert asker.retained("r") == asker.retained("s") == []
        assert [one.topic for one in asker.retained("+")] == ["R", "s "]


def _without_case(server: SqlServer, table: str) -> Sequence[str]:
    if server.backend == "mysql":
        return [f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci"]
    kind = "CREATE COLLATION IF NOT EXISTS nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    columns = {"mqtt_sub": ("clientid", "topic"), "mqtt_acked": ("clientid", "topic")}.get(table, ("topic", "msgid"))
    return [kind, *(f"ALTER TABLE {table} ALTER {column} TYPE varchar(255) COLLATE nocase" for column in columns)]


def test_nothing_can_be_written(pool: Pool, server: SqlServer) -> None:
    asker = connect(pool)
    assert isinstance(asker, sql_asking.SqlAsker)
    with closing(asker), pytest.raises((NotConnected, Rejected), match=r"(?i)read.only"):
        asker._session.ask("DELETE FROM mqtt_msg")


def test_a_missing_table_and_a_wrong_password_name_what_helps(tmp_path: Path, pool: Pool, server: SqlServer) -> None:
    server.run("DROP TABLE mqtt_sub")
    with closing(connect(pool)) as asker, pytest.raises(Misconfigured, match="mqtt_sub") as caught:
        asker.subscriptions(["c"])
    assert f"`tidegate uplink init {server.backend}.pool1`" in caught.value.hint
    wrong = Pool(pool.backend, pool.name, {**pool.settings, "password": "wrong"})
    with pytest.raises(Misconfigured, match="refused the login"):
        connect(wrong)


@pytest.mark.parametrize("name", EVERY_SERVER)
def test_a_server_that_goes_is_noticed_and_one_that_is_frozen_too(tmp_path: Path, name: str) -> None:
    with SERVERS[name]() as server:
        tables(server)
        pool = pool_of(tmp_path, server)
        with closing(connect(pool)) as asker:
            assert asker.heard() == [] and asker.fileno() > 0
            server.freeze()
            with pytest.raises(NotConnected, match=f"127.0.0.1:{server.port}"):
                asker.subscriptions(["c"])
            server.thaw()
        with closing(connect(pool)) as asker:
            server.kill()

            def gone() -> bool:
                try:
                    return asker.heard() != []
                except NotConnected:
                    return True

            wait_until(gone)
        with pytest.raises(NotConnected, match=f"127.0.0.1:{server.port}"):
            connect(pool)


def test_times_are_read_as_utc(asker: Asker, server: SqlServer) -> None:
    store(server, "m", arrived=f"'{utc(START)}'")
    assert [one.at for one in asker.fetch(pubsub()).messages] == [START]
