"""A policy that is sent to a vLLM server with all of its weights, against a stand-in that speaks vLLM's protocol."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder, fit_quietly, longer_is_better, make_tokenizer, noise, prompts_of, random_rows
from transformers import AutoModelForCausalLM
from vllm_rollouts import real_server, worst_gap
from vllm_stand_in import Handler, StandIn, standing_in

from xpo_lightning import (
    InputError,
    LoRASpec,
    ModelSpec,
    PolicySampler,
    PythonReward,
    ReferenceRefresh,
    Sampling,
    VLLMRollout,
    XPOLightningModule,
)
from xpo_lightning.core.owner import this_process
from xpo_lightning.rollout.engine import GenerationRequest
from xpo_lightning.rollout.local import LocalRollout

MakeModule = Callable[..., XPOLightningModule]
Serve = Callable[..., StandIn]
Engine = Callable[..., VLLMRollout]
QUICK: dict[str, Any] = {"retries": 2, "backoff": 0.01, "timeout": 20.0}
ROWS = random_rows([3, 5, 2, 5])
COMPLETIONS = "/v1/completions"


@pytest.fixture
def serve(model_folder: Callable[..., str]) -> Iterator[Serve]:
    """Give a function that starts a stand-in in vLLM's mode for developers."""
    with ExitStack() as servers:
        yield lambda **options: servers.enter_context(standing_in(model_folder("llama"), **{"dev": True, **options}))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Give a function that makes an engine for a server, with all weights."""
    return lambda server, **options: VLLMRollout(
        server.url, **{**QUICK, "weights": "full", "weights_folder": str(tmp_path / "weights"), **options}
    )


@pytest.fixture
def policy(load_model: Callable[..., Any]) -> Any:
    model = load_model("llama")
    change(model)
    return model


def change(model: Any) -> None:
    """Add noise to all weights."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))


def begun(rollout: VLLMRollout, policy: Any) -> VLLMRollout:
    rollout.begin(LocalRollout(make_tokenizer(), Sampling(max_new_tokens=6), [2]))
    rollout.sync(policy)
    return rollout


def written(rollout: VLLMRollout, *who: str) -> list[Any]:
    """Have a completion a side written."""
    asked = [GenerationRequest(one, [noise(number).uniforms(len(ROWS), 6)]) for number, one in enumerate(who)]
    return [side[0] for side in rollout.write(prompts_of(ROWS), asked)]


def test_server_writes_with_all_weights_of_the_policy_and_follows_them(
    serve: Serve, engine: Engine, policy: Any, load_model: Any, tmp_path: Path
) -> None:
    server, other = serve(), serve(dev=False)
    rollout = begun(engine(server, reference_url=other.url), policy)
    by_policy, by_reference = written(rollout, "policy", "reference")
    assert worst_gap(policy, by_policy) < 1e-4
    assert worst_gap(load_model("llama"), by_reference) < 1e-4
    assert worst_gap(policy, by_reference) > 0.1
    loads = len(server.asked("/collective_rpc"))
    rollout.sync(policy)
    assert len(server.asked("/collective_rpc")) == loads  # Nothing had changed.
    with torch.no_grad():
        policy.lm_head.weight[3, 3] += 0.5  # One number of one weight alone.
    rollout.sync(policy)
    assert len(server.asked("/collective_rpc")) == loads + 1
    change(policy)
    rollout.sync(policy)
    assert worst_gap(policy, written(rollout, "policy")[0]) < 1e-4  # of the same prompts, which it computes anew
    (folder,) = (tmp_path / "weights").iterdir()  # The one before is gone.
    assert (folder / "model.safetensors").exists()
    rollout.close()
    assert not list((tmp_path / "weights").iterdir())
    assert {path for path, _ in other.seen} == {"/version", "/v1/models", COMPLETIONS}


@pytest.mark.parametrize("kept", [("proj",), ("embed_tokens",), ("norm",), ("lm_head",), ("mlp.down_proj",)])
def test_server_that_takes_over_a_part_is_refused_before_it_writes(
    serve: Serve, engine: Engine, policy: Any, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    server = serve(kept=kept)
    with pytest.raises(InputError, match=r"weights=full: .* nats a token .* taken over only a part") as refused:
        begun(engine(server), policy)
    assert server.url in str(refused.value)
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())
    assert not list((tmp_path / "weights").iterdir())


def test_policy_is_as_it_was_after_the_trial(serve: Serve, engine: Engine, policy: Any) -> None:
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    begun(engine(serve()), policy)
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())


@pytest.mark.parametrize(("path", "number"), [("/weight_info", 1), (COMPLETIONS, 2), ("/weight_info", 2)])
def test_server_that_is_started_anew_gets_the_weights_and_the_batch_again(
    serve: Serve, engine: Engine, policy: Any, path: str, number: int
) -> None:
    """It dies before a batch, in the middle of one, or after it but before it is asked for the version."""
    server = serve()
    rollout = begun(engine(server), policy)
    (expected,) = written(rollout, "policy")
    server.seen.clear()

    def start_anew(request: Handler, count: int) -> bool:
        if (request.path, count) != (path, number):
            return False
        server.start_anew()
        request.hang_up()
        return True

    server.misbehave = start_anew
    (again,) = written(rollout, "policy")
    assert len(server.asked("/collective_rpc")) == 1
    assert torch.equal(expected.ids, again.ids)
    assert worst_gap(policy, again) < 1e-4


def test_passing_failures_are_tried_again(serve: Serve, engine: Engine, policy: Any) -> None:
    server = serve()
    failed = set()

    def once(request: Handler, number: int) -> bool:
        if request.path in failed or request.path == "/version":
            return False
        failed.add(request.path)
        if request.path == "/reset_prefix_cache":
            request.answer(200, {"success": False})  # Requests of others hold parts of it.
        else:
            request.answer(503, "busy")
        return True

    server.misbehave = once
    assert worst_gap(policy, written(begun(engine(server), policy), "policy")[0]) < 1e-4
    assert {"/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/weight_info"} <= failed


def test_server_without_the_endpoints_is_one_clear_error(
    serve: Serve, engine: Engine, policy: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"/collective_rpc answered 404 .*VLLM_SERVER_DEV_MODE=1") as refused:
        begun(engine(serve(dev=False)), policy)
    assert "model.rollout.init_args" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "weights").iterdir())


def test_weights_that_a_killed_run_left_are_removed(serve: Serve, engine: Engine, policy: Any, tmp_path: Path) -> None:
    mine = this_process()
    gone = tmp_path / "weights" / f"xpo-weights-00.{mine.host}-{2**22 + 1}-5"
    alive = tmp_path / "weights" / f"xpo-weights-01.{mine}"
    for folder in (gone, alive, tmp_path / "weights" / "other"):
        folder.mkdir(parents=True)
    begun(engine(serve()), policy)
    assert not gone.exists()
    assert alive.exists()
    assert (tmp_path / "weights" / "other").exists()


def test_error_of_the_references_server_names_its_own_option(serve: Serve, engine: Engine, policy: Any) -> None:
    server, other = serve(), serve(dev=False)
    rollout = begun(engine(server, reference_url=other.url), policy)

    def refuse(request: Handler, number: int) -> bool:
        request.answer(400, "no")
        return True

    other.misbehave = refuse
    with pytest.raises(InputError, match=rf"^model\.rollout\.init_args\.reference_url: {other.url}.* answered 400"):
        written(rollout, "policy", "reference")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "adapter_folder is not set"),
        ({"adapter_folder": "a", "weights_folder": "w"}, "weights_folder is for .*weights=full"),
        ({"adapter_folder": "a", "reference_url": "http://h"}, "reference_url is for .*weights=full"),
        ({"weights": "full", "adapter_folder": "a"}, "adapter_folder is for .*weights=adapter"),
        ({"weights": "full", "weights_folder": " "}, "weights_folder is empty"),
        ({"weights": "full", "weights_folder": __file__}, "weights_folder must be a folder"),
        ({"weights": "full", "reference_url": "ftp://h"}, "reference_url must start with http"),
        ({"weights": "full", "reference_url": "http://localhost:8000/"}, "reference_url is http://local"),
    ],
)
def test_options_of_the_other_way_are_refused_by_their_key(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.rollout\.init_args\.{said}"):
        VLLMRollout("http://localhost:8000", **options)


def test_adapters_and_all_weights_exclude_each_other(make_module: MakeModule) -> None:
    def full() -> VLLMRollout:
        return VLLMRollout("http://localhost:8000", weights="full")

    with pytest.raises(InputError, match=r"weights: full.* model\.lora .*weights to adapter"):
        make_module(rollout=full(), lora=LoRASpec(r=4))
    make_module(rollout=full())


def trained(module: XPOLightningModule, steps: int) -> Recorder:
    recorder = Recorder()
    prompts = ["the cat", "a dog ran away from the hat and", "red", "on the mat today", "sat"] * 2 * steps
    fit_quietly(module, prompts, batch_size=10, callbacks=[recorder], max_steps=steps)
    return recorder


@pytest.mark.parametrize("sampler", [None, PolicySampler()])
@pytest.mark.parametrize("is_served", [True, False])
def test_training_checks_the_server_after_each_step(
    serve: Serve, engine: Engine, make_module: MakeModule, is_served: bool, sampler: Any
) -> None:
    server, other = serve(), serve(dev=False)
    rollout = engine(server, reference_url=other.url if is_served else None)
    module = make_module(rollout=rollout, learning_rate=1e-2, sampler=sampler, rollout_batch_size=4)
    recorder = trained(module, steps=3)
    assert max(recorder.of("rollout/policy_logp_drift")) < 1e-4
    by_reference = len(other.asked(COMPLETIONS))
    assert by_reference == (30 if is_served and sampler is None else 0)
    assert ("rollout/logp_drift" in recorder.steps[-1]) is bool(by_reference)
    assert abs(recorder.of("objective/kl")[-1]) > 1e-3
    assert len(server.asked("/collective_rpc")) == 1 + 3  # The first was a trial.


def test_reference_that_writes_here_may_be_kept_or_follow_the_policy(
    serve: Serve, engine: Engine, make_module: MakeModule
) -> None:
    cached = make_module(rollout=engine(serve()), learning_rate=1e-2, reference_cache="memory")
    prompts = ["the cat", "a dog ran", "red", "on the mat"]
    fit_quietly(cached, prompts, batch_size=4, callbacks=[first := Recorder()], max_epochs=2)
    fit_quietly(
        make_module(rollout=engine(serve()), learning_rate=1e-2), prompts, batch_size=4, callbacks=[anew := Recorder()]
    )
    lengths = first.of("completions/ref_length")
    assert lengths[0] == lengths[1] == anew.of("completions/ref_length")[0]
    refreshed = make_module(rollout=engine(serve()), learning_rate=1e-2, reference_refresh=ReferenceRefresh(1))
    fit_quietly(refreshed, prompts, batch_size=4, callbacks=[kept := Recorder()], max_epochs=2)
    assert abs(kept.of("objective/kl")[1]) < 1e-3 < abs(first.of("objective/kl")[1])
    for options in ({"reference_cache": "memory"}, {"reference_refresh": ReferenceRefresh(1)}):
        with pytest.raises(InputError, match=r"model\.rollout=VLLMRollout"):
            make_module(rollout=engine(serve(), reference_url="http://localhost:1"), **options)


def test_server_that_forgets_a_part_later_ends_the_run(serve: Serve, engine: Engine, make_module: MakeModule) -> None:
    server = serve()

    def forget(request: Handler, number: int) -> bool:
        if request.path == "/collective_rpc" and number == 3:
            server.kept = ("proj",)
        return False

    server.misbehave = forget
    module = make_module(rollout=engine(server), learning_rate=1.0)
    with pytest.raises(InputError, match=r"of the policy's completions differ by"):
        trained(module, steps=3)
    assert module.global_step == 1


# --- a real server


@pytest.mark.vllm
@pytest.mark.parametrize("options", [(), ("--enforce-eager",)])
def test_real_server_takes_over_all_weights(tmp_path: Path, options: tuple[str, ...]) -> None:
    with real_server(tmp_path, *options, VLLM_SERVER_DEV_MODE="1") as (url, folder):
        rollout = VLLMRollout(url, weights="full", weights_folder=str(tmp_path / "weights"), retries=0)
        policy = AutoModelForCausalLM.from_pretrained(folder).eval()
        change(policy)
        assert worst_gap(policy, written(begun(rollout, policy), "policy")[0]) < 1e-4
        rollout.close()
        options: dict[str, Any] = {"sampling": Sampling(max_new_tokens=12), "learning_rate": 1e-2}
        module = XPOLightningModule(ModelSpec(folder), PythonReward(longer_is_better), rollout=rollout, **options)
        recorder = trained(module, steps=10)
        assert max(recorder.of("rollout/policy_logp_drift")) < 1e-4
        assert recorder.of("objective/kl")[-1] > 0.1


@pytest.mark.vllm
def test_real_server_on_a_cpu_with_tied_embeddings_is_refused(tmp_path: Path) -> None:
    """It packs the weights of the vocabulary head when it starts, and loads no others for it."""
    with real_server(tmp_path, tied=True, VLLM_SERVER_DEV_MODE="1") as (url, folder):
        rollout = VLLMRollout(url, weights="full", weights_folder=str(tmp_path / "weights"), retries=0)
        with pytest.raises(InputError, match="taken over only a part"):
            begun(rollout, AutoModelForCausalLM.from_pretrained(folder).eval())
