"""Short runs of a tiny policy under callbacks, and what is read of the files that they leave."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xpo_lightning import LoadedModel, LoRASpec, Sampling, XPOLightningModule
from xpo_lightning.core.batch import Experience
from xpo_lightning.rewards.python import PythonReward

PROMPTS = ["the cat", "a dog", "red hat", "sat on", "mat", "away"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a byte, so that completions hold every control character there is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def build_model(**options: Any) -> LlamaForCausalLM:
    settings = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3, "eos_token_id": 257}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**settings, **heads, bos_token_id=None, **options))


def count_letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]


def build_module(model: torch.nn.Module | None = None, **options: Any) -> XPOLightningModule:
    options.setdefault("policy", LoadedModel(model or build_model(), build_tokenizer()))
    options.setdefault("learning_rate", 1e-2)
    sampling = Sampling(max_new_tokens=5, eos_token_ids=list(range(50)))  # So that about half of the completions end.
    return XPOLightningModule(reward=PythonReward(count_letters), sampling=sampling, **options)


def loader(rows: list[Any] = PROMPTS, batch_size: int = 3) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=list)  # type: ignore[arg-type]


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give wide output, and silence what Lightning has to say about tiny runs."""
    monkeypatch.setenv("COLUMNS", "200")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        yield


@pytest.fixture
def make_trainer(tmp_path: Path, calm: None) -> Callable[..., pl.Trainer]:
    """Give a function that builds a trainer of two epochs with two steps and one validation each."""

    def make(*callbacks: Callback, **options: Any) -> pl.Trainer:
        options.setdefault("logger", [CSVLogger(tmp_path, name=None, version="run")])
        options.setdefault("enable_progress_bar", False)
        options.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
        quiet = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "log_every_n_steps": 1}
        options = {"max_epochs": 2, "num_sanity_val_steps": 0, "default_root_dir": tmp_path, **quiet, **options}
        return pl.Trainer(callbacks=list(callbacks), **options)

    return make


class Recorder(Callback):
    """Keeps the pairs of each validation or prediction, and what was measured of them."""

    def __init__(self) -> None:
        self.pairs: list[Experience] = []
        self.metrics: list[dict[str, float]] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.pairs.append(outputs)

    on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def lora_module(**options: Any) -> XPOLightningModule:
    return build_module(build_model(**options), lora=LoRASpec(r=4, alpha=16))
