"""Samples completions in this process, from a transformers model."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from xpo_lightning.core.batch import Completions, Prompts, concat_completions
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.rng import RolloutRNG
from xpo_lightning.models.forward.causal_forward import eval_mode
from xpo_lightning.models.forward.lm_head import apply_head
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.models.lora import cast_lora_weights
from xpo_lightning.rollout.decoding import CompletionDecoder
from xpo_lightning.rollout.from_text import given_completions
from xpo_lightning.rollout.kv_cache import most_rows
from xpo_lightning.rollout.mixture import MixtureSession
from xpo_lightning.rollout.opening import AnySession, open_session
from xpo_lightning.rollout.replay import Replay
from xpo_lightning.rollout.sampling import Sampling, TokenSampler
from xpo_lightning.rollout.session import Session
from xpo_lightning.rollout.workspace import Workspaces
from xpo_lightning.rollout.written import Written

TOKENS_AT_ONCE = {"cpu": 2**11, "cuda": 2**16}
"""Maximum tokens in one forward pass, by device type; a CPU is faster while activations fit its cache."""
CHECK_EVERY = {"cpu": 1, "cuda": 8}
"""Decoding steps between two checks for ended rows, by device type; on a GPU, a check waits for the device."""


class LocalRollout:
    """Samples completions from a causal language model in eval mode, with a KV cache.

    Args:
        tokenizer: The policy's tokenizer, to decode completions and to find stop strings.
        sampling: How tokens are drawn.
        eos_token_ids: Token ids that end a completion.
        rows_at_once: Maximum number of prompts decoded together; None is all of them, or on a CPU, where more are no
            faster, `most_rows`. Fewer need less memory.
        check: Called before each token; may raise to abort a rollout.
        replays: Whether a GPU replays the step of each token, with buffers that are kept between rollouts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        eos_token_ids: list[int],
        rows_at_once: int | None = None,
        check: Callable[[], None] = lambda: None,
        *,
        replays: bool = True,
    ) -> None:
        check_range("model.rollout_batch_size", rows_at_once, least=1, or_null=True)
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.eos_token_ids = eos_token_ids
        self.rows_at_once = rows_at_once
        self.check = check
        self.sampler = TokenSampler(sampling)
        self.workspaces = Workspaces(self._empty) if replays else None
        self.decoder = CompletionDecoder(tokenizer, eos_token_ids, sampling.stop_strings)
        self.stops = StopStringCriteria(tokenizer, sampling.stop_strings) if sampling.stop_strings else None

    def several(
        self, model: nn.Module, prompts: Prompts, uniforms: Sequence[Tensor], session: AnySession | None
    ) -> tuple[AnySession, list[Completions]]:
        """Sample several completions for each prompt; encode the prompts once, if the model allows it.

        Args:
            model: As in `__call__`, in eval mode.
            prompts: B prompts.
            uniforms: See `uniforms`, for each completion of a prompt, at least one. (B, max_new_tokens) each
            session: Session in which this model has encoded the prompts before; None opens one.

        Returns:
            The session, and B completions for each entry of `uniforms`.
        """
        written = []
        for numbers in uniforms:
            session = self.open(model, prompts) if session is None else session.again()
            written.append(self.sample(session, numbers))
        if session is None:
            raise ValueError("expected at least one set of uniforms")
        return session, written

    def __call__(self, model: nn.Module, prompts: Prompts, noise: RolloutRNG) -> Completions:
        """Sample one completion for each prompt.

        Args:
            model: A transformers causal language model on the device of the prompts; the train or eval mode of each of
                its modules is restored.
            prompts: B prompts.
            noise: Source of the randomness.

        Returns:
            B completions, with the model's own log-probabilities of their tokens.
        """
        return self.write(model, prompts, [self.uniforms(prompts, noise)])[0]

    @torch.no_grad()
    def write(self, model: nn.Module, prompts: Prompts, uniforms: Sequence[Tensor]) -> list[Completions]:
        """Sample several completions for each prompt, in groups of prompts that are decoded together.

        Args:
            model: As in `__call__`.
            prompts: B prompts.
            uniforms: See `uniforms`, for each completion of a prompt. (B, max_new_tokens) each

        Returns:
            B completions for each entry of `uniforms`.
        """
        groups, parts = self.groups(prompts, model), []
        with eval_mode(model), cast_lora_weights(model):
            for rows in groups:
                some = [numbers[torch.as_tensor(rows, device=numbers.device)] for numbers in uniforms]
                parts.append(self.several(model, prompts.select(rows), some, None)[1])
        return [gather(candidate, groups) for candidate in zip(*parts, strict=True)]

    def groups(self, prompts: Prompts, model: nn.Module) -> list[list[int]]:
        """Group prompts of similar length, the longest first, each group as large as may be decoded together."""
        order = sorted(range(len(prompts)), key=prompts.counts.__getitem__, reverse=True)
        groups: list[list[int]] = []
        while order:
            most = self.rows_at_once or len(order)
            if self.rows_at_once is None and prompts.ids.device.type == "cpu":
                most = most_rows(model, prompts.counts[order[0]] + self.sampling.max_new_tokens)
            groups.append(order[:most])
            order = order[most:]
        return groups

    def uniforms(self, prompts: Prompts, noise: RolloutRNG) -> Tensor:
        """Draw all random numbers of a rollout in advance, so that a row's do not depend on the other rows.

        Returns:
            Numbers in [0, 1), float64. (B, max_new_tokens)
        """
        return noise.uniforms(len(prompts), self.sampling.max_new_tokens).to(prompts.ids.device)

    def open(self, model: nn.Module, prompts: Prompts, *, replays: bool = True) -> AnySession:
        """Encode prompts with a model, which must be in eval mode, and return the session.

        Args:
            model: A transformers causal language model on the device of the prompts.
            prompts: B prompts.
            replays: Whether a GPU may replay the session's steps; the buffers for it serve one session at a time.
        """
        at_once = TOKENS_AT_ONCE.get(prompts.ids.device.type, TOKENS_AT_ONCE["cuda"])
        workspaces = self.workspaces if replays else None
        return open_session(model, prompts, self.sampling.max_new_tokens, at_once, workspaces)

    def sample(self, session: AnySession | MixtureSession, uniforms: Tensor) -> Completions:
        """Sample token by token until every row has ended.

        Args:
            session: B encoded prompts.
            uniforms: See `uniforms`. (B, max_new_tokens)

        Returns:
            B completions, in the order in which the session was given the prompts.
        """
        if isinstance(session, Session) and session.workspace is not None:
            written = self._replayed(session, uniforms)
        else:
            written = self._written(session, uniforms)
        completions = self._completions(session.given, written)
        if not session.scores_again:
            return completions
        return replace(completions, token_logps=token_logps(session.model, session.given, completions))

    def _written(self, session: AnySession | MixtureSession, uniforms: Tensor) -> Written:
        """Sample with the active rows only: rows that have ended leave the batch at the next check."""
        most, head = self.sampling.max_new_tokens, session.head
        written = self._empty(len(uniforms), session.given.ids.shape[1] + most, uniforms.device)
        written.begin(session.given, uniforms)
        features, active = session.first, len(uniforms)
        for step in range(most):
            self.check()
            places = session.places[:active]
            written.step.fill_(step)
            token = written.draw(apply_head(features, head), places, self.sampler)
            self._stop(written, places, step)
            if step + 1 == most:
                break
            if step % CHECK_EVERY.get(token.device.type, CHECK_EVERY["cuda"]) == 0:
                staying = session.retire(written.ended[places])
                token, active = token[staying], len(staying)
            if active == 0:
                break
            features = session.advance(token, step)
        return written

    def _replayed(self, session: Session, uniforms: Tensor) -> Written:
        """Sample with replayed steps, on the active rows rounded up to a batch size that can be replayed."""
        replay = Replay(session, uniforms, self.sampler)
        most = self.sampling.max_new_tokens
        for step in range(most - 1):
            self.check()
            replay.advance()
            self._stop(replay.written, session.places[: replay.active], step)
            if step % CHECK_EVERY["cuda"] == 0:
                replay.retire()
            if replay.active == 0:
                return replay.written
        replay.draw()
        self._stop(replay.written, session.places[: replay.active], most - 1)
        return replay.written

    def given(self, prompts: Prompts, texts: Sequence[str]) -> Completions:
        """Turn texts from another source into completions; see `given_completions`."""
        return given_completions(texts, prompts, self.decoder, self.sampling.max_new_tokens)

    def _empty(self, rows: int, columns: int, device: torch.device) -> Written:
        """Allocate buffers for `rows` rows of `columns` tokens each, prompt and completion."""
        looks_back = self.sampling.repetition_penalty != 1
        return Written(rows, self.sampling.max_new_tokens, columns if looks_back else 0, self.eos_token_ids, device)

    def _stop(self, written: Written, places: Tensor, step: int) -> None:
        """End rows whose new tokens contain a stop string."""
        if self.stops is not None:
            # New tokens alone: a stop string that begins in the prompt does not count.
            stopped: Tensor = self.stops(written.tokens[places, : step + 1], None)
            written.ended[places] |= stopped

    def _completions(self, prompts: Prompts, written: Written) -> Completions:
        lengths, ended = written.lengths[: len(prompts)], written.ended[: len(prompts)]
        width = int(lengths.max())
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        ids, logps = (buffer[: len(prompts), :width].clone() for buffer in (written.tokens, written.logps))
        return Completions(ids, mask, ended.clone(), self.decoder.decode_all(prompts, ids, mask), logps)


def gather(parts: Sequence[Completions], groups: Sequence[Sequence[int]]) -> Completions:
    """Concatenate the completions of groups of prompts, in prompt order."""
    return concat_completions(parts).select(order_of(groups))


def order_of(groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the index of each row in the concatenation of the groups."""
    places = [row for rows in groups for row in rows]
    return sorted(range(len(places)), key=places.__getitem__)
