"""The policy on a vLLM server: an adapter under a name of its own, and a new name for each state of the policy."""

import secrets
from collections.abc import Callable

from torch import nn

from xpo_lightning.errors import InputError
from xpo_lightning.rewards.http import RequestError
from xpo_lightning.rollout.adapter_folder import AdapterFolder
from xpo_lightning.rollout.separation import Ask, keeps_apart
from xpo_lightning.rollout.vllm_protocol import OPTIONS, BaseModel
from xpo_lightning.rollout.vllm_server import VLLMServer


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
