"""What `XPOLightningModule` does with a batch: rollouts, optimizer steps, validation, prediction."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from xpo_lightning.batch import Experience
from xpo_lightning.collector import Collector
from xpo_lightning.combinations import refuse_own_steps
from xpo_lightning.forward.capabilities import refuse_untrainable
from xpo_lightning.forward.randomness import stop_random_draws
from xpo_lightning.gradient import add_gradients, clip_gradient
from xpo_lightning.guard.guarding import Guard, check_rollout
from xpo_lightning.guard.processes import gathered
from xpo_lightning.memory import Memory
from xpo_lightning.metrics import PairAverages, rollout_metrics
from xpo_lightning.models import LoadedModel, ModelSpec
from xpo_lightning.objective import Objective
from xpo_lightning.optimization import Optimization, WarmupThenDecay, total_steps
from xpo_lightning.phases import PhaseTimer
from xpo_lightning.prompts import PromptEncoder, as_prompts
from xpo_lightning.resume.standing import batches_done, begin_batch, forget_logged, has_begun
from xpo_lightning.resume.state import RunState
from xpo_lightning.rewards.base import Feedback
from xpo_lightning.rollout.noise import Noise
from xpo_lightning.room import Room, counts_memory
from xpo_lightning.schedules import FIRST_STEP, Progress
from xpo_lightning.sharding import whole
from xpo_lightning.updates import Pairs, UpdatePlan, most_tokens


class PreferenceSteps(LightningModule):
    """The steps; `XPOLightningModule` sets the attributes."""

    policy: nn.Module
    policy_spec: ModelSpec | LoadedModel
    collect: Collector
    memory: Memory
    objective: Objective
    optimization: Optimization
    reward: Feedback
    plan: UpdatePlan

    def __init__(self, max_skipped_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.timer, self.guard = PhaseTimer(), Guard(max_skipped_steps)
        self.run_state = RunState(self.guard)
        self.rollout_averages, self.update_averages = PairAverages(), PairAverages()
        self.eval_rollout_averages, self.eval_averages = PairAverages(), PairAverages()
        self._is_quiet, self._together = False, ExitStack()

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """Tokenizes prompts."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Set the length of the run."""
        self.optimization.take_settings(self._optimizer.optimizer, self._scheduler)
        if isinstance(self._scheduler, WarmupThenDecay):
            self._scheduler.begin(self._total_steps)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Sample and label pairs for the whole batch, then take the optimizer steps on all that are kept."""
        begin_batch(self.trainer)
        done = batches_done(self.trainer)
        with self.run_state.step():
            noise = self._noise(done, purpose=0)
            with self._models_whole():
                experience = self.guard.attempt(lambda: self._collect(batch, noise, training=True))
            settings = {} if experience is None else self._updates(experience, noise)
            if experience is None or not settings:
                averages = forget_logged(self.trainer)
            else:
                averages = self._averages(experience, settings["beta"])
            self.log_dict({**averages, **settings, **self.guard.counts(), "step": float(self.global_step)})
            self.memory.after_batch(done + 1, self.policy, taken=bool(settings))

    def _updates(self, experience: Experience, noise: Noise) -> dict[str, Any]:
        """Take the optimizer steps of a batch; return what the last was taken with, nothing where none was."""
        self._stop_noise()
        self.update_averages.reset()
        buffer = self.memory.buffer
        pairs: Pairs = experience if buffer is None else self.guard.run(lambda: buffer.add(experience))
        settings: dict[str, Any] = {}
        plan = self.plan.within(self.run_state.tokens_together)
        for number, micro_batches in enumerate(plan(pairs, noise)):
            if 0 < self.trainer.max_steps <= self.global_step:
                break
            settings |= self._update(pairs, micro_batches, may_stop=number == 0)
        return settings

    def _update(self, pairs: Pairs, micro_batches: list[list[int]], may_stop: bool) -> dict[str, Any]:
        """Take one optimizer step on these pairs; return what it was taken with, nothing where it was left out."""
        weights = self._weights()
        learning_rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.zero_grad()
        is_unmeasured = self.plan.is_open and self.run_state.tokens_together is None
        room = Room(self.device) if is_unmeasured and counts_memory(self.device) else None
        added = add_gradients(self, pairs, micro_batches, weights, self.guard.stop if may_stop else None)
        if room is not None:
            room.after_gradients()
        norm = clip_gradient(self)
        if self.guard.attempt(lambda: added.check(norm), may_stop=may_stop) is None:
            self._optimizer.zero_grad()
            return {}
        for measured in added.numbers:
            self.update_averages.update(measured)
        with self.timer("optimizer", self.device):
            self.run_state.changed = batches_done(self.trainer)
            self._optimizer.step()
            self._scheduler.step()
        self.guard.taken()
        if room is not None:
            self._take_room(room, pairs, micro_batches)
        return {**weights, "lr": learning_rate, "grad_norm": norm}

    def _take_room(self, room: Room, pairs: Pairs, micro_batches: list[list[int]]) -> None:
        """After the first step, find out how many tokens later ones may take together."""
        tokens = room.tokens(most_tokens(pairs.sizes, micro_batches))
        self.run_state.tokens_together = min(gathered(tokens))

    def _averages(self, experience: Experience, beta: float) -> dict[str, Any]:
        self.rollout_averages.reset()
        self.rollout_averages.update(rollout_metrics(experience, beta))
        return {**self.rollout_averages.compute(), **self.update_averages.compute()}

    def on_validation_start(self) -> None:
        """Let validation not touch the randomness of training, and forget the pairs of the last one."""
        self.run_state.begin_validation()
        self.eval_averages.reset()
        self.eval_rollout_averages.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> Experience:  # type: ignore[override]
        """Sample pairs for held-out prompts, one completion a side and the reference's second, and measure them.

        The randomness is the same each time: two validations differ by the policy alone.
        """
        noise = self._noise(batch_idx, purpose=1)
        with self._models_whole():
            return self.guard.run(lambda: self._measure(batch, noise))

    def _measure(self, batch: Any, noise: Noise) -> Experience:
        weights = self._weights()
        experience = self._collect(batch, noise)
        self.eval_rollout_averages.update(rollout_metrics(experience, weights["beta"]))
        plan = self.plan.within(self.run_state.tokens_together)
        for rows in plan.micro_batches(experience.sizes, range(len(experience))):
            _, numbers = self.objective(self.policy, experience.select(rows), **weights)
            self.eval_averages.update(numbers)
        return experience

    def on_validation_epoch_end(self) -> None:
        """Log the averages over all held-out prompts and processes."""
        self.run_state.end_validation(self.trainer)
        numbers = {**self.eval_rollout_averages.compute(), **self.eval_averages.compute()}
        named = {f"eval/{name}": value for name, value in numbers.items()}
        self.log_dict({**named, "step": float(self.global_step)})

    def on_predict_start(self) -> None:
        """Put models together for all batches: processes may differ in how many they have."""
        self._together.enter_context(self._models_whole())

    def predict_step(self, batch: Any, batch_idx: int) -> Experience:
        """Sample and score pairs for a batch of prompts; no process waits for another."""
        self.guard.stop.check()
        return self._collect(batch, self._noise(batch_idx, purpose=2))

    def on_predict_end(self) -> None:
        """Spread the models over processes again."""
        self._together.close()

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the policy's weights that are trained."""
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    def sample(self, batch: Any) -> Experience:
        """Sample and label pairs, for a training step of a module that holds this one and takes the steps itself.

        Args:
            batch: B prompts, in any form that a batch of this module may have.

        Returns:
            B labelled pairs, for `losses`.

        Raises:
            InputError: An option is set that acts through this module's own steps; or what goes wrong in a rollout.
        """
        refuse_own_steps(self)
        noise = self._noise(batches_done(self.trainer), purpose=0)
        with self._models_whole():
            return self.guard.run(lambda: self._collect(batch, noise, training=True))

    def losses(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate the objective of pairs with alpha and beta as they are now.

        Args:
            experience: B labelled pairs, all of which go through the policy at once.

        Returns:
            The objective of each pair, with gradient (B,), and each metric (B,) by name.
        """
        self._stop_noise()
        return self.objective(self.policy, experience, **self._weights())

    def _stop_noise(self) -> None:
        """Before the first gradient, when the policy is where it trains: honour a dropout of 0 in every module."""
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

    def _collect(self, batch: Any, noise: Noise, training: bool = False) -> Experience:
        prompts = as_prompts(batch, self.prompt_encoder, self.device)
        return check_rollout(self.collect(self.policy, prompts, noise, training))

    def _models_whole(self) -> AbstractContextManager[None]:
        """Put the weights together that are spread over processes, for rollouts and scores."""
        return whole(self.policy, self.memory.reference, self.reward)

    def _weights(self) -> dict[str, float]:
        """Return alpha and beta now; outside of training, and before it, those of the first step."""
        if not has_begun(self.trainer):
            return self.objective.weights(FIRST_STEP)
        batches = batches_done(self.trainer)
        return self.objective.weights(Progress(self.global_step, self.current_epoch, self._total_steps, batches))

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
