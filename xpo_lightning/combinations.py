"""Options that do not go together, refused before anything is loaded."""

from typing import Any, Protocol

from xpo_lightning.buffer.pairs import BufferOptions
from xpo_lightning.candidates import Candidates
from xpo_lightning.errors import InputError
from xpo_lightning.models import LoadedModel, LoRASpec, ModelSpec
from xpo_lightning.reference import ReferenceRefresh
from xpo_lightning.rewards.base import Feedback, Judge
from xpo_lightning.rollout.engine import RolloutEngine
from xpo_lightning.samplers import PreviousPolicySampler, Sampler


class Options(Protocol):
    """What is looked at; `XPOLightningModule` has it."""

    reward: Feedback
    sampler: Sampler
    candidates: Candidates
    missing_eos_penalty: float | None
    reference_cache: str | None
    reference_refresh: ReferenceRefresh | None
    buffer_options: BufferOptions | None
    rollout: RolloutEngine | None
    lora: LoRASpec | None
    policy_spec: ModelSpec | LoadedModel


def refuse_combinations(options: Options) -> None:
    """Refuse options of which one would make the other wrong, or without effect.

    Raises:
        InputError: There are such; the message names both.
    """
    judged, several = isinstance(options.reward, Judge), options.candidates.count > 1
    cached, refreshed = options.reference_cache is not None, options.reference_refresh is not None
    engine = None if options.rollout is None else f"model.rollout={type(options.rollout).__name__}"
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
            judged and several,
            f"model.candidates.count={options.candidates.count} needs scores to choose by, and {judge} is a judge, "
            f"which gives none; set the count to 1, or model.reward to a reward",
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
        (
            options.rollout is not None and options.rollout.needs_adapters and options.lora is None,
            f"{engine} has one server hold the reference, and load the policy as an adapter of it, and model.lora is "
            f"null; set model.lora, or model.rollout to null",
        ),
        (
            engine is not None and cached,
            f"{engine} has the reference's completions written with the policy's, and model.reference_cache keeps "
            f"those of the model at hand; set one of the two to null",
        ),
        (
            engine is not None and refreshed,
            f"{engine} has the reference be the server's base model, and model.reference_refresh changes the "
            f"reference; set one of the two to null",
        ),
        (
            engine is not None and isinstance(options.sampler, PreviousPolicySampler),
            f"{engine} knows the reference and the policy as it is, and model.sampler="
            f"{type(options.sampler).__name__} has an earlier one write; set one of the two to null",
        ),
    ]
    for is_refused, message in refused:
        if is_refused:
            raise InputError(message)


def refuse_own_steps(options: Any) -> None:
    """Refuse options that act through the module's own steps, where another module takes the steps.

    Args:
        options: An `XPOLightningModule`.

    Raises:
        InputError: There is one; the message names it.
    """
    inert = {
        "model.buffer": options.buffer_options is not None,
        "model.reference_cache": options.reference_cache is not None,
        "model.reference_refresh": options.reference_refresh is not None,
        "model.sampler=PreviousPolicySampler": isinstance(options.sampler, PreviousPolicySampler),
        "model.updates_per_rollout": options.plan.steps != 1,
    }
    for option, is_set in inert.items():
        if is_set:
            raise InputError(
                f"{option} acts through XPOLightningModule's own steps, and another module takes them; leave it out, "
                f"or derive from XPOLightningModule"
            )
