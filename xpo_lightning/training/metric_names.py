"""Names of the metrics of a run, to find a mistyped `monitor` before training."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from xpo_lightning.core.errors import InputError

_OF_PAIRS = {
    *("loss/total", "loss/dpo", "loss/xpo", "objective/kl", "objective/kl_stderr", "objective/entropy"),
    *("objective/model_scores", "objective/ref_scores", "objective/scores_margin", "objective/rlhf_reward"),
    *("objective/token_entropy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logps/reference_completions", "val/model_contain_eos_token"),
    *("val/ref_contain_eos_token", "completions/model_length", "completions/ref_length", "pairs/tied"),
    *("pairs/comparisons", "pairs/identical", "pairs/silent", "pairs/truncated", "pairs/unanswered"),
    *("win_rate", "win_rate_stderr"),
}
_OF_STEPS = {
    *("alpha", "beta", "lr", "grad_norm", "skipped_steps", "step", "epoch", "rollout/logp_drift"),
    *("rollout/policy_logp_drift", "rollout/staleness", "throughput/prompts_per_second", "time/step"),
    *("throughput/tokens_per_second", "time/reference_rollout", "time/policy_rollout", "time/reference_scoring"),
    *("time/reward", "time/policy_forward", "time/backward", "time/optimizer"),
}
METRICS = _OF_PAIRS | _OF_STEPS | {f"eval/{name}" for name in _OF_PAIRS}
"""Every name under which something may be logged; docs/metrics.md says what each is."""


def check_monitors(callbacks: Iterable[Any]) -> None:
    """Refuse a callback that watches a metric which no run has, unless another part of the run may log it.

    A callback of neither this package nor Lightning may log anything, and then only a name much like one of ours is
    taken for a mistake.

    Raises:
        InputError: The name is not known.
    """
    callbacks = list(callbacks)
    may_log = [one for one in callbacks if type(one).__module__.partition(".")[0] not in ("xpo_lightning", "lightning")]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in METRICS:
            continue
        (hint, *_) = [*(f"; did you mean '{name}'?" for name in get_close_matches(monitor, METRICS, 1, 0.8)), ""]
        if hint or not may_log:
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__}.monitor is '{monitor}', which no run logs"
                f"{hint or '; docs/metrics.md has the names, for example eval/win_rate'}"
            )
