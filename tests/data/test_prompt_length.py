"""Prompts that are too long: cut, dropped, counted or refused."""

import re
from pathlib import Path

import pytest
from prompt_files import TEMPLATE, TEXTS, TOKENIZER, both_ways, column, make_tokenizer, refusal, set_up, write_jsonl
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from xpo_lightning.core.errors import InputError


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
