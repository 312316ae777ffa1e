"""The prompts' way from a file or the hub to batches, and every way in which the data or the options can be wrong."""

import inspect
import json
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import lightning.pytorch as pl
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from xpo_lightning.core.errors import InputError
from xpo_lightning.data import PromptDataModule
from xpo_lightning.data.prompts import PromptTokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [{"prompt": f"prompt {number}", "answer": number} for number in range(10)]
TEXTS = [row["prompt"] for row in ROWS]


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = chat_template
    return fast


TOKENIZER = make_tokenizer()
CHAT = make_tokenizer(TEMPLATE)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "prompts.jsonl", ROWS)


def set_up(
    source: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    limit: int | None = None,
    stage: str | None = "fit",
    **options: Any,
) -> PromptDataModule:
    """Build a data module, attach it to a stand-in of a trainer, and set it up."""
    module = PromptDataModule(source, **options)
    encoder = None if tokenizer is None else PromptTokenizer(tokenizer, limit)
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(prompt_encoder=encoder), current_epoch=0)
    module.setup(stage)
    return module


def column(loader: Any, name: str = "prompt") -> list[Any]:
    return [value for batch in loader for value in batch[name]]


def training(source: str, name: str = "prompt", **options: Any) -> list[Any]:
    return column(set_up(source, shuffle=False, **options).train_dataloader(), name)


def refusal(source: str, **options: Any) -> str:
    """Set up, read a pass, and return the error, which must be one line."""
    with pytest.raises(InputError) as caught:
        column(set_up(source, **options).train_dataloader())
    message = str(caught.value)
    assert "\n" not in message
    return message


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])


# ---- sources ----


@pytest.fixture(params=["jsonl", "json_array", "json_lines", "parquet", "saved", "saved_splits"])
def any_source(request: pytest.FixtureRequest, tmp_path: Path, source: str) -> str:
    target = tmp_path / "target"
    if request.param == "json_array":
        target = target.with_suffix(".json")
        target.write_text(json.dumps(ROWS, indent=1))
    elif request.param == "json_lines":
        target = Path(write_jsonl(target.with_suffix(".json"), ROWS))
    elif request.param == "parquet":
        target = target.with_suffix(".parquet")
        Dataset.from_list(ROWS).to_parquet(target)
    elif request.param == "saved":
        Dataset.from_list(ROWS).save_to_disk(target)
    elif request.param == "saved_splits":
        other = Dataset.from_list([{"prompt": "other", "answer": 0}])
        DatasetDict({"test": other, "train": Dataset.from_list(ROWS)}).save_to_disk(target)
    else:
        return source
    return str(target)


@both_ways
def test_every_kind_of_source_gives_the_same_rows(any_source: str, streaming: bool):
    assert training(any_source, streaming=streaming) == TEXTS
    assert training(any_source, "answer", streaming=streaming) == list(range(10))


@both_ways
def test_csv_values_are_the_text_of_the_file(tmp_path: Path, streaming: bool):
    path = tmp_path / "prompts.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,answer\r\n"a, b\nc",007\r\n\r\nNA,\r\n42,x\r\n')
    assert training(str(path), streaming=streaming) == ["a, b\nc", "NA", "42"]
    assert training(str(path), "answer", streaming=streaming) == ["007", "", "x"]


@both_ways
def test_values_arrive_as_they_are_in_the_file(tmp_path: Path, streaming: bool):
    values = [1, "one", None, 1.5, [1, "a"], {"k": None}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "value": value} for value in values])
    assert training(path, "value", streaming=streaming) == values


@both_ways
def test_parquet_columns_of_mixed_type_are_decoded(tmp_path: Path, streaming: bool):
    rows = [{"prompt": "a", "value": 1}, {"prompt": "b", "value": "one"}]
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "x.parquet")
    assert training(str(tmp_path / "x.parquet"), "value", streaming=streaming) == [1, "one"]


def test_file_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "some_prompts"
    package.mkdir()
    (package / "__init__.py").touch()
    write_jsonl(package / "mine.jsonl", ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    assert training("package:some_prompts/mine.jsonl") == TEXTS


def test_local_files_leave_the_cache_alone(any_source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    set_up(any_source, TOKENIZER)
    assert not cache.exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Serve `owner/prompts` from a local folder, and record what was asked of the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    real, asked = datasets.load_dataset, []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        asked.append({"path": path, "name": name, **options})
        options.pop("revision")
        return real(str(folder), name, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@both_ways
def test_hub(hub: list[dict[str, Any]], streaming: bool):
    options = {"revision": "v1", "validation_split": "test", "streaming": streaming}
    module = set_up("owner/prompts", TOKENIZER, shuffle=False, **options)
    assert column(module.train_dataloader()) == column(module.train_dataloader()) == TEXTS
    assert column(module.val_dataloader()) == TEXTS[:2]
    asked = {"path": "owner/prompts", "name": None, "revision": "v1", "streaming": streaming}
    assert hub == [{**asked, "split": "train"}, {**asked, "split": "test"}]


@pytest.mark.usefixtures("hub")
@both_ways
def test_hub_split_and_subset_that_do_not_exist(streaming: bool):
    message = refusal("owner/prompts", split="valid", streaming=streaming)
    assert message.startswith("data.split: 'owner/prompts'")
    assert all(name in message for name in ("valid", "train", "test"))
    message = refusal("owner/prompts", validation_split="valid", streaming=streaming)
    assert message.startswith("data.validation_split: ")
    message = refusal("owner/prompts", subset="french", streaming=streaming)
    assert message.startswith("data.subset: 'owner/prompts'")
    assert "french" in message


@pytest.mark.usefixtures("hub")
def test_hub_error_names_split_and_row():
    message = refusal("owner/prompts", tokenizer=TOKENIZER, max_prompt_tokens=3)
    assert message.startswith("owner/prompts (split train), row 1: ")


def test_hub_data_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetGenerationError("An error\nover two lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("owner/prompts")
    assert message == "data.source: 'owner/prompts' cannot be read (An error over two lines)"


@both_ways
def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, streaming: bool):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    message = refusal("trl-lib/tldr", streaming=streaming)
    assert message.startswith("data.source: could not load 'trl-lib/tldr' from the Hugging Face hub")
    assert time.monotonic() - start < 10


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


# ---- length ----


@both_ways
def test_left_truncation_keeps_the_last_tokens(source: str, streaming: bool):
    module = set_up(source, TOKENIZER, shuffle=False, max_prompt_tokens=3, truncate="left", streaming=streaming)
    ids = column(module.train_dataloader(), "prompt_ids")
    assert [TOKENIZER.decode(row) for row in ids] == [text[-3:] for text in TEXTS]
    assert column(module.train_dataloader()) == TEXTS


def in_front(*tokens: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer that puts these tokens in front of any text, and EOS behind it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (*tokens, "<eos>")]
    template = processors.TemplateProcessing(single=" ".join([*tokens, "$A", "<eos>"]), special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.mark.parametrize("tokens", [[], ["<bos>"], ["<bos>", "<pad>"]])
@pytest.mark.parametrize("text", ["the cat sat on the mat", "<bos>the cat sat on the mat"])
def test_left_truncation_is_that_of_transformers(tmp_path: Path, tokens: list[str], text: str):
    """What the tokenizer puts in front stays, as a model expects it; what a text has of that kind is text."""
    tokenizer = in_front(*tokens)
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": text}])
    module = set_up(path, tokenizer, max_prompt_tokens=6, truncate="left")
    (ids,) = column(module.train_dataloader(), "prompt_ids")
    tokenizer.truncation_side = "left"
    cut = tokenizer(text, truncation=True, max_length=7)["input_ids"]
    assert ids == cut[:-1]
    assert cut[-1] == tokenizer.eos_token_id


def test_left_truncation_of_a_chat_cuts_what_its_template_wrote(tmp_path: Path):
    tokenizer = make_tokenizer(TEMPLATE)
    messages = [{"role": "user", "content": "the cat sat on the mat"}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": messages}])
    module = set_up(path, tokenizer, max_prompt_tokens=9, truncate="left")
    (ids,) = column(module.train_dataloader(), "prompt_ids")
    whole = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids == whole[-9:]


def test_left_truncation_must_leave_room_for_text(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "the cat"}])
    with pytest.raises(InputError, match=r"x\.jsonl, line 1: data\.max_prompt_tokens=2 .* set it to 3 or more"):
        set_up(path, in_front("<bos>", "<pad>"), max_prompt_tokens=2, truncate="left")


@both_ways
def test_long_prompts_are_dropped_and_counted(tmp_path: Path, streaming: bool, capture_info: list[str]):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": text} for text in ("abcd", "a", "abc", "abcde")])
    module = set_up(path, TOKENIZER, shuffle=False, max_prompt_tokens=3, truncate="drop", streaming=streaming)
    assert column(module.train_dataloader()) == ["a", "abc"]
    assert column(module.train_dataloader(), "prompt_ids") == [TOKENIZER(text)["input_ids"] for text in ("a", "abc")]
    assert "of 4 prompts, 2 were dropped and 0 truncated" in capture_info[0]


def test_truncated_prompts_are_counted(source: str, capture_info: list[str]):
    set_up(source, TOKENIZER, max_prompt_tokens=3, truncate="left")
    assert [re.search("of 10 prompts, 0 were dropped and 10 truncated", line) is not None for line in capture_info] == [
        True
    ]


def test_nothing_is_said_where_all_prompts_fit(source: str, capture_info: list[str]):
    set_up(source, TOKENIZER, max_prompt_tokens=100, truncate="left")
    assert capture_info == []


@pytest.fixture
def capture_info(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("xpo_lightning.data.preprocessing.rank_zero_info", lines.append)
    return lines


@both_ways
def test_long_prompt_is_an_error_by_default(source: str, streaming: bool):
    message = refusal(source, tokenizer=TOKENIZER, max_prompt_tokens=3, shuffle=False, streaming=streaming)
    assert message.startswith(f"{source}, line 1: the prompt has 8 tokens, more than data.max_prompt_tokens=3")


@both_ways
def test_no_prompt_left_is_an_error(source: str, streaming: bool):
    options = {"max_prompt_tokens": 3, "truncate": "drop", "streaming": streaming}
    assert "all 10 were dropped" in refusal(source, tokenizer=TOKENIZER, **options)


@both_ways
def test_prompt_over_the_context_is_an_error(source: str, streaming: bool):
    message = refusal(source, tokenizer=TOKENIZER, limit=7, streaming=streaming)
    assert message.startswith(f"{source}, line 1: ")
    assert "data.max_prompt_tokens to 7" in message


# ---- order ----


def orders(module: PromptDataModule, epochs: int = 3) -> list[list[str]]:
    loader, found = module.train_dataloader(), []
    for epoch in range(epochs):
        module.trainer.current_epoch = epoch
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        found.append(column(loader))
    return found


@both_ways
def test_order_depends_on_seed_and_epoch_only(source: str, streaming: bool):
    torch.manual_seed(1)
    first = orders(set_up(source, TOKENIZER, streaming=streaming))
    torch.manual_seed(2)
    assert orders(set_up(source, TOKENIZER, streaming=streaming)) == first
    assert all(sorted(order) == TEXTS for order in first)
    others = orders(set_up(source, TOKENIZER, streaming=streaming, seed=1))
    different = {tuple(order) for order in [*first, *others, TEXTS]}
    assert len(different) == 7


@both_ways
def test_without_shuffle_the_order_is_that_of_the_file(source: str, streaming: bool):
    assert orders(set_up(source, shuffle=False, streaming=streaming)) == [TEXTS] * 3


def test_buffer_bounds_how_far_a_prompt_moves(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": str(number)} for number in range(100)])
    order = [int(text) for text in column(set_up(path, streaming=True, shuffle_buffer=5).train_dataloader())]
    assert sorted(order) == list(range(100)) != order
    assert all(number - place < 5 for place, number in enumerate(order))


@pytest.mark.parametrize("workers", [0, 1])
@both_ways
def test_loading_leaves_the_global_random_state_alone(source: str, streaming: bool, workers: int):
    module = set_up(source, TOKENIZER, streaming=streaming, num_workers=workers, validation_source=source)
    before = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.predict_dataloader()):
        column(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shuffle", [False, True])
@both_ways
def test_two_processes_share_the_batches_of_one(source: str, streaming: bool, shuffle: bool):
    """The first global batch, taken in turns, is the one that a single process with twice the batch size has."""
    options = {"shuffle": shuffle, "streaming": streaming}
    whole = next(iter(set_up(source, **options, batch_size=4).train_dataloader()))["prompt"]
    halves = []
    for rank in range(2):
        module = set_up(source, **options, batch_size=2)
        module.trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}
        loader = module.train_dataloader()
        halves.append(next(iter(loader))["prompt"])
        assert len(column(loader)) == 5
    assert [text for pair in zip(*halves, strict=True) for text in pair] == whole


def test_processes_get_equally_many_prompts(source: str):
    for streaming, expected in ((False, [4, 4, 4]), (True, [3, 3, 3])):
        counts, union = [], set()
        for rank in range(3):
            module = set_up(source, streaming=streaming)
            module.trainer.distributed_sampler_kwargs = {"num_replicas": 3, "rank": rank}
            texts = column(module.train_dataloader())
            counts.append(len(texts))
            union.update(texts)
        assert counts == expected
        assert len(union) == (9 if streaming else 10)


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


# ---- rows that are refused ----


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "the prompt is null"),
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        (7, "must be text or a list of chat messages, but is int"),
        (["a", "b"], "a chat message must be a mapping"),
        ([], "empty list of messages"),
        ([{"role": "user"}], "a chat message must be a mapping"),
        ([{"role": "user", "content": "a"}], "no chat template"),
        ("a \ud800", "half of a character"),
        ([{"role": "user", "content": "\udfff"}], "half of a character"),
    ],
)
@both_ways
def test_malformed_prompts(tmp_path: Path, prompt: Any, reason: str, streaming: bool):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "fine"}, {"prompt": prompt}])
    message = refusal(path, tokenizer=TOKENIZER, streaming=streaming)
    assert message.startswith(f"{path}, line 2: ")
    assert reason in message


@both_ways
def test_blank_lines_are_skipped_but_counted(tmp_path: Path, streaming: bool):
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": "b"}\n')
    assert training(str(path), streaming=streaming) == ["a", "b"]
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": null}\n')
    assert refusal(str(path), streaming=streaming).startswith(f"{path}, line 4: the prompt is null")


@pytest.mark.parametrize(
    ("name", "content", "place", "reason"),
    [
        ("x.jsonl", b"", "", "there are no rows"),
        ("x.jsonl", b"\n\n", "", "there are no rows"),
        ("x.json", b"[]", "", "there are no rows"),
        ("x.csv", b"", "", "there are no rows"),
        ("x.csv", b"prompt\n", "", "there are no rows"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "b\n', ", line 2: ", "broken JSON"),
        ("x.jsonl", b'{"prompt": "a"}\n["b"]\n', ", line 2: ", "expected a JSON object"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ", line 2: ", "not valid UTF-8"),
        ("x.json", b'[{"prompt": "a"},\n {"prompt": }]', ": ", "broken JSON (Expecting value at line 2"),
        ("x.json", b'[{"prompt": "a"}, "b"]', ", row 2: ", "expected a JSON object"),
        ("x.json", b'{"prompt": "a"}\n{', ", line 2: ", "broken JSON"),
        ("x.csv", b'prompt,x\na,1\n"b,2\n', ", line 3: ", "cannot be parsed as CSV"),
        ("x.csv", b"prompt,x\na,1\nb,c,2\n", ", line 3: ", "2 columns, but this row has 3 values"),
        ("x.csv", b"prompt,prompt\na,1\n", ", line 1: ", "names 'prompt' more than once"),
        ("x.csv", b"prompt,x\na,1\n\xe9,2\n", ", line 3: ", "not valid UTF-8"),
        ("x.csv", b"prompt,x\na,1\n,2\n", ", row 2: ", "the prompt is empty"),
        ("x.parquet", b"PAR1 but not really", ": ", "cannot be read as Parquet"),
        ("x.jsonl", b'{"prompt": ' + b"[" * 50_000, ", line 1: ", "nested too deeply"),
        ("x.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", ", line 1: ", "4300 digits"),
        ("x.json", b"[" * 50_000, ": ", "nested too deeply"),
        ("x.csv", b"a" * 100_000 + b"\nb\n", ", row 1 ", "has no column 'prompt'; it has 'aaa"),
        (
            "x.jsonl",
            b'{"prompt": "a", "n": 1}\n{"promt": "b", "n": 2}',
            ", line 2: ",
            "lacks 'prompt' and adds 'promt'",
        ),
        ("x.jsonl", b'{"prompt": "a", "n": 1}\n{"prompt": "b"}', ", line 2: ", "lacks 'n', unlike the first row"),
    ],
)
@both_ways
def test_broken_files(tmp_path: Path, name: str, content: bytes, place: str, reason: str, streaming: bool):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(str(path), streaming=streaming)
    assert f"{path}{place}" in message
    assert reason in message


def test_null_in_parquet(tmp_path: Path):
    Dataset.from_dict({"prompt": ["a", None]}).to_parquet(tmp_path / "x.parquet")
    assert refusal(str(tmp_path / "x.parquet")).startswith(f"{tmp_path / 'x.parquet'}, row 2: the prompt is null")


@pytest.mark.parametrize(
    ("column", "place"),
    [
        (pyarrow.array([b"fine", b"\xff"]).view(pyarrow.string()), "x.parquet, row 2: "),
        (pyarrow.array([0, 2**60]).view(pyarrow.duration("s")), "x.parquet, row 2: "),
        (pyarrow.array([[("a", 1)], []], pyarrow.map_("string", "int64")), "x.parquet"),
    ],
    ids=["not UTF-8", "too long a time", "a type that datasets does not know"],
)
@both_ways
def test_parquet_values_that_cannot_be_decoded(tmp_path: Path, column: pyarrow.Array, place: str, streaming: bool):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "x": column}), tmp_path / "x.parquet")
    assert place in refusal(str(tmp_path / "x.parquet"), streaming=streaming)


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"null", b'{"info": {"features": {"prompt": {"_type": "No"}}}}', b"\xff"]
)
@both_ways
def test_parquet_with_broken_metadata(tmp_path: Path, metadata: bytes, streaming: bool):
    table = pyarrow.table({"prompt": ["a"]}).replace_schema_metadata({b"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert str(tmp_path / "x.parquet") in refusal(str(tmp_path / "x.parquet"), streaming=streaming)


def test_empty_saved_data_set(tmp_path: Path):
    Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "saved")
    assert "there are no rows" in refusal(str(tmp_path / "saved"))


@both_ways
def test_missing_prompt_column(tmp_path: Path, streaming: bool):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompts": "a", "n": 1}])
    message = refusal(path, streaming=streaming)
    assert message.startswith("data.prompt_column: ")
    assert "has no column 'prompt' (did you mean 'prompts'?); it has 'prompts', 'n'" in message
    assert "did you mean" not in refusal(path, prompt_column="xyz", streaming=streaming)


@pytest.mark.parametrize("taken", ["prompt", "prompt_ids"])
def test_columns_that_batches_need_themselves(tmp_path: Path, taken: str):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", taken: "b"}])
    assert f"has a column '{taken}'" in refusal(path, prompt_column="question")


def test_streamed_error_in_a_worker_is_one_line(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": None}])
    assert refusal(path, streaming=True, num_workers=1).startswith(f"{path}, line 2: the prompt is null")


# ---- sources that are refused ----


def test_missing_path():
    assert refusal("./nowhere.jsonl").startswith("data.source: there is nothing at './nowhere.jsonl'")


@pytest.mark.parametrize(
    "name", ["", " ", "\x00", "a" * 5000, "~nobody/x.jsonl", "./\x00", "package:__main__/x", "package:json/\x00"]
)
def test_name_that_no_path_can_have(name: str):
    assert refusal(name).startswith("data.source")


def test_suffix_that_is_not_supported(tmp_path: Path):
    (tmp_path / "x.txt").write_text("prompt")
    message = refusal(str(tmp_path / "x.txt"))
    assert message.startswith("data.source: ")
    assert ".jsonl, .json, .csv or .parquet" in message


@both_ways
def test_directory_that_is_no_data_set(tmp_path: Path, streaming: bool):
    assert re.match("data.source: the directory .* holds no data set", refusal(str(tmp_path), streaming=streaming))


@both_ways
def test_split_that_does_not_exist(source: str, tmp_path: Path, streaming: bool):
    saved = str(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}).save_to_disk(saved)
    message = refusal(saved, split="valid", streaming=streaming)
    assert message == f"data.split: '{saved}' has no split 'valid'; it has train, test"
    assert refusal(source, split="test", streaming=streaming).startswith("data.split: ")
    assert refusal(source, validation_split="test", streaming=streaming).startswith("data.validation_split: ")


@pytest.mark.parametrize("option", ["subset", "revision"])
def test_hub_options_with_a_local_file(source: str, option: str):
    assert refusal(source, **{option: "x"}).startswith(f"data.{option}: only hub data sets have one")


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


# ---- preference pairs ----


@both_ways
def test_prompt_of_a_preference_pair_is_what_both_sides_begin_with(tmp_path: Path, streaming: bool):
    begin = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    asked = [*begin, {"role": "user", "content": "Who?"}]
    chats = {name: [*asked, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    text = "\n\nHuman: Hello\n\nAssistant:"
    for pair, expected in (
        (chats, asked),
        ({"chosen": f"{text} I am well", "rejected": f"{text} I am ill"}, text),
        ({"chosen": chats["chosen"], "rejected": chats["chosen"]}, asked),  # the answer is none of the prompt
    ):
        path = write_jsonl(tmp_path / "pairs.jsonl", [{**pair, "prompt_number": 1}])
        (batch,) = set_up(path, streaming=streaming).train_dataloader()
        assert batch["prompt"] == [expected]
        assert batch["chosen"] == [pair["chosen"]]


@both_ways
def test_preference_pair_that_does_not_say_where_its_prompt_ends_is_refused(tmp_path: Path, streaming: bool):
    for pair in ({"chosen": "It is warm", "rejected": "It is cold"}, {"chosen": None, "rejected": "a"}):
        path = write_jsonl(tmp_path / "pairs.jsonl", [pair])
        assert "pairs.jsonl, line 1 has 'chosen' and 'rejected'" in refusal(path, streaming=streaming)
