"""A sharded policy is sent to a stand-in for a vLLM server, a layer at a time, and the servers have all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, noise, prompts_of, random_rows, randomize_adapters
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_processes import in_two
from vllm_stand_in import StandIn, standing_in

from xpo_lightning import LoRASpec, Sampling, VLLMRollout
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import Guard
from xpo_lightning.models import sharding
from xpo_lightning.models.forward.joint_passes import joint_passes
from xpo_lightning.rollout.engine import GenerationRequest
from xpo_lightning.rollout.local import LocalRollout

QUICK: dict[str, Any] = {"retries": 1, "backoff": 0.01, "timeout": 20.0}
ROWS = random_rows([3, 5, 2, 5])


def change(policy: Any) -> None:
    """Change all weights that are trained by a function of their values, on each process its own."""
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.mul_(1.5).add_(0.01)


def sent(policy: Any, rollout: VLLMRollout) -> Any:
    """Send a policy twice, with other weights the second time, and have a completion written in two processes."""
    rollout.begin(LocalRollout(make_tokenizer(), Sampling(max_new_tokens=6), [2]))
    asked = [GenerationRequest("policy", [noise(0).uniforms(len(ROWS), 6)])]

    def run(rank: int, mesh: Any) -> Any:
        sharding.shard(policy, mesh)
        largest = 0
        gathered = sharding.full_tensor

        def noted(tensor: Any) -> Any:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return gathered(tensor)

        sharding.full_tensor = noted
        for _ in range(2):
            change(policy)
            with Guard().together(), joint_passes(policy, device=torch.device("cpu")):
                rollout.sync(policy)
                written = rollout.write(prompts_of(ROWS), asked)[0][0]
        return written.ids.tolist(), written.token_logps.tolist(), largest

    return in_two(run)


def naive(model: Any, written: list[list[int]]) -> list[list[float]]:
    """Score the tokens that were written with a whole model."""
    logps = []
    with torch.no_grad():
        for prompt, tokens in zip(ROWS, written, strict=True):
            scores = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
            logps.append([float(scores[len(prompt) - 1 + step, token]) for step, token in enumerate(tokens)])
    return logps


def check(found: list[Any], model: Any) -> None:
    change(model)
    change(model)
    for result in found:
        if isinstance(result, Exception):
            raise result
        ids, logps, largest = result
        torch.testing.assert_close(torch.tensor(logps), torch.tensor(naive(model, ids)), atol=1e-4, rtol=0)
        assert largest <= max(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("is_tied", [False, True])
def test_all_weights_of_a_sharded_policy_get_to_the_server(
    model_folder: Callable[..., str], tmp_path: Path, is_tied: bool
):
    """And the trial with other weights, which both processes take part in, is passed, and undone."""
    folder = model_folder("llama")
    if is_tied:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
        folder = str(tmp_path / "tied")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(folder)
    policies = [AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2)]
    with standing_in(folder, dev=True) as server:
        rollout = VLLMRollout(server.url, weights="full", weights_folder=str(tmp_path / "weights"), **QUICK)
        check(sent(policies[0], rollout), policies[1])
        assert len(server.asked("/collective_rpc")) == 3, "a trial, and two states of the policy"


def test_adapters_of_a_sharded_policy_get_to_the_server(model_folder: Callable[..., str], tmp_path: Path):
    policies = []
    for _ in range(2):
        policies.append(LoRASpec(r=4, alpha=8).wrap(AutoModelForCausalLM.from_pretrained(model_folder("llama"))).eval())
        randomize_adapters(policies[-1])
    with standing_in(model_folder("llama")) as server:
        check(sent(policies[0], VLLMRollout(server.url, str(tmp_path / "adapters"), **QUICK)), policies[1])


def test_a_server_that_takes_over_a_part_is_refused_by_both_processes(model_folder: Callable[..., str], tmp_path: Path):
    folder = model_folder("llama")

    def served(server: StandIn) -> list[Any]:
        rollout = VLLMRollout(server.url, weights="full", weights_folder=str(tmp_path / "weights"), **QUICK)
        return sent(AutoModelForCausalLM.from_pretrained(folder).eval(), rollout)

    with standing_in(folder, dev=True, kept=("lm_head",)) as server:
        errors = served(server)
    assert [type(error) for error in errors] == [InputError, InputError]
    assert all("it has taken over only a part of them" in str(error) for error in errors)


def test_a_folder_that_cannot_be_written_ends_both_processes(
    model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of the gathering: the remaining tensors are gathered before the error is raised."""
    folder = model_folder("llama")
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()

    def full_disk(*_: Any, **__: Any) -> None:
        raise InputError("no space left")

    monkeypatch.setattr(type(policy), "save_pretrained", full_disk)
    with standing_in(folder, dev=True) as server:
        rollout = VLLMRollout(server.url, weights="full", weights_folder=str(tmp_path / "weights"), **QUICK)
        errors = sent(policy, rollout)
    assert [type(error) for error in errors] == [InputError, InputError], errors
    assert all("no space left" in str(error) for error in errors)
