"""The frame of our workers: how they read requests."""

from __future__ import annotations

from typing import Any

import pytest

from engines.workers.server import Refused, number


@pytest.mark.parametrize(("value", "found"), [(3, 3), ("3", 3), (3.0, 3)])
def test_a_whole_number_may_be_written_as_text(value: Any, found: int) -> None:
    assert number(value, "n", int, least=1, most=9) == found


@pytest.mark.parametrize("value", [1.5, float("inf"), float("nan"), True, "many", [], None, 10])
def test_what_is_no_whole_number_within_its_bounds_is_refused(value: Any) -> None:
    with pytest.raises(Refused, match="`n` is"):
        number(value, "n", int, least=1, most=9)
