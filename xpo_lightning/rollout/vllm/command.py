"""Writes the commands that start the vLLM servers of a run."""

import json
import shlex
from dataclasses import dataclass
from urllib.parse import urlsplit

from xpo_lightning.core.errors import InputError
from xpo_lightning.rollout.vllm.engine import VLLMRollout

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as --max-lora-rank."""
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServedModel:
    """What the servers of a run have to serve.

    Args:
        path: Folder or hub id of the model.
        revision: Its revision on the hub.
        dtype: The type that it computes in: `float32`, `bfloat16`, `float16`, or `auto`, that of its weights.
        rank: Rank of the policy's adapter; None if it has none.
        context: Tokens of the longest prompt and completion; None leaves it to the model.
    """

    path: str
    revision: str | None
    dtype: str
    rank: int | None
    context: int | None


@dataclass(frozen=True)
class ServerCommand:
    """The command that starts a server.

    Args:
        url: The URL at which the run will look for it.
        environment: Variables to set.
        words: The command.
    """

    url: str
    environment: dict[str, str]
    words: list[str]

    @property
    def is_local(self) -> bool:
        """Whether the server is to run on this machine."""
        return urlsplit(self.url).hostname in _LOCAL

    def __str__(self) -> str:
        """Return the command as one types it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.words)])


def server_commands(rollout: VLLMRollout, model: ServedModel) -> list[ServerCommand]:
    """Return the command of each server of a run: those of the policy, then those of the reference alone.

    Args:
        rollout: The engine of the run.
        model: What they serve.

    Raises:
        InputError: vLLM does not serve such an adapter.
    """
    switches, environment = _for_the_policy(rollout, model)
    sleeping = ["--enable-sleep-mode"] if rollout.colocate else []
    developing = {"VLLM_SERVER_DEV_MODE": "1"} if rollout.colocate else {}
    switches, environment = [*switches, *sleeping], {**environment, **developing}
    commands = [_command(server.url, rollout, model, switches, environment) for server in rollout.servers.servers]
    if rollout.reference_servers is not rollout.servers:
        alone = [server.url for server in rollout.reference_servers.servers]
        commands += [_command(url, rollout, model, sleeping, developing) for url in alone]
    return commands


def _for_the_policy(rollout: VLLMRollout, model: ServedModel) -> tuple[list[str], dict[str, str]]:
    """Return the options and the variables with which a server takes the policy."""
    if not rollout.needs_adapters:
        backend, developing = rollout.weights_backend, {"VLLM_SERVER_DEV_MODE": "1"}
        insecure = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if backend == "ipc" else {}
        switches = [] if backend == "folder" else ["--weight-transfer-config", json.dumps({"backend": backend})]
        return switches, {**developing, **insecure}
    rank = next((rank for rank in LORA_RANKS if model.rank is not None and rank >= model.rank), None)
    if rank is None:
        raise InputError(f"model.lora.r={model.rank} is above {LORA_RANKS[-1]}, the largest rank that vLLM serves")
    return ["--enable-lora", "--max-lora-rank", str(rank)], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def _command(
    url: str, rollout: VLLMRollout, model: ServedModel, switches: list[str], environment: dict[str, str]
) -> ServerCommand:
    address = urlsplit(url)
    default = 443 if address.scheme == "https" else 80
    host = "127.0.0.1" if address.hostname in _LOCAL else "0.0.0.0"  # noqa: S104  (it is to be reached from here)
    options = {
        "--host": host,
        "--port": str(address.port or default),
        "--revision": model.revision,
        "--dtype": model.dtype,
        "--max-model-len": None if model.context is None else str(model.context),
        "--served-model-name": rollout.model,
    }
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    return ServerCommand(url, environment, ["vllm", "serve", model.path, *given, *switches])
