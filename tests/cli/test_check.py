"""`xpo check` as a user meets it: a run that can start, the ones that cannot, and no file left by either."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer
from test_cli import refused
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MambaConfig,
)

from xpo_lightning.cli.check.survey import Prompts, pick_evenly
from xpo_lightning.cli.lightning_cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
PACKAGE = CONFIGS.parent / "xpo_lightning"
LONGEST = 30.0  # seconds that a check may take
CHAT = [{"role": "user", "content": "hi"}]


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [len(text) + 0.01 * text.count("e") for text in completions]


def broken(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    raise KeyError("no such word")


def one_short(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [0.0] * (len(completions) - 1)


def not_a_number(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [math.nan] * len(completions)


def all_alike(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [2.5] * len(completions)


@dataclass
class Bench:
    """A small run in a folder of its own, to be spoiled."""

    folder: Path
    policy: str
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows([{"prompt": f"the cat sat on mat {'the dog ' * (number % 3)}{number}"} for number in range(10)])
        self.config = {
            "seed_everything": 1,
            "model": {
                "policy": {"path": self.policy},
                "reward": self.function("letters"),
                "sampling": {"max_new_tokens": 5},
                "learning_rate": 1e-3,
            },
            "data": {"source": str(self.folder / "prompts.jsonl"), "validation_size": 2, "batch_size": 3},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 2,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "default_root_dir": str(self.folder / "runs"),
            },
        }

    def rows(self, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "prompts.jsonl").write_text(text)

    def function(self, name: str) -> dict[str, Any]:
        return {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.{name}"}}

    def classifier(self, name: str, saved: bool = True, **options: Any) -> None:
        """Take a reward model; one is made where it is to be there."""
        sizes = {"vocab_size": 304, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, num_attention_heads=2, num_labels=1, max_position_embeddings=64)
        if saved:
            AutoModelForSequenceClassification.from_config(config).save_pretrained(self.folder / name)
            make_tokenizer().save_pretrained(self.folder / name)
        init_args = {"path": str(self.folder / name), **options}
        self.model(reward={"class_path": "SequenceClassifierReward", "init_args": init_args})

    def tokenizer(self, added: int) -> None:
        """Take a tokenizer with more tokens."""
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"<{number}>" for number in range(added)])
        tokenizer.save_pretrained(self.folder / "tokenizer")
        self.config["model"]["policy"]["tokenizer"] = str(self.folder / "tokenizer")

    def model(self, **options: Any) -> None:
        self.config["model"] |= options

    def data(self, **options: Any) -> None:
        self.config["data"] |= options

    def trainer(self, **options: Any) -> None:
        self.config["trainer"] |= options

    def write(self) -> str:
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.config))
        return str(file)

    def files(self) -> dict[str, bytes | None]:
        paths = self.folder.rglob("*")
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def bench(tmp_path: Path, model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Give a run that works; whatever is done with it must leave no file and take no step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("a step was taken"))
    return Bench(tmp_path, model_folder())


def report(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, str]:
    """Run a check that must succeed; return its lines by subject, and warnings joined."""
    capsys.readouterr()
    main(["check", *args])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "The run can start."
    named = [line.partition(" ")[::2] for line in lines[:-1]]
    subjects = {name: text.strip() for name, text in named if name != "warning"}
    return subjects | {"warnings": " ".join(text.strip() for name, text in named if name == "warning")}


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


# ---- runs that can start ----


def test_quickstart_is_reported_with_its_true_numbers_and_leaves_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str]
):
    begun = time.monotonic()
    before = bench.files()
    said = report(capsys, "--config", str(CONFIGS / "quickstart.yaml"))
    assert time.monotonic() - begun < LONGEST
    assert bench.files() == before

    from safetensors.torch import load_file

    embedded = PACKAGE / "embedded"
    policy, reward = (load_file(embedded / name / "model.safetensors") for name in ("policy", "reward"))
    weights = sum(tensor.numel() for tensor in policy.values())
    assert f"{weights:,} weights in float32, all trained" in said["policy"]
    assert f"{sum(tensor.numel() for tensor in reward.values()):,} weights" in said["reward"]

    tokenizer = AutoTokenizer.from_pretrained(embedded / "policy")
    lines = (embedded / "prompts.jsonl").read_text().splitlines()
    lengths = sorted(len(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in lines)
    eos = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # which is taken off a prompt
    lengths = [length - eos for length in lengths]
    mean = sum(lengths) / len(lengths)
    within = lengths[math.ceil(0.95 * len(lengths)) - 1]
    assert said["training"] == (
        f"{len(lengths):,} prompts; {mean:.1f} tokens on average, 95% have at most {within}, the longest {lengths[-1]}"
    )
    assert said["validation"].startswith("256 prompts")
    assert said["run"] == f"of 60 optimizer steps; {math.ceil(len(lengths) / 64)} batches an epoch"
    assert said["batch"] == (
        f"64 prompts, 128 completions; {64 * mean:,.0f} prompt tokens on average, at most {128 * 64:,} new tokens; "
        f"1 optimizer step(s)"
    )
    assert said["checkpoint"].startswith(f"about {3 * 4 * weights / 2**20:.1f} MiB, 2 kept"), "weights, Adam's state"
    assert said["warnings"] == ""


def test_numbers_of_a_small_run(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """8 prompts are left to train on: 3 batches an epoch of 3, 3 and 2, each with 2 x 2 updates, in 2 epochs."""
    bench.model(updates_per_rollout=2, epochs_per_rollout=2)
    said = report(capsys, "--config", bench.write())
    assert numbers(said["training"])[0] == 8
    assert numbers(said["validation"])[0] == 2
    assert said["run"] == "of 24 optimizer steps; 3 batches an epoch"
    assert said["batch"].startswith("3 prompts, 6 completions;")
    assert said["batch"].endswith("at most 30 new tokens; 4 optimizer step(s)")
    assert said["tried"].startswith("4 prompts: 8 completions of ")
    assert {"data", "models", "completions", "reward", "gradient"} <= set(re.findall(r"[a-z]+", said["seconds"]))


def test_measured_memory_holds_the_models(bench: Bench, capsys: pytest.CaptureFixture[str]):
    said = report(capsys, "--config", bench.write())
    _, tried = numbers(said["memory"])
    assert tried > 0
    assert numbers(said["estimate"])[0] > 0


def test_memory_of_models_is_that_of_their_weights(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """Policy, reference and a small reward model in float32, and a reward model of two million weights in bfloat16."""
    sizes = {"vocab_size": 304, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**sizes, num_attention_heads=2, num_labels=1))
    model.save_pretrained(bench.folder / "large")
    make_tokenizer().save_pretrained(bench.folder / "large")
    bench.classifier("small")
    small = bench.config["model"]["reward"]
    large = {**small, "init_args": {"path": str(bench.folder / "large"), "dtype": "bfloat16"}}
    parts = {"rewards": [small, large], "weights": [1.0, 1.0]}
    bench.model(reward={"class_path": "WeightedSum", "init_args": parts})
    said = report(capsys, "--config", bench.write())
    count = sum(weight.numel() for weight in model.parameters())
    others = 2 * numbers(said["policy"].partition(": ")[2])[0] + 5_000
    assert numbers(said["estimate"].partition("models ")[2])[0] == pytest.approx(
        (2 * count + 4 * others) / 2**20, abs=0.1
    )


def test_run_of_an_unknown_architecture_says_what_a_checkpoint_takes(bench: Bench, capsys: pytest.CaptureFixture[str]):
    sizes = {"vocab_size": 304, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = AutoModelForCausalLM.from_config(MambaConfig(**sizes, pad_token_id=0, eos_token_id=2))
    model.save_pretrained(bench.folder / "mamba")
    make_tokenizer().save_pretrained(bench.folder / "mamba")
    bench.model(policy={"path": str(bench.folder / "mamba")})
    said = report(capsys, "--config", bench.write())
    assert said["estimate"] == "none for this architecture"
    weights = sum(weight.numel() for weight in model.parameters())
    assert said["checkpoint"].startswith(f"about {3 * 4 * weights / 2**20:.1f} MiB")


def test_trained_adapters_are_told_from_the_rest(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """Two layers of 32 x 32, 32 x 16 twice, 32 x 32, and three of 32 x 48, at rank 2: 2 x 2 x (128 + 96 + 240)."""
    bench.model(lora={"r": 2})
    said = report(capsys, "--config", bench.write())
    assert f"{2 * 2 * (128 + 96 + 240):,} trained" in said["policy"]
    assert said["reference"] == "the policy with its adapters off"


def test_earlier_policies_are_in_the_checkpoint(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """Weights, Adam's two numbers, and two earlier states of the policy: five times the weights."""
    bench.model(sampler={"class_path": "PreviousPolicySampler"})
    said = report(capsys, "--config", bench.write())
    weights = numbers(said["policy"].partition(":")[2])[0]
    assert numbers(said["checkpoint"])[0] == pytest.approx(5 * 4 * weights / 2**20, abs=0.05)


def test_config_that_a_run_saved_can_be_checked(bench: Bench, capsys: pytest.CaptureFixture[str]):
    file = bench.folder / "saved.yaml"
    file.write_text(yaml.safe_dump({**bench.config, "ckpt_path": None, "weights_only": None}))
    report(capsys, "--config", str(file))
    assert "ckpt_path" in refused(capsys, "check", "--config", bench.write(), "--ckpt_path", "last")


def test_stream_is_looked_at_from_its_beginning(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.data(streaming=True, validation_size=0)
    bench.trainer(max_steps=7, max_epochs=-1)
    said = report(capsys, "--config", bench.write())
    assert said["training"].startswith("the first 10 prompts of a stream;")
    assert said["run"] == "of 7 optimizer steps; epochs of unknown length"
    assert said["validation"] == "no prompts"


def test_existing_reference_cache_is_looked_at_and_not_written(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """A cache of another sampling is refused, as by a run, and one that fits stays as it is."""
    bench.model(reference_cache=str(bench.folder / "cache"))
    config, steps = bench.write(), torch.optim.Adam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", steps)
        main(["fit", "--config", config, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"])
    before = bench.files()
    report(capsys, "--config", config)
    line = refused(capsys, "check", "--config", config, "--model.sampling.temperature", "0.5")
    assert "model.reference_cache" in line
    assert bench.files() == before


def test_several_processes_are_looked_at_by_one(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.trainer(devices=2, strategy="ddp")
    said = report(capsys, "--config", bench.write())
    assert said["run"] == "of 4 optimizer steps; 2 batches an epoch on each of 2 devices"
    assert "trainer.devices: one of 2 processes was tried out" in said["warnings"]


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
    return ["reward function", "test_check.broken", "no such word"]


def reward_of_another_length(bench: Bench) -> list[str]:
    bench.model(reward=bench.function("one_short"))
    return ["reward function", "test_check.one_short", "length 7; expected 8"]


def reward_that_is_no_number(bench: Bench) -> list[str]:
    bench.model(reward=bench.function("not_a_number"))
    return ["reward function", "test_check.not_a_number", "nan"]


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
    assert report(capsys, "--config", bench.write())["warnings"] == ""
    expected = doubt(bench)
    assert expected in report(capsys, "--config", bench.write())["warnings"]


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


# ---- parts ----


def test_percentiles_are_of_the_nearest_rank():
    prompts = Prompts([], list(range(1, 21)), 0, is_stream=False)
    assert (prompts.percentile(0.95), prompts.percentile(0.5), prompts.percentile(1.0)) == (19, 10, 20)
    assert Prompts([], [7], 0, is_stream=False).percentile(0.95) == 7


def test_a_closer_look_takes_the_longest_and_others_from_everywhere():
    assert pick_evenly([1, 2, 9, 1, 1, 1], 3) == [2, 0, 3]
    assert sorted(pick_evenly([1, 2, 3], 10)) == [0, 1, 2]
    assert pick_evenly([1, 2, 3], 0) == []
