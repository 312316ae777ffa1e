"""Several vLLM servers: requests are spread over them, and go elsewhere while one is down."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Recorder,
    fit_quietly,
    make_tokenizer,
    noise,
    prompts_of,
    quiet_trainer,
    random_rows,
    randomize_adapters,
)
from vllm_rollouts import worst_gap
from vllm_stand_in import Handler, StandIn, standing_in

from xpo_lightning import InputError, LoRASpec, PromptDataModule, Sampling, VLLMRollout, XPOLightningModule
from xpo_lightning.rollout.engine import GenerationRequest
from xpo_lightning.rollout.local import LocalRollout

ROWS = random_rows([3, 5, 2, 5])
COMPLETIONS = "/v1/completions"
QUICK: dict[str, Any] = {"retries": 3, "backoff": 0.01, "timeout": 20.0}
LORA = LoRASpec(r=4, alpha=8)


@pytest.fixture
def serve(model_folder: Callable[..., str]) -> Iterator[Callable[..., list[StandIn]]]:
    """Give a function that starts stand-ins."""
    with ExitStack() as servers:
        yield lambda count, **options: [
            servers.enter_context(standing_in(model_folder("llama"), **options)) for _ in range(count)
        ]


def engine_of(servers: list[StandIn], folder: Path, weights: str = "adapter", **options: Any) -> VLLMRollout:
    places = {"adapter": {"adapter_folder": str(folder)}, "full": {"weights": "full", "weights_folder": str(folder)}}
    return VLLMRollout([server.url for server in servers], **{**QUICK, **places[weights], **options})


def begun(rollout: VLLMRollout, policy: Any) -> VLLMRollout:
    rollout.begin(LocalRollout(make_tokenizer(), Sampling(max_new_tokens=6), [2]))
    rollout.context_length()
    rollout.sync(policy)
    return rollout


def written(rollout: VLLMRollout) -> Any:
    (sides,) = rollout.write(prompts_of(ROWS), [GenerationRequest("policy", [noise().uniforms(len(ROWS), 6)])])
    return sides[0]


def down(request: Handler, number: int) -> bool:
    request.hang_up()
    return True


@pytest.fixture
def policies(load_model: Callable[..., Any]) -> dict[str, Any]:
    """Give a policy for each way of sending it."""
    adapted, whole = LORA.wrap(load_model("llama")).eval(), load_model("llama")
    randomize_adapters(adapted)
    change(whole)
    return {"adapter": adapted, "full": whole}


def change(model: Any) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))


@pytest.mark.parametrize("weights", ["adapter", "full"])
def test_server_that_dies_is_left_out_until_it_answers_again(
    serve: Any, policies: dict[str, Any], tmp_path: Path, weights: str
) -> None:
    servers, policy = serve(3, dev=True), policies[weights]
    rollout = begun(engine_of(servers, tmp_path / "there", weights), policy)
    expected = written(rollout)
    counts = [len([one for one in server.asked(COMPLETIONS) if "watermarking" in one]) for server in servers]
    assert sorted(counts) == [1, 1, 2]

    servers[1].misbehave = down
    with pytest.warns(UserWarning, match=rf"{servers[1].url}.* could not be reached.* the other servers have its"):
        again = written(rollout)
    assert torch.equal(expected.ids, again.ids)
    seen = len(servers[1].seen)
    change(policy)
    rollout.sync(policy)  # The one that is down does not hear of it.
    assert worst_gap(policy, written(rollout)) < 1e-4
    assert {path for path, _ in servers[1].seen[seen:]} == {"/version"}  # It is asked whether it is back, and no more.

    servers[1].misbehave = None
    servers[1].start_anew()
    servers[1].seen.clear()
    with pytest.warns(UserWarning, match=rf"{servers[1].url} answers again"):
        assert worst_gap(policy, written(rollout)) < 1e-4
    assert servers[1].asked(COMPLETIONS)


def test_run_waits_where_none_is_left(serve: Any, policies: dict[str, Any], tmp_path: Path) -> None:
    servers, policy = serve(2), policies["adapter"]
    rollout = begun(engine_of(servers, tmp_path, retries=5, backoff=0.05), policy)
    expected = written(rollout)

    def is_down_for_a_while(request: Handler, number: int) -> bool:
        return time.monotonic() < end and down(request, number)

    end = time.monotonic() + 0.5
    for server in servers:
        server.misbehave = is_down_for_a_while
    with pytest.warns(UserWarning, match="answers again"):
        assert torch.equal(expected.ids, written(rollout).ids)
    for server in servers:
        server.misbehave = down
    begin = time.monotonic()
    with (
        pytest.warns(UserWarning, match="the other servers have"),
        pytest.raises(InputError, match=r"^model\.rollout\.init_args\.url: .* could not be reached"),
    ):
        written(rollout)
    assert time.monotonic() - begin < 20


def test_run_that_is_asked_to_stop_does_not_wait(serve: Any, policies: dict[str, Any], tmp_path: Path) -> None:
    servers = serve(2)
    rollout = begun(engine_of(servers, tmp_path), policies["adapter"])
    for server in servers:
        server.misbehave = lambda request, number: request.path == COMPLETIONS and request.server.release.wait(30)

    def stop() -> None:
        raise KeyboardInterrupt

    rollout.set_check(stop)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        written(rollout)
    assert time.monotonic() - begin < 5


def test_server_that_refuses_or_does_not_start_ends_the_run(
    serve: Any, policies: dict[str, Any], tmp_path: Path
) -> None:
    servers = serve(2)
    with pytest.raises(InputError, match=r"localhost:1/version could not be reached"):
        VLLMRollout([servers[0].url, "http://localhost:1"], str(tmp_path), **QUICK).context_length()
    rollout = begun(engine_of(servers, tmp_path), policies["adapter"])
    servers[1].misbehave = lambda request, number: request.path == COMPLETIONS and not request.answer(400, "no")
    with pytest.raises(InputError, match=rf"{servers[1].url}/v1/completions answered 400"):
        written(rollout)
    short, long = serve(1, context=20)[0], servers[0]
    assert engine_of([long, short], tmp_path).context_length() == 20


@pytest.mark.parametrize("urls", [[], ["http://a:1", "http://a:1/"]])
def test_list_of_no_use_is_refused(urls: list[str]) -> None:
    with pytest.raises(InputError, match=r"^model\.rollout\.init_args\.url must be one URL, or a list"):
        VLLMRollout(urls, "adapters")
    with pytest.raises(InputError, match=r"^model\.rollout\.init_args\.reference_url must be one URL, or a list"):
        VLLMRollout("http://b", weights="full", reference_url=urls)


def test_training_goes_on_while_a_server_is_down(
    serve: Any, make_module: Callable[..., XPOLightningModule], tmp_path: Path
) -> None:
    servers = serve(2)

    def dies(request: Handler, number: int) -> bool:
        return len(servers[1].asked(COMPLETIONS)) > 12 and down(request, number)

    servers[1].misbehave = dies
    module = make_module(rollout=engine_of(servers, tmp_path, together=False), lora=LORA, learning_rate=1e-2)
    with pytest.warns(UserWarning, match="the other servers have its requests"):
        fit_quietly(module, ["the cat", "a dog ran", "red"] * 8, batch_size=6, callbacks=[recorder := Recorder()])
    assert module.global_step == 4
    assert max(recorder.of("rollout/policy_logp_drift") + recorder.of("rollout/logp_drift")) < 1e-4


@pytest.mark.parametrize("weights", ["adapter", "full"])
def test_servers_may_be_behind_and_write_ahead(
    serve: Any, make_module: Callable[..., XPOLightningModule], tmp_path: Path, weights: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat sat on the mat"}\n' * 10)
    data = PromptDataModule(str(tmp_path / "prompts.jsonl"), batch_size=2, validation_size=2)
    servers = serve(2, dev=True)
    options: dict[str, Any] = {"together": weights == "full", "max_logp_drift": 1e-3}  # which holds for validation
    rollout = engine_of(servers, tmp_path / "there", weights, sync_every=2, ahead=1, **options)
    module = make_module(rollout=rollout, lora=LORA if weights == "adapter" else None, learning_rate=1e-2)
    trainer = quiet_trainer(callbacks=[recorder := Recorder()], num_sanity_val_steps=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        trainer.fit(module, data)
    assert recorder.of("rollout/staleness") == [0, 1, 1, 2]
    drifts = recorder.of("rollout/policy_logp_drift")
    assert drifts[0] < 1e-4 < min(drifts[1:])
    path = {"adapter": "/v1/load_lora_adapter", "full": "/collective_rpc"}[weights]
    loads = [len(server.asked(path)) for server in servers]
    assert loads == [3 + (weights == "full")] * 2  # for batches 0 and 2, and validation; a trial of all weights
    assert not list((tmp_path / "there").glob("*"))
