"""Many peers at once, that stay with a broker which comes and goes: whoever lost the connection connects again.

Driven step by step, so whoever drives it decides what happens between two steps.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence

from tests.support.client import Closed

from .traffic import Peer, describe

TURN = 0.02


class Crowd:
    """All peers of one broker on `port`."""

    def __init__(self, port: int, peers: Sequence[Peer]) -> None:
        self.peers = list(peers)
        self._port = port
        self._away: dict[Peer, float] = {}

    def step(self, connecting: bool = True) -> None:
        """Everyone has one turn; with `connecting` those without a connection try to get one."""
        if connecting:
            self._connect()
        open_now = [peer.client.sock for peer in self.peers if peer.client is not None]
        select.select(open_now, (), (), TURN)
        for peer in self.peers:  # all of them: what came together with a CONNACK makes no socket readable
            if peer.client is None:
                continue
            try:
                peer.turn()
            except (Closed, OSError):
                peer.lose()

    def run_for(self, seconds: float) -> None:
        """So many seconds of turns."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step()

    def run_until(self, done: Callable[[], bool], deadline: float, say: Callable[[], object] = lambda: "") -> None:
        """Turns until `done()`; AssertionError after `deadline` seconds."""
        end = time.monotonic() + deadline
        while not done():
            assert time.monotonic() < end, f"not within {deadline} s: {describe(self.peers)}\n{say()}"
            self.step()

    def lose(self) -> None:
        """The broker is dead."""
        for peer in self.peers:
            peer.lose()

    def send_away(self, peer: Peer, seconds: float) -> None:
        """The peer drops its connection, and comes back after so long."""
        assert peer.client is not None
        peer.client.sock.shutdown(socket.SHUT_RDWR)
        peer.lose()
        self._away[peer] = time.monotonic() + seconds

    def call_back(self) -> None:
        """Nobody stays away any longer."""
        self._away.clear()

    def _connect(self) -> None:
        now = time.monotonic()
        for peer in self.peers:
            if peer.client is None and now >= self._away.get(peer, 0.0):
                try:
                    peer.connect(self._port)
                except (Closed, OSError):
                    peer.lose()
