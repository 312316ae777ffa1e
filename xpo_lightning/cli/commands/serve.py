"""`xpo serve`: prints the commands that start the vLLM servers of a run, or starts them."""

import os
import signal
import subprocess
import time

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.paths import resolve
from xpo_lightning.evaluation.run_config import RunConfig, read_run_config
from xpo_lightning.models.policy import ModelSpec
from xpo_lightning.rollout.vllm.command import ServedModel, ServerCommand, server_commands
from xpo_lightning.rollout.vllm.engine import VLLMRollout

_BETWEEN_LOOKS, _PATIENCE = 0.5, 60.0  # seconds


def serve(*, config: list[str], start: bool = False) -> None:
    """Print the command of each vLLM server that a run needs.

    A command comes with what the run asks of its server: the model, its type, the rank of the adapters, the longest
    prompt and completion, and the switches that let the run send the policy. Add to it what belongs to your machine,
    such as --tensor-parallel-size.

    Args:
        config: The configs of the run, one over the other, as `xpo fit` takes them.
        start: Start the servers on this machine, and end them with this command.
    """
    commands = commands_of(read_run_config(*config))
    for command in commands:
        where = "" if command.is_local else f"   # on the machine of {command.url}"
        print(f"{command}{where}", flush=True)
    if start:
        run_servers([command for command in commands if command.is_local])


def commands_of(run: RunConfig) -> list[ServerCommand]:
    """Return the commands of a run's servers.

    Raises:
        InputError: The run has no vLLM server.
    """
    module, rollout = run.module, run.module.rollout
    if not isinstance(rollout, VLLMRollout):
        raise InputError("xpo serve: model.rollout is not VLLMRollout, so the run has no server; set it first")
    spec = module.policy_spec
    if not isinstance(spec, ModelSpec):
        raise InputError("xpo serve: model.policy is in memory, and a server needs a folder or a hub id")
    longest = run.data.encoding.max_tokens
    context = None if longest is None else longest + module.sampling.max_new_tokens
    rank = None if module.lora is None else module.lora.r
    dtype = "bfloat16" if run.mixed else spec.dtype
    return server_commands(
        rollout, ServedModel(str(resolve(spec.path, "model.policy.path")), spec.revision, dtype, rank, context)
    )


def run_servers(commands: list[ServerCommand]) -> None:
    """Run servers until one of them ends, or this command is interrupted; then end all of them.

    Raises:
        InputError: There is none for this machine, vLLM is not installed, or a server has ended.
    """
    where = "xpo serve --start"
    if not commands:
        raise InputError(
            f"{where}: no URL of model.rollout is on this machine; start the servers where they are to run"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            environment = {**os.environ, **command.environment}
            servers += [subprocess.Popen(command.words, env=environment)]  # noqa: S603  (the command that was shown)
        while all(server.poll() is None for server in servers):
            time.sleep(_BETWEEN_LOOKS)
    except FileNotFoundError as error:
        raise InputError(f"{where}: there is no command 'vllm'; install vLLM, or activate its environment") from error
    except KeyboardInterrupt:
        return
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(_PATIENCE)
    raise InputError(f"{where}: a server has ended; its last lines say why")
