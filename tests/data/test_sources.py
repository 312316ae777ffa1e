"""Files, packages and the hub as sources of prompts: each form gives the same rows, or one error that says why not."""

import json
import re
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict
from prompt_files import ROWS, TEXTS, TOKENIZER, both_ways, column, refusal, set_up, training, write_jsonl

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
