"""Whatever a data file or a config holds: a run that works, or one clear error; never a traceback, never a hang."""

import csv
import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import yaml
from conftest import BARE, make_tokenizer
from fuzz_configs import changes, damages
from fuzz_strategies import DataFile, data_files, data_options
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from xpo_lightning import InputError
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.data import PromptDataModule
from xpo_lightning.data.prompts import PromptTokenizer

# A longer run, for a night: XPO_FUZZ=20 makes twenty times as many examples, other ones each time.
TIMES = int(os.environ.get("XPO_FUZZ", "1"))
LIMIT = 200  # tokens of a prompt
TOKENIZER = make_tokenizer("chat")


def fuzzing(examples: int, shrink: bool = True) -> settings:
    return settings(
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        # The fixtures hold no state: a folder, and what pytest captures.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class HangError(BaseException):
    """Not an Exception, so that nothing that is tested can catch it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where the block takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except HangError as hang:
        raise AssertionError(f"took longer than {seconds} s") from hang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- data files ----


def load_all(path: Path, options: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Set the data module up and read every training batch and every validation batch."""
    module = PromptDataModule(str(path), **options)
    encoder = PromptTokenizer(TOKENIZER, LIMIT)
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(prompt_encoder=encoder), current_epoch=0)
    module.setup("fit")
    return list(module.train_dataloader()), list(module.val_dataloader())


def naive_prompts(file: DataFile, partly: bool) -> list[Any] | None:
    """Read the prompts in the plainest way; None where a damaged file leaves it open what it holds.

    Args:
        file: The file.
        partly: Only its beginning had to be read, so that the rest may be broken.
    """
    if file.rows is not None:
        rows = file.rows
    elif file.suffix == ".parquet" or partly:
        return None
    else:
        text = file.content.decode("utf-8-sig")
        if file.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [row["prompt"] for row in rows]


def tokens_of(prompt: Any) -> int:
    if isinstance(prompt, str):
        return len(TOKENIZER(prompt)["input_ids"])
    ends = prompt[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not ends, "continue_final_message": ends}
    return len(TOKENIZER(TOKENIZER.apply_chat_template(prompt, tokenize=False, **options))["input_ids"])


def check_batches(
    file: DataFile, options: dict[str, Any], training: list[dict[str, Any]], validation: list[dict[str, Any]]
) -> None:
    """Check every batch, and that together they hold every row of the file that they should."""
    most = min(LIMIT, options.get("max_prompt_tokens") or LIMIT)
    for batches, size in ((training, "batch_size"), (validation, "validation_batch_size")):
        wanted = options.get(size) or options["batch_size"]
        assert all(1 <= len(batch["prompt"]) <= wanted for batch in batches)
        assert all(len(values) == len(batch["prompt"]) for batch in batches for values in batch.values())
        assert all(1 <= len(ids) <= most for batch in batches for ids in batch["prompt_ids"])
    if options.get("prompt_column", "prompt") != "prompt":
        return
    expected = naive_prompts(file, partly=bool(options.get("streaming") and options.get("max_prompts")))
    if expected is None:
        return
    size = options.get("validation_size", 0)
    held_out = round(size * len(expected)) if isinstance(size, float) else size
    counts = [len(batch["prompt"]) for batch in validation]
    if options.get("truncate") != "drop":
        assert sum(counts) == held_out
        left = min(len(expected) - held_out, options.get("max_prompts") or len(expected))
        left -= left % options["batch_size"] if options.get("drop_last") else 0
        assert sum(len(batch["prompt"]) for batch in training) == left
    elif not (held_out or options.get("max_prompts") or options.get("drop_last")):
        fitting = [prompt for prompt in expected if tokens_of(prompt) <= most]
        found = [prompt for batch in training for prompt in batch["prompt"]]
        assert sorted(map(repr, found)) == sorted(map(repr, fitting))


def check_message(message: str, *names: str) -> None:
    """Check that it reads as one line, not too long, and says where the fault is."""
    line = " ".join(message.split())
    assert 20 < len(line) < 1000
    assert any(name in line for name in names)
    assert "Traceback" not in line


@pytest.mark.slow
@fuzzing(320)
@given(file=data_files, options=data_options())
def test_data_file_of_any_content_when_read_then_gives_its_prompts_or_one_clear_error(
    tmp_path: Path, file: DataFile, options: dict[str, Any]
):
    path = tmp_path / f"prompts{file.suffix}"
    path.write_bytes(file.content)
    with within(20):
        try:
            training, validation = load_all(path, options)
        except InputError as error:
            event("refused")
            check_message(str(error), "data.", path.name)
            return
    event("read")
    check_batches(file, options, training, validation)


# ---- configs ----


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [len(text) + 0.01 * text.count("e") for text in completions]


class LoggedNumbers(pl.Callback):
    """Keeps every number that a run logs, for the test that started the run."""

    seen: ClassVar[dict[str, float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.on_train_batch_end(trainer)


@pytest.fixture
def config(tmp_path: Path, model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Give the config of a run of one step, in a folder of its own."""
    monkeypatch.chdir(tmp_path)  # some values are names of folders that a run creates
    rows = "".join(json.dumps({"prompt": f"the cat {number}"}) + "\n" for number in range(4))
    (tmp_path / "prompts.jsonl").write_text(rows)
    return {
        "seed_everything": 1,
        "model": {
            "policy": {"path": model_folder("llama", "distinct")},
            "reward": {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.letters"}},
            "sampling": {"max_new_tokens": 3},
        },
        "data": {"source": str(tmp_path / "prompts.jsonl"), "validation_size": 2, "batch_size": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "max_steps": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": f"{__name__}.LoggedNumbers"}],
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        },
        "defaults": BARE,
    }


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the config with another value; `classifier.x` is that of a reward model."""
    config = deepcopy(config)
    name = key.removeprefix("classifier.")
    if name != key:
        policy = config["model"]["policy"]
        path = policy.get("path", "x") if isinstance(policy, dict) else policy
        options = {"path": path, "allow_untrained_head": True}
        config["model"]["reward"] = {"class_path": "SequenceClassifierReward", "init_args": options}
        key = f"model.reward.init_args.{name}"
    branch, *path, leaf = (config, *key.split("."))
    for part in path:
        if not isinstance(branch.get(part), dict):
            branch[part] = {}
        branch = branch[part]
    branch[leaf] = value
    return config


def check_run(capsys: pytest.CaptureFixture[str], *args: str) -> None:
    """Run the command line: it ends well with finite numbers, or with one line and exit status 2."""
    capsys.readouterr()
    LoggedNumbers.seen.clear()
    status: Any = None
    with within(30):
        try:
            main(["fit", *args])
        except SystemExit as stopped:
            status = stopped.code
    event("ran" if status is None else "refused")
    if status is None:
        assert all(map(math.isfinite, LoggedNumbers.seen.values())), LoggedNumbers.seen
        return
    assert status == 2
    shown = capsys.readouterr().err.splitlines()
    errors = [line for line in shown if line.startswith("xpo: error: ")]
    assert errors == shown[-1:]
    assert 20 < len(errors[0]) < 1500
    assert not any("Traceback" in line or "usage:" in line for line in shown)


# One or two values are small enough as they are, and a smaller failure would take minutes to find.
@pytest.mark.slow
@fuzzing(200, shrink=False)
@given(values=changes, on_command_line=st.booleans())
def test_config_of_any_values_when_run_then_works_or_stops_with_one_line(
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    values: list[tuple[str, Any]],
    on_command_line: bool,
):
    *in_file, (key, value) = values
    by_option = on_command_line and not key.startswith("classifier.")
    for name, other in in_file if by_option else values:
        config = changed(config, name, other)
    Path("run.yaml").write_text(yaml.safe_dump(config))
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
    check_run(capsys, "--config", "run.yaml", *([f"--{key}={text}"] if by_option else []))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.alpha", math.nan, "model.alpha must be a finite number"),
        ("model.beta", [], "model.beta must be a finite number"),
        ("model.beta", math.inf, "model.beta must be a finite number"),
        ("model.alpha", {"class_path": "PerEpoch", "init_args": {"values": []}}, "model.alpha"),
        ("model.alpha", {"class_path": "Linear", "init_args": {"start": math.nan, "end": 1}}, "start of a schedule"),
        ("model.lora", {"alpha": math.inf}, "model.lora.alpha must be above 0 and finite"),
        ("model.lora", {"r": 10**9}, "model.lora.r=1000000000"),
        ("model.lora", {"target_modules": "("}, "model.lora.target_modules"),
        ("model.policy.path", "a" * 400, "model.policy.path"),
        ("model.policy.path", "package:__main__/x", "model.policy.path"),
        ("model.policy.path", "", "model.policy.path is empty"),
        ("model.policy.chat_template", "", "model.policy.chat_template"),
        ("model.policy.chat_template", "/", "model.policy.chat_template"),
        ("model.policy.chat_template", "\x00", "model.policy.chat_template"),
        ("model.sampling.max_new_tokens", 10**9, "model.sampling.max_new_tokens"),
        ("classifier.path", "~nobody/x", "model.reward.init_args.path"),
    ],
)
def test_value_that_fuzzing_found_when_run_then_is_refused_by_its_key(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], key: str, value: Any, expected: str
):
    Path("run.yaml").write_text(yaml.safe_dump(changed(config, key, value)))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "run.yaml"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("xpo: error: ")
    assert expected in line


@pytest.mark.slow
@fuzzing(24, shrink=False)
@given(damage=damages)
def test_config_file_that_is_damaged_when_run_then_works_or_stops_with_one_line(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], damage: tuple[float, int, bytes]
):
    text = yaml.safe_dump(config).encode()
    share, removed, added = damage
    place = int(share * len(text))
    Path("run.yaml").write_bytes(text[:place] + added + text[place + removed :])
    # The file may have lost what ends the run.
    check_run(capsys, "--config", "run.yaml", "--trainer.max_steps=1", "--trainer.accelerator=cpu")
