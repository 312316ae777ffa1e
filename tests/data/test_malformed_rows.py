"""Rows and files that are refused, by file and row."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from prompt_files import TOKENIZER, both_ways, refusal, training, write_jsonl


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
        (
            "x.jsonl",
            b'{"prompt": "a"}\n{"prompt":"b"\n',
            ", line 2: ",
            "broken JSON (Expecting ',' delimiter at column 14)",
        ),
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
