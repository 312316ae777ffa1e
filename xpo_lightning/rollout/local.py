"""Sampling completions with the model at hand, in this process."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase, StopStringCriteria

from xpo_lightning.batch import Completions, Prompts, cut
from xpo_lightning.errors import InputError
from xpo_lightning.forward import evaluating, last_logits, positions_from
from xpo_lightning.rollout.sampling import Sampling, TokenSampler

Decoded = tuple[Tensor, Tensor, Tensor, Tensor]
"""Token ids (B, T), mask (B, T), ended (B,), token log-probabilities (B, T)."""


class LocalRollout:
    """Samples one completion a prompt from a causal language model, with a key-value cache, in eval mode.

    Args:
        tokenizer: The policy's tokenizer, to decode completions and to find stop strings.
        sampling: How tokens are drawn.
        eos_token_ids: Token ids that end a completion.
        rows_at_once: Most prompts that are decoded together; None decodes all. Less needs less memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        eos_token_ids: list[int],
        rows_at_once: int | None = None,
    ) -> None:
        if rows_at_once is not None and rows_at_once < 1:
            raise InputError(f"model.rollout_batch_size must be at least 1 or null, but is {rows_at_once}")
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.eos_token_ids = eos_token_ids
        self.rows_at_once = rows_at_once
        self.sampler = TokenSampler(sampling)
        self.stops = StopStringCriteria(tokenizer, sampling.stop_strings) if sampling.stop_strings else None

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Prompts, generator: torch.Generator) -> Completions:
        """Sample one completion for each prompt.

        Args:
            model: A transformers causal language model on the device of the prompts; its train and eval modes are left
                as they were.
            prompts: B prompts.
            generator: Source of randomness, on the device of the prompts.

        Returns:
            B completions, with the model's own log-probabilities of their tokens.
        """
        order = sorted(range(len(prompts)), key=prompts.lengths.tolist().__getitem__)
        groups = cut(order, self.rows_at_once or len(order))
        with evaluating(model):
            parts = [self._decode(model, prompts.select(rows), generator) for rows in groups]
        ids, mask, ended, logps = (torch.cat(column) for column in zip(*map(self._pad, parts), strict=True))
        completions = Completions(ids, mask, ended, self._texts(ids, mask), logps)
        return completions.select([order.index(row) for row in range(len(order))])

    def _decode(self, model: nn.Module, prompts: Prompts, generator: torch.Generator) -> Decoded:
        """Write token by token until every row has ended."""
        rows = len(prompts)
        eos = torch.tensor(self.eos_token_ids, dtype=torch.long, device=prompts.ids.device)
        # Repetition penalties look at the context: padding must not count as a token of its own.
        context = torch.where(prompts.mask, prompts.ids, prompts.ids[:, -1:])
        mask, positions, new_ids = prompts.mask, positions_from(prompts.mask), prompts.ids
        ended = torch.zeros(rows, dtype=torch.bool, device=mask.device)
        tokens, logps, reals = [], [], []
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        for _ in range(self.sampling.max_new_tokens):
            logits = last_logits(model, new_ids, mask, positions, keep=1, cache=cache)[:, 0]
            token, logp = self.sampler(logits, context, generator)
            tokens.append(torch.where(ended, 0, token))
            logps.append(torch.where(ended, 0.0, logp))
            reals.append(~ended)
            ended = ended | torch.isin(token, eos) | self._stopped(tokens)
            if bool(ended.all()):
                break
            context = torch.cat([context, token[:, None]], 1)
            new_ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return torch.stack(tokens, 1), torch.stack(reals, 1), ended, torch.stack(logps, 1)

    def _stopped(self, tokens: list[Tensor]) -> Tensor:
        if self.stops is None:
            return torch.zeros_like(tokens[0], dtype=torch.bool)
        # Completion tokens alone: a stop string that began in the prompt is not the completion's.
        stopped: Tensor = self.stops(torch.stack(tokens, 1), None)
        return stopped

    def _pad(self, part: Decoded) -> Decoded:
        ids, mask, ended, logps = part
        missing = self.sampling.max_new_tokens - ids.shape[1]
        ids, mask, logps = (torch.nn.functional.pad(column, (0, missing)) for column in (ids, mask, logps))
        return ids, mask, ended, logps

    def _texts(self, ids: Tensor, mask: Tensor) -> tuple[str, ...]:
        rows = [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]
        return tuple(self._text(row) for row in rows)

    def _text(self, row: list[int]) -> str:
        """Decode a completion up to its stop string, without the EOS that ended it and without special tokens."""
        kept = row[:-1] if row[-1] in self.eos_token_ids else row
        # A stop string may hold special tokens, so it is looked for while they still show.
        whole = str(self.tokenizer.decode(kept)) if self.stops else ""
        found = [position for stop in self.sampling.stop_strings if (position := whole.find(stop)) >= 0]
        if not found:
            return str(self.tokenizer.decode(kept, skip_special_tokens=True))
        text = whole[: min(found)]
        for token in self.tokenizer.added_tokens_decoder.values():
            text = text.replace(token.content, "") if token.special else text
        return text
