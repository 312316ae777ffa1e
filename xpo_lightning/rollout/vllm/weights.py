"""Sends the policy to a vLLM server, each state of it with all of its weights, in place of those of the base model."""

import hashlib
import secrets
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xpo_lightning.core.atomic_files import remove
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import RequestError, UnusableError
from xpo_lightning.core.owner import Owner, this_process
from xpo_lightning.models.forward.causal_forward import eval_mode
from xpo_lightning.models.saving import check_exportable
from xpo_lightning.models.saving_parts import save_parts
from xpo_lightning.models.sharding import is_sharded, sharded_roots, visit_full_tensors
from xpo_lightning.rollout.vllm.client import Check, VLLMServer
from xpo_lightning.rollout.vllm.protocol import OPTIONS, BaseModel
from xpo_lightning.rollout.vllm.transfer import PROMPT, ROUNDING, Ask, FolderTransfer, PolicyTransfer, gap, trial

SHARED_MEMORY = "/dev/shm"  # noqa: S108
_PREFIX = "xpo-weights-"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsTransfer(PolicyTransfer):
    """Sends all weights of the policy, which take the place of the server's own.

    The server then forgets what it has computed of prompts. The version of its weights, which vLLM keeps for its users,
    tells later whether it still has them: a server that was started anew has the base model and no version.
    """

    @abstractmethod
    def send(self, server: VLLMServer, name: str, check: Check) -> None:
        """Have a server take weights over.

        Raises:
            RequestError: It does not.
        """

    def mark(self, policy: nn.Module) -> str:
        """Hash the sums of all rows and all columns of the weights' bits, which is quick on any device."""
        digest = hashlib.blake2b(digest_size=16)

        def add(name: str, weight: Tensor) -> None:
            bits = weight.contiguous().view(_INTEGERS[weight.element_size()])
            rows = bits.reshape(bits.shape[0], -1) if bits.ndim > 1 else bits[None]
            digest.update(name.encode())
            for sums in (rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64)):
                digest.update(sums.cpu().numpy().tobytes())

        visit_full_tensors(sorted(policy.named_parameters(), key=lambda named: named[0]), add)
        return digest.hexdigest()

    def changed(self, policy: nn.Module) -> AbstractContextManager[None]:
        """See `PolicyTransfer.changed`."""
        return _rearranged(policy)

    def load(self, server: VLLMServer, name: str, check: Check) -> None:
        """Have the server take the weights over, forget what it has computed with others, and note the version."""
        self.send(server, name, check)
        version = f"{name}/{secrets.token_hex(4)}"
        try:
            server.post("/reset_prefix_cache", [{}], _read_reset, check)
            server.post("/update_weight_version", [{"new_version": version}], lambda _: None, check)
        except RequestError as error:
            raise without_endpoints(error) from None

    def ensure(self, server: VLLMServer, name: str, check: Check) -> str:
        """Return the version of the server's weights, new each time that they were loaded."""
        version = self.version(server, check)
        if version.startswith(f"{name}/"):
            return version
        self.load(server, name, check)
        return self.version(server, check)

    def served_name(self, base: str, name: str) -> str:
        """Return the base model's name: the policy has taken its place."""
        return base

    def try_out(self, server: VLLMServer, policy: Any, base: BaseModel, ask: Ask, check: Check) -> None:
        """Refuse a server that takes over only a part of the weights that it loads.

        It is sent the policy with its weights in another order, and has to write what such a policy writes here.
        """
        with self.changed_on_all(policy):
            name = self.save(policy)
            try:
                self.load(server, name, check)
                (answer,) = ask([trial(base, base.name)])
            finally:
                self.remove(name)
            here = _logps(policy, PROMPT, answer.ids)
        drift = gap(answer.logps, here)
        if not drift < ROUNDING:
            raise InputError(
                f"{OPTIONS}.weights=full: the vLLM server at {server.url} was sent other weights, and its "
                f"log-probabilities then differ by {drift:.3g} nats a token from those computed here: it has taken "
                f"over only a part of them, or has another model; see 'All weights' in docs/vllm.md"
            )

    def version(self, server: VLLMServer, check: Check) -> str:
        """Return the version that a server's weights were given.

        Raises:
            RequestError: It does not tell.
        """
        try:
            return server.look("/weight_info", _read_version, check, patient=True)
        except RequestError as error:
            raise without_endpoints(error, "of a vLLM that keeps a version of its weights, as 0.32 does") from None


class SavedWeightsTransfer(WeightsTransfer, FolderTransfer):
    """Sends all weights as safetensors files, which the server loads with its worker's `reload_weights`.

    Args:
        folder: See `FolderTransfer`.

    Raises:
        InputError: The path is empty, or is a file.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, f"{OPTIONS}.weights_folder")
        self._is_swept = False

    def save(self, policy: Any) -> str:
        """Save all weights; remove first what runs that were broken off have left in the folder."""
        if not self._is_swept:
            check_exportable(policy, merge_adapters=False, who=f"{OPTIONS}.weights=full")
            self._sweep()
        name = f"{_PREFIX}{secrets.token_hex(8)}.{this_process()}"
        with self.saving(name) as folder:
            if is_sharded(policy):
                self.begin_gathering(policy)
                save_parts(policy, folder)
            else:
                policy.save_pretrained(folder)
        return name

    def take_part(self, policy: nn.Module) -> None:
        """See `PolicyTransfer.take_part`."""
        save_parts(policy, None)

    def send(self, server: VLLMServer, name: str, check: Check) -> None:
        """See `WeightsTransfer.send`."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.path / name)}}
        try:
            server.post("/collective_rpc", [reload], lambda _: None, check)
        except RequestError as error:
            raise without_endpoints(error, f"and that sees {self.path} under this path") from None

    def _sweep(self) -> None:
        """Remove the weights of runs that are gone: in shared memory they would take room until the machine stops."""
        self._is_swept = True
        for folder in self.path.glob(f"{_PREFIX}*"):
            owner = Owner.read(folder.name.partition(".")[2])
            if owner is not None and owner.is_gone(folder):
                remove(folder)


def _read_reset(value: Any) -> None:
    """Refuse the answer of a server that could not forget what it had computed; another try may succeed."""
    if isinstance(value, dict) and value.get("success") is False:
        raise UnusableError("says that the prefix cache could not be reset")


def _read_version(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("weight_version"), str):
        raise UnusableError("has no weight_version; vLLM's /weight_info does")
    return str(value["weight_version"])


def without_endpoints(error: RequestError, further: str = "") -> RequestError:
    """Return an error that says what the server needs for all weights."""
    message = (
        f"{error}; {OPTIONS}.weights=full needs a server that was started with VLLM_SERVER_DEV_MODE=1 in its "
        f"environment{further and ', '}{further}"
    )
    return RequestError(message, error.status)


@contextmanager
def _rearranged(policy: nn.Module) -> Iterator[None]:
    """Change all weights in place so that the change can be undone to the last bit, and undo it.

    Of a sharded policy, each process changes its own rows.
    """
    done: list[nn.Parameter] = []
    try:
        for weight in _own_weights(policy):
            _rearrange(weight, 2.0)
            done.append(weight)
        yield
    finally:
        _own_weights(policy)
        for weight in done:
            _rearrange(weight, 0.5)


def _own_weights(policy: nn.Module) -> list[nn.Parameter]:
    """Return the weights, of which what is unsharded for a pass is sharded again."""
    for root in sharded_roots(policy):
        root.reshard()
    return list(policy.parameters())


def _rearrange(weight: nn.Parameter, factor: float) -> None:
    """Reverse the columns of a matrix; multiply a vector, since those of norms often have all entries alike."""
    values = weight.data.to_local() if isinstance(weight.data, DTensor) else weight.data
    if values.ndim > 1:
        values.copy_(values.flip(-1))
    else:
        values.mul_(factor)


@torch.no_grad()
def _logps(policy: nn.Module, prompt: list[int], ids: list[int]) -> list[float]:
    """Return the policy's log-probability of each token of a completion."""
    device = next(policy.parameters()).device
    row = torch.tensor([[*prompt, *ids]], device=device)
    with eval_mode(policy):
        logits: Tensor = policy(input_ids=row).logits[0, len(prompt) - 1 : -1].float()
    logps: list[float] = logits.log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0].tolist()
    return logps
