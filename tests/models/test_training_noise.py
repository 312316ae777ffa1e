"""A dropout of 0 leaves no noise in training, whatever a model draws random numbers for; null leaves what there is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GROUPED, PROMPTS, ROPE, Recorder, fit_quietly, make_tokenizer, noise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from xpo_lightning import InputError, LoRASpec, ModelSpec, XPOLightningModule
from xpo_lightning.data.prompts import as_prompts

MakeModule = Callable[..., XPOLightningModule]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL = {name: ROPE[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
HIDDEN = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
NOISY: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    # Draws experts at random in train mode, whatever its noise is set to.
    "phimoe": lambda: transformers.PhimoeConfig(**GROUPED, **EXPERTS),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, **EXPERTS, router_jitter_noise=0.5),
    "dbrx": lambda: transformers.DbrxConfig(
        **SMALL,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        initializer_range=0.3,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.5},
    ),
    # Skip layers at random.
    "opt": lambda: transformers.OPTConfig(**SMALL, **HIDDEN, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5),
    "biogpt": lambda: transformers.BioGptConfig(**{**ROPE, "pad_token_id": 1}, layerdrop=0.5),
    # Read dropout from the configuration at each call.
    "falcon": lambda: transformers.FalconConfig(**SMALL, **HIDDEN, hidden_dropout=0.5),
    "persimmon": lambda: transformers.PersimmonConfig(**ROPE, attention_dropout=0.5),
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], str]:
    def save(name: str) -> str:
        model = AutoModelForCausalLM.from_config(NOISY[name]())
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.copy_(0.3 * torch.randn(weight.shape))
        model.save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def losses_of(module: XPOLightningModule, policy: nn.Module | None = None) -> list[Tensor]:
    """Evaluate the objective of the same pairs three times, as the policy trains."""
    module.policy.eval()
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    pairs = module.collector.collect(module.policy, prompts, noise())
    module.policy.train()
    return [module.objective.evaluate(module.policy, pairs, alpha=0.01, beta=0.1)[0] for _ in range(3)]


def are_equal(values: list[Tensor]) -> bool:
    return all(torch.equal(values[0], other) for other in values[1:])


@pytest.mark.parametrize("name", NOISY)
def test_an_untrained_policy_is_the_reference_in_training_too(make_module: MakeModule, saved: Any, name: str):
    """With the same weights and without noise both rate every completion alike: margins 0, a loss of ln 2."""
    recorder = Recorder()
    module = make_module(policy=ModelSpec(saved(name)), learning_rate=0.0)
    fit_quietly(module, PROMPTS * 2, callbacks=[recorder])
    (step,) = recorder.steps
    assert step["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert step["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert are_equal(losses_of(module))


@pytest.mark.parametrize("name", [name for name in NOISY if name not in ("opt", "biogpt")])
def test_noise_stays_where_dropout_is_null(make_module: MakeModule, saved: Any, name: str):
    module = make_module(policy=ModelSpec(saved(name), dropout=None), learning_rate=0.0)
    fit_quietly(module, PROMPTS)
    assert not are_equal(losses_of(module))


@pytest.mark.parametrize("name", ["opt", "biogpt"])
def test_layers_are_never_skipped(make_module: MakeModule, saved: Any, name: str):
    """What a skipped layer had of the prompt would be missing for its completions."""
    module = make_module(policy=ModelSpec(saved(name), dropout=None), learning_rate=0.0)
    fit_quietly(module, PROMPTS)
    for part in module.policy.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "dropout"):
            part.dropout = 0.0
    assert are_equal(losses_of(module))


def test_adapters_keep_their_dropout_where_the_policy_has_none(make_module: MakeModule, saved: Any):
    lora = LoRASpec(r=2, dropout=0.5, target_modules=["q_proj", "v_proj"])
    module = make_module(policy=ModelSpec(saved("phimoe")), lora=lora, learning_rate=0.1)
    fit_quietly(module, PROMPTS)
    assert not are_equal(losses_of(module))
    for part in module.policy.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    assert are_equal(losses_of(module))


def test_random_numbers_of_a_run_do_not_depend_on_the_trial(make_module: MakeModule, saved: Any):
    """Which modules draw is found out without taking numbers from those that dropout and user code draw from."""
    module = make_module(policy=ModelSpec(saved("phimoe")))
    module.configure_model()
    module.policy.train()
    before = torch.get_rng_state()
    module._stop_noise()
    assert torch.equal(before, torch.get_rng_state())


def test_layers_that_are_computed_again_are_so_without_noise(make_module: MakeModule, saved: Any):
    """The backward pass must find the same experts."""
    folder, gradients = saved("phimoe"), []
    for again in (False, True):
        module = make_module(policy=ModelSpec(folder, gradient_checkpointing=again), learning_rate=0.0)
        fit_quietly(module, PROMPTS)
        module.policy.zero_grad()
        losses_of(module)[0].sum().backward()
        gradients.append([weight.grad for weight in module.policy.parameters()])
        assert all(part.training for part in module.policy.modules())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Restless(nn.Module):
    """Adds noise in eval mode too."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden)


def test_a_model_that_draws_in_eval_mode_too_is_refused(
    make_module: MakeModule, saved: Any, monkeypatch: pytest.MonkeyPatch
):
    load = ModelSpec.load_model

    def load_restless(self: ModelSpec) -> nn.Module:
        model: Any = load(self)
        model.model.layers.append(Restless())
        model.model.norm = nn.Sequential(model.model.norm, Restless())
        return model

    monkeypatch.setattr(ModelSpec, "load_model", load_restless)
    module = make_module()
    module.configure_model()
    with pytest.raises(
        InputError, match=r"model\.policy\.dropout: Restless draws .* set model\.policy\.dropout to null"
    ):
        module._stop_noise()
