"""Containers for those who have little are read like dicts and lists, and never shared by mistake."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tidegate.store.few import NO_DICT, NO_LIST, Few, One, added, without


@pytest.mark.parametrize(
    "put",
    [
        lambda: NO_DICT.__setitem__("a", 1),
        lambda: NO_DICT.setdefault("a", 1),
        lambda: NO_DICT.update(a=1),
        lambda: NO_LIST.append(1),
        lambda: NO_LIST.extend([1]),
        lambda: NO_LIST.insert(0, 1),
    ],
    ids=["d[k] = v", "setdefault", "update", "append", "extend", "insert"],
)
def test_what_all_share_takes_nothing(put: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="make one first"):
        put()
    assert NO_DICT == {} and NO_LIST == []


@pytest.mark.parametrize("seed", range(4))
def test_one_entry_more_or_less_is_as_with_a_dict(seed: int) -> None:
    chance = random.Random(seed)
    few: Few[str, int] = NO_DICT
    model: dict[str, int] = {}
    for number in range(300):
        key = chance.choice("abc")
        if key in model and chance.random() < 0.6:
            del model[key]
            few = without(few, key)
        else:
            model[key] = number
            few = added(few, key, number)
        assert (dict(few.items()), len(few)) == (model, len(model))
        assert (list(few), list(few.values())) == (list(model), list(model.values()))
        assert [few.get(key) for key in "abcd"] == [model.get(key) for key in "abcd"]
        assert [key in few for key in "abcd"] == [key in model for key in "abcd"]
        assert bool(few) == bool(model)
        assert isinstance(few, One) == (len(model) == 1)
        for key in "abcd":
            if key in model:
                assert few[key] == model[key]
            else:
                with pytest.raises(KeyError):
                    few[key]
