"""Chooses the exploration bonus, and refuses options that a bonus sampler or a loss does not go with."""

from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonus import Bonus
from xpo_lightning.losses.bonuses import BonusTarget, XPOBonus
from xpo_lightning.training.config_checks import Options, refuse_first


def choose_bonus(bonus: Bonus | None, bonus_on: BonusTarget | None) -> Bonus:
    """Return the exploration bonus of `model.bonus`, or of its short form `model.bonus_on`.

    Raises:
        InputError: Both are set, or `bonus_on` is no target of `XPOBonus`.
    """
    if bonus is not None and bonus_on is not None:
        raise InputError(
            f"model.bonus_on={bonus_on} is the target of XPOBonus, and model.bonus is {type(bonus).__name__}; leave "
            f"bonus_on out, or bonus"
        )
    return bonus or XPOBonus(bonus_on or "sampler")


def refuse_with_bonus_sampler(options: Options) -> None:
    """Refuse options that a bonus sampler does not go with.

    Raises:
        InputError: Two options exclude each other; the message names both.
    """
    third = options.bonus_sampler
    if third is None:
        return
    bonus, named = options.objective.bonus, f"model.bonus_sampler={type(third).__name__}"
    refused = [
        (
            third.writes_both,
            f"{named} writes both completions of a pair, and the exploration term wants a single one; take another",
        ),
        (
            not bonus.uses_sample,
            f"{named} writes a completion for the exploration term, and {type(bonus).__name__} is on completions of "
            f"the pair; set bonus_sampler to null, or take another model.bonus or model.bonus_on",
        ),
        (
            third.is_reference and options.reference_cache is not None,
            f"model.reference_cache has the reference write each prompt once, and {named} wants another completion of "
            f"it; set one of the two to null",
        ),
        (
            options.rollout is not None,
            f"{named} writes with the models of this process, and model.rollout has a server write; set one of the two "
            f"to null",
        ),
    ]
    refuse_first(refused)


def refuse_with_previous(options: Options) -> None:
    """Refuse options that a loss on the log-probabilities of the policy that wrote the pair does not go with.

    Raises:
        InputError: Two options exclude each other; the message names both.
    """
    if not options.objective.preference_loss.needs_previous:
        return
    named = f"model.preference_loss={type(options.objective.preference_loss).__name__}"
    if not options.sampler.is_policy:
        raise InputError(
            f"{named} compares with the policy that wrote both completions, and model.sampler="
            f"{type(options.sampler).__name__} has another write the second; set model.sampler to PolicySampler"
        )
    if options.rollout is not None:
        raise InputError(
            f"{named} needs the policy's log-probabilities from when it wrote, and model.rollout has a server write; "
            f"set model.rollout to null"
        )
