"""Loads causal language models and their tokenizers: folders, hub ids, adapters and GGUF files."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.paths import existing_path, explaining_hub_errors, is_local, resolve
from xpo_lightning.models.gguf import gguf_pre_tokenizer, unpacked
from xpo_lightning.models.lora import shares_adapted_weights


def read_chat_template(given: str, key: str) -> str:
    """Return a Jinja chat template.

    Args:
        given: The template itself, or the name of a file that holds it.
        key: The configuration key that holds it, for errors.

    Raises:
        InputError: There is no such file, or it holds no text.
    """
    if len(given) >= 256 or "{" in given:
        return given
    file = existing_path(given)
    if file is None or not given.strip():
        raise InputError(f"{key}: there is no file '{given}', and a template as text would hold a '{{'")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: the file '{given}' cannot be read ({error})") from error


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class CausalLMSource:
    """Location and load options of a causal language model; each subclass documents its options.

    Attributes:
        key: The configuration group that holds the options, for errors; each subclass sets its own.
    """

    key: ClassVar[str]

    path: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    chat_template: str | None = None

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that `tokenizer` names or, without it, the model's own.

        Raises:
            InputError: It cannot be loaded.
        """
        key = f"{self.key}.path" if self.tokenizer is None else f"{self.key}.tokenizer"
        if self.tokenizer is None:
            source, arguments = self._location()
            base = self._adapter_base(source)
            if base is not None and not (Path(source) / "tokenizer_config.json").is_file():
                source = base  # peft saves an adapter without a tokenizer.
        else:
            source, arguments = resolve(self.tokenizer, key), {}
        with explaining_hub_errors(source, key):
            tokenizer: Any = AutoTokenizer.from_pretrained(
                source,
                trust_remote_code=self.trust_remote_code,
                revision=self.revision if self.tokenizer is None else None,
                **arguments,
            )
        if "gguf_file" in arguments and is_local(source):
            pre_tokenizer = gguf_pre_tokenizer(Path(source) / arguments["gguf_file"], key)
            if pre_tokenizer is not None:
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
        if self.chat_template is not None:
            tokenizer.chat_template = read_chat_template(self.chat_template, f"{self.key}.chat_template")
        return cast("PreTrainedTokenizerBase", tokenizer)

    def load_config(self) -> Any:
        """Load the model's configuration alone, without weights."""
        source, arguments = self._location()
        adapter = self._adapter_base(source)
        if adapter is not None:
            source = adapter
        with explaining_hub_errors(source, f"{self.key}.path"):
            return AutoConfig.from_pretrained(
                source, trust_remote_code=self.trust_remote_code, revision=self.revision, **arguments
            )

    def load_model(self) -> nn.Module:
        """Load the weights; adapters are merged into them.

        Raises:
            InputError: They cannot be loaded.
        """
        source, arguments = self._location()
        loader: Any = AutoModelForCausalLM
        is_adapter = self._adapter_base(source) is not None
        if is_adapter:
            import peft  # noqa: PLC0415  (takes a second)

            loader = peft.AutoPeftModelForCausalLM
        if "gguf_file" in arguments:
            arguments["quantization_config"] = unpacked(arguments["gguf_file"])
        if self.attn_implementation is not None:
            arguments["attn_implementation"] = self.attn_implementation
        arguments |= self._more_arguments()
        with explaining_hub_errors(source, f"{self.key}.path"), self._refusing_missing_adapters():
            model: Any = loader.from_pretrained(
                source,
                dtype="auto" if self.dtype == "auto" else getattr(torch, self.dtype),
                trust_remote_code=self.trust_remote_code,
                revision=self.revision,
                **arguments,
            )
        if is_adapter:
            if shares_adapted_weights(model):
                raise InputError(
                    f"{self.key}.path: the adapter in '{self.path}' is on weights that the model has in several "
                    f"places, so it cannot be merged; give a model without an adapter"
                )
            model = model.merge_and_unload().requires_grad_(True)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                f"{self.key}.path: '{self.path}' holds a LoRA adapter on the hub; download it and give its folder, "
                f"to start from the base model with the adapter merged"
            )
        return cast("nn.Module", model)

    @contextmanager
    def _refusing_missing_adapters(self) -> Iterator[None]:
        """Refuse an adapter with missing weights; peft would only warn and leave them untrained."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*missing adapter keys", category=UserWarning)
            try:
                yield
            except UserWarning as missing:
                raise InputError(
                    f"{self.key}.path: the adapter in '{self.path}' cannot be read back: {missing!s:.200}; save it "
                    f"merged into its model instead"
                ) from missing

    def _more_arguments(self) -> dict[str, Any]:
        """Return further arguments for transformers' `from_pretrained`."""
        return {}

    def _location(self) -> tuple[str, dict[str, Any]]:
        """Return the folder or hub id, and the arguments that name a GGUF file in it."""
        resolved = resolve(self.path, f"{self.key}.path")
        if is_local(resolved) and self.revision is not None:
            raise InputError(f"{self.key}.revision is for hub ids, but {self.key}.path is local; remove one")
        if resolved.endswith(".gguf"):
            if self.gguf_file is not None:
                raise InputError(f"{self.key}.gguf_file is set, but {self.key}.path names a GGUF file; remove one")
            return str(Path(resolved).parent), {"gguf_file": Path(resolved).name}
        return resolved, {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def _adapter_base(self, source: str) -> str | None:
        """Return the base model of a LoRA adapter's folder, or None for any other folder."""
        if existing_path(f"{source}/adapter_config.json") is None:
            return None
        from peft import LoraConfig  # noqa: PLC0415

        with explaining_hub_errors(source, f"{self.key}.path"):
            return str(LoraConfig.from_pretrained(source).base_model_name_or_path)
