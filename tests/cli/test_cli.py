"""The command line as a user meets it: runs that work, and one clear line where they cannot."""

import csv
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BARE, make_tokenizer
from huggingface_hub import constants
from transformers import AutoModelForSequenceClassification, LlamaConfig

import xpo_lightning
from xpo_lightning import ModelSpec
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core import paths as sources

CONFIGS = Path(__file__).parents[2] / "configs"
DECISION_8 = [
    *("loss/dpo", "loss/xpo", "objective/kl", "objective/entropy", "objective/model_scores", "objective/ref_scores"),
    *("objective/scores_margin", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "val/model_contain_eos_token", "val/ref_contain_eos_token", "alpha", "beta"),
]
Write = Callable[..., str]


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [len(text) + 0.01 * text.count("e") for text in completions]


def one_short(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [0.0] * (len(completions) - 1)


def words(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[str]:
    return ["good"] * len(completions)


def nothing(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> None:
    return None


def not_a_number(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [math.nan] * len(completions)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"the cat sat on mat {n}"}) + "\n" for n in range(8)))
    return file


@pytest.fixture
def write_config(tmp_path: Path, prompts_file: Path, model_folder: Callable[..., str]) -> Write:
    """Give a function that writes the config of a small run, with changes, and returns its path."""

    def write(tokenizer: str = "distinct", **changes: Any) -> str:
        config = {
            "seed_everything": 1,
            "model": {
                "policy": {"path": model_folder("llama", tokenizer)},
                "reward": {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.letters"}},
                "sampling": {"max_new_tokens": 5},
                "learning_rate": 1e-3,
            },
            "data": {"source": str(prompts_file), "validation_size": 4, "batch_size": 2},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "callbacks": [],
                "default_root_dir": str(tmp_path / "runs"),
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(tmp_path / "runs"), "name": ""},
                },
            },
            "defaults": dict(BARE),
        }
        for key, value in changes.items():
            branch, *path, leaf = (config, *key.split("__"))
            for name in path:
                branch = branch.setdefault(name, {})
            branch[leaf] = value
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        return str(file)

    return write


def rows_of(metrics: Path) -> list[dict[str, float]]:
    with metrics.open() as lines:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must be refused, and return its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    lines = [line for line in shown if line.startswith("xpo: error: ")]
    assert len(lines) == 1
    assert shown[-1] == lines[0]
    assert not any("usage:" in line or "Traceback" in line for line in shown)
    return lines[0]


# ---- runs ----


def test_fit_logs_every_metric_and_a_second_run_in_the_folder_works(write_config: Write, tmp_path: Path):
    config = write_config()
    main(["fit", "--config", config])
    main(["fit", "--config", config])
    for version in ("version_0", "version_1"):
        folder = tmp_path / "runs" / version
        assert (folder / "config.yaml").is_file()
        rows = rows_of(folder / "metrics.csv")
        logged = {name for row in rows for name in row}
        assert {*DECISION_8, "lr", "grad_norm", "eval/win_rate", "eval/win_rate_stderr", "eval/objective/kl"} <= logged
        assert {f"eval/{name}" for name in DECISION_8[:-2]} <= logged
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert [row["step"] for row in rows if "loss/dpo" in row] == [1, 2]


def test_the_same_command_twice_gives_the_same_numbers(write_config: Write, tmp_path: Path):
    config = write_config()
    main(["fit", "--config", config])
    main(["fit", "--config", config])
    first, second = (rows_of(tmp_path / "runs" / f"version_{n}" / "metrics.csv") for n in (0, 1))
    assert first == second


@pytest.mark.slow
def test_saved_config_when_given_back_then_repeats_the_run(write_config: Write, tmp_path: Path):
    main(["fit", "--config", write_config()])
    main(["fit", "--config", str(tmp_path / "runs" / "version_0" / "config.yaml")])
    first, second = (rows_of(tmp_path / "runs" / f"version_{n}" / "metrics.csv") for n in (0, 1))
    assert first == second


def test_validate_of_the_untrained_policy_logs_a_win_rate_with_its_error(write_config: Write, tmp_path: Path):
    main(["validate", "--config", write_config()])
    (row,) = rows_of(tmp_path / "runs" / "validate" / "metrics.csv")
    assert 0 <= row["eval/win_rate"] <= 1
    assert row["eval/objective/kl"] == pytest.approx(0, abs=1e-5)


def test_checkpoint_when_validated_then_gives_the_numbers_of_the_run_that_saved_it(write_config: Write, tmp_path: Path):
    config = write_config(model__learning_rate=0.03)
    main(["fit", "--config", config])
    (checkpoint,) = (tmp_path / "runs" / "version_0" / "checkpoints").glob("*.ckpt")
    main(["validate", "--config", config, "--ckpt_path", str(checkpoint)])
    trained = next(row for row in rows_of(tmp_path / "runs" / "version_0" / "metrics.csv") if "eval/win_rate" in row)
    (again,) = rows_of(tmp_path / "runs" / "version_0" / "validate" / "metrics.csv")
    assert abs(trained["eval/objective/kl"]) > 1e-3
    assert {k: v for k, v in again.items() if k.startswith("eval/")} == {
        k: v for k, v in trained.items() if k.startswith("eval/")
    }


def test_predict_writes_a_line_for_each_prompt(write_config: Write, tmp_path: Path):
    main(["predict", "--config", write_config()])
    (file,) = (tmp_path / "runs").rglob("predictions.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["prompt"].startswith("the cat") and line["policy"] and line["reference"] for line in lines)


@pytest.mark.parametrize("file", ["missing", "other model"])
def test_checkpoint_that_does_not_fit_is_refused(
    write_config: Write, model_folder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
):
    main(["fit", "--config", write_config()])
    (checkpoint,) = (tmp_path / "runs" / "version_0" / "checkpoints").glob("*.ckpt")
    config = write_config(model__policy__path=model_folder("gpt_neox"))
    if file == "other model":
        assert "does not belong to this model" in refused(
            capsys, "fit", "--config", config, "--ckpt_path", str(checkpoint)
        )
    else:
        line = refused(capsys, "fit", "--config", config, "--ckpt_path", "nowhere.ckpt")
        assert "ckpt_path" in line
        assert "nowhere.ckpt" in line


def test_checkpoint_trained_against_another_reference_is_refused(
    write_config: Write, model_folder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["fit", "--config", write_config()])
    (checkpoint,) = (tmp_path / "runs" / "version_0" / "checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    saved["xpo_reference"]["fingerprint"] = "0" * 64
    torch.save(saved, checkpoint)
    line = refused(capsys, "fit", "--config", write_config(), "--ckpt_path", str(checkpoint))
    assert "against the reference" in line


def test_version_and_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "xpo_lightning", "--version"], capture_output=True, text=True, check=True
    )
    assert "0.1.0" in done.stdout


# ---- refusals ----


def data_file(tmp_path: Path, name: str, text: str) -> str:
    file = tmp_path / name
    file.write_text(text)
    return str(file)


BAD_DATA = {
    "missing column": ('{"text": "a"}\n', ["prompt_column", "text"]),
    "null prompt": ('{"prompt": "a"}\n{"prompt": null}\n', ["bad.jsonl", "2", "null"]),
    "number prompt": ('{"prompt": "a"}\n\n{"prompt": 7}\n', ["bad.jsonl", "3", "int"]),
    "empty file": ("", ["bad.jsonl", "data.source"]),
    "broken JSON": ('{"prompt": "a"}\n{"prompt": "b\n', ["bad.jsonl", "2"]),
    "empty prompt": ('{"prompt": "a"}\n{"prompt": "  "}\n', ["bad.jsonl", "2", "empty"]),
    "longer than the context": (json.dumps({"prompt": "cat dog " * 200}) + "\n", ["bad.jsonl", "1", "context"]),
    "conversation without a template": (
        json.dumps({"prompt": [{"role": "user", "content": "hi"}]}) + "\n",
        ["bad.jsonl", "1", "chat template"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_before_a_model_is_loaded(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
):
    monkeypatch.setattr(
        "xpo_lightning.models.policy.ModelSpec.load_model", lambda self: pytest.fail("a model was loaded")
    )
    text, expected = BAD_DATA[case]
    config = write_config(data__source=data_file(tmp_path, "bad.jsonl", text), data__validation_size=0)
    line = refused(capsys, "fit", "--config", config)
    for part in expected:
        assert part in line


def test_prompt_plus_new_tokens_over_the_context_is_refused(write_config: Write, capsys: pytest.CaptureFixture[str]):
    """The prompts have about 10 tokens and the context is 64: 5 new tokens fit, 60 do not, 64 never can."""
    assert "context" in refused(capsys, "fit", "--config", write_config(), "--model.sampling.max_new_tokens", "60")
    line = refused(capsys, "fit", "--config", write_config(), "--model.sampling.max_new_tokens", "64")
    assert "model.sampling.max_new_tokens=64" in line


@pytest.mark.parametrize(
    ("function", "expected"),
    [("one_short", "length 3; expected 4"), ("words", "str"), ("nothing", "None"), ("not_a_number", "nan")],
)
def test_bad_reward_stops_the_run_before_a_step(
    write_config: Write,
    capsys: pytest.CaptureFixture[str],
    function: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("a step was taken"))
    config = write_config(model__reward__init_args={"function": f"{__name__}.{function}"})
    line = refused(capsys, "fit", "--config", config)
    assert f"{__name__}.{function}" in line
    assert expected in line


@pytest.mark.slow
def test_tokenizer_without_eos_is_refused_and_without_pad_is_not(
    write_config: Write, model_folder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["fit", "--config", write_config("no_pad")])
    tokenizer = make_tokenizer("no_pad")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    config = write_config(model__policy__tokenizer=str(tmp_path / "no_eos"))
    line = refused(capsys, "fit", "--config", config)
    assert "model.sampling.eos_token_ids" in line
    main(["fit", "--config", config, "--model.sampling.eos_token_ids", "[]"])


def test_reward_model_with_two_labels_is_refused(
    write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = LlamaConfig(
        vocab_size=304, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "two")
    make_tokenizer().save_pretrained(tmp_path / "two")
    reward = {"class_path": "SequenceClassifierReward", "init_args": {"path": str(tmp_path / "two")}}
    line = refused(capsys, "fit", "--config", write_config(model__reward=reward))
    assert "num_labels" in line


@pytest.mark.parametrize("key", ["model.policy.path", "data.source", "model.reward.init_args.path"])
def test_missing_local_path_is_refused(write_config: Write, capsys: pytest.CaptureFixture[str], key: str):
    reward = {"class_path": "SequenceClassifierReward", "init_args": {"path": "./nowhere"}}
    config = write_config(**({"model__reward": reward} if "reward" in key else {}))
    line = refused(capsys, "fit", "--config", config, *([] if "reward" in key else [f"--{key}", "./nowhere"]))
    assert key in line
    assert "./nowhere" in line


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("trainer.gradient_clip_val", "1.0", "model.max_grad_norm"),
        ("trainer.accumulate_grad_batches", "4", "data.batch_size"),
        ("trainer.precision", "16-mixed", "bf16-mixed"),
        ("trainer.strategy", "deepspeed", "use FSDP2Strategy"),
        ("trainer.strategy", "fsdp2", "use FSDP2Strategy"),
        ("trainer.strategy", "fsdp", "use FSDP2Strategy"),
        ("trainer.precision", "bf16-true", "model.policy.dtype"),
        ("model.sampling.top_p", "1.5", "model.sampling.top_p"),
        ("model.micro_batch_size", "0", "model.micro_batch_size"),
        ("model.updates_per_rollout", "0", "model.updates_per_rollout"),
        ("model.warmup_ratio", "1.5", "model.warmup_ratio"),
        ("model.beta", "0", "model.beta"),
        ("model.bonus_clip", "-1", "model.bonus_clip"),
        ("model.missing_eos_penalty", "-1", "model.missing_eos_penalty"),
        ("model.lora.r", "0", "model.lora.r"),
        ("model.lora.alpha", "0", "model.lora.alpha"),
        ("model.lora.target_modules", "[no_such_layer]", "model.lora.target_modules"),
        ("model.policy.revision", "v1", "model.policy.path is local"),
        ("model.policy.dropout", "1.5", "model.policy.dropout"),
        ("model.sampling.eos_token_ids", "[99999]", "model.sampling.eos_token_ids"),
        ("model.optimizer", "{class_path: torch.optim.SGD, init_args: {lr: -1}}", "learning rate"),
        ("model.optimizer", "{class_path: torch.optim.LBFGS}", "LBFGS"),
        ("model.alpha", "{class_path: Linear, init_args: {start: 1, end: 0, steps: 0}}", "at least 1"),
        ("model.preference_loss", "{class_path: IPOLoss, init_args: {label_smoothing: 0.9}}", "below 0.5"),
        ("trainer.devices", "0", "trainer"),
        ("trainer.strategy", "bogus", "bogus"),
        ("trainer.callbacks", "[{class_path: CompletionsTable, init_args: {rows: 0}}]", "rows"),
        ("ckpt_path", "/", "no checkpoint"),
        ("ckpt_path", __file__, "no checkpoint"),
        ("data.truncate", "left", "max_prompt_tokens"),
    ],
)
def test_option_that_cannot_be_honoured_is_refused(
    write_config: Write, capsys: pytest.CaptureFixture[str], key: str, value: str, instead: str
):
    config = write_config(**({"model__learning_rate": None} if key == "model.optimizer" else {}))
    line = refused(capsys, "fit", "--config", config, f"--{key}", value)
    assert key.rsplit(".", maxsplit=1)[-1] in line
    assert instead in line


def test_tldr_without_the_hub_fails_at_once_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    line = refused(capsys, "fit", "--config", str(CONFIGS / "tldr.yaml"), "--trainer.default_root_dir", str(tmp_path))
    assert "could not load" in line
    assert "give a local path" in line


def test_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    """Without the probe each of several files would be asked for six times, with pauses of up to 8 s."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    sources._hub_answers.cache_clear()
    start = time.monotonic()
    with pytest.raises(sources.InputError, match="could not load 'owner/name'"):
        ModelSpec("owner/name").load_config()
    sources._hub_answers.cache_clear()
    assert time.monotonic() - start < 5
    assert constants.HF_HUB_OFFLINE is False


def test_nothing_to_validate_on_is_refused(write_config: Write, capsys: pytest.CaptureFixture[str]):
    config = write_config(data__validation_size=0)
    assert "data.validation_source" in refused(capsys, "validate", "--config", config)
    export = "[{class_path: PolicyExport, init_args: {at: validation}}]"
    line = refused(capsys, "fit", "--config", config, "--trainer.callbacks", export)
    assert "there are no validation prompts" in line


def test_a_mistyped_key_is_named_in_one_line(write_config: Write, capsys: pytest.CaptureFixture[str]):
    assert "model.alhpa" in refused(capsys, "fit", "--config", write_config(), "--model.alhpa", "1")
    assert "nofile.yaml" in refused(capsys, "fit", "--config", "nofile.yaml")
    assert "model.policy" in refused(capsys, "fit", "--data.source", "x.jsonl")


@pytest.mark.parametrize(
    ("group", "value", "option"),
    [
        ("trainer", 5, "--trainer.max_steps=1"),
        ("data", [], "--data.batch_size=2"),
        ("model__policy", 5, "--model.policy.path=elsewhere"),
        ("model__sampling", None, "--model.sampling.max_new_tokens=3"),
    ],
)
def test_value_in_place_of_a_group_is_refused_though_a_later_option_would_hide_it(
    write_config: Write, capsys: pytest.CaptureFixture[str], group: str, value: Any, option: str
):
    key = group.replace("__", ".")
    line = refused(capsys, "fit", "--config", write_config(**{group: value}), option)
    assert f"{key} must be a group of options, but is" in line
    assert "run.yaml, line" in line


# ---- verbs ----


def test_env_prints_the_versions_that_are_installed(capsys: pytest.CaptureFixture[str]):
    main(["env"])
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["torch"] == importlib.metadata.version("torch")  # a wheel of PyPI keeps its CUDA version out of this
    assert shown["python"].startswith(".".join(map(str, sys.version_info[:3])))


def test_an_option_that_a_verb_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "--model" in refused(capsys, "env", "--model", "x")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti"], "did you mean 'fit'?"),
        (["comprae", "a"], "did you mean 'compare'?"),
        (["zzz"], "there are fit, validate"),
        (["fit", "--config", "quikstart"], "did you mean 'quickstart'?"),
        (["fit", "--config", "quickstart", "--model.alhpa", "0"], "did you mean 'model.alpha'?"),
        (["fit", "--config=quickstart", "--model.reward.init_args.pth", "x"], "did you mean 'path'?"),
        (["fit", "--config", "quickstart", "--model.reward", "PythonRewrd"], "did you mean 'PythonReward'?"),
        (["compare", "a", "--smaples", "2"], "did you mean 'samples'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_mistyped_is_answered_with_what_was_meant(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert expected in refused(capsys, *words)


def test_mistyped_key_in_a_config_is_named_with_its_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  beta: 0.1\n  alhpa: 1\n")
    line = refused(capsys, "fit", "--config", "quickstart", "--config", str(file))
    assert f"'model.alhpa' (in {file}, line 3); did you mean 'model.alpha'?" in line
    assert "cannot be used" not in line


def test_every_public_name_is_there_when_it_is_asked_for():
    """What the package lists, loads on demand, and says to type checkers are the same names."""
    assert set(xpo_lightning._HOME_OF) == set(xpo_lightning.__all__) <= set(dir(xpo_lightning))
    for name in xpo_lightning.__all__:
        assert getattr(xpo_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = xpo_lightning.nothing_of_that_name
