"""A vLLM engine beside a stand-in for its server, and what tests of it share."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from conftest import (
    GROUPED,
    PROMPTS,
    Recorder,
    fit_quietly,
    make_tokenizer,
    naive_token_logps,
    noise,
    prompts_of,
    random_rows,
    randomize_adapters,
)
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm_stand_in import Handler, StandIn, standing_in

from xpo_lightning import LoRASpec, Sampling, VLLMRollout, XPOLightningModule
from xpo_lightning.rollout.engine import GenerationRequest
from xpo_lightning.rollout.local import LocalRollout

MakeModule = Callable[..., XPOLightningModule]
Serve = Callable[..., StandIn]
QUICK: dict[str, Any] = {"retries": 1, "backoff": 0.01, "timeout": 20.0, "together": False}
LORA = LoRASpec(r=4, alpha=8)
ROWS = random_rows([3, 5, 2, 5])


@pytest.fixture
def serve_vllm(model_folder: Callable[..., str]) -> Iterator[Serve]:
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


def broken(path: str, act: Callable[[Handler], Any], after: int = 0) -> Callable[[Handler, int], bool]:
    """Misbehave at a path, from some request on."""

    def misbehave(request: Handler, number: int) -> bool:
        if request.path != path or number <= after:
            return False
        act(request)
        return True

    return misbehave


COMPLETIONS = "/v1/completions"


def trained(module: XPOLightningModule, steps: int, *callbacks: Any, **options: Any) -> Recorder:
    recorder = Recorder()
    options["callbacks"] = [recorder, *callbacks]
    fit_quietly(module, PROMPTS * 8 * steps, batch_size=40, max_steps=steps, **options)
    return recorder


@contextmanager
def real_server(
    folder: Path, *options: str, tied: bool = False, port: int = 8765, **switches: str
) -> Iterator[tuple[str, str]]:
    """Start a real server on a model that its kernels take; give its address and the model's folder."""
    model = folder / "model"
    if not model.exists():  # servers of one folder have one model
        torch.manual_seed(1)
        shape = {"hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 128}
        config = LlamaConfig(**{**GROUPED, **shape, "initializer_range": 0.12}, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
    log = folder / f"server_{port}.log"
    server = started(model, log, port, *options, **switches)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while server.poll() is None and not answers(url) and time.monotonic() < end:
            time.sleep(1)
        assert server.poll() is None, log.read_text()[-2000:]
        yield url, str(model)
    finally:
        end_all_of(server)


def started(model: Path, log: Path, port: int, *options: str, **switches: str) -> "subprocess.Popen[bytes]":
    """Start a real server as the first process of a session of its own, which `end_all_of` ends."""
    command = [os.environ["XPO_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128", *options]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | switches
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("a") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def answers(url: str) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    return False


def end_all_of(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server and the processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(60)
