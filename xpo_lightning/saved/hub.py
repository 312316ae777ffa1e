"""Pushing a folder to the Hugging Face hub; the token comes from the environment or the login, and is never shown."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from xpo_lightning.errors import InputError

KEY = "--push_to_hub"


def check_push(name: str) -> None:
    """Refuse what the hub would refuse, before anything is done.

    Args:
        name: The repository, `owner/name`.

    Raises:
        InputError: It is no name of a repository, the hub is switched off, or nobody is logged in.
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
    """Push a folder.

    Args:
        folder: What to push.
        name: The repository, which is made if there is none.
        private: Whether a new one is private.

    Returns:
        Its address.

    Raises:
        InputError: The hub refuses, or does not answer.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export a policy trained with XPO")
    except Exception as error:  # The hub, the network and the file system all have their own.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{KEY}: '{name}' was not pushed ({reason:.200}); the folder '{folder}' is complete") from None
    return str(repository)
