"""Loading: models, adapters, tokenizers and chat templates, and one clear error for what cannot be loaded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    CHAT_TEMPLATE,
    CONFIGS,
    ChainModel,
    chain_module,
    logits_of,
    make_tokenizer,
    noise,
    randomize_adapters,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from xpo_lightning import InputError, LoadedModel, ModelSpec, Sampling, XPOLightningModule
from xpo_lightning.core.paths import is_local, resolve
from xpo_lightning.models.forward.lengths import context_length_in
from xpo_lightning.models.policy import end_token_ids

MakeModule = Callable[..., XPOLightningModule]
LoadModel = Callable[..., nn.Module]


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
    ("configured", "expected"), [(None, [282]), (7, [282, 7]), ([9, 7, 282], [282, 7, 9])], ids=["none", "one", "list"]
)
def test_end_token_ids_are_those_of_the_generation_config_and_the_tokenizer(
    load_model: LoadModel, tokenizer: Any, configured: Any, expected: list[int]
):
    model = load_model()
    model.generation_config.eos_token_id = configured
    assert end_token_ids(model, tokenizer) == expected


@pytest.mark.parametrize(
    ("eos", "template", "expected"),
    [
        ("<|im_end|>", CHAT_TEMPLATE, "<|im_end|>"),  # as Qwen's and Llama's chat models
        ("<eos>", CHAT_TEMPLATE, "<|im_end|>"),  # as Gemma's
        ("<|im_end|>", "{{ messages[0].content }}", "<|im_end|>"),
        ("<|im_end|>", "{{ raise_exception('no') }}", "<|im_end|>"),
        ("<eos>", None, "<eos>"),
    ],
)
def test_given_completions_end_as_the_models_own_messages_do(
    make_module: MakeModule, load_model: LoadModel, eos: str, template: str | None, expected: str
):
    model, tokenizer = load_model(), make_tokenizer()
    model.generation_config.eos_token_id = [282, 284]  # <eos>, <|im_end|>
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    module = make_module(policy=LoadedModel(model, tokenizer), reward=None, sampling=Sampling(max_new_tokens=20))
    module.configure_model()
    pairs = {"prompt": ["the cat"], "chosen": ["sat on the mat"], "rejected": ["ran"]}
    given = module.collect({"preferences": pairs}, noise(), training=True).completions
    for side in (given.by_policy, given.by_sampler):
        assert tokenizer.convert_ids_to_tokens(side.ids[0][side.mask[0]].tolist())[-1] == expected
        assert side.ended.all()


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
