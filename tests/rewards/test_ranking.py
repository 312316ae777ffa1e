"""Several completions a side where a judge compares only two: a tournament, or all pairs within a budget."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from conftest import PROMPTS, Recorder, completions_of, fit_quietly, noise, prompts_of
from torch import Tensor

from xpo_lightning import Candidates, InputError, Judge, Pair, PolicySampler, PythonReward, XPOLightningModule
from xpo_lightning.core.batch import Completions
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.rewards.ranking import Ranking, every_pair

MakeModule = Callable[..., XPOLightningModule]


class Referee(Judge):
    """Says what a function says of two texts, and keeps what it was asked."""

    def __init__(self, says: Callable[[str, str], float]) -> None:
        super().__init__()
        self.says, self.asked, self.calls = says, [], 0

    def compare(
        self,
        prompts: Sequence[Any],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        self.calls += 1
        self.asked += list(zip(prompts, firsts, seconds, strict=True))
        return torch.tensor([self.says(one, other) for one, other in zip(firsts, seconds, strict=True)])


def by_number(one: str, other: str) -> float:
    """The larger number is better, which is a total order; equal ones are tied."""
    return 0.5 + 0.5 * ((float(one) > float(other)) - (float(one) < float(other)))


def by_cycle(one: str, other: str) -> float:
    """Each of a, b, c beats the next, and d beats a: no order at all."""
    return float(one + other in {"ab", "bc", "cd", "da", "ac", "bd"})


def ranking(judge: Judge, by_policy: list[list[str]], by_sampler: list[list[str]]) -> Ranking:
    """Rank texts: a list for each candidate, a text for each prompt."""

    def written(texts: list[str]) -> Completions:
        plain = completions_of([[7]] * len(texts))
        return Completions(plain.ids, plain.mask, plain.ended, tuple(texts), plain.token_logps)

    size = len(by_policy[0])
    sides = Pair([written(texts) for texts in by_policy], [written(texts) for texts in by_sampler])
    return Ranking(judge, prompts_of([[1]] * size), sides)


def test_tournament_is_that_worked_by_hand():
    """Prompt 0: 1 loses to 5 in round 1, 2 to 5 in round 2; 4 to 9, 7 to 9; in the final 5 to 9.

    Prompt 1: 3 and 3 are tied, so the first goes on, and loses to 8; 2 loses to 6, and 6 is tied with 6; 8 beats 6.
    """
    judge = Referee(by_number)
    found = ranking(judge, [["1", "3"], ["5", "3"], ["2", "8"]], [["4", "2"], ["9", "6"], ["7", "6"]])
    standings = found.standings("tournament", None)
    assert standings.by_policy.T.tolist() == [[1, 3, 2], [2, 1, 4]]
    assert standings.by_sampler.T.tolist() == [[1, 4, 2], [1, 3, 2]]
    # 2K - 1 = 5 comparisons; of prompt 1, two are of equal texts, about which nobody is asked.
    assert found.comparisons.tolist() == [5, 3]
    assert len(judge.asked) == 8
    assert judge.calls == 3, "one call a round, for all prompts and both sides"
    # The final is known, and so is its reverse; another pair is asked for.
    assert found.answers(Pair(torch.tensor([1, 2]), torch.tensor([4, 4]))).tolist() == [0, 1]
    assert len(judge.asked) == 8
    assert found.answers(Pair(torch.tensor([4, 2]), torch.tensor([0, 4]))).tolist() == [1, 1]
    assert len(judge.asked) == 9


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_tournament_finds_the_best_by_one_comparison_less_than_there_are(count: int):
    values = torch.randperm(2 * count).tolist()
    judge = Referee(by_number)
    found = ranking(judge, [[str(one)] for one in values[:count]], [[str(one)] for one in values[count:]])
    standings = torch.cat(list(vars(found.standings("tournament", None)).values()))[:, 0]
    assert values[int(standings.argmax())] == 2 * count - 1
    assert found.comparisons.tolist() == [2 * count - 1]
    for side in (values[:count], values[count:]):
        offset = 0 if side == values[:count] else count
        assert side[int(standings[offset : offset + count].argmax())] == max(side)
    assert values[int(standings.argmin())] != 2 * count - 1


def test_all_pairs_are_the_mean_of_what_each_won():
    """Of 3, 1 | 2, 0: 3 wins 3 of 3, 1 one, 2 two, 0 none."""
    found = ranking(Referee(by_number), [["3"], ["1"]], [["2"], ["0"]])
    standings = found.standings("all_pairs", None)
    assert standings.by_policy[:, 0].tolist() == pytest.approx([1, 1 / 3])
    assert standings.by_sampler[:, 0].tolist() == pytest.approx([2 / 3, 0])
    assert found.comparisons.tolist() == [6]


def test_judge_without_an_order():
    """a beats b and c, b beats c and d, c beats d, d beats a: 2, 2, 1 and 1 of 3; a and c win, then a."""
    texts: tuple[list[list[str]], list[list[str]]] = ([["a"], ["b"]], [["c"], ["d"]])
    pairs = ranking(Referee(by_cycle), *texts).standings("all_pairs", None)
    assert torch.cat([pairs.by_policy, pairs.by_sampler])[:, 0].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3])
    rounds = ranking(Referee(by_cycle), *texts).standings("tournament", None)
    assert torch.cat([rounds.by_policy, rounds.by_sampler])[:, 0].tolist() == [3, 1, 2, 1]


@pytest.mark.parametrize(
    ("budget", "expected"),
    # The first round compares the values 1 and 4, and 2 and 3.
    [(1, [0, 0.5, 0.5, 1]), (2, [0, 0, 1, 1])],
)
def test_budget_cuts_whole_rounds_before_any_completion_is_compared_twice(budget: int, expected: list[float]):
    found = ranking(Referee(by_number), [["1"], ["2"]], [["3"], ["4"]])
    standings = found.standings("all_pairs", budget)
    assert torch.cat([standings.by_policy, standings.by_sampler])[:, 0].tolist() == expected
    assert found.comparisons.tolist() == [budget]


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_every_pair_comes_once_in_rounds_of_all(count: int):
    pairs = every_pair(count)
    assert sorted(tuple(sorted(pair)) for pair in pairs) == sorted(combinations(range(count), 2))
    for turn in range(count - 1):
        among = [one for pair in pairs[turn * count // 2 : (turn + 1) * count // 2] for one in pair]
        assert sorted(among) == list(range(count))


def test_no_answer_counts_as_a_tie():
    silent = Referee(lambda one, other: float("nan"))
    texts: tuple[list[list[str]], list[list[str]]] = ([["a"], ["b"]], [["c"], ["d"]])
    rounds = ranking(silent, *texts).standings("tournament", None)
    assert torch.cat([rounds.by_policy, rounds.by_sampler])[:, 0].tolist() == [3, 1, 2, 1]
    pairs = ranking(silent, *texts).standings("all_pairs", None)
    assert set(torch.cat([pairs.by_policy, pairs.by_sampler])[:, 0].tolist()) == {0.5}


def longer(one: str, other: str) -> float:
    key = [(len(text), text) for text in (one, other)]
    return float(key[0] > key[1])


@pytest.mark.parametrize("one_writer", [False, True])
@pytest.mark.parametrize("choose", ["best_of_each", "best_and_worst"])
@pytest.mark.parametrize("judging", ["tournament", "all_pairs"])
def test_training_pairs_are_the_best_and_the_worst(
    make_module: MakeModule, judging: Any, choose: Any, one_writer: bool
):
    judge = Referee(longer)
    sampler = {"sampler": PolicySampler()} if one_writer else {}
    module = make_module(reward=judge, candidates=Candidates(3, choose, judging), **sampler)
    module.configure_model()
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    pairs = module.collector.collect(module.policy, prompts, noise(), training=True)
    own, other = pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts
    assert pairs.labels.tolist() == [
        longer(*texts) if texts[0] != texts[1] else 0.5 for texts in zip(own, other, strict=True)
    ]
    assert pairs.comparisons is not None
    seen = dict.fromkeys(PROMPTS, 0)
    of_prompt: dict[str, set[str]] = {prompt: set() for prompt in PROMPTS}
    for prompt, first, second in judge.asked:
        seen[prompt] += 1
        of_prompt[prompt] |= {first, second}
    assert pairs.comparisons.tolist() == list(seen.values())
    assert max(seen.values()) <= (15 if judging == "all_pairs" else 6)
    for row, prompt in enumerate(PROMPTS):
        best = max(of_prompt[prompt], key=lambda text: (len(text), text))
        assert best in (own[row], other[row])
        if judging == "all_pairs" and choose == "best_and_worst" and one_writer and len(of_prompt[prompt]) == 6:
            assert min(of_prompt[prompt], key=lambda text: (len(text), text)) in (own[row], other[row])
    plain = module.collector.collect(module.policy, prompts, noise())
    assert plain.comparisons is None, "validation compares one completion a side"


def test_comparisons_are_logged(make_module: MakeModule):
    recorder = Recorder()
    module = make_module(reward=Referee(longer), candidates=Candidates(4, "best_of_each", "all_pairs", 5))
    fit_quietly(module, PROMPTS, callbacks=[recorder])
    assert 0 < recorder.of("pairs/comparisons")[0] <= 6, "the budget, and the chosen pair if it has not met"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judging": "tournament"}, "model.candidates.judging=tournament .*count is 1"),
        ({"count": 2, "choose": "best_of_each", "budget": 3}, "model.candidates.budget=3 .*judging is null"),
        (
            {"count": 2, "choose": "best_of_each", "judging": "tournament", "budget": 3},
            "budget=3 .*judging is tournament",
        ),
        (
            {"count": 2, "choose": "best_of_each", "judging": "all_pairs", "budget": 0},
            "model.candidates.budget must be at",
        ),
    ],
)
def test_options_that_do_not_suit_each_other_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Candidates(**options)


def test_judging_needs_a_judge_and_a_judge_needs_judging(make_module: MakeModule):
    with pytest.raises(InputError, match=r"model\.candidates\.judging=tournament is for a judge"):
        make_module(candidates=Candidates(2, "best_of_each", "tournament"), reward=PythonReward(lambda **_: [0.0]))
    with pytest.raises(InputError, match=r"set model\.candidates\.judging to tournament or all_pairs"):
        make_module(candidates=Candidates(2, "best_of_each"), reward=Referee(longer))
