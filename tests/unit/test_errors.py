"""Errors for the user, and what of them is read apart."""

from __future__ import annotations

import pickle

import pytest

from palio.errors import BadInput


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            BadInput("a.yaml", "lr", -1, why="is negative", fix="raise it"),
            "a.yaml: lr is -1: is negative; raise it",
        ),
        (BadInput("a.yaml", "lr", -1, fix="raise it"), "a.yaml: lr is -1: raise it"),
        (BadInput("a.yaml", "lr", why="is missing", fix="add it"), "a.yaml: lr: is missing; add it"),
        (BadInput("a.yaml", why="is empty"), "a.yaml: is empty"),
    ],
)
def test_a_wrong_value_is_one_line_of_what_is_known(error: BadInput, message: str) -> None:
    assert str(error) == message


def test_a_wrong_value_comes_back_from_another_process_as_what_it_is() -> None:
    error = BadInput("a.yaml", "lr", -1, why="is negative", fix="raise it")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
