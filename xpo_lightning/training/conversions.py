"""Takes what users of transformers pass as policy and reward from Python, or says what to pass instead."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.models.policy import LoadedModel, ModelSpec
from xpo_lightning.rewards import PythonReward, SequenceClassifierReward
from xpo_lightning.rewards.base import Feedback
from xpo_lightning.rewards.no_reward import no_reward


def as_policy(policy: Any) -> ModelSpec | LoadedModel:
    """Turn the name of a model, a folder or a hub id, into a `ModelSpec`; return a specification as it is.

    Raises:
        InputError: It is something else; the message says what to pass.
    """
    if isinstance(policy, str | Path):
        return ModelSpec(str(policy))
    if isinstance(policy, nn.Module):
        raise InputError(
            f"policy is a {type(policy).__name__}, which says nothing of its tokenizer; pass "
            f"policy=LoadedModel(model, tokenizer), or the model's folder or hub id"
        )
    if inspect.isclass(policy) or not hasattr(policy, "load_model"):
        raise InputError(
            f"policy must be the folder or hub id of a model, a ModelSpec or a LoadedModel, but is {_named(policy)}"
        )
    return policy  # type: ignore[no-any-return]


def as_reward(reward: Any) -> Feedback:
    """Turn a function into a `PythonReward`, and a model's name into a `SequenceClassifierReward`.

    Raises:
        InputError: It is neither, and no reward or judge; the message says what to pass.
    """
    if reward is None:
        return no_reward()
    if isinstance(reward, Feedback):
        return reward
    if isinstance(reward, str | Path):
        return SequenceClassifierReward(str(reward))
    if isinstance(reward, nn.Module):
        raise InputError(
            f"reward is a {type(reward).__name__}, which says nothing of its tokenizer; pass the model's folder or hub "
            f"id, or a function that scores with it: def reward(prompts, completions, columns)"
        )
    if callable(reward) and not inspect.isclass(reward):
        return PythonReward(reward)
    raise InputError(
        f"reward must be a reward or a judge, a function (prompts, completions, columns), or the folder or hub id of a "
        f"reward model, but is {_named(reward)}"
    )


def _named(value: Any) -> str:
    return f"the class {value.__name__}; make one of it" if inspect.isclass(value) else f"{value!r:.60}"
