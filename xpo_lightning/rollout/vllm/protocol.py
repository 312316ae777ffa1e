"""What a vLLM server is asked for and what it answers, without the asking."""

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
"""The first and the last minor version that are let through; `docs/vllm.md` says which were tried."""
LOWEST_TEMPERATURE = 0.01
"""What vLLM takes for any lower one but 0."""
OPTIONS = "model.rollout.init_args"


@dataclass(frozen=True)
class Answer:
    """A completion as the server gave it.

    Args:
        prompt: Token ids that it read.
        ids: Token ids that it wrote, at least one.
        logps: Natural log-probability of each.
        reason: Why it stopped: `stop` or `length`.
        stopped_by: The stop string that it stopped at; None where there was none.
        model: Name of the model that wrote.
    """

    prompt: list[int]
    ids: list[int]
    logps: list[float]
    reason: str
    stopped_by: str | None
    model: str


@dataclass(frozen=True)
class BaseModel:
    """A model that a server holds, as it lists it; adapters are left out.

    Args:
        name: What it is called in requests.
        context: Most tokens of prompt and completion; None where the server names no limit.
    """

    name: str
    context: int | None


def sampling_fields(sampling: Sampling, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Put the settings of sampling into vLLM's words.

    All are sent, because a server fills gaps from the generation config of its model.

    Args:
        sampling: The settings.
        eos_token_ids: Token ids that end a completion; no others shall, whatever the server knows of.

    Returns:
        Fields of a request to `/v1/completions`.

    Raises:
        InputError: vLLM would sample in another way.
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
    """Turn the randomness of completions into a seed for each.

    On a CPU only the lower 32 bits of a seed count, so there are no others.

    Args:
        uniforms: Numbers in [0, 1), float64. (B, max_new_tokens)

    Returns:
        Whole numbers from 0 to 2**32 - 1. Length B.
    """
    seeds: list[int] = (uniforms[:, 0] * 2**32).long().tolist()
    return seeds


def read_answer(value: Any) -> Answer:
    """Read the answer to a request for one completion.

    Raises:
        UnusableError: It is not one.
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


def read_version(value: Any) -> str:
    """Read the answer of `/version`, and refuse a server that is too old or too new to be known.

    Raises:
        UnusableError: It is not a version.
        InputError: It is out of range.
    """
    version = str(value.get("version")) if isinstance(value, dict) else ""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise UnusableError("has no version; vLLM's /version does")
    if not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
        raise InputError(
            f"{OPTIONS}.url: the server runs vLLM {version[:40]!r}, and VLLMRollout knows {oldest} to {newest}; "
            f"start a server of such a version"
        )
    return version


def read_models(value: Any) -> list[BaseModel]:
    """Read the base models in the answer of `/v1/models`.

    Raises:
        UnusableError: It is no list of models.
    """
    cards = value.get("data") if isinstance(value, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        raise UnusableError("has no list of models")
    bases = [card for card in cards if card.get("parent") is None]
    return [BaseModel(str(card["id"]), _context(card.get("max_model_len"))) for card in bases]


def chosen_model(models: Sequence[BaseModel], name: str | None, url: str) -> BaseModel:
    """Choose the base model.

    Args:
        models: All that the server holds.
        name: What the user calls it; None where there is but one.
        url: Of the server.

    Raises:
        InputError: It is not there, or it is not clear which it is. All names of one server are of one model.
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
