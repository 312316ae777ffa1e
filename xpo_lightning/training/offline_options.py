"""Refuses options that do not go with preference pairs that are trained on as they are, or with a missing reward."""

from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonuses import XPOBonus
from xpo_lightning.losses.schedules import Constant
from xpo_lightning.rewards.labels import LabelRule
from xpo_lightning.rewards.no_reward import is_missing
from xpo_lightning.training.config_checks import Options, refuse_first
from xpo_lightning.training.objective import DEFAULT_ALPHA


def refuse_without_reward(options: Options) -> None:
    """Refuse a penalty on scores in a module without a reward.

    Raises:
        InputError: `model.missing_eos_penalty` is set.
    """
    if is_missing(options.reward) and options.missing_eos_penalty:
        raise InputError(
            "model.missing_eos_penalty is taken from scores, and model.reward is null, so that there are none; set the "
            "penalty to null, or give a reward"
        )


def refuse_with_preferences(options: Options, *, alone: bool) -> None:
    """Refuse options that do not go with preference pairs that are trained on as they are.

    Args:
        options: The options of the module.
        alone: Whether there is nothing else to train on, so that options of sampled completions would do nothing.

    Raises:
        InputError: Such an option is set; the message names it.
    """
    loss, bonus = options.objective.preference_loss, options.objective.bonus
    if loss.needs_previous or loss.is_policy_gradient:
        raise InputError(
            f"model.preference_loss={type(loss).__name__} is about completions that the policy wrote, and those of "
            f"data.preferences were written by others; take another loss"
        )
    inert = {
        f"model.sampler={type(options.sampler).__name__}": not options.sampler.is_reference,
        "model.candidates": options.candidates.count > 1,
        "model.bonus_sampler": options.bonus_sampler is not None,
        f"model.bonus={type(bonus).__name__}": not isinstance(bonus, XPOBonus) or bonus.target != "sampler",
        "model.bonus_clip": options.objective.bonus_clip is not None,
        "model.entropy_bonus": options.objective.entropy_bonus > 0,
        "model.reference_cache": options.reference_cache is not None,
    }
    if is_missing(options.reward):  # Otherwise validation samples, scores and labels.
        alpha, in_beta = options.objective.alpha, options.objective.alpha_in_beta
        is_default = isinstance(alpha, Constant) and alpha.value in (0, DEFAULT_ALPHA)
        inert |= {
            "model.labels": options.label_rule != LabelRule(),
            "model.alpha": not is_default,
            "model.alpha_in_beta": in_beta,
        }
    refuse_first(
        (
            alone and is_set,
            f"{option} is about completions that the run samples, and it trains on data.preferences alone; leave it "
            f"out, or give prompts in data.source",
        )
        for option, is_set in inert.items()
    )
