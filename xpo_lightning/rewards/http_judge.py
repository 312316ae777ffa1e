"""A judge that asks a language model behind an OpenAI-compatible HTTP endpoint."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import HTTPClient, RequestError, UnusableError, checked_url
from xpo_lightning.rewards.base import OnInvalid
from xpo_lightning.rewards.llm_judge import TEMPLATE, VERDICTS, PromptedJudge

_OPTIONS = "model.reward.init_args"
_TOKENS = 8  # enough for a letter with spaces, stars or brackets around it
_TOP = 20  # the most that OpenAI and vLLM return
_MIN_PROBABILITY = 0.1  # so that the article of "A good question" is no verdict
_BLANKS = " \t\r\n▁Ġ"  # the last two are spaces as tokenizers write them, for servers that return raw tokens
_OURS = {
    *("model", "messages", "temperature", "max_tokens", "max_completion_tokens"),
    *("logprobs", "top_logprobs", "n", "stream"),
}


class HTTPJudge(PromptedJudge):
    """Asks a language model behind a chat completions endpoint: OpenAI, vLLM, llama.cpp, Ollama and many others.

    Each question is one request `POST {url}/chat/completions` with temperature 0. Which completion is shown as A is
    decided as in `PromptedJudge`. The verdict is read from the answer as follows:

    - With `logprobs`, it is p(A) / (p(A) + p(B)), where p sums the probabilities of the letter, with and without spaces
      around it, among the most likely first tokens that the server lists. A letter that is not listed counts as 0: it
      is less likely than all that are. If A and B together have less than `min_probability`, or nothing is listed, the
      text decides instead.
    - By the text, it is 1 for A alone and 0 for B alone, with any punctuation around it (`A`, ` B.`, `**A**`).
    - Anything else is no usable answer, and is treated as `invalid` says. The judge does not ask again, since at
      temperature 0 the answer would be the same.

    A body that is not JSON, or not a chat completion, is a failed request: it is retried, and ends the run when
    `retries` are used up. If the model thinks before it answers, turn that off, for example with `extra_body`.

    Args:
        url: Base URL of the API, such as http://localhost:8000/v1. Messages show it: put no secret there.
        model: Name of the model on the server.
        api_key_env: Name of the environment variable that holds the API key; null sends none.
        template: The question, with `{prompt}`, `{first}` and `{second}` in it, to be answered with A or B.
        both_orders: Whether to ask twice, the second time with the completions exchanged, and take the mean.
        invalid: What to do with a pair without a usable answer: `skip`, `tie` or `error`.
        system: System message before the question; null sends none.
        logprobs: Whether to ask for log-probabilities, which show how certain the model is; some servers refuse that.
        top_logprobs: How many of the most likely tokens to ask for, at least 2; null is 20. Some servers allow fewer.
        min_probability: Smallest p(A) + p(B) for which log-probabilities decide; null is 0.1.
        extra_body: Further fields of the request, such as `{chat_template_kwargs: {enable_thinking: false}}`. They are
            saved with the run's settings: put no secret there.
        timeout: How many seconds one try of a request may take, from connecting to the last byte of the answer.
        retries: How often a request is retried when the server cannot be reached, is too slow or too busy, or answers
            with a server error or something unusable.
        backoff: Seconds before the first retry; each later wait is twice as long, up to 30 seconds.
        concurrency: Maximum number of requests in flight, for each process of the run.
        max_bytes: Largest answer, in bytes.

    Raises:
        InputError: An option is invalid, or `extra_body` has a field that the judge reserves.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str | None = None,
        template: str = TEMPLATE,
        both_orders: bool = False,
        invalid: OnInvalid = "skip",
        system: str | None = None,
        logprobs: bool = True,
        top_logprobs: int | None = None,
        min_probability: float | None = None,
        extra_body: dict[str, Any] | None = None,
        timeout: float = 60.0,
        retries: int = 6,
        backoff: float = 1.0,
        concurrency: int = 16,
        max_bytes: int = 2**24,
    ) -> None:
        super().__init__(template, both_orders, invalid)
        if not model.strip():
            raise InputError(f"{_OPTIONS}.model must be the name of a model at the server, but is empty")
        for option, value in (("top_logprobs", top_logprobs), ("min_probability", min_probability)):
            if value is not None and not logprobs:
                raise InputError(f"{_OPTIONS}.{option} needs {_OPTIONS}.logprobs to be true")
        self.url, self.model, self.system, self.logprobs = checked_url(url), model, system, logprobs
        self.top_logprobs = _TOP if top_logprobs is None else top_logprobs
        self.min_probability = _MIN_PROBABILITY if min_probability is None else min_probability
        if self.top_logprobs < 2:
            raise InputError(f"{_OPTIONS}.top_logprobs must be at least 2, for A and for B, but is {top_logprobs}")
        check_range(f"{_OPTIONS}.min_probability", self.min_probability, least=0, below=1)
        self.extra_body = _checked_extra(extra_body or {})
        self._client = HTTPClient(
            _endpoint(url), api_key_env, timeout, retries, backoff, concurrency=concurrency, max_bytes=max_bytes
        )

    def load(self) -> None:
        """Check that there is an API key, if one is named.

        Raises:
            InputError: The environment variable is not set.
        """
        self._client.load()

    def ask(self, questions: Sequence[str]) -> list[float | None]:
        """Send questions to the model; see `PromptedJudge.ask`.

        Raises:
            InputError: The server could not be reached, refused a request or did not return a chat completion.
        """
        try:
            return self._client.post([self._request(question) for question in questions], self._verdict, self.check)
        except RequestError as error:
            if self.logprobs and error.status in (400, 422):
                raise InputError(
                    f"{error}; if the server gives no log-probabilities, set {_OPTIONS}.logprobs to false, and if it "
                    f"gives fewer than {self.top_logprobs}, lower {_OPTIONS}.top_logprobs"
                ) from None
            raise

    def _request(self, question: str) -> dict[str, Any]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        request = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": _TOKENS,
        }
        wanted = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.logprobs else {}
        return {**request, **wanted, **self.extra_body}

    def _verdict(self, value: Any) -> float | None:
        """Read the probability of A against B from a chat completion; None if there is no usable answer."""
        try:
            choice = value["choices"][0]
            text, logprobs = choice["message"].get("content"), choice.get("logprobs")
            first = (logprobs or {}).get("content") or [{}]
            weighed = _weigh(first[0].get("top_logprobs") or [], self.min_probability) if self.logprobs else None
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            raise UnusableError("is no chat completion") from None
        return _from_text(text) if weighed is None else weighed


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(path=parts.path.rstrip("/") + "/chat/completions").geturl()


def _checked_extra(extra_body: dict[str, Any]) -> dict[str, Any]:
    where = f"{_OPTIONS}.extra_body"
    taken = sorted(_OURS & extra_body.keys())
    if taken:
        raise InputError(f"{where}: '{taken[0]}' is taken; the judge sets it, or does without it")
    try:
        json.dumps(extra_body, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} must be what JSON can hold ({error})") from None
    return dict(extra_body)


def _weigh(listed: Sequence[Mapping[str, Any]], min_probability: float) -> float | None:
    """Return p(A) / (p(A) + p(B)) from the most likely tokens; None if A and B together are too unlikely."""
    letters = [(entry["token"].strip(_BLANKS), entry["logprob"]) for entry in listed]
    if not all(logprob <= 1e-3 for _, logprob in letters):  # a little above 0 by rounding; not NaN
        raise ValueError
    a, b = (math.fsum(math.exp(logprob) for letter, logprob in letters if letter == verdict) for verdict in VERDICTS)
    return a / (a + b) if a + b >= min_probability and a + b > 0 else None


def _from_text(text: Any) -> float | None:
    found = re.fullmatch(r"[\W_]*([AB])[\W_]*", text) if isinstance(text, str) else None
    return None if found is None else float(found[1] == VERDICTS[0])
