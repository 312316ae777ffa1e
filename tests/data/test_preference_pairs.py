"""Preference data sets on their way from the forms that TRL and Hugging Face users have to batches of pairs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prompt_files import CHAT, ROWS, TOKENIZER, both_ways, refusal, set_up, write_jsonl

from xpo_lightning import InputError, PromptDataModule
from xpo_lightning.data.sampler import ProcessShard, rows_of_turn

ASKED = [{"role": "user", "content": "How are you?"}]
WELL, ILL = ({"role": "assistant", "content": text} for text in ("I am well", "I am ill"))
TALK = "\n\nHuman: How are you?\n\nAssistant:"


@both_ways
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "How are you?", "chosen": "I am well", "rejected": "I am ill"}, "How are you?"),
        ({"prompt": ASKED, "chosen": [WELL], "rejected": [ILL]}, ASKED),
        ({"prompt": ASKED, "chosen": [*ASKED, WELL], "rejected": [*ASKED, ILL]}, ASKED),
        ({"prompt": ASKED, "chosen": "I am well", "rejected": "I am ill"}, ASKED),
        ({"chosen": [*ASKED, WELL], "rejected": [*ASKED, ILL]}, ASKED),
        ({"prompt": "How are you?", "chosen": [*ASKED, WELL], "rejected": [*ASKED, ILL]}, ASKED),
        ({"chosen": f"{TALK}I am well", "rejected": f"{TALK}I am ill"}, TALK),
    ],
    ids=["texts", "answers", "whole_chats", "chat_and_texts", "no_prompt", "prompt_as_text", "talk"],
)
def test_every_form_gives_the_prompt_and_two_texts(tmp_path: Path, row: dict[str, Any], prompt: Any, streaming: bool):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{**row, "source": "web"}])
    data = set_up(None, CHAT, preferences=path, streaming=streaming)
    (batch,) = data.train_dataloader()
    assert batch["prompt"] == [prompt]
    assert (batch["chosen"], batch["rejected"], batch["source"]) == (["I am well"], ["I am ill"], ["web"])
    assert batch["prompt_ids"] == [data.encoding.encoder(prompt)]
    assert data.with_preferences(batch, 0) == {"preferences": batch}


@both_ways
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"chosen": ...},
            "has no column 'chosen', but a preference pair has 'chosen' and 'rejected'; it has 'prompt', 'rejected'",
        ),
        ({"rejected": "yes"}, "'chosen' and 'rejected' are the same, which says nothing of preference"),
        ({"rejected": " "}, "'rejected' is empty"),
        ({"chosen": None}, "'chosen' and 'rejected' must both be text, or both be lists of chat messages"),
        ({"chosen": [WELL]}, "must both be text, or both be lists"),
        ({"chosen": "\ud800"}, "'chosen' holds '\\ud800', half of a character"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is null"),
        (
            {"chosen": [WELL], "rejected": [ILL]},
            "do not both begin with it; give all three as text, or all three as messages",
        ),
        (
            {"prompt": ASKED, "chosen": [WELL, WELL], "rejected": [ILL]},
            "'chosen' has 2 messages, and does not begin with those of the prompt",
        ),
        (
            {"prompt": ASKED, "chosen": [*ASKED, WELL, WELL], "rejected": [ILL]},
            "'chosen' must have one message of the assistant after the prompt, but has assistant, assistant",
        ),
        ({"prompt": ASKED, "chosen": [*ASKED, *ASKED], "rejected": [ILL]}, "but has user"),
        ({"prompt": ..., "chosen": "It is warm", "rejected": "It is cold"}, "the two do not say where the prompt ends"),
    ],
)
def test_broken_pairs_name_file_and_row(tmp_path: Path, change: dict[str, Any], message: str, streaming: bool):
    good = {"prompt": "Well?", "chosen": "yes", "rejected": "no"}
    row = {key: value for key, value in {**good, **change}.items() if value is not ...}
    rows = [row] if row.keys() != good.keys() else [good, row]
    said = refusal(None, preferences=write_jsonl(tmp_path / "pairs.jsonl", rows), streaming=streaming)  # type: ignore[arg-type]
    assert f"pairs.jsonl, line {len(rows)}" in said
    assert message in said


def test_prompts_have_their_column_and_their_limits(tmp_path: Path):
    rows = [{"question": "x" * size, "chosen": "yes", "rejected": "no"} for size in (3, 9, 5)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = {"prompt_column": "question", "max_prompt_tokens": 6, "truncate": "drop", "shuffle": False}
    (batch,) = set_up(None, TOKENIZER, preferences=path, **options).train_dataloader()
    assert batch["prompt"] == ["xxx", "xxxxx"]


def pairs_file(tmp_path: Path, count: int) -> str:
    rows = [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": "r"} for number in range(count)]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def test_pairs_beside_prompts_are_those_of_seed_and_batch(tmp_path: Path):
    """Five pairs, two a batch: five batches are two passes, each over all five; the prompts keep their own order."""
    prompts, pairs = write_jsonl(tmp_path / "prompts.jsonl", ROWS), pairs_file(tmp_path, 5)

    def drawn(**options: Any) -> list[list[str]]:
        data = set_up(prompts, TOKENIZER, preferences=pairs, preferences_batch_size=2, batch_size=4, **options)
        batch = next(iter(data.train_dataloader()))
        assert data.with_preferences(batch, 3)["prompt"] == batch["prompt"]
        return [data.with_preferences(batch, number)["preferences"]["chosen"] for number in range(5)]

    first = [text for batch in drawn(seed=1) for text in batch]
    assert Counter(first[:5]) == Counter(first[5:]) == Counter(f"c{number}" for number in range(5))
    assert first[:5] != first[5:]
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(shuffle=False) == [["c0", "c1"], ["c2", "c3"], ["c4", "c0"], ["c1", "c2"], ["c3", "c4"]]
    assert (
        len(
            set_up(prompts, TOKENIZER, preferences=pairs, batch_size=3).with_preferences({}, 0)["preferences"]["prompt"]
        )
        == 3
    )


def test_processes_share_the_pairs_of_one():
    for turn in range(4):
        alone = rows_of_turn(7, 6, turn, ProcessShard(), seed=1)
        shares = [rows_of_turn(7, 2, turn, ProcessShard(rank, 3), seed=1) for rank in range(3)]
        assert [row for rows in zip(*shares, strict=True) for row in rows] == alone


def test_held_out_pairs_are_pairs_too(tmp_path: Path):
    data = set_up(None, TOKENIZER, preferences=pairs_file(tmp_path, 6), validation_size=2, batch_size=8)
    (training,), (validation,) = data.train_dataloader(), data.val_dataloader()
    assert sorted([*training["chosen"], *validation["chosen"]]) == [f"c{number}" for number in range(6)]
    assert data.prompts["training"].fingerprint() != data.prompts["validation"].fingerprint()


def test_other_completions_are_another_data_set(tmp_path: Path):
    path = Path(pairs_file(tmp_path, 2))
    one = set_up(None, TOKENIZER, preferences=str(path)).state_dict()
    path.write_text(path.read_text().replace("c1", "c2"))
    assert set_up(None, TOKENIZER, preferences=str(path)).state_dict() != one


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "data.source: nothing says what to train on"),
        ({"source": "a", "preferences_split": "test"}, "data.preferences_split: .*give data.preferences"),
        ({"preferences": "a", "preferences_split": "test"}, "data.preferences_split: .*set data.split instead"),
        (
            {"preferences": "a", "preferences_batch_size": 3},
            "data.preferences_batch_size: .*set data.batch_size instead",
        ),
        (
            {"source": "a", "preferences": "b", "preferences_batch_size": 0},
            "data.preferences_batch_size: must be at least 1",
        ),
    ],
)
def test_options_that_do_nothing_are_refused(options: dict[str, Any], key: str):
    with pytest.raises(InputError, match=key):
        PromptDataModule(**options)


def test_missing_file_and_split_name_their_keys(tmp_path: Path):
    pairs, prompts = pairs_file(tmp_path, 2), write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    assert refusal(prompts, preferences=str(tmp_path / "no.jsonl")).startswith("data.preferences:")
    assert refusal(None, preferences=str(tmp_path / "no.jsonl")).startswith("data.preferences:")  # type: ignore[arg-type]
    assert refusal(prompts, preferences=pairs, preferences_split="test").startswith("data.preferences_split:")
    assert json.loads(Path(pairs).read_text().splitlines()[0])["chosen"] == "c0"


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
