"""What must be true of wills (3.1.2.5): sent when a connection ended without a DISCONNECT, once, and never otherwise.

A will is in memory until it is published, so a crash may take it with it: nobody was told that it is safe.

Invariant: it learns of a will when its device sends it, and of the ends of connections as the broker hears of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.store.entry import PUBLISH

from .model import Model


@dataclass(slots=True)
class Will:
    """One connection's will; `delay` in seconds."""

    owner: str
    payload: bytes
    topic: str
    qos: int
    retain: bool
    delay: int
    state: str = "set"
    """set, due (must become durable), late (waits for its delay), never (must not be published), free (either is right)."""


class Wills:
    """See the module."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._wills: dict[bytes, Will] = {}

    def of(self, payload: bytes) -> Will:
        return self._wills[payload]

    def made(self, will: Will) -> None:
        self._wills[will.payload] = will
        self._model.sent(will.payload, will.topic, will.qos, will.retain)

    def connected(self, owner: str, present: bool, own: bytes) -> None:
        """The device is back: what waited is not sent any more, if the session went on [MQTT-3.1.3-9]."""
        for will in self._of(owner):
            if will.payload != own and will.state == "late" and not self._model.seqs[will.payload]:
                will.state = "never" if present else "free"

    def ended(self, payload: bytes, heard: bool, properly: bool, keeps_session: bool) -> None:
        """The broker knows that the connection is over; `heard`: it had read the CONNECT, `properly`: and a DISCONNECT."""
        will = self._wills.get(payload)
        if will is None or will.state != "set":
            return
        if properly or not heard:
            will.state = "never"
        elif will.delay and keeps_session:
            will.state = "late"
        else:
            wanted = self._model.wants(PUBLISH, will.topic, will.qos, will.retain, will.payload)
            will.state = "due" if wanted else "free"

    def stopped(self) -> None:
        """A stop does not wait for any delay, and who was not yet heard has no will."""
        for will in self._wills.values():
            will.state = {"set": "never", "late": "free"}.get(will.state, will.state)

    def crashed(self) -> None:
        for will in self._wills.values():
            if will.state != "never" and not self._model.seqs[will.payload]:
                will.state = "never"
            elif will.state == "late":
                will.state = "free"

    def check(self) -> None:
        for payload, will in self._wills.items():
            copies = len(self._model.seqs[payload])
            assert copies <= 1, f"the will {payload!r} was published {copies} times"
            assert copies or will.state != "due", f"the will {payload!r} was never published"
            assert not copies or will.state not in ("never", "set"), f"the will {payload!r} was published, and is {will.state}"

    def _of(self, owner: str) -> list[Will]:
        return [will for will in self._wills.values() if will.owner == owner]
