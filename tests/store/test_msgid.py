"""Message ids: what is put into them is what is read out of them, and what others made is not taken for ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate.store.msgid import Origin, gateway_code, message_id, origin

GATEWAYS = st.text(min_size=1).map(gateway_code)
NUMBERS = (st.integers(0, 62**7 - 1), GATEWAYS, st.integers(0, 62**3 - 1), st.integers(0, 62**6 - 1))


@given(*NUMBERS)
def test_an_id_says_where_its_message_comes_from(at: int, code: str, epoch: int, seq: int) -> None:
    assert origin(message_id(at, code, epoch, seq)) == Origin(at, code, epoch, seq)


@given(GATEWAYS, st.lists(st.tuples(NUMBERS[0], NUMBERS[2], NUMBERS[3]), min_size=2, max_size=2))
def test_ids_of_one_gateway_sort_like_what_they_are_made_of(code: str, made: list[tuple[int, int, int]]) -> None:
    first, second = [message_id(at, code, epoch, seq) for at, epoch, seq in made]
    assert (first < second) == (made[0] < made[1])


@pytest.mark.parametrize("text", ["", "5C4C8A8B8C8D", "0" * 19, "0" * 21, "0" * 19 + "-", "0" * 19 + "é", "0" * 20 + "\n"])
def test_an_id_of_another_layout_is_somebody_else_s(text: str) -> None:
    assert origin(text) is None
