"""The dataclasses that travel: their checks, and what selecting rows keeps."""

from typing import Any

import pytest
import torch
from conftest import completions_of, prompts_of

from xpo_lightning import Completions, Experience, Pair, Prompts
from xpo_lightning.core.batch import left_pad, same_tokens


def test_pair_map_applies_to_both_sides():
    assert Pair(2, 3).map(lambda value: value * 10) == Pair(20, 30)


def test_left_pad_puts_padding_before_the_tokens():
    ids, mask = left_pad([[5, 6, 7], [8], [0, 9]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    assert ids.dtype == torch.long
    assert mask.dtype == torch.bool


IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("ids", "mask"),
    [(IDS, MASK[:, :2]), (IDS, MASK[:1]), (IDS, MASK.long()), (IDS[0], MASK[0])],
    ids=["width", "rows", "type", "dimensions"],
)
@pytest.mark.parametrize("what", ["prompt", "completion"])
def test_ids_and_mask_that_do_not_fit_are_refused(what: str, ids: torch.Tensor, mask: torch.Tensor):
    parts: tuple[Any, ...] = (ids, mask, ("a", "b"))
    if what == "completion":
        parts = (ids, mask, torch.ones(2, dtype=torch.bool), ("a", "b"), torch.zeros(ids.shape))
    with pytest.raises(ValueError, match=f"expected {what} `ids` and a boolean `mask` of one shape") as error:
        (Prompts if what == "prompt" else Completions)(*parts)
    assert str(tuple(ids.shape)) in str(error.value)
    assert str(tuple(mask.shape)) in str(error.value)


def test_prompts_without_one_raw_prompt_a_row_are_refused():
    with pytest.raises(ValueError, match="expected 2 raw prompts, one for each row of `ids`, but got 1"):
        Prompts(IDS, MASK, ("a",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_logps": torch.zeros(2, 4)}, r"expected `token_logps` of shape \(2, 3\), got \(2, 4\)"),
        ({"ended": torch.ones(3, dtype=torch.bool)}, "expected 2 entries in `ended` and `texts`"),
        ({"texts": ("a",)}, "expected 2 entries in `ended` and `texts`"),
    ],
    ids=["token_logps", "ended", "texts"],
)
def test_completions_whose_parts_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    parts = {"ids": IDS, "mask": MASK, "ended": torch.ones(2, dtype=torch.bool), "texts": ("a", "b")}
    with pytest.raises(ValueError, match=message):
        Completions(**{**parts, "token_logps": torch.zeros(2, 3), **changes})


def test_prompts_select_keeps_order_columns_and_no_more_padding_than_needed():
    ids, mask = left_pad([[1, 2, 3, 4], [5], [6, 7]])
    prompts = Prompts(ids, mask, ("a", "b", "c"), {"answer": (10, 20, 30)})
    some = prompts.select([2, 1])
    assert some.ids.tolist() == [[6, 7], [0, 5]]
    assert some.mask.tolist() == [[True, True], [False, True]]
    assert some.raw == ("c", "b")
    assert some.columns == {"answer": (30, 20)}
    assert some.lengths.tolist() == [2, 1]
    assert len(some) == 2


def test_completions_select_keeps_order_and_no_more_padding_than_needed():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0], [-5.0, -6.0, 0.0]])
    whole = completions_of([[1, 2, 3], [4], [5, 6]], ended=[True, False, True])
    completions = Completions(whole.ids, whole.mask, whole.ended, ("a", "b", "c"), logps)
    some = completions.select([2, 1])
    assert some.ids.tolist() == [[5, 6], [4, 0]]
    assert some.mask.tolist() == [[True, True], [True, False]]
    assert some.ended.tolist() == [True, False]
    assert some.texts == ("c", "b")
    assert some.token_logps.tolist() == [[-5.0, -6.0], [-4.0, 0.0]]
    assert some.logps.tolist() == [-11.0, -4.0]
    assert completions.logps.tolist() == [-6.0, -4.0, -11.0]


SAME: dict[str, tuple[list[int], list[int], bool]] = {
    "equal": ([1, 2, 3], [1, 2, 3], True),
    "first_differs": ([9, 2, 3], [1, 2, 3], False),
    "last_differs": ([1, 2, 9], [1, 2, 3], False),
    "prefix": ([1, 2], [1, 2, 3], False),
    "prefix_then_token_0": ([1, 2], [1, 2, 0], False),
    "one_token": ([0], [0], True),
}


@pytest.mark.parametrize("width", [1, 5], ids=["narrow", "wide"])
@pytest.mark.parametrize(("first", "second", "expected"), SAME.values(), ids=SAME)
def test_same_tokens_compares_real_tokens_alone(first: list[int], second: list[int], expected: bool, width: int):
    """A second row of its own width pads one side more than the other; padding holds arbitrary ids."""
    sides = []
    for row, other, filler in ((first, [7], 11), (second, [7] * width, 22)):
        side = completions_of([row, other])
        ids = torch.where(side.mask, side.ids, filler)
        sides.append(Completions(ids, side.mask, side.ended, side.texts, side.token_logps))
    assert same_tokens(Pair(*sides)).tolist() == [expected, width == 1]
    assert same_tokens(Pair(*reversed(sides))).tolist() == [expected, width == 1]


def test_experience_select_keeps_each_part_in_order():
    pairs = Experience(
        prompts=prompts_of([[1, 2], [3], [4, 5, 6]]),
        completions=Pair(completions_of([[1], [2, 2], [3]]), completions_of([[1], [2], [3]])),
        scores=Pair(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])),
        labels=torch.tensor([1.0, 0.0, 0.5]),
        reference_logps=Pair(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0, -5.0, -6.0])),
    )
    assert len(pairs) == 3
    assert pairs.identical.tolist() == [True, False, True]
    some = pairs.select([2, 1])
    assert some.prompts.raw == ("prompt 2", "prompt 1")
    assert some.completions.by_policy.ids.tolist() == [[3, 0], [2, 2]]
    assert some.completions.by_sampler.ids.tolist() == [[3], [2]]
    assert some.scores.map(torch.Tensor.tolist) == Pair([3.0, 2.0], [6.0, 5.0])
    assert some.labels.tolist() == [0.5, 0.0]
    assert some.reference_logps.by_policy.tolist() == [-3.0, -2.0]
    assert some.reference_logps.by_sampler.tolist() == [-6.0, -5.0]
    assert some.identical.tolist() == [True, False]
