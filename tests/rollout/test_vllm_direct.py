"""All weights sent to a vLLM server by vLLM's own transfer, for whose GPUs and client stand-ins stand."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from test_vllm_weights import begun, change, written
from vllm_rollouts import broken, worst_gap
from vllm_stand_in import StandIn, standing_in
from vllm_transfer_stand_in import Engine, client_modules

from xpo_lightning import InputError, VLLMRollout

QUICK: dict[str, Any] = {"retries": 2, "backoff": 0.01, "timeout": 20.0, "weights": "full"}
Serve = Callable[..., StandIn]


@pytest.fixture
def serve(model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Give a function that starts a stand-in for a server, beside one for vLLM's client in this environment."""
    servers: dict[str, StandIn] = {}

    for name, module in client_modules(servers).items():
        monkeypatch.setitem(sys.modules, name, module)
    with ExitStack() as stack:

        def start(**options: Any) -> StandIn:
            server = stack.enter_context(standing_in(model_folder("llama"), **{"dev": True, **options}))
            servers[server.url] = server
            return server

        yield start


@pytest.fixture
def policy(load_model: Callable[..., Any]) -> Any:
    model = load_model("llama")
    change(model)
    return model


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_server_writes_with_the_policy_and_follows_it(serve: Serve, policy: Any, backend: str) -> None:
    server = serve(backend=backend, workers=2)
    rollout = begun(VLLMRollout(server.url, **QUICK, weights_backend=backend), policy)
    assert worst_gap(policy, written(rollout, "policy")[0]) < 1e-4
    rollout.sync(policy)
    sent = server.asked("/update_weights")
    assert len(sent) == 2, "a trial and the policy; the second time nothing had changed"
    assert sent[0]["update_info"]["names"] == [name for name, _ in policy.named_parameters()]
    change(policy)
    rollout.sync(policy)
    assert worst_gap(policy, written(rollout, "policy")[0]) < 1e-4
    (info,) = [payload["init_info"] for payload in server.asked("/init_weight_transfer_engine")]
    if backend == "nccl":
        assert (info["master_address"], info["world_size"]) == ("127.0.0.1", 3)
        assert info["master_port"] != int(server.url.rpartition(":")[2])
    else:
        assert info == {"packed": False}


def test_server_that_was_started_anew_is_connected_with_anew(serve: Serve, policy: Any) -> None:
    server = serve(backend="nccl")
    rollout = begun(VLLMRollout(server.url, **QUICK, weights_backend="nccl"), policy)
    shut = Engine.shut
    server.start_anew()
    assert worst_gap(policy, written(rollout, "policy")[0]) < 1e-4
    assert len(server.asked("/init_weight_transfer_engine")) == 2
    assert Engine.shut == shut + 1
    change(policy)
    server.start_anew()
    rollout.sync(policy)
    assert worst_gap(policy, written(rollout, "policy")[0]) < 1e-4
    assert len(server.asked("/init_weight_transfer_engine")) == 3


def test_each_of_several_servers_has_a_group_of_its_own(serve: Serve, policy: Any) -> None:
    servers = [serve(backend="nccl"), serve(backend="nccl")]
    rollout = begun(VLLMRollout([server.url for server in servers], **QUICK, weights_backend="nccl"), policy)
    assert worst_gap(policy, written(rollout, "policy")[0]) < 1e-4
    for server in servers:
        assert len(server.asked("/init_weight_transfer_engine")) == 1
        assert server.asked("/v1/completions")


def test_server_that_takes_over_a_part_is_refused(serve: Serve, policy: Any) -> None:
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    with pytest.raises(InputError, match="taken over only a part"):
        begun(VLLMRollout(serve(backend="nccl", kept=("proj",)).url, **QUICK, weights_backend="nccl"), policy)
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())


def test_server_without_the_transfer_is_told_what_it_needs(serve: Serve, policy: Any) -> None:
    server = serve()
    with pytest.raises(InputError, match=r"did not take the weights: 500 .*--weight-transfer-config") as refused:
        begun(VLLMRollout(server.url, **QUICK, weights_backend="ipc"), policy)
    assert server.url in str(refused.value)


def test_server_that_does_not_say_how_many_processes_it_has_is_named_once(serve: Serve, policy: Any) -> None:
    server = serve(backend="nccl")
    server.misbehave = broken("/get_world_size", lambda request: request.answer(404, {"error": "Not Found"}))
    with pytest.raises(InputError, match="/get_world_size answered 404") as refused:
        begun(VLLMRollout(server.url, **QUICK, weights_backend="nccl"), policy)
    assert "did not take" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_every": 2}, r"weights_backend=nccl .* sync_every=2 and ahead=0"),
        ({"ahead": 1}, r"weights_backend=nccl .* sync_every=1 and ahead=1"),
        ({"weights_folder": "there"}, r"weights_folder is for .*weights_backend=folder"),
        ({"weights": "adapter", "adapter_folder": "there"}, r"weights_backend is for .*weights=full"),
    ],
)
def test_options_that_exclude_each_other_are_refused(serve: Serve, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VLLMRollout("http://localhost:1", **{**QUICK, **options}, weights_backend="nccl")


def test_environment_without_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"weights_backend=nccl .* install vLLM 0\.32"):
        VLLMRollout("http://localhost:1", **QUICK, weights_backend="nccl")


def test_several_processes_are_refused(serve: Serve, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = VLLMRollout(serve(backend="nccl").url, **QUICK, weights_backend="nccl")
    monkeypatch.setattr("xpo_lightning.rollout.vllm.engine.world_size", lambda: 2)
    with pytest.raises(InputError, match=r"sends the policy from one process, and this run has 2"):
        begun(rollout, policy)
