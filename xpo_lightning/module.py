"""`XPOLightningModule`: holds the policy, the reference and the reward, and trains the policy."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from xpo_lightning.checkpointing.run_state import RunState
from xpo_lightning.checkpointing.weights import (
    check_reference,
    check_trained_state,
    let_frozen_be_missing,
    trained_state,
)
from xpo_lightning.core.argument_types import check_arguments
from xpo_lightning.core.batch import Experience, join_experiences
from xpo_lightning.core.distributed import all_gather
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import Guard, StepWork, Together
from xpo_lightning.core.fault_tolerance.watch import watch
from xpo_lightning.core.rng import RolloutRNG, Stream
from xpo_lightning.core.timer import PhaseTimer
from xpo_lightning.core.trainer_progress import (
    batches_done,
    before_training,
    begin_batch,
    forget_logged,
    has_begun,
    normalize_loop_counters,
)
from xpo_lightning.data.dataloader import look_ahead, next_batch
from xpo_lightning.data.datamodule import PromptDataModule
from xpo_lightning.data.preference_pairs import as_preferences, held_out_pairs, split_batch
from xpo_lightning.data.prompts import PromptTokenizer, as_prompts
from xpo_lightning.losses.bonus import Bonus
from xpo_lightning.losses.bonuses import BonusTarget
from xpo_lightning.losses.preference import PreferenceLoss, SigmoidLoss
from xpo_lightning.losses.schedules import FIRST_STEP, LearningRateShape, Progress, Schedule
from xpo_lightning.models.forward.capabilities import refuse_untrainable
from xpo_lightning.models.forward.causal_forward import eval_mode
from xpo_lightning.models.forward.cpu import keep_memory, speed_up_linears
from xpo_lightning.models.forward.joint_passes import joint_passes
from xpo_lightning.models.forward.lengths import vocabulary_size
from xpo_lightning.models.forward.randomness import stop_random_draws
from xpo_lightning.models.loading_turns import load_in_turns
from xpo_lightning.models.policy import LoadedModel, LoRASpec, ModelSpec, check_loaded, end_token_ids, prompt_limit
from xpo_lightning.models.reference import Reference, ReferenceRefresh
from xpo_lightning.models.sharding import shard_all, unsharded
from xpo_lightning.rewards.base import Feedback, Judge
from xpo_lightning.rewards.labels import LabelRule, check_penalty
from xpo_lightning.rewards.no_reward import MISSING, is_missing
from xpo_lightning.rewards.scorer import PairScorer
from xpo_lightning.rollout.batch_writer import BatchWriter
from xpo_lightning.rollout.engine import RolloutEngine
from xpo_lightning.rollout.engine_writer import EngineWriter
from xpo_lightning.rollout.local import LocalRollout, order_of
from xpo_lightning.rollout.opening import try_ways
from xpo_lightning.rollout.pair_selection import Candidates
from xpo_lightning.rollout.samplers import ReferenceSampler, Sampler
from xpo_lightning.rollout.sampling import Sampling
from xpo_lightning.training.bonus_options import choose_bonus, refuse_with_bonus_sampler, refuse_with_previous
from xpo_lightning.training.collector import Collector, Upcoming, check_rollout
from xpo_lightning.training.config_checks import (
    INERT_OPTIONS,
    check_trainer,
    refuse_combinations,
    refuse_inert_options,
    refuse_own_steps,
    refuse_several_loaders,
    refuse_sharding,
    warn_of_earlier_samples,
    warn_of_weights,
)
from xpo_lightning.training.conversions import as_policy, as_reward
from xpo_lightning.training.gradients import add_gradients, clip_gradient
from xpo_lightning.training.memory_budget import MemoryBudget, counts_memory
from xpo_lightning.training.metrics import OF_SCORES, PairAverages, rollout_metrics
from xpo_lightning.training.objective import DEFAULT_ALPHA, Objective
from xpo_lightning.training.offline_options import refuse_with_preferences, refuse_without_reward
from xpo_lightning.training.optimizer import Optimization, WarmupThenDecay, total_steps
from xpo_lightning.training.persistent_state import PersistentState
from xpo_lightning.training.replay_buffer.buffer import Buffer, BufferOptions
from xpo_lightning.training.update_plan import Pairs, UpdatePlan

Work = TypeVar("Work", Together, StepWork, nullcontext[None])


class XPOLightningModule(LightningModule):
    """Exploratory Preference Optimization (Xie et al. 2024, arXiv 2405.21046, Algorithm 1) of a language model.

    For each prompt, the policy and the frozen reference each generate a completion, the reward decides which is better,
    and the policy takes a step on the preference loss of the pair plus `alpha` times the log-probability of the
    reference's completion. `docs/configuration.md` shows each option at work.

    A batch is a mapping with `prompt`: B texts or chat conversations, and optionally `prompt_ids`: their token ids;
    its other entries, of length B, reach the reward as columns. A plain list of prompts works too. A training batch
    may also have `preferences`: a mapping with `prompt`, `chosen` and `rejected`, which are pairs to train on as they
    are. A run on such pairs alone is DPO.

    Args:
        policy: Which model to train, and how to load it. The reference starts as the same model.
        reward: Scores completions, or compares two if it is a judge. null is for a run on preference pairs alone, which
            then validates on held-out pairs.
        lora: Train low-rank adapters instead of every weight; the reference is then the policy without them.
        sampling: How completions are sampled. The loss uses the models' own log-probabilities, whatever is set here.
        sampler: Generates the second completion of each training pair; null is the reference.
        candidates: How many completions each side generates for a training prompt, and which two become the pair.
        labels: How scores, or a judge's answers, become labels.
        alpha: Weight of the exploration term: a number, one number per epoch, or a schedule. 0 is online DPO; below 0
            the policy imitates the reference's samples, as a control.
        alpha_in_beta: Take alpha in units of beta: the weight is then alpha times beta.
        beta: Strength of the KL constraint: a number, one number per epoch, or a schedule.
        preference_loss: Loss of a labelled pair; null is `SigmoidLoss` (DPO's).
        bonus: What alpha multiplies in the exploration term; null is `XPOBonus`. `docs/methods.md` lists the others.
        bonus_sampler: Generates a third completion of each training prompt, on which alone the exploration term is, as
            in XPO's Algorithm 2; null takes the completions of the pair.
        bonus_on: The target of `XPOBonus`: the `sampler`'s completion, as in Algorithm 1, the `rejected` one, or
            `both`, whose log-probabilities are added; null is `sampler`. Not with `bonus`.
        bonus_clip: Clips the log-ratio inside the exploration term to this many nats either way; null is off. The
            paper's experiments use 500.
        entropy_bonus: Weight of the mean entropy of the policy's next token along its own completions, in nats per
            token, which is maximised; 0 is off.
        missing_eos_penalty: Subtracted from the score of a completion that was cut at `max_new_tokens`; null is off.
        learning_rate: Peak learning rate of AdamW without weight decay; null is 5e-7. Not with `optimizer`.
        optimizer: Another optimizer, called with the trainable parameters.
        lr_schedule: How the learning rate falls to 0 after the warm-up: `linear` or `cosine`; with `constant` it does
            not fall. null is linear. Not with `lr_scheduler`.
        warmup_ratio: Warm-up as a share of all optimizer steps.
        warmup_steps: Warm-up in optimizer steps, in place of `warmup_ratio`.
        lr_scheduler: Another scheduler, stepped after each optimizer step.
        max_grad_norm: Clips the gradient to this norm; null is off. In place of `trainer.gradient_clip_val`.
        micro_batch_size: Most pairs per forward and backward pass; null sets no limit. Changes memory and speed, not
            the result. In place of `trainer.accumulate_grad_batches`: the batch of the data module is what one rollout
            samples and one optimizer step sees.
        micro_batch_tokens: Most tokens per forward and backward pass, padding included; null sets no limit. If both
            are null, the first step takes 8 pairs at a time; on a GPU it measures how many tokens fit into half of the
            free memory, and later steps take that many.
        rollout_batch_size: Most prompts sampled together; null is the whole batch, fewer on a CPU.
        rollout_graphs: On a GPU, replay each token's step as a CUDA graph, and keep the buffers for it; false saves
            their memory. Elsewhere nothing is replayed.
        rollout: Lets a server generate the completions, see `docs/vllm.md`; null samples in this process.
        reference_cache: Keeps the reference's completion of each training prompt, its log-probabilities and its score,
            and reuses them in later epochs, so that every epoch compares with the same completion of a prompt:
            `memory`, which a resumed run gets from its checkpoint; or a folder, which later runs with the same
            reference, sampling and reward reuse too, whatever their seed. All processes of a run share what each of
            them has kept. null samples anew each time, as validation and prediction always do.
        reference_refresh: Lets the reference follow the policy; null keeps it frozen, as in Algorithm 1.
        buffer: Keeps pairs for later updates, as Algorithm 1 does (step 5); null drops them after their batch.
        updates_per_rollout: Optimizer steps in each pass over a batch's pairs, or over all pairs that the buffer keeps.
        epochs_per_rollout: Passes over these pairs.
        max_skipped_steps: Most optimizer steps in a row that may be skipped because a score, a log-probability, the
            loss or the gradient is not finite; 0 stops the run at the first. Weights are never updated with such
            numbers.
    """

    strict_loading = False  # Lightning compares the names of sharded weights itself, and so knows no hook.
    policy: nn.Module
    reference: Reference
    collector: Collector
    memory: PersistentState

    def __init__(
        self,
        policy: ModelSpec,
        reward: Feedback | None = None,
        lora: LoRASpec | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        sampler: Sampler | None = None,
        candidates: Candidates = Candidates(),  # noqa: B008
        labels: LabelRule = LabelRule(),  # noqa: B008
        # The schedule comes first, because the parser reports why the first of several types did not fit.
        alpha: Schedule | float | list[float] = DEFAULT_ALPHA,
        alpha_in_beta: bool = False,
        beta: Schedule | float | list[float] = 0.1,
        preference_loss: PreferenceLoss | None = None,
        bonus: Bonus | None = None,
        bonus_sampler: Sampler | None = None,
        bonus_on: BonusTarget | None = None,
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
        given = {name: value for name, value in locals().items() if name not in ("self", "policy", "reward")}
        check_arguments(XPOLightningModule.__init__, given, "model.")
        super().__init__()
        self.automatic_optimization = False
        self.policy_spec: ModelSpec | LoadedModel = as_policy(policy)
        self.lora, self.sampling, self.reward = lora, sampling, as_reward(reward)
        self.sampler, self.candidates, self.label_rule = sampler or ReferenceSampler(), candidates, labels
        self.bonus_sampler = bonus_sampler
        self.objective = Objective(
            alpha,
            beta,
            preference_loss=preference_loss or SigmoidLoss(),
            bonus=choose_bonus(bonus, bonus_on),
            bonus_clip=bonus_clip,
            entropy_bonus=entropy_bonus,
            alpha_in_beta=alpha_in_beta,
        )
        self.optimization = Optimization(
            learning_rate, optimizer, lr_schedule, warmup_ratio, warmup_steps, lr_scheduler, max_grad_norm
        )
        self.rollout_batch_size, self.rollout_graphs, self.rollout = rollout_batch_size, rollout_graphs, rollout
        self.reference_cache = reference_cache
        self.reference_refresh, self.buffer_options = reference_refresh, buffer
        self.missing_eos_penalty = check_penalty(missing_eos_penalty)
        completions = 2 if bonus_sampler is None else 3
        self.plan = UpdatePlan(
            micro_batch_size, micro_batch_tokens, updates_per_rollout, epochs_per_rollout, completions
        )
        self.timer, self.guard = PhaseTimer(), Guard(max_skipped_steps)
        self.writer = None if rollout is None else EngineWriter(rollout, self.guard.stop.check)
        self.run_state = RunState(self.guard)
        self.rollout_averages, self.update_averages = PairAverages(), PairAverages()
        self.eval_rollout_averages, self.eval_averages = PairAverages(), PairAverages()
        for averages in (self.rollout_averages, self.eval_rollout_averages):
            averages.skips_nan = isinstance(self.reward, Judge)
        self._is_configured = self._is_quiet = False
        self._steps_loaded = 0
        self._sampled = 0  # batches, where there is no trainer to count them
        self._together = ExitStack()
        self.register_load_state_dict_post_hook(let_frozen_be_missing)  # type: ignore[no-untyped-call]
        refuse_combinations(self)
        refuse_with_bonus_sampler(self)
        refuse_with_previous(self)
        refuse_without_reward(self)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the built-in optimizer; Lightning's `lr_find` reads and sets it."""
        if self.optimization.optimizer is not None:
            raise InputError("model.optimizer has a learning rate of its own, which lr_find cannot set; set it to null")
        return self.optimization.peak

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.optimization.learning_rate = rate
        if self._trainer is not None and self._trainer.lr_scheduler_configs:
            self._scheduler.base_lrs = [rate] * len(self._scheduler.base_lrs)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded on first use."""
        return self.policy_spec.load_tokenizer()

    @cached_property
    def prompt_encoder(self) -> PromptTokenizer:
        """Tokenizes prompts, and knows how long they may be; data modules use it to check prompts before training."""
        config = self.policy_spec.load_config()
        limit = prompt_limit(config, self.sampling.max_new_tokens)
        if self.rollout is not None:
            limit = self.rollout.prompt_limit(limit, self.sampling.max_new_tokens)
        return PromptTokenizer(self.tokenizer, limit, vocabulary_size(config))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module and load a checkpoint's trained weights into it.

        Args:
            checkpoint_path: The checkpoint.
            args: As Lightning's method of this name has them.
            kwargs: The same, and the arguments of the module, which a checkpoint does not hold.

        Raises:
            InputError: `policy` or `reward` is missing.
        """
        lacking = [f"{name}=..." for name in ("policy", "reward") if name not in kwargs]
        if lacking:
            raise InputError(
                f"load_from_checkpoint({str(checkpoint_path)!r}, {', '.join(lacking)}): a checkpoint holds the trained "
                f"weights, not the model and the reward; pass them as the run had them"
            )
        module: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return module

    def configure_model(self) -> None:
        """Load the policy, the reference and the reward; a second call does nothing."""
        if self._is_configured:
            return
        self._is_configured = True
        keep_memory()
        if self.device_mesh is None:
            self._load_models()
        else:
            load_in_turns(partial(self._load_and_shard_models, self.device_mesh))
        self.memory = PersistentState(self.reference, self.sampler, self.objective.bonus, self.bonus_sampler)
        self.memory.writer = self.writer
        rollout = LocalRollout(
            self.tokenizer,
            self.sampling,
            end_token_ids(self.policy, self.tokenizer, self.sampling.eos_token_ids),
            self.rollout_batch_size,
            self.guard.stop.check,
            replays=self.rollout_graphs,
        )
        if self.rollout is not None:
            self.rollout.begin(rollout)
        self.collector = Collector(
            BatchWriter(rollout, self.timer, self.writer),
            self.memory,
            self.candidates,
            PairScorer(self.reward, self.missing_eos_penalty),
            self.label_rule,
            self.timer,
            keeps_previous=self.objective.preference_loss.needs_previous,
        )
        speed_up_linears(self.policy, self.reference, self.reward)

    def _load_models(self) -> None:
        model = self.policy_spec.load_model()
        check_loaded(model, self.tokenizer, self.sampling.eos_token_ids)
        ends = end_token_ids(model, self.tokenizer, self.sampling.eos_token_ids)
        if self.missing_eos_penalty and not (ends or self.sampling.stop_strings):
            raise InputError("model.missing_eos_penalty is set, but model.sampling.eos_token_ids names no EOS token")
        self.policy = self._with_adapters(model)
        self.reference = Reference(self.policy, self.reference_refresh)
        self.reference_identity = self.reference.identity(self.policy_spec)
        self.reward.load()
        self.reward.set_check(self.guard.stop.check)

    def _load_and_shard_models(self, mesh: Any) -> None:
        """Load the models and shard them over ranks; how they run is found out before, while they are whole."""
        offloads = getattr(self.trainer.strategy, "offload_reference", False)
        self._load_models()
        try_ways(*(model for model in (self.policy, self.reference.frozen) if model is not None))
        self.reward.try_ways()
        shard_all([self.policy, self.reward], mesh)
        shard_all([self.reference], mesh, offloads=offloads)
        self.reference.is_offloaded = offloads

    def new_policy(self) -> nn.Module:
        """Build another model of the policy's kind, as it was before training."""
        return self._with_adapters(self.policy_spec.load_model())

    def _with_adapters(self, model: nn.Module) -> nn.Module:
        return model if self.lora is None else self.lora.wrap(model)

    def configure_callbacks(self) -> list[Callback]:
        """Add no callbacks, but refuse what Lightning would refuse right after this, in other words."""
        trainer = self.trainer
        refuse_inert_options({name: getattr(trainer, name) for name in INERT_OPTIONS})
        return []

    def setup(self, stage: str) -> None:
        """Refuse trainer options that the module does not support."""
        watch(self.trainer)
        check_trainer(self.trainer)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            refuse_sharding(self, offloads=getattr(self.trainer.strategy, "offload_reference", False))
        if stage == "fit":
            warn_of_weights(self.objective)
            warn_of_earlier_samples(self)
            self._check_data()
        self.run_state.seed = torch.initial_seed()

    def _check_data(self) -> None:
        """Refuse options that the training data leave no use for, and a missing reward that they need."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule):
            return
        if data.trains_on_pairs_alone or data.preferences is not None:
            refuse_with_preferences(self, alone=data.trains_on_pairs_alone)
        if is_missing(self.reward) and not data.trains_on_pairs_alone:
            raise InputError(MISSING)

    def on_fit_start(self) -> None:
        """Prepare sampler and reference with the untrained policy, and open the reference cache and the buffer."""
        self.run_state.begin()
        self.memory.begin(self.policy)
        self.reference.begin()
        with self._models_at_hand(nullcontext()):
            self.collector.open_cache(self.reference_cache, self.reference_identity, self.trainer)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if self.buffer_options is not None:
            self.memory.buffer = Buffer(self.buffer_options, folder, self.global_rank)
        before_training(self.trainer, lambda: self.run_state.take_up(self.trainer, self.memory))

    def on_train_start(self) -> None:
        """Apply the configured settings to the optimizer, set the length of the run, and have the loader look ahead."""
        self.optimization.take_settings(self._optimizer.optimizer, self._scheduler)
        if isinstance(self._scheduler, WarmupThenDecay):
            self._scheduler.begin(self._total_steps)
        if self.rollout is not None and self.rollout.ahead:
            look_ahead(self.trainer.train_dataloader)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Sample and label one pair per prompt of the batch, then take the optimizer steps on all kept pairs.

        The preference pairs of the batch, if it has some, join the sampled ones as they are.

        Returns:
            The mean of the objective, for callbacks that look at it, or None if no step was taken.
        """
        begin_batch(self.trainer)
        done = batches_done(self.trainer)
        rng = self._rng(Stream.TRAINING, done)
        experience, settings = None, {}
        with self.run_state.step():
            with self._models_at_hand(self.guard.step()) as step:
                experience = self.collect(batch, rng, training=True, upcoming=self._upcoming(done + 1))
            if experience is not None and not step.is_skipped:
                sampled = experience.sampled
                if sampled is not None:
                    self._show_pairs(sampled)
                settings = self._take_steps(experience, rng)
                if settings and self.objective.bonus.learns and sampled is not None:
                    self._teach_bonus(sampled, done, settings["beta"])
            loss = self._log_step(experience if settings else None, settings)
            self.memory.after_batch(done + 1, self.policy, taken=bool(settings))
        return loss

    def _show_pairs(self, experience: Experience) -> None:
        """Call `on_pairs_collected(trainer, module, experience)` of each callback that has it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_pairs_collected"):
                callback.on_pairs_collected(self.trainer, self, experience)

    def _take_steps(self, experience: Experience, rng: RolloutRNG) -> dict[str, Any]:
        """Take the optimizer steps of a batch; return the settings of the last one that was not skipped, or {}."""
        self._stop_noise()
        self.update_averages.reset()
        pairs: Pairs = experience
        if self.memory.buffer is not None:
            with self.guard.together():
                pairs = self.memory.buffer.add(experience)
        settings: dict[str, Any] = {}
        plan = self.plan.within(self.run_state.tokens_together)
        for number, micro_batches in enumerate(plan.steps(pairs, rng)):
            if 0 < self.trainer.max_steps <= self.global_step:
                break
            settings |= self._optimizer_step(pairs, micro_batches, may_stop=number == 0)
        return settings

    def _teach_bonus(self, experience: Experience, number: int, beta: float) -> None:
        """Let the bonus learn from the pairs of a batch, the same on all processes."""
        plan = self.plan.within(self.run_state.tokens_together)
        groups = plan.micro_batches(experience.sizes, range(len(experience)))
        with self.guard.together(), eval_mode(self.policy):
            observed = self.objective.observe(self.policy, [experience.select(rows) for rows in groups], beta)
            in_order = observed[torch.tensor(order_of(groups), device=observed.device)]
        parts = all_gather(in_order.cpu())
        # In the order of the global batch, of which rank r has rows r, r + n, r + 2n, ...
        rows = [part[row : row + 1] for row in range(max(map(len, parts))) for part in parts]
        everything = torch.cat(rows).to(observed.device)
        self.objective.bonus.learn(everything, RolloutRNG(self.run_state.seed, Stream.BONUS, number).uniforms)

    def _optimizer_step(self, pairs: Pairs, micro_batches: list[list[int]], may_stop: bool) -> dict[str, Any]:
        """Take one optimizer step; return alpha, beta, learning rate and gradient norm, or {} if it was skipped."""
        weights = self._weights()
        learning_rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.zero_grad()
        is_unmeasured = self.plan.is_open and self.run_state.tokens_together is None
        budget = MemoryBudget(self.device) if is_unmeasured and counts_memory(self.device) else None
        added = add_gradients(self, pairs, micro_batches, weights, self.guard.stop if may_stop else None)
        if budget is not None:
            budget.after_gradients()
        norm = clip_gradient(self)
        with self.guard.step(may_stop=may_stop) as step:
            added.check(norm)
        if step.is_skipped:
            self._optimizer.zero_grad()
            return {}
        for measured in added.numbers:
            self.update_averages.update(measured)
        with self.timer("optimizer", self.device):
            self.run_state.changed = batches_done(self.trainer)
            self._optimizer.step()
            self._scheduler.step()
        self.guard.record_step()
        if budget is not None:
            tokens = budget.tokens(self.plan.most_tokens(pairs.sizes, micro_batches))
            self.run_state.tokens_together = min(all_gather(tokens))
        return {**weights, "lr": learning_rate, "grad_norm": norm}

    def _log_step(self, experience: Experience | None, settings: dict[str, Any]) -> Tensor | None:
        """Log the metrics of a batch and of its optimizer steps, and return the objective.

        Of a skipped batch, only the guard's counts are logged.
        """
        averages: dict[str, Tensor] = {}
        if experience is None:
            forget_logged(self.trainer)
        else:
            self.rollout_averages.reset()
            self.rollout_averages.update(rollout_metrics(experience, settings["beta"]))
            averages = {**self.rollout_averages.compute(), **self.update_averages.compute()}
        self.log_dict({**averages, **settings, **self.guard.counts(), "step": float(self.global_step)})
        if self.rollout is not None:  # how far the engine's log-probabilities were from ours
            self.log_dict(self.rollout.measured, sync_dist=True)
        return averages.get("loss/total")

    def on_validation_start(self) -> None:
        """Store the random state of training, and reset the averages of the last validation.

        Raises:
            InputError: There are several loaders.
        """
        refuse_several_loaders(self.trainer)
        self.run_state.begin_validation()
        self.eval_averages.reset()
        self.eval_rollout_averages.reset()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Experience:  # type: ignore[override]
        """Sample pairs for held-out prompts, one completion each by policy and initial reference, and measure them.

        Each validation draws the same random numbers, so two validations differ by the policy alone. Without a reward,
        the batch is one of preference pairs, and these are measured.

        Args:
            batch: Prompts, or preference pairs.
            batch_idx: The batch's number.
            dataloader_idx: 0; several loaders are refused.
        """
        with self._models_at_hand(self.guard.together()):
            weights = self._weights()
            held_out = held_out_pairs(batch) if is_missing(self.reward) else batch
            experience = self.collect(held_out, self._rng(Stream.VALIDATION, batch_idx))
            self.eval_rollout_averages.update(rollout_metrics(experience, weights["beta"]))
            plan = self.plan.within(self.run_state.tokens_together)
            for rows in plan.micro_batches(experience.sizes, range(len(experience))):
                _, numbers = self.objective.evaluate(self.policy, experience.select(rows), **weights)
                self.eval_averages.update(numbers)
        return experience

    def on_validation_epoch_end(self) -> None:
        """Log the averages over all held-out prompts and processes."""
        self.run_state.end_validation(self.trainer)
        numbers = {**self.eval_rollout_averages.compute(), **self.eval_averages.compute()}
        if isinstance(self.reward, Judge):  # Where it has answered nothing, no earlier numbers may stand for these.
            numbers = {**dict.fromkeys((*OF_SCORES, "win_rate_stderr"), torch.tensor(torch.nan)), **numbers}
        named = {f"eval/{name}": value for name, value in numbers.items()}
        self.log_dict({**named, "step": float(self.steps_taken)})

    def on_test_start(self) -> None:
        """See `on_validation_start`."""
        self.on_validation_start()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Experience:  # type: ignore[override]
        """Measure held-out prompts as a validation does, under the same names."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """See `on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    def on_predict_start(self) -> None:
        """Have the models at hand for all batches, as ranks may have different batch counts; sync the engine once.

        Raises:
            InputError: The reward scores the batches of all processes together, or there are several loaders.
        """
        refuse_several_loaders(self.trainer)
        if self.reward.depends_on_batch and self.trainer.world_size > 1:
            raise InputError(
                "model.reward standardises scores over the batches of all processes (normalize: batch), and in a "
                "prediction they may have different numbers of batches; set trainer.devices to 1, or normalize to none"
            )
        self._together.enter_context(self._models_at_hand(nullcontext()))
        if self.rollout is not None:
            with self.guard.together():
                self.rollout.sync(self.policy)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Experience:
        """Sample and score pairs for a batch of prompts; ranks do not wait for each other."""
        self.guard.stop.check()
        return self.collect(batch, self._rng(Stream.PREDICTION, batch_idx))

    def on_predict_end(self) -> None:
        """Shard the models again."""
        self._together.close()

    @property
    def steps_taken(self) -> int:
        """Optimizer steps behind the policy's weights: those of the loaded checkpoint, outside training."""
        return self.global_step if self.trainer.state.fn == "fit" else self._steps_loaded

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the policy's weights that are trained."""
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    def sample(self, batch: Any) -> Experience:
        """Sample and label pairs, for a training step of your own: in a module that contains this one, or with Fabric.

        Without a trainer, schedules of alpha and beta see one step for each call.

        Args:
            batch: B prompts, in any form that this module accepts as a batch.

        Returns:
            B labelled pairs, for `losses`.

        Raises:
            InputError: An option is set that only this module's own steps implement, or the rollout refuses its input.
        """
        refuse_own_steps(self)
        if self._trainer is None and self._sampled == 0:
            self.run_state.seed = torch.initial_seed()
        rng = self._rng(Stream.TRAINING, self._sampled if self._trainer is None else batches_done(self.trainer))
        self._sampled += 1
        with self._models_at_hand(self.guard.together()):
            return self.collect(batch, rng, training=True)

    def losses(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate the objective of pairs with the current alpha and beta.

        Args:
            experience: B labelled pairs, all of which go through the policy at once.

        Returns:
            The objective of each pair, with gradient (B,), and each metric (B,) by name.
        """
        self._stop_noise()
        return self.objective.evaluate(self.policy, experience, **self._weights())

    def _stop_noise(self) -> None:
        """Apply `dropout: 0` to modules that would still draw random numbers; called before the first gradient."""
        if self._is_quiet or getattr(self.policy_spec, "dropout", None) != 0:
            return
        self._is_quiet = True
        refuse_untrainable(self.policy)
        names = stop_random_draws(self.policy)
        if names:
            rank_zero_info(
                f"model.policy.dropout=0: {', '.join(names)} would draw random numbers in training, and so stays in "
                f"eval mode"
            )

    def collect(
        self, batch: Any, rng: RolloutRNG, training: bool = False, upcoming: Upcoming | None = None
    ) -> Experience:
        """Collect the labelled pairs of a batch: sample one for each prompt, and take its preference pairs as they are.

        Args:
            batch: A batch.
            rng: Source of randomness.
            training: Whether the policy trains on the pairs.
            upcoming: The batch for an engine to write meanwhile; see `Collector.collect`.

        Returns:
            The pairs; those of a preference data set are the last.

        Raises:
            InputError: An option does not go with preference pairs, or the rollout refuses its input.
        """
        asked, given = split_batch(batch)
        if given is None:
            return self._sampled_pairs(asked, rng, training, upcoming)
        refuse_with_preferences(self, alone=asked is None)
        for averages in (self.rollout_averages, self.update_averages, self.eval_rollout_averages, self.eval_averages):
            averages.skips_nan = True
        pairs = as_preferences(given, self.prompt_encoder, self.device)
        offline = self.collector.take(self.policy, pairs.prompts, pairs.chosen, pairs.rejected, training=training)
        check_rollout(offline)
        if asked is None:
            return offline
        return join_experiences(self._sampled_pairs(asked, rng, training, upcoming), offline)

    def _sampled_pairs(self, batch: Any, rng: RolloutRNG, training: bool, upcoming: Upcoming | None) -> Experience:
        prompts = as_prompts(batch, self.prompt_encoder, self.device)
        return check_rollout(self.collector.collect(self.policy, prompts, rng, training=training, upcoming=upcoming))

    def _upcoming(self, number: int) -> Upcoming | None:
        """Return the training batch of this number, if it is to be written ahead and the loader has it."""
        if self.rollout is None or not self.rollout.ahead:
            return None
        batch = next_batch(self.trainer.train_dataloader)
        if batch is None:
            return None
        prompts = as_prompts(batch, self.prompt_encoder, self.device)
        is_last = 0 < self.trainer.max_steps <= self.global_step + self.plan.step_count
        return Upcoming(prompts, self._rng(Stream.TRAINING, number), wanted=not is_last)

    @contextmanager
    def _models_at_hand(self, work: Work) -> Iterator[Work]:
        """Let models that are sharded write and score inside the context, and enter guarded work with it (collective).

        Without an engine they are unsharded, since ranks write completions of different lengths. With one they only
        score, and ranks take the passes together, in which a layer at a time is unsharded.
        """
        models = (self.policy, self.memory.reference, self.reward)
        whole, passing = (models, ()) if self.rollout is None else ((), models)
        with unsharded(*whole), work, joint_passes(*passing, device=self.device):
            yield work

    def _weights(self) -> dict[str, float]:
        """Return the current alpha and beta; those of the first step if no training has begun."""
        if self._trainer is None:
            done = max(0, self._sampled - 1)
            return self.objective.weights(Progress(step=done, epoch=0, total_steps=None, batches=done))
        if not has_begun(self.trainer):
            return self.objective.weights(FIRST_STEP)
        batches = batches_done(self.trainer)
        return self.objective.weights(Progress(self.global_step, self.current_epoch, self._total_steps, batches))

    def _rng(self, stream: Stream, number: int) -> RolloutRNG:
        processes = self._trainer or self._fabric  # neither: this process is alone
        rank, world_size = (processes.global_rank, processes.world_size) if processes else (0, 1)
        return RolloutRNG(self.run_state.seed, stream, number, rank, world_size)

    @property
    def _optimizer(self) -> LightningOptimizer:
        return cast("LightningOptimizer", self.optimizers())

    @property
    def _scheduler(self) -> LRScheduler:
        return cast("LRScheduler", self.lr_schedulers())

    @property
    def _total_steps(self) -> int | None:
        return total_steps(self.trainer, self.plan.step_count)

    def teardown(self, stage: str) -> None:
        """Close the engine, which then drops the policy."""
        if self.writer is not None:
            self.writer.close()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer of the trained weights and its learning-rate schedule."""
        optimizer, scheduler = self.optimization.build(self.trained_parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return only the policy's trained weights and buffers, also if this module is part of another one."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        kept = trained_state(state, self.policy, f"{prefix}policy.")
        for name in [name for name in state if name.startswith(prefix) and name not in kept]:
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which reference the weights were trained against, and the state that a resumed run needs."""
        normalize_loop_counters(checkpoint["loops"]["fit_loop"], self.trainer)
        checkpoint["xpo_reference"] = self.reference_identity
        optimization = self.optimization.identity(self.trained_parameters())
        checkpoint["xpo_run"] = self.run_state.state(self.trainer, self.memory, optimization)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or another reference."""
        self.configure_model()
        self._steps_loaded = checkpoint.get("global_step", 0)
        if "state_dict" in checkpoint:  # A strategy that shards weights has loaded them itself.
            check_trained_state(checkpoint["state_dict"], self.state_dict())
        check_reference(checkpoint.get("xpo_reference"), self.reference_identity)
        if self._trainer is not None and self.trainer.state.fn == "fit" and "xpo_run" in checkpoint:
            optimization = self.optimization.identity(self.trained_parameters())
            self.run_state.load(checkpoint["xpo_run"], self.trainer, optimization)
