"""Refuses unsupported combinations of options of the trainer and the module, before anything is loaded."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonuses import XPOBonus
from xpo_lightning.losses.schedules import FIRST_STEP
from xpo_lightning.models.policy import LoadedModel, LoRASpec, ModelSpec
from xpo_lightning.models.reference import ReferenceRefresh
from xpo_lightning.rewards.base import Feedback, Judge
from xpo_lightning.rewards.labels import LabelRule
from xpo_lightning.rollout.engine import RolloutEngine
from xpo_lightning.rollout.pair_selection import Candidates
from xpo_lightning.rollout.samplers import MixtureSampler, Sampler
from xpo_lightning.training.metric_names import check_monitors
from xpo_lightning.training.objective import Objective
from xpo_lightning.training.replay_buffer.buffer import BufferOptions
from xpo_lightning.training.update_plan import UpdatePlan

INERT_OPTIONS = {
    "gradient_clip_val": (None, "model.max_grad_norm"),
    "gradient_clip_algorithm": (None, "model.max_grad_norm (gradients are clipped by norm)"),
    "accumulate_grad_batches": (1, "data.batch_size (prompts an optimizer step) and model.micro_batch_size"),
}
"""Options of the trainer that have no effect with this module: their value then, and what to set instead."""


def refuse_inert_options(options: Mapping[str, Any]) -> None:
    """Refuse options of the trainer that would have no effect.

    Raises:
        InputError: One of them is set; the message names what to set instead.
    """
    for name, (default, instead) in INERT_OPTIONS.items():
        if options.get(name) not in (None, default):
            raise InputError(f"trainer.{name} has no effect here; set {instead} instead")


def check_trainer(trainer: Trainer) -> None:
    """Refuse unsupported trainer options, and silence Lightning's warnings about what the module does on purpose.

    Raises:
        InputError: `trainer.precision` would convert the reward's weights as well, or a checkpoint callback has an
            option that it would ignore, or the strategy is one that cannot be used.
    """
    refuse_strategy(type(trainer.strategy).__name__)
    if trainer.precision not in ("32-true", "bf16-mixed"):
        raise InputError(
            f"trainer.precision={trainer.precision} is not supported; use 32-true or bf16-mixed, and "
            f"model.policy.dtype for the type of the weights (other settings would convert the reward as well)"
        )
    if trainer.state.fn == TrainerFn.FITTING:
        lengths = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
        for name in (name for name, length in lengths.items() if length == 0):
            raise InputError(f"trainer.{name}=0 trains nothing; give a number, or -1 for no limit")
        check_monitors(trainer.callbacks)  # type: ignore[attr-defined]
    for callback in trainer.checkpoint_callbacks:
        if type(callback) is ModelCheckpoint and callback._train_time_interval is not None:
            raise InputError(
                "trainer.callbacks: Lightning's ModelCheckpoint ignores train_time_interval where a module takes its "
                "optimizer steps itself, as this one does; use RunCheckpoint, which has the same options"
            )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise InputError(
            "trainer.callbacks: StochasticWeightAveraging copies the module before its models are loaded, and so would "
            "average nothing; use EMAWeightAveraging, or remove it"
        )
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


def refuse_strategy(name: str) -> None:
    """Refuse a strategy that shards weights in a way that the module cannot gather for rollouts.

    Args:
        name: The value or the class of `trainer.strategy`.

    Raises:
        InputError: It is DeepSpeed, or Lightning's own FSDP.
    """
    plain = name.rpartition(".")[2].lower()
    if plain.startswith(("deepspeed", "fsdp")) and plain != "fsdp2strategy":
        raise InputError(
            f"trainer.strategy={name} is not supported: rollouts need whole weights, which this package gathers under "
            f"FSDP2 alone; use FSDP2Strategy, or ddp where a model fits on each device"
        )


class Options(Protocol):
    """The options that are checked; `XPOLightningModule` has them."""

    reward: Feedback
    objective: Objective
    sampler: Sampler
    bonus_sampler: Sampler | None
    candidates: Candidates
    label_rule: LabelRule
    missing_eos_penalty: float | None
    reference_cache: str | None
    reference_refresh: ReferenceRefresh | None
    buffer_options: BufferOptions | None
    rollout: RolloutEngine | None
    plan: UpdatePlan
    lora: LoRASpec | None
    policy_spec: ModelSpec | LoadedModel


def warn_of_weights(objective: Objective) -> None:
    """Warn of an alpha with which the preferences hardly count at the first step."""
    weights = objective.weights(FIRST_STEP)
    if isinstance(objective.bonus, XPOBonus) and abs(weights["alpha"]) > weights["beta"]:
        rank_zero_warn(
            f"model.alpha={weights['alpha']:g} is more than model.beta={weights['beta']:g}: the exploration term then "
            f"pulls at each completion harder than any preference can; shipped recipes have 1e-5"
        )


def warn_of_earlier_samples(options: Options) -> None:
    """Warn of a bonus that pushes down what a policy of many batches ago wrote, which nothing then holds up."""
    bonus, rollout = options.objective.bonus, options.rollout
    own = isinstance(bonus, XPOBonus) and (bonus.target != "sampler" or options.sampler.is_policy)
    if own and rollout is not None and rollout.sync_every > 1 and options.objective.weights(FIRST_STEP)["alpha"] > 0:
        rank_zero_warn(
            f"model.rollout has sync_every={rollout.sync_every}, and the bonus is on completions of the policy: of an "
            f"earlier one then, whose probability falls without end. At 10 and an alpha of 0.05 beta, a small language "
            f"model fell apart (docs/exploration_language_models.md); set it to 1, or model.alpha to 0"
        )


def refuse_several_loaders(trainer: Trainer) -> None:
    """Refuse several loaders of held-out prompts: a module measures one set of them.

    Raises:
        InputError: There are several.
    """
    found = {
        TrainerFn.TESTING: trainer.test_dataloaders,
        TrainerFn.PREDICTING: trainer.predict_dataloaders,
    }.get(trainer.state.fn or TrainerFn.FITTING, trainer.val_dataloaders)
    if isinstance(found, list | tuple | dict) and len(found) > 1:
        raise InputError(
            f"the trainer was given {len(found)} loaders of held-out prompts, and XPOLightningModule measures one set; "
            f"put them into one (torch.utils.data.ConcatDataset), or call the trainer once for each"
        )


def refuse_combinations(options: Options) -> None:
    """Refuse pairs of options where one would make the other wrong or ineffective.

    Raises:
        InputError: Two options exclude each other; the message names both.
    """
    judged, several = isinstance(options.reward, Judge), options.candidates.count > 1
    cached, refreshed = options.reference_cache is not None, options.reference_refresh is not None
    judge = f"model.reward={type(options.reward).__name__}"
    quantized = getattr(options.policy_spec, "quantize", None)
    refused = [
        (
            quantized is not None and options.lora is None,
            f"model.policy.quantize={quantized} keeps the policy's weights as they are, so that there is nothing to "
            f"train without model.lora; set model.lora, or quantize to null",
        ),
        (
            judged and bool(options.missing_eos_penalty),
            f"model.missing_eos_penalty is taken from scores, and {judge} is a judge, which gives none; set the "
            f"penalty to null, or model.reward to a reward",
        ),
        (
            cached and judged,
            f"model.reference_cache keeps scores of the reference's completions, and {judge} is a judge, which gives "
            f"none; set the cache to null, or model.reward to a reward",
        ),
        (
            cached and options.reward.depends_on_batch,
            f"model.reference_cache keeps scores, and those of {judge} depend on the batch (normalize: batch); set one "
            f"of the two to null or none",
        ),
        (
            cached and not options.sampler.is_reference,
            f"model.reference_cache keeps what the reference writes, and with model.sampler="
            f"{type(options.sampler).__name__} it writes nothing; set one of the two to null",
        ),
        (
            cached and several,
            f"model.reference_cache keeps one completion a prompt, and model.candidates.count is "
            f"{options.candidates.count}; set the cache to null, or the count to 1",
        ),
        (
            cached and refreshed,
            "model.reference_cache keeps what the reference writes, and model.reference_refresh changes the reference; "
            "set one of the two to null",
        ),
        (
            refreshed and options.buffer_options is not None,
            "model.buffer keeps the reference's log-probabilities, and model.reference_refresh changes the reference; "
            "set one of the two to null",
        ),
    ]
    refuse_first([*_of_judging(options, judge), *_of_policy_gradient(options), *refused])
    if options.rollout is not None:
        _refuse_with_engine(options, options.rollout)


def _refuse_with_engine(options: Options, rollout: RolloutEngine) -> None:
    """Refuse options that do not go with an engine.

    Raises:
        InputError: Such an option is set; the message names both.
    """
    engine = f"model.rollout={type(rollout).__name__}"
    refused = [
        (
            rollout.needs_adapters and options.lora is None,
            f"{engine} has one server hold the reference, and load the policy as an adapter of it, and model.lora is "
            f"null; set model.lora, model.rollout.init_args.weights to full, or model.rollout to null",
        ),
        (
            not rollout.takes_adapters and options.lora is not None,
            f"{engine} sends all weights (weights: full), and model.lora trains adapters alone; set "
            f"model.rollout.init_args.weights to adapter, or model.lora to null",
        ),
        (
            rollout.has_reference and options.reference_cache is not None,
            f"{engine} has the reference's completions written with the policy's, and model.reference_cache keeps "
            f"those of the model at hand; set one of the two to null",
        ),
        (
            rollout.has_reference and options.reference_refresh is not None,
            f"{engine} has the reference be the server's base model, and model.reference_refresh changes the "
            f"reference; set one of the two to null",
        ),
        (
            options.sampler.kept_policies > 0,
            f"{engine} knows the reference and the policy as it is, and model.sampler="
            f"{type(options.sampler).__name__} has an earlier one write; set one of the two to null",
        ),
        (
            options.sampler.writes_both,
            f"{engine} writes the policy's side of each pair, and so does model.sampler="
            f"{type(options.sampler).__name__}; set model.rollout to null, or take another sampler",
        ),
    ]
    refuse_first(refused)


def _of_policy_gradient(options: Options) -> list[tuple[bool, str]]:
    """Return what a policy gradient excludes: all by which another than the policy, as it is, wrote its completion."""
    loss, rollout = options.objective.preference_loss, options.rollout
    others = {
        f"model.sampler={type(options.sampler).__name__} writes another in its place": options.sampler.writes_both,
        "model.buffer keeps those of earlier policies": options.buffer_options is not None,
        "model.updates_per_rollout and model.epochs_per_rollout change the policy between its updates": (
            options.plan.step_count > 1
        ),
        "model.rollout has it written behind the policy (sync_every, ahead)": (
            rollout is not None and (rollout.sync_every > 1 or rollout.ahead > 0)
        ),
    }
    return [
        (
            loss.is_policy_gradient and is_set,
            f"model.preference_loss={type(loss).__name__} is a policy gradient on the policy's own completion, and "
            f"{what}; take another loss, or leave that option out",
        )
        for what, is_set in others.items()
    ]


def _of_judging(options: Options, judge: str) -> list[tuple[bool, str]]:
    """Return the conditions under which several candidates and the reward or judge exclude each other."""
    judged, candidates = isinstance(options.reward, Judge), options.candidates
    return [
        (
            judged and candidates.count > 1 and candidates.judging is None,
            f"model.candidates.count={candidates.count} needs scores to choose by, and {judge} is a judge, which gives "
            f"none; set model.candidates.judging to tournament or all_pairs, or the count to 1",
        ),
        (
            not judged and candidates.judging is not None,
            f"model.candidates.judging={candidates.judging} is for a judge, and {judge} gives scores to choose by; set "
            f"judging to null",
        ),
    ]


def refuse_first(refused: Iterable[tuple[bool, str]]) -> None:
    """Raise the first message whose condition holds.

    Args:
        refused: Conditions, each with its message.

    Raises:
        InputError: A condition holds.
    """
    for is_refused, message in refused:
        if is_refused:
            raise InputError(message)


def refuse_sharding(options: Options, *, offloads: bool) -> None:
    """Refuse options that need an unsharded policy, in a run that shards it.

    Args:
        options: The options of the module.
        offloads: Whether the reference is to be offloaded to main memory.

    Raises:
        InputError: Such an option is set; the message names it.
    """
    engine = options.rollout
    whole = {
        f"model.sampler={type(options.sampler).__name__}": options.sampler.kept_policies > 0,
        "model.bonus_sampler": options.bonus_sampler is not None,
        f"model.bonus={type(options.objective.bonus).__name__}": options.objective.bonus.learns,
        "model.reference_refresh": options.reference_refresh is not None,
        "model.rollout.init_args.sync_every": engine is not None and engine.sync_every > 1,
        "model.rollout.init_args.ahead": engine is not None and engine.ahead > 0,
        "model.policy.quantize": getattr(options.policy_spec, "quantize", None) is not None,
    }
    refused = [
        (
            offloads and options.lora is not None,
            "trainer.strategy.init_args.offload_reference moves the reference's own weights to main memory, and with "
            "model.lora it has none: it is the policy without adapters; leave one of the two out",
        ),
        *(
            (
                is_set,
                f"{option} needs the policy's weights whole, and trainer.strategy spreads them over processes; use "
                f"ddp, or leave the option out",
            )
            for option, is_set in whole.items()
        ),
        (
            engine is not None and not engine.has_reference,
            f"model.rollout={type(engine).__name__} leaves it to this process to write the reference's completions, "
            f"and trainer.strategy spreads the reference over processes, which would exchange all of its layers for "
            f"each token; have a server write them (model.rollout.init_args.reference_url), or use ddp",
        ),
        (
            engine is not None and isinstance(options.sampler, MixtureSampler),
            "model.sampler=MixtureSampler writes with the models of this process, and trainer.strategy spreads them "
            "over processes, which would exchange all layers for each token; take another sampler, or set "
            "model.rollout to null",
        ),
    ]
    refuse_first(refused)


def refuse_own_steps(options: Any) -> None:
    """Refuse options that only `XPOLightningModule`'s own steps implement, if another module takes the steps.

    Args:
        options: An `XPOLightningModule`.

    Raises:
        InputError: Such an option is set; the message names it.
    """
    third = options.bonus_sampler
    inert = {
        "model.buffer": options.buffer_options is not None,
        "model.reference_cache": options.reference_cache is not None,
        "model.reference_refresh": options.reference_refresh is not None,
        f"model.sampler={type(options.sampler).__name__}": options.sampler.kept_policies > 0,
        f"model.bonus_sampler={type(third).__name__}": third is not None and third.kept_policies > 0,
        f"model.bonus={type(options.objective.bonus).__name__}": options.objective.bonus.learns,
        "model.rollout.init_args.ahead": options.rollout is not None and options.rollout.ahead > 0,
        "model.updates_per_rollout": options.plan.step_count != 1,
    }
    for option, is_set in inert.items():
        if is_set:
            raise InputError(
                f"{option} acts through XPOLightningModule's own steps, and another module takes them; leave it out, "
                f"or derive from XPOLightningModule"
            )
