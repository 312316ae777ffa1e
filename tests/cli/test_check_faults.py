"""`xpo check` of runs that cannot start, or are likely not meant: one line each, and no file left."""

import time
from collections.abc import Callable

import pytest
from check_bench import LONGEST, Bench, numbers, report
from test_cli import refused

CHAT = [{"role": "user", "content": "hi"}]


# ---- faults ----


def missing_file(bench: Bench) -> list[str]:
    bench.data(source="./nowhere.jsonl")
    return ["data.source", "nowhere.jsonl"]


def row_without_a_prompt(bench: Bench) -> list[str]:
    bench.rows([{"prompt": "the cat"}, {"text": "the dog"}])
    bench.data(validation_size=0)
    return ["prompts.jsonl, line 2", "'prompt'"]


def no_prompt_column(bench: Bench) -> list[str]:
    bench.rows([{"promt": "the cat"}])
    bench.data(validation_size=0)
    return ["data.prompt_column", "did you mean 'promt'"]


def prompt_beyond_the_context(bench: Bench) -> list[str]:
    bench.rows([{"prompt": "the cat"}] * 300 + [{"prompt": "cat dog " * 200}])
    bench.data(validation_size=0)
    return ["line 301", "data.max_prompt_tokens", "context"]


def chat_without_a_template(bench: Bench) -> list[str]:
    bench.rows([{"prompt": CHAT}] * 4)
    return ["model.policy.chat_template"]


def tokenizer_beyond_the_embeddings(bench: Bench) -> list[str]:
    bench.tokenizer(added=100)
    return ["model.policy.tokenizer", "embeds only 304"]


def no_reward_model(bench: Bench) -> list[str]:
    bench.classifier("nowhere", saved=False)
    return ["model.reward.init_args.path", "nowhere"]


def reward_model_without_a_head(bench: Bench) -> list[str]:
    bench.model(reward={"class_path": "SequenceClassifierReward", "init_args": {"path": bench.policy}})
    return ["model.reward.init_args.path", "allow_untrained_head"]


def reward_model_without_a_template(bench: Bench) -> list[str]:
    bench.classifier("reward", prompt_format="chat")
    return ["model.reward", "chat template"]


def reward_model_too_short(bench: Bench) -> list[str]:
    bench.classifier("reward", max_tokens=9, truncate="error")
    return ["model.reward.init_args.truncate", "takes 9"]


def reward_that_raises(bench: Bench) -> list[str]:
    bench.model(reward=bench.function("broken"))
    return ["reward function", "check_bench.broken", "no such word"]


def reward_of_another_length(bench: Bench) -> list[str]:
    bench.model(reward=bench.function("one_short"))
    return ["reward function", "check_bench.one_short", "length 7; expected 8"]


def reward_that_is_no_number(bench: Bench) -> list[str]:
    bench.model(reward=bench.function("not_a_number"))
    return ["reward function", "check_bench.not_a_number", "nan"]


def judge_that_is_not_there(bench: Bench) -> list[str]:
    judge = {"class_path": "HTTPJudge", "init_args": {"url": "http://127.0.0.1:9/v1", "model": "m"}}
    bench.model(reward=judge)
    return ["model.reward.init_args.url", "http://127.0.0.1:9", "start the server"]


def nothing_to_validate_on(bench: Bench) -> list[str]:
    bench.data(validation_size=0)
    bench.trainer(callbacks=[{"class_path": "Baseline"}], num_sanity_val_steps=-1)
    return ["trainer.callbacks", "Baseline", "data.validation_source"]


def nothing_to_monitor(bench: Bench) -> list[str]:
    bench.data(validation_size=0)
    monitor = {"class_path": "RunCheckpoint", "init_args": {"monitor": "eval/win_rate"}}
    bench.trainer(callbacks=[monitor])
    return ["trainer.callbacks", "RunCheckpoint watches eval/win_rate", "data.validation_source"]


def folder_that_is_a_file(bench: Bench) -> list[str]:
    (bench.folder / "taken").write_text("")
    bench.trainer(default_root_dir=str(bench.folder / "taken" / "runs"))
    return ["trainer.default_root_dir", "taken"]


def cache_that_is_a_file(bench: Bench) -> list[str]:
    (bench.folder / "taken").write_text("")
    bench.model(reference_cache=str(bench.folder / "taken"))
    return ["model.reference_cache", "taken"]


def adapters_on_nothing(bench: Bench) -> list[str]:
    bench.model(lora={"target_modules": ["no_such_layer"]})
    return ["model.lora.target_modules", "no_such_layer"]


def penalty_without_an_end(bench: Bench) -> list[str]:
    bench.model(missing_eos_penalty=1.0)
    bench.config["model"]["sampling"]["eos_token_ids"] = []
    return ["model.missing_eos_penalty", "model.sampling.eos_token_ids"]


def unknown_precision(bench: Bench) -> list[str]:
    bench.trainer(precision="bf16-true")
    return ["trainer.precision", "bf16-mixed"]


def batch_beyond_the_data(bench: Bench) -> list[str]:
    bench.data(batch_size=64, drop_last=True)
    return ["data.drop_last", "data.batch_size=64"]


def validation_that_never_comes(bench: Bench) -> list[str]:
    bench.trainer(val_check_interval=100)
    return ["trainer", "val_check_interval"]


def schedule_without_an_end(bench: Bench) -> list[str]:
    bench.trainer(max_epochs=-1)
    return ["model.lr_schedule", "trainer.max_steps"]


FAULTS = [
    *(missing_file, row_without_a_prompt, no_prompt_column, prompt_beyond_the_context, chat_without_a_template),
    *(tokenizer_beyond_the_embeddings, no_reward_model, reward_model_without_a_head, reward_model_without_a_template),
    *(reward_model_too_short, reward_that_raises, reward_of_another_length, reward_that_is_no_number),
    *(judge_that_is_not_there, nothing_to_validate_on, nothing_to_monitor, folder_that_is_a_file, cache_that_is_a_file),
    *(adapters_on_nothing, penalty_without_an_end, unknown_precision, batch_beyond_the_data),
    *(validation_that_never_comes, schedule_without_an_end),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_named_in_one_line_within_half_a_minute_and_no_file_is_left(
    bench: Bench, capsys: pytest.CaptureFixture[str], fault: Callable[[Bench], list[str]]
):
    expected = fault(bench)
    config = bench.write()
    before, begun = bench.files(), time.monotonic()
    line = refused(capsys, "check", "--config", config)
    assert time.monotonic() - begun < LONGEST
    assert bench.files() == before
    for part in expected:
        assert part in line


def test_disk_that_holds_no_checkpoint_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    line = refused(capsys, "check", "--config", bench.write())
    assert "trainer.default_root_dir: a checkpoint takes about" in line
    assert "enable_checkpointing" in line


# ---- warnings ----


def steep_bfloat16(bench: Bench) -> str:
    bench.config["model"]["policy"]["dtype"] = "bfloat16"
    bench.model(learning_rate=1e-7)
    return "model.policy.dtype: at a learning rate of 1e-07"


def small_alpha(bench: Bench) -> str:
    bench.model(alpha=1e-9)
    return "model.alpha: 1e-09 is not far above the optimizer's eps of 1e-08"


def weight_decay(bench: Bench) -> str:
    bench.config["model"].pop("learning_rate")
    bench.model(optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}})
    return "model.optimizer: weight_decay=0.01"


def completions_without_an_end(bench: Bench) -> str:
    bench.model(missing_eos_penalty=1.0, sampling={"max_new_tokens": 5, "eos_token_ids": [303], "top_k": 1})
    return "model.missing_eos_penalty: none of 8 sampled completions ended"


def constant_reward(bench: Bench) -> str:
    bench.model(reward=bench.function("all_alike"))
    return "model.reward: all of 8 sampled completions have the same score, 2.5"


def identical_completions(bench: Bench) -> str:
    bench.model(sampling={"max_new_tokens": 5, "top_k": 1})
    return "the completions of each of 4 sampled pairs are identical"


def truncated_prompts(bench: Bench) -> str:
    bench.rows([{"prompt": "the cat " * words} for words in (1, 1, 9, 9, 9)])
    bench.data(max_prompt_tokens=6, truncate="left", validation_size=0)
    return "data.truncate: 3 of 5 prompts lose their beginning to data.max_prompt_tokens=6"


def truncated_rows(bench: Bench) -> str:
    bench.classifier("reward", max_tokens=12)
    return "exceed the 12 tokens that the reward model reads"


def large_batch(bench: Bench) -> str:
    bench.data(batch_size=64)
    return "data.batch_size=64 is more than the 8 prompts"


def long_warmup(bench: Bench) -> str:
    bench.model(warmup_steps=100)
    return "model.warmup_steps=100 is not below the 6 optimizer steps"


WARNINGS = [
    *(steep_bfloat16, small_alpha, weight_decay, completions_without_an_end, constant_reward, identical_completions),
    *(truncated_prompts, truncated_rows, large_batch, long_warmup),
]


@pytest.mark.parametrize("doubt", WARNINGS, ids=lambda doubt: doubt.__name__)
def test_what_is_likely_not_meant_is_warned_of(
    bench: Bench, capsys: pytest.CaptureFixture[str], doubt: Callable[[Bench], str]
):
    expected = doubt(bench)
    assert expected in report(capsys, "--config", bench.write())["warnings"]


def test_run_that_is_as_meant_is_warned_of_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]):
    assert report(capsys, "--config", bench.write())["warnings"] == ""


def test_disk_that_does_not_hold_all_checkpoints_is_warned_of(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The best, the last and one written beside them, of about 0.25 MiB each; there is room for one and a half."""
    size = numbers(report(capsys, "--config", bench.write())["checkpoint"])[0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1.5 * size * 2**20})())
    assert "2 checkpoints of" in report(capsys, "--config", bench.write())["warnings"]


def test_memory_that_is_not_there_is_warned_of(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("xpo_lightning.cli.check.check.memory_of", lambda _: 2**20)
    said = report(capsys, "--config", bench.write())
    assert "model.micro_batch_size, model.rollout_batch_size: a step may take" in said["warnings"]
