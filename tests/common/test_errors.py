"""What a person is told."""

from __future__ import annotations

import pytest

from common.errors import UserError


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("there is no such run", "there is no such run"),
        ("there is no such run.", "there is no such run"),
        ("take one of 1, 2, ...", "take one of 1, 2, ..."),
        ("it lies outside '..'", "it lies outside '..'"),
    ],
)
def test_a_full_stop_is_left_to_whoever_ends_the_sentence(message: str, said: str) -> None:
    assert str(UserError(message)) == said
    assert str(UserError(message, setting="run.name")) == f"run.name: {said}"


def test_a_sentence_within_another_keeps_no_stop_of_its_own() -> None:
    inner = UserError("the port is in use.")
    assert (
        str(UserError(f"the broker cannot start ({inner})."))
        == "the broker cannot start (the port is in use)"
    )
    assert str(UserError(f"{inner}.")) == "the port is in use"
