"""What can be wrong with the peer's bytes.

`MalformedPacket`: they cannot be parsed by the standard (4.13, "Malformed Packet"). `ProtocolError`: they can, but say
what must not be said. Both carry the reason code for the last packet to the peer and a sentence for the log that
names packet, field and rule. They are the peer's fault: our own misuse of the codec is a `ValueError`.

Invariant: decoding raises nothing but these, whatever the bytes.
"""

from __future__ import annotations

from .reasons import ReasonCode


class MqttError(Exception):
    """The peer broke the standard: `reason` for it, `text` for people."""

    def __init__(self, reason: ReasonCode, text: str) -> None:
        super().__init__(reason, text)
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"{self.text} (0x{self.reason:02X} {self.reason.label})"

    def within(self, place: str) -> MqttError:
        """The same error, its text led by the place where it was found."""
        return type(self)(self.reason, f"{place}: {self.text}")


class MalformedPacket(MqttError):
    """Bytes that cannot be parsed according to the standard."""


class ProtocolError(MqttError):
    """A well-formed packet, or a value in one, that must not be sent."""


def malformed(text: str) -> MalformedPacket:
    """A `MalformedPacket` with the usual reason."""
    return MalformedPacket(ReasonCode.MALFORMED_PACKET, text)


def protocol_error(text: str) -> ProtocolError:
    """A `ProtocolError` with the usual reason."""
    return ProtocolError(ReasonCode.PROTOCOL_ERROR, text)
