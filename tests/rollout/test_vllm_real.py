"""Completions by a real vLLM server.

The tests are marked `vllm` and run only if asked for (`-m vllm`); XPO_VLLM_PYTHON names the interpreter that has vLLM.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import lightning.pytorch as pl
import pytest
import torch
from conftest import longer_is_better, randomize_adapters
from transformers import AutoModelForCausalLM
from vllm_rollouts import LORA, begun, both, real_server, trained, worst_gap

from xpo_lightning import InputError, ModelSpec, PythonReward, Sampling, VLLMRollout, XPOLightningModule

COUNTER = "vllm:request_success_total"


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


@pytest.mark.vllm
def test_one_of_two_real_servers_is_killed_and_started_anew(tmp_path: Path) -> None:
    """Each takes its share; while one is gone the other writes for both; then it has requests again."""
    options, switches = ("--enable-lora",), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with ExitStack() as servers:
        url, folder = servers.enter_context(real_server(tmp_path, *options, **switches))
        second = servers.enter_context(ExitStack())
        urls = [url, second.enter_context(real_server(tmp_path, *options, port=8766, **switches))[0]]
        served: list[list[float]] = []

        class Killer(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
                served.append([requests_of(url) for url in urls])
                if trainer.global_step == 2:
                    second.close()
                if trainer.global_step == 4:
                    second.enter_context(real_server(tmp_path, *options, port=8766, **switches))

        rollout = VLLMRollout(urls, str(tmp_path / "adapters"), together=False, retries=3, backoff=0.1)
        sampling = Sampling(max_new_tokens=12, temperature=0.9, top_k=200)
        settings: dict[str, Any] = {"lora": LORA, "rollout": rollout, "sampling": sampling, "learning_rate": 1e-2}
        module = XPOLightningModule(ModelSpec(folder), PythonReward(longer_is_better), **settings)
        with pytest.warns(UserWarning, match="the other servers have its requests"):
            recorder = trained(module, 7, Killer())
        served.append([requests_of(url) for url in urls])
    assert module.global_step == 7
    assert max(recorder.of("rollout/logp_drift") + recorder.of("rollout/policy_logp_drift")) < 1e-3
    shares = [[later - earlier for earlier, later in zip(*ends, strict=True)] for ends in pairwise(served)]
    assert shares[1] == [shares[1][0]] * 2
    assert shares[3] == [2 * shares[1][0], 0]
    assert shares[6] == shares[1]


def requests_of(url: str) -> float:
    """Count the requests that a server has finished since it was started; 0 while it is down."""
    try:
        text = httpx2.get(f"{url}/metrics", timeout=10).text
    except httpx2.TransportError:
        return 0.0
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(COUNTER))


@pytest.mark.vllm
def test_vllms_transfer_has_the_names_that_direct_sending_uses() -> None:
    """Its client, sources and infos, without the GPUs that it sends between."""
    code = """
import inspect
from vllm.distributed import weight_transfer as package
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
IPCTrainerInitInfo(rank=0)
NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=1, world_size=2)
package.HTTPVLLMWeightSyncClient("http://127.0.0.1:1", timeout=1.0)
inspect.signature(package.WeightTransferTrainerFactory.trainer_init).bind(None, client=None, source=None)
assert issubclass(package.ModuleSource, package.WeightSource)
assert {"send_weights", "shutdown"} <= set(dir(package.TrainerWeightTransferEngine))
"""
    done = subprocess.run([os.environ["XPO_VLLM_PYTHON"], "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.vllm
def test_server_with_vllms_transfer_says_how_many_processes_it_has(tmp_path: Path) -> None:
    """On a CPU, that is as far as it goes: NCCL and CUDA IPC need GPUs."""
    transfer = ("--enforce-eager", "--weight-transfer-config", '{"backend": "nccl"}')
    with real_server(tmp_path, *transfer, VLLM_SERVER_DEV_MODE="1") as (url, _):
        assert httpx2.get(f"{url}/get_world_size").json() == {"world_size": 1}
        assert httpx2.get(f"{url}/weight_info").json().keys() == {"weight_version"}
