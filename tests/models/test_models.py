"""The policy and its frozen reference, adapters, quantized weights and dropout."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import CONFIGS, PROMPTS, ROPE, Recorder, fit_quietly, logits_of, make_tokenizer, noise, randomize_adapters
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD
from transformers import AutoModelForCausalLM, LlamaConfig

from xpo_lightning import InputError, LoRASpec, ModelSpec, Pair, Sampling, XPOLightningModule
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.models.policy import end_token_ids
from xpo_lightning.models.reference import Reference
from xpo_lightning.models.saving import check_exportable
from xpo_lightning.rollout.local import LocalRollout

MakeModule = Callable[..., XPOLightningModule]
LoadModel = Callable[..., nn.Module]


def sgd(parameters: list[nn.Parameter]) -> SGD:
    return SGD(parameters, lr=0.3)


def lora_module(make_module: MakeModule, arch: str = "llama", **options: Any) -> XPOLightningModule:
    """Build a module whose adapters already changed the policy."""
    module = make_module(arch, lora=LoRASpec(r=4, **options.pop("lora", {})), **options)
    module.configure_model()
    randomize_adapters(module.policy)
    return module


# ---- the reference of a policy with adapters ----


def test_lora_reference_samples_and_scores_as_the_base_model(arch: str, make_module: MakeModule, load_model: LoadModel):
    module, base = lora_module(make_module, arch), load_model(arch)
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    roll = LocalRollout(make_tokenizer(), Sampling(max_new_tokens=8), [])
    expected = roll(base, prompts, noise())
    with module.reference.lent() as reference:
        sampled = roll(reference, prompts, noise())
        scored = token_logps(reference, prompts, expected)
    assert torch.equal(sampled.ids, expected.ids)
    torch.testing.assert_close(sampled.token_logps, expected.token_logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored, token_logps(base, prompts, expected), rtol=0, atol=1e-5)
    assert not torch.equal(roll(module.policy, prompts, noise()).ids, expected.ids)
    assert (token_logps(module.policy.eval(), prompts, expected) - scored).abs().max() > 0.1


def test_collected_pairs_of_a_lora_policy_are_those_of_two_separate_models(
    make_module: MakeModule, load_model: LoadModel
):
    """TRL's XPO sampled its reference from the policy itself here."""
    module = lora_module(make_module, sampling=Sampling(max_new_tokens=6, temperature=0.0))
    base, merged = load_model(), load_model()
    merged = get_peft_model(merged, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear"))
    randomize_adapters(merged)
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    pairs = module.collector.collect(module.policy, prompts, noise())
    roll = LocalRollout(make_tokenizer(), module.sampling, end_token_ids(base, make_tokenizer()))
    expected = Pair(roll(merged, prompts, noise()), roll(base, prompts, noise()))
    assert pairs.completions.by_policy.texts == expected.by_policy.texts
    assert pairs.completions.by_sampler.texts == expected.by_sampler.texts
    assert expected.by_policy.texts != expected.by_sampler.texts
    for ours, completions in (
        (pairs.reference_logps.by_policy, expected.by_policy),
        (pairs.reference_logps.by_sampler, expected.by_sampler),
    ):
        torch.testing.assert_close(ours, token_logps(base, prompts, completions).sum(1), rtol=0, atol=1e-4)


def test_lending_a_lora_reference_leaves_the_policy_as_it_was(make_module: MakeModule):
    module = lora_module(make_module)
    modes = [part.training for part in module.policy.modules()]
    trained = [name for name, weight in module.policy.named_parameters() if weight.requires_grad]
    before = logits_of(module.policy.eval())
    for part, mode in zip(module.policy.modules(), modes, strict=True):
        part.training = mode
    with module.reference.lent() as reference:
        assert not any(part.training for part in reference.modules())
    assert [part.training for part in module.policy.modules()] == modes
    assert [name for name, weight in module.policy.named_parameters() if weight.requires_grad] == trained
    assert len(trained) > 0
    assert torch.equal(logits_of(module.policy.eval()), before)


def test_lending_a_lora_reference_ends_when_the_borrower_fails(make_module: MakeModule):
    module = lora_module(make_module)
    before = logits_of(module.policy)
    with pytest.raises(ZeroDivisionError), module.reference.lent():
        raise ZeroDivisionError
    assert torch.equal(logits_of(module.policy), before)
    assert module.policy.training


def test_lora_policy_trains_its_adapters_alone(make_module: MakeModule, load_model: LoadModel):
    module = make_module(lora=LoRASpec(r=4), optimizer=sgd, lr_schedule="constant", alpha=0.1)
    fit_quietly(module, PROMPTS, max_epochs=3)
    base = load_model()
    with module.reference.lent() as reference:
        assert torch.equal(logits_of(reference), logits_of(base))
    assert not torch.equal(logits_of(module.policy.eval()), logits_of(base))
    assert all("lora_" in name for name, weight in module.policy.named_parameters() if weight.requires_grad)


def test_lora_spec_scales_by_alpha_over_r_or_its_root(load_model: LoadModel):
    """Alpha 8 and rank 4: 8 / 4 = 2, or 8 / sqrt(4) = 4."""
    for rslora, scale in ((False, 2.0), (True, 4.0)):
        policy = LoRASpec(r=4, alpha=8, rslora=rslora).wrap(load_model())
        scales = {layer.scaling["default"] for layer in policy.modules() if hasattr(layer, "lora_A")}
        assert scales == {scale}


def test_lora_target_modules_that_match_nothing_are_refused(load_model: LoadModel):
    with pytest.raises(InputError, match=r"model\.lora\.target_modules: .*nowhere"):
        LoRASpec(target_modules=["nowhere"]).wrap(load_model())


# ---- the frozen copy ----


def test_frozen_reference_is_bitwise_unchanged_by_training(arch: str, make_module: MakeModule, load_model: LoadModel):
    module = make_module(arch, optimizer=sgd, lr_schedule="constant", alpha=0.1)
    fit_quietly(module, PROMPTS, max_epochs=3)
    untouched = dict(load_model(arch).named_parameters())
    frozen = dict(module.reference.frozen.named_parameters())
    assert frozen.keys() == untouched.keys()
    assert all(torch.equal(frozen[name], weight) for name, weight in untouched.items())
    assert any(not torch.equal(weight, untouched[name]) for name, weight in module.policy.named_parameters())
    assert not any(part.training for part in module.reference.modules() if part is not module.reference)
    assert all(weight.grad is None and not weight.requires_grad for weight in frozen.values())
    assert not {id(weight) for weight in module.policy.parameters()} & {id(weight) for weight in frozen.values()}


def test_optimizer_holds_every_weight_of_the_policy_and_no_other(make_module: MakeModule):
    module = make_module()
    trainer = fit_quietly(module, PROMPTS)
    held = [id(weight) for group in trainer.optimizers[0].param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in module.policy.parameters())


@pytest.fixture
def wide_folder(tmp_path: Path) -> str:
    """Give the folder of a model whose matrices are wide enough for blocks of 64."""
    config = {**ROPE, "hidden_size": 128, "intermediate_size": 192}
    AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_adapters_train_on_quantized_weights(make_module: Any, wide_folder: str):
    """The reference is the quantized model without adapters: its matrices stay, and it is nearly the model."""
    spec, recorder = ModelSpec(wide_folder, quantize="4bit"), Recorder()
    module = make_module(policy=spec, lora=LoRASpec(r=4), learning_rate=1e-2)
    module.configure_model()
    assert "Linear4bit" in {type(layer).__name__ for layer in module.policy.modules()}
    plain = AutoModelForCausalLM.from_pretrained(wide_folder).model.layers[0].mlp.up_proj.weight
    kept = module.policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    rounded = dequantize_4bit(kept.data, kept.quant_state)
    assert 0.05 < (rounded - plain).norm() / plain.norm() < 0.12, "NF4 rounds by about a tenth"
    ids = torch.tensor([[1, 2, 3]])
    with module.reference.lent() as reference, torch.no_grad():
        before = reference(input_ids=ids).logits
    fit_quietly(module, PROMPTS, batch_size=2, callbacks=[recorder])
    assert recorder.of("objective/kl")[0] == pytest.approx(0.0, abs=1e-3)
    assert abs(recorder.of("objective/kl")[-1]) > 1e-2
    assert all("lora_" in name for name in module.state_dict())
    with module.reference.lent() as reference, torch.no_grad():
        after = reference(input_ids=ids).logits
    # On a CPU, bitsandbytes goes back and forth between layouts that round differently.
    assert (after - before).abs().max() < 0.02 * before.abs().max()


def test_quantized_weights_are_for_adapters_and_stay_apart_from_them(
    make_module: Any, monkeypatch: pytest.MonkeyPatch, wide_folder: str
):
    spec = ModelSpec(wide_folder, quantize="4bit")
    with pytest.raises(InputError, match=r"model\.policy\.quantize=4bit .* without model\.lora"):
        make_module(policy=spec)
    module = make_module(policy=spec, lora=LoRASpec(r=4))
    module.configure_model()
    with pytest.raises(InputError, match="set merge_adapters to false"):
        check_exportable(module.policy, merge_adapters=True)
    check_exportable(module.policy, merge_adapters=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.policy\.quantize=4bit needs the package bitsandbytes"):
        ModelSpec(wide_folder, quantize="4bit")


def test_adapters_of_a_bfloat16_model_train_with_gradient_checkpointing(make_module: Any):
    """What is computed again in the backward pass finds the adapters as they were in the forward pass."""
    spec = {"dtype": "bfloat16", "gradient_checkpointing": True}
    norms = []
    for options in (spec, {**spec, "gradient_checkpointing": False}):
        module, recorder = make_module(spec=options, lora=LoRASpec(r=4), alpha=0.1), Recorder()
        fit_quietly(module, PROMPTS, callbacks=[recorder])
        norms += recorder.of("grad_norm")
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("lora", [None, LoRASpec(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("arch_name", ["llama", "gpt2"])
def test_checkpoint_holds_the_trained_weights_alone(
    make_module: MakeModule, tmp_path: Path, lora: LoRASpec | None, arch_name: str
):
    module = make_module(arch_name, lora=lora)
    trainer = fit_quietly(module, PROMPTS)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("policy.") for name in state)
    trained = {f"policy.{name}" for name, weight in module.policy.named_parameters() if weight.requires_grad}
    assert trained <= state.keys()
    if lora is not None:
        assert all("lora_" in name for name in state)
    for name in trained:
        assert torch.equal(state[name], module.get_parameter(name))


def test_fingerprint_tells_weights_apart_and_ignores_adapters(make_module: MakeModule, load_model: LoadModel):
    plain = Reference(load_model())
    adapted = lora_module(make_module).reference
    other = load_model()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    assert plain.fingerprint() == Reference(load_model()).fingerprint() == adapted.fingerprint()
    assert plain.fingerprint() != Reference(other).fingerprint()
    assert plain.fingerprint() != Reference(load_model("qwen2")).fingerprint()


# ---- dropout ----


def dropouts(model: nn.Module) -> set[float]:
    """Collect every dropout probability, of modules and of attention layers that keep theirs as a number."""
    modules = {part.p for part in model.modules() if isinstance(part, nn.Dropout)}
    numbers = {part.attention_dropout for part in model.modules() if hasattr(part, "attention_dropout")}
    return modules | numbers


def saved_with_dropout(folder: Path, arch: str, value: float) -> str:
    """Save a model whose config sets every dropout."""
    config = CONFIGS[arch]()
    for name in [name for name in vars(config) if "dropout" in name or "pdrop" in name]:
        if isinstance(getattr(config, name), int | float) and name != "classifier_dropout":
            setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_dropout_when_a_number_sets_every_dropout(arch: str, tmp_path: Path, value: float):
    model = ModelSpec(saved_with_dropout(tmp_path, arch, 0.2), dropout=value).load_model()
    assert dropouts(model) == {value}
    repeats = torch.equal(logits_of(model), logits_of(model))
    assert repeats == (value == 0.0)


def test_dropout_when_null_keeps_the_checkpoints_own(arch: str, tmp_path: Path):
    model = ModelSpec(saved_with_dropout(tmp_path, arch, 0.2), dropout=None).load_model()
    assert dropouts(model) == {0.2}
    assert not torch.equal(logits_of(model), logits_of(model))


def test_dropout_when_the_config_says_0_without_a_point_is_set_all_the_same(tmp_path: Path):
    """Configs are JSON, where a dropout of 0 is an integer."""
    model = ModelSpec(saved_with_dropout(tmp_path, "llama", 0), dropout=0.3).load_model()
    assert dropouts(model) == {0.3}


def test_dropout_is_off_while_sampling_and_on_while_training(make_module: MakeModule, load_model: LoadModel):
    module, base = make_module("gpt2", spec={"dropout": 0.5}, sampling=Sampling(max_new_tokens=5)), load_model("gpt2")
    module.configure_model()
    pairs = module.collector.collect(module.policy, as_prompts(PROMPTS, module.prompt_encoder, module.device), noise())
    for completions in (pairs.completions.by_policy, pairs.completions.by_sampler):
        expected = token_logps(base, pairs.prompts, completions)
        torch.testing.assert_close(completions.token_logps, expected.detach(), rtol=0, atol=5e-5)
    first, second = (module.objective.evaluate(module.policy, pairs, alpha=0.0, beta=0.1)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_lora_dropout_is_honoured_beside_a_policy_dropout_of_0(make_module: MakeModule):
    module = lora_module(make_module, lora={"dropout": 0.5})
    adapters = {part.p for name, part in module.policy.named_modules() if re.search(r"lora_dropout\.\w+$", name)}
    assert adapters == {0.5}
    assert not torch.equal(logits_of(module.policy), logits_of(module.policy))
    module.policy.eval()
    assert torch.equal(logits_of(module.policy), logits_of(module.policy))
