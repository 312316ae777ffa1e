"""Finds and loads the policies that a command line names: folders, hub ids, checkpoints, `reference`."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from xpo_lightning.checkpointing.io import read_checkpoint
from xpo_lightning.checkpointing.safe_unpickling import METADATA
from xpo_lightning.checkpointing.weights import check_reference, check_trained_state, trained_state
from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.errors import InputError
from xpo_lightning.data.prompts import PromptTokenizer
from xpo_lightning.evaluation.run_config import RunConfig
from xpo_lightning.models.causal_lm import CausalLMSource
from xpo_lightning.models.forward.causal_forward import base_of
from xpo_lightning.models.forward.cpu import keep_memory, speed_up_linears
from xpo_lightning.models.policy import check_loaded, end_token_ids, prompt_limit
from xpo_lightning.models.reference import base_fingerprint
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.sampling import Sampling

REFERENCE = "reference"
AT_ONCE = 256
"""Most prompts that a GPU samples together by default."""


@dataclass
class NamedModel(CausalLMSource):
    """A model named on the command line: a folder, a hub id, a GGUF file or `package:name/path`."""

    key: ClassVar[str] = "model"


@dataclass(frozen=True)
class NamedPolicy:
    """A policy named on the command line; nothing is loaded yet.

    Args:
        name: The name on the command line.
        source: Loads its tokenizer and config.
        load: Loads its weights.
        mixed: Whether its layers compute in bfloat16, whatever the type of its weights; see `RunConfig.mixed`.
    """

    name: str
    source: Any
    load: Callable[[], nn.Module]
    mixed: bool = False

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, loaded on first use."""
        with _naming(self.name):
            tokenizer: PreTrainedTokenizerBase = self.source.load_tokenizer()
        return tokenizer

    def encoder(self, sampling: Sampling) -> PromptTokenizer:
        """Return its prompt tokenizer, which knows how long prompts may be."""
        return PromptTokenizer(self.tokenizer, prompt_limit(self.source.load_config(), sampling.max_new_tokens))

    def seated(self, sampling: Sampling, device: torch.device, at_once: int | None = None) -> "LoadedPolicy":
        """Load the policy, ready to sample.

        Args:
            sampling: How completions are sampled.
            device: Device of the model.
            at_once: Most prompts that are sampled together; None chooses a number for the device.
        """
        keep_memory()
        with _naming(self.name):
            model = self.load()
        check_loaded(base_of(model), self.tokenizer, sampling.eos_token_ids)
        model = model.to(device)
        speed_up_linears(model)
        ends = end_token_ids(model, self.tokenizer, sampling.eos_token_ids)
        most = at_once if at_once is not None or device.type == "cpu" else AT_ONCE
        return LoadedPolicy(model, LocalRollout(self.tokenizer, sampling, ends, most), self.mixed)


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy whose weights are loaded.

    Args:
        model: The policy's model.
        rollout: Samples completions from the model.
        mixed: See `NamedPolicy`.
    """

    model: nn.Module
    rollout: LocalRollout
    mixed: bool = False

    def write(self, prompts: Prompts, uniforms: Sequence[Tensor]) -> list[Completions]:
        """Sample completions.

        Args:
            prompts: B prompts.
            uniforms: Random numbers in [0, 1) for each completion of a prompt, float64. (B, max_new_tokens) each

        Returns:
            B completions for each entry of `uniforms`.
        """
        with torch.autocast(prompts.ids.device.type, torch.bfloat16, enabled=self.mixed):
            return self.rollout.write(self.model, prompts, uniforms)


def find_policy(name: str, run: RunConfig | None) -> NamedPolicy:
    """Find the policy that a name stands for.

    Args:
        name: `reference`, a checkpoint, or anything that `model.policy.path` accepts.
        run: The run of a checkpoint or of the reference; None if no config is given.

    Raises:
        InputError: The checkpoint does not exist, or the name needs a config.
    """
    if name == REFERENCE:
        given = _needed(run, "the reference is the model that a run started from")
        spec = given.module.policy_spec
        return NamedPolicy(name, spec, spec.load_model, given.mixed)
    if is_checkpoint(name):
        given = _needed(run, f"'{name}' is a checkpoint, which holds trained weights alone")
        if not Path(name).exists():
            raise InputError(f"there is no checkpoint '{name}'")
        return NamedPolicy(
            name, given.module.policy_spec, lambda: trained_policy(Path(name), given.module)[0], given.mixed
        )
    source = NamedModel(name)
    return NamedPolicy(name, source, source.load_model)


def is_checkpoint(name: str) -> bool:
    """Tell whether a name is that of a checkpoint rather than of a model."""
    path = Path(name)
    return path.suffix == ".ckpt" or (path.is_file() and zipfile.is_zipfile(path)) or (path / METADATA).is_file()


def trained_policy(path: Path, module: XPOLightningModule) -> tuple[nn.Module, dict[str, Any]]:
    """Load the policy of a run as it was when a checkpoint was written.

    Args:
        path: The checkpoint.
        module: The run's module.

    Returns:
        The policy, with adapters if the run has them, and the checkpoint's content.

    Raises:
        InputError: The checkpoint is missing, damaged, distributed, or not one of this run.
    """
    if path.is_dir():
        raise InputError(
            f"'{path}' is a distributed checkpoint, whose parts no verb puts together; add the callback PolicyExport "
            f"to the run's config, which exports the policy, and give that folder"
        )
    content = read_checkpoint(path)
    if "state_dict" not in content:
        raise InputError(f"'{path}' is no checkpoint of a run: it has no state_dict")
    policy = module.new_policy()
    if content.get("xpo_reference") is not None:
        current = {"path": module.policy_spec.path, "revision": module.policy_spec.revision}
        check_reference(content["xpo_reference"], {**current, "fingerprint": base_fingerprint(policy)})
    own = {f"policy.{name}": value for name, value in policy.state_dict().items()}
    check_trained_state(content["state_dict"], trained_state(own, policy, "policy."))
    weights = {name.removeprefix("policy."): value for name, value in content["state_dict"].items()}
    policy.load_state_dict(weights, strict=False)
    return policy, content


def device_named(name: str) -> torch.device:
    """Return the device of a name; `auto` is a GPU if there is one.

    Raises:
        InputError: The device does not exist or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: '{name}' cannot be used ({str(error).splitlines()[0]:.160})") from error


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefix errors with the name on the command line, because the keys of a config were not given there."""
    try:
        yield
    except InputError as error:
        raise InputError(f"'{name}': {error}") from error


def _needed(run: RunConfig | None, because: str) -> RunConfig:
    if run is None:
        raise InputError(f"{because}: give the run's config as well, --config FOLDER_OF_THE_RUN/config.yaml")
    return run
