"""Adapters on models whose layers are no plain linear layers: fused experts, routers, fused kernels, shared weights."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    GROUPED,
    PROMPTS,
    ROPE,
    VOCABULARY,
    Recorder,
    fit_quietly,
    make_tokenizer,
    naive_token_logps,
    noise,
    randomize_adapters,
)
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from xpo_lightning import InputError, LoadedModel, LoRASpec, ModelSpec, Sampling, XPOLightningModule
from xpo_lightning.callbacks import PolicyExport
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.models.lora import cast_lora_weights

MakeModule = Callable[..., XPOLightningModule]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ONE_OF_EACH = {"layer_types": ["linear_attention", "full_attention"]}
FUSED: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4, head_dim=8),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **ROPE, **EXPERTS, **LATENT, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **GROUPED, **EXPERTS, **DELTA, **ONE_OF_EACH, num_experts=4, head_dim=8, shared_expert_intermediate_size=24
    ),
}
DEAR_OF_FUSED = [
    *("qwen3_moe", "mixtral"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in FUSED if name not in ("qwen3_moe", "mixtral")),
]
"""For tests that take seconds for each: two by default, and the others with the slow tests."""
ROUTED: dict[str, tuple[Callable[[], transformers.PreTrainedConfig], str]] = {
    "phimoe": (lambda: transformers.PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2), "router"),
    "llama4": (
        lambda: transformers.Llama4TextConfig(
            **GROUPED, num_local_experts=4, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=8
        ),
        "router",
    ),
}
MAMBA: dict[str, tuple[Callable[[], transformers.PreTrainedConfig], set[str]]] = {
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
        {"in_proj"},
    ),
    "mamba2": (
        lambda: transformers.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=4,
            head_dim=16,
            n_groups=1,
        ),
        {"in_proj"},
    ),
}


def build(config: transformers.PreTrainedConfig) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(0.2 * torch.randn(weight.shape))
    return model


def logits_of(model: nn.Module) -> Tensor:
    ids = torch.arange(10, 30).view(2, 10)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def adapted_names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


# ---- experts in one parameter ----


def adapted(name: str, dtype: torch.dtype, rounded: bool) -> nn.Module:
    """Build a model with adapters, the same each time; `rounded` gives weights that bfloat16 has."""
    torch.manual_seed(0)
    model = build(FUSED[name]()).to(torch.bfloat16 if rounded else dtype).to(dtype)
    wrapped = LoRASpec(r=2).wrap(model)
    assert any(isinstance(layer, ParamWrapper) for layer in wrapped.modules())
    randomize_adapters(wrapped, 0.1)
    return wrapped


def outputs_of(model: nn.Module, converted: bool) -> tuple[Tensor, list[Tensor]]:
    """Return logits, and the gradients of the adapters of a loss of them."""
    model.zero_grad()
    with cast_lora_weights(model) if converted else nullcontext():
        logits = logits_of(model).float()
        logits.square().mean().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    return logits.detach(), gradients


@pytest.mark.parametrize("name", FUSED)
def test_adapters_of_fused_experts_give_what_peft_gives(name: str):
    model = adapted(name, torch.float32, rounded=False)
    (plain, plain_gradients), (own, own_gradients) = (outputs_of(model, converted) for converted in (False, True))
    torch.testing.assert_close(own, plain)
    for one, other in zip(own_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", DEAR_OF_FUSED)
def test_in_bfloat16_they_are_as_near_to_float32_as_peft_is(name: str):
    """Rounding sends a few tokens to other experts, whichever way, so it is the median token that is compared."""
    exact, _ = outputs_of(adapted(name, torch.float32, rounded=True), converted=False)
    model = adapted(name, torch.bfloat16, rounded=True)
    plain, own = (
        float((outputs_of(model, converted)[0] - exact).abs().mean(-1).median()) for converted in (False, True)
    )
    assert own < 2 * plain
    assert own < 0.05 * float(exact.abs().mean())


@pytest.mark.parametrize("name", DEAR_OF_FUSED)
def test_a_step_with_default_targets_on_fused_experts(make_module: MakeModule, name: str):
    """The adapted policy is scored as row by row without padding, and its experts' adapters are trained."""
    recorder, model = Recorder(), build(FUSED[name]())
    module = make_module(policy=LoadedModel(model, make_tokenizer()), lora=LoRASpec(r=2), learning_rate=0.05)
    fit_quietly(module, PROMPTS * 2, batch_size=5, callbacks=[recorder])
    assert recorder.steps[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    experts = [layer for layer in module.policy.modules() if isinstance(layer, ParamWrapper)]
    assert all(float(layer.lora_B["default"].weight.detach().abs().max()) > 0 for layer in experts)
    module.policy.eval()
    pairs = module.collector.collect(module.policy, as_prompts(PROMPTS, module.prompt_encoder, module.device), noise())
    written = pairs.completions.by_policy
    for row in range(len(pairs)):
        prompt = pairs.prompts.ids[row][pairs.prompts.mask[row]].tolist()
        completion = written.ids[row][written.mask[row]].tolist()
        kept = written.token_logps[row][written.mask[row]].tolist()
        assert kept == pytest.approx(naive_token_logps(module.policy, prompt, completion), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "merge"),
    [
        ("qwen3_moe", False),
        ("mixtral", True),
        *(
            pytest.param(name, merge, marks=pytest.mark.slow)
            for name in FUSED
            for merge in (False, True)
            if (name, merge) not in (("qwen3_moe", False), ("mixtral", True))
        ),
    ],
)
def test_exported_adapters_of_fused_experts_are_the_policy(
    make_module: MakeModule, tmp_path: Path, name: str, merge: bool
):
    build(FUSED[name]()).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    module = make_module(policy=ModelSpec(str(tmp_path / "base")), lora=LoRASpec(r=2), learning_rate=0.1)
    export = PolicyExport("policy", merge_adapters=merge)
    fit_quietly(module, PROMPTS, callbacks=[export], default_root_dir=tmp_path)
    module.policy.eval()
    loader = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    with torch.no_grad():
        expected = logits_of(module.policy)
        exported = logits_of(loader.from_pretrained(tmp_path / "policy").eval())
        base = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval())
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
    assert float((base - expected).abs().max()) > 1e-2


def test_dropout_on_adapters_of_fused_experts_is_refused():
    with pytest.raises(InputError, match=r"model\.lora\.dropout=0\.1: .* set it to 0, or name .* such as \['k_proj', "):
        LoRASpec(r=2, dropout=0.1).wrap(build(FUSED["mixtral"]()))


# ---- layers that are no linear layers, or are passed by ----


@pytest.mark.parametrize("name", ROUTED)
def test_default_targets_leave_routers_out(make_module: MakeModule, name: str):
    config, router = ROUTED[name]
    recorder, model = Recorder(), build(config())
    module = make_module(policy=LoadedModel(model, make_tokenizer()), lora=LoRASpec(r=2))
    fit_quietly(module, PROMPTS, callbacks=[recorder])
    assert len(recorder.steps) == 1
    assert {"q_proj", "v_proj"} <= adapted_names(module.policy)
    assert router not in adapted_names(module.policy)


@pytest.mark.parametrize("name", ROUTED)
def test_a_router_that_is_named_is_refused(name: str):
    config, router = ROUTED[name]
    expected = rf"model\.lora\.target_modules: '.*{router}' cannot have adapters, because .*Router returns .*'q_proj'"
    with pytest.raises(InputError, match=expected) as refused:
        LoRASpec(r=2, target_modules=[router, "q_proj"]).wrap(build(config()))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", MAMBA)
def test_default_targets_leave_out_what_fused_kernels_pass_by(name: str):
    """With its kernels Mamba multiplies with the weights of some layers itself, without their adapters."""
    config, expected = MAMBA[name]
    wrapped = LoRASpec(r=2).wrap(build(config()))
    assert adapted_names(wrapped) == expected
    assert torch.isfinite(logits_of(wrapped)).all()


def test_targets_of_ordinary_models_are_all_their_linear_layers():
    for config in (transformers.LlamaConfig(**GROUPED), transformers.GPTNeoXConfig(**ROPE)):
        model = build(config)
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if type(layer) is nn.Linear}
        head = {"lm_head", "embed_out"}
        wrapped = LoRASpec(r=2).wrap(model)
        assert adapted_names(wrapped) == linear - head
        assert wrapped.peft_config["default"].exclude_modules is None


# ---- weights that layers share ----


def test_adapters_on_weights_that_layers_share_are_not_merged(make_module: MakeModule, tmp_path: Path):
    """Each layer has its own adapter; what is merged into the weight would be in all of them."""
    config = transformers.ZambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        attention_hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_d_state=8,
        layers_block_type=["linear_attention", "linear_attention", "hybrid", "hybrid"],
        max_position_embeddings=64,
        use_mamba_kernels=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, tokenizer = build(config), make_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    spec = ModelSpec(str(tmp_path / "base"))
    module = make_module(policy=spec, lora=LoRASpec(r=2), sampling=Sampling(max_new_tokens=2))
    with pytest.raises(InputError, match=r"model\.lora\.target_modules: .* in several places.* merge_adapters to"):
        fit_quietly(module, PROMPTS, callbacks=[PolicyExport(merge_adapters=True)], default_root_dir=tmp_path)
    LoRASpec(r=2).wrap(spec.load_model()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"model\.policy\.path: .* in several places"):
        ModelSpec(str(tmp_path / "adapter")).load_model()
