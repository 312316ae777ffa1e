"""Where a completion ends: EOS tokens, stop strings and the limit of tokens."""

import pytest
from conftest import ChainModel, make_tokenizer, prompts_of
from rolling import PROMPT_ROWS, LoadModel, an_early_end, roll, rows_of
from transformers import PreTrainedTokenizerFast


def pieces(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[int]:
    """Look up tokens by their text."""
    ids = [tokenizer.convert_tokens_to_ids(text) for text in texts]
    assert None not in ids
    return ids


def test_several_eos_ids_each_end_a_completion_and_belong_to_it():
    """Chains 10-11-90, 20-21-22-91 and 30-31-31-...: the third never ends and is cut at five tokens."""
    model = ChainModel({10: 11, 11: 90, 20: 21, 21: 22, 22: 91, 30: 31, 31: 31}, otherwise=31)
    completions = roll(model, prompts_of([[10], [5, 20], [5, 5, 30]]), [90, 91], max_new_tokens=5)
    assert rows_of(completions) == [[11, 90], [21, 22, 91], [31] * 5]
    assert completions.ended.tolist() == [True, True, False]
    assert completions.lengths.tolist() == [2, 3, 5]


def test_eos_as_the_last_allowed_token_counts_as_ended():
    model = ChainModel({10: 11, 11: 90, 20: 21, 21: 22}, otherwise=90)
    completions = roll(model, prompts_of([[10], [20]]), [90], max_new_tokens=2)
    assert rows_of(completions) == [[11, 90], [21, 22]]
    assert completions.ended.tolist() == [True, False]


def test_eos_as_the_first_token_gives_an_empty_text():
    completions = roll(ChainModel({}, otherwise=90), prompts_of([[10], [20]]), [90], max_new_tokens=4)
    assert rows_of(completions) == [[90], [90]]
    assert completions.texts == ("", "")
    assert completions.ids.shape == (2, 1)


def test_without_eos_ids_every_completion_runs_to_max_new_tokens():
    completions = roll(ChainModel({}, otherwise=90), prompts_of([[10], [90]]), [], max_new_tokens=4)
    assert rows_of(completions) == [[90] * 4] * 2
    assert not completions.ended.any()


def test_eos_inside_the_prompt_neither_ends_nor_counts():
    model = ChainModel({90: 11, 11: 12, 12: 12}, otherwise=12)
    completions = roll(model, prompts_of([[90, 10, 90], [90]]), [90], max_new_tokens=3)
    assert rows_of(completions) == [[11, 12, 12]] * 2
    assert not completions.ended.any()


def test_token_0_is_an_ordinary_token():
    """Padding holds 0 too; masks tell them apart."""
    model = ChainModel({10: 0, 0: 0, 20: 90}, otherwise=90)
    completions = roll(model, prompts_of([[10], [0, 0, 20], [0]]), [90], max_new_tokens=3)
    assert rows_of(completions) == [[0, 0, 0], [90], [0, 0, 0]]
    assert completions.texts[0] == "!!!"
    assert completions.texts[1] == ""


@pytest.mark.parametrize("kind", ["pad_is_eos", "bos_is_eos", "no_pad", "chat"])
def test_masks_and_ends_do_not_depend_on_special_token_ids(kind: str):
    """The prompts hold EOS; of each pair one completion ends with EOS after two tokens, and one is cut after four."""
    tokenizer = make_tokenizer(kind)
    eos = tokenizer.eos_token_id
    model = ChainModel({10: 11, 11: eos, eos: 20, 20: 20}, otherwise=20)
    completions = roll(
        model, prompts_of([[eos, 10], [10, 5, 5, eos], [eos]]), [eos], max_new_tokens=4, tokenizer=tokenizer
    )
    assert rows_of(completions) == [[11, eos], [20] * 4, [20] * 4]
    assert completions.ended.tolist() == [True, False, False]
    assert completions.texts == (tokenizer.decode([11]), tokenizer.decode([20] * 4), tokenizer.decode([20] * 4))


@pytest.mark.parametrize("reverse", [False, True], ids=["as_is", "reversed"])
def test_a_row_that_ended_early_stays_as_it_is(load_model: LoadModel, reverse: bool):
    """A row's completion is the same alone and beside rows that go on after it has ended."""
    model = load_model()
    prompts = prompts_of(PROMPT_ROWS[::-1] if reverse else PROMPT_ROWS)
    eos = [an_early_end(model, prompts)]
    together = roll(model, prompts, eos, max_new_tokens=10, temperature=0.0)
    alone = [roll(model, prompts.select([row]), eos, max_new_tokens=10, temperature=0.0) for row in range(len(prompts))]
    assert rows_of(together) == [rows_of(one)[0] for one in alone]
    assert together.ended.tolist() == [one.ended.item() for one in alone]
    assert together.texts == tuple(one.texts[0] for one in alone)
    assert len(set(map(len, rows_of(together)))) > 1


# ---- stop strings ----


def test_stop_string_that_spans_tokens_ends_a_completion_without_being_in_its_text(tokenizer: PreTrainedTokenizerFast):
    a, b, c, d = pieces(tokenizer, "a", "b", "c", "d")
    model = ChainModel({a: b, b: c, c: d, d: d}, otherwise=d)
    completions = roll(model, prompts_of([[d, a], [c]]), max_new_tokens=5, stop_strings=["cd"])
    assert rows_of(completions) == [[b, c, d], [d] * 5]
    assert completions.texts == ("b", "ddddd")
    assert completions.ended.tolist() == [True, False]


def test_stop_string_that_began_in_the_prompt_does_not_count(tokenizer: PreTrainedTokenizerFast):
    """The prompt ends in c and the completion begins with d; "cd" is not the completion's own."""
    c, d, e = pieces(tokenizer, "c", "d", "e")
    completions = roll(ChainModel({c: d, d: e}, otherwise=e), prompts_of([[c]]), max_new_tokens=4, stop_strings=["cd"])
    assert completions.texts == ("deee",)
    assert not completions.ended.any()


def test_stop_string_inside_one_token_cuts_the_text_before_it(tokenizer: PreTrainedTokenizerFast):
    """The token "today" holds "day"; of two stop strings the one that begins first cuts."""
    today, x = pieces(tokenizer, "today", "x")
    completions = roll(
        ChainModel({x: today}, otherwise=x), prompts_of([[x]]), max_new_tokens=4, stop_strings=["day", "od"]
    )
    assert rows_of(completions) == [[today]]
    assert completions.texts == ("t",)
    assert completions.ended.all()


def test_stop_string_beside_eos_ends_at_whichever_comes_first(tokenizer: PreTrainedTokenizerFast):
    a, b, c, d = pieces(tokenizer, "a", "b", "c", "d")
    model = ChainModel({a: b, b: 300, c: d, d: 300}, otherwise=300)
    completions = roll(model, prompts_of([[a], [c]]), [300], max_new_tokens=5, stop_strings=["d"])
    assert rows_of(completions) == [[b, 300], [d]]
    assert completions.texts == ("b", "")
    assert completions.ended.tolist() == [True, True]


def test_stop_strings_with_tokens_beyond_the_tokenizer_do_not_fail(tokenizer: PreTrainedTokenizerFast):
    """Models often embed more ids than the tokenizer knows; such an id has no text."""
    assert len(tokenizer) <= 303
    a, b = pieces(tokenizer, "a", "b")
    completions = roll(
        ChainModel({a: 303, 303: b}, otherwise=b), prompts_of([[a]]), max_new_tokens=3, stop_strings=["zz"]
    )
    assert rows_of(completions) == [[303, b, b]]
    assert completions.texts == ("bb",)


def test_stop_string_that_holds_a_special_token_is_not_left_in_the_text(tokenizer: PreTrainedTokenizerFast):
    """Chat models end with a special token and a line break; the text has neither."""
    a, b, end, line_break = pieces(tokenizer, "a", "b", "<|im_end|>", "Ċ")
    model = ChainModel({a: b, b: end, end: line_break}, otherwise=a)
    completions = roll(model, prompts_of([[a]]), max_new_tokens=6, stop_strings=["<|im_end|>\n"])
    assert rows_of(completions) == [[b, end, line_break]]
    assert completions.ended.tolist() == [True]
    assert completions.texts == ("b",)


def test_stop_strings_end_each_row_by_itself(tokenizer: PreTrainedTokenizerFast):
    a, b, c, d, e = pieces(tokenizer, "a", "b", "c", "d", "e")
    model = ChainModel({a: b, b: c, c: d, d: e}, otherwise=e)
    completions = roll(model, prompts_of([[a], [b], [c], [d]]), max_new_tokens=6, stop_strings=["cd", "ee"])
    assert completions.texts == ("b", "", "d", "")
    assert completions.lengths.tolist() == [3, 2, 3, 2]
