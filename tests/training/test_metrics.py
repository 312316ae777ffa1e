"""Metrics: what each name means, how batches are averaged, and the KL divergence against its exact value."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import PROMPTS, Recorder, completions_of, fit_quietly, loader, prompts_of, quiet_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from xpo_lightning import Experience, ModelSpec, Pair, Sampling, SigmoidLoss, XPOLightningModule, xpo_loss
from xpo_lightning.losses.xpo import XPOLoss
from xpo_lightning.rewards.python import PythonReward
from xpo_lightning.training.metric_names import METRICS
from xpo_lightning.training.metrics import PairAverages, rollout_metrics, update_metrics

MakeModule = Callable[..., XPOLightningModule]

# What users of TRL's XPO trainer know.
KNOWN_NAMES = {
    "loss/dpo",
    "loss/xpo",
    "objective/kl",
    "objective/entropy",
    "objective/model_scores",
    "objective/ref_scores",
    "objective/scores_margin",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "val/model_contain_eos_token",
    "val/ref_contain_eos_token",
}


# ---- averages ----


@pytest.mark.parametrize("sizes", [(7,), (1, 4, 2), (3, 1, 1, 2)], ids=["whole", "uneven", "many"])
def test_pair_averages_equal_numpy_over_uneven_batches(sizes: tuple[int, ...]):
    """The standard error of a mean of n pairs is s / sqrt(n), with s^2 the sum of squared deviations over n - 1."""
    chance = np.random.default_rng(0)
    win, other = chance.choice([0.0, 0.5, 1.0], 7), chance.normal(5, 3, 7)
    averages, start = PairAverages(), 0
    for size in sizes:
        part = slice(start, start + size)
        averages.update({"win_rate": torch.tensor(win[part]).float(), "other": torch.tensor(other[part]).float()})
        start += size
    result = {name: value.item() for name, value in averages.compute().items()}
    assert result["win_rate"] == pytest.approx(win.mean())
    assert result["other"] == pytest.approx(other.mean(), rel=1e-6)
    assert result["win_rate_stderr"] == pytest.approx(win.std(ddof=1) / math.sqrt(7), rel=1e-6)
    assert set(result) == {"win_rate", "other", "win_rate_stderr"}


def test_pair_averages_worked_by_hand():
    """Wins 1, 0, 0.5, 1 average 0.625; deviations 0.375, -0.625, -0.125, 0.375 square to 0.6875, over 3 is 0.2291667.

    Its root 0.4787136 over sqrt(4) is 0.2393568.
    """
    averages = PairAverages()
    averages.update({"win_rate": torch.tensor([1.0, 0.0, 0.5])})
    averages.update({"win_rate": torch.tensor([1.0])})
    assert averages.compute()["win_rate"].item() == 0.625
    assert averages.compute()["win_rate_stderr"].item() == pytest.approx(0.2393568)


def test_the_divergence_has_a_standard_error_too():
    """0, 2 and 4 nats: deviations of 2 square to 8, over 2 is 4; its root 2 over sqrt(3) is 1.1547005."""
    averages = PairAverages()
    averages.update({"objective/kl": torch.tensor([0.0, 2.0, 4.0]), "other": torch.ones(3)})
    result = averages.compute()
    assert result["objective/kl_stderr"].item() == pytest.approx(1.1547005)
    assert set(result) == {"objective/kl", "objective/kl_stderr", "other"}


def test_pair_averages_after_a_reset_start_anew():
    averages = PairAverages()
    averages.update({"win_rate": torch.tensor([1.0, 1.0]), "x": torch.tensor([9.0, 9.0])})
    averages.reset()
    averages.update({"win_rate": torch.tensor([0.0]), "x": torch.tensor([1.0])})
    result = averages.compute()
    assert result["win_rate"].item() == 0.0
    assert result["x"].item() == 1.0
    assert result["win_rate_stderr"].item() == 0.0


def test_pair_averages_of_many_pairs_keep_their_digits():
    """Float32 sums of 100,000 times 0.1 would drift, and equal wins would seem to vary."""
    averages = PairAverages()
    for _ in range(100):
        averages.update({"win_rate": torch.full((1000,), 3.0), "x": torch.full((1000,), 0.1)})
    assert averages.compute()["x"].item() == pytest.approx(0.1, rel=1e-7)
    assert averages.compute()["win_rate_stderr"].item() == pytest.approx(0.0, abs=1e-7)


# ---- one batch ----


def worked_objective() -> tuple[Experience, XPOLoss, Pair[Tensor]]:
    """Evaluate a pair that the policy won, one that it lost, and a tie of two identical completions."""
    policy_logps = Pair(torch.tensor([-10.0, -4.0, -6.0]), torch.tensor([-20.0, -3.0, -6.0]))
    reference_logps = Pair(torch.tensor([-12.0, -3.0, -7.0]), torch.tensor([-15.0, -5.0, -7.0]))
    by_policy = completions_of([[1, 2, 3], [4], [5, 6]], ended=[True, False, True])
    token_logps = torch.tensor([[-5.0, -3.0, -2.0], [-4.0, 0.0, 0.0], [-2.5, -3.5, 0.0]])
    by_policy = dataclasses.replace(by_policy, token_logps=token_logps)  # sums -10, -4, -6, as below
    by_sampler = completions_of([[1, 2], [4, 4], [5, 6]], ended=[False, False, True])
    pairs = Experience(
        prompts=prompts_of([[1], [2, 3], [4]]),
        completions=Pair(by_policy, by_sampler),
        scores=Pair(torch.tensor([2.0, -1.0, 3.0]), torch.tensor([0.5, 1.0, 3.0])),
        labels=torch.tensor([1.0, 0.0, 0.5]),
        reference_logps=reference_logps,
    )
    options: dict[str, Any] = {"alpha": 0.01, "beta": 0.1, "preference_loss": SigmoidLoss()}
    loss = xpo_loss(policy_logps, reference_logps, pairs.labels, pairs.identical, **options)
    return pairs, loss, policy_logps


def worked_pairs() -> tuple[dict[str, Tensor], Tensor]:
    pairs, loss, policy_logps = worked_objective()
    return rollout_metrics(pairs, beta=0.1) | update_metrics(pairs, loss, policy_logps, beta=0.1), loss.total


def test_pair_metrics_are_those_worked_by_hand():
    """Log-ratios: policy's completions 2, -1, 1; reference's -5, 2, 1; times beta 0.1 they are implicit rewards.

    Scores less beta times KL: 2 - 0.2, -1 + 0.1, 3 - 0.1.
    Won pair: chosen 0.2, rejected -0.5. Lost pair: chosen 0.2 (the reference's), rejected -0.1. Tie: the mean, 0.1.
    Losses: margin 0.7, log(1 + e^-0.7) = 0.4031860; margin 0.3, log(1 + e^-0.3) = 0.5543552; identical pair: 0.
    """
    expected = {
        "loss/dpo": [0.4031860, 0.5543552, 0.0],
        "loss/xpo": [-0.20, -0.03, -0.06],
        "loss/total": [0.2031860, 0.5243552, -0.06],
        "objective/kl": [2.0, -1.0, 1.0],
        "objective/entropy": [10.0, 4.0, 6.0],
        "objective/rlhf_reward": [1.8, -0.9, 2.9],
        "objective/model_scores": [2.0, -1.0, 3.0],
        "objective/ref_scores": [0.5, 1.0, 3.0],
        "objective/scores_margin": [1.5, -2.0, 0.0],
        "rewards/chosen": [0.2, 0.2, 0.1],
        "rewards/rejected": [-0.5, -0.1, 0.1],
        "rewards/margins": [0.7, 0.3, 0.0],
        "rewards/accuracies": [1.0, 1.0, 0.5],
        "logps/chosen": [-10.0, -3.0, -6.0],
        "logps/rejected": [-20.0, -4.0, -6.0],
        "logps/reference_completions": [-20.0, -3.0, -6.0],
        "val/model_contain_eos_token": [1.0, 0.0, 1.0],
        "val/ref_contain_eos_token": [0.0, 0.0, 1.0],
        "completions/model_length": [3.0, 1.0, 2.0],
        "completions/ref_length": [2.0, 2.0, 2.0],
        "pairs/tied": [0.0, 0.0, 1.0],
        "pairs/identical": [0.0, 0.0, 1.0],
        "win_rate": [1.0, 0.0, 0.5],
    }
    values, _ = worked_pairs()
    for name, numbers in expected.items():
        assert values[name].tolist() == pytest.approx(numbers, abs=1e-6), name
        assert values[name].dtype == torch.float32


def test_the_page_says_which_metrics_describe_an_update():
    page = Path(__file__).parents[2].joinpath("docs", "metrics.md").read_text()
    (named,) = re.findall(r"Two kinds of pairs are averaged\. (.*?) describe the pairs of the", page, re.DOTALL)
    groups = re.findall(r"`(\w+/)\*`", named)
    pairs, loss, policy_logps = worked_objective()
    update = update_metrics(pairs, loss, policy_logps, beta=0.1)
    assert {name for name in update if not name.startswith(tuple(groups))} == set()
    assert not [name for name in rollout_metrics(pairs, beta=0.1) if name.startswith(tuple(groups))]


def test_metrics_that_a_callback_may_watch_are_those_of_the_page():
    page = Path(__file__).parents[2].joinpath("docs", "metrics.md").read_text()
    named = {
        name
        for cells in re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cells)
    }
    watched = {name for name in METRICS if not name.startswith("eval/")}
    assert watched - named == {"step", "epoch"}, "what Lightning logs beside them"
    assert named - watched == set()


def test_rewards_accuracies_when_the_policy_disagrees_with_the_label_are_0():
    """The chosen completion has the lower implicit reward: log-ratios -3 for the winner and 1 for the loser."""
    logps = Pair(torch.tensor([-8.0]), torch.tensor([-4.0]))
    reference = Pair(torch.tensor([-5.0]), torch.tensor([-5.0]))
    pairs = Experience(
        prompts_of([[1]]),
        Pair(completions_of([[1]]), completions_of([[2]])),
        Pair(torch.tensor([1.0]), torch.tensor([0.0])),
        torch.tensor([1.0]),
        reference,
    )
    same = pairs.identical
    loss = xpo_loss(logps, reference, pairs.labels, same, alpha=0.0, beta=0.5, preference_loss=SigmoidLoss())
    values = update_metrics(pairs, loss, logps, beta=0.5)
    assert values["rewards/accuracies"].item() == 0.0
    assert values["rewards/margins"].item() == -2.0


# ---- names in a run ----


def test_training_logs_every_known_name_and_alpha_and_beta(make_module: MakeModule):
    recorder = Recorder()
    fit_quietly(make_module(alpha=0.02, beta=0.3), PROMPTS, callbacks=[recorder])
    (step,) = recorder.steps
    assert step.keys() >= KNOWN_NAMES | {"alpha", "beta"}
    assert step["alpha"] == pytest.approx(0.02)
    assert step["beta"] == pytest.approx(0.3)
    assert step["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # policy and reference are equal at the first step
    assert all(math.isfinite(value) for value in step.values())


def test_validation_logs_every_known_name_under_eval(make_module: MakeModule):
    trainer = quiet_trainer()
    trainer.validate(make_module(), loader(PROMPTS, 2), verbose=False)
    expected = {f"eval/{name}" for name in KNOWN_NAMES} | {
        "eval/win_rate",
        "eval/win_rate_stderr",
        "eval/objective/kl_stderr",
    }
    assert trainer.callback_metrics.keys() >= expected


def test_validation_does_not_depend_on_the_batches_when_greedy(make_module: MakeModule):
    results = []
    for batch_size in (5, 2):
        module = make_module(sampling=Sampling(max_new_tokens=5, temperature=0.0))
        (numbers,) = quiet_trainer().validate(module, loader(PROMPTS, batch_size), verbose=False)
        results.append(numbers)
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, abs=1e-4), name


# ---- KL and entropy against their exact values ----

WORDS = ["<unk>", *"abcdefg"]


@pytest.fixture
def enumerable(tmp_path: Path) -> XPOLightningModule:
    """Give a module with 64 completions, two of eight tokens, whose policy was moved off its reference."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    module = XPOLightningModule(
        policy=ModelSpec(str(tmp_path)),
        reward=PythonReward(lambda prompts, completions, columns: [float(len(text)) for text in completions]),
        sampling=Sampling(max_new_tokens=2, eos_token_ids=[]),
        micro_batch_size=500,
    )
    module.configure_model()
    with torch.no_grad():
        for weight in module.policy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    return module


@torch.no_grad()
def all_logps(model: torch.nn.Module, prompt: list[int]) -> Tensor:
    """Score all 64 completions of a prompt, one forward pass each."""
    total = []
    for first, second in itertools.product(range(8), repeat=2):
        steps = model(input_ids=torch.tensor([[*prompt, first, second]])).logits[0].double().log_softmax(-1)
        total.append(steps[len(prompt) - 1, first] + steps[len(prompt), second])
    return torch.stack(total)


def test_kl_and_entropy_are_within_sampling_error_of_their_exact_values(enumerable: XPOLightningModule):
    """KL = sum_y pi(y) log pi(y)/ref(y) and H = -sum_y pi(y) log pi(y), by enumeration, averaged over two prompts.

    Over n samples the mean is within four standard errors, sqrt(variance / n), but for one seed in 16,000. A KL that
    mixes in the reference's own samples, as TRL's did, would be near 0.
    """
    prompts, rows = ["a b c", "f"], 4000
    kl = entropy = kl_variance = entropy_variance = 0.0
    for prompt in prompts:
        ids = [WORDS.index(word) for word in prompt.split()]
        pi = all_logps(enumerable.policy, ids)
        ratio = pi - all_logps(enumerable.reference.frozen, ids)
        assert pi.exp().sum().item() == pytest.approx(1.0)
        for values, sign in ((ratio, 1), (pi, -1)):
            mean = (pi.exp() * values).sum()
            variance = (pi.exp() * (values - mean).square()).sum()
            if sign == 1:
                kl, kl_variance = kl + mean.item() / 2, kl_variance + variance.item() / 4
            else:
                entropy, entropy_variance = entropy - mean.item() / 2, entropy_variance + variance.item() / 4
    assert kl > 0.1
    (logged,) = quiet_trainer().validate(enumerable, loader(prompts * rows, 2000), verbose=False)
    assert abs(logged["eval/objective/kl"] - kl) < 4 * math.sqrt(kl_variance / rows)
    assert abs(logged["eval/objective/entropy"] - entropy) < 4 * math.sqrt(entropy_variance / rows)
    assert 4 * math.sqrt(kl_variance / rows) < kl / 3


def test_two_validations_differ_by_the_policy_alone(make_module: MakeModule):
    """The reference's completions and scores are the same each time, however the policy has changed."""
    module = make_module(learning_rate=0.05)
    numbers = []
    for _ in range(2):
        numbers += quiet_trainer().validate(module, loader(PROMPTS, 2), verbose=False)
        fit_quietly(module, PROMPTS)
    before, after = numbers
    assert before["eval/objective/ref_scores"] == after["eval/objective/ref_scores"]
    assert before["eval/objective/model_scores"] != after["eval/objective/model_scores"]
