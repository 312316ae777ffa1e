"""A reward is asked about the completions whose score is not known, each with the columns of its own row."""

from dataclasses import replace

import torch
from conftest import completions_of, prompts_of

from xpo_lightning import Completions, Pair
from xpo_lightning.rewards.python import PythonReward
from xpo_lightning.rewards.scorer import PairScorer

ASKED: list[tuple[str, str, str]] = []


def remember(prompts, completions, columns):
    """Score by a digit that ends the completion, and remember what was shown."""
    ASKED.extend(zip(prompts, completions, columns["answer"], strict=True))
    return [float(text[-1]) for text in completions]


def written(*texts: str) -> Completions:
    return replace(completions_of([[1]] * len(texts)), texts=texts)


def test_a_score_that_is_known_is_not_asked_for_again_and_may_be_0():
    """Two completions of the policy and one of the sampler for each prompt; the second of the sampler's has 0."""
    ASKED.clear()
    prompts = replace(prompts_of([[1], [2], [3]]), columns={"answer": ("a", "b", "c")})
    sides = Pair([written("p1", "p2", "p3"), written("q4", "q5", "q6")], [written("s7", "s?", "s9")])
    found = PairScorer(PythonReward(remember), None).score(prompts, sides, [None, 0.0, None])
    assert ASKED == [
        ("prompt 0", "p1", "a"),
        ("prompt 1", "p2", "b"),
        ("prompt 2", "p3", "c"),
        ("prompt 0", "q4", "a"),
        ("prompt 1", "q5", "b"),
        ("prompt 2", "q6", "c"),
        ("prompt 0", "s7", "a"),
        ("prompt 2", "s9", "c"),
    ]
    assert found.map(torch.Tensor.tolist) == Pair([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 0.0, 9.0]])
