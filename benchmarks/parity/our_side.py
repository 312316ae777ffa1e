"""Our side of the parity check: `XPOLightningModule` in a real `Trainer.fit`, on given completions and scores.

Completions come from a `RolloutEngine`, as those of a server do, and scores from a `PythonReward`. The rest is the
module as a user has it, and is only looked at.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.parity.pairs import (
    EOS,
    LORA,
    MOST,
    REWARD_TOKENIZERS,
    Case,
    cases,
    fill_adapters,
    make_model,
    make_tokenizer,
    reward_model,
    text_of,
)
from xpo_lightning import LoadedModel, LoRASpec, PythonReward, Sampling, SequenceClassifierReward, XPOLightningModule
from xpo_lightning.core.batch import Completions, Pair, Prompts, left_pad
from xpo_lightning.losses.xpo import IPOLoss, SigmoidLoss
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.rollout.engine import GenerationRequest, RolloutEngine
from xpo_lightning.rollout.engine_writer import EngineWriter
from xpo_lightning.rollout.local import LocalRollout


class GivenCompletions(RolloutEngine):
    """Hands out the completions of a case.

    Args:
        case: The case.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(max_logp_drift=None)
        self.case = case
        self.models: dict[str, nn.Module] = {"reference": case.models()[1].eval()}
        self.written = {"policy": case.by_policy, "reference": case.by_sampler}

    def context_length(self) -> None:
        """Name no limit."""

    def begin(self, rollout: LocalRollout) -> None:
        """Take note of nothing."""

    def sync(self, policy: nn.Module) -> None:
        """Take note of the policy, for the log-probabilities that a writer has of its own completions."""
        self.models["policy"] = policy

    def write(self, prompts: Prompts, asked: Sequence[GenerationRequest]) -> list[list[Completions]]:
        """Return what was given."""
        rows = [self.case.texts().index(str(text)) for text in prompts.raw]
        return [[self._by(one.who, prompts, rows)] for one in asked]

    def close(self) -> None:
        """Have nothing to take back."""

    def _by(self, who: str, prompts: Prompts, rows: list[int]) -> Completions:
        given = [list(self.written[who][row]) for row in rows]
        flipped, mask = left_pad([row[::-1] for row in given])
        ended = torch.tensor([row[-1] == EOS for row in given])
        texts = tuple(text_of(row[:-1] if end else row) for row, end in zip(given, ended, strict=True))
        made = Completions(flipped.flip(1), mask.flip(1), ended, texts, torch.zeros(flipped.shape))
        with torch.no_grad():
            logps = token_logps(self.models[who], prompts, made)
        return Completions(made.ids, made.mask, ended, texts, logps)


class Watch(Callback):
    """Gives the policy its weights once the reference has been copied, and notes what is made of the case.

    Args:
        case: The case.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.results: dict[str, Tensor] = {}
        self._noted: dict[str, list[Tensor]] = {}
        self._seen: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Move the policy away from the reference."""
        if self.case.lora:
            fill_adapters(pl_module.policy)
        else:
            pl_module.policy.load_state_dict(self.case.models()[0].state_dict())
        # The option `rollout` is for servers, which want adapters; this writer needs none.
        pl_module.collector.writer.by_engine = EngineWriter(GivenCompletions(self.case), lambda: None)
        pl_module.objective = Noting(pl_module.objective, self._note_losses)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Note the gradients that the optimizer is about to use."""
        for name, weight in pl_module.policy.named_parameters():
            if weight.grad is not None:
                self.results[f"gradient.{name}"] = weight.grad.clone()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Put what was noted into the order of the case's pairs."""
        order = torch.tensor(self._seen).argsort()
        self.results |= {name: torch.cat(values)[order] for name, values in self._noted.items()}
        self.results |= {f"logged.{name}": value.detach().clone() for name, value in trainer.logged_metrics.items()}
        self.results["loss"] = self.results["total"].mean()

    def on_pairs_collected(self, trainer: Trainer, pl_module: Any, experience: Any) -> None:
        """Note the scores, and what the reference says."""
        for side in ("by_policy", "by_sampler"):
            self.results[f"scores.{side}"] = getattr(experience.scores, side)
            self.results[f"reference_logps.{side}"] = getattr(experience.reference_logps, side)

    def _note_losses(self, experience: Any, measured: dict[str, Tensor]) -> None:
        self._seen += [self.case.texts().index(text) for text in experience.prompts.raw]
        names = {"loss/total": "total", "loss/dpo": "dpo", "loss/xpo": "xpo"}
        for name, short in names.items():
            self._noted.setdefault(short, []).append(measured[name])
        ours = experience.labels > 0.5
        chosen, rejected = measured["logps/chosen"], measured["logps/rejected"]
        sides = Pair(torch.where(ours, chosen, rejected), measured["logps/reference_completions"])
        self._noted.setdefault("policy_logps.by_policy", []).append(sides.by_policy)
        self._noted.setdefault("policy_logps.by_sampler", []).append(sides.by_sampler)


class Noting:
    """An objective that tells what it measured.

    Args:
        objective: The module's own.
        note: Is told.
    """

    def __init__(self, objective: Any, note: Callable[[Any, dict[str, Tensor]], None]) -> None:
        self.objective, self.note = objective, note
        self.weights, self.bonus = objective.weights, objective.bonus

    def evaluate(self, policy: nn.Module, experience: Any, **weights: float) -> Any:
        """Evaluate."""
        total, measured = self.objective.evaluate(policy, experience, **weights)
        self.note(experience, measured)
        return total, measured


def make_module(case: Case, **options: Any) -> XPOLightningModule:
    """Build the module of a case, without clipping."""
    given = dict(zip(case.texts(), zip(case.policy_scores, case.sampler_scores, strict=True), strict=True))

    def scores(prompts: list[str], completions: list[str], columns: dict[str, Any]) -> list[float]:
        half = len(prompts) // 2  # The policy's completions come first.
        return [given[prompt][number >= half] for number, prompt in enumerate(prompts)]

    shape = {"r": LORA["r"], "alpha": LORA["lora_alpha"], "target_modules": LORA["target_modules"]}
    return XPOLightningModule(
        policy=LoadedModel(make_model(case.architecture), make_tokenizer(case.tokenizer)),
        reward=PythonReward(scores),
        lora=LoRASpec(**shape) if case.lora else None,
        alpha=case.alpha,
        beta=case.beta,
        preference_loss=IPOLoss() if case.loss == "ipo" else SigmoidLoss(),
        missing_eos_penalty=case.penalty,
        learning_rate=1e-6,
        max_grad_norm=None,
        micro_batch_size=len(case.prompts) // case.accumulate,
        **{"sampling": Sampling(max_new_tokens=MOST), **options},
    )


def run(case: Case) -> dict[str, Tensor]:
    """Take one optimizer step of ours."""
    watch = Watch(case)
    batch = {"prompt": case.texts(), "prompt_ids": [list(prompt) for prompt in case.prompts]}
    _fit(make_module(case), batch, watch)
    return watch.results


def reference_samples() -> dict[str, Tensor]:
    """Let our module write for LoRA's reference, greedily."""
    case = cases()["llama, LoRA"]
    rows = [list(prompt) for prompt in case.prompts if len(prompt) == 5]
    module = make_module(case, sampling=Sampling(max_new_tokens=MOST, temperature=0.0))
    written = []

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            fill_adapters(pl_module.policy)

        def on_pairs_collected(self, trainer: Trainer, pl_module: Any, experience: Any) -> None:
            written.append(experience)

    _fit(module, {"prompt": [text_of(row) for row in rows], "prompt_ids": rows}, Keep())
    completions = written[0].completions
    return {"by_policy": completions.by_policy.ids, "by_reference": completions.by_sampler.ids}


def reward_scores() -> dict[str, Tensor]:
    """Let our reward score the policy's completions with a reward model and its tokenizer."""
    case, scores = cases()["llama"], {}
    completions = [" " + text_of(row) for row in case.by_policy]
    for name, kind, shift in REWARD_TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            reward_model().save_pretrained(folder)
            make_tokenizer(kind, shift).save_pretrained(folder)
            reward = SequenceClassifierReward(folder)
            reward.load()
        scores[name] = reward(case.texts(), completions, {})
    return scores


def _fit(module: XPOLightningModule, batch: dict[str, Any], callback: Callback) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([batch], batch_size=None, collate_fn=lambda each: each))
