"""Completions by a vLLM server: against a stand-in that speaks its protocol, and against a real one where there is one.

The test against a real one is marked `vllm` and runs only if asked for (`-m vllm`); XPO_VLLM_PYTHON names the
interpreter that has vLLM.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml
from conftest import (
    BARE,
    CONFIGS,
    GROUPED,
    PROMPTS,
    TEST_PATHS,
    Recorder,
    fit_quietly,
    longer_is_better,
    make_tokenizer,
    naive_token_logps,
    noise,
    prompts_of,
    quiet_trainer,
    random_rows,
    randomize_adapters,
)
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm_stand_in import Handler, StandIn, standing_in

from xpo_lightning import (
    Candidates,
    InputError,
    LoRASpec,
    ModelSpec,
    PolicySampler,
    PreviousPolicySampler,
    PythonReward,
    PythonSampler,
    ReferenceRefresh,
    Sampling,
    VLLMRollout,
    XPOLightningModule,
)
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.rollout.engine import GenerationRequest
from xpo_lightning.rollout.local import LocalRollout

MakeModule = Callable[..., XPOLightningModule]
Serve = Callable[..., StandIn]
QUICK: dict[str, Any] = {"retries": 1, "backoff": 0.01, "timeout": 20.0, "together": False}
LORA = LoRASpec(r=4, alpha=8)
ROWS = random_rows([3, 5, 2, 5])


@pytest.fixture
def serve(model_folder: Callable[..., str]) -> Iterator[Serve]:
    """Give a function that starts a stand-in."""
    with ExitStack() as servers:
        yield lambda folder=None, **options: servers.enter_context(
            standing_in(folder or model_folder("llama"), **options)
        )


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., VLLMRollout]:
    """Give a function that makes an engine for a server."""
    return lambda server, **options: VLLMRollout(server.url, str(tmp_path / "adapters"), **{**QUICK, **options})


@pytest.fixture
def policy(load_model: Callable[..., Any]) -> Any:
    wrapped = LORA.wrap(load_model("llama")).eval()
    randomize_adapters(wrapped)
    return wrapped


Engine = Callable[..., VLLMRollout]


def begun(rollout: VLLMRollout, policy: Any = None, eos: list[int] | None = None, **sampling: Any) -> VLLMRollout:
    """Begin, and bring the policy where there is one."""
    settings = Sampling(**{"max_new_tokens": 6, **sampling})
    tokenizer = make_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids("<eos>")] if eos is None else eos
    rollout.begin(LocalRollout(tokenizer, settings, ends))
    if policy is not None:
        rollout.sync(policy)
    return rollout


def uniforms(seed: int = 0, rows: int = len(ROWS)) -> torch.Tensor:
    return noise(seed).uniforms(rows, 6)


def both(rollout: VLLMRollout) -> list[Any]:
    """Have a completion a side written."""
    asked = [GenerationRequest("policy", [uniforms(0)]), GenerationRequest("reference", [uniforms(1)])]
    return [side[0] for side in rollout.write(prompts_of(ROWS), asked)]


def worst_gap(model: Any, completions: Any) -> float:
    """Compare token log-probabilities with those of a plain forward of each row alone."""
    gaps = [0.0]
    for row, ids, mask, logps in zip(ROWS, completions.ids, completions.mask, completions.token_logps, strict=True):
        expected = naive_token_logps(model, row, ids[mask].tolist())
        gaps += [abs(own - other) for own, other in zip(expected, logps[mask].tolist(), strict=True)]
    return max(gaps)


# --- what is asked, and what comes back


def test_request_has_every_setting_so_that_the_server_fills_no_gap(serve: Serve, engine: Engine) -> None:
    server = serve()
    sampling = {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "stop_strings": ["ab"]}
    rollout = begun(engine(server), eos=[7, 9], **sampling)
    rollout._vocabulary = 304
    rollout.write(prompts_of([[3, 4, 5]]), [GenerationRequest("reference", [torch.tensor([[0.25] + [0.9] * 5])])])
    assert server.asked("/v1/completions") == [
        {
            "model": server.folder,
            "prompt": [3, 4, 5],
            "seed": 2**30,  # a quarter of 2**32
            "max_tokens": 6,
            "min_tokens": 0,
            "temperature": 0.7,
            "top_k": 5,
            "top_p": 1.0,
            "min_p": 0.1,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": ["ab"],
            "stop_token_ids": [7, 9],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "watermarking": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
    ]


def test_token_ids_come_back_as_they_were_written(serve: Serve, engine: Engine, policy: Any) -> None:
    server = serve()
    rollout = begun(engine(server), policy)
    written = both(rollout)
    asked = server.asked("/v1/completions")
    assert sorted(payload["prompt"] for payload in asked) == sorted(ROWS + ROWS)
    tokenizer = make_tokenizer()
    changed = 0
    for completions in written:
        for ids, mask, text in zip(completions.ids, completions.mask, completions.texts, strict=True):
            row = ids[mask].tolist()
            assert text == tokenizer.decode(row, skip_special_tokens=True)
            changed += tokenizer(text, add_special_tokens=False)["input_ids"] != row
        assert completions.lengths.tolist() == [6] * len(ROWS)
        assert not completions.ended.any()
    assert changed > 0  # Tokenizing the texts anew would have given other ids.


def test_each_side_is_written_by_its_own_weights(serve: Serve, engine: Engine, policy: Any) -> None:
    rollout = begun(engine(serve()), policy)
    by_policy, by_reference = both(rollout)
    assert worst_gap(policy, by_policy) < 1e-4
    with policy.disable_adapter():
        assert worst_gap(policy, by_reference) < 1e-4
        assert worst_gap(policy, by_policy) > 0.1


def test_server_follows_the_policy_when_it_changes(serve: Serve, engine: Engine, policy: Any, tmp_path: Path) -> None:
    server = serve()
    rollout = begun(engine(server), policy)
    rollout.sync(policy)
    assert len(server.asked("/v1/load_lora_adapter")) == 1  # Nothing had changed.
    first = both(rollout)
    with torch.no_grad():  # The last of its numbers alone.
        [weight for name, weight in policy.named_parameters() if "lora_B" in name][-1].view(-1)[-1] += 3
    rollout.sync(policy)
    second = both(rollout)
    assert worst_gap(policy, second[0]) < 1e-4
    assert worst_gap(policy, first[0]) > 1e-3
    assert torch.equal(first[1].ids, second[1].ids)
    names = [load["lora_name"] for load in server.asked("/v1/load_lora_adapter")]
    assert len(set(names)) == 2
    assert list(server.adapters) == names[1:]
    assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == names[1:]
    rollout.close()
    assert not server.adapters
    assert not list((tmp_path / "adapters").iterdir())


def test_asking_again_gives_the_same_samples_and_no_row_depends_on_those_beside(
    serve: Serve, engine: Engine, policy: Any
) -> None:
    rollout = begun(engine(serve()), policy)
    first, again = both(rollout), both(rollout)
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(first, again, strict=True))
    (alone,) = rollout.write(prompts_of(ROWS[2:3]), [GenerationRequest("policy", [uniforms(0)[2:3]])])
    assert torch.equal(alone[0].ids, first[0].select([2]).ids)
    (other,) = rollout.write(prompts_of(ROWS), [GenerationRequest("policy", [uniforms(5)])])
    assert not torch.equal(other[0].ids, first[0].ids)


def test_completion_ends_at_eos_or_at_a_stop_string(serve: Serve, engine: Engine, load_model: Any) -> None:
    rollout = begun(engine(serve()))
    rollout._vocabulary = 304
    (whole,) = rollout.write(prompts_of(ROWS), [GenerationRequest("reference", [uniforms()])])
    eos = int(whole[0].ids[0, 2])
    (ended,) = begun(rollout, eos=[eos]).write(prompts_of(ROWS), [GenerationRequest("reference", [uniforms()])])
    cut = whole[0].ids[0].tolist().index(eos) + 1
    assert ended[0].ids[0][ended[0].mask[0]].tolist() == whole[0].ids[0, :cut].tolist()
    assert bool(ended[0].ended[0])
    tokenizer = make_tokenizer()
    kept = whole[0].ids[1].tolist()
    stop = tokenizer.decode(kept[3:5])
    (stopped,) = begun(rollout, stop_strings=[stop]).write(
        prompts_of(ROWS), [GenerationRequest("reference", [uniforms()])]
    )
    assert bool(stopped[0].ended[1])
    assert stopped[0].texts[1] == tokenizer.decode(kept, skip_special_tokens=True).partition(stop)[0]
    assert stop in tokenizer.decode(stopped[0].ids[1][stopped[0].mask[1]])


@pytest.mark.parametrize("together", [True, False])
def test_models_write_together_or_one_after_the_other(
    serve: Serve, engine: Engine, policy: Any, together: bool
) -> None:
    server = serve()
    both(begun(engine(server, together=together), policy))
    assert any(len(names) == 2 for names in server.together) is together


# --- what is refused


@pytest.mark.parametrize(
    ("sampling", "keys"),
    [
        ({"temperature": 0.005}, ["model.sampling.temperature=0.005", "model.rollout"]),
        ({"min_p": 0.1, "top_p": 0.9}, ["model.sampling.min_p=0.1", "model.sampling.top_p=0.9", "model.rollout"]),
    ],
)
def test_sampling_that_vllm_would_do_otherwise_is_refused(
    serve: Serve, engine: Engine, sampling: dict[str, Any], keys: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        begun(engine(serve()), **sampling)
    assert all(key in str(refused.value) for key in keys)
    begun(engine(serve()), **{**sampling, "temperature": 0.0})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"url": "ftp://x"}, "url"),
        ({"url": "http://x?a=1"}, "url"),
        ({"adapter_folder": " "}, "adapter_folder"),
        ({"adapter_folder": __file__}, "adapter_folder"),
        ({"api_key_env": "sk-123"}, "api_key_env"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"backoff": float("nan")}, "backoff"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_logp_drift": 0.0}, "max_logp_drift"),
        ({"max_logp_drift": float("nan")}, "max_logp_drift"),
    ],
)
def test_option_of_no_use_is_refused_by_its_key(options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.rollout\.init_args\.{key} "):
        VLLMRollout(**{"url": "http://localhost:8000", "adapter_folder": "adapters", **options})


REFUSED: dict[str, dict[str, Any]] = {
    "model.lora": {"lora": None},
    "model.reference_cache": {"reference_cache": "memory"},
    "model.reference_refresh": {"reference_refresh": ReferenceRefresh(1)},
    "model.sampler=PreviousPolicySampler": {"sampler": PreviousPolicySampler()},
}


@pytest.mark.parametrize("key", REFUSED)
def test_option_that_does_not_go_with_an_engine_is_refused_with_both_keys(make_module: MakeModule, key: str) -> None:
    rollout = VLLMRollout("http://localhost:8000", "adapters")
    with pytest.raises(InputError) as refused:
        make_module(**{"rollout": rollout, "lora": LORA, **REFUSED[key]})
    assert key in str(refused.value)
    assert "model.rollout=VLLMRollout" in str(refused.value)
    make_module(**{"lora": LORA, **REFUSED[key]})
    make_module(rollout=rollout, lora=LORA)


@pytest.mark.parametrize(
    ("version", "usable"),
    [("0.27.9", False), ("0.28.0", True), ("0.33.1.dev4+g1234", True), ("1.0.0", False), ("0.9.2", False)],
)
def test_server_of_another_version_is_refused(serve: Serve, engine: Engine, version: str, usable: bool) -> None:
    rollout = engine(serve(version=version))
    if usable:
        assert rollout.context_length() == 64
        return
    with pytest.raises(InputError, match=rf"vLLM '{version}', and VLLMRollout knows 0\.28 to 0\.99"):
        rollout.context_length()


def test_base_model_must_be_one_that_the_server_has(serve: Serve, engine: Engine) -> None:
    server = serve()
    with pytest.raises(InputError) as refused:
        engine(server, model="other").context_length()
    assert "model.rollout.init_args.model names 'other'" in str(refused.value)
    assert server.folder in str(refused.value)
    assert engine(server, model=server.folder).context_length() == 64


def test_prompts_must_fit_the_server_too(serve: Serve, engine: Engine, make_module: MakeModule) -> None:
    module = make_module(rollout=engine(serve(context=20)), lora=LORA)
    assert module.prompt_encoder.limit == 14
    with pytest.raises(InputError, match=r"max_new_tokens=6 leaves no room .* context of 6 tokens"):
        _ = make_module(rollout=engine(serve(context=6)), lora=LORA).prompt_encoder


# --- servers that fail


def broken(path: str, act: Callable[[Handler], Any], after: int = 0) -> Callable[[Handler, int], bool]:
    """Misbehave at a path, from some request on."""

    def misbehave(request: Handler, number: int) -> bool:
        if request.path != path or number <= after:
            return False
        act(request)
        return True

    return misbehave


def choice(**changes: Any) -> Callable[[Handler], None]:
    """Answer with a completion of one token that is odd in some way."""

    def answer(request: Handler) -> None:
        payload = request.server.asked("/v1/completions")[-1]
        logprobs = {"token_logprobs": [-1.0] * 6}
        right = {"token_ids": [5] * 6, "prompt_token_ids": payload["prompt"], "logprobs": logprobs}
        odd = {**right, "finish_reason": "length", **changes}
        request.answer(200, {"model": changes.get("model", payload["model"]), "choices": [odd]})

    return answer


COMPLETIONS = "/v1/completions"
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
    serve: Serve, engine: Engine, policy: Any, failure: str
) -> None:
    path, act, message = FAILURES[failure]
    server = serve()
    server.misbehave = broken(path, act)
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        both(begun(engine(server, timeout=0.3), policy))
    assert time.monotonic() - begin < 10
    assert message in str(caught.value)
    assert "model.rollout" in str(caught.value)
    assert "model.reward" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_server_that_is_not_there_is_one_clear_error(engine: Engine, serve: Serve) -> None:
    server = serve()
    rollout = engine(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"model\.rollout\.init_args\.url: .*/version could not be reached.*2 times"):
        rollout.context_length()


def test_passing_failures_are_tried_again(serve: Serve, engine: Engine, policy: Any) -> None:
    calm, shaky = serve(), serve()

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
def test_server_that_is_started_anew_is_brought_up_to_date(serve: Serve, engine: Engine, policy: Any) -> None:
    """It has lost the adapter of a policy that has not changed since; while it is down it answers nobody."""
    server = serve()
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
def test_redirect_of_a_hostile_server_is_not_read(serve: Serve, engine: Engine) -> None:
    server, sent = serve(), [0]

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


def test_run_that_is_asked_to_stop_does_not_wait_for_the_server(serve: Serve, engine: Engine, policy: Any) -> None:
    server = serve()
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
    serve: Serve, engine: Engine, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_VLLM_KEY", "sk-secret")
    server = serve()
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


# --- training


def trained(module: XPOLightningModule, steps: int, **options: Any) -> Recorder:
    recorder = Recorder()
    fit_quietly(module, PROMPTS * 8 * steps, batch_size=40, callbacks=[recorder], max_steps=steps, **options)
    return recorder


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score a completion by how much of it is letters."""
    return [sum(char.isascii() and char.isalpha() for char in text) / (len(text) + 1) for text in completions]


@pytest.mark.slow
def test_training_gains_as_much_as_with_local_rollouts(serve: Serve, engine: Engine, make_module: MakeModule) -> None:
    options: dict[str, Any] = {"lora": LoRASpec(r=8, alpha=32), "learning_rate": 4e-2, "beta": 0.02}
    options |= {"reward": PythonReward(letters), "sampling": Sampling(max_new_tokens=4)}
    server = serve()
    for rollout in (None, engine(server, together=True)):
        recorder = Recorder()
        module = make_module(rollout=rollout, **options)
        fit_quietly(module, ["the cat"] * 64 * 14, batch_size=64, callbacks=[recorder], max_steps=14)
        wins, margins = recorder.of("win_rate"), recorder.of("objective/scores_margin")
        assert abs(margins[0]) < 0.15  # the policy is the reference
        assert sum(wins[-4:]) / 4 > 0.9
        assert sum(margins[-4:]) / 4 > 0.4
        assert torch.tensor(recorder.of("loss/total")).isfinite().all()
    drifts = recorder.of("rollout/logp_drift") + recorder.of("rollout/policy_logp_drift")
    assert 0 < max(drifts) < 1e-4
    assert len(server.asked("/v1/load_lora_adapter")) == 1 + 14  # The first was to see whether it keeps them apart.
    assert not server.adapters  # It has been told that the run is over.


@pytest.mark.parametrize("sampler", [PolicySampler(), PythonSampler(lambda prompts, columns: ["cat"] * len(prompts))])
def test_second_completion_may_be_by_somebody_else(
    serve: Serve, engine: Engine, make_module: MakeModule, sampler: Any
) -> None:
    server = serve()
    recorder = trained(make_module(rollout=engine(server), lora=LORA, sampler=sampler), steps=2)
    assert {payload["model"] for payload in server.asked(COMPLETIONS)}.isdisjoint({server.folder})
    assert max(recorder.of("rollout/policy_logp_drift")) < 1e-4
    assert "rollout/logp_drift" not in recorder.steps[-1]


def test_several_candidates_a_side_are_written_at_once(serve: Serve, engine: Engine, make_module: MakeModule) -> None:
    server = serve()
    trained(make_module(rollout=engine(server), lora=LORA, candidates=Candidates(3, "best_of_each")), steps=1)
    seeds = [payload["seed"] for payload in server.asked(COMPLETIONS)]
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 40


def test_reference_scores_are_computed_here(
    serve: Serve, engine: Engine, make_module: MakeModule, load_model: Any
) -> None:
    module = make_module(rollout=engine(serve()), lora=LORA)
    (experience,) = quiet_trainer().predict(module, torch.utils.data.DataLoader([PROMPTS], batch_size=None))
    model = load_model("llama")
    for side, logps in (
        (experience.completions.by_policy, experience.reference_logps.by_policy),
        (experience.completions.by_sampler, experience.reference_logps.by_sampler),
    ):
        for row, total in enumerate(logps.tolist()):
            prompt = experience.prompts.ids[row][experience.prompts.mask[row]].tolist()
            expected = naive_token_logps(model, prompt, side.ids[row][side.mask[row]].tolist())
            assert total == pytest.approx(sum(expected), abs=1e-4)


@pytest.fixture
def other_folder(tmp_path: Path) -> str:
    """Save a model of the same shape with other weights."""
    torch.manual_seed(99)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_server_with_another_base_model_ends_the_run(
    serve: Serve, engine: Engine, make_module: MakeModule, other_folder: str
) -> None:
    server = serve(other_folder)
    module = make_module(rollout=engine(server), lora=LORA)
    with pytest.raises(InputError) as caught:
        trained(module, steps=1)
    assert "of the reference's completions differ by" in str(caught.value)
    assert "model.rollout.init_args.max_logp_drift=0.5" in str(caught.value)
    assert other_folder in str(caught.value)
    assert module.global_step == 0
    unlimited = make_module(rollout=engine(server, max_logp_drift=None), lora=LORA)
    assert trained(unlimited, steps=1).of("rollout/logp_drift")[0] > 0.5


def test_server_that_lost_the_adapter_ends_the_run(serve: Serve, engine: Engine, make_module: MakeModule) -> None:
    server = serve()
    module = make_module(rollout=engine(server), lora=LORA)
    module.configure_model()
    randomize_adapters(module.policy)

    def base_instead(request: Handler, number: int) -> bool:
        for name in server.adapters:
            server.adapters[name] = server.base
        return False

    server.misbehave = base_instead
    with pytest.raises(InputError, match=r"of the policy's completions differ by"):
        trained(module, steps=1)


def test_server_that_lets_the_adapter_into_the_reference_is_refused_at_once(
    serve: Serve, engine: Engine, policy: Any, tmp_path: Path
) -> None:
    server = serve(leaks=True)
    with pytest.raises(InputError, match=r"together: .* as vLLM does on a CPU; set .*together to false"):
        begun(engine(server, together=True), policy)
    assert not server.adapters
    assert not list((tmp_path / "adapters").iterdir())
    by_reference = both(begun(engine(server), policy))[1]
    with policy.disable_adapter():
        assert worst_gap(policy, by_reference) < 1e-4


def test_adapter_that_leaks_later_is_found_out_by_the_drift(
    serve: Serve, engine: Engine, make_module: MakeModule
) -> None:
    server = serve()
    module = make_module(rollout=engine(server, together=True), lora=LORA)
    module.configure_model()
    randomize_adapters(module.policy, 1.0)

    def leak(request: Handler, number: int) -> bool:
        if len(server.asked("/v1/load_lora_adapter")) == 2:
            server.base = next(iter(server.adapters.values()), server.base)
        return False

    server.misbehave = leak
    with pytest.raises(InputError, match=r"of the reference's completions differ"):
        trained(module, steps=1)


# --- runs of the command line


@pytest.fixture
def write_config(tmp_path: Path, model_folder: Callable[..., str]) -> Callable[..., str]:
    """Give a function that writes the config of a small run with a server."""

    def write(server: StandIn, together: bool = False, **trainer: Any) -> str:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat sat on the mat"}\n' * 16)
        rollout = {"url": server.url, "adapter_folder": str(tmp_path / "adapters"), **QUICK, "together": together}
        config = {
            "seed_everything": 1,
            "model": {
                "policy": {"path": model_folder("llama")},
                "reward": {"class_path": "PythonReward", "init_args": {"function": "conftest.longer_is_better"}},
                "lora": {"r": 4, "alpha": 8},
                "sampling": {"max_new_tokens": 5},
                "rollout": {"class_path": "VLLMRollout", "init_args": rollout},
                "learning_rate": 1e-3,
            },
            "data": {"source": str(tmp_path / "prompts.jsonl"), "validation_size": 4, "batch_size": 4},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(tmp_path / "runs"),
                "logger": {
                    "class_path": "ResumableCSVLogger",
                    "init_args": {"save_dir": str(tmp_path / "runs"), "name": ""},
                },
                "callbacks": [{"class_path": "RunCheckpoint", "init_args": {"every_n_train_steps": 1}}],
                **trainer,
            },
            "defaults": BARE,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return str(tmp_path / "run.yaml")

    return write


def logged(tmp_path: Path, name: str) -> list[float]:
    import csv

    with (tmp_path / "runs" / "version_0" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_command_line_trains_and_validates_with_a_server(
    serve: Serve, write_config: Callable[..., str], tmp_path: Path
) -> None:
    server = serve()
    main(["fit", "--config", write_config(server)])
    losses = logged(tmp_path, "loss/total")
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert max(logged(tmp_path, "rollout/logp_drift")) < 1e-4
    assert len(logged(tmp_path, "eval/win_rate")) == 1
    assert len(server.asked(COMPLETIONS)) == 2 * (3 * 4 + 4)


def test_server_that_dies_in_a_run_leaves_a_checkpoint_to_go_on_from(
    serve: Serve, write_config: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    config = write_config(server)
    server.misbehave = broken(COMPLETIONS, Handler.hang_up, after=2 * 8 + 3)  # in the third step
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", config])
    assert ended.value.code not in (0, None)
    said = f"{ended.value.code}\n{capsys.readouterr().err}"
    assert "model.rollout.init_args.url" in said
    assert "Traceback" not in said
    assert len(logged(tmp_path, "loss/total")) == 2
    server.misbehave = None
    main(["fit", "--config", config, "--ckpt_path", "last"])
    assert logged(tmp_path, "step") == [1.0, 2.0, 3.0, 3.0]  # the last one is of validation


@pytest.mark.slow
@pytest.mark.parametrize("refusing", [False, True])
def test_two_processes_ask_one_server(
    serve: Serve, write_config: Callable[..., str], tmp_path: Path, refusing: bool
) -> None:
    server = serve()
    if refusing:
        server.misbehave = broken("/v1/load_lora_adapter", lambda request: request.answer(400, "no"), after=2)
    config = write_config(server, together=True, devices=2, strategy="ddp", max_steps=2)
    environment = {**os.environ, "PYTHONPATH": TEST_PATHS, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xpo_lightning", "fit", "--config", config]
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    if refusing:
        assert run.returncode != 0
        assert "--enable-lora" in run.stderr + run.stdout
        assert "Traceback" not in run.stderr
        return
    assert run.returncode == 0, run.stderr
    assert len(server.asked("/v1/load_lora_adapter")) == 1 + 3  # a trial, two steps, and validation of their outcome
    asked = [payload for payload in server.asked(COMPLETIONS) if "watermarking" in payload]
    assert len({payload["seed"] for payload in asked[: 2 * 2 * 8]}) == 2 * 2 * 8


@pytest.mark.slow
def test_two_processes_cannot_take_turns(serve: Serve, write_config: Callable[..., str]) -> None:
    config = write_config(serve(), devices=2, strategy="ddp")
    environment = {**os.environ, "PYTHONPATH": TEST_PATHS, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xpo_lightning", "fit", "--config", config]
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "model.rollout.init_args.together=false has one model write at a time" in run.stderr + run.stdout


# --- a real server


@contextmanager
def real_server(folder: Path, *options: str, tied: bool = False, **switches: str) -> Iterator[tuple[str, str]]:
    """Start a real server on a model that its kernels take; give its address and the model's folder."""
    python = os.environ["XPO_VLLM_PYTHON"]
    model, port = str(folder / "model"), 8765
    torch.manual_seed(1)
    shape = {"hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 128, "initializer_range": 0.12}
    config = LlamaConfig(**{**GROUPED, **shape}, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "128", *options]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | switches
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while server.poll() is None and time.monotonic() < end:
            try:
                if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(1)
        assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
        yield url, model
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture
def vllm_server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    with real_server(tmp_path, "--enable-lora", VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as served:
        yield served


@pytest.mark.vllm
def test_real_server_writes_what_the_stand_in_stands_for(vllm_server: tuple[str, str], tmp_path: Path) -> None:
    url, folder = vllm_server
    policy = LORA.wrap(AutoModelForCausalLM.from_pretrained(folder)).eval()
    randomize_adapters(policy, 0.1)
    with pytest.raises(InputError, match="together to false"):  # until vllm-project/vllm#48421 is in
        begun(VLLMRollout(url, str(tmp_path / "adapters"), retries=0), policy)
    rollout = VLLMRollout(url, str(tmp_path / "adapters"), together=False, retries=0)
    begun(rollout, policy)
    first, again = both(rollout), both(rollout)
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(first, again, strict=True))
    assert worst_gap(policy, first[0]) < 1e-3
    with policy.disable_adapter():
        assert worst_gap(policy, first[1]) < 1e-3
        assert worst_gap(policy, first[0]) > 0.1
    module = XPOLightningModule(
        policy=ModelSpec(folder),
        reward=PythonReward(longer_is_better),
        lora=LORA,
        rollout=rollout,
        sampling=Sampling(max_new_tokens=12, stop_strings=["ed"], temperature=0.9, top_k=200),
        learning_rate=1e-2,
        beta=0.05,
    )
    recorder = trained(module, steps=15)
    assert max(recorder.of("rollout/logp_drift") + recorder.of("rollout/policy_logp_drift")) < 1e-3
    margins = recorder.of("objective/scores_margin")
    assert sum(margins[-5:]) / 5 > 1
