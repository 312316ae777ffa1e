"""Sends the policy to a vLLM server, each state of its weights as a LoRA adapter with a new name."""

import hashlib
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import RequestError
from xpo_lightning.rollout.vllm.client import VLLMServer
from xpo_lightning.rollout.vllm.protocol import OPTIONS, Answer, BaseModel

Ask = Callable[[list[dict[str, Any]]], list[Answer]]
ROUNDING = 0.25
"""Nats per token by which log-probabilities may change when other completions are computed in the same batch."""
_PROMPT, _TOKEN, _TOKENS, _BESIDE = [1, 2, 3, 4], 5, 16, 8


def keeps_apart(ask: Ask, base: str, adapter: str, context: int | None) -> bool:
    """Compare completions of the base model alone with the same ones requested together with an adapter's.

    vLLM's LoRA kernels for CPUs apply the adapter to both (vllm-project/vllm#48421).

    Args:
        ask: Requests completions, all at once.
        base: Name of the base model.
        adapter: Name of an adapter that changes it a lot.
        context: Maximum number of tokens of prompt and completion; None is no limit.

    Returns:
        Whether the log-probabilities agree except for rounding.
    """
    length = _TOKENS if context is None else min(_TOKENS, context - len(_PROMPT))
    (alone,) = ask([_request(base, length)])
    beside = ask([_request(name, length) for name in [adapter, base] * _BESIDE])[1::2]
    return all(_gap(alone.logps, other.logps) < ROUNDING for other in beside)


def _gap(logps: list[float], others: list[float]) -> float:
    return sum(abs(one - other) for one, other in zip(logps, others, strict=True)) / len(logps)


def _request(name: str, length: int) -> dict[str, Any]:
    """Build a request for a completion that repeats one token, so that all completions can be compared."""
    forced = {"allowed_token_ids": [_TOKEN], "temperature": 0.0, "repetition_penalty": 1.0, "seed": 0}
    ends = {"max_tokens": length, "ignore_eos": True, "stop": [], "stop_token_ids": []}
    return {"model": name, "prompt": _PROMPT, **forced, **ends, "logprobs": 0, "return_token_ids": True}


_KEY = "model.rollout.init_args.adapter_folder"


class AdapterFolder:
    """Stores the adapters that an engine loads, each in a folder of its name, in PEFT's format.

    Args:
        path: The folder; it is created if it does not exist.

    Raises:
        InputError: The path is empty, or is a file.
    """

    def __init__(self, path: str) -> None:
        if not path.strip():
            raise InputError(f"{_KEY} is empty; give a folder that the server can read")
        self.path = Path(path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{_KEY} must be a folder, but {self.path} is a file")

    def save(self, policy: Any, name: str) -> Path:
        """Save an adapter to a temporary folder, and rename the folder when it is complete.

        Args:
            policy: A PEFT model.
            name: Name of the adapter, new each time.

        Returns:
            The folder of the adapter.

        Raises:
            InputError: The adapter cannot be written.
        """
        place, beside = self.path / name, self.path / f".{name}.new"
        try:
            beside.mkdir(parents=True)
            # The embeddings are the base model's own; by default, peft would ask the hub whether they are.
            policy.save_pretrained(str(beside), save_embedding_layers=False)
            beside.rename(place)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise InputError(f"{_KEY}: the adapter cannot be written to {place} ({error})") from error
        return place

    def scramble(self, name: str) -> None:
        """Give an adapter random weights: a fresh one changes nothing, so its use could not be detected."""
        file = self.path / name / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(0)
        weights = load_file(file)
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=noise))
        save_file(weights, file, {"format": "pt"})

    def remove(self, name: str) -> None:
        """Delete the files of an adapter that the engine no longer needs."""
        shutil.rmtree(self.path / name, ignore_errors=True)


def mark_of(policy: nn.Module) -> str:
    """Hash all weights of the adapters; two states of a policy have two hashes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(policy.named_parameters(), key=lambda named: named[0]):
        if "lora_" in name:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ServedAdapter:
    """Loads the policy's adapter into a server.

    A server caches its computations on prompts by the name of the adapter, so each adapter gets a new name.

    Args:
        server: The server.
        folder: Folder from which the server loads adapters.
    """

    def __init__(self, server: VLLMServer, folder: AdapterFolder) -> None:
        self.server, self.folder = server, folder

    def replace(self, policy: nn.Module, old: str | None, check: Callable[[], None]) -> str:
        """Have the server load the policy's current adapter, and then unload the previous one.

        Args:
            policy: A PEFT model.
            old: Name of the previous adapter, or None.
            check: See `HTTPClient.post`.

        Returns:
            Name of the new adapter.

        Raises:
            InputError: The adapter cannot be written, or the server does not load it.
        """
        name = _new_name()
        self.folder.save(policy, name)
        self.load(name, check)
        if old is not None:
            self.forget(old)
        return name

    def forget(self, name: str) -> None:
        """Unload an adapter from the server and delete its files; ignores errors, as a restarted server lacks it."""
        self.server.tell("/v1/unload_lora_adapter", {"lora_name": name})
        self.folder.remove(name)

    def try_beside(self, policy: nn.Module, base: BaseModel, ask: Ask, check: Callable[[], None]) -> None:
        """Refuse a server that applies an adapter to completions of the base model in the same batch.

        Raises:
            InputError: The server does so, or a trial adapter could not be saved or loaded.
        """
        name = _new_name()
        self.folder.save(policy, name)
        self.folder.scramble(name)
        self.load(name, check)
        try:
            apart = keeps_apart(ask, base.name, name, base.context)
        finally:
            self.forget(name)
        if not apart:
            raise InputError(
                f"{OPTIONS}.together: the vLLM server at {self.server.url} applies the policy's adapter to what the "
                f"reference writes at the same time, as vLLM does on a CPU; set {OPTIONS}.together to false"
            )

    def load(self, name: str, check: Callable[[], None]) -> None:
        """Have the server load an adapter from the folder; does nothing if the server has it already.

        Raises:
            InputError: The server does not load it.
        """
        wanted = {"lora_name": name, "lora_path": str(self.folder.path / name)}
        try:
            self.server.post("/v1/load_lora_adapter", [wanted], lambda _: None, check)
        except RequestError as error:
            # If the answer to the first try was lost, the second try finds the adapter loaded.
            if error.status == 400 and "already been loaded" in str(error):
                return
            self.folder.remove(name)
            raise InputError(
                f"{error}; model.rollout=VLLMRollout needs a server that was started with --enable-lora, "
                f"--max-lora-rank of at least model.lora.r and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
                f"environment, and that sees {self.folder.path} under this path"
            ) from None


def _new_name() -> str:
    return f"xpo-{secrets.token_hex(8)}"
