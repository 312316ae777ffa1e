"""Options, settings, servers and models that do not go with a vLLM server are refused before a run."""

from typing import Any

import pytest
from vllm_rollouts import LORA, Engine, MakeModule, Serve, begun

from xpo_lightning import InputError, PreviousPolicySampler, ReferenceRefresh, VLLMRollout


@pytest.mark.parametrize(
    ("sampling", "keys"),
    [
        ({"temperature": 0.005}, ["model.sampling.temperature=0.005", "model.rollout"]),
        ({"min_p": 0.1, "top_p": 0.9}, ["model.sampling.min_p=0.1", "model.sampling.top_p=0.9", "model.rollout"]),
    ],
)
def test_sampling_that_vllm_would_do_otherwise_is_refused(
    serve_vllm: Serve, engine: Engine, sampling: dict[str, Any], keys: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        begun(engine(serve_vllm()), **sampling)
    assert all(key in str(refused.value) for key in keys)
    begun(engine(serve_vllm()), **{**sampling, "temperature": 0.0})


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
def test_server_of_another_version_is_refused(serve_vllm: Serve, engine: Engine, version: str, usable: bool) -> None:
    rollout = engine(serve_vllm(version=version))
    if usable:
        assert rollout.context_length() == 64
        return
    with pytest.raises(InputError, match=rf"vLLM '{version}', and VLLMRollout knows 0\.28 to 0\.99"):
        rollout.context_length()


def test_base_model_must_be_one_that_the_server_has(serve_vllm: Serve, engine: Engine) -> None:
    server = serve_vllm()
    with pytest.raises(InputError) as refused:
        engine(server, model="other").context_length()
    assert "model.rollout.init_args.model names 'other'" in str(refused.value)
    assert server.folder in str(refused.value)
    assert engine(server, model=server.folder).context_length() == 64


def test_prompts_must_fit_the_server_too(serve_vllm: Serve, engine: Engine, make_module: MakeModule) -> None:
    module = make_module(rollout=engine(serve_vllm(context=20)), lora=LORA)
    assert module.prompt_encoder.limit == 14
    with pytest.raises(InputError, match=r"max_new_tokens=6 leaves no room .* context of 6 tokens"):
        _ = make_module(rollout=engine(serve_vllm(context=6)), lora=LORA).prompt_encoder
