"""Where TRL's step spends its time: its methods wrapped from outside, so that what it computes stays as shipped."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationMixin, TrainerCallback
from trl.experimental.xpo import XPOTrainer, xpo_trainer

from benchmarks.speed.measuring import finish_device_work


class StepTimer(TrainerCallback):
    """Seconds of one optimizer step, from its first micro-batch to the end of `optimizer.step`, and of its phases."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.wall_seconds = 0.0
        self._step_begun = self._update_begun = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to a phase."""
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def begin_update(self) -> None:
        """Note that gradients are complete: clipping comes next."""
        self._update_begun = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock; TRL's data are loaded by then, ours are given."""
        self._step_begun = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        finish_device_work()
        now = time.perf_counter()
        self.seconds["optimizer"] += now - self._update_begun
        self.wall_seconds = now - self._step_begun


def watch(trainer: XPOTrainer, timer: StepTimer, lengths: set[int]) -> None:
    """Time a trainer's phases, and let no completion end early.

    Args:
        trainer: The trainer.
        timer: Takes the seconds.
        lengths: Takes the lengths of the completions, in tokens.
    """
    trainer.add_callback(timer)
    _watch_rollouts(trainer, timer, lengths)
    _watch_logprobs(trainer, timer)
    trainer._compute_rewards = _timed(trainer._compute_rewards, timer, "reward")
    trainer.accelerator.backward = _timed(trainer.accelerator.backward, timer, "backward")
    clip = trainer._clip_grad_norm

    def clip_after_mark(model: Any) -> Any:
        timer.begin_update()
        return clip(model)

    trainer._clip_grad_norm = clip_after_mark


def _timed(function: Callable[..., Any], timer: StepTimer, name: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with timer.phase(name):
            return function(*args, **kwargs)

    return wrapped


def _watch_rollouts(trainer: XPOTrainer, timer: StepTimer, lengths: set[int]) -> None:
    """Time the two calls of `generate` in TRL's `_generate_completions`: the policy's first, then the reference's."""
    collect, generate = trainer._generate_completions, GenerationMixin.generate
    left: list[str] = []

    def generate_timed(model: Any, *args: Any, **kwargs: Any) -> Any:
        # The trainer and `generate` both fill in the tokenizer's EOS again, so it goes at the last moment.
        kwargs["generation_config"].eos_token_id = model.generation_config.eos_token_id = None
        with timer.phase(left.pop(0)):
            output = generate(model, *args, **kwargs)
        lengths.add(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    def collect_timed(prompts: Any, model: Any) -> Any:
        left[:] = ["policy_rollout", "reference_rollout"]
        return collect(prompts, model)

    GenerationMixin.generate = generate_timed
    trainer._generate_completions = collect_timed


def _watch_logprobs(trainer: XPOTrainer, timer: StepTimer) -> None:
    """Time the four forward passes of TRL's `_compute_logprobs`: two of the policy, then two of the reference."""
    compute, softmax = trainer._compute_logprobs, xpo_trainer.selective_log_softmax
    ends: list[float] = []

    def softmax_marked(*args: Any, **kwargs: Any) -> Any:
        output = softmax(*args, **kwargs)
        ends.append(time.perf_counter())
        return output

    def compute_timed(*args: Any, **kwargs: Any) -> Any:
        ends.clear()
        begun = time.perf_counter()
        output = compute(*args, **kwargs)
        timer.seconds["policy_forward"] += ends[1] - begun
        timer.seconds["reference_scoring"] += ends[3] - ends[1]
        return output

    xpo_trainer.selective_log_softmax = softmax_marked
    trainer._compute_logprobs = compute_timed
