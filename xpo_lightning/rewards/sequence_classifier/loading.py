"""Loads a reward model and its tokenizer, and refuses models that cannot score."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.paths import explaining_hub_errors, is_local, resolve

_PATH = "model.reward.init_args.path"
_TOKENIZER = "model.reward.init_args.tokenizer"


@dataclass(frozen=True)
class ClassifierSource:
    """Source of a reward model; the fields are `SequenceClassifierReward`'s options of the same names."""

    path: str
    revision: str | None
    dtype: str
    attn_implementation: str | None
    trust_remote_code: bool
    tokenizer: str | None
    allow_untrained_head: bool

    def load_model(self) -> PreTrainedModel:
        """Load the classifier, in eval mode and frozen.

        Returns:
            A model with one label.

        Raises:
            InputError: The model cannot be loaded, has another number of labels, has weights that were never trained,
                or reads its score from padding (XLNet).
        """
        name = resolve(self.path, _PATH)
        if is_local(name) and self.revision is not None:
            raise InputError(f"{_PATH.replace('path', 'revision')} is for hub ids, but {_PATH} is local; remove one")
        model, missing = self._from_pretrained(name)
        if missing and not self.allow_untrained_head:
            raise InputError(
                f"{_PATH}: '{self.path}' is not a trained reward model: {', '.join(missing)} would be initialized "
                f"at random; give a sequence classifier, or set model.reward.init_args.allow_untrained_head to true"
            )
        if missing and model.config.num_labels != 1:
            model, _ = self._from_pretrained(name, num_labels=1)
        if model.config.num_labels != 1:
            raise InputError(
                f"{_PATH}: '{self.path}' has {model.config.num_labels} labels (num_labels), but a reward model has 1"
            )
        if getattr(model.config, "summary_type", None) == "last":
            raise InputError(
                f"{_PATH}: '{self.path}' ({model.config.model_type}) reads its score at the last position even where "
                f"that is padding; give a sequence classifier of another family"
            )
        model.config.use_cache = False
        model.train(False)
        model.requires_grad_(False)
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer: the one that the `tokenizer` option names, or else the model's own.

        Raises:
            InputError: It cannot be loaded.
        """
        own = self.tokenizer is not None
        key = _TOKENIZER if own else _PATH
        name = resolve(self.tokenizer or self.path, key)
        with explaining_hub_errors(name, key):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name, revision=None if own else self.revision, trust_remote_code=self.trust_remote_code
            )
        return tokenizer

    def _from_pretrained(self, name: str, **changes: int) -> tuple[PreTrainedModel, list[str]]:
        # A fixed seed, so that an untrained head is the same in every process and after a resume. Only the CPU's
        # generator: torch.manual_seed would also reseed the GPUs, which fork_rng does not undo here.
        with explaining_hub_errors(name, _PATH), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                revision=self.revision,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **changes,
            )
        return model, sorted(info["missing_keys"])
