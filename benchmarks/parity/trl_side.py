"""TRL's side of the parity check: XPOTrainer's own training loop on given completions and scores.

Started by `check.py` in TRL's environment with a folder, which gets a file for each case. Two things are put in place
of TRL's: what `generate` would have written, and what the reward model would have said. The rest is TRL's code as
shipped, and is only looked at.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback
from trl.experimental.xpo import XPOConfig, XPOTrainer, xpo_trainer

from benchmarks.parity.pairs import (
    EOS,
    LORA,
    MOST,
    PAD,
    REWARD_TOKENIZERS,
    Case,
    cases,
    fill_adapters,
    make_model,
    make_tokenizer,
    reward_model,
    text_of,
)

GET_REWARD = xpo_trainer.get_reward


class Watch(TrainerCallback):
    """Puts given completions and scores in place of sampled ones, and notes what TRL makes of them."""

    def __init__(self, case: Case, trainer: XPOTrainer) -> None:
        self.case, self.trainer = case, trainer
        self.rows = {text: row for row, text in enumerate(case.texts())}
        self.seen: list[int] = []
        self.noted: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, Tensor] = {}
        self._left: list[list[float]] = []
        trainer.add_callback(self)
        trainer._generate_completions = self.given
        xpo_trainer.get_reward = self.scores
        trainer._compute_rewards = self.noting(trainer._compute_rewards, "scores.by_policy", "scores.by_sampler")
        logps = ("policy_logps.by_policy", "policy_logps.by_sampler")
        logps += ("reference_logps.by_sampler", "reference_logps.by_policy")
        trainer._compute_logprobs = self.noting(trainer._compute_logprobs, *logps)
        trainer._compute_losses = self.noting(trainer._compute_losses, "loss", "dpo", "xpo")

    def given(self, prompts: dict[str, Any], model: Any) -> tuple[Tensor, Tensor]:
        """Return prompts with their completions, as `generate` would."""
        rows = [self.rows[text] for text in prompts["raw"]]
        case, pad = self.case, self.trainer.processing_class.pad_token_id
        for row, ids, mask in zip(rows, prompts["input_ids"], prompts["attention_mask"], strict=True):
            if ids[mask.bool()].tolist() != list(case.prompts[row]):
                raise RuntimeError(f"TRL reads other tokens than were given in {text_of(case.prompts[row])!r}")
        self.seen += rows
        sides = (case.by_policy, case.by_sampler)
        width = max(len(side[row]) for side in sides for row in rows)
        both = [[list(side[row]) + [pad] * (width - len(side[row])) for row in rows] for side in sides]
        self._left = [[scores[row] for row in rows] for scores in (case.policy_scores, case.sampler_scores)]
        return tuple(torch.cat([prompts["input_ids"], torch.tensor(side)], 1) for side in both)

    def scores(self, *_: Any) -> tuple[None, Tensor, None]:
        """Return scores as `get_reward` would, first of the policy's completions."""
        return None, torch.tensor(self._left.pop(0)), None

    def noting(self, function: Any, *names: str) -> Any:
        """Wrap a method: what it returns is noted under these names."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            for name, value in zip(names, output, strict=True):
                kept = value.detach().clone()
                self.noted.setdefault(name, []).append(kept.sum(1) if "logps" in name else kept)
            return output

        return wrapped

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note the gradients that the optimizer is about to use."""
        weights = self.trainer.model.named_parameters()
        self.gradients = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}

    def results(self) -> dict[str, Tensor]:
        """Return all that was noted, in the order of the case's pairs."""
        order = torch.tensor(self.seen).argsort()
        out = {"loss": torch.stack(self.noted.pop("loss")).mean()}
        out |= {name: torch.cat(values)[order].contiguous() for name, values in self.noted.items()}
        logged = next(row for row in self.trainer.state.log_history if "loss/dpo" in row)
        numbers = {name: value for name, value in logged.items() if isinstance(value, int | float)}
        out |= {f"logged.{name}": torch.tensor(float(value)) for name, value in numbers.items()}
        return out | {f"gradient.{name}": value.contiguous() for name, value in self.gradients.items()}


def run(case: Case) -> dict[str, Tensor]:
    """Take one optimizer step of TRL's."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, folder)
        watch = Watch(case, trainer)
        trainer.train()
    return watch.results()


def make_trainer(case: Case, folder: str, reward_tokenizer: Any = None, **options: Any) -> XPOTrainer:
    """Build TRL's trainer for a case, in float32 and without clipping."""
    policy, reference = case.models()
    tokenizer = make_tokenizer(case.tokenizer)
    args = XPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=len(case.prompts) // case.accumulate,
        gradient_accumulation_steps=case.accumulate,
        max_new_tokens=MOST,
        max_grad_norm=0.0,
        learning_rate=1e-6,
        alpha=[case.alpha],
        beta=[case.beta],
        loss_type=case.loss,
        missing_eos_penalty=case.penalty,
        **options,
    )
    trainer = XPOTrainer(
        model=policy,
        ref_model=None if case.lora else reference,
        reward_funcs=reward_model(),
        reward_processing_classes=reward_tokenizer or tokenizer,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": case.texts()}),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if case.lora else None,
    )
    if case.lora:
        fill_adapters(trainer.model)
    return trainer


def reference_samples() -> dict[str, Tensor]:
    """Let TRL's trainer write for LoRA's reference, greedily, beside the model without adapters and with them."""
    case = cases()["llama, LoRA"]
    rows = [prompt for prompt in case.prompts if len(prompt) == 5]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, folder, generation_kwargs={"do_sample": False})
        prompts = {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(1, 5, dtype=torch.long), "raw": []}
        by_policy, by_reference = trainer._generate_completions(prompts, trainer.model)
    greedy = {"max_new_tokens": MOST, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    right = make_model("llama").generate(input_ids=prompts["input_ids"], **greedy)
    return {"by_policy": by_policy[:, 5:], "by_reference": by_reference[:, 5:], "without_adapters": right[:, 5:]}


def reward_scores() -> dict[str, Tensor]:
    """Let TRL score the policy's completions with a reward model, whose own tokenizer it is given."""
    case, scores = cases()["llama"], {}
    for name, kind, shift in REWARD_TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            like = replace(case, tokenizer=kind, penalty=None)
            trainer = make_trainer(like, folder, reward_tokenizer=make_tokenizer(kind, shift))
        pad = trainer.processing_class.pad_token_id
        rows, width = list(zip(case.prompts, case.by_policy, strict=True)), max(map(len, case.prompts))
        ids = [[pad] * (width - len(p)) + [*p, *c] + [pad] * (MOST - len(c)) for p, c in rows]
        data = {"input_ids": torch.tensor(ids)}
        xpo_trainer.get_reward = GET_REWARD
        scores[name] = trainer._compute_rewards(data, data, width)[0]
    return scores


def main() -> None:
    """Run every case and write a file for each."""
    out = Path(sys.argv[1])
    for case in cases().values():
        save_file(run(case), out / f"{case.name}.safetensors")
    samples = {name: value.contiguous() for name, value in reference_samples().items()}
    save_file(samples, out / "reference samples.safetensors")
    save_file(reward_scores(), out / "reward scores.safetensors")


if __name__ == "__main__":
    main()
