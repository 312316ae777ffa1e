"""Chooses the fastest way to score rows whose results match the reward model's on each row alone."""

from transformers import PreTrainedModel

from xpo_lightning.models.forward.ladder import Ladder
from xpo_lightning.models.forward.lengths import context_length, first_reach, named_lengths
from xpo_lightning.models.forward.probe import STEPS, draw_rows, prompt_lengths, vocabulary_size
from xpo_lightning.models.forward.remembering import identity_of, remember
from xpo_lightning.models.forward.truth import Truth, name_of
from xpo_lightning.models.forward.unshared import Rows
from xpo_lightning.models.sharding import is_sharded
from xpo_lightning.rewards.sequence_classifier.scoring import score_prefix_pairs, score_rows

_WAYS = (Rows.PADDED_RIGHT, Rows.EVEN, Rows.ALONE)
_SHARED, _SEPARATE = "from what they share", "each by itself"


class ScoringCapabilities:
    """Chooses how one reward model scores rows; probes a way when rows of some length first need it.

    Args:
        model: A sequence classifier with one label, in eval mode, on its device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        name, longest, reach = name_of(model), context_length(model), first_reach(model)
        marks = named_lengths(model)[0]
        self._rows = Ladder(f"{name}, scores", _WAYS, self._fault_of_rows, longest, marks)
        self._sharing = Ladder(f"{name}, scores of pairs", (_SHARED, _SEPARATE), self._fault_of_sharing, longest, marks)
        self._rows.extend(reach)
        self._is_sharing_tried = False
        self._reach = reach

    def rows(self, length: int) -> Rows:
        """Return how rows of up to `length` tokens go through the model; a sharded one is not probed again."""
        return self._rows.surest if is_sharded(self.model) else self._rows.way(length)

    def shares(self, length: int) -> bool:
        """Return whether the common prefix of two rows of up to `length` tokens may be computed once."""
        if not self._is_sharing_tried:
            self._is_sharing_tried = True
            self._sharing.extend(self._reach)
        return (self._sharing.surest if is_sharded(self.model) else self._sharing.way(length)) == _SHARED

    def _fault_of_rows(self, way: Rows, reach: int) -> str | None:
        def probed() -> str | None:
            pairs = _Pairs(self.model, reach)
            return pairs.truth.fault(lambda: score_rows(self.model, pairs.rows, len(pairs.rows), [0], way))

        return remember(identity_of(self.model), ("scores", way, reach), probed)

    def _fault_of_sharing(self, way: str, reach: int) -> str | None:
        def probed() -> str | None:
            pairs = _Pairs(self.model, reach)
            rows = pairs.rows
            return pairs.truth.fault(lambda: score_prefix_pairs(self.model, rows, pairs.twins, len(rows), [0]))

        return remember(identity_of(self.model), ("scores of pairs", way, reach), probed)


class _Pairs:
    """Builds probe rows of unequal lengths, in pairs with a common prefix, and the score of each row alone.

    Args:
        model: The classifier.
        reach: Tokens of the longest row.
    """

    def __init__(self, model: PreTrainedModel, reach: int) -> None:
        steps = max(2, min(STEPS, reach // 2))
        begins = draw_rows(model, prompt_lengths(model, reach, steps), seed=0)
        # Some rows end right after the prefix: a narrow attention window would not reach back to it otherwise.
        ends = draw_rows(model, [min(steps, 1 + 2 * (row % 4)) for row in range(2 * len(begins))], seed=1)
        # Encoder-decoders read their score at EOS.
        eos = getattr(model.config, "eos_token_id", None)
        close = [eos] if isinstance(eos, int) and 0 <= eos < vocabulary_size(model) else []
        self.rows = [begin + end[len(close) :] + close for begin, end in zip(begins * 2, ends, strict=True)]
        self.twins = [(row, row + len(begins), len(begin)) for row, begin in enumerate(begins)]
        self.truth = Truth(
            model, lambda: score_rows(model, self.rows, 1, [0], Rows.ALONE), "model.reward", may_shorten=False
        )
