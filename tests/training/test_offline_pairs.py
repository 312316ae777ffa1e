"""Preference pairs that are trained on as they are: DPO on them alone, and beside sampled pairs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, make_tokenizer, naive_token_logps, noise, quiet_trainer
from torch import Tensor, nn

from xpo_lightning import (
    BufferOptions,
    Candidates,
    COPOBonus,
    INPOLoss,
    InputError,
    LabelRule,
    NashMDLoss,
    PolicySampler,
    PreferenceLoss,
    PromptDataModule,
    ReferenceRefresh,
    ReferenceSampler,
    XPOLightningModule,
)
from xpo_lightning.data.sampler import ProcessShard, rows_of_turn
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.training.replay_buffer.serialization import decoded, encoded

MakeModule = Callable[..., XPOLightningModule]

PAIRS = {
    "prompt": ["the cat", "a dog ran away from the hat and", "red"],
    "chosen": [" sat on the mat", " ran", " hat today"],
    "rejected": [" ran away", " sat on the red mat", " dog"],
}
ROWS = [dict(zip(PAIRS, values, strict=True)) for values in zip(*PAIRS.values(), strict=True)]
BETA = 0.5


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def prompts_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


def perturbed(module: XPOLightningModule) -> XPOLightningModule:
    """Load the models, and move the policy away from the reference."""
    module.configure_model()
    with torch.no_grad():
        for weight in module.policy.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return module


def tokens_of(row: dict[str, str], most: int = 6) -> tuple[list[int], list[int], list[int]]:
    """Tokenize a pair as transformers does: the prompt by default, a completion without special tokens, EOS behind."""
    tokenizer = make_tokenizer()
    prompt = tokenizer(row["prompt"])["input_ids"]
    sides = [tokenizer(row[side], add_special_tokens=False)["input_ids"] for side in ("chosen", "rejected")]
    one, other = ([*ids, tokenizer.eos_token_id][:most] for ids in sides)
    return prompt, one, other


def logp(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Score one row alone, by transformers' own forward pass, with gradient."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion].sum()


def test_dpo_of_offline_pairs_is_that_of_a_naive_loop(make_module: MakeModule, load_model: Callable[..., nn.Module]):
    """-log sigma(beta (log pi/ref(chosen) - log pi/ref(rejected))), each row alone: value and gradient."""
    module = perturbed(make_module(reward=None, beta=BETA))
    pairs = module.collect({"preferences": PAIRS}, noise(), training=True)
    losses, measured = module.losses(pairs)
    losses.mean().backward()

    policy, reference = load_model(), load_model()
    policy.load_state_dict(module.policy.state_dict())
    expected = []
    for number, row in enumerate(ROWS):
        prompt, one, other = tokens_of(row)
        chosen, rejected = logp(policy, prompt, one), logp(policy, prompt, other)
        with torch.no_grad():
            margin = chosen - logp(reference, prompt, one) - rejected + logp(reference, prompt, other)
        assert measured["rewards/margins"][number].item() == pytest.approx(BETA * margin.item(), abs=1e-4)
        assert measured["logps/chosen"][number].item() == pytest.approx(
            sum(naive_token_logps(policy, prompt, one)), abs=1e-4
        )
        ratios = chosen - rejected - (chosen - rejected).detach() + margin
        expected.append(-nn.functional.logsigmoid(BETA * ratios))
    torch.stack(expected).mean().backward()
    assert losses.tolist() == pytest.approx([one.item() for one in expected], abs=1e-5)
    assert len({round(loss, 3) for loss in losses.tolist()}) == 3, "policy and reference differ"
    theirs = dict(policy.named_parameters())
    for name, weight in module.policy.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)
    assert measured["loss/xpo"].tolist() == [0, 0, 0]


def test_completions_are_cut_where_sampled_ones_would_be(make_module: MakeModule):
    module = make_module(reward=None)  # of six tokens
    module.configure_model()
    longer = {**PAIRS, "chosen": [*PAIRS["chosen"][:2], " the cat sat on the mat and the dog ran away"]}
    pairs = module.collect({"preferences": longer}, noise(), training=True)
    for row, given in enumerate(zip(*longer.values(), strict=True)):
        prompt, one, other = tokens_of(dict(zip(longer, given, strict=True)))
        assert pairs.prompts.select([row]).ids[0].tolist() == prompt
        sides = (pairs.completions.by_policy, pairs.completions.by_sampler)
        assert [side.ids[row][side.mask[row]].tolist() for side in sides] == [one, other]
    whole = [len(tokens_of(row, 99)[1]) <= 6 for row in ROWS[:2]]
    assert pairs.completions.by_policy.ended.tolist() == [*whole, False]


def run(
    module: XPOLightningModule, data: PromptDataModule, path: str | None = None, **options: Any
) -> tuple[Recorder, pl.Trainer]:
    recorder = Recorder()
    trainer = quiet_trainer(**{"max_epochs": -1, "callbacks": [recorder], **options})
    torch.manual_seed(0)
    trainer.fit(module, datamodule=data, ckpt_path=path)
    return recorder, trainer


def test_a_run_on_pairs_alone_samples_nothing_and_needs_no_reward(
    make_module: MakeModule, pairs_file: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LocalRollout, "sample", None)
    module = make_module(reward=None, beta=BETA, learning_rate=1e-2, lr_schedule="constant")
    data = PromptDataModule(preferences=pairs_file, batch_size=3, validation_split="train")
    recorder, trainer = run(module, data, max_steps=8, val_check_interval=1)
    assert recorder.of("loss/dpo")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert recorder.of("rewards/accuracies")[0] == 0.5
    assert recorder.of("loss/dpo")[-1] < 0.5
    logged = trainer.callback_metrics
    assert recorder.of("rewards/accuracies")[-1] == float(logged["eval/rewards/accuracies"]) == 1
    cut = [max(map(len, tokens_of(row, 99)[1:])) > 6 for row in ROWS]
    assert recorder.of("pairs/truncated")[-1] == float(logged["eval/pairs/truncated"]) == pytest.approx(sum(cut) / 3)
    # What is about sampled completions is not there.
    absent = [
        "objective/kl",
        "win_rate",
        "objective/model_scores",
        "completions/model_length",
        "logps/reference_completions",
    ]
    assert not {*absent, *(f"eval/{name}" for name in absent)} & logged.keys()


def test_a_run_on_pairs_alone_validates_by_the_reward_if_there_is_one(
    make_module: MakeModule, pairs_file: str, prompts_file: str
):
    data = PromptDataModule(preferences=pairs_file, batch_size=3, validation_source=prompts_file)
    recorder, trainer = run(make_module(), data, max_steps=1, val_check_interval=1)
    assert "win_rate" not in recorder.steps[0]
    logged = trainer.callback_metrics
    assert {"eval/win_rate", "eval/objective/kl", "eval/logps/reference_completions"} <= logged.keys()
    assert "eval/pairs/truncated" not in logged


def test_validation_without_a_reward_needs_pairs(make_module: MakeModule, pairs_file: str, prompts_file: str):
    data = PromptDataModule(preferences=pairs_file, batch_size=3, validation_source=prompts_file)
    with pytest.raises(InputError, match=r"model\.reward is null, .*hold pairs out by data\.validation_size"):
        run(make_module(reward=None), data, max_steps=1, val_check_interval=1)


HYBRID = {"prompt": PROMPTS[:2], "preferences": PAIRS}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bonus_on": "rejected", "entropy_bonus": 0.1},
        {"sampler": PolicySampler(), "bonus_sampler": ReferenceSampler()},
    ],
    ids=["xpo", "rejected_and_entropy", "third_completion"],
)
def test_bonus_is_on_sampled_pairs_alone(make_module: MakeModule, options: dict[str, Any]):
    """Both kinds have the preference loss that each has by itself; the rest of the objective is the sampled pairs'."""
    module = perturbed(make_module(alpha=0.1, **options))
    pairs = module.collect(HYBRID, noise(), training=True)
    assert pairs.offline is not None
    assert pairs.offline.tolist() == [False, False, True, True, True]
    _, together = module.losses(pairs)
    alone = module.collect({"prompt": PROMPTS[:2]}, noise(), training=True)
    _, sampled = module.losses(alone)
    _, offline = module.losses(pairs.select([2, 3, 4]))
    for name in ("loss/dpo", "loss/xpo", "loss/total", "rewards/margins", "logps/chosen"):
        expected = [*sampled[name].tolist(), *offline[name].tolist()]
        assert together[name].tolist() == pytest.approx(expected, abs=1e-4), name
    assert sampled["loss/xpo"].abs().min() > 0
    assert offline["loss/total"].tolist() == offline["loss/dpo"].tolist()
    assert together["logps/reference_completions"].isnan().tolist() == [False, False, True, True, True]
    kept = decoded(encoded(pairs), "cpu")
    torch.testing.assert_close(module.losses(kept)[0], module.losses(pairs)[0])
    assert pairs.sampled is not None
    torch.testing.assert_close(module.losses(pairs.sampled)[0], module.losses(alone)[0])


def test_hybrid_steps_log_what_is_sampled_and_average_the_loss_over_all(
    make_module: MakeModule, pairs_file: str, prompts_file: str
):
    data = PromptDataModule(prompts_file, batch_size=4, preferences=pairs_file, preferences_batch_size=2)
    shown: list[int] = []

    class Shown(pl.Callback):
        def on_pairs_collected(self, trainer: pl.Trainer, module: Any, experience: Any) -> None:
            shown.append(len(experience))

    recorder = Recorder()
    run(make_module(alpha=0.1), data, max_steps=2, callbacks=[recorder, Shown()])
    assert shown == [4, 1], "five prompts make two batches"
    first = recorder.steps[0]
    # Both models are the same yet: log 2 for each pair, and alpha log pi(y_r) for 4 of 6.
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["loss/xpo"] == pytest.approx(0.1 * first["logps/reference_completions"] * 4 / 6, rel=1e-4)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    cut = [max(map(len, tokens_of(ROWS[row], 99)[1:])) > 6 for row in rows_of_turn(3, 2, 0, ProcessShard(), seed=0)]
    assert first["pairs/truncated"] == sum(cut) / 2


class Saver(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize(
    "kind", ["alone", pytest.param("hybrid", marks=pytest.mark.slow), "hybrid_with_buffer", "refreshed"]
)
def test_a_resumed_run_goes_on_as_the_whole_one(
    make_module: MakeModule, pairs_file: str, prompts_file: str, tmp_path: Path, kind: str
):
    options: dict[str, Any] = {"learning_rate": 1e-2, "lr_schedule": "constant"}
    options |= {"hybrid_with_buffer": {"buffer": BufferOptions()}}.get(kind, {})
    options |= {"refreshed": {"reference_refresh": ReferenceRefresh(every=2)}}.get(kind, {})

    def data() -> PromptDataModule:
        source = None if kind == "alone" else prompts_file
        size = {} if kind == "alone" else {"preferences_batch_size": 2}
        return PromptDataModule(source, batch_size=2, preferences=pairs_file, seed=3, **size)

    def module() -> XPOLightningModule:
        return make_module(**options)

    whole = module()
    recorder = Recorder()
    run(whole, data(), max_steps=5, callbacks=[recorder, Saver(tmp_path)])
    for step in (1, 2, 3):
        resumed = module()
        rest, _ = run(resumed, data(), str(tmp_path / f"{step}.ckpt"), max_steps=5)
        assert rest.of("loss/total") == recorder.of("loss/total")[step:]
        for ours, theirs in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_another_order_of_pairs_is_refused_at_a_resume(
    make_module: MakeModule, pairs_file: str, prompts_file: str, tmp_path: Path
):
    _, trainer = run(make_module(), PromptDataModule(prompts_file, preferences=pairs_file), max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    Path(pairs_file).write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    with pytest.raises(InputError, match=r"had another data\.preferences"):
        run(
            make_module(),
            PromptDataModule(prompts_file, preferences=pairs_file),
            str(tmp_path / "one.ckpt"),
            max_steps=2,
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": PolicySampler()}, "model.sampler=PolicySampler"),
        ({"candidates": Candidates(2, "best_of_each")}, "model.candidates"),
        ({"bonus": COPOBonus()}, "model.bonus=COPOBonus"),
        ({"bonus_on": "both"}, "model.bonus=XPOBonus"),
        ({"bonus_clip": 1.0}, "model.bonus_clip"),
        ({"entropy_bonus": 0.1}, "model.entropy_bonus"),
        ({"reference_cache": "memory"}, "model.reference_cache"),
        ({"bonus_sampler": ReferenceSampler()}, "model.bonus_sampler"),
    ],
)
def test_options_of_sampled_pairs_are_refused_without_any(
    make_module: MakeModule, pairs_file: str, options: dict[str, Any], named: str
):
    with pytest.raises(InputError, match=f"{named}.* trains on data.preferences alone"):
        run(make_module(**options), PromptDataModule(preferences=pairs_file), max_steps=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alpha": 1e-3}, "model.alpha"),
        ({"alpha": [0.0, 1e-5]}, "model.alpha"),
        ({"alpha_in_beta": True}, "model.alpha_in_beta"),
        ({"labels": LabelRule("soft")}, "model.labels"),
    ],
)
def test_options_of_scored_pairs_are_refused_if_validation_has_none_either(
    make_module: MakeModule, pairs_file: str, prompts_file: str, options: dict[str, Any], named: str
):
    with pytest.raises(InputError, match=f"{named} .* trains on data.preferences alone"):
        run(make_module(reward=None, **options), PromptDataModule(preferences=pairs_file), max_steps=1)
    validating = PromptDataModule(preferences=pairs_file, batch_size=3, validation_source=prompts_file)
    run(make_module(**options), validating, max_steps=1)


@pytest.mark.parametrize("loss", [INPOLoss(0.5), NashMDLoss()], ids=["INPOLoss", "NashMDLoss"])
def test_loss_on_the_writing_policy_is_refused(
    make_module: MakeModule, pairs_file: str, prompts_file: str, loss: PreferenceLoss
):
    module = make_module(sampler=PolicySampler(), preference_loss=loss)
    with pytest.raises(InputError, match=rf"model\.preference_loss={type(loss).__name__} .*data\.preferences"):
        run(module, PromptDataModule(prompts_file, preferences=pairs_file), max_steps=1)


def test_a_reward_is_needed_to_sample(make_module: MakeModule, pairs_file: str, prompts_file: str):
    missing = r"model\.reward: nothing says which of two sampled completions is better"
    for data in (PromptDataModule(prompts_file), PromptDataModule(prompts_file, preferences=pairs_file)):
        with pytest.raises(InputError, match=missing):
            run(make_module(reward=None), data, max_steps=1)
    module = make_module(reward=None)
    module.configure_model()
    with pytest.raises(InputError, match=missing):
        module.collect({"prompt": PROMPTS}, noise(), training=True)
    with pytest.raises(InputError, match=r"model\.missing_eos_penalty .*model\.reward is null"):
        make_module(reward=None, missing_eos_penalty=1.0)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"prompt": ["a"], "chosen": ["b"]}, "rejected"),
        ({"prompt": ["a"], "chosen": ["b"], "rejected": [None]}, "rejected"),
        ({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]}, "chosen"),
    ],
)
def test_batches_of_other_loaders_are_checked(make_module: MakeModule, batch: dict[str, Any], named: str):
    module = make_module(reward=None)
    module.configure_model()
    with pytest.raises(InputError, match=f"'{named}'"):
        module.collect({"preferences": batch}, noise(), training=True)
