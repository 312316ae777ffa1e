"""Sends the policy to a vLLM server, each state of its weights as a LoRA adapter with a new name."""

import hashlib
import secrets
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import RequestError
from xpo_lightning.models.sharding import is_sharded, visit_full_tensors
from xpo_lightning.rollout.vllm.client import Check, VLLMServer
from xpo_lightning.rollout.vllm.protocol import OPTIONS, BaseModel
from xpo_lightning.rollout.vllm.transfer import ROUNDING, Ask, FolderTransfer, gap, trial

_BESIDE = 8


class AdapterTransfer(FolderTransfer):
    """Sends the policy's adapter, in PEFT's format.

    A server caches its computations on prompts by the name of the adapter, so each adapter gets a new name.

    Args:
        folder: See `FolderTransfer`.
        together: Whether the base model may write beside an adapter.

    Raises:
        InputError: The path is empty, or is a file.
    """

    def __init__(self, folder: str, *, together: bool) -> None:
        super().__init__(folder, f"{OPTIONS}.adapter_folder")
        self.together = together

    def mark(self, policy: nn.Module) -> str:
        """Hash all weights of the adapters."""
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in self._gathered(policy).items():
            digest.update(name.encode())
            digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, policy: Any) -> str:
        """Save the adapter."""
        name = f"xpo-{secrets.token_hex(8)}"
        self.begin_gathering(policy)
        weights = self._gathered(policy) if is_sharded(policy) else None
        with self.saving(name) as folder:
            # The embeddings are the base model's own; by default, peft would ask the hub whether they are.
            policy.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
        return name

    def take_part(self, policy: nn.Module) -> None:
        """See `PolicyTransfer.take_part`."""
        self._gathered(policy)

    def _gathered(self, policy: nn.Module) -> dict[str, Tensor]:
        """Return the weights of the adapters, whole and in main memory, in the order of their names."""
        found: dict[str, Tensor] = {}
        named = sorted(policy.named_parameters(), key=lambda one: one[0])
        adapters = [(name, weight) for name, weight in named if "lora_" in name]
        visit_full_tensors(adapters, lambda name, weight: found.update({name: weight.cpu()}))
        return found

    def load(self, server: VLLMServer, name: str, check: Check) -> None:
        """Have the server load an adapter from the folder; does nothing if the server has it already."""
        wanted = {"lora_name": name, "lora_path": str(self.path / name)}
        try:
            server.post("/v1/load_lora_adapter", [wanted], lambda _: None, check)
        except RequestError as error:
            # If the answer to the first try was lost, the second try finds the adapter loaded.
            if error.status == 400 and "already been loaded" in str(error):
                return
            raise RequestError(
                f"{error}; model.rollout=VLLMRollout needs a server that was started with --enable-lora, "
                f"--max-lora-rank of at least model.lora.r and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
                f"environment, and that sees {self.path} under this path",
                error.status,
            ) from None

    def ensure(self, server: VLLMServer, name: str, check: Check) -> str:
        """Return the name of the adapter: a server that has lost it refuses requests that name it."""
        return name

    def served_name(self, base: str, name: str) -> str:
        """Return the name of the adapter."""
        return name

    def try_out(self, server: VLLMServer, policy: Any, base: BaseModel, ask: Ask, check: Check) -> None:
        """Refuse a server that applies an adapter to completions of the base model in the same batch.

        vLLM's LoRA kernels for CPUs do so (vllm-project/vllm#48421).
        """
        if not self.together:
            return
        name = self.save(policy)
        self._scramble(name)
        self.load(server, name, check)
        try:
            (alone,) = ask([trial(base, base.name)])
            beside = ask([trial(base, one) for one in [name, base.name] * _BESIDE])[1::2]
        finally:
            self.forget(server, name)
            self.remove(name)
        if not all(gap(alone.logps, other.logps) < ROUNDING for other in beside):
            raise InputError(
                f"{OPTIONS}.together: the vLLM server at {server.url} applies the policy's adapter to what the "
                f"reference writes at the same time, as vLLM does on a CPU; set {OPTIONS}.together to false"
            )

    def forget(self, server: VLLMServer, name: str) -> None:
        """Have the server unload an adapter, and ignore errors, as a restarted server lacks it."""
        server.tell("/v1/unload_lora_adapter", {"lora_name": name})

    def _scramble(self, name: str) -> None:
        """Give an adapter random weights: a fresh one changes nothing, so its use could not be detected."""
        file = self.path / name / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(0)
        weights = load_file(file)
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=noise))
        save_file(weights, file, {"format": "pt"})
