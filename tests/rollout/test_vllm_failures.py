"""vLLM servers that fail, hang, lie or come back: one clear error within bounded time, or none at all."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm_rollouts import COMPLETIONS, Engine, Serve, begun, both, broken
from vllm_stand_in import Handler

from xpo_lightning import InputError


def choice(**changes: Any) -> Callable[[Handler], None]:
    """Answer with a completion of one token that is odd in some way."""

    def answer(request: Handler) -> None:
        payload = request.server.asked("/v1/completions")[-1]
        logprobs = {"token_logprobs": [-1.0] * 6}
        right = {"token_ids": [5] * 6, "prompt_token_ids": payload["prompt"], "logprobs": logprobs}
        odd = {**right, "finish_reason": "length", **changes}
        request.answer(200, {"model": changes.get("model", payload["model"]), "choices": [odd]})

    return answer


FAILURES: dict[str, tuple[str, Callable[[Handler], Any], str]] = {
    "broken_off": (COMPLETIONS, Handler.hang_up, "could not be reached, or broke off"),
    "hangs": (COMPLETIONS, lambda request: request.server.release.wait(30), "has not answered in full after 0.3 sec"),
    "error": (COMPLETIONS, lambda request: request.answer(500, "no memory"), "answered 500"),
    "no_json": (COMPLETIONS, lambda request: request.answer(200, "garbage"), "is not JSON"),
    "no_choice": (COMPLETIONS, lambda request: request.answer(200, {"choices": []}), "no completion with token ids"),
    "no_ids": (COMPLETIONS, choice(token_ids=[]), "has no token ids"),
    "odd_ids": (COMPLETIONS, choice(token_ids=[1.5] * 6), "has no token ids"),
    "few_logps": (COMPLETIONS, choice(logprobs={"token_logprobs": [-1.0]}), "no log-probability for each token"),
    "nan_logps": (COMPLETIONS, choice(logprobs={"token_logprobs": [float("nan")] * 6}), "no log-probability for each"),
    "aborted": (COMPLETIONS, choice(finish_reason="abort"), "was broken off"),
    "other_prompt": (COMPLETIONS, choice(prompt_token_ids=[1]), "has read other prompt tokens"),
    "other_model": (COMPLETIONS, choice(model="else"), "had 'else' write in place of"),
    "other_vocabulary": (COMPLETIONS, choice(token_ids=[5] * 5 + [304]), "wrote token 304, and model.policy has 304"),
    "other_end": (COMPLETIONS, choice(finish_reason="stop"), "ended a completion with token 5"),
    "cut_short": (
        COMPLETIONS,
        choice(token_ids=[5], logprobs={"token_logprobs": [-1.0]}),
        "cut a completion after 1 tokens",
    ),
    "no_adapters": (
        "/v1/load_lora_adapter",
        lambda request: request.answer(404, {"detail": "Not Found"}),
        "--enable-l",
    ),
    "high_rank": ("/v1/load_lora_adapter", lambda request: request.answer(500, {"error": "rank"}), "--max-lora-rank"),
    "no_version": ("/version", lambda request: request.answer(200, {"x": 1}), "has no version"),
    "version_no_json": ("/version", lambda request: request.answer(200, "<html>"), "is not JSON"),
    "version_missing": ("/version", lambda request: request.answer(404, {}), "/version answered 404"),
    "version_hangs": (
        "/version",
        lambda request: request.server.release.wait(30),
        "has not answered in full after 0.3",
    ),
    "no_models": ("/v1/models", lambda request: request.answer(200, {"data": 3}), "has no list of models"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_server_is_one_clear_error_within_bounded_time(
    serve_vllm: Serve, engine: Engine, policy: Any, failure: str
) -> None:
    path, act, message = FAILURES[failure]
    server = serve_vllm()
    server.misbehave = broken(path, act)
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        both(begun(engine(server, timeout=0.3), policy))
    assert time.monotonic() - begin < 10
    assert message in str(caught.value)
    assert "model.rollout" in str(caught.value)
    assert "model.reward" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_server_that_is_not_there_is_one_clear_error(engine: Engine, serve_vllm: Serve) -> None:
    server = serve_vllm()
    rollout = engine(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"model\.rollout\.init_args\.url: .*/version could not be reached.*2 times"):
        rollout.context_length()


def test_passing_failures_are_tried_again(serve_vllm: Serve, engine: Engine, policy: Any) -> None:
    calm, shaky = serve_vllm(), serve_vllm()

    def every_third_fails(request: Handler, number: int) -> bool:
        if request.path == "/v1/load_lora_adapter" and number == 1:  # The answer is lost; the adapter is there.
            request.server.load(request.server.asked(request.path)[0])
            request.hang_up()
            return True
        if request.path == COMPLETIONS and number % 3 == 0:
            request.answer(503, "busy")
            return True
        return False

    shaky.misbehave = every_third_fails
    expected = both(begun(engine(calm), policy))
    given = both(begun(engine(shaky, retries=8), policy))
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(expected, given, strict=True))


@pytest.mark.timeout(60)
def test_server_that_is_started_anew_is_brought_up_to_date(serve_vllm: Serve, engine: Engine, policy: Any) -> None:
    """It has lost the adapter of a policy that has not changed since; while it is down it answers nobody."""
    server = serve_vllm()
    rollout = begun(engine(server), policy)
    before = both(rollout)
    server.adapters.clear()
    rollout.sync(policy)
    again = both(rollout)
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(before, again, strict=True))
    (name,) = server.adapters
    assert [load["lora_name"] for load in server.asked("/v1/load_lora_adapter")[-2:]] == [name] * 2
    server.adapters.clear()
    server.version = "0.12.0"
    with pytest.raises(InputError, match=r"the server runs vLLM '0\.12\.0'"):
        both(rollout)


@pytest.mark.timeout(60)
def test_redirect_of_a_hostile_server_is_not_read(serve_vllm: Serve, engine: Engine) -> None:
    server, sent = serve_vllm(), [0]

    def redirect(request: Handler, number: int) -> bool:
        request.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 1073741824\r\n\r\n")
        try:
            while sent[0] < 2**30:
                sent[0] += request.wfile.write(bytes(2**20))
        except OSError:
            request.close_connection = True
        return True

    server.misbehave = redirect
    with pytest.raises(InputError, match=r"/version answered 302, a redirect to 'http://elsewhere/', and"):
        begun(engine(server)).context_length()
    assert sent[0] < 2**26


def test_run_that_is_asked_to_stop_does_not_wait_for_the_server(serve_vllm: Serve, engine: Engine, policy: Any) -> None:
    server = serve_vllm()
    rollout = begun(engine(server), policy)
    server.misbehave = broken(COMPLETIONS, lambda request: request.server.release.wait(30))

    def stop() -> None:
        raise KeyboardInterrupt

    rollout.set_check(stop)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        both(rollout)
    assert time.monotonic() - begin < 5


def test_key_is_sent_and_never_shown(
    serve_vllm: Serve, engine: Engine, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_VLLM_KEY", "sk-secret")
    server = serve_vllm()
    keys = set()

    def note(request: Handler, number: int) -> bool:
        keys.add(request.key)
        if request.path == COMPLETIONS:
            request.answer(400, {"error": "no sk-secret here"})
        return request.path == COMPLETIONS

    server.misbehave = note
    with pytest.raises(InputError) as caught:
        both(begun(engine(server, api_key_env="TEST_VLLM_KEY"), policy))
    assert keys == {"Bearer sk-secret"}
    assert "secret" not in str(caught.value)
