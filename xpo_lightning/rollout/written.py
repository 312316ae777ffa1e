"""Buffers for sampled tokens, and the step that draws the next token into them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xpo_lightning.core.batch import Prompts
from xpo_lightning.rollout.sampling import TokenSampler


class Written:
    """Holds the sampled tokens in buffers allocated once, with rows in prompt order; no method waits for the device.

    Args:
        rows: Maximum number of rows, R.
        most: Maximum number of new tokens of a row, T.
        context: Columns of prompt and new tokens that a repetition penalty reads; 0 without a penalty.
        eos: Token ids that end a row.
        device: Device of the buffers.
    """

    def __init__(self, rows: int, most: int, context: int, eos: Sequence[int], device: torch.device) -> None:
        self.eos = torch.tensor(list(eos), dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, most, dtype=torch.long, device=device)
        self.logps = torch.zeros(rows, most, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.uniforms = torch.zeros(rows, most, dtype=torch.float64, device=device)
        self.context = torch.zeros(rows, context, dtype=torch.long, device=device)
        self.start = torch.zeros(1, dtype=torch.long, device=device)

    def begin(self, prompts: Prompts, uniforms: Tensor) -> None:
        """Reset the buffers for a new rollout.

        Args:
            prompts: B prompts, B at most R; the remaining rows count as ended.
            uniforms: Random numbers in [0, 1), float64. (B, T)
        """
        count, width = prompts.ids.shape
        for buffer in (self.step, self.tokens, self.logps, self.lengths):
            buffer.zero_()
        self.ended.fill_(True)[:count] = False
        self.uniforms[:count] = uniforms
        if self.context.shape[1]:
            # Padding and columns not yet filled must add no token to the penalty, so they repeat the prompt's last.
            self.context[:count] = prompts.ids[:, -1:]
            self.context[:count, :width] = torch.where(prompts.mask, prompts.ids, prompts.ids[:, -1:])
            self.start.fill_(width)

    def draw(self, logits: Tensor, places: Tensor, sampler: TokenSampler) -> Tensor:
        """Draw a token for each of N rows, and store it in the rows that have not ended.

        Args:
            logits: The model's logits. (N, V)
            places: Indices of the rows. (N,)
            sampler: Draws the tokens.

        Returns:
            Token ids. (N,)
        """
        token, logp = sampler(logits, self.context[places], self.uniforms[places, self.step])
        ended = self.ended[places]
        self.tokens[places, self.step] = torch.where(ended, 0, token)
        self.logps[places, self.step] = torch.where(ended, 0.0, logp)
        self.lengths[places] += ~ended
        self.ended[places] = ended | (token[:, None] == self.eos).any(1)
        if self.context.shape[1]:
            self.context[places, self.start + self.step] = token
        return token

    def state(self) -> list[Tensor]:
        """Return the buffers that a step changes."""
        return [self.step, self.tokens, self.logps, self.lengths, self.ended, self.context]
