"""`PolicyWatch`: warns when KL, completion length or repetition leave a sane range."""

from statistics import mean
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from xpo_lightning.callbacks.base import FileWriter, is_fast_dev_run, print_line
from xpo_lightning.checkpointing.io import is_remote
from xpo_lightning.core.batch import Completions, Experience
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.run_events import record_event

NGRAM = 4
HASH_FACTOR = 0x5851F42D4C957F2D
PADDING = torch.iinfo(torch.long).max


class PolicyWatch(FileWriter):
    """Warns when the policy leaves a sane range: its KL, the length of its completions, their repetition.

    Each is a mean over the last `window` logged steps. A warning is printed, and recorded in `events.jsonl`, which the
    report shows; another one of the same kind follows only after the mean was back in its range.

    Args:
        max_kl: Warn above this KL from the reference, in nats a completion; null never warns.
        max_length_ratio: Warn if the policy's completions are this many times as long as the reference's, or the
            reference's this many times as long as the policy's; null never warns.
        max_repetition: Warn if more than this share of the sequences of four tokens in the policy's completions repeat
            an earlier one of the same completion; null never warns.
        stop_at_kl: End the run above this KL, as if `max_steps` had been reached; null never does.
        window: Logged steps that a mean is taken over; nothing is judged before there are as many.
    """

    def __init__(
        self,
        max_kl: float | None = 50.0,
        max_length_ratio: float | None = 3.0,
        max_repetition: float | None = 0.5,
        stop_at_kl: float | None = None,
        window: int = 5,
    ) -> None:
        super().__init__()
        key = "trainer.callbacks: PolicyWatch"
        check_range(f"{key}.max_kl", max_kl, above=0, or_null=True)
        check_range(f"{key}.max_length_ratio", max_length_ratio, least=1, or_null=True)
        check_range(f"{key}.max_repetition", max_repetition, least=0, most=1, or_null=True)
        check_range(f"{key}.stop_at_kl", stop_at_kl, above=0, or_null=True)
        check_range(f"{key}.window", window, least=1)
        self.max_kl, self.max_length_ratio, self.max_repetition = max_kl, max_length_ratio, max_repetition
        self.stop_at_kl, self.window = stop_at_kl, window
        self._seen: list[list[float]] = []
        self._outside: list[str] = []
        self._completions: Completions | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the values in the window, and which means are out of their range."""
        return {"seen": self._seen, "outside": self._outside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values in the window, and which means are out of their range."""
        self._seen, self._outside = state_dict["seen"], state_dict["outside"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run; a resumed one keeps what its checkpoint had."""
        if trainer.global_step == 0:
            self._seen, self._outside = [], []

    def on_pairs_collected(self, trainer: Trainer, pl_module: LightningModule, experience: Experience) -> None:
        """Keep the policy's completions until the end of the batch."""
        self._completions = experience.completions.by_policy

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the means at each logged step that was not skipped."""
        completions, self._completions = self._completions, None
        metrics = trainer.callback_metrics if trainer._logger_connector.should_update_logs else {}
        if completions is None or not outputs or "objective/kl" not in metrics:  # No output: no step was taken.
            return
        ratio = float(metrics["completions/model_length"]) / float(metrics["completions/ref_length"])
        self._seen = [*self._seen, [float(metrics["objective/kl"]), ratio, float(repetition(completions))]][
            -self.window :
        ]
        if len(self._seen) < self.window:
            return
        kl, ratio, share = map(mean, zip(*self._seen, strict=True))
        self._judge(trainer, "max_kl", kl, f"the KL from the reference is {kl:.1f} nats a completion")
        lengths = f"the policy's completions are {ratio:.2f} times as long as the reference's"
        self._judge(trainer, "max_length_ratio", max(ratio, 1 / ratio), lengths)
        repeats = f"{share:.0%} of the policy's sequences of {NGRAM} tokens repeat an earlier one"
        self._judge(trainer, "max_repetition", share, repeats)
        if self.stop_at_kl is not None and kl > self.stop_at_kl:
            self._report(trainer, f"Stopped: the KL from the reference, {kl:.1f} nats, is above {self.stop_at_kl:g}")
            trainer.should_stop = True

    def _judge(self, trainer: Trainer, limit: str, value: float, text: str) -> None:
        """Warn if a mean has left its range since the last time."""
        most = getattr(self, limit)
        is_outside = most is not None and value > most
        if is_outside and limit not in self._outside:
            self._report(trainer, f"Warning: {text} (PolicyWatch.{limit}: {most:g})")
        self._outside = [name for name in self._outside if name != limit] + [limit] * is_outside

    def _report(self, trainer: Trainer, text: str) -> None:
        """Print a line and record it; a full disk must not end a run for this."""
        if not trainer.is_global_zero:
            return
        print_line(f"Step {trainer.global_step}: {text}")
        if is_fast_dev_run(trainer) or is_remote(str(self.folder)):
            return
        try:
            record_event(self.folder, trainer.global_step, text)
        except InputError as error:
            print_line(str(error))


def repetition(completions: Completions) -> Tensor:
    """Return the share of sequences of four tokens that repeat an earlier one of their completion; 0 if there are none.

    Args:
        completions: B completions.

    Returns:
        A scalar on the completions' device: all repeats of the batch by all of its sequences.
    """
    hashed = torch.zeros_like(completions.ids[:, NGRAM - 1 :])  # (B, T - 3)
    for ids in completions.ids.unfold(1, NGRAM, 1).unbind(2) if hashed.numel() else ():
        hashed = hashed * HASH_FACTOR + ids  # wraps around
    is_real = completions.mask[:, NGRAM - 1 :]
    ordered = hashed.masked_fill(~is_real, PADDING).sort(1).values
    repeats = (ordered.diff(dim=1) == 0) & (ordered[:, 1:] != PADDING)
    return repeats.sum() / is_real.sum().clamp(min=1)
