"""Scores at the border: which values of a reward are taken, and what is refused."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from xpo_lightning.core.errors import InputError, NonFiniteError
from xpo_lightning.rewards.validation import as_scores


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, -3.0],
        (1.0, 2.5, -3),
        np.array([1.0, 2.5, -3.0]),
        [np.float32(1), np.float64(2.5), np.int64(-3)],
        torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(-3)],
    ],
)
def test_numbers_of_any_kind_become_float32(values: Any) -> None:
    scores = as_scores(values, 3, "f")
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.5, -3.0]
    assert not scores.requires_grad


@pytest.mark.parametrize(
    "values", [[True, False], np.array([True, False]), torch.tensor([True, False]), [np.True_, np.False_]]
)
def test_truth_values_count_as_one_and_zero(values: Any) -> None:
    assert as_scores(values, 2, "f").tolist() == [1.0, 0.0]


WANTED = "expected 2 numbers, one for each completion"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, f"f returned None; {WANTED}"),
        ([1.0], f"f returned a list of length 1; {WANTED}"),
        ((1.0, 2.0, 3.0), f"f returned a tuple of length 3; {WANTED}"),
        (torch.zeros(2, 1), rf"f returned a Tensor of shape \(2, 1\); {WANTED}"),
        (torch.tensor(1.0), rf"f returned a Tensor of shape \(\); {WANTED}"),
        (np.zeros(3), rf"f returned a ndarray of shape \(3,\); {WANTED}"),
        (1.5, f"f returned a float; {WANTED}, as a list, tensor or numpy array"),
        ("ab", f"f returned a str; {WANTED}, as"),
        ({0: 1.0, 1: 2.0}, f"f returned a dict; {WANTED}, as"),
        ((value for value in (1.0, 2.0)), f"f returned a generator; {WANTED}, as"),
        ([1.0, None], "f gave None for row 1; a score must be a number"),
        (["0.5", 1.0], r"f gave a str \('0.5'\) for row 0; a score must be a number"),
        (np.array(["0.5", "1"]), r"f gave a str \('0.5'\) for row 0"),
        ([1.0, [2.0]], r"f gave a list \(\[2.0\]\) for row 1"),
        ([1.0, torch.zeros(1)], r"f gave a Tensor \(tensor\(\[0.\]\)\) for row 1"),
        (torch.tensor([1j, 2j]), r"f gave a complex \(1j\) for row 0"),
        ([1.0, float("nan")], "f gave nan for row 1; a score must be a finite float32 number"),
        (torch.tensor([-torch.inf, 1.0]), "f gave -inf for row 0; a score must be a finite"),
        ([1.0, 1e300], r"f gave 1e\+300 for row 1; a score must be a finite float32 number"),
        ([1.0, 10**400], "f gave inf for row 1"),
        ([math.nan, math.inf], "f gave nan for row 0 and inf for row 1; a score must be"),
    ],
)
def test_what_is_no_score_is_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{message}"):
        as_scores(values, 2, "f")


def test_every_row_without_a_finite_score_is_known_and_the_first_are_shown() -> None:
    values = [0.0, math.nan, 1.0, math.inf, -math.inf, 2.0, math.nan, math.nan]
    shown = "f gave nan for row 1, inf for row 3, -inf for row 4 and no finite number for 2 more rows; a score must"
    with pytest.raises(NonFiniteError, match=f"^{shown}") as caught:
        as_scores(values, 8, "f")
    assert caught.value.rows == [1, 3, 4, 6, 7]
    twin = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(twin), twin.rows) == (str(caught.value), caught.value.rows)
