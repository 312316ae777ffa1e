"""The two-armed bandit of Proposition 2.1 (arXiv 2405.21046, Appendix D.1), which passive exploration cannot solve.

One prompt, two completions of one token: r(a) = 1, r(b) = 1/2, and pi_ref(a) = exp(-1/(8 beta)) is tiny. Whoever draws
both completions from the policy, or one from the reference, sees `a` about once in 1/pi_ref(a) draws.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from conftest import quiet_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from xpo_lightning import BufferOptions, LabelRule, LoadedModel, PythonReward, Sampling, XPOLightningModule

BETA = 0.015
RARE = math.exp(-1 / (8 * BETA))  # pi_ref(a), 2.4e-4
BATCH, BATCHES = 8, 32  # 256 labels; pi_ref(a) * 256 is 0.06


class Arms(nn.Module):
    """A language model of two tokens that looks at nothing: its weight is the difference of their logits."""

    def __init__(self) -> None:
        super().__init__()
        size = {"vocab_size": 2, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        self.config = transformers.LlamaConfig(**size, bos_token_id=None, eos_token_id=None)
        self.difference = nn.Parameter(torch.tensor(math.log(RARE / (1 - RARE))))
        self.embedding = nn.Embedding(2, 1).requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, **_: Any) -> CausalLMOutputWithPast:
        logits = torch.stack([self.difference, torch.zeros_like(self.difference)])
        return CausalLMOutputWithPast(logits=logits.expand(*input_ids.shape, 2))


def reward_of_arms(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [1.0 if completion.strip() == "a" else 0.5 for completion in completions]


def regret(module: XPOLightningModule) -> float:
    """max J_beta - J_beta(pi), with J_beta(pi) = E_pi[r] - beta KL(pi, pi_ref), by enumeration."""
    ref = torch.tensor([RARE, 1 - RARE], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.5], dtype=torch.float64)
    pi = torch.stack([module.policy.difference.detach().double(), torch.zeros((), dtype=torch.float64)]).log_softmax(0)
    value = (pi.exp() * (rewards - BETA * (pi - ref.log()))).sum()
    return float(BETA * torch.logsumexp(ref.log() + rewards / BETA, 0) - value)


def final_regret(seed: int, **options: Any) -> float:
    """Train by plain SGD, and return the regret at the end."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    module = XPOLightningModule(
        policy=LoadedModel(Arms(), PreTrainedTokenizerFast(tokenizer_object=words, unk_token="b")),
        reward=PythonReward(reward_of_arms),
        sampling=Sampling(max_new_tokens=1, eos_token_ids=[]),
        labels=LabelRule(rule="bradley_terry"),
        beta=BETA,
        optimizer=partial(torch.optim.SGD, lr=5000.0),
        lr_schedule="constant",
        max_grad_norm=None,
        micro_batch_size=10_000,
        **options,
    )
    torch.manual_seed(seed)
    batches = torch.utils.data.DataLoader(["b"] * (BATCH * BATCHES), batch_size=BATCH, collate_fn=list)
    quiet_trainer().fit(module, batches)
    return regret(module)


XPO: dict[str, Any] = {"alpha": 0.05, "alpha_in_beta": True}
ACCUMULATED: dict[str, Any] = {"buffer": BufferOptions(), "epochs_per_rollout": 50}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_accumulation_with_inner_epochs_finds_the_rare_arm(seed: int):
    """256 labels are an eighth of those that online DPO provably needs, exp(1/(8 beta)) / 2 = 2080."""
    assert final_regret(seed, **XPO, **ACCUMULATED) < 1 / 8


def test_a_single_step_a_batch_does_not():
    """At pi = pi_ref the bonus has no gradient on average, and on (b, b) pairs one of size alpha pi(a)."""
    assert [final_regret(seed, **XPO) > 1 / 8 for seed in range(5)] == [True] * 5


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, -0.05], ids=["online DPO", "the wrong sign"])
def test_neither_does_accumulation_without_the_bonus(alpha: float):
    assert final_regret(0, **{**XPO, "alpha": alpha}, **ACCUMULATED) > 1 / 8
