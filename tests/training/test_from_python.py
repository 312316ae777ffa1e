"""The module without the command line: what users of Lightning and transformers pass to it and call on it."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit_quietly, longer_is_better, make_tokenizer, quiet_trainer
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from xpo_lightning import (
    InputError,
    LoadedModel,
    LoRASpec,
    ModelSpec,
    PerIteration,
    PromptDataModule,
    PythonReward,
    Sampling,
    SequenceClassifierReward,
    XPOLightningModule,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["the cat", "a dog sat", "the mat", "one"]
Folder = Callable[..., str]


def built(policy: Any, reward: Any = longer_is_better, **options: Any) -> XPOLightningModule:
    return XPOLightningModule(policy, reward, **{"sampling": Sampling(max_new_tokens=3), **options})


# ---- policy and reward ----


def test_folder_as_policy_and_function_as_reward_give_the_run_of_their_classes(model_folder: Folder):
    folder = model_folder("llama", "distinct")
    runs = []
    for policy, reward in ((folder, longer_is_better), (Path(folder), longer_is_better)):
        runs.append(fit_quietly(built(policy, reward), PROMPTS).callback_metrics)
    runs.append(fit_quietly(built(ModelSpec(folder), PythonReward(longer_is_better)), PROMPTS).callback_metrics)
    assert runs[0] == runs[1] == runs[2]
    assert runs[0]["objective/model_scores"] > 0


def test_folder_as_reward_is_a_classifier(model_folder: Folder):
    assert isinstance(built(model_folder(), "./some_folder").reward, SequenceClassifierReward)


def test_model_in_memory_is_refused_as_long_as_it_has_no_tokenizer(model_folder: Folder):
    folder = model_folder("llama", "distinct")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match=r"^policy is a LlamaForCausalLM.*policy=LoadedModel\(model, tokenizer\)"):
        built(model)
    assert built(LoadedModel(model, make_tokenizer())).policy_spec.model is model
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    scorer = AutoModelForSequenceClassification.from_config(LlamaConfig(num_attention_heads=1, num_labels=1, **sizes))
    with pytest.raises(InputError, match=r"^reward is a LlamaForSequenceCl.*a function that scores with it"):
        built(folder, scorer)


@pytest.mark.parametrize("policy", [None, 5, ModelSpec, ("a", "b")])
def test_anything_else_as_policy_is_refused_by_the_name_of_the_argument(policy: Any):
    with pytest.raises(InputError, match=r"^policy must be the folder or hub id of a model, a ModelSpec"):
        built(policy)


@pytest.mark.parametrize("reward", [5, PythonReward])
def test_anything_else_as_reward_is_refused_by_the_name_of_the_argument(reward: Any):
    with pytest.raises(InputError, match=r"^reward must be a reward or a judge, a function"):
        built("x", reward)


# ---- types of arguments ----


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("alpha", "1e-5", "a number, a list of numbers or a Schedule, but is '1e-5', a str"),
        ("beta", ["0.1"], "a number, a list of numbers or a Schedule"),
        ("learning_rate", "1e-3", "a number or null"),
        ("micro_batch_size", "4", "a whole number or null"),
        ("micro_batch_size", 4.0, "a whole number or null, but is 4.0, a float"),
        ("sampling", {"max_new_tokens": 4}, "a Sampling, but is {'max_new_tokens': 4}, a dict"),
        ("lora", True, "a LoRASpec or null, but is True"),
        ("preference_loss", "ipo", "a PreferenceLoss or null"),
        ("bonus_on", "chosen", "sampler, both, rejected or null, but is 'chosen'"),
        ("optimizer", 1e-3, "model.optimizer must be"),
    ],
)
def test_argument_of_another_type_is_refused_by_its_name(name: str, value: Any, expected: str):
    with pytest.raises(InputError) as refused:
        built("x", **{name: value})
    assert str(refused.value).startswith(f"model.{name} must be ")
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Sampling(max_new_tokens="4"), "model.sampling.max_new_tokens"),
        (lambda: Sampling(temperature="1"), "model.sampling.temperature"),
        (lambda: LoRASpec(r="4"), "model.lora.r"),
        (lambda: PromptDataModule("x.jsonl", batch_size="4"), "data.batch_size"),
    ],
)
def test_number_as_text_is_refused_by_its_key(make: Callable[[], Any], key: str):
    with pytest.raises(InputError, match=rf"^{key}:? must be .*number, but is '\d', a str"):
        make()


# ---- the trainer ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"accumulate_grad_batches": 2}, r"^trainer\.accumulate_grad_batches has no effect here; set data\.batch_size"),
        ({"gradient_clip_val": 1.0}, r"^trainer\.gradient_clip_val has no effect here; set model\.max_grad_norm"),
    ],
)
def test_option_of_the_trainer_is_refused_as_at_the_command_line(
    make_module: Callable[..., XPOLightningModule], options: dict[str, Any], expected: str
):
    with pytest.raises(InputError, match=expected):
        fit_quietly(make_module(), PROMPTS, **options)


def test_several_loaders_of_held_out_prompts_are_refused(make_module: Callable[..., XPOLightningModule]):
    module, loaders = make_module(), [DataLoader(PROMPTS, batch_size=2, collate_fn=list) for _ in range(2)]
    trainer = quiet_trainer()
    for verb in (trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(InputError, match=r"2 loaders of held-out prompts, .* one set; .*ConcatDataset"):
            verb(module, loaders)  # type: ignore[operator]
    with pytest.raises(InputError, match="2 loaders of held-out prompts"):
        trainer.fit(make_module(), loaders[0], loaders)
    trainer.predict(module, [loaders[0]])


def test_test_measures_what_validation_does(make_module: Callable[..., XPOLightningModule]):
    loader = DataLoader(PROMPTS, batch_size=2, collate_fn=list)
    module = make_module()
    (validated,) = quiet_trainer().validate(module, loader, verbose=False)
    (tested,) = quiet_trainer().test(module, loader, verbose=False)
    assert tested == validated
    assert "eval/win_rate" in tested


def test_data_module_has_prompts_for_a_test(make_module: Callable[..., XPOLightningModule], tmp_path: Path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    data = PromptDataModule(str(tmp_path / "p.jsonl"), validation_size=2)
    (tested,) = quiet_trainer().test(make_module(), data, verbose=False)
    assert "eval/win_rate" in tested


def test_chats_are_taken_as_default_collate_makes_them(make_module: Callable[..., XPOLightningModule]):
    """DataLoader's own collate turns B conversations of M messages into M messages of B texts each."""
    chats = [[{"role": "user", "content": text}, {"role": "user", "content": f"{text}?"}] for text in PROMPTS]
    seen: list[Any] = []

    def score(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        seen.extend(prompts)
        return longer_is_better(prompts, completions, columns)

    module = make_module(tokenizer="chat", reward=score)
    quiet_trainer().fit(module, DataLoader([{"prompt": chat} for chat in chats], batch_size=4))
    assert seen[:4] == chats


def test_checkpoint_is_loaded_into_a_module(model_folder: Folder, tmp_path: Path):
    folder, file = model_folder("llama", "distinct"), tmp_path / "a.ckpt"
    module = built(folder, learning_rate=0.1)
    fit_quietly(module, PROMPTS).save_checkpoint(file)
    loaded = XPOLightningModule.load_from_checkpoint(file, policy=folder, reward=longer_is_better)
    untrained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in module.policy.state_dict().items():
        assert torch.equal(weight, loaded.policy.state_dict()[name])
    assert not all(torch.equal(weight, untrained[name]) for name, weight in loaded.policy.state_dict().items())
    with pytest.raises(InputError, match=r"^load_from_checkpoint\('.*a\.ckpt', reward=\.\.\.\): a checkpoint holds"):
        XPOLightningModule.load_from_checkpoint(file, policy=folder)


def test_lr_find_suggests_a_learning_rate_that_the_next_fit_takes(make_module: Callable[..., XPOLightningModule]):
    module = make_module(lr_schedule="constant")
    loader = DataLoader(PROMPTS * 20, batch_size=2, collate_fn=list)
    trainer = quiet_trainer(max_epochs=None, max_steps=1)
    before = module.learning_rate
    found = Tuner(trainer).lr_find(module, loader, num_training=16, early_stop_threshold=None)
    assert len(found.results["loss"]) == 16
    assert all(map(math.isfinite, found.results["loss"]))
    assert module.learning_rate == found.suggestion() != before
    trainer.fit(module, loader)
    assert float(trainer.callback_metrics["lr"]) == pytest.approx(module.learning_rate)


# ---- without a trainer ----


def test_loop_without_a_trainer_samples_what_training_does(model_folder: Folder):
    """The first batch of a loop of one's own is that of `trainer.fit` with the same seed, and so is its objective."""
    folder = model_folder("llama", "distinct")
    torch.manual_seed(5)
    module = built(folder)
    module.configure_model()
    experience = module.sample(PROMPTS)
    losses, _ = module.losses(experience)
    assert losses.requires_grad
    second = module.sample(PROMPTS)
    assert not torch.equal(experience.completions.by_policy.ids, second.completions.by_policy.ids)
    trained = fit_quietly(built(folder), PROMPTS, seed=5).callback_metrics
    assert float(losses.mean()) == pytest.approx(float(trained["loss/total"]), rel=1e-6)


def test_schedule_without_a_trainer_goes_on_with_each_sample(model_folder: Folder):
    """PerIteration gives 0.5 to the first batch and 0 to the second, so that the bonus is there once."""
    module = built(model_folder("llama", "distinct"), alpha=PerIteration([0.5, 0.0], batches=1))
    module.configure_model()
    bonuses = [float(module.losses(module.sample(PROMPTS))[1]["loss/xpo"].abs().sum()) for _ in range(2)]
    assert bonuses[0] > 0
    assert bonuses[1] == 0


def test_example_with_fabric_runs():
    spec = importlib.util.spec_from_file_location("fabric_example", EXAMPLES / "fabric.py")
    assert spec is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    first, second = example.main(steps=2)
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference
    assert second["loss/dpo"] != pytest.approx(math.log(2), abs=1e-4)
