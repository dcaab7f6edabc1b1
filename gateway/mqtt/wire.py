"""The data types of MQTT (1.5): integers, binary data, text, variable byte integers.

Readers take `(data, pos, end)` and give `(value, new pos)`; nothing at or after `end` is looked at. Writers give bytes.
Text is refused where the standard says "malformed": bad UTF-8, surrogates, overlong forms, U+0000 [MQTT-1.5.4-1, -2].

Invariant: a reader returns a position <= `end` or raises `MalformedPacket`.
"""

from __future__ import annotations

from .errors import malformed

MAX_VARINT = 268_435_455
MAX_UINT16 = 65_535


def read_byte(data: bytes, pos: int, end: int) -> tuple[int, int]:
    if pos >= end:
        raise malformed("ends before one more byte")
    return data[pos], pos + 1


def read_uint16(data: bytes, pos: int, end: int) -> tuple[int, int]:
    if pos + 2 > end:
        raise malformed("ends inside a two byte integer")
    return data[pos] << 8 | data[pos + 1], pos + 2


def read_uint32(data: bytes, pos: int, end: int) -> tuple[int, int]:
    if pos + 4 > end:
        raise malformed("ends inside a four byte integer")
    return int.from_bytes(data[pos : pos + 4], "big"), pos + 4


def read_varint(data: bytes, pos: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in (0, 7, 14, 21):
        if pos >= end:
            raise malformed("ends inside a variable byte integer")
        byte = data[pos]
        pos += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if shift and not byte:
                raise malformed("a variable byte integer is longer than needed")  # [MQTT-1.5.5-1]
            return value, pos
    raise malformed("a variable byte integer has more than four bytes")


def read_binary(data: bytes, pos: int, end: int) -> tuple[bytes, int]:
    size, pos = read_uint16(data, pos, end)
    if pos + size > end:
        raise malformed(f"a field of {size} bytes ends after {end - pos}")
    return data[pos : pos + size], pos + size


def read_text(data: bytes, pos: int, end: int) -> tuple[str, int]:
    raw, pos = read_binary(data, pos, end)
    return text_of(raw), pos


def text_of(raw: bytes) -> str:
    """`raw` as text if it is what the standard calls a UTF-8 encoded string (1.5.4)."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise malformed(f"text is not UTF-8: {error.reason}") from None
    if "\0" in text:
        raise malformed("text holds U+0000")
    return text


def write_uint(value: int, size: int) -> bytes:
    if not 0 <= value < 1 << 8 * size:
        raise ValueError(f"{value} does not fit an integer of {size} bytes")
    return value.to_bytes(size, "big")


def write_varint(value: int) -> bytes:
    if not 0 <= value <= MAX_VARINT:
        raise ValueError(f"{value} is no variable byte integer (0 to {MAX_VARINT})")
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_binary(value: bytes) -> bytes:
    if len(value) > MAX_UINT16:
        raise ValueError(f"{len(value)} bytes do not fit a field of at most {MAX_UINT16}")
    return len(value).to_bytes(2, "big") + value


def write_text(value: str) -> bytes:
    if "\0" in value:
        raise ValueError("text holds U+0000")
    return write_binary(value.encode())
