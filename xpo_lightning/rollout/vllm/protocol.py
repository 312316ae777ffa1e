"""Builds the content of requests to a vLLM server and parses its answers; sends nothing itself."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import UnusableError
from xpo_lightning.rollout.sampling import Sampling

OLDEST, NEWEST = (0, 28), (0, 99)
"""Oldest and newest accepted version of vLLM, (major, minor); `docs/vllm.md` says which were tested."""
LOWEST_TEMPERATURE = 0.01
"""The temperature that vLLM uses in place of any lower one except 0."""
OPTIONS = "model.rollout.init_args"


@dataclass(frozen=True)
class Answer:
    """A completion as the server returned it.

    Args:
        prompt: Token ids of the prompt, as the server read it.
        ids: Token ids of the completion, at least one.
        logps: Natural log-probability of each token of the completion.
        reason: Why generation stopped: `stop` or `length`.
        stopped_by: The stop string that ended the completion, or None.
        model: Name of the model that generated it.
    """

    prompt: list[int]
    ids: list[int]
    logps: list[float]
    reason: str
    stopped_by: str | None
    model: str


@dataclass(frozen=True)
class BaseModel:
    """A base model in a server's list of models, which also has adapters.

    Args:
        name: Its name in requests.
        context: Maximum number of tokens of prompt and completion; None if the server states no limit.
    """

    name: str
    context: int | None


def sampling_fields(sampling: Sampling, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Translate the sampling settings into vLLM's request fields.

    All are sent, because a server fills in missing fields from the generation config of its model.

    Args:
        sampling: The settings.
        eos_token_ids: Token ids that end a completion; the server's own EOS tokens are ignored.

    Returns:
        Fields of a request to `/v1/completions`.

    Raises:
        InputError: vLLM would sample differently.
    """
    temperature, filtered = sampling.temperature, sampling.min_p > 0 and sampling.top_p < 1
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise InputError(
            f"model.sampling.temperature={temperature:g} cannot be had with model.rollout=VLLMRollout: vLLM would take "
            f"{LOWEST_TEMPERATURE:g} without a word; set at least that, or 0"
        )
    if temperature and filtered:
        raise InputError(
            f"model.sampling.min_p={sampling.min_p:g} and model.sampling.top_p={sampling.top_p:g} cannot be had "
            f"together with model.rollout=VLLMRollout: vLLM applies them in the other order, and keeps other tokens; "
            f"set one of them to keep all"
        )
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": 0,
        "temperature": temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": sampling.stop_strings,
        "stop_token_ids": list(eos_token_ids),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "watermarking": False,
        "logprobs": 0,
        "return_token_ids": True,
    }


def seeds_of(uniforms: Tensor) -> list[int]:
    """Derive the seed of each completion from its first random number.

    Seeds have 32 bits, because on a CPU only the lower 32 bits of a seed count.

    Args:
        uniforms: Random numbers in [0, 1), float64. (B, max_new_tokens)

    Returns:
        Integers from 0 to 2**32 - 1. Length B.
    """
    seeds: list[int] = (uniforms[:, 0] * 2**32).long().tolist()
    return seeds


def read_answer(value: Any) -> Answer:
    """Parse the answer to a request for one completion.

    Raises:
        UnusableError: It is not one completion with token ids and log-probabilities.
    """
    try:
        (choice,) = value["choices"]
        ids, logps, prompt = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["prompt_token_ids"]
        reason, stopped_by, model = choice["finish_reason"], choice.get("stop_reason"), value["model"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UnusableError("is no completion with token ids and log-probabilities") from None
    if not (_whole(ids) and _whole(prompt) and ids):
        raise UnusableError("has no token ids")
    if not isinstance(logps, list) or len(logps) != len(ids) or not all(map(_is_logp, logps)):
        raise UnusableError("has no log-probability for each token")
    if reason not in ("stop", "length"):
        raise UnusableError("has a completion that was broken off")
    stopped_by = stopped_by if isinstance(stopped_by, str) else None
    return Answer(prompt, ids, [float(logp) for logp in logps], reason, stopped_by, str(model))


def read_version(value: Any, key: str) -> str:
    """Parse the answer of `/version`, and refuse a version older than `OLDEST` or newer than `NEWEST`.

    Args:
        value: The answer.
        key: Key of the config that the server's URL is under, for messages.

    Raises:
        UnusableError: The answer has no version.
        InputError: The version is out of range.
    """
    version = str(value.get("version")) if isinstance(value, dict) else ""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise UnusableError("has no version; vLLM's /version does")
    if not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
        raise InputError(
            f"{key}: the server runs vLLM {version[:40]!r}, and VLLMRollout knows {oldest} to {newest}; "
            f"start a server of such a version"
        )
    return version


def read_models(value: Any) -> list[BaseModel]:
    """Parse the base models from the answer of `/v1/models`.

    Raises:
        UnusableError: The answer has no list of models.
    """
    cards = value.get("data") if isinstance(value, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise UnusableError("has no list of models")
    bases = [card for card in cards if card.get("parent") is None]
    return [BaseModel(str(card["id"]), _context(card.get("max_model_len"))) for card in bases]


def chosen_model(models: Sequence[BaseModel], name: str | None, url: str) -> BaseModel:
    """Choose the base model by the name that the user gave.

    Args:
        models: All base models that the server lists; these are names of one model.
        name: The user's name for it; None takes the only name there is.
        url: URL of the server, for the error message.

    Raises:
        InputError: The server lists no model of this name, or several names while `name` is None.
    """
    names = [model.name for model in models]
    if name is None and len(set(names)) == 1:
        return models[0]
    if name in names:
        return models[names.index(name)]
    served = ", ".join(map(repr, names)) or "none"
    missing = "is not set, and there is more than one to choose from" if name is None else f"names {name!r}"
    if not names:
        missing = "cannot be found"
    raise InputError(f"{OPTIONS}.model {missing}, and the server at {url} has {served:.300}; give one of its names")


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _is_logp(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value <= 1e-3


def _context(length: Any) -> int | None:
    return length if type(length) is int and length > 0 else None
