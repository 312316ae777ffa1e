"""Several completions a side: which two become the pair, and what is trained on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROMPTS, fit_quietly, longer_is_better, noise

from xpo_lightning import Candidates, InputError, Pair, PolicySampler, PythonReward, XPOLightningModule
from xpo_lightning.data.prompts import as_prompts

MakeModule = Callable[..., XPOLightningModule]

# Three candidates a side (rows) of three prompts (columns).
BY_POLICY = [[1.0, 5.0, 2.0], [3.0, 4.0, 2.0], [2.0, 6.0, 2.0]]
BY_SAMPLER = [[0.0, 9.0, 2.0], [4.0, 7.0, 2.0], [2.0, 8.0, 2.0]]


@pytest.mark.parametrize(
    ("choose", "one_writer", "by_policy", "by_sampler"),
    [
        # The best of each side: 3 and 4; 6 and 9; of equal scores the first.
        ("best_of_each", False, [1, 2, 0], [4, 3, 3]),
        # Widest cross pairs: |1 - 4| = |3 - 0| = 3, of which the policy's first comes first; |4 - 9| = 5.
        ("largest_margin", False, [0, 1, 0], [4, 3, 3]),
        # The best of all is the sampler's 4 against the policy's worst, 1; the sampler's 9 against 4; all equal.
        ("best_and_worst", False, [0, 1, 0], [4, 3, 3]),
        # One writer: 4 against 0, both of the second side, so the worst comes over; 9 against 4; all equal.
        ("best_and_worst", True, [3, 1, 0], [4, 3, 3]),
    ],
)
def test_pairs_are_chosen_as_worked_by_hand(choose: Any, one_writer: bool, by_policy: list[int], by_sampler: list[int]):
    places = Candidates(3, choose).select(
        Pair(torch.tensor(BY_POLICY), torch.tensor(BY_SAMPLER)), one_writer=one_writer
    )
    assert places.by_policy.tolist() == by_policy
    assert places.by_sampler.tolist() == by_sampler


def test_best_and_worst_of_one_writer_may_both_be_of_the_first_side():
    """Scores 5, 0 and 3, 2: the best is the first of the first side, the worst its second, which changes sides."""
    scores = Pair(torch.tensor([[5.0], [0.0]]), torch.tensor([[3.0], [2.0]]))
    places = Candidates(2, "best_and_worst").select(scores, one_writer=True)
    assert (places.by_policy.item(), places.by_sampler.item()) == (0, 1)
    places = Candidates(2, "best_and_worst").select(scores, one_writer=False)
    assert (places.by_policy.item(), places.by_sampler.item()) == (0, 3), "the exploration term keeps the sampler's"


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 3}, {"count": 1, "choose": "best_of_each"}])
def test_counts_that_do_not_suit_the_choice_are_refused(options: dict[str, Any]):
    with pytest.raises(InputError, match=r"model\.candidates\.(count|choose)"):
        Candidates(**options)


@pytest.mark.parametrize("arch", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("choose", ["best_of_each", "largest_margin", "best_and_worst"])
def test_training_pairs_are_the_chosen_ones_of_all_that_were_scored(make_module: MakeModule, arch: str, choose: Any):
    """Every candidate is scored once; the pair has the scores that the rule picks, and the reference's own logps."""
    seen: list[tuple[list[Any], list[str]]] = []

    def reward(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        seen.append((prompts, completions))
        return longer_is_better(prompts, completions, columns)

    module = make_module(arch, reward=PythonReward(reward), candidates=Candidates(3, choose))
    module.configure_model()
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    pairs = module.collector.collect(module.policy, prompts, noise(), training=True)
    ((asked, texts),) = seen
    assert asked == PROMPTS * 6
    scores = torch.tensor(longer_is_better(asked, texts, {})).view(2, 3, len(PROMPTS))
    own, others = scores[0].T.tolist(), scores[1].T.tolist()  # a row a prompt
    for row in range(len(PROMPTS)):
        by_policy, by_sampler = pairs.scores.by_policy[row].item(), pairs.scores.by_sampler[row].item()
        best_is_own = max(own[row]) >= max(others[row])
        wanted = {
            "best_of_each": (max(own[row]), max(others[row])),
            "largest_margin": max(((a, b) for a in own[row] for b in others[row]), key=lambda ab: abs(ab[0] - ab[1])),
            "best_and_worst": (max(own[row]), min(others[row])) if best_is_own else (min(own[row]), max(others[row])),
        }[choose]
        assert (by_policy, by_sampler) == wanted
        assert longer_is_better([], [pairs.completions.by_policy.texts[row]], {}) == pytest.approx([by_policy])
        assert longer_is_better([], [pairs.completions.by_sampler.texts[row]], {}) == pytest.approx([by_sampler])
    assert len(set(texts)) > len(PROMPTS) * 2, "candidates differ"
    # Policy and reference are equal yet, so each completion has the log-probability that its writer gave it.
    for side in ("by_policy", "by_sampler"):
        written = getattr(pairs.completions, side).logps
        assert getattr(pairs.reference_logps, side).tolist() == pytest.approx(written.tolist(), abs=1e-3)
    plain = module.collector.collect(module.policy, prompts, noise())
    assert len(seen[1][1]) == 2 * len(PROMPTS), "validation compares one completion a side"
    assert plain.completions.by_policy.texts != pairs.completions.by_policy.texts


def test_more_candidates_raise_the_scores_of_the_pairs(make_module: MakeModule):
    """The best of eight is on average longer than the first; the sampler's side too, which is the policy here."""
    means = []
    for candidates in (Candidates(), Candidates(8, "best_of_each")):
        module = make_module(candidates=candidates, sampler=PolicySampler(), learning_rate=0.0)
        fit_quietly(module, PROMPTS * 8)
        logged = module.trainer.callback_metrics
        means.append((float(logged["objective/model_scores"]), float(logged["objective/ref_scores"])))
    (one_own, one_other), (best_own, best_other) = means
    assert best_own > one_own + 1
    assert best_other > one_other + 1
