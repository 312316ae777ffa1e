"""A reward model: a transformers sequence classifier with one label."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fingerprint import fingerprint, recorded_path
from xpo_lightning.models.forward.lengths import context_length
from xpo_lightning.models.forward.probe import vocabulary_size
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rewards.sequence_classifier.capabilities import ScoringCapabilities
from xpo_lightning.rewards.sequence_classifier.inputs import InputTokenizer, PromptFormat, Truncation, render
from xpo_lightning.rewards.sequence_classifier.loading import ClassifierSource
from xpo_lightning.rewards.sequence_classifier.scoring import find_prefix_pairs, score_prefix_pairs, score_rows
from xpo_lightning.rewards.validation import as_scores

FEW_ROWS = 16
"""Rows per forward pass on a CPU, where more are no faster."""
TOKENS_TOGETHER = 2**15
"""Tokens per forward pass on other devices."""
_OPTIONS = "model.reward.init_args"


class SequenceClassifierReward(Reward):
    """Scores completions with a sequence classifier, decoder or encoder, that has one label.

    It reads text through its own tokenizer and chat template, so they need not be the policy's. A row's score does not
    depend on the other rows of its batch.

    Args:
        path: The reward model: local path, hub id, or `package:name/path`.
        revision: Branch, tag or commit on the hub.
        dtype: Type of the weights; "auto" keeps the checkpoint's. Scores are always float32.
        attn_implementation: Attention of transformers, for example `sdpa`; its own choice by default.
        trust_remote_code: Whether to run Python code that comes with the model or its tokenizer.
        tokenizer: Tokenizer to use instead of the model's own: local path, hub id, or `package:name/path`.
        micro_batch_size: Rows per forward pass; scores do not depend on it. null is 16 on a CPU, and elsewhere as many
            rows of the longest length as have 32,768 tokens, at least 16.
        max_tokens: Maximum number of tokens of prompt and completion together, special tokens included; by default the
            model's context length, if it has one.
        truncate: What to do with a longer row: "left" cuts its start (the completion's end stays), "right" cuts its end
            (the prompt's start stays), "error" refuses it. Special tokens that the tokenizer adds to text always stay;
            those that a chat template writes are cut with the text.
        prompt_format: "auto" joins a text prompt and its completion, and renders chat messages with the reward model's
            chat template, with the completion as the assistant's message (or the rest of it, if the assistant spoke
            last); "chat" also renders text prompts, each as one user message; "text" refuses chat messages.
        append_eos: Whether to append the reward tokenizer's EOS to each row that does not end with it.
        allow_untrained_head: Whether to accept a checkpoint that lacks weights, such as the head of a base language
            model, and to initialize them at random (always the same). Only good for trying things out.

    Raises:
        InputError: An option has an impossible value.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        truncate: Truncation = "left",
        prompt_format: PromptFormat = "auto",
        append_eos: bool = False,
        allow_untrained_head: bool = False,
    ) -> None:
        super().__init__()
        check_range(f"{_OPTIONS}.micro_batch_size:", micro_batch_size, least=1)
        check_range(f"{_OPTIONS}.max_tokens:", max_tokens, least=1)
        _check_choice("truncate", truncate, get_args(Truncation))
        _check_choice("prompt_format", prompt_format, get_args(PromptFormat))
        self.source = ClassifierSource(
            path, revision, dtype, attn_implementation, trust_remote_code, tokenizer, allow_untrained_head
        )
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens
        self.truncate: Truncation = truncate
        self.prompt_format: PromptFormat = prompt_format
        self.append_eos = append_eos
        self.model: PreTrainedModel | None = None
        self.encoder: InputTokenizer | None = None
        self._ways: ScoringCapabilities | None = None

    def load(self) -> None:
        """Load the model and its tokenizer; a second call does nothing.

        Raises:
            InputError: They cannot be loaded, the model is not a reward model, or an option does not suit them.
        """
        if self.model is not None:
            return
        tokenizer = self.source.load_tokenizer()
        if self.append_eos and tokenizer.eos_token_id is None:
            raise InputError(f"{_OPTIONS}.append_eos: the tokenizer '{tokenizer.name_or_path}' has no EOS token")
        model = self.source.load_model()
        context = context_length(model)
        if self.max_tokens is not None and context is not None and self.max_tokens > context:
            raise InputError(
                f"{_OPTIONS}.max_tokens: {self.max_tokens} is more than the reward model's context of {context} tokens"
            )
        self.encoder = InputTokenizer(
            tokenizer=tokenizer,
            max_tokens=self.max_tokens or context,
            truncate=self.truncate,
            append_eos=self.append_eos,
            vocabulary=vocabulary_size(model),
        )
        self.model = model

    def try_ways(self) -> None:
        """See `Feedback.try_ways`."""
        if self.model is None:
            raise RuntimeError("call load() before try_ways()")
        self._ways = ScoringCapabilities(self.model)
        self._ways.shares(1)

    def train(self, mode: bool = True) -> "SequenceClassifierReward":
        """Stay in eval mode: dropout would make scores random."""
        return super().train(False)

    def rows_together(self, longest: int) -> int:
        """Return how many rows go through the loaded model in one forward pass.

        Args:
            longest: Number of tokens of the longest row.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        is_on_cpu = self.model is None or self.model.device.type == "cpu"
        return FEW_ROWS if is_on_cpu else max(FEW_ROWS, TOKENS_TOGETHER // max(longest, 1))

    def identity(self) -> dict[str, Any]:
        """Return the model's source, a fingerprint of its weights once loaded, and the options scores depend on."""
        return {
            "class": recorded_path(type(self)),
            **dataclasses.asdict(self.source),
            "max_tokens": self.max_tokens,
            "truncate": self.truncate,
            "prompt_format": self.prompt_format,
            "append_eos": self.append_eos,
            "fingerprint": fingerprint(self.named_parameters()),
        }

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Score completions with the model.

        Args:
            prompts: B prompts, text or chat messages.
            completions: B completions.
            columns: Not used.

        Returns:
            The scores, float32. (B,)

        Raises:
            InputError: A row is empty, too long or unsuited to the chat template, or a score is not finite.
        """
        if self.model is None or self.encoder is None:
            raise RuntimeError("call load() before the first score")
        tokenizer = self.encoder.tokenizer
        texts = [
            render(prompt, completion, tokenizer, self.prompt_format)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rows = [self.encoder(text, is_chat, row) for row, (text, is_chat) in enumerate(texts)]
        pad_ids = (getattr(self.model.config, "pad_token_id", None), tokenizer.pad_token_id)
        ways = self._ways = self._ways or ScoringCapabilities(self.model)  # Now the model is on its device.
        longest = max(map(len, rows), default=0)
        twins, single = find_prefix_pairs(rows, prompts)
        if twins and not ways.shares(longest):
            twins, single = [], list(range(len(rows)))
        scores = torch.empty(len(rows), device=self.model.device)
        if single:
            some, how = [rows[row] for row in single], ways.rows(longest)
            scores[single] = score_rows(self.model, some, self.rows_together(longest), pad_ids, how)
        if twins:
            places = [twin[side] for side in (0, 1) for twin in twins]
            scores[places] = score_prefix_pairs(self.model, rows, twins, self.rows_together(longest), pad_ids)
        return as_scores(scores, len(rows), f"reward model '{self.source.path}'")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{_OPTIONS}.{option}: must be one of {', '.join(choices)}, but is '{value}'")
