"""The prompts' way from rows to batches: held-out rows, stages, options, and a data module in Lightning."""

import inspect
import math
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset, DatasetDict
from jsonargparse import ArgumentParser
from prompt_files import CHAT, TEXTS, TOKENIZER, both_ways, column, refusal, set_up, training, write_jsonl
from test_prompt_order import orders

from xpo_lightning.core.errors import InputError
from xpo_lightning.data import PromptDataModule
from xpo_lightning.data.prompts import PromptTokenizer
from xpo_lightning.data.sources import Source

# ---- batches ----


def test_batch_is_a_dict_of_lists(source: str):
    batch = next(iter(set_up(source, TOKENIZER, batch_size=3, shuffle=False).train_dataloader()))
    assert batch == {
        "prompt": TEXTS[:3],
        "prompt_ids": [TOKENIZER(text)["input_ids"] for text in TEXTS[:3]],
        "answer": [0, 1, 2],
    }


def test_prompt_column_is_renamed(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "prompt_length": 1}])
    batch = next(iter(set_up(path, prompt_column="question").train_dataloader()))
    assert batch == {"prompt": ["a"], "prompt_length": [1]}


@both_ways
def test_without_encoder_there_are_no_ids(source: str, streaming: bool):
    module = PromptDataModule(source, streaming=streaming)
    module.setup("fit")
    assert set(next(iter(module.train_dataloader()))) == {"prompt", "answer"}


@both_ways
def test_conversations_go_through_the_chat_template(tmp_path: Path, streaming: bool):
    chats = [
        [{"role": "user", "content": "Hé"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    ]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": chat} for chat in chats])
    module = set_up(path, CHAT, shuffle=False, streaming=streaming)
    expected = [CHAT.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    assert column(module.train_dataloader()) == chats
    assert column(module.train_dataloader(), "prompt_ids") == expected
    assert CHAT.decode(expected[0]) == "<user>Hé</><assistant>"


def test_conversations_in_parquet(tmp_path: Path):
    chats = [[{"role": "user", "content": "a"}], [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]]
    Dataset.from_list([{"prompt": chat} for chat in chats]).to_parquet(tmp_path / "x.parquet")
    assert training(str(tmp_path / "x.parquet"), tokenizer=CHAT) == chats


def test_writing_to_a_batch_leaves_the_data_alone(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    loader = set_up(path).train_dataloader()
    next(iter(loader))["prompt"][0].append({"role": "assistant", "content": "b"})
    assert column(loader) == [[{"role": "user", "content": "a"}]]


@both_ways
def test_batch_sizes(source: str, streaming: bool):
    options = {"batch_size": 4, "validation_source": source, "streaming": streaming}
    module = set_up(source, **options)
    assert [len(batch["prompt"]) for batch in module.train_dataloader()] == [4, 4, 2]
    assert [len(batch["prompt"]) for batch in module.val_dataloader()] == [4, 4, 2]
    module = set_up(source, **options, validation_batch_size=7, drop_last=True)
    assert [len(batch["prompt"]) for batch in module.train_dataloader()] == [4, 4]
    assert [len(batch["prompt"]) for batch in module.val_dataloader()] == [7, 3]


def test_indexed_loader_knows_its_length(source: str):
    assert len(set_up(source, batch_size=4).train_dataloader()) == 3
    assert len(set_up(source, batch_size=4, drop_last=True).train_dataloader()) == 2


@both_ways
def test_first_rows_only(source: str, streaming: bool):
    options = {"validation_source": source, "max_prompts": 4, "max_validation_prompts": 2, "streaming": streaming}
    module = set_up(source, **options)
    assert sorted(column(module.train_dataloader())) == TEXTS[:4]
    assert column(module.val_dataloader()) == TEXTS[:2]


@pytest.mark.parametrize("workers", [1, 2])
@both_ways
def test_workers_load_each_prompt_once(source: str, streaming: bool, workers: int):
    module = set_up(source, TOKENIZER, num_workers=workers, batch_size=3, streaming=streaming)
    assert sorted(column(module.train_dataloader())) == TEXTS


# ---- validation and prediction ----


def test_no_validation(source: str):
    module = set_up(source)
    assert module.val_dataloader() == []


@pytest.mark.parametrize(("size", "count"), [(3, 3), (0.25, 2), (0.5, 5)])
def test_held_out_rows(source: str, size: float, count: int):
    def parts(**options: Any) -> tuple[list[str], list[str]]:
        module = set_up(source, validation_size=size, **options)
        return sorted(column(module.train_dataloader())), column(module.val_dataloader())

    train, held_out = parts()
    assert len(held_out) == count
    assert sorted(train + held_out) == TEXTS
    assert held_out == sorted(held_out)
    assert parts() == (train, held_out)
    assert len({tuple(parts(seed=seed)[1]) for seed in range(5)}) > 1


def test_held_out_rows_do_not_depend_on_limits_or_stage(source: str):
    held_out = column(set_up(source, validation_size=3).val_dataloader())
    module = set_up(source, validation_size=3, max_prompts=2)
    assert column(module.val_dataloader()) == held_out
    assert sorted(column(module.train_dataloader())) == [text for text in TEXTS if text not in held_out][:2]
    assert column(set_up(source, validation_size=3, stage="validate").val_dataloader()) == held_out


def test_validation_from_another_source(source: str, tmp_path: Path):
    splits = {"train": Dataset.from_list([{"prompt": "t"}]), "test": Dataset.from_list([{"prompt": "v"}])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert column(set_up(source, validation_source=saved).val_dataloader()) == ["t"]
    assert column(set_up(source, validation_source=saved, validation_split="test").val_dataloader()) == ["v"]
    module = set_up(saved, validation_split="test")
    assert (column(module.train_dataloader()), column(module.val_dataloader())) == (["t"], ["v"])


@both_ways
def test_prediction(source: str, streaming: bool):
    module = set_up(source, TOKENIZER, stage="predict", streaming=streaming, batch_size=2, validation_batch_size=3)
    assert next(iter(module.predict_dataloader()))["prompt"] == TEXTS[:3]
    other = write_jsonl(Path(source).with_name("other.jsonl"), [{"prompt": "other"}])
    module = set_up(source, TOKENIZER, stage="predict", validation_source=other, streaming=streaming)
    assert column(module.predict_dataloader()) == ["other"]


def test_only_what_a_stage_needs_is_read(source: str, tmp_path: Path):
    missing = str(tmp_path / "missing.jsonl")
    assert column(set_up(missing, stage="validate", validation_source=source).val_dataloader()) == TEXTS
    with pytest.raises(InputError, match=r"data\.source: "):
        set_up(missing, stage="fit", validation_source=source)


def test_setup_repeats_the_work_only_for_another_encoder(source: str):
    module = set_up(source, TOKENIZER, shuffle=False)
    os.remove(source)
    module.setup("fit")
    assert column(module.train_dataloader()) == TEXTS
    module.trainer.lightning_module.prompt_encoder = PromptTokenizer(CHAT)
    with pytest.raises(InputError, match="there is nothing at"):
        module.setup("fit")


# ---- options that are refused ----


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"batch_size": 0}, ["batch_size"]),
        ({"validation_batch_size": 0}, ["validation_batch_size"]),
        ({"max_prompt_tokens": 0}, ["max_prompt_tokens"]),
        ({"max_prompts": 0}, ["max_prompts"]),
        ({"max_validation_prompts": 0, "validation_size": 1}, ["max_validation_prompts"]),
        ({"shuffle_buffer": 0, "streaming": True}, ["shuffle_buffer"]),
        ({"num_workers": -1}, ["num_workers"]),
        ({"seed": -1}, ["seed"]),
        ({"validation_size": -1}, ["validation_size"]),
        ({"validation_size": 1.0}, ["validation_size"]),
        ({"validation_size": math.nan}, ["validation_size"]),
        ({"max_prompts": 10**30, "streaming": True}, ["max_prompts"]),
        ({"batch_size": 10**30}, ["batch_size"]),
        ({"seed": 2**64}, ["seed"]),
        ({"validation_size": 2, "validation_source": "x"}, ["validation_size", "validation_source"]),
        ({"validation_size": 2, "validation_split": "x"}, ["validation_size", "validation_split"]),
        ({"validation_size": 2, "streaming": True}, ["validation_size", "streaming"]),
        ({"max_validation_prompts": 2}, ["max_validation_prompts"]),
        ({"truncate": "left"}, ["truncate", "max_prompt_tokens"]),
        ({"truncate": "drop"}, ["truncate", "max_prompt_tokens"]),
        ({"shuffle_buffer": 5}, ["shuffle_buffer", "streaming"]),
        ({"shuffle_buffer": 5, "streaming": True, "shuffle": False}, ["shuffle_buffer", "shuffle"]),
    ],
)
def test_options_are_refused_before_anything_is_read(options: dict[str, Any], keys: list[str]):
    with pytest.raises(InputError) as caught:
        PromptDataModule("nowhere.jsonl", **options)
    assert all(f"data.{key}" in str(caught.value) for key in keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [10, 11, 0.01, 0.99])
def test_holding_out_nothing_or_all(source: str, size: float):
    assert refusal(source, validation_size=size).startswith("data.validation_size: ")


def test_token_limit_without_an_encoder(source: str):
    assert refusal(source, max_prompt_tokens=3).startswith("data.max_prompt_tokens: the model has no tokenizer")


def test_sources_of_streams_are_told_apart_by_what_they_hold(tmp_path: Path):
    one, same, longer, other = (
        Source(write_jsonl(tmp_path / f"{number}.jsonl", [{"prompt": text}])).identity()
        for number, text in enumerate(("a", "a", "ab", "b"))
    )
    assert one == same
    assert one["bytes"] != longer["bytes"]
    assert one["beginning"] != other["beginning"]
    assert Source("owner/name", "test").identity() != Source("owner/name", "train").identity()


def test_no_whole_batch(source: str):
    message = refusal(source, drop_last=True)
    assert "data.drop_last" in message
    assert "data.batch_size=32" in message


# ---- in Lightning ----


class Recorder(pl.LightningModule):
    prompt_encoder = PromptTokenizer(TOKENIZER)

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[list[str]]] = {"train": [], "validation": [], "predict": []}

    def on_train_epoch_start(self) -> None:
        self.seen["train"].append([])

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        assert set(batch) == {"prompt", "prompt_ids", "answer"}
        self.seen["train"][-1].extend(batch["prompt"])
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.seen["validation"].append(batch["prompt"])

    def predict_step(self, batch: dict[str, Any]) -> list[str]:
        return batch["prompt"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@both_ways
def test_trainer(source: str, tmp_path: Path, streaming: bool):
    """Each epoch has its order, which a data module alone would give too; validation is optional."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=3, enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    module, data = Recorder(), PromptDataModule(source, batch_size=4, streaming=streaming)
    trainer.fit(module, datamodule=data)
    assert module.seen["train"] == orders(set_up(source, TOKENIZER, batch_size=4, streaming=streaming))
    assert module.seen["validation"] == []
    predictions = trainer.predict(module, datamodule=data)
    assert [text for batch in predictions for text in batch] == TEXTS
    trainer.validate(
        module, datamodule=PromptDataModule(source, validation_source=source, streaming=streaming), verbose=False
    )
    assert module.seen["validation"] == [TEXTS]


def test_options_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    parser = ArgumentParser()
    parser.add_class_arguments(PromptDataModule, "data")
    arguments = ["--data.source=x.jsonl", "--data.validation_size=0.5", "--data.max_prompt_tokens=8"]
    config = parser.parse_args([*arguments, "--data.truncate=left"])
    assert parser.instantiate(config).data.validation_size == 0.5
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--data.truncate=right"])
    assert "data.truncate" in capsys.readouterr().err
    options = list(inspect.signature(PromptDataModule).parameters)
    described = (inspect.getdoc(PromptDataModule) or "").partition("Args:")[2].partition("Raises:")[0]
    assert re.findall(r"^    (\w+): [A-Z]", described, re.MULTILINE) == options
