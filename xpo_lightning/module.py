"""`XPOLightningModule`: holds the policy, the reference and the reward; `steps.py` takes them through a batch."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from transformers import PreTrainedTokenizerBase

from xpo_lightning.buffer.pairs import Buffer, BufferOptions
from xpo_lightning.candidates import Candidates
from xpo_lightning.checkpoint import check_reference, check_trained_state, trained_state
from xpo_lightning.collector import Collector
from xpo_lightning.combinations import refuse_combinations
from xpo_lightning.environment import check_trainer
from xpo_lightning.errors import InputError
from xpo_lightning.forward.cpu import keep_memory, speed_up_linears
from xpo_lightning.guard.watch import watch
from xpo_lightning.losses import BonusTarget
from xpo_lightning.memory import Memory
from xpo_lightning.models import LoadedModel, LoRASpec, ModelSpec, check_loaded, end_token_ids, prompt_limit
from xpo_lightning.objective import Objective, ObjectiveTerms
from xpo_lightning.optimization import Optimization
from xpo_lightning.preference import LabelRule, check_penalty
from xpo_lightning.preference_losses import PreferenceLoss, SigmoidLoss
from xpo_lightning.prompts import PromptEncoder
from xpo_lightning.reference import Reference, ReferenceRefresh
from xpo_lightning.resume.standing import before_training, settle
from xpo_lightning.rewards.base import Feedback
from xpo_lightning.rollout.engine import RolloutEngine
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.opening import try_ways
from xpo_lightning.rollout.sampling import Sampling
from xpo_lightning.samplers import PreviousPolicySampler, ReferenceSampler, Sampler
from xpo_lightning.schedules import LearningRateShape, Schedule
from xpo_lightning.sharding import shard_all
from xpo_lightning.steps import PreferenceSteps
from xpo_lightning.updates import UpdatePlan
from xpo_lightning.verdicts import Verdicts


class XPOLightningModule(PreferenceSteps):
    """Exploratory Preference Optimization (Xie et al. 2024, arXiv 2405.21046, Algorithm 1) of a language model.

    For each prompt the policy and the frozen reference write a completion each, the reward says which is better, and
    the policy takes a step on the preference loss of the pair plus `alpha` times the log-probability of the
    reference's completion. `docs/configuration.md` shows each option at work.

    A batch is a mapping with `prompt`: B texts or chat conversations, and optionally `prompt_ids`: their token ids;
    its other entries, of length B, reach the reward as columns. A plain list of prompts will do as well.

    Args:
        policy: Which model to train, and how to load it. The reference starts as the same model.
        reward: Scores completions, or, being a judge, compares two.
        lora: Train low-rank adapters instead of every weight; the reference is then the policy without them.
        sampling: How completions are sampled. Log-probabilities in the loss are those of the models themselves,
            whatever is set here.
        sampler: Who writes the second completion of a pair while the policy trains; null is the reference.
        candidates: How many completions each side writes for a prompt, and which two become the pair.
        labels: How scores, or what a judge says, become labels.
        alpha: Weight of the exploration term: a number, one number an epoch, or a schedule. 0 is online DPO; below 0
            the reference's samples are imitated, a control.
        alpha_in_beta: Take alpha in units of beta: the weight is then alpha times beta.
        beta: Strength of the KL constraint: a number, one number an epoch, or a schedule.
        preference_loss: Loss of a labelled pair; `SigmoidLoss` (DPO's) where None.
        bonus_on: Whose log-probability the exploration term is on: that of the `sampler`'s completion, as in Algorithm
            1, the sum of `both`, or that of the `rejected` one.
        bonus_clip: Clips the log-ratio inside the exploration term to this many nats either way; null is off. The
            paper's experiments use 500.
        entropy_bonus: Weight of the mean entropy of the policy's next token along its own completions, in nats a token,
            which is maximised; 0 is off.
        missing_eos_penalty: What a completion that was cut at `max_new_tokens` loses in score; null is off.
        learning_rate: Peak learning rate of AdamW without weight decay; null is 5e-7. Not with `optimizer`.
        optimizer: Another optimizer, called with the trainable parameters.
        lr_schedule: How the learning rate falls to 0 after the warm-up: `linear`, `cosine`, or `constant`, not at all;
            null is linear. Not with `lr_scheduler`.
        warmup_ratio: Warm-up as a share of all optimizer steps.
        warmup_steps: Warm-up in optimizer steps, in place of `warmup_ratio`.
        lr_scheduler: Another scheduler, stepped after each optimizer step.
        max_grad_norm: Gradients are scaled down to this norm; null is off. In place of `trainer.gradient_clip_val`.
        micro_batch_size: Most pairs per forward and backward pass; null sets no limit. Changes memory and speed, not
            the result. In place of `trainer.accumulate_grad_batches`: the batch of the data module is what one rollout
            samples and one optimizer step sees.
        micro_batch_tokens: Most tokens per forward and backward pass, padding included; null sets no limit. Where both
            are null, the first step takes 8 pairs at a time; on a GPU it measures how many tokens fit in half of the
            memory that is free, and later steps take as many.
        rollout_batch_size: Most prompts sampled together; null is the whole batch, fewer on a CPU.
        rollout_graphs: On a GPU, replay each token's step as a CUDA graph, and keep the buffers for it; false saves
            their memory. Elsewhere nothing is replayed.
        rollout: Has a server write the completions, see `docs/vllm.md`; null samples in this process.
        reference_cache: Keeps the reference's completion of each training prompt, its log-probabilities and its score,
            and uses them again in later epochs, so that every epoch compares with the same completion of a prompt:
            `memory`, which a resumed run has from its checkpoint; or a folder, which later runs of the same reference,
            sampling and reward use as well, whatever their seed. All processes of a run know what each of them has
            kept. null samples anew each time, and validation and prediction always do.
        reference_refresh: Lets the reference follow the policy; null keeps it frozen, as in Algorithm 1.
        buffer: Keeps pairs for later updates, as Algorithm 1 does (step 5); null forgets them with their batch.
        updates_per_rollout: Optimizer steps that share one pass over a batch's pairs, or all that the buffer keeps.
        epochs_per_rollout: Passes over these pairs.
        max_skipped_steps: Optimizer steps in a row that may be left out because a score, a log-probability, the loss or
            the gradient is not finite; 0 stops the run at the first. Weights are never updated with such numbers.
    """

    strict_loading = False
    reference: Reference

    def __init__(
        self,
        policy: ModelSpec,
        reward: Feedback,
        lora: LoRASpec | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        sampler: Sampler | None = None,
        candidates: Candidates = Candidates(),  # noqa: B008
        labels: LabelRule = LabelRule(),  # noqa: B008
        # The schedule comes first, because of several types the parser gives the reason why the first did not fit.
        alpha: Schedule | float | list[float] = 1e-5,
        alpha_in_beta: bool = False,
        beta: Schedule | float | list[float] = 0.1,
        preference_loss: PreferenceLoss | None = None,
        bonus_on: BonusTarget = "sampler",
        bonus_clip: float | None = None,
        entropy_bonus: float = 0.0,
        missing_eos_penalty: float | None = None,
        learning_rate: float | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_schedule: LearningRateShape | None = None,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        rollout_batch_size: int | None = None,
        rollout_graphs: bool = True,
        rollout: RolloutEngine | None = None,
        reference_cache: str | None = None,
        reference_refresh: ReferenceRefresh | None = None,
        buffer: BufferOptions | None = None,
        updates_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_skipped_steps: int = 0,
    ) -> None:
        super().__init__(max_skipped_steps)
        self.policy_spec: ModelSpec | LoadedModel = policy
        self.lora, self.sampling, self.reward = lora, sampling, reward
        self.sampler, self.candidates, self.label_rule = sampler or ReferenceSampler(), candidates, labels
        terms = ObjectiveTerms(preference_loss or SigmoidLoss(), bonus_on, bonus_clip, entropy_bonus, alpha_in_beta)
        self.objective = Objective(alpha, beta, terms)
        self.optimization = Optimization(
            learning_rate, optimizer, lr_schedule, warmup_ratio, warmup_steps, lr_scheduler, max_grad_norm
        )
        self.rollout_batch_size, self.rollout_graphs, self.rollout = rollout_batch_size, rollout_graphs, rollout
        self.reference_cache = reference_cache
        self.reference_refresh, self.buffer_options = reference_refresh, buffer
        self.missing_eos_penalty = check_penalty(missing_eos_penalty)
        self.plan = UpdatePlan(micro_batch_size, micro_batch_tokens, updates_per_rollout, epochs_per_rollout)
        self._configured = False
        refuse_combinations(self)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded on first use."""
        return self.policy_spec.load_tokenizer()

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        """Tokenizes prompts, and knows how long they may be; data modules use it to check prompts before training."""
        limit = prompt_limit(self.policy_spec.load_config(), self.sampling.max_new_tokens)
        if self.rollout is not None:
            limit = self.rollout.prompt_limit(limit, self.sampling.max_new_tokens)
        return PromptEncoder(self.tokenizer, limit)

    def configure_model(self) -> None:
        """Load the policy, the reference and the reward; a second call does nothing."""
        if self._configured:
            return
        self._configured = True
        keep_memory()
        model = self.policy_spec.load_model()
        check_loaded(model, self.tokenizer, self.sampling.eos_token_ids)
        ends = end_token_ids(model, self.tokenizer, self.sampling.eos_token_ids)
        if self.missing_eos_penalty and not (ends or self.sampling.stop_strings):
            raise InputError("model.missing_eos_penalty is set, but model.sampling.eos_token_ids names no EOS token")
        self.policy = self._with_adapters(model)
        self.reference = Reference(self.policy, self.reference_refresh)
        self.memory = Memory(self.reference, self.sampler)
        self.reward.load()
        self.reward.set_check(self.guard.stop.check)
        rollout = LocalRollout(
            self.tokenizer,
            self.sampling,
            ends,
            self.rollout_batch_size,
            self.guard.stop.check,
            replays=self.rollout_graphs,
        )
        self.reference_identity = self.reference.identity(self.policy_spec)
        if self.device_mesh is not None:
            self._refuse_sharded()
            try_ways(*(model for model in (self.policy, self.reference.frozen) if model is not None))
            shard_all([self.policy, self.reference, self.reward], self.device_mesh)
        if self.rollout is not None:
            self.rollout.set_check(self.guard.stop.check)
            self.rollout.begin(rollout)
        verdicts = Verdicts(self.reward, self.missing_eos_penalty, self.timer)
        self.collect = Collector(
            rollout, self.memory, self.candidates, verdicts, self.label_rule, self.timer, self.rollout
        )
        speed_up_linears(self.policy, self.reference, self.reward)

    def _refuse_sharded(self) -> None:
        """Refuse options that need all of a policy's weights while they are spread over processes."""
        options = {
            "model.sampler=PreviousPolicySampler": isinstance(self.sampler, PreviousPolicySampler),
            "model.reference_refresh": self.reference_refresh is not None,
            "model.rollout": self.rollout is not None,
            "model.policy.quantize": getattr(self.policy_spec, "quantize", None) is not None,
        }
        for option, is_set in options.items():
            if is_set:
                raise InputError(
                    f"{option} needs the policy's weights whole, and trainer.strategy spreads them over processes; use "
                    f"ddp, or leave the option out"
                )

    def new_policy(self) -> nn.Module:
        """Build another model of the policy's kind, as it was before training."""
        return self._with_adapters(self.policy_spec.load_model())

    def _with_adapters(self, model: nn.Module) -> nn.Module:
        return model if self.lora is None else self.lora.wrap(model)

    def setup(self, stage: str) -> None:
        """Refuse trainer options that do not suit the module."""
        watch(self.trainer)
        check_trainer(self.trainer)
        self.run_state.seed = torch.initial_seed()

    def on_fit_start(self) -> None:
        """Open the cache of what the reference writes, and the buffer, and take note of the untrained policy."""
        self.sampler.begin(self.policy)
        self.reference.begin()
        with self._models_whole():
            self.collect.open_cache(self.reference_cache, self.reference_identity, self.trainer)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if self.buffer_options is not None:
            self.memory.buffer = Buffer(self.buffer_options, folder, self.global_rank)
        before_training(self.trainer, lambda: self.run_state.take_up(self.trainer, self.memory))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take a batch through the steps, and log how far an engine's log-probabilities were from those here."""
        super().training_step(batch, batch_idx)
        if self.rollout is not None:
            self.log_dict(self.rollout.measured, sync_dist=True)

    def on_predict_start(self) -> None:
        """Bring an engine the policy while all processes are here; each takes as many batches as it has."""
        super().on_predict_start()
        if self.rollout is not None:
            self.guard.run(partial(self.rollout.sync, self.policy))

    def teardown(self, stage: str) -> None:
        """Let an engine forget the policy."""
        if self.rollout is not None:
            self.rollout.close()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer of the trained weights and its learning-rate schedule."""
        optimizer, scheduler = self.optimization.build(self.trained_parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what a checkpoint holds of the models: the trained weights; inside of another module as well."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        kept = trained_state(state, self.policy, f"{prefix}policy.")
        for name in [name for name in state if name.startswith(prefix) and name not in kept]:
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which reference the weights were trained against, and all that a resumed run needs."""
        settle(checkpoint["loops"]["fit_loop"])
        checkpoint["xpo_reference"] = self.reference_identity
        optimization = self.optimization.identity(self.trained_parameters())
        checkpoint["xpo_run"] = self.run_state.state(self.trainer, self.memory, optimization)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or another reference."""
        self.configure_model()
        if "state_dict" in checkpoint:  # A strategy that spreads weights has loaded them itself.
            check_trained_state(checkpoint["state_dict"], self.state_dict())
        check_reference(checkpoint.get("xpo_reference"), self.reference_identity)
        if self._trainer is not None and self.trainer.state.fn == "fit" and "xpo_run" in checkpoint:
            optimization = self.optimization.identity(self.trained_parameters())
            self.run_state.load(checkpoint["xpo_run"], self.trainer, optimization)
