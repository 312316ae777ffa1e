"""`XPOLightningModule`: holds the policy, the reference and the reward, and takes them through a step."""

from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from xpo_lightning.batch import Experience
from xpo_lightning.checkpoint import check_reference, check_trained_state, trained_state
from xpo_lightning.collector import Collector
from xpo_lightning.cpu import keep_memory, speed_up_linears
from xpo_lightning.environment import check_trainer
from xpo_lightning.errors import InputError
from xpo_lightning.gradient import add_gradients
from xpo_lightning.guard import Guard, check_rollout
from xpo_lightning.losses import PreferenceLoss
from xpo_lightning.metrics import PairAverages
from xpo_lightning.models import LoadedModel, LoRASpec, ModelSpec, check_loaded, end_token_ids, prompt_limit
from xpo_lightning.objective import Objective
from xpo_lightning.optimization import Optimization, UpdatePlan, WarmupThenDecay, total_steps
from xpo_lightning.phases import PhaseTimer
from xpo_lightning.preference import check_penalty
from xpo_lightning.prompts import PromptEncoder, as_prompts
from xpo_lightning.reference import Reference
from xpo_lightning.resume import RunState
from xpo_lightning.rewards.base import Reward
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.noise import Noise
from xpo_lightning.rollout.sampling import Sampling
from xpo_lightning.schedules import FIRST_STEP, LearningRateShape, Progress, Schedule
from xpo_lightning.standing import batches_done, before_training, begin_batch, forget_logged, has_begun, settle


class XPOLightningModule(LightningModule):
    """Exploratory Preference Optimization (Xie et al. 2024, arXiv 2405.21046, Algorithm 1) of a language model.

    For each prompt the policy and the frozen reference write a completion each, the reward says which is better, and
    the policy takes a step on the preference loss of the pair plus `alpha` times the log-probability of the
    reference's completion.

    A batch is a mapping with `prompt`: B texts or chat conversations, and optionally `prompt_ids`: their token ids;
    its other entries, of length B, reach the reward as columns. A plain list of prompts will do as well.

    Args:
        policy: Which model to train, and how to load it. The reference starts as the same model.
        reward: Scores completions.
        lora: Train low-rank adapters instead of every weight; the reference is then the policy without them.
        sampling: How both models sample completions. Log-probabilities in the loss are those of the models themselves,
            whatever is set here.
        alpha: Weight of the exploration term: a number, one number an epoch, or a schedule over steps. 0 is online DPO;
            below 0 the reference's samples are imitated, a control.
        beta: Strength of the KL constraint: a number, one number an epoch, or a schedule over steps.
        preference_loss: Loss of a labelled pair; `SigmoidLoss` (DPO's) where None.
        bonus_clip: Clips the log-ratio inside the exploration term to this many nats either way; null is off. The
            paper's experiments use 500.
        missing_eos_penalty: What a completion that was cut at `max_new_tokens` loses in score; null is off.
        learning_rate: Peak learning rate of AdamW without weight decay; null is 5e-7. Not with `optimizer`.
        optimizer: Another optimizer, called with the trainable parameters.
        lr_schedule: How the learning rate falls to 0 after the warm-up: `linear`, `cosine`, or `constant`, not at all;
            null is linear. Not with `lr_scheduler`.
        warmup_ratio: Warm-up as a share of all optimizer steps.
        warmup_steps: Warm-up in optimizer steps, in place of `warmup_ratio`.
        lr_scheduler: Another scheduler, stepped after each optimizer step.
        max_grad_norm: Gradients are scaled down to this norm; null is off. In place of `trainer.gradient_clip_val`.
        micro_batch_size: Most pairs per forward and backward pass. Changes memory and speed, not the result. In place
            of `trainer.accumulate_grad_batches`: the batch of the data module is what one rollout samples and one
            optimizer step sees.
        micro_batch_tokens: Most tokens per forward and backward pass, padding included; null sets no limit.
        rollout_batch_size: Most prompts sampled together; null is the whole batch, fewer on a CPU.
        reference_cache: Keeps the reference's completion of each training prompt, its log-probabilities and its score,
            and uses them again in later epochs, so that every epoch compares with the same completion of a prompt:
            `memory`, empty again after a resume; or a folder, which later runs of the same reference, sampling and
            reward use as well, whatever their seed. Each process keeps its own. null samples anew each time, and
            validation and prediction always do.
        updates_per_rollout: Optimizer steps that share one pass over a batch's pairs.
        epochs_per_rollout: Passes over a batch's pairs.
        max_skipped_steps: Optimizer steps in a row that may be left out because a score, a log-probability, the loss or
            the gradient is not finite; 0 stops the run at the first. Weights are never updated with such numbers.
    """

    strict_loading = False
    policy: nn.Module
    reference: Reference
    collect: Collector

    def __init__(
        self,
        policy: ModelSpec,
        reward: Reward,
        lora: LoRASpec | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        # The schedule comes first, because of several types the parser gives the reason why the first did not fit.
        alpha: Schedule | float | list[float] = 1e-5,
        beta: Schedule | float | list[float] = 0.1,
        preference_loss: PreferenceLoss | None = None,
        bonus_clip: float | None = None,
        missing_eos_penalty: float | None = None,
        learning_rate: float | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_schedule: LearningRateShape | None = None,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        micro_batch_size: int = 8,
        micro_batch_tokens: int | None = None,
        rollout_batch_size: int | None = None,
        reference_cache: str | None = None,
        updates_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_skipped_steps: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy_spec: ModelSpec | LoadedModel = policy
        self.lora, self.sampling, self.reward = lora, sampling, reward
        self.objective = Objective(alpha, beta, preference_loss, bonus_clip)
        self.optimization = Optimization(
            learning_rate, optimizer, lr_schedule, warmup_ratio, warmup_steps, lr_scheduler, max_grad_norm
        )
        self.rollout_batch_size, self.reference_cache = rollout_batch_size, reference_cache
        self.missing_eos_penalty = check_penalty(missing_eos_penalty)
        self.plan = UpdatePlan(micro_batch_size, micro_batch_tokens, updates_per_rollout, epochs_per_rollout)
        self._configured, self.timer, self.guard = False, PhaseTimer(), Guard(max_skipped_steps)
        self.run_state = RunState(self.guard)
        self.train_averages, self.eval_averages = PairAverages(), PairAverages()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded on first use."""
        return self.policy_spec.load_tokenizer()

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        """Tokenizes prompts, and knows how long they may be; data modules use it to check prompts before training."""
        limit = prompt_limit(self.policy_spec.load_config(), self.sampling.max_new_tokens)
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
        self.policy = model if self.lora is None else self.lora.wrap(model)
        self.reference = Reference(self.policy)
        self.reward.load()
        self.reward.set_check(self.guard.stop.check)
        rollout = LocalRollout(self.tokenizer, self.sampling, ends, self.rollout_batch_size, self.guard.stop.check)
        self.collect = Collector(rollout, self.reference, self.reward, self.missing_eos_penalty, self.timer)
        speed_up_linears(self.policy, self.reference, self.reward)

    def setup(self, stage: str) -> None:
        """Refuse trainer options that do not suit the module."""
        check_trainer(self.trainer)
        self.run_state.seed = torch.initial_seed()

    def on_fit_start(self) -> None:
        """Open the cache of what the reference writes."""
        self.collect.open_cache(self.reference_cache, self.reference.identity(self.policy_spec), self.trainer)
        before_training(self.trainer, lambda: self.run_state.take_up(self.trainer, self.collect.cache))

    def on_train_start(self) -> None:
        """Set the length of the run."""
        self.optimization.take_settings(self._optimizer.optimizer, self._scheduler)
        if isinstance(self._scheduler, WarmupThenDecay):
            self._scheduler.begin(self._total_steps)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Sample and label pairs for the whole batch, then take the optimizer steps on them."""
        begin_batch(self.trainer)
        with self.run_state.step():
            noise = self._noise(batches_done(self.trainer), purpose=0)
            experience = self.guard.attempt(lambda: self._collect(batch, noise, use_cache=True))
            self.train_averages.reset()
            settings: dict[str, Any] = {}
            for number, pairs in enumerate(self.plan.batches(experience, noise) if experience else []):
                if 0 < self.trainer.max_steps <= self.global_step:
                    break
                settings |= self._update(pairs, may_stop=number == 0)
            averages = self.train_averages.compute() if settings else forget_logged(self.trainer)
            self.log_dict({**averages, **settings, **self.guard.counts(), "step": float(self.global_step)})

    def _update(self, micro_batches: list[Experience], may_stop: bool) -> dict[str, Any]:
        """Take one optimizer step on these pairs; return what it was taken with, nothing where it was left out."""
        weights = self._weights()
        learning_rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.zero_grad()
        stop = self.guard.stop if may_stop else None
        result = self.guard.attempt(lambda: add_gradients(self, micro_batches, weights, stop), may_stop=may_stop)
        if result is None:
            self._optimizer.zero_grad()
            return {}
        grad_norm, numbers = result
        for measured in numbers:
            self.train_averages.update(measured)
        with self.timer("optimizer", self.device):
            self._optimizer.step()
            self._scheduler.step()
        self.guard.taken()
        return {**weights, "lr": learning_rate, "grad_norm": grad_norm}

    def on_validation_start(self) -> None:
        """Let validation not touch the randomness of training, and forget the pairs of the last one."""
        self.run_state.begin_validation()
        self.eval_averages.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> Experience:  # type: ignore[override]
        """Sample pairs for held-out prompts and measure them as in training.

        The randomness is the same each time: two validations differ by the policy alone.
        """
        weights = self._weights()
        noise = self._noise(batch_idx, purpose=1)
        experience = self.guard.run(lambda: self._collect(batch, noise))
        for rows in self.plan.micro_batches(experience):
            _, numbers = self.objective(self.policy, experience.select(rows), **weights)
            self.eval_averages.update(numbers)
        return experience

    def on_validation_epoch_end(self) -> None:
        """Log the averages over all held-out prompts and processes."""
        self.run_state.end_validation(self.trainer)
        numbers = {f"eval/{name}": value for name, value in self.eval_averages.compute().items()}
        self.log_dict({**numbers, "step": float(self.global_step)})

    def predict_step(self, batch: Any, batch_idx: int) -> Experience:
        """Sample and score pairs for a batch of prompts."""
        return self._collect(batch, self._noise(batch_idx, purpose=2))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer of the trained weights and its learning-rate schedule."""
        optimizer, scheduler = self.optimization.build(self.trained_parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the policy's weights that are trained."""
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what a checkpoint holds of the models: the trained weights."""
        state = super().state_dict(*args, **kwargs)
        return trained_state(state, self.policy, kwargs.get("prefix", "") + "policy.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which reference the weights were trained against, and all that a resumed run needs."""
        settle(checkpoint["loops"]["fit_loop"])
        checkpoint["xpo_reference"] = self.reference.identity(self.policy_spec)
        optimization = self.optimization.identity(self.trained_parameters())
        checkpoint["xpo_run"] = self.run_state.state(self.trainer, self.collect.cache, optimization)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or another reference."""
        self.configure_model()
        check_trained_state(checkpoint["state_dict"], self.state_dict())
        check_reference(checkpoint.get("xpo_reference"), self.reference.identity(self.policy_spec))
        if self._trainer is not None and self.trainer.state.fn == "fit" and "xpo_run" in checkpoint:
            optimization = self.optimization.identity(self.trained_parameters())
            self.run_state.load(checkpoint["xpo_run"], self.trainer, optimization)

    def _collect(self, batch: Any, noise: Noise, use_cache: bool = False) -> Experience:
        prompts = as_prompts(batch, self.prompt_encoder, self.device)
        return check_rollout(self.collect(self.policy, prompts, noise, use_cache))

    def _weights(self) -> dict[str, float]:
        """Return alpha and beta now; outside of training, and before it, those of the first step."""
        progress = Progress(self.global_step, self.current_epoch, self._total_steps)
        return self.objective.weights(progress if has_begun(self.trainer) else FIRST_STEP)

    def _noise(self, number: int, *, purpose: int) -> Noise:
        return Noise(self.run_state.seed, purpose, number, self.global_rank, self.trainer.world_size)

    @property
    def _optimizer(self) -> LightningOptimizer:
        return cast("LightningOptimizer", self.optimizers())

    @property
    def _scheduler(self) -> LRScheduler:
        return cast("LRScheduler", self.lr_schedulers())

    @property
    def _total_steps(self) -> int | None:
        return total_steps(self.trainer, self.plan.steps)
