"""Sends the policy to a vLLM server: each state of it as a LoRA adapter under a name of its own."""

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
"""Nats a token that log-probabilities may move by when other completions are computed beside them."""
_PROMPT, _TOKEN, _TOKENS, _BESIDE = [1, 2, 3, 4], 5, 16, 8


def keeps_apart(ask: Ask, base: str, adapter: str, context: int | None) -> bool:
    """Have the base model write the same alone and beside an adapter, and compare.

    vLLM's LoRA kernels for CPUs do not keep them apart (vllm-project/vllm#48421).

    Args:
        ask: Has completions written at once.
        base: Name of the base model.
        adapter: Name of an adapter that changes it a lot.
        context: Most tokens of prompt and completion.

    Returns:
        Whether the log-probabilities are the same but for rounding.
    """
    length = _TOKENS if context is None else min(_TOKENS, context - len(_PROMPT))
    (alone,) = ask([_request(base, length)])
    beside = ask([_request(name, length) for name in [adapter, base] * _BESIDE])[1::2]
    return all(_gap(alone.logps, other.logps) < ROUNDING for other in beside)


def _gap(logps: list[float], others: list[float]) -> float:
    return sum(abs(one - other) for one, other in zip(logps, others, strict=True)) / len(logps)


def _request(name: str, length: int) -> dict[str, Any]:
    """Ask for a completion of one token only, over and over, so that all of them can be compared."""
    forced = {"allowed_token_ids": [_TOKEN], "temperature": 0.0, "repetition_penalty": 1.0, "seed": 0}
    ends = {"max_tokens": length, "ignore_eos": True, "stop": [], "stop_token_ids": []}
    return {"model": name, "prompt": _PROMPT, **forced, **ends, "logprobs": 0, "return_token_ids": True}


_KEY = "model.rollout.init_args.adapter_folder"


class AdapterFolder:
    """Keeps the adapters that an engine has, each in a folder of its name, in PEFT's format.

    Args:
        path: The folder; it is made if it is not there.

    Raises:
        InputError: There is something else of this name.
    """

    def __init__(self, path: str) -> None:
        if not path.strip():
            raise InputError(f"{_KEY} is empty; give a folder that the server can read")
        self.path = Path(path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{_KEY} must be a folder, but {self.path} is a file")

    def save(self, policy: Any, name: str) -> Path:
        """Write an adapter beside its place, and put it there when it is complete.

        Args:
            policy: A PEFT model.
            name: What the adapter is called, new each time.

        Returns:
            The folder of the adapter.

        Raises:
            InputError: It cannot be written.
        """
        place, beside = self.path / name, self.path / f".{name}.new"
        try:
            beside.mkdir(parents=True)
            # The embeddings are the base model's own; left to itself, peft asks the hub whether they are.
            policy.save_pretrained(str(beside), save_embedding_layers=False)
            beside.rename(place)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise InputError(f"{_KEY}: the adapter cannot be written to {place} ({error})") from error
        return place

    def scramble(self, name: str) -> None:
        """Give an adapter random weights: a fresh one changes nothing, so that nobody could tell where it is used."""
        file = self.path / name / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(0)
        weights = load_file(file)
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=noise))
        save_file(weights, file, {"format": "pt"})

    def remove(self, name: str) -> None:
        """Remove an adapter that the engine has no more use for."""
        shutil.rmtree(self.path / name, ignore_errors=True)


def mark_of(policy: nn.Module) -> str:
    """Hash the adapters' weights, all of them: two states of a policy have two marks."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(policy.named_parameters(), key=lambda named: named[0]):
        if "lora_" in name:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ServedAdapter:
    """Has a server load the policy's adapter.

    A server keeps what it has computed of prompts by the name of the adapter, so that no name is used again.

    Args:
        server: The server.
        folder: Where adapters are handed over.
    """

    def __init__(self, server: VLLMServer, folder: AdapterFolder) -> None:
        self.server, self.folder = server, folder

    def replace(self, policy: nn.Module, old: str | None, check: Callable[[], None]) -> str:
        """Have the server load the policy as it is now, and then forget how it was.

        Args:
            policy: A PEFT model.
            old: The name of the last adapter, if there is one.
            check: See `HTTPClient.post`.

        Returns:
            The name of the new one.

        Raises:
            InputError: It cannot be written, or the server does not load it.
        """
        name = _new_name()
        self.folder.save(policy, name)
        self.load(name, check)
        if old is not None:
            self.forget(old)
        return name

    def forget(self, name: str) -> None:
        """Remove an adapter, from the server as well; a server that is gone, or was started anew, has it no more."""
        self.server.tell("/v1/unload_lora_adapter", {"lora_name": name})
        self.folder.remove(name)

    def try_beside(self, policy: nn.Module, base: BaseModel, ask: Ask, check: Callable[[], None]) -> None:
        """Refuse a server that lets an adapter into what the base model writes at the same time.

        Raises:
            InputError: It does; or the adapter of the trial could not be loaded.
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
        """Have the server load an adapter that is in the folder; one that has it already keeps it.

        Raises:
            InputError: The server does not load it.
        """
        wanted = {"lora_name": name, "lora_path": str(self.folder.path / name)}
        try:
            self.server.post("/v1/load_lora_adapter", [wanted], lambda _: None, check)
        except RequestError as error:
            # Where the answer to the first try was lost, the second finds the adapter there.
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
