"""Which pairs go into which optimizer step and micro-batch, worked by hand."""

from dataclasses import dataclass

import pytest
from conftest import noise

from xpo_lightning.training.update_plan import UpdatePlan


@dataclass
class Sized:
    """Pairs of which only the tokens of prompts and longest completions are known."""

    sizes: list[tuple[int, int]]


def plan(**options: int) -> UpdatePlan:
    given = {"micro_batch_size": None, "micro_batch_tokens": None, "updates_per_rollout": 1, "epochs_per_rollout": 1}
    return UpdatePlan(**{**given, **options})


@pytest.mark.parametrize("updates", [2, 3])
def test_each_pass_shares_the_pairs_anew_among_its_steps(updates):
    steps = list(plan(updates_per_rollout=updates, epochs_per_rollout=2).steps(Sized([(3, 2)] * 12), noise()))
    rows = [sorted(row for rows in micro_batches for row in rows) for micro_batches in steps]
    assert [len(step) for step in rows] == [12 // updates] * 2 * updates
    first, second = rows[:updates], rows[updates:]
    for steps_of_pass in (first, second):
        assert sorted(row for step in steps_of_pass for row in step) == list(range(12))
    in_order = [list(range(start, start + 12 // updates)) for start in range(0, 12, 12 // updates)]
    assert in_order not in (first, second)
    assert first != second


@pytest.mark.parametrize(("completions", "sizes"), [(2, [3, 3]), (3, [2, 2, 2])])
def test_every_completion_of_a_pair_counts(completions, sizes):
    """A prompt of 3 tokens with completions of 2 has 3 + 2 * 2 = 7, or 3 + 3 * 2 = 9; 26 tokens go together."""
    groups = plan(micro_batch_tokens=26, completions=completions).micro_batches([(3, 2)] * 6, range(6))
    assert [len(rows) for rows in groups] == sizes


def test_padding_to_the_longest_prompt_and_the_longest_completion_counts():
    """Padded together, the first two have 2 * (5 + 2 * 10) = 50 tokens, the others at most 2 * (4 + 2 * 10) = 48."""
    sizes = [(5, 1), (4, 10), (4, 2)]
    assert plan(micro_batch_tokens=49).micro_batches(sizes, range(3)) == [[0], [1, 2]]
    assert plan(micro_batch_tokens=50).micro_batches(sizes, range(3)) == [[0, 1], [2]]
    assert plan(micro_batch_tokens=75).micro_batches(sizes, range(3)) == [[0, 1, 2]]
    assert plan(micro_batch_tokens=1).micro_batches(sizes, range(3)) == [[0], [1], [2]]
    assert plan(micro_batch_tokens=75).most_tokens(sizes, [[0], [1, 2]]) == 48
