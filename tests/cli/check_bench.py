"""A small run to be checked, and `xpo check` in one call."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig

from xpo_lightning.cli.lightning_cli import main

LONGEST = 30.0  # seconds that a check may take


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
