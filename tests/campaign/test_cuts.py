"""A cut counts if, and only if, the mark had moved since the last answer that passed; what came then never passes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.support.proxy import Proxy

from .cuts import Watch, armed
from .far_end import Door


@contextmanager
def line() -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """A proxy, a client before it, and the server's end behind it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Proxy(listener.getsockname()[1]) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client,
        listener.accept()[0] as server,
    ):
        yield proxy, client, server


def test_the_first_answer_only_shows_where_the_mark_stands() -> None:
    watch = Watch(iter([7, 7, 8]).__next__, None)
    assert [watch(), watch(), watch()] == [False, False, True]
    assert watch.moved


def test_a_blind_cut_comes_wherever_the_batch_is_and_does_not_count() -> None:
    watch = Watch(iter([7, 7, 7]).__next__, 1)
    assert [watch(), watch(), watch()] == [False, False, True]
    assert not watch.moved


def test_the_answer_after_a_commit_is_lost_and_what_came_before_it_arrived() -> None:
    mark = [1]
    with line() as (proxy, client, server), armed([Door(proxy, lambda: list(mark))], None) as outcome:
        for answer in (b"first", b"still open"):
            server.sendall(answer)
            assert client.recv(100) == answer
        assert outcome() is None
        mark[0] = 2
        server.sendall(b"committed")
        with suppress(ConnectionResetError):
            assert client.recv(100) == b""
        assert outcome() is True
