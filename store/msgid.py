"""Message ids: 20 characters of `0-9A-Za-z` whose byte order is the order of the log.

Layout (fixed width, base 62, most significant first): 7 characters of time (ms since 1970, `at` of the entry),
4 of the gateway (a hash of its id), 3 of the epoch, 6 of seq. Each field is encoded by itself so that plain SQL can
do it too (`sql_expression`). `at` never goes backwards in the log and seq rises, so sorting ids of one gateway as bytes
gives log order. A field that overflows wraps; time does so in the year 2081.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import NamedTuple

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TIME_WIDTH, GATEWAY_WIDTH, EPOCH_WIDTH, SEQ_WIDTH = 7, 4, 3, 6
WIDTH = TIME_WIDTH + GATEWAY_WIDTH + EPOCH_WIDTH + SEQ_WIDTH

_OURS = re.compile(f"[0-9A-Za-z]{{{WIDTH}}}")
_PAIRS = [high + low for high in ALPHABET for low in ALPHABET]
_SQUARE = 62 * 62


def gateway_code(gateway: str) -> str:
    """The four characters that stand for a gateway id in message ids."""
    return base62(int.from_bytes(hashlib.sha256(gateway.encode()).digest()[:8], "big"), GATEWAY_WIDTH)


def message_id(at: int, code: str, epoch: int, seq: int) -> str:
    """The id of the entry `seq` (`at` in ms) of the gateway with this four-character code."""
    # An outage's backlog asks for a million of them, and of two that follow each other only the last digits differ.
    upper, middle = _upper(at // _SQUARE), _middle(code, epoch, seq // _SQUARE)
    return f"{upper}{_PAIRS[at % _SQUARE]}{middle}{_PAIRS[seq % _SQUARE]}"


@functools.lru_cache(maxsize=256)
def _upper(time: int) -> str:
    return base62(time, TIME_WIDTH - 2)


@functools.lru_cache(maxsize=256)
def _middle(code: str, epoch: int, number: int) -> str:
    return f"{code}{base62(epoch, EPOCH_WIDTH)}{base62(number, SEQ_WIDTH - 2)}"


class Origin(NamedTuple):
    """What an id says about its message: `at` (ms), the code of its gateway, epoch and seq."""

    at: int
    code: str
    epoch: int
    seq: int


def origin(message_id: str) -> Origin | None:
    """Where a message comes from by its id; None for an id that is not of this layout, so that others made."""
    if not _OURS.fullmatch(message_id):
        return None
    code = TIME_WIDTH + GATEWAY_WIDTH
    epoch = code + EPOCH_WIDTH
    return Origin(
        _number(message_id[:TIME_WIDTH]),
        message_id[TIME_WIDTH:code],
        _number(message_id[code:epoch]),
        _number(message_id[epoch:]),
    )


def _number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 62 + ALPHABET.index(digit)
    return number


def base62(number: int, width: int) -> str:
    """`number` modulo 62**width as exactly `width` digits."""
    text = ""
    for _ in range((width + 1) // 2):
        number, rest = divmod(number, _SQUARE)
        text = _PAIRS[rest] + text
    return text[-width:]


def sql_expression(at: str, code: str, epoch: str, seq: str) -> str:
    """The same id as an SQL expression over four column expressions."""
    return "||".join((_sql(at, TIME_WIDTH), code, _sql(epoch, EPOCH_WIDTH), _sql(seq, SEQ_WIDTH)))


def _sql(column: str, width: int) -> str:
    return "||".join(f"substr('{ALPHABET}',1+({column})/{62**place}%62,1)" for place in range(width - 1, -1, -1))
