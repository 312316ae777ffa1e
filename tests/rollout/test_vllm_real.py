"""Completions by a real vLLM server.

The tests are marked `vllm` and run only if asked for (`-m vllm`); XPO_VLLM_PYTHON names the interpreter that has vLLM.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import longer_is_better, randomize_adapters
from transformers import AutoModelForCausalLM
from vllm_rollouts import LORA, begun, both, real_server, trained, worst_gap

from xpo_lightning import InputError, ModelSpec, PythonReward, Sampling, VLLMRollout, XPOLightningModule


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
