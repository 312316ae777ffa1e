"""What a run would ask for only once it is under way: validation prompts, servers, files of earlier runs."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from requests.utils import get_environ_proxies

from xpo_lightning.callbacks import Baseline, PolicyExport
from xpo_lightning.callbacks.policy_folder import check_exportable
from xpo_lightning.errors import InputError
from xpo_lightning.module import XPOLightningModule
from xpo_lightning.rewards.base import Feedback

PATIENCE = 5.0  # seconds that a server has to accept a connection
_PORTS = {"http": 80, "https": 443}


def check_validation(trainer: Trainer, has_prompts: bool) -> None:
    """Refuse callbacks that wait for a validation where there is none.

    Raises:
        InputError: There is such a callback.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    validates = has_prompts and trainer.enable_validation
    for callback in [] if validates else callbacks:
        monitor = getattr(callback, "monitor", None) if isinstance(callback, ModelCheckpoint | EarlyStopping) else None
        if isinstance(callback, Baseline) or str(monitor).startswith("eval/"):
            what = f" watches {monitor}" if monitor else " logs a validation"
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__}{what}, but there are no validation prompts; set "
                f"data.validation_source, data.validation_split or data.validation_size, or remove it"
            )


def check_servers(reward: Feedback) -> None:
    """Refuse servers that take no connection; asking them would be tried again for minutes.

    Raises:
        InputError: One does not.
    """
    for part in reward.modules():
        url = getattr(part, "url", None)
        if not isinstance(url, str) or get_environ_proxies(url):
            continue
        address = urlsplit(url)
        try:
            socket.create_connection((address.hostname or "", address.port or _PORTS[address.scheme]), PATIENCE).close()
        except OSError as error:
            place = f"{address.scheme}://{address.netloc.rpartition('@')[2]}"
            raise InputError(
                f"model.reward.init_args.url: nothing answers at {place} for {type(part).__name__} ({error}); "
                f"start the server, or mend the address"
            ) from error


def check_loaded(trainer: Trainer, module: XPOLightningModule) -> None:
    """Refuse a policy that cannot be exported, and a cache of another run.

    Raises:
        InputError: They do not suit.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, PolicyExport):
            check_exportable(module.policy, callback.merge_adapters)
    where = module.reference_cache
    if where is not None and where != "memory" and (Path(where) / f"reference-{module.global_rank}.sqlite").is_file():
        module.collect.open_cache(where, module.reference_identity, trainer)
        module.memory.cache = None  # What is tried out must not get into it.
