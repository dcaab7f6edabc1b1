"""Containers for all those who have nothing, or one thing: most connections are idle, and most have one subscription.

An empty dict costs 64 bytes and one of a single entry 184, times all that a client has of them. So who has nothing has
`NO_DICT` and `NO_LIST`, which all share: whoever puts something in makes a container first, and may go back to them when it is
empty again. Who has one entry may have a `One`; `added` and `without` give what stands for a mapping with one more or less.

Invariant: NO_DICT and NO_LIST stay empty, and putting something in raises instead of giving it to everybody; a `One` never
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, NoReturn, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TypeError("this container is everybody's: make one first")


class _NoDict(dict[Any, Any]):
    __slots__ = ()
    __setitem__ = setdefault = update = __ior__ = _refuse


class _NoList(list[Any]):
    __slots__ = ()
    __setitem__ = append = extend = insert = __iadd__ = __imul__ = _refuse


NO_DICT: dict[Any, Any] = _NoDict()
NO_LIST: list[Any] = _NoList()


class One(Generic[Key, Value]):
    """A dict of one entry, to be read. No `Mapping`: its mixins cost several times as much."""

    __slots__ = ("_key", "_value")

    def __init__(self, key: Key, value: Value) -> None:
        self._key = key
        self._value = value

    def __getitem__(self, key: Key) -> Value:
        if key == self._key:
            return self._value
        raise KeyError(key)

    def get(self, key: Key) -> Value | None:
        return self._value if key == self._key else None

    def __contains__(self, key: object) -> bool:
        return key == self._key

    def __iter__(self) -> Iterator[Key]:
        return iter((self._key,))

    def __len__(self) -> int:
        return 1

    def items(self) -> tuple[tuple[Key, Value]]:
        return ((self._key, self._value),)

    def values(self) -> tuple[Value]:
        return (self._value,)


Few = dict[Key, Value] | One[Key, Value]


def added(few: Few[Key, Value], key: Key, value: Value) -> Few[Key, Value]:
    """The mapping with this entry, in the place of what the key had before; a dict of its own is changed."""
    if not few:
        return One(key, value)
    if isinstance(few, dict):
        few[key] = value
        return few
    return One(key, value) if key in few else {**dict(few.items()), key: value}


def without(few: Few[Key, Value], key: Key) -> Few[Key, Value]:
    """The mapping without this key, which it has; a dict of its own is changed."""
    if not isinstance(few, dict):
        return NO_DICT
    del few[key]
    return few if len(few) > 1 else One(*next(iter(few.items())))
