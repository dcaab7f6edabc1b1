"""Lines to a reader that stops: a pipe, a socket, a terminal, none at all. Whatever it is, nobody waits."""

from __future__ import annotations

import fcntl
import os
import pty
import resource
import select
import socket
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from tidegate.store.lines import LINE, QUEUE, Lines

MANY = 20_000


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


@contextmanager
def _socket() -> Iterator[tuple[int, int]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs.fileno(), ours.fileno()


@contextmanager
def _terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    tty.setraw(slave, termios.TCSANOW)
    yield master, slave
    os.close(master)
    os.close(slave)


@contextmanager
def _lines(descriptor: int) -> Iterator[Lines]:
    lines = Lines(lambda count: f"{count} missing", descriptor)
    yield lines
    lines.close(0)


def _read(descriptor: int) -> bytes:
    """What is there now."""
    got = b""
    while select.select([descriptor], [], [], 0.05)[0]:
        got += os.read(descriptor, 65_536)
    return got


@pytest.mark.parametrize("ends", [_pipe, _socket, _terminal])
def test_a_reader_that_stops_loses_whole_lines_and_learns_how_many(
    ends: Callable[[], AbstractContextManager[tuple[int, int]]],
) -> None:
    with ends() as (read, write), _lines(write) as lines:
        for number in range(MANY):
            lines.put(f"line {number}")
        assert 0 < lines.dropped < MANY
        got = b""
        while lines.push():
            got += _read(read)
        lines.put("the end")
        *said, end = (got + _read(read)).decode().splitlines()
        assert end == "the end"
        number = 0
        for line in said:  # a terminal makes room now and then
            missing = line.removesuffix(" missing")
            if missing == line:
                assert line == f"line {number}"
            number += int(missing) if missing != line else 1
        assert number == MANY, "lines are missing where nothing says so"


def test_the_descriptor_that_others_share_stays_as_it_was() -> None:
    for ends in (_pipe, _socket, _terminal):
        with ends() as (_, write), _lines(write) as lines:
            lines.put("text")
            assert os.get_blocking(write)


def test_a_long_line_is_cut_to_what_a_pipe_takes_in_one_piece() -> None:
    with _pipe() as (read, write), _lines(write) as lines:
        lines.put("é" * LINE)
        line = _read(read)
        assert LINE - 2 < len(line) <= LINE
        assert line.decode().endswith("é ... (cut)\n")


def test_lines_of_two_writers_in_one_pipe_are_not_mixed() -> None:
    with _pipe() as (read, write), _lines(write) as one, _lines(write) as two:
        for _ in range(100):
            one.put("1" * 3000)
            two.put("2" * 3000)
        got = b""
        while one.push() | two.push():
            got += _read(read)
        got += _read(read)
        assert {line for line in got.decode().splitlines() if "missing" not in line} == {"1" * 3000, "2" * 3000}


def test_a_reader_that_is_gone_or_never_was_stops_nobody() -> None:
    read, write = os.pipe()
    os.close(read)
    _speak_in_vain(write)
    os.close(write)
    _speak_in_vain(write)


def _speak_in_vain(descriptor: int) -> None:
    lines = Lines(str, descriptor)
    lines.put("nobody hears it")
    lines.close(10)
    assert lines.dropped == 1


def test_a_file_that_can_grow_again_says_what_it_missed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file, _lines(file.fileno()) as lines:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            lines.put("one")
            lines.put("two")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        lines.put("three")
        assert lines.dropped == 2
    assert (tmp_path / "log").read_text() == "2 missing\nthree\n"


def test_the_last_words_wait_for_a_reader_that_is_slow() -> None:
    with _pipe() as (read, write):
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, LINE)
        lines = Lines(str, write)
        said = [f"{number:0100}\n" for number in range(QUEUE)]
        for line in said:
            lines.put(line[:-1])
        assert lines.push(), "all fitted: there is nothing to wait for"
        got = bytearray()

        def slowly() -> None:
            while len(got) < QUEUE * 101:
                got.extend(os.read(read, 500))

        reader = threading.Thread(target=slowly)
        reader.start()
        lines.close(10)
        reader.join()
        assert got.decode() == "".join(said)
