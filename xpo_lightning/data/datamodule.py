"""The data module: reads prompts, checks them before the first step, and serves them in batches."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.watch import watch
from xpo_lightning.core.fingerprint import differences
from xpo_lightning.core.trainer_progress import batches_done, position
from xpo_lightning.data.dataloader import Batching, PromptDataset, PromptStream, collate
from xpo_lightning.data.preference_pairs import KEY
from xpo_lightning.data.preprocessing import PromptPreprocessor, Sample
from xpo_lightning.data.prompts import Truncation
from xpo_lightning.data.readers import LocatedRow
from xpo_lightning.data.reasoning_tasks import PREFIX, warn_of_shared_rows
from xpo_lightning.data.sampler import ProcessShard, rows_of_turn
from xpo_lightning.data.sources import Source, Stream, read, stream
from xpo_lightning.data.splits import first_rows, hold_out

DEFAULT_BUFFER = 1000


def check_at_least(least: int, **options: float | None) -> None:
    """Refuse numbers below `least` or above `sys.maxsize`; None is an option that is not given."""
    for option, value in options.items():
        check_range(f"data.{option}:", value, least=least)
        if value is not None and value > sys.maxsize:
            raise InputError(f"data.{option}: must be at most {sys.maxsize}, but is {value}")


def check_streaming(streaming: bool, shuffle: bool, buffer: int, validation_size: float) -> None:
    """Refuse options that need streaming without it, and options that streaming does not support."""
    if streaming and validation_size:
        raise InputError(
            "data.validation_size: with data.streaming nobody knows how many rows there are to hold some out; "
            "give data.validation_source or data.validation_split instead"
        )
    if buffer != DEFAULT_BUFFER and not (streaming and shuffle):
        raise InputError("data.shuffle_buffer: has a meaning only with both data.streaming and data.shuffle; remove it")


def choose_validation_source(
    training: Source, name: str | None, split: str | None, size: int | float, limit: int | None
) -> Source | None:
    """Return the source of the validation prompts.

    Args:
        training: The source of the training prompts.
        name: `data.validation_source`.
        split: `data.validation_split`.
        size: `data.validation_size`.
        limit: `data.max_validation_prompts`.

    Returns:
        The source; None if rows are held out of the training prompts, or if there is no validation.

    Raises:
        InputError: The options contradict each other.
    """
    given = {"data.validation_source": name, "data.validation_split": split}
    for key, value in given.items():
        if value is not None and size:
            raise InputError(f"{key} and data.validation_size: both say which prompts to validate on; remove one")
    if isinstance(size, float) and size >= 1:
        raise InputError(
            f"data.validation_size: a share must be below 1, but is {size}; write {size:.0f} for so many rows"
        )
    if name is not None:
        key, split_key = "data.validation_source", "data.validation_split"
        return Source(name, split or "train", key=key, split_key=split_key, pair_column=training.pair_column)
    if split is not None:
        return replace(training, split=split, split_key="data.validation_split")
    if limit is not None and not size:
        raise InputError(
            "data.max_validation_prompts: there are no validation prompts to limit; remove it, or give "
            "data.validation_source, data.validation_split or data.validation_size"
        )
    return None


def choose_pairs_beside(
    source: str | None, preferences: str | None, split: str | None, size: int | None, prompt_column: str
) -> Source | None:
    """Return the source of the preference pairs that are trained on beside the prompts of `data.source`.

    Args:
        source: `data.source`.
        preferences: `data.preferences`.
        split: `data.preferences_split`.
        size: `data.preferences_batch_size`.
        prompt_column: `data.prompt_column`.

    Returns:
        The source; None if there are no pairs, or if they stand in the place of `data.source`.

    Raises:
        InputError: The options contradict each other, or there is nothing to train on.
    """
    if source is None and preferences is None:
        raise InputError(
            "data.source: nothing says what to train on; give prompts, or preference pairs in data.preferences"
        )
    if source is not None and preferences is not None:
        key, split_key = "data.preferences", "data.preferences_split"
        return Source(preferences, split or "train", None, None, key, split_key, prompt_column, needs_pairs=True)
    for key, value, instead in (
        ("data.preferences_split", split, "data.split"),
        ("data.preferences_batch_size", size, "data.batch_size"),
    ):
        if value is not None:
            raise InputError(
                f"{key}: there are no preference pairs beside the prompts of data.source; "
                + (f"set {instead} instead" if preferences else "give data.preferences, or remove it")
            )
    return None


Role = Literal["training", "validation", "preferences"]


class PromptDataModule(LightningDataModule):
    """Prompts from the Hugging Face hub or from files.

    A batch is a dict of lists: `prompt` (text or chat messages, as the row has them), `prompt_ids` (token ids, not
    padded) and each other column of the rows under its own name, for reward functions. Rows are checked and tokenized
    before the first step; with `streaming`, as they are read. A training batch has preference pairs, if there are any,
    as another such dict under `preferences`.

    Args:
        source: Where the prompts are. A hub id, a file (.jsonl, .json, .csv or .parquet; the values of a CSV are text),
            a directory written by `save_to_disk`, `package:name/path` for a file inside an installed package, or
            `reasoning-gym:TASK?size=1000&seed=1` for problems that reasoning-gym makes up, with the task's options.
            null trains on `preferences` alone.
        subset: Configuration of a hub data set.
        revision: Version of a hub data set: a branch, tag or commit.
        split: Split of `source` to train on.
        validation_source: Where the validation prompts are, if in another place than `source`; the same kinds.
            Neither `subset` nor `revision` applies to it.
        validation_split: Split that holds the validation prompts, of `validation_source` if given, else of `source`.
            The default with `validation_source` is train.
        validation_size: Hold out this many rows of `source`, chosen at random by `seed`, or this share of them, for
            validation.
        prompt_column: Column that holds the prompt: text, or a list of chat messages.
        max_prompt_tokens: Most tokens of a prompt.
        truncate: What to do with a longer prompt. Keep its end (left), leave the row out (drop), or stop (error). The
            special tokens that the tokenizer puts in front of a text (BOS) are kept too, and count.
        batch_size: Prompts of one rollout, on each device.
        validation_batch_size: The same for validation and prediction. The default is `batch_size`.
        max_prompts: Train on the first so many rows only; counted after `validation_size` held rows out.
        max_validation_prompts: Validate on the first so many validation rows only.
        shuffle: Take the training prompts in another order each epoch.
        seed: Seed of the order and of `validation_size`. The order depends on this and the epoch only.
        streaming: Read rows while training instead of beforehand, for data that does not fit in memory.
        shuffle_buffer: With `streaming`, how many prompts to choose the next one from.
        num_workers: Processes that load batches beside the training process; 0 loads in the training process.
        drop_last: Leave out the last training batch of an epoch if it is smaller than the others.
        preferences: Preference pairs, which are trained on as they are: rows with a prompt, `chosen` and `rejected`;
            the same kinds as `source`. Beside prompts of `source`, each batch has some of them too. Without `source`
            they are all there is to train on, and all options of `source` are theirs: this is DPO.
        preferences_split: Split of `preferences` beside `source`; null is train. Neither `subset` nor `revision`
            applies to it.
        preferences_batch_size: Preference pairs beside the prompts of a batch, on each device; null is `batch_size`.
            Which ones depends on `seed` and the number of the batch only.

    Raises:
        InputError: Options contradict each other, or the data is missing or malformed.
    """

    def __init__(
        self,
        source: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        split: str = "train",
        validation_source: str | None = None,
        validation_split: str | None = None,
        validation_size: int | float = 0,
        prompt_column: str = "prompt",
        max_prompt_tokens: int | None = None,
        truncate: Truncation = "error",
        batch_size: int = 32,
        validation_batch_size: int | None = None,
        max_prompts: int | None = None,
        max_validation_prompts: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        streaming: bool = False,
        shuffle_buffer: int = DEFAULT_BUFFER,
        num_workers: int = 0,
        drop_last: bool = False,
        preferences: str | None = None,
        preferences_split: str | None = None,
        preferences_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, preferences_batch_size=preferences_batch_size)
        check_at_least(1, batch_size=batch_size, validation_batch_size=validation_batch_size)
        check_at_least(1, max_prompts=max_prompts, max_validation_prompts=max_validation_prompts)
        check_at_least(1, max_prompt_tokens=max_prompt_tokens, shuffle_buffer=shuffle_buffer)
        check_at_least(0, validation_size=validation_size, num_workers=num_workers, seed=seed)
        check_streaming(streaming, shuffle, shuffle_buffer, validation_size)
        self.preferences = choose_pairs_beside(
            source, preferences, preferences_split, preferences_batch_size, prompt_column
        )
        self.preferences_batch_size = preferences_batch_size or batch_size
        self.trains_on_pairs_alone = source is None
        self.source = Source(str(source), split, subset, revision)
        if source is None:
            named = {"name": str(preferences), "key": "data.preferences", "pair_column": prompt_column}
            self.source = replace(self.source, needs_pairs=True, **named)
        self.validation_source = choose_validation_source(
            self.source, validation_source, validation_split, validation_size, max_validation_prompts
        )
        self.validation_size = validation_size
        limits: dict[Role, int | None] = {"training": max_prompts, "validation": max_validation_prompts}
        self.limits: dict[Role, int | None] = {**limits, "preferences": None}
        self.encoding = PromptPreprocessor(prompt_column, None, max_prompt_tokens, truncate)
        self.streaming = streaming
        eval_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.batching = Batching(batch_size, eval_batch_size, shuffle, seed, shuffle_buffer, num_workers, drop_last)
        self._prompts: dict[Role, PromptDataset | PromptStream] = {}

    @property
    def has_validation(self) -> bool:
        """Whether there are validation prompts."""
        return self.validation_source is not None or self.validation_size > 0

    @property
    def prompts(self) -> Mapping[Role, PromptDataset | PromptStream]:
        """The prompts read so far."""
        return self._prompts

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenize the prompts that the stage needs, unless that is done already.

        Raises:
            InputError: The data is missing or malformed, or the model has no tokenizer to count tokens with.
        """
        if self.trainer is not None:
            watch(self.trainer)  # Earlier than the module does, so that a row that one process refuses ends all.
        self._take_encoder()
        needed: list[Role] = ["validation"] if self.has_validation else []
        if stage in ("fit", None) or (stage == "predict" and not self.has_validation):
            needed.insert(0, "training")
        if self.preferences is not None and stage in ("fit", None):
            needed.append("preferences")
        read_rows = self._rows([role for role in needed if role not in self._prompts])
        self._warn_of_shared_rows(read_rows)
        for role, rows in read_rows.items():
            source = self.source_of(role)
            name = f"{source.key}: {role} prompts of {source.name}"
            if isinstance(rows, Stream):
                self._prompts[role] = PromptStream(rows, self.encoding, name)
            else:
                self._prompts[role] = prompts = PromptDataset(rows, self.encoding, name, self._has_pairs(role))
                if role == "training" and len(prompts) < self.batching.size:
                    rank_zero_warn(
                        f"data.batch_size={self.batching.size} is more than the {len(prompts)} training prompts of "
                        f"{source.name}, so that each step sees only these"
                    )

    def _warn_of_shared_rows(self, rows: Mapping[Role, Sequence[LocatedRow] | Stream]) -> None:
        """Warn if a task makes up the same problems for training and validation."""
        training, validation = rows.get("training"), rows.get("validation")
        if self.validation_source is None or isinstance(training, Stream) or isinstance(validation, Stream):
            return
        names = self.source.name, self.validation_source.name
        if training is not None and validation is not None and all(name.startswith(PREFIX) for name in names):
            warn_of_shared_rows(names[0], training, names[1], validation)

    def require_validation(self) -> None:
        """Raise an error if there are no validation prompts.

        Raises:
            InputError: There are none.
        """
        if not self.has_validation:
            raise InputError(
                "there are no validation prompts: set data.validation_source, data.validation_split or "
                "data.validation_size"
            )

    def held_out(self) -> list[LocatedRow]:
        """Return the raw rows of the validation prompts, neither checked nor tokenized.

        Raises:
            InputError: There are no validation prompts.
        """
        self.require_validation()
        return list(self._rows(["validation"])["validation"])

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the training prompts, in a new order each epoch if `shuffle`."""
        return self.batching.for_training(self._prompts["training"], self._share(), lambda: position(self.trainer))

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Return a loader of the validation prompts in order, or an empty list if there are none."""
        return self.batching.in_order(self._prompts["validation"], self._share()) if self.has_validation else []

    def test_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Return the loader of the validation prompts: a test measures what a validation does."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the validation prompts in order, or of the training prompts if there are none."""
        role: Role = "validation" if self.has_validation else "training"
        return self.batching.in_order(self._prompts[role], self._share())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Put preference pairs into a training batch; Lightning calls it in front of each step."""
        is_training = getattr(self.trainer, "training", False)
        return self.with_preferences(batch, batches_done(self.trainer)) if is_training else batch  # type: ignore[arg-type]

    def with_preferences(self, batch: dict[str, Any], number: int, size: int | None = None) -> dict[str, Any]:
        """Return a training batch with its preference pairs under `preferences`.

        Args:
            batch: The batch, as the loader of training prompts gives it.
            number: Number of the batch in the run.
            size: Pairs beside the batch's prompts; None is `preferences_batch_size`.
        """
        if self.trains_on_pairs_alone:
            return {KEY: batch}
        pairs = self._prompts.get("preferences")
        if not isinstance(pairs, PromptDataset):
            return batch
        seed = self.batching.seed if self.batching.shuffle else None
        rows = rows_of_turn(len(pairs), size or self.preferences_batch_size, number, self._share(), seed)
        return {**batch, KEY: collate([pairs[row] for row in rows])}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the order of the training prompts depends on; the trainer holds the position in it."""
        prompts, pairs = self._prompts.get("training"), self._prompts.get("preferences")
        if prompts is None:
            return {}
        order = self.batching.identity(prompts, self._share())
        if isinstance(prompts, PromptStream):
            rows = {"max_prompts": self.limits["training"], "prompt_column": self.encoding.prompt_column}
            cut = {"max_prompt_tokens": self.encoding.max_tokens, "truncate": self.encoding.truncate}
            order["stream"] = {**self.source.identity(), **rows, **cut}
        if isinstance(pairs, PromptDataset):
            order["preferences"] = pairs.fingerprint()
            order["preferences_batch_size"] = self.preferences_batch_size
        return {"data": order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume with other training prompts, or in another order, than the checkpoint's run.

        Raises:
            InputError: A setting or the prompts differ.
        """
        prompts = self._prompts.get("training")
        if prompts is None or self.trainer is None or self.trainer.state.fn != "fit":
            return
        current = self.state_dict()
        if "stream" not in state_dict.get("data", {}):
            current["data"].pop("stream", None)  # Earlier versions did not record it.
        changed = differences(state_dict, current)
        if changed:
            raise InputError(
                f"ckpt_path: the checkpoint's run had another {', '.join(changed)}; its place among the prompts has no "
                f"meaning here. Resume with the settings and the data that it had"
            )

    def _take_encoder(self) -> None:
        encoder = getattr(getattr(self.trainer, "lightning_module", None), "prompt_encoder", None)
        if encoder is None and self.encoding.max_tokens is not None:
            raise InputError("data.max_prompt_tokens: the model has no tokenizer to count tokens with; remove it")
        if encoder != self.encoding.encoder:
            self.encoding = replace(self.encoding, encoder=encoder)
            self._prompts.clear()

    def _share(self) -> ProcessShard:
        return ProcessShard(**(getattr(self.trainer, "distributed_sampler_kwargs", None) or {}))

    def source_of(self, role: Role) -> Source:
        """Return the source of the prompts for a role.

        Args:
            role: `training`; `validation`, whose prompts may be held out of the same source; or `preferences`, the
                pairs beside the training prompts.
        """
        other = {"validation": self.validation_source, "preferences": self.preferences}.get(role)
        return self.source if other is None else other

    def _has_pairs(self, role: Role) -> bool:
        return role == "preferences" or (role == "training" and self.trains_on_pairs_alone)

    def _rows(self, roles: Sequence[Role]) -> dict[Role, Sequence[LocatedRow] | Stream]:
        found: dict[Role, Sequence[LocatedRow] | Stream] = {}
        held: dict[Role, Sequence[LocatedRow]] = {}
        if self.validation_size and not self.streaming and {"training", "validation"} & {*roles}:
            training, validation = hold_out(read(self.source), self.validation_size, self.batching.seed)
            held = {"training": training, "validation": validation}
        for role in roles:
            source, limit = self.source_of(role), self.limits[role]
            if self.streaming and role != "preferences":  # Those are taken from all over the file.
                found[role] = stream(source, limit)
            else:
                found[role] = first_rows(held[role] if role in held else read(source), limit)
        return found
