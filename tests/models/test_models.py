"""Loading: the policy, its frozen reference, adapters, dropout, and one clear error for what cannot be loaded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from conftest import (
    CONFIGS,
    PROMPTS,
    ROPE,
    ChainModel,
    Recorder,
    chain_module,
    fit_quietly,
    make_tokenizer,
    noise,
    randomize_adapters,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD
from transformers import AutoModelForCausalLM, LlamaConfig

from xpo_lightning import InputError, LoadedModel, LoRASpec, ModelSpec, Pair, Sampling, XPOLightningModule
from xpo_lightning.core.paths import is_local, resolve
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.models.forward.lengths import context_length_in
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.models.policy import end_token_ids
from xpo_lightning.models.reference import Reference
from xpo_lightning.models.saving import check_exportable
from xpo_lightning.rollout.local import LocalRollout

MakeModule = Callable[..., XPOLightningModule]
LoadModel = Callable[..., nn.Module]
IDS = torch.tensor([[5, 60, 120, 33, 7, 250]])


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


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


# ---- loading ----


def test_load_model_returns_train_mode_in_float32_with_the_saved_weights(
    arch: str, model_folder: Any, load_model: LoadModel
):
    model = ModelSpec(model_folder(arch)).load_model()
    assert all(part.training for part in model.modules())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(model.eval()), logits_of(load_model(arch)))


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)]
)
def test_dtype_when_set_is_that_of_the_weights(tmp_path: Path, dtype: Any, expected: torch.dtype):
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).bfloat16().save_pretrained(tmp_path)
    model = ModelSpec(str(tmp_path), dtype=dtype).load_model()
    assert {weight.dtype for weight in model.parameters()} == {expected}


def test_attn_implementation_and_gradient_checkpointing_are_honoured(model_folder: Any):
    model = ModelSpec(model_folder(), attn_implementation="eager", gradient_checkpointing=True).load_model()
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing


def test_loaded_model_is_used_as_it_is(tokenizer: Any):
    model = ChainModel({}, otherwise=5).eval()
    module = chain_module(model, tokenizer, sampling=Sampling(max_new_tokens=2))
    module.configure_model()
    assert module.policy is model
    assert model.training
    assert module.reference.frozen is not model


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "no such folder", "~/nothing.gguf"])
@pytest.mark.parametrize("load", ["load_model", "load_tokenizer", "load_config"])
def test_missing_local_path_is_one_error_that_names_the_key(path: str, load: str):
    with pytest.raises(InputError) as error:
        getattr(ModelSpec(path), load)()
    assert one_line(error).startswith("model.policy.path: there is nothing at")
    assert path in str(error.value)


@pytest.mark.parametrize("load", ["load_model", "load_tokenizer", "load_config"])
def test_hub_id_out_of_reach_is_one_error_that_names_the_key(load: str):
    with pytest.raises(InputError) as error:
        getattr(ModelSpec("nobody-at-all/no-such-model"), load)()
    assert one_line(error).startswith("model.policy.path: could not load 'nobody-at-all/no-such-model'")


@pytest.mark.parametrize("load", ["load_model", "load_tokenizer", "load_config"])
def test_folder_without_a_model_is_one_error_that_names_the_key(tmp_path: Path, load: str):
    with pytest.raises(InputError) as error:
        getattr(ModelSpec(str(tmp_path)), load)()
    assert one_line(error).startswith("model.policy.path: could not load")


def test_missing_tokenizer_names_its_own_key(model_folder: Any):
    with pytest.raises(InputError, match=r"^model\.policy\.tokenizer: there is nothing at"):
        ModelSpec(model_folder(), tokenizer="./nowhere").load_tokenizer()


def test_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(make_module: MakeModule, tmp_path: Path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(40)])
    tokenizer.save_pretrained(tmp_path)
    module = make_module(spec={"tokenizer": str(tmp_path)})
    with pytest.raises(InputError, match=r"model\.policy\.tokenizer: the tokenizer has 325 tokens.* embeds only 304"):
        module.configure_model()


@pytest.fixture
def adapter(model_folder: Any, tmp_path: Path) -> tuple[str, nn.Module]:
    """Save a trained adapter as PEFT does; give its folder and the adapted model."""
    base = AutoModelForCausalLM.from_pretrained(model_folder())
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    randomize_adapters(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), adapted.eval()


def test_adapter_folder_is_loaded_with_its_base_model_and_merged(adapter: tuple[str, nn.Module], load_model: LoadModel):
    folder, adapted = adapter
    spec = ModelSpec(folder)
    model = spec.load_model()
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert model.training
    torch.testing.assert_close(logits_of(model.eval()), logits_of(adapted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(model), logits_of(load_model()), atol=0.1)
    assert spec.load_config().model_type == "llama"


def test_adapter_folder_that_lacks_a_layer_is_refused(adapter: tuple[str, nn.Module]):
    """peft fills it up with an untrained adapter, which would be another policy than the one that was saved."""
    file = Path(adapter[0]) / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.policy\.path: .* cannot be read back: .*up_proj.*") as error:
        ModelSpec(adapter[0]).load_model()
    one_line(error)


def test_merged_adapter_folder_is_trained_as_any_other_model(adapter: tuple[str, nn.Module]):
    assert all(weight.requires_grad for weight in ModelSpec(adapter[0]).load_model().parameters())


def test_adapter_folder_without_a_tokenizer_takes_that_of_its_base_model(adapter: tuple[str, nn.Module]):
    """PEFT saves no tokenizer beside an adapter."""
    assert ModelSpec(adapter[0]).load_tokenizer().get_vocab() == make_tokenizer().get_vocab()


def test_chat_template_is_taken_as_text_or_as_a_file(model_folder: Any, tmp_path: Path):
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    for given in (template, str(tmp_path / "template.jinja")):
        tokenizer = ModelSpec(model_folder("llama", "chat"), chat_template=given).load_tokenizer()
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hat"}], tokenize=False) == "[hat]"
    assert ModelSpec(model_folder("llama", "chat")).load_tokenizer().chat_template not in (template, None)


def test_chat_template_file_that_is_missing_is_named(model_folder: Any):
    with pytest.raises(InputError, match=r"model\.policy\.chat_template: there is no file 'no\.jinja'"):
        ModelSpec(model_folder(), chat_template="no.jinja").load_tokenizer()


def test_package_path_finds_a_file_inside_an_installed_package():
    found = resolve("package:xpo_lightning/rollout/local.py", "model.policy.path")
    assert is_local(found)
    assert Path(found).name == "local.py"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no_such_package/model", "needs the Python package 'no_such_package', which is not installed"),
        ("package:xpo_lightning/no/such/model", "the Python package 'xpo_lightning' has no 'no/such/model'"),
    ],
    ids=["package", "file"],
)
def test_package_path_to_nothing_is_one_error_that_names_the_key(path: str, message: str):
    with pytest.raises(InputError) as error:
        ModelSpec(path).load_model()
    assert one_line(error).startswith("model.policy.path: ")
    assert message in str(error.value)


# ---- EOS ids and context ----


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [282]), (7, [7, 282]), ([9, 7, 282], [7, 9, 282])], ids=["none", "one", "list"]
)
def test_end_token_ids_are_those_of_the_generation_config_and_the_tokenizer(
    load_model: LoadModel, tokenizer: Any, configured: Any, expected: list[int]
):
    model = load_model()
    model.generation_config.eos_token_id = configured
    assert end_token_ids(model, tokenizer) == expected


def test_end_token_ids_without_any_eos_are_refused_by_name(load_model: LoadModel):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"model\.sampling\.eos_token_ids: neither"):
        end_token_ids(load_model(), tokenizer)


def test_sampling_eos_token_ids_replace_those_of_the_model(make_module: MakeModule):
    module = make_module(sampling=Sampling(max_new_tokens=3, eos_token_ids=[11, 12]))
    module.configure_model()
    assert module.collector.rollout.eos_token_ids == [11, 12]


def test_context_length_is_that_of_the_config():
    assert context_length_in(CONFIGS["llama"]()) == 64
    assert context_length_in(CONFIGS["gpt2"]()) == 64
    assert context_length_in(transformers.BloomConfig()) is None


def test_loaded_model_keeps_its_name_for_checkpoints(tokenizer: Any):
    loaded = LoadedModel(ChainModel({}, otherwise=5), tokenizer, path="mine")
    module = XPOLightningModule(policy=loaded, reward=chain_module(loaded.model, tokenizer).reward)
    module.configure_model()
    identity = module.reference.identity(module.policy_spec)
    assert identity["path"] == "mine"
    assert re.fullmatch(r"[0-9a-f]{64}", identity["fingerprint"])
