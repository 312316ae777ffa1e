"""Sends the policy to a vLLM server from GPU to GPU, by vLLM's own weight transfer."""

import secrets
import socket
from importlib import import_module
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import nn

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import RequestError, UnusableError
from xpo_lightning.models.saving import check_exportable
from xpo_lightning.rollout.vllm.client import Check, VLLMServer
from xpo_lightning.rollout.vllm.protocol import OPTIONS
from xpo_lightning.rollout.vllm.weights import WeightsTransfer, without_endpoints

Backend = Literal["nccl", "ipc"]


class DirectTransfer(WeightsTransfer):
    """Sends all weights by vLLM's own transfer: NCCL between GPUs, or CUDA IPC to a server on the same GPU.

    vLLM's own client sends them, so this process's environment must have vLLM too. It sends the policy as it is at that
    moment, and nothing is kept: a server that has lost weights can have the policy's current ones alone.

    Args:
        backend: Which of the two.
        timeout: How many seconds a request to the server may take.

    Raises:
        InputError: vLLM, or its transfer, is not installed here.
    """

    def __init__(self, backend: Backend, timeout: float) -> None:
        try:
            self._vllm = import_module("vllm.distributed.weight_transfer")
            self._infos = {
                "nccl": import_module("vllm.distributed.weight_transfer.nccl_engine").NCCLTrainerInitInfo,
                "ipc": import_module("vllm.distributed.weight_transfer.ipc_engine").IPCTrainerInitInfo,
            }
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"{OPTIONS}.weights_backend={backend} sends the weights by vLLM's own client, and that cannot be "
                f"imported here ({error}); install vLLM 0.32 or later in this environment, or set it to folder"
            ) from error
        self.backend, self.timeout = backend, timeout
        self._policy: Any = None
        self._engines: dict[VLLMServer, tuple[Any, str]] = {}

    def save(self, policy: Any) -> str:
        """Keep the policy at hand."""
        if self._policy is None:
            check_exportable(policy, merge_adapters=False, who=f"{OPTIONS}.weights=full")
        self._policy = policy
        return f"xpo-{secrets.token_hex(8)}"

    def take_part(self, policy: nn.Module) -> None:
        """Do nothing: the engine refuses a run of several processes."""

    def send(self, server: VLLMServer, name: str, check: Check) -> None:
        """See `WeightsTransfer.send`; the first time and after a restart of the server, connect with it anew."""
        engine, sent = self._engines.pop(server, (None, ""))
        has_lost = engine is not None and not self.version(server, check).startswith(f"{sent}/")
        with torch.accelerator.device_index(self._device()):
            try:
                if has_lost:  # started anew, and no longer in the group
                    engine.shutdown()
                    engine = None
                engine = engine or self._connect(server, check)
                engine.send_weights()
            except InputError:
                raise
            except (OSError, RuntimeError, ValueError) as error:
                raise self._failed(server, error) from error
        self._engines[server] = (engine, name)

    def _device(self) -> int | None:
        device: torch.device = next(self._policy.parameters()).device
        return device.index

    def _connect(self, server: VLLMServer, check: Check) -> Any:
        """Have the server take part in the transfer, and return vLLM's engine of this side."""
        options: dict[str, Any] = {}
        if self.backend == "nccl":
            host, port = _own_address(server.url)
            workers = server.look("/get_world_size", _read_world_size, check)
            options = {"master_address": host, "master_port": port, "world_size": 1 + workers}
        return self._vllm.WeightTransferTrainerFactory.trainer_init(
            self._infos[self.backend](rank=0, **options),
            client=self._vllm.HTTPVLLMWeightSyncClient(server.url, timeout=self.timeout),
            source=self._vllm.ModuleSource(self._policy),
        )

    def _failed(self, server: VLLMServer, error: Exception) -> RequestError:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return without_endpoints(
            RequestError(f"{server.key}: the vLLM server at {server.url} did not take the weights: {error}", status),
            f'and --weight-transfer-config \'{{"backend": "{self.backend}"}}\'',
        )


def _own_address(url: str) -> tuple[str, int]:
    """Return the address of this machine as a server sees it, and a port that is free."""
    address = urlsplit(url)
    default = 443 if address.scheme == "https" else 80
    with socket.create_connection((address.hostname, address.port or default), timeout=10) as connection:
        host = connection.getsockname()[0]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        return host, free.getsockname()[1]


def _read_world_size(value: Any) -> int:
    if not isinstance(value, dict) or not isinstance(value.get("world_size"), int):
        raise UnusableError("has no world_size; vLLM's /get_world_size does")
    return int(value["world_size"])
