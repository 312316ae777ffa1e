"""Encoded prompts in a KV cache, ready for sampling or for scoring another model's completions."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.models.forward.capabilities import capabilities_of
from xpo_lightning.models.forward.causal_forward import last_features
from xpo_lightning.models.forward.prefix_sharing import run_completions, run_prompts
from xpo_lightning.models.forward.unshared import Rows
from xpo_lightning.models.logprobs import logps_of
from xpo_lightning.rollout.kv_cache import RolloutCache, exchange
from xpo_lightning.rollout.workspace import Workspace, Workspaces
from xpo_lightning.rollout.writing import Writing
from xpo_lightning.rollout.written import Written


class Session:
    """Encodes a batch of prompts once and shares their KV cache among several completions.

    Rows are ordered by prompt length at first, and are swapped as they end; `places` gives the prompt of each row.

    Args:
        model: A transformers causal language model in eval mode, on the device of the prompts.
        prompts: B prompts.
        room: Maximum number of tokens that will follow a prompt.
        tokens_at_once: Maximum number of prompt tokens, padding included, in one forward pass.
        way: On which side prompts are padded, the dtype of the cache, and whether steps are static.
        workspaces: Workspaces for static steps; None makes a new one.

    Attributes:
        workspace: Holds this session's buffers if steps are static, until `rest`; None otherwise.
    """

    scores_again = False
    """Whether completions are scored again after sampling; here sampling gives their log-probabilities."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        room: int,
        tokens_at_once: int,
        way: Writing,
        workspaces: Workspaces | None = None,
    ) -> None:
        self.model, self.tokens_at_once = model, tokens_at_once
        self.room, self.way, self.workspaces, self.is_resting = room, way, workspaces, False
        self.head, self.pads_right = capabilities_of(model).head, way.rows is Rows.PADDED_RIGHT
        self.given = prompts
        order = sorted(range(len(prompts)), key=prompts.counts.__getitem__)
        self.prompts = prompts.select(order)
        self.places = torch.tensor(order, device=prompts.ids.device)
        self.lengths = self.prompts.lengths
        self.width = self.prompts.ids.shape[1]
        _, mask = self.prompts.padded_right() if self.pads_right else (None, self.prompts.mask)
        self.mask = torch.nn.functional.pad(mask, (0, room), value=True)
        self.workspace = self._enter() if way.is_static else None
        if self.workspace is None:
            columns = self.width + room
            self.cache = RolloutCache(len(prompts), columns, way.cache_dtype, is_read_whole=way.reads_whole)
        self.first = torch.cat([self._read(rows) for rows in self._cut(self.prompts.counts)])  # (B, F)

    def _enter(self) -> Workspace:
        """Take over a workspace with the buffers of static steps; this session owns it until `rest`."""
        count = len(self.prompts)
        workspaces = self.workspaces
        if workspaces is None:  # The caller then draws no tokens.
            workspaces = Workspaces(lambda rows, _, device: Written(rows, self.room, 0, [], device))
        workspace = workspaces.find(self.model, count, self.width + self.room, self.way.cache_dtype)
        workspace.enter(self, self.places, self.lengths, self.mask)
        self.places, self.lengths = workspace.places[:count], workspace.lengths[:count]
        self.mask, self.cache = workspace.mask[:count], workspace.cache
        return workspace

    def advance(self, tokens: Tensor, step: int) -> Tensor:
        """Append a token to each of the first N rows.

        Args:
            tokens: Token ids. (N,)
            step: Number of new tokens that each row has before.

        Returns:
            The features that predict the next token. (N, F)
        """
        rows, end = slice(0, len(tokens)), self.width + step + 1
        if self.workspace is not None:
            self.workspace.written.step.fill_(step)
            self.workspace.column.fill_(end - 1)
            return self.workspace.advance(self.model, self.head, tokens)
        self._place(rows, 0, end - 1)
        positions = self.lengths[rows, None] + step
        mask = self.mask[rows, : self.cache.columns_read(end)]
        return last_features(self.model, tokens[:, None], mask, positions, 1, cache=self.cache, head=self.head)[:, 0]

    def retire(self, ended: Tensor) -> Tensor:
        """Remove the rows that have ended from the batch, by swapping them with rows that go on.

        Args:
            ended: Whether each of the first N rows has ended. (N,)

        Returns:
            For each of the M rows that go on, the index that it had before. (M,)
        """
        staying = int((~ended).sum())
        order = torch.arange(staying, device=ended.device)
        here, there = ended[:staying].nonzero()[:, 0], (~ended[staying:]).nonzero()[:, 0] + staying
        if len(here):
            self.cache.swap(here, there)
            others = [] if self.workspace is None else [self.workspace.features]
            for state in (self.mask, self.lengths, self.places, self.first, *others):
                exchange(state, here, there)
            order[here] = there
        return order

    def again(self) -> "Session":
        """Return a session that can continue the prompts once more; after `rest`, it encodes them again."""
        if not self.is_resting:
            return self
        return Session(self.model, self.given, self.room, self.tokens_at_once, self.way, self.workspaces)

    def rest(self) -> None:
        """Free the memory of sampled tokens, and keep what `logps` needs of the prompts."""
        if self.is_resting:
            return
        self.is_resting = True
        self.cache = self.cache.copied(len(self.prompts), self.width)
        if self.workspace is not None:
            self.mask, self.lengths, self.places = self.mask.clone(), self.lengths.clone(), self.places.clone()
            self.workspace.leave()
            self.workspace = None

    def logps(self, completions: Completions) -> Tensor:
        """Score one completion of each prompt.

        Args:
            completions: B completions, in the order in which the session was given the prompts.

        Returns:
            Log-probability of each under the model, summed over its tokens, in nats. (B,)
        """
        own = completions.select(self.places.tolist())
        sums = torch.empty(len(own), device=own.ids.device)
        for rows in self._cut(own.counts):
            part = own.select(range(rows.start, rows.stop))
            sums[rows] = logps_of(self.continued(rows, part), part, self.head).sum(1)
        return sums[self.places.argsort()]

    def continued(self, rows: slice, completions: Completions) -> Tensor:
        """Return the features that predict each token of some rows' completions, in this session's order, (N, T, F)."""
        self._place(rows, 0, self.width)
        first, mask = self.first[rows, None], self.mask[rows, : self.width]
        return run_completions(self.model, completions, first, mask, self.cache, self.head)

    def _read(self, rows: slice) -> Tensor:
        """Encode some prompts; return the features of their last tokens, (N, F)."""
        some, pads_right = self.prompts.select(range(rows.start, rows.stop)), self.pads_right
        begin = 0 if pads_right else self.width - some.ids.shape[1]
        self._place(rows, begin, begin)
        features, _ = run_prompts(self.model, some, self.cache, self.head, pads_right=pads_right)
        return features[:, 0]

    def _place(self, rows: slice, begin: int, length: int) -> None:
        self.cache.rows, self.cache.begin, self.cache.length, self.cache.column = rows, begin, length, None

    def _cut(self, widths: tuple[int, ...]) -> Iterator[slice]:
        """Split rows of these widths into slices whose padded size is at most `tokens_at_once`, or of a single row."""
        start, widest = 0, 0
        for row, width in enumerate(widths):
            widest = max(widest, width)
            if row > start and widest * (row + 1 - start) > self.tokens_at_once:
                yield slice(start, row)
                start, widest = row, width
        yield slice(start, len(widths))
