"""A reward that a server computes, over HTTP."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import HTTPClient, UnusableError
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.validation import as_scores

_OPTIONS = "model.reward.init_args"


class RemoteReward(Reward):
    """Scores completions on a server, which receives JSON by POST and answers with JSON.

    A request holds n completions, at most `batch_size`:

        {"ids": [0, 1], "prompts": ["2+2=", "Hi"], "completions": ["4", " there"], "columns": {"answer": ["4", null]}}

    All lists have length n. `ids` counts from 0 to n - 1 in every request. A prompt is text, or a list of chat messages
    `{"role": ..., "content": ...}`, as in its row. `columns` has the rows' other columns, and may be empty.

    The server answers with status 200 and n finite numbers, in the order of the completions:

        {"scores": [1.0, -0.5]}

    or with the list alone, `[1.0, -0.5]`. True counts as 1 and False as 0. A server that answers in another order
    returns the ids too: `{"ids": [1, 0], "scores": [-0.5, 1.0]}`; they must be those of the request, each once.

    A request may arrive twice, if the first answer was lost. A body that is not JSON, or has no list of scores, is a
    failed request, which is retried; a wrong number of scores, or ids that are not those of the request, end the run
    at once.

    Args:
        url: URL to post to. Messages show it: put no secret there.
        api_key_env: Name of the environment variable that holds the API key, sent as `Authorization: Bearer ...`; null
            sends none.
        batch_size: Maximum number of completions in one request.
        columns: Names of the columns to send; null sends all, and an empty list none.
        timeout: How many seconds one try of a request may take, from connecting to the last byte of the answer.
        retries: How often a request is retried when the server cannot be reached, is too slow or too busy, or answers
            with a server error or something unusable.
        backoff: Seconds before the first retry; each later wait is twice as long, up to 30 seconds.
        concurrency: Maximum number of requests in flight, for each process of the run.
        max_bytes: Largest answer, in bytes.

    Raises:
        InputError: An option is invalid.
    """

    def __init__(
        self,
        url: str,
        api_key_env: str | None = None,
        batch_size: int = 64,
        columns: list[str] | None = None,
        timeout: float = 300.0,
        retries: int = 6,
        backoff: float = 1.0,
        concurrency: int = 4,
        max_bytes: int = 2**24,
    ) -> None:
        super().__init__()
        check_range(f"{_OPTIONS}.batch_size", batch_size, least=1)
        self._client = HTTPClient(
            url, api_key_env, timeout, retries, backoff, concurrency=concurrency, max_bytes=max_bytes
        )
        self._batch_size = batch_size
        self.url = url
        self.columns = None if columns is None else list(columns)

    def load(self) -> None:
        """Check that there is an API key, if one is named.

        Raises:
            InputError: The environment variable is not set.
        """
        self._client.load()

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Request the scores of completions from the server.

        Args:
            prompts: B prompts, text or chat messages.
            completions: B completions.
            columns: The rows' other columns, each of length B.

        Returns:
            The scores, float32. (B,)

        Raises:
            InputError: JSON cannot hold the prompts or columns, the server could not be reached or refused a request,
                or it did not return B numbers.
            NonFiniteError: Some scores are not finite.
        """
        sent = self._sent(columns)
        parts = [slice(start, start + self._batch_size) for start in range(0, len(completions), self._batch_size)]
        payloads = [
            {
                "ids": list(range(len(completions[part]))),
                "prompts": list(prompts[part]),
                "completions": list(completions[part]),
                "columns": {name: values[part] for name, values in sent.items()},
            }
            for part in parts
        ]
        _check_json("the prompts", prompts, "write the images and the like of chat messages as text or as a URL")
        for name, values in sent.items():
            _check_json(f"column {name!r}", values, f"name the columns to send in {_OPTIONS}.columns")
        answers = self._client.post(payloads, _read, self.check)
        scores = [
            self._in_order(*answer, expected=len(completions[part]))
            for answer, part in zip(answers, parts, strict=True)
        ]
        return as_scores(list(chain(*scores)), len(completions), self._who)

    @property
    def _who(self) -> str:
        return f"reward server {self.url}"

    def _sent(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        names = list(columns) if self.columns is None else self.columns
        missing = [name for name in names if name not in columns]
        if missing:
            raise InputError(f"{_OPTIONS}.columns: the rows have no column '{missing[0]}', but {sorted(columns)}")
        return {name: list(columns[name]) for name in names}

    def _in_order(self, scores: list[Any], ids: list[int] | None, expected: int) -> list[Any]:
        """Check an answer's length, and put its scores into the order of the request."""
        if len(scores) != expected:
            raise InputError(f"{self._who} gave {len(scores)} scores for {expected} completions; it must give each one")
        if ids is None:
            return scores
        if sorted(ids) != list(range(expected)):
            raise InputError(
                f"{self._who} gave ids that are not those of the request, 0 to {expected - 1}, each once; it may "
                f"leave them out if its scores are in the order of the completions"
            )
        by_id = dict(zip(ids, scores, strict=True))
        return [by_id[number] for number in range(expected)]


def _read(value: Any) -> tuple[list[Any], list[int] | None]:
    """Parse scores and ids from an answer; the ids are None if it has none, and one that is no integer becomes -1."""
    scores, ids = (value.get("scores"), value.get("ids")) if isinstance(value, dict) else (value, None)
    # A later message or traceback would show anything other than a number, and that might be the API key.
    if not isinstance(scores, list) or not all(score is None or isinstance(score, float | int) for score in scores):
        raise UnusableError("has no list of scores")
    if not isinstance(ids, list | None):
        raise UnusableError("has ids that are no list")
    return scores, None if ids is None else [number if type(number) is int else -1 for number in ids]


def _check_json(name: str, values: Sequence[Any], advice: str) -> None:
    try:
        json.dumps(list(values), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be sent as JSON ({error}); {advice}") from None
