"""What a remote reward makes of a server's answers."""

import math
from typing import Any

import pytest
import torch
from reward_server import (
    Request,
    Serve,
    remote,
    scores,
)

from xpo_lightning.core.errors import InputError, NonFiniteError
from xpo_lightning.rewards.remote import RemoteReward

pytestmark = pytest.mark.usefixtures("own_environment")


def test_a_remote_reward_gets_its_protocol(serve: Serve) -> None:
    server = serve(lambda request: request.answer({"scores": [0.5] * len(request.payload["ids"])}))
    chat = [{"role": "user", "content": "hi"}]
    reward = RemoteReward(server.url, batch_size=2, concurrency=1)
    reward.load()
    given = reward(["p", chat, "q"], ["a", "b", "c"], {"answer": ["4", None, "é"], "level": [1, 2, 3]})
    assert given.tolist() == [0.5, 0.5, 0.5]
    assert given.dtype == torch.float32
    assert [request.payload for request in server.seen] == [
        {
            "ids": [0, 1],
            "prompts": ["p", chat],
            "completions": ["a", "b"],
            "columns": {"answer": ["4", None], "level": [1, 2]},
        },
        {"ids": [0], "prompts": ["q"], "completions": ["c"], "columns": {"answer": ["é"], "level": [3]}},
    ]
    assert {request.headers["Content-Type"] for request in server.seen} == {"application/json"}
    assert {request.path for request in server.seen} == {"/score"}


def test_no_completions_are_no_request(serve: Serve) -> None:
    server = serve(Request.score)
    assert scores(remote(server), 0) == []
    assert server.seen == []


def test_scores_may_be_a_bare_list_and_truth_values(serve: Serve) -> None:
    server = serve(lambda request: request.answer([True, False, 2]))
    assert scores(remote(server, batch_size=3), 3) == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_scores_is_named(serve: Serve, count: int) -> None:
    server = serve(lambda request: request.answer({"scores": [1.0] * count}))
    with pytest.raises(InputError, match=rf"^reward server {server.url} gave {count} scores for 3 completions"):
        scores(remote(server, batch_size=3), 3)
    assert len(server.seen) == 1


def test_wrong_numbers_of_two_requests_do_not_make_up_for_each_other(serve: Serve) -> None:
    server = serve(lambda request: request.answer({"scores": [1.0] * (1 if request.number == 1 else 3)}))
    with pytest.raises(InputError, match="gave 1 scores for 2 completions"):
        scores(remote(server, batch_size=2, concurrency=1), 4)


def test_ids_put_scores_into_order(serve: Serve) -> None:
    def backwards(request: Request) -> None:
        numbers = [float(text) for text in request.payload["completions"]]
        request.answer({"ids": request.payload["ids"][::-1], "scores": numbers[::-1]})

    assert scores(remote(serve(backwards), batch_size=3), 7) == list(range(7))


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [1, 2, 3], [0, 1, "2"], [0, 1, 2.0], [False, True, 2]])
def test_ids_that_are_not_those_of_the_request_are_refused(serve: Serve, ids: list[Any]) -> None:
    server = serve(lambda request: request.answer({"ids": ids, "scores": [1, 2, 3]}))
    with pytest.raises(InputError, match=rf"^reward server {server.url} gave ids that are not .*, 0 to 2, each once"):
        scores(remote(server, batch_size=3), 3)
    assert len(server.seen) == 1


def test_scores_that_are_not_finite_have_their_rows(serve: Serve) -> None:
    odd = {"2": math.nan, "5": 1e39}
    server = serve(lambda request: request.answer([odd.get(text, 0.0) for text in request.payload["completions"]]))
    with pytest.raises(NonFiniteError, match=r"gave nan for row 2 and 1e\+39 for row 5") as caught:
        scores(remote(server, batch_size=2), 6)
    assert caught.value.rows == [2, 5]


def test_a_score_that_is_missing_is_named(serve: Serve) -> None:
    with pytest.raises(InputError, match=r"reward server .* gave None for row 1; a score must be a number"):
        scores(remote(serve(lambda request: request.answer([0.5, None])), batch_size=2), 2)


def test_only_the_named_columns_are_sent(serve: Serve) -> None:
    server = serve(lambda request: request.answer([1]))
    reward = remote(server, columns=["answer"])
    reward(["p"], ["c"], {"answer": ["x"], "image": [object()]})
    assert server.seen[0].payload["columns"] == {"answer": ["x"]}
    with pytest.raises(InputError, match=r"init_args\.columns: the rows have no column 'answer', but \['image'\]"):
        reward(["p"], ["c"], {"image": [1]})


@pytest.mark.parametrize("value", [object(), torch.tensor(1.0), b"x", math.nan, {(1, 2): 3}])
def test_a_column_that_json_cannot_hold_is_refused(serve: Serve, value: Any) -> None:
    server = serve(Request.score)
    with pytest.raises(InputError, match=r"column 'image' cannot be sent as JSON \(.*\); name the columns to send in"):
        remote(server)(["p"], ["c"], {"answer": ["x"], "image": [value]})
    assert server.seen == []


def test_a_prompt_that_json_cannot_hold_is_refused(serve: Serve) -> None:
    server = serve(Request.score)
    with pytest.raises(InputError, match=r"the prompts cannot be sent as JSON \(.*\); write the images"):
        remote(server)([[{"role": "user", "content": object()}]], ["c"], {})
    assert server.seen == []
