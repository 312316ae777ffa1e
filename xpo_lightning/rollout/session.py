"""Prompts that a model has read, ready to be continued: by sampling, or by scoring what another model wrote."""

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
    """A batch of prompts, read by a model whose prompts can be shared.

    Rows live in the order of the prompts' lengths at first, and change places as they end; `places` tells the prompt of
    each row.

    Args:
        model: A transformers causal language model in eval mode, on the device of the prompts.
        prompts: B prompts.
        room: Most tokens that will follow a prompt.
        tokens_at_once: Most prompt tokens, padding included, that are read in one call.
        way: On which side prompts are padded, the type of the cache, and whether steps are static.
        workspaces: Where static steps have their buffers; None makes new ones.

    Attributes:
        workspace: Has this session's buffers, where steps are static, until `rest`.
    """

    scores_again = False
    """What was written has its log-probabilities from writing."""

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
            self.cache = RolloutCache(len(prompts), self.width + room, way.cache_dtype)
        self.first = torch.cat([self._read(rows) for rows in self._cut(self.prompts.counts)])  # (B, F)

    def _enter(self) -> Workspace:
        """Take a workspace, which has what static steps read; it is this session's own until it rests."""
        count = len(self.prompts)
        workspaces = self.workspaces
        if workspaces is None:  # Nothing is drawn then.
            workspaces = Workspaces(lambda rows, _, device: Written(rows, self.room, 0, [], device))
        workspace = workspaces.find(self.model, count, self.width + self.room, self.way.cache_dtype)
        workspace.enter(self, self.places, self.lengths, self.mask)
        self.places, self.lengths = workspace.places[:count], workspace.lengths[:count]
        self.mask, self.cache = workspace.mask[:count], workspace.cache
        return workspace

    def advance(self, tokens: Tensor, step: int) -> Tensor:
        """Append a token to each of the first rows.

        Args:
            tokens: Token ids. (N,)
            step: How many tokens each has had before.

        Returns:
            The features that predict the next one. (N, F)
        """
        rows, end = slice(0, len(tokens)), self.width + step + 1
        if self.workspace is not None:
            self.workspace.written.step.fill_(step)
            self.workspace.column.fill_(end - 1)
            return self.workspace.advance(self.model, self.head, tokens)
        self._place(rows, 0, end - 1)
        positions = self.lengths[rows, None] + step
        mask = self.mask[rows, :end]
        return last_features(self.model, tokens[:, None], mask, positions, 1, cache=self.cache, head=self.head)[:, 0]

    def retire(self, ended: Tensor) -> Tensor:
        """Take the rows that have ended out of the batch; they change places with rows that go on.

        Args:
            ended: Whether each of the first rows has. (N,)

        Returns:
            Of each row that goes on, the place that it had before. (M,)
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
        """Return the prompts, ready to be continued once more; those that rest are read anew."""
        if not self.is_resting:
            return self
        return Session(self.model, self.given, self.room, self.tokens_at_once, self.way, self.workspaces)

    def rest(self) -> None:
        """Give back the memory of what was sampled, and keep what the prompts need for `logps`."""
        if self.is_resting:
            return
        self.is_resting = True
        self.cache = self.cache.copied(len(self.prompts), self.width)
        if self.workspace is not None:
            self.mask, self.lengths, self.places = self.mask.clone(), self.lengths.clone(), self.places.clone()
            self.workspace.leave()
            self.workspace = None

    def logps(self, completions: Completions) -> Tensor:
        """Score a completion of each prompt.

        Args:
            completions: B completions, in the order that the prompts were given in.

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
        """Return what predicts each token of completions of some rows, in the order that these have here, (N, T, F)."""
        self._place(rows, 0, self.width)
        first, mask = self.first[rows, None], self.mask[rows, : self.width]
        return run_completions(self.model, completions, first, mask, self.cache, self.head)

    def _read(self, rows: slice) -> Tensor:
        """Run some prompts; return the features of their last tokens, of shape (N, F)."""
        some, pads_right = self.prompts.select(range(rows.start, rows.stop)), self.pads_right
        begin = 0 if pads_right else self.width - some.ids.shape[1]
        self._place(rows, begin, begin)
        features, _ = run_prompts(self.model, some, self.cache, self.head, pads_right=pads_right)
        return features[:, 0]

    def _place(self, rows: slice, begin: int, length: int) -> None:
        self.cache.rows, self.cache.begin, self.cache.length = rows, begin, length

    def _cut(self, widths: tuple[int, ...]) -> Iterator[slice]:
        """Cut rows of these widths into runs whose padded size stays within `tokens_at_once`."""
        start, widest = 0, 0
        for row, width in enumerate(widths):
            widest = max(widest, width)
            if row > start and widest * (row + 1 - start) > self.tokens_at_once:
                yield slice(start, row)
                start, widest = row, width
        yield slice(start, len(widths))
