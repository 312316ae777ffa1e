"""A judge that runs a causal language model in this process; its verdict comes from the next token's probabilities."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from xpo_lightning.core.batch import Prompts, RawPrompt, left_pad
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fingerprint import fingerprint, recorded_path
from xpo_lightning.data.prompts import PromptTokenizer
from xpo_lightning.models.causal_lm import CausalLMSource, Dtype
from xpo_lightning.models.forward.capabilities import capabilities_of, rows_of
from xpo_lightning.models.forward.lengths import context_length
from xpo_lightning.models.logprobs import next_logits
from xpo_lightning.rewards.base import OnInvalid
from xpo_lightning.rewards.llm_judge import TEMPLATE, VERDICTS, PromptedJudge, format_prompt

_OPTIONS = "model.reward.init_args"


@dataclass(frozen=True)
class QuestionEncoder:
    """Tokenizes questions: as the only user message of a chat if there is a chat template, as plain text otherwise.

    Args:
        tokenizer: The judge's tokenizer.
        limit: Maximum number of tokens that the judge can read; None is no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int | None = None

    def __call__(self, question: str) -> list[int]:
        """Tokenize a question without cutting it.

        Returns:
            Token ids, at least one; the verdict is the next token.

        Raises:
            InputError: The chat template refuses the question.
        """
        if self.tokenizer.chat_template is None:
            return PromptTokenizer(self.tokenizer)(question, "model.reward: a question to the judge")
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # A template is a program, which may raise anything.
            raise InputError(
                f"model.reward: the judge's chat template refuses a question ({error}); set {_OPTIONS}.chat_template "
                f"to one that takes a single user message"
            ) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def excess(self, question: str) -> int:
        """Count the tokens of a question beyond the limit."""
        return 0 if self.limit is None else max(len(self(question)) - self.limit, 0)

    def without_start(self, text: str, tokens: int) -> str:
        """Cut `tokens` tokens from the start of a text, and more if the rest would begin within a character."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        rest = str(self.tokenizer.decode(ids[tokens:], clean_up_tokenization_spaces=False)).lstrip("\ufffd")
        return rest if len(rest) < len(text) else text[1:]


def tokens_that_read(letter: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that decode to a letter, with or without a space before it.

    Raises:
        InputError: The tokenizer has no such token.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    tokens = [token for token, text in enumerate(texts) if text in (letter, f" {letter}")]
    if not tokens:
        raise InputError(
            f"{_OPTIONS}.path: the tokenizer '{tokenizer.name_or_path}' has no token for the letter {letter}, which a "
            f"verdict is; take another judge"
        )
    return tokens


Truncation = Literal["left", "error"]


@dataclasses.dataclass
class JudgeSource(CausalLMSource):
    """Source of a judge's weights and tokenizer; the fields are `LocalJudge`'s options of the same names."""

    key: ClassVar[str] = _OPTIONS


class LocalJudge(PromptedJudge):
    """Asks a causal language model in this process; the probabilities of answering A and B are the verdict.

    The probability that A is better is p(A) / (p(A) + p(B)), where p is the model's distribution of the first token
    after the question, and p(A) sums over the tokens that read A, with or without a space before. Nothing is sampled.
    The question is the only user message of a chat if the tokenizer has a chat template, and plain text otherwise.

    Args:
        path: The judge: folder, GGUF file, hub id, or `package:name/path` for a model inside an installed Python
            package. A folder that holds a LoRA adapter is loaded with its base model and merged.
        revision: Branch, tag or commit of a hub id.
        gguf_file: Name of a GGUF file inside `path`, if that is a hub id or a folder.
        dtype: Type of the weights; "auto" keeps the checkpoint's.
        attn_implementation: Attention of transformers, for example `sdpa`; its own choice by default.
        trust_remote_code: Whether to run Python code that comes with the model or its tokenizer.
        tokenizer: Tokenizer to use instead of the model's own: local path, hub id, or `package:name/path`.
        chat_template: Jinja chat template, as text or as a file, in place of the tokenizer's own;
            `{{ messages[0]['content'] }}` asks in plain text, which suits examples in `template`.
        micro_batch_size: Questions per forward pass; verdicts do not depend on it.
        max_tokens: Maximum number of tokens of a question as the model reads it; by default the model's context length,
            if it has one.
        truncate: What to do with a longer question: "left" cuts the start of its prompt (the prompt's end and both
            completions stay), "error" ends the run.
        template: The question, with `{prompt}`, `{first}` and `{second}` in it, to be answered with A or B.
        both_orders: Whether to ask twice, the second time with the completions exchanged, and take the mean.
        min_probability: Smallest p(A) + p(B) of a usable answer; the rest is the probability that the model says
            something else.
        invalid: What to do with a pair for which the judge gave no usable answer: `skip` leaves it out of the
            preference loss, `tie` counts it as a tie, `error` ends the run.

    Raises:
        InputError: An option has an impossible value.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        gguf_file: str | None = None,
        dtype: Dtype = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        micro_batch_size: int = 16,
        max_tokens: int | None = None,
        truncate: Truncation = "left",
        template: str = TEMPLATE,
        both_orders: bool = False,
        min_probability: float = 0.0,
        invalid: OnInvalid = "skip",
    ) -> None:
        super().__init__(template, both_orders, invalid)
        for option, value in (("micro_batch_size", micro_batch_size), ("max_tokens", max_tokens)):
            check_range(f"{_OPTIONS}.{option}", value, least=1)
        if truncate not in get_args(Truncation):
            raise InputError(f"{_OPTIONS}.truncate must be left or error, but is {truncate!r}")
        check_range(f"{_OPTIONS}.min_probability", min_probability, least=0, below=1)
        self.source = JudgeSource(
            path, revision, gguf_file, dtype, attn_implementation, trust_remote_code, tokenizer, chat_template
        )
        self.micro_batch_size, self.max_tokens = micro_batch_size, max_tokens
        self.truncate: Truncation = truncate
        self.min_probability = min_probability
        self.model: nn.Module | None = None
        self.encoder: QuestionEncoder | None = None
        self._verdicts: list[list[int]] = []

    def load(self) -> None:
        """Load the model and its tokenizer; a second call does nothing.

        Raises:
            InputError: They cannot be loaded, do not belong together, have no tokens for A and B, or an option does not
                suit them.
        """
        if self.model is not None:
            return
        tokenizer, model = self.source.load_tokenizer(), self.source.load_model()
        context = context_length(model)
        if self.max_tokens is not None and context is not None and self.max_tokens > context:
            raise InputError(
                f"{_OPTIONS}.max_tokens: {self.max_tokens} is more than the judge's context of {context} tokens"
            )
        embedded = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if len(tokenizer) > embedded:
            raise InputError(
                f"{_OPTIONS}.tokenizer: the tokenizer has {len(tokenizer)} tokens, but the judge embeds only "
                f"{embedded}; give the tokenizer that belongs to the judge"
            )
        self._verdicts = [tokens_that_read(letter, tokenizer) for letter in VERDICTS]
        self.encoder = QuestionEncoder(tokenizer, self.max_tokens or context)
        self.model = model.requires_grad_(False).train(False)

    def try_ways(self) -> None:
        """See `Feedback.try_ways`."""
        model, _ = self._loaded()
        capabilities_of(model).key = "model.reward"
        rows_of(model, 1)

    def train(self, mode: bool = True) -> "LocalJudge":
        """Stay in eval mode: dropout would make verdicts random."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """Return the model's source, a fingerprint of its weights once loaded, and the options verdicts depend on."""
        options = ("max_tokens", "truncate", "template", "both_orders", "min_probability", "invalid")
        return {
            "class": recorded_path(type(self)),
            **dataclasses.asdict(self.source),
            **{option: getattr(self, option) for option in options},
            "fingerprint": fingerprint(self.named_parameters()),
        }

    def ask(self, questions: Sequence[str]) -> list[float | None]:
        """See `PromptedJudge.ask`.

        Raises:
            InputError: A question is too long, or the model's probabilities are not finite.
        """
        model, encoder = self._loaded()
        rows = [encoder(question) for question in questions]
        self._check_lengths(rows, encoder.limit)
        answers: list[float | None] = [None] * len(rows)
        # Longest first: memory runs out at once or never.
        by_length = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        for start in range(0, len(rows), self.micro_batch_size):
            self.check()
            chosen = by_length[start : start + self.micro_batch_size]
            said = self._log_probabilities(model, [rows[row] for row in chosen]).tolist()
            for row, (log_a, log_b) in zip(chosen, said, strict=True):
                answers[row] = self._verdict(log_a, log_b)
        return answers

    def _log_probabilities(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return log p(A) and log p(B) of the token after each row, float64 on the CPU, of shape (B, 2)."""
        device = next(model.parameters()).device
        questions = Prompts(*left_pad(rows, device), ("",) * len(rows))
        # Autocast would override the dtype that the user chose for this model.
        with torch.autocast(device.type, enabled=False):
            logits = next_logits(model, questions)  # (B, V)
        logps = logits.float().log_softmax(-1)
        if bool(logps.isnan().any()):
            raise InputError(f"model.reward: the judge '{self.source.path}' gave probabilities that are not numbers")
        return torch.stack([logps[:, tokens].logsumexp(-1) for tokens in self._verdicts], 1).double().cpu()

    def _verdict(self, log_a: float, log_b: float) -> float | None:
        """Return p(A) / (p(A) + p(B)), or None if A and B together are too unlikely."""
        highest = max(log_a, log_b)
        if highest == -math.inf or math.exp(log_a) + math.exp(log_b) < self.min_probability:
            return None
        a, b = math.exp(log_a - highest), math.exp(log_b - highest)  # so that at least one is not rounded to 0
        return a / (a + b)

    def _question(self, prompt: RawPrompt, first: str, second: str) -> str:
        """Build the question, with as much of the prompt's end as fits."""
        _, encoder = self._loaded()
        question, text = super()._question(prompt, first, second), format_prompt(prompt)
        while self.truncate == "left" and text and (excess := encoder.excess(question)):
            text = encoder.without_start(text, excess)
            question = super()._question(text, first, second)
        return question

    def _loaded(self) -> tuple[nn.Module, QuestionEncoder]:
        if self.model is None or self.encoder is None:
            raise RuntimeError("call load() before the first question")
        return self.model, self.encoder

    def _check_lengths(self, rows: Sequence[Sequence[int]], limit: int | None) -> None:
        longest = max((len(row) for row in rows), default=0)
        if limit is None or longest <= limit:
            return
        fixes = [f"set {_OPTIONS}.truncate to left"] * (self.truncate == "error")
        fixes += [f"raise {_OPTIONS}.max_tokens"] * (self.max_tokens is not None)
        fixes += ["lower model.sampling.max_new_tokens", "or take a judge with a longer context"]
        raise InputError(
            f"model.reward: a question has {longest} tokens, more than the judge's limit of {limit}; {', '.join(fixes)}"
        )
