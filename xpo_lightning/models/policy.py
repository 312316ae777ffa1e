"""The policy: its model and adapters, its EOS tokens and its context length."""

import importlib.util
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.adapters import is_lora_layer
from xpo_lightning.models.causal_lm import CausalLMSource, Dtype
from xpo_lightning.models.forward.lengths import context_length_in
from xpo_lightning.models.forward.randomness import keep_all_layers, set_dropout
from xpo_lightning.models.lora import find_unsuitable_linears


@dataclass
class ModelSpec(CausalLMSource):
    """Which causal language model to train, and how to load it.

    Args:
        path: Folder, GGUF file, hub id, or `package:name/path` for a model inside an installed Python package. A
            folder that holds a LoRA adapter is loaded with its base model and merged.
        revision: Branch, tag or commit of a hub id.
        gguf_file: Name of a GGUF file inside `path`, where that is a hub id or a folder.
        dtype: Type of the weights. Small learning rates need float32: bfloat16 rounds updates below 1/256 of a weight
            away. `auto` takes what the files hold.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None lets transformers choose.
        trust_remote_code: Run Python code that comes with the model. Off by default: the code can do anything.
        tokenizer: Where the tokenizer is, if not with the model.
        chat_template: Jinja chat template, as text or as a file, in place of the tokenizer's own.
        dropout: Probability of every dropout in the policy while it trains, adapters' own excepted; null keeps what the
            checkpoint says. 0 leaves no other noise in training either, such as random routing to experts. Sampling and
            the reference never use dropout.
        gradient_checkpointing: Recompute activations in the backward pass, for less memory and more time.
        quantize: Keep the matrices of layers in `4bit` (NF4, as QLoRA does; Dettmers et al. 2023, arXiv 2305.14314),
            for `model.lora`; null keeps them in `dtype`. Needs the package bitsandbytes.
    """

    key: ClassVar[str] = "model.policy"

    dtype: Dtype = "float32"
    dropout: float | None = 0.0
    gradient_checkpointing: bool = False
    quantize: Literal["4bit"] | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range, and quantization that cannot be done."""
        if self.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                f"model.policy.quantize={self.quantize} needs the package bitsandbytes; install it (pip install "
                f"bitsandbytes), or set quantize to null"
            )
        if self.quantize is not None and (self.gguf_file or self.path.endswith(".gguf")):
            raise InputError("model.policy.quantize is for weights that are not quantized yet, not for GGUF files")
        check_range("model.policy.dropout", self.dropout, least=0, below=1, or_null=True)

    def load_model(self) -> nn.Module:
        """Load the weights, in train mode, with dropout and checkpointing as specified."""
        model: Any = super().load_model()
        keep_all_layers(model)
        if self.dropout is not None:
            set_dropout(model, self.dropout)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return cast("nn.Module", model.train())

    def _more_arguments(self) -> dict[str, Any]:
        if self.quantize is None:
            return {}
        compute = torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype)
        nested = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **nested)
        return {"quantization_config": settings}


@dataclass
class LoadedModel:
    """A policy that is in memory already, for use from Python in place of a `ModelSpec`.

    Args:
        model: A transformers causal language model. It is trained in place; its dropout is left as it is.
        tokenizer: Its tokenizer.
        path: A name for it, recorded in checkpoints and model cards.
        revision: Its version, recorded beside the name.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    path: str = "in memory"
    revision: str | None = None

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        return self.tokenizer

    def load_config(self) -> Any:
        """Return the model's configuration."""
        return self.model.config

    def load_model(self) -> nn.Module:
        """Return the model, in train mode."""
        return self.model.train()


@dataclass
class LoRASpec:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen policy; the reference is it without them.

    Args:
        r: Rank.
        alpha: The adapters' output is scaled by alpha / r.
        dropout: Dropout on the adapters' input while training.
        target_modules: Names of the modules that get adapters, or `all-linear`: all linear layers that can have some,
            except for the vocabulary head, and experts whose weights are one parameter.
        rslora: Scale by alpha / sqrt(r) instead (Kalajdzievski 2023).
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_range("model.lora.r", self.r, least=1)
        check_range("model.lora.alpha", self.alpha, above=0, is_finite=True)
        check_range("model.lora.dropout", self.dropout, least=0, below=1)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Freeze a model and add trainable adapters to it.

        Args:
            model: A transformers causal language model, which is changed.

        Returns:
            peft's model around it.

        Raises:
            InputError: The options do not suit the model.
        """
        widest = max(max(weight.shape, default=1) for weight in model.parameters())
        if self.r > widest:
            raise InputError(f"model.lora.r={self.r} is above every dimension of the model ({widest}); lower it")
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (takes a second)

        unsuitable = find_unsuitable_linears(model)
        takes_all = self.target_modules == "all-linear"
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            exclude_modules=sorted(unsuitable) if takes_all and unsuitable else None,
            use_rslora=self.rslora,
        )
        advice = _named_projections(model)
        try:
            wrapped = get_peft_model(model, config)
        except (ValueError, re.error) as error:
            if self.dropout and "ParamWrapper" in str(error):
                raise InputError(
                    f"model.lora.dropout={self.dropout}: experts whose weights are one parameter can have adapters "
                    f"only without dropout; set it to 0, or name model.lora.target_modules without them{advice}"
                ) from error
            raise InputError(f"model.lora.target_modules: {error}") from error
        adapted = {
            name.removeprefix("base_model.model.") for name, layer in wrapped.named_modules() if is_lora_layer(layer)
        }
        for name in sorted(adapted & unsuitable.keys()):
            raise InputError(
                f"model.lora.target_modules: {name!r} cannot have adapters, because {unsuitable[name]}; leave it out"
                f"{advice}"
            )
        return wrapped


def _named_projections(model: nn.Module) -> str:
    """Name the linear layers of a model's attention, all of which can have adapters, to end an error message."""
    names = {
        name
        for parent in model.modules()
        if "attention" in type(parent).__name__.lower()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    }
    return f", such as {sorted(names)}" if names else ""


def check_loaded(model: nn.Module, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int] | None) -> None:
    """Refuse a model that has adapters already, and token ids that the model does not embed.

    Args:
        model: The policy as it was loaded.
        tokenizer: Its tokenizer.
        eos_token_ids: `model.sampling.eos_token_ids`.

    Raises:
        InputError: The model, the tokenizer and the ids do not belong together.
    """
    if hasattr(model, "disable_adapter"):
        raise InputError(
            "model.policy has adapters already, so it is not clear what the reference is; merge them first "
            "(merge_and_unload), or give the base model and model.lora"
        )
    embedded = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(tokenizer) > embedded:
        raise InputError(
            f"model.policy.tokenizer: the tokenizer has {len(tokenizer)} tokens, but the model embeds only {embedded}; "
            f"give the tokenizer that belongs to the model"
        )
    unknown = [token for token in eos_token_ids or [] if not 0 <= token < embedded]
    if unknown:
        raise InputError(
            f"model.sampling.eos_token_ids: the model embeds {embedded} tokens, so it never writes {unknown}"
        )


def end_token_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, configured: list[int] | None = None
) -> list[int]:
    """Return every token id that ends a completion; the first also ends one that is given as text.

    That is the one that the chat template puts after a message or, without such, the tokenizer's. A chat model's
    generation config often names the end of a document, too, which the model does not write after an answer.

    Args:
        model: The model, whose generation config may name some.
        tokenizer: The tokenizer, which may name one.
        configured: `model.sampling.eos_token_ids`, which replaces both if given, and keeps its order.

    Raises:
        InputError: None of the three names one.
    """
    if configured is not None:
        return configured
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    ends = sorted(token for token in ids if token is not None)
    if not ends:
        raise InputError(
            "model.sampling.eos_token_ids: neither the tokenizer nor the model's generation config names an EOS token; "
            "name the ids, or give [] if every completion is meant to run to max_new_tokens"
        )
    first = [*_ends_of_message(tokenizer, ends), *[token for token in ends if token == tokenizer.eos_token_id], *ends]
    return list(dict.fromkeys(first))


def _ends_of_message(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> list[int]:
    """Return those of some token ids that the tokenizer's chat template writes after an assistant's message."""
    if tokenizer.chat_template is None:
        return []
    mark = "completion"
    messages = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # A template is a program, and may fail in any way.
        return []
    behind = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    return [token for token in behind if token in ends]


def prompt_limit(config: Any, max_new_tokens: int) -> int | None:
    """Return the most tokens that a prompt may have, or None where the model names no limit.

    Raises:
        InputError: There is no room for a prompt.
    """
    context = context_length_in(config)
    if context is not None and context <= max_new_tokens:
        raise InputError(
            f"model.sampling.max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; lower it"
        )
    return None if context is None else context - max_new_tokens
