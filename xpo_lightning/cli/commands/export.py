"""`xpo export`: writes a checkpoint as a folder that transformers loads, and pushes it to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from xpo_lightning.callbacks.base import print_line
from xpo_lightning.core.errors import InputError
from xpo_lightning.evaluation.policies import trained_policy
from xpo_lightning.evaluation.run_config import read_run_config
from xpo_lightning.evaluation.saved_run import checkpoint_and_config
from xpo_lightning.models.adapters import is_peft_model
from xpo_lightning.models.saving import check_exportable, check_replaceable, save_policy
from xpo_lightning.reporting.model_card import model_card, training_facts


def export(
    checkpoint: str,
    /,
    *,
    out: str,
    config: str | None = None,
    merge: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Turn a checkpoint into a folder that transformers loads: weights, tokenizer, generation config and a model card.

    The folder appears, or is replaced, only when everything in it is written.

    Args:
        checkpoint: A run's folder, of which the newest checkpoint is taken; or a checkpoint's file.
        out: The folder to write.
        config: The config of its run; not needed for a run's folder, and for a checkpoint in it.
        merge: With LoRA, save a full model with the adapters merged in, instead of only the adapters for `peft`.
        push_to_hub: Push the folder to this repository of the Hugging Face hub as well, `owner/name`. The token is that
            of `hf auth login` or of HF_TOKEN.
        private: If that repository is new, make it a private one.
    """
    if private and push_to_hub is None:
        raise InputError("--private is for --push_to_hub; leave it out")
    if push_to_hub is not None:
        check_push(push_to_hub)
    target = Path(out)
    check_replaceable(target, "--out")
    checkpoint, config = checkpoint_and_config(checkpoint, config)
    if config is None:
        raise InputError(f"xpo export: '{checkpoint}' is not in a run's folder; give the config of its run, --config")
    run = read_run_config(config)
    if merge and run.module.lora is None:
        raise InputError("--merge is for adapters, and the run has none (model.lora); leave it out")
    policy, content = trained_policy(Path(checkpoint), run.module)
    check_exportable(policy, merge, "xpo export", "leave --merge out")
    states = content.get("optimizer_states") or [{}]
    facts = training_facts(content.get("global_step", 0), states[0].get("param_groups", []), run.data)
    is_adapter = is_peft_model(policy) and not merge
    save_policy(policy, run.module.tokenizer, target, merge, model_card(run.module, facts, {}, is_adapter))
    print_line(f"{'adapter' if is_adapter else 'policy'}  {target}")
    if push_to_hub is not None:
        print_line(f"pushed   {push(target, push_to_hub, private)}")


KEY = "--push_to_hub"


def check_push(name: str) -> None:
    """Refuse a push that the hub would refuse, before anything is done.

    Args:
        name: The repository, `owner/name`.

    Raises:
        InputError: The name is not that of a repository, the hub is switched off, or there is no token.
    """
    if name.count("/") != 1:
        raise InputError(f"{KEY} must be owner/name, but is '{name}'")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{KEY} must be owner/name as the hub takes it: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{KEY}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if get_token() is None:
        raise InputError(f"{KEY}: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, private: bool) -> str:
    """Push a folder to the Hugging Face hub.

    Args:
        folder: The folder to push.
        name: The repository, `owner/name`; created if it does not exist.
        private: Whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        InputError: The hub refuses, or does not answer.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export a policy trained with XPO")
    except Exception as error:  # The hub, the network and the file system each raise their own kinds.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{KEY}: '{name}' was not pushed ({reason:.200}); the folder '{folder}' is complete") from None
    return str(repository)
