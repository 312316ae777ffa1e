"""`PolicyExport`: saves the policy as a folder that transformers can load."""

import math
import re
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from xpo_lightning.callbacks.base import FileWriter, folder_id, goes_on_in, is_fast_dev_run, our_module
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.adapters import is_peft_model
from xpo_lightning.models.saving import can_merge, check_exportable, check_replaceable, save_policy
from xpo_lightning.models.sharding import gather_full_model
from xpo_lightning.reporting.model_card import facts_of_trainer, model_card

J_BETA = "eval/objective/rlhf_reward"


class PolicyExport(FileWriter):
    """Saves the policy in Hugging Face format: weights (safetensors), tokenizer, generation config and a model card.

    The folder appears, or is replaced, only when everything in it is written.

    Args:
        folder: Name of the folder inside the run's folder.
        at: When to save: at the `end` of training; after each `validation`, replacing the earlier export; or after each
            validation that is the `best` so far, so that the best iterate is kept, as Algorithm 1 of XPO returns it.
        monitor: Metric that decides what is `best`. By default the validation's estimate of J_beta, the score less beta
            times KL.
        mode: Whether the best is the `max` or the `min`.
        merge_adapters: With LoRA, save a full model with the adapters merged in (true), or only the adapters, for
            `peft` (false). By default, merge them unless the weights are quantized or tied, where merging loses
            something. Training continues with unchanged weights either way.
    """

    def __init__(
        self,
        folder: str = "policy",
        at: Literal["end", "validation", "best"] = "end",
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        merge_adapters: bool | None = None,
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", folder):
            raise InputError(
                f"trainer.callbacks: PolicyExport.folder must be a relative path of letters, digits, '_', '-', '.' and "
                f"'/', but is {folder!r}"
            )
        if at != "best" and (monitor is not None or mode is not None):
            raise InputError(
                f"trainer.callbacks: PolicyExport.monitor and PolicyExport.mode are for at: best, but at is {at}; "
                f"remove them, or set at to best"
            )
        self.export_folder, self.at, self.merge_adapters = folder, at, merge_adapters
        self.monitor, self.sign = monitor or J_BETA, -1.0 if mode == "min" else 1.0
        self.best: float | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before training, a run whose policy could not be saved.

        Raises:
            InputError: Another module, no validation to save after, or a folder in use.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.best, self._loaded = None, {}
        our_module(self, pl_module)
        validates = trainer.enable_validation and getattr(trainer.datamodule, "has_validation", True)  # type: ignore[attr-defined]
        if self.at != "end" and not validates and not is_fast_dev_run(trainer):
            raise InputError(f"trainer.callbacks: PolicyExport.at is '{self.at}', but there are no validation prompts")
        averaging = [type(other).__name__ for other in trainer.callbacks if isinstance(other, WeightAveraging)]  # type: ignore[attr-defined]
        if self.at != "end" and averaging:
            raise InputError(
                f"trainer.callbacks: PolicyExport.at is '{self.at}', but what a validation measures is the average of "
                f"{averaging[0]}, not the policy that would be saved; set at to end, where it is the average"
            )
        check_replaceable(self.folder / self.export_folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a loaded policy that could not be saved faithfully, and restore the best value of a resumed run."""
        check_exportable(pl_module.policy, self.merges(pl_module.policy))
        if self._loaded and goes_on_in(self.folder, self._loaded["folder"], trainer):
            self.best = self._loaded["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, if `at` says so for this validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.at == "validation" or (self.at == "best" and self._is_best(trainer)):
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, if `at` is `end`."""
        if self.at == "end":
            self._export(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and the run's folder, where its policy was saved."""
        return {"folder": folder_id(self.folder), "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for `on_fit_start`, when the checkpoint's path is known."""
        self._loaded = state_dict

    def merges(self, policy: Any) -> bool:
        """Tell whether the adapters of a policy are merged.

        Args:
            policy: The policy, loaded.
        """
        return can_merge(policy) if self.merge_adapters is None else self.merge_adapters

    def _is_best(self, trainer: Trainer) -> bool:
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("eval/")))
            raise InputError(
                f"trainer.callbacks: PolicyExport.monitor is '{self.monitor}', which was not logged; there are {known}"
            )
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if math.isnan(value) or (self.best is not None and value <= self.best):
            return False
        self.best = value
        return True

    def _export(self, trainer: Trainer, module: Any) -> None:
        metrics = dict(trainer.callback_metrics)  # May be reduced over ranks, so every rank reads them.
        policy = gather_full_model(module.policy, module.new_policy, here=trainer.is_global_zero)
        if policy is None or not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        target = self.folder / self.export_folder
        merges = self.merges(policy)
        is_adapter = is_peft_model(policy) and not merges
        card = model_card(module, facts_of_trainer(trainer), metrics, is_adapter)
        save_policy(policy, module.tokenizer, target, merges, card)
        self.written["policy"] = target
