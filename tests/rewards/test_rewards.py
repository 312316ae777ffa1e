"""Rewards: what reaches a reward model, what comes back, and every way in which that can go wrong."""

import builtins
import copy
import gc
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
import transformers
from conftest import BARE, TEST_PATHS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError, NonFiniteError
from xpo_lightning.rewards import PythonReward, Reward, SequenceClassifierReward, WeightedSum
from xpo_lightning.rewards.sequence_classifier.scoring import pad_right
from xpo_lightning.rewards.validation import as_scores

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<user>", "<assistant>", "<end>"]
WORDS = [*SPECIAL, "the", "cat", "dog", "sat", "ran", "on", "a", "mat", "away", "from", "red", "hat", "today"]
ID = {word: index for index, word in enumerate(WORDS)}
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SMALL: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = 32
PROMPTS = ["the cat sat", "a dog", "the red hat", "cat", "the dog ran away from the cat"]
COMPLETIONS = [" on the mat today", " ran", " sat on the dog on the red mat today", " ran away", " a"]


def make_config(kind: str) -> transformers.PreTrainedConfig:
    """Give a tiny config; weights are drawn wide, so that one wrong token shows in the score."""
    no_ids: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    shared: dict[str, Any] = {"num_labels": 1, "initializer_range": 0.5, **no_ids}
    rope: dict[str, Any] = {**SMALL, "intermediate_size": 32, "max_position_embeddings": CONTEXT}
    makers: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
        "llama": lambda: transformers.LlamaConfig(**rope, **shared),
        "qwen2": lambda: transformers.Qwen2Config(**rope, **shared, num_key_value_heads=2),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**rope, **shared),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, **shared
        ),
        "bert": lambda: transformers.BertConfig(**rope, **shared | {"pad_token_id": 0}),
        "roberta": lambda: transformers.RobertaConfig(
            **rope | {"max_position_embeddings": CONTEXT + 1}, **shared | {"pad_token_id": 0}
        ),
        "deberta_v2": lambda: transformers.DebertaV2Config(
            **rope, **shared | {"pad_token_id": 0}, relative_attention=True, pos_att_type=["p2c", "c2p"]
        ),
        "xlnet": lambda: transformers.XLNetConfig(
            vocab_size=len(WORDS), d_model=16, n_layer=2, n_head=2, d_inner=32, **shared
        ),
    }
    return makers[kind]()


def save_model(folder: Path, kind: str, **changes: Any) -> None:
    """Save a tiny random sequence classifier."""
    config = make_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def save_tokenizer(
    folder: Path, words: Sequence[str] = WORDS, around: str = "$A", chat_template: str | None = None, **special: str
) -> None:
    """Save a tokenizer with one id a word; `around` is what it adds to text."""
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(word, ids[word]) for word in around.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run tiny models on one thread: more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a Llama reward model whose tokenizer has a pad, an EOS and a chat template, and adds nothing to text."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder, "llama")
    save_tokenizer(folder, chat_template=CHAT, pad_token="<pad>", eos_token="<eos>")
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a BERT reward model: `<bos>` and `<eos>` stand for [CLS] and [SEP]."""
    folder = tmp_path_factory.mktemp("bert")
    save_model(folder, "bert")
    save_tokenizer(folder, around="<bos> $A <eos>", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    return str(folder)


def loaded(path: str | Path, **options: Any) -> SequenceClassifierReward:
    reward = SequenceClassifierReward(str(path), **options)
    reward.load()
    return reward


def score(reward: Reward, prompts: Sequence[RawPrompt], completions: Sequence[str], **columns: Sequence[Any]) -> Tensor:
    result: Tensor = reward(prompts, completions, columns)
    return result


def ids_of(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def score_alone(path: str | Path, rows: Sequence[Sequence[int]]) -> Tensor:
    """Score each row by itself with transformers alone: no padding, the last token pooled."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    if model.config.model_type not in {"bert", "roberta", "deberta-v2"}:
        model.config.pad_token_id = None
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([list(row)])).logits[0, 0] for row in rows])


def assert_same(scores: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert scores.dtype == torch.float32
    if len(expected) > 1:
        assert expected.std() > 0.05, "the reference scores hardly differ, so the comparison would not see an error"


# --- the sequence classifier: scores


TOKENIZERS: dict[str, dict[str, str]] = {
    "distinct pad": {"pad_token": "<pad>", "eos_token": "<eos>"},
    "pad is eos": {"pad_token": "<eos>", "eos_token": "<eos>"},
    "no pad": {"eos_token": "<eos>"},
    "left padding": {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"},
    "left padding, pad is eos": {"pad_token": "<eos>", "eos_token": "<eos>", "padding_side": "left"},
}


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("special", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen2"])
def test_decoder_scores_do_not_depend_on_padding(
    tmp_path: Path, kind: str, special: dict[str, str], append_eos: bool
) -> None:
    pad = special.get("pad_token")
    save_model(tmp_path, kind, pad_token_id=None if pad is None else ID[pad])
    # In a folder of its own: beside a Qwen2 model transformers takes any tokenizer for Qwen's.
    save_tokenizer(tmp_path / "tokenizer", **special)
    reward = loaded(tmp_path, tokenizer=str(tmp_path / "tokenizer"), append_eos=append_eos, micro_batch_size=3)
    rows = [ids_of(p + c) + [ID["<eos>"]] * append_eos for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_same(score(reward, PROMPTS, COMPLETIONS), score_alone(tmp_path, rows))
    assert reward.model is not None
    assert reward.model.config.pad_token_id == (None if pad is None else ID[pad])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta_v2"])
def test_encoder_scores_do_not_depend_on_padding(tmp_path: Path, kind: str, side: str) -> None:
    save_model(tmp_path, kind)
    save_tokenizer(tmp_path, around="<bos> $A <eos>", pad_token="<pad>", padding_side=side)
    rows = [ids_of(f"<bos> {p}{c} <eos>") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_same(score(loaded(tmp_path), PROMPTS, COMPLETIONS), score_alone(tmp_path, rows))


def test_text_that_ends_in_the_pad_token_is_scored_at_that_token(llama: str) -> None:
    prompts, completions = ["the cat <pad>", "a"], ["", " dog ran away"]
    expected = score_alone(llama, [ids_of("the cat <pad>"), ids_of("a dog ran away")])
    assert_same(score(loaded(llama), prompts, completions), expected)


def test_more_rows_than_the_vocabulary_has_ids(llama: str) -> None:
    completions = [" " + word for word in WORDS]
    expected = score_alone(llama, [ids_of("the cat" + completion) for completion in completions])
    assert_same(score(loaded(llama, micro_batch_size=100), ["the cat"] * len(WORDS), completions), expected)


def test_padding_is_an_id_that_ends_no_row() -> None:
    ids, mask, pad_id = pad_right([[5, 2], [7, 8, 0], [9]], pad_ids=[0, None, 2], vocabulary=10)
    assert pad_id == 1
    assert ids.tolist() == [[5, 2, 1], [7, 8, 0], [9, 1, 1]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert pad_right([[5, 2]], pad_ids=[50, 3], vocabulary=10)[2] == 3


def test_micro_batch_size_limits_the_rows_of_a_forward(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = loaded(llama, micro_batch_size=2)
    assert reward.model is not None
    score(reward, PROMPTS, COMPLETIONS)  # its ways are tried
    shapes = []
    forward = reward.model.forward

    def spy(input_ids: Tensor, **rest: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(reward.model, "forward", spy)
    score(reward, PROMPTS, COMPLETIONS)
    assert shapes == [(2, 12), (2, 7), (1, 3)]  # 12 and 7, 7 and 3, and 3 words, once sorted


def test_no_rows_give_no_scores(llama: str) -> None:
    assert score(loaded(llama), [], []).shape == (0,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_of_a_half_precision_model_are_float32(llama: str, dtype: str) -> None:
    reward = loaded(llama, dtype=dtype)
    assert next(reward.parameters()).dtype == getattr(torch, dtype)
    assert score(reward, PROMPTS, COMPLETIONS).dtype == torch.float32


def test_auto_keeps_the_checkpoints_dtype(tmp_path: Path, llama: str) -> None:
    AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert next(loaded(tmp_path).parameters()).dtype == torch.bfloat16
    assert next(loaded(llama).parameters()).dtype == torch.float32


def test_autocast_does_not_change_the_chosen_dtype(llama: str) -> None:
    reward = loaded(llama, dtype="float32")
    expected = score(reward, PROMPTS, COMPLETIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(reward, PROMPTS, COMPLETIONS), expected)


def test_a_score_that_is_not_finite_is_refused(llama: str) -> None:
    reward = loaded(llama)
    assert reward.model is not None
    reward.model.get_input_embeddings().get_parameter("weight").data[ID["hat"]] = torch.nan
    with pytest.raises(InputError, match=r"reward model '.*' gave nan for row 2; a score must be a finite"):
        score(reward, PROMPTS, COMPLETIONS)


# --- the sequence classifier: text


def test_text_goes_through_the_reward_models_own_tokenizer(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    shuffled = [*SPECIAL, *reversed(WORDS[len(SPECIAL) :])]
    save_tokenizer(tmp_path, words=shuffled, around="<bos> $A", pad_token="<pad>", bos_token="<bos>")
    rows = [
        [shuffled.index(word) for word in f"<bos> {p}{c}".split()] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert_same(score(loaded(tmp_path), PROMPTS, COMPLETIONS), score_alone(tmp_path, rows))


def test_another_tokenizer_can_be_named(llama: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, around="<bos> $A", bos_token="<bos>")
    expected = score_alone(llama, [ids_of("<bos> the cat sat")])
    assert_same(score(loaded(llama, tokenizer=str(tmp_path)), ["the cat"], [" sat"]), expected)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("prompt", "prompt_format", "text"),
    [
        ([user("the cat")], "auto", "<user> the cat <end> <assistant> sat on <end>"),
        ([user("the cat")], "chat", "<user> the cat <end> <assistant> sat on <end>"),
        ([user("a"), assistant("dog ran")], "auto", "<user> a <end> <assistant> dog ran sat on <end>"),
        ("the cat", "auto", "the cat sat on"),
        ("the cat", "text", "the cat sat on"),
        ("the cat", "chat", "<user> the cat <end> <assistant> sat on <end>"),
    ],
)
def test_prompt_formats(llama: str, tmp_path: Path, prompt: RawPrompt, prompt_format: Any, text: str) -> None:
    save_tokenizer(tmp_path, around="<bos> $A", bos_token="<bos>", chat_template=CHAT)
    before = json.dumps(prompt)
    reward = loaded(llama, tokenizer=str(tmp_path), prompt_format=prompt_format)
    row = ids_of(text) if text.startswith("<user>") else ids_of("<bos> " + text)  # a template writes its own BOS
    assert_same(score(reward, [prompt], [" sat on"]), score_alone(llama, [row]))
    assert json.dumps(prompt) == before


def test_text_and_chat_prompts_may_be_mixed(llama: str) -> None:
    expected = score_alone(llama, [ids_of("a dog ran"), ids_of("<user> a dog <end> <assistant> ran <end>")])
    assert_same(score(loaded(llama), ["a dog", [user("a dog")]], [" ran", "ran"]), expected)


def test_text_format_refuses_chat_messages(llama: str) -> None:
    with pytest.raises(
        InputError, match=r"^model\.reward\.init_args\.prompt_format: 'text' cannot score chat messages"
    ):
        score(loaded(llama, prompt_format="text"), [[user("the cat")]], [" sat"])


@pytest.mark.parametrize(("prompt", "prompt_format"), [([user("the cat")], "auto"), ("the cat", "chat")])
def test_conversations_need_a_chat_template(bert: str, prompt: RawPrompt, prompt_format: Any) -> None:
    with pytest.raises(
        InputError, match=r"^model\.reward: the reward model's tokenizer '.*bert.*' has no chat template"
    ):
        score(loaded(bert, prompt_format=prompt_format), [prompt], [" sat"])


def test_a_template_that_refuses_a_conversation_is_quoted(llama: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template="{{ raise_exception('no system message, please') }}")
    with pytest.raises(InputError, match=r"chat template refuses a conversation \(no system message, please\)"):
        score(loaded(llama, tokenizer=str(tmp_path)), [[user("the cat")]], [" sat"])


# --- the sequence classifier: length


@pytest.mark.parametrize(("truncate", "kept"), [("left", "the mat today"), ("right", "the cat sat")])
def test_truncation_of_text(llama: str, truncate: Any, kept: str) -> None:
    reward = loaded(llama, max_tokens=3, truncate=truncate)
    expected = score_alone(llama, [ids_of(kept), ids_of("a dog ran")])
    assert_same(score(reward, ["the cat sat on", "a dog"], [" the mat today", " ran"]), expected)


@pytest.mark.parametrize(("truncate", "kept"), [("left", "<bos> mat today <eos>"), ("right", "<bos> the cat <eos>")])
def test_truncation_keeps_the_tokenizers_special_tokens(bert: str, truncate: Any, kept: str) -> None:
    reward = loaded(bert, max_tokens=4, truncate=truncate)
    assert_same(score(reward, ["the cat sat on"], [" the mat today"]), score_alone(bert, [ids_of(kept)]))


@pytest.mark.parametrize(("truncate", "kept"), [("left", "mat today <eos>"), ("right", "the cat <eos>")])
def test_truncation_keeps_an_appended_eos(llama: str, truncate: Any, kept: str) -> None:
    reward = loaded(llama, max_tokens=3, truncate=truncate, append_eos=True)
    assert_same(score(reward, ["the cat sat on"], [" the mat today"]), score_alone(llama, [ids_of(kept)]))


def test_truncation_of_a_conversation_cuts_the_templates_tokens(llama: str) -> None:
    expected = score_alone(llama, [ids_of("<assistant> sat on <end>")])
    assert_same(score(loaded(llama, max_tokens=4), [[user("the cat")]], ["sat on"]), expected)


def test_truncation_can_be_refused(llama: str) -> None:
    reward = loaded(llama, max_tokens=3, truncate="error")
    assert score(reward, ["the cat"], [" sat"]).shape == (1,)
    with pytest.raises(
        InputError, match=r"row 1 has 4 tokens, more than the reward model's limit of 3; set .*truncate"
    ):
        score(reward, ["a", "the cat"], [" dog", " sat on"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta", "deberta_v2"])
def test_the_models_context_is_the_default_limit(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind)
    save_tokenizer(tmp_path, pad_token="<pad>")
    long, kept = "the cat " + "dog " * CONTEXT, "dog " * CONTEXT
    assert_same(score(loaded(tmp_path), [long], [""]), score_alone(tmp_path, [ids_of(kept)]))
    with pytest.raises(InputError, match=rf"max_tokens: {CONTEXT + 1} is more than .* context of {CONTEXT} tokens"):
        loaded(tmp_path, max_tokens=CONTEXT + 1)


def test_max_tokens_must_leave_room_for_text(bert: str) -> None:
    with pytest.raises(InputError, match="max_tokens: 2 leaves no room for text beside 2 special tokens"):
        score(loaded(bert, max_tokens=2), ["the cat"], [" sat"])


def test_a_row_without_tokens_is_named(llama: str) -> None:
    with pytest.raises(InputError, match="row 1 has no tokens: its prompt and its completion are both empty"):
        score(loaded(llama), ["the cat", ""], ["", ""])


def test_appended_eos_is_not_doubled(bert: str) -> None:
    expected = score_alone(bert, [ids_of("<bos> the cat <eos>")])
    assert_same(score(loaded(bert, append_eos=True), ["the"], [" cat"]), expected)


def test_append_eos_needs_an_eos(llama: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.append_eos: the tokenizer .* has no EOS"):
        loaded(llama, tokenizer=str(tmp_path), append_eos=True)


def test_a_tokenizer_of_another_model_is_refused(llama: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, words=[*WORDS, "elephant"])
    reward = loaded(llama, tokenizer=str(tmp_path))
    assert score(reward, ["the cat"], [" sat"]).isfinite().all()
    with pytest.raises(InputError, match=rf"init_args\.tokenizer: token id {len(WORDS)} is outside .* {len(WORDS)}; "):
        score(reward, ["the elephant"], [" sat"])


# --- the sequence classifier: loading


def test_loading_twice_keeps_the_model(llama: str) -> None:
    reward = SequenceClassifierReward(llama)
    with pytest.raises(InputError, match=r"load\(\)"):
        score(reward, ["the cat"], [" sat"])
    reward.load()
    model = reward.model
    reward.load()
    assert reward.model is model


def test_the_model_is_frozen_and_stays_in_eval_mode(llama: str) -> None:
    reward = loaded(llama)
    reward.train()
    assert not any(module.training for module in reward.modules())
    parameters = list(reward.parameters())
    assert parameters
    assert not any(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("option", ["path", "tokenizer"])
def test_a_missing_path_is_named(llama: str, option: str) -> None:
    options = {"path": llama, option: "./no/such/model"}
    with pytest.raises(
        InputError, match=rf"^model\.reward\.init_args\.{option}: there is nothing at './no/such/model'"
    ):
        loaded(**options)


def test_a_hub_id_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.path: could not load 'nobody/nothing' from the"):
        loaded("nobody/nothing")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.path: could not load '.*' \(\w+Error: "):
        loaded(tmp_path)


def test_two_labels_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", num_labels=2)
    save_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.path: .* has 2 labels \(num_labels\)"):
        loaded(tmp_path)
    with pytest.raises(InputError, match="has 2 labels"):  # its head is trained, so this is no way around
        loaded(tmp_path, allow_untrained_head=True)


def test_a_family_that_reads_scores_from_padding_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "xlnet")
    save_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"init_args\.path: .* \(xlnet\) reads its score at the last position"):
        loaded(tmp_path)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a base language model, which has no score head."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(2)
    transformers.AutoModelForCausalLM.from_config(make_config("gpt_neox")).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("id2label", "label2id", "num_labels"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, eos_token="<eos>")
    return str(folder)


def test_an_untrained_head_is_refused(language_model: str) -> None:
    with pytest.raises(InputError, match=r"init_args\.path: .* is not a trained reward model: score\.weight would be"):
        loaded(language_model)


def test_an_untrained_head_can_be_allowed_and_is_always_the_same(language_model: str) -> None:
    torch.manual_seed(3)
    undisturbed = torch.rand(1)
    torch.manual_seed(3)
    first = loaded(language_model, allow_untrained_head=True)
    assert torch.rand(1) == undisturbed
    second = loaded(language_model, allow_untrained_head=True)
    scores = score(first, PROMPTS, COMPLETIONS)
    assert torch.equal(score(second, PROMPTS, COMPLETIONS), scores)
    assert scores.std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size: must be at least 1, but is 0"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, but is 0"),
        ({"truncate": "middle"}, "truncate: must be one of left, right, error, but is 'middle'"),
        ({"prompt_format": "poem"}, "prompt_format: must be one of auto, text, chat, but is 'poem'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.{message}"):
        SequenceClassifierReward("anything", **options)


def test_attention_and_revision_reach_transformers(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(llama, attn_implementation="eager").model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    seen = []
    original = AutoTokenizer.from_pretrained

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", spy)
    with pytest.raises(InputError, match=r"model\.reward\.init_args\.revision is for hub ids"):
        loaded(llama, revision="abc")
    monkeypatch.setattr("xpo_lightning.rewards.sequence_classifier.loading.is_local", lambda name: False)
    seen.clear()
    loaded(llama, revision="abc")
    loaded(llama, revision="abc", tokenizer=llama, trust_remote_code=True)
    assert seen == [
        {"revision": "abc", "trust_remote_code": False},
        {"revision": None, "trust_remote_code": True},  # the revision is the model's, not that of another repository
    ]


# --- scores at the border


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, -3.0],
        (1.0, 2.5, -3),
        np.array([1.0, 2.5, -3.0]),
        [np.float32(1), np.float64(2.5), np.int64(-3)],
        torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(-3)],
    ],
)
def test_numbers_of_any_kind_become_float32(values: Any) -> None:
    scores = as_scores(values, 3, "f")
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.5, -3.0]
    assert not scores.requires_grad


@pytest.mark.parametrize(
    "values", [[True, False], np.array([True, False]), torch.tensor([True, False]), [np.True_, np.False_]]
)
def test_truth_values_count_as_one_and_zero(values: Any) -> None:
    assert as_scores(values, 2, "f").tolist() == [1.0, 0.0]


WANTED = "expected 2 numbers, one for each completion"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, f"f returned None; {WANTED}"),
        ([1.0], f"f returned a list of length 1; {WANTED}"),
        ((1.0, 2.0, 3.0), f"f returned a tuple of length 3; {WANTED}"),
        (torch.zeros(2, 1), rf"f returned a Tensor of shape \(2, 1\); {WANTED}"),
        (torch.tensor(1.0), rf"f returned a Tensor of shape \(\); {WANTED}"),
        (np.zeros(3), rf"f returned a ndarray of shape \(3,\); {WANTED}"),
        (1.5, f"f returned a float; {WANTED}, as a list, tensor or numpy array"),
        ("ab", f"f returned a str; {WANTED}, as"),
        ({0: 1.0, 1: 2.0}, f"f returned a dict; {WANTED}, as"),
        ((value for value in (1.0, 2.0)), f"f returned a generator; {WANTED}, as"),
        ([1.0, None], "f gave None for row 1; a score must be a number"),
        (["0.5", 1.0], r"f gave a str \('0.5'\) for row 0; a score must be a number"),
        (np.array(["0.5", "1"]), r"f gave a str \('0.5'\) for row 0"),
        ([1.0, [2.0]], r"f gave a list \(\[2.0\]\) for row 1"),
        ([1.0, torch.zeros(1)], r"f gave a Tensor \(tensor\(\[0.\]\)\) for row 1"),
        (torch.tensor([1j, 2j]), r"f gave a complex \(1j\) for row 0"),
        ([1.0, float("nan")], "f gave nan for row 1; a score must be a finite float32 number"),
        (torch.tensor([-torch.inf, 1.0]), "f gave -inf for row 0; a score must be a finite"),
        ([1.0, 1e300], r"f gave 1e\+300 for row 1; a score must be a finite float32 number"),
        ([1.0, 10**400], "f gave inf for row 1"),
        ([math.nan, math.inf], "f gave nan for row 0 and inf for row 1; a score must be"),
    ],
)
def test_what_is_no_score_is_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{message}"):
        as_scores(values, 2, "f")


def test_every_row_without_a_finite_score_is_known_and_the_first_are_shown() -> None:
    values = [0.0, math.nan, 1.0, math.inf, -math.inf, 2.0, math.nan, math.nan]
    shown = "f gave nan for row 1, inf for row 3, -inf for row 4 and no finite number for 2 more rows; a score must"
    with pytest.raises(NonFiniteError, match=f"^{shown}") as caught:
        as_scores(values, 8, "f")
    assert caught.value.rows == [1, 3, 4, 6, 7]
    twin = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(twin), twin.rows) == (str(caught.value), caught.value.rows)


# --- Python functions


def by_length(
    prompts: list[RawPrompt], completions: list[str], columns: dict[str, list[Any]], scale: float = 1.0
) -> list[float]:
    return [scale * len(completion) for completion in completions]


def test_a_function_gets_lists_and_its_own_arguments() -> None:
    seen: dict[str, Any] = {}

    def remember(**everything: Any) -> list[bool]:
        seen.update(everything)
        return [a == b for a, b in zip(everything["completions"], everything["columns"]["answer"], strict=True)]

    scores = score(PythonReward(remember, {"strict": 2}), ("p", "q"), ("yes", "no"), answer=("yes", "yes"), n=(1, 2))
    assert scores.tolist() == [1.0, 0.0]
    columns = {"answer": ["yes", "yes"], "n": [1, 2]}
    assert seen == {"prompts": ["p", "q"], "completions": ["yes", "no"], "columns": columns, "strict": 2}


@pytest.mark.parametrize(
    "kind", [ValueError, StopIteration, KeyError, KeyboardInterrupt, SystemExit, GeneratorExit, TimeoutError]
)
def test_whatever_a_function_raises_says_what_and_where(kind: type[BaseException]) -> None:
    error = kind("no grader")

    def broken(**everything: Any) -> list[float]:
        raise error

    what = rf"^reward function .*broken raised {kind.__name__}: '?no grader"
    with pytest.raises(InputError, match=what) as caught:
        score(PythonReward(broken), ["p"], ["c"])
    assert caught.value.__cause__ is error


def test_an_exception_without_a_message_is_named_alone() -> None:
    def stops(**everything: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(InputError, match=r"stops raised KeyboardInterrupt$"):
        score(PythonReward(stops), ["p"], ["c"])


def test_bad_input_that_a_function_reports_itself_passes_unchanged() -> None:
    error = InputError("answers.csv, row 7: no answer")

    def strict(**everything: Any) -> list[float]:
        raise error

    with pytest.raises(InputError) as caught:
        score(PythonReward(strict), ["p"], ["c"])
    assert caught.value is error


def hangs_once(minutes: float = 10) -> tuple[Callable[..., list[float]], threading.Event]:
    """Give a function whose first call does not return by itself, and what lets it."""
    release, calls = threading.Event(), []

    def hang(**everything: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            release.wait(60 * minutes)
        return [float(len(calls))] * len(everything["completions"])

    return hang, release


def test_a_function_that_does_not_return_is_given_up_and_the_next_call_works() -> None:
    function, release = hangs_once()
    reward = PythonReward(function, timeout=0.2)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"function .*hang has not returned after 0\.2 seconds.*init_args\.timeout"):
        score(reward, ["p"], ["c"])
    assert 0.2 <= time.monotonic() - start < 2
    assert score(reward, ["p"], ["c"]).tolist() == [2.0]
    release.set()
    assert score(reward, ["p"], ["c"]).tolist() == [3.0], "and not what the first call returned in the end"


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e300])
def test_a_function_may_take_its_time(timeout: float | None) -> None:
    def slow(**everything: Any) -> list[float]:
        time.sleep(0.3)
        return [1.0]

    assert score(PythonReward(slow, timeout=timeout), ["p"], ["c"]).tolist() == [1.0]


def test_ctrl_c_while_a_function_hangs_is_the_users_own() -> None:
    function, release = hangs_once()

    pressed: list[float] = []

    def press(**everything: Any) -> list[float]:
        time.sleep(0.1)  # Whoever waits does so by now: a signal before that is seen at the next look.
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
        return function(**everything)

    with pytest.raises(KeyboardInterrupt):
        score(PythonReward(press, timeout=None), ["p"], ["c"])
    assert time.monotonic() - pressed[0] < 0.8, "at once, not at the next look"
    release.set()


def test_a_function_keeps_its_thread_and_runs_without_gradients() -> None:
    here, seen = threading.local(), []

    def remember(**everything: Any) -> list[float]:
        seen.append((hasattr(here, "open"), torch.is_grad_enabled(), threading.current_thread().daemon))
        here.open = True
        return [0.0]

    reward = PythonReward(remember)
    for _ in range(2):
        score(reward, ["p"], ["c"])
    assert seen == [(False, False, True), (True, False, True)]


def test_a_reward_is_copied_with_a_thread_of_its_own() -> None:
    reward = PythonReward(by_length, {"scale": 2.0}, timeout=5)
    score(reward, ["p"], ["abc"])
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):  # noqa: S301
        assert score(twin, ["p"], ["abc"]).tolist() == [6.0]
        assert (twin.timeout, twin.identity()) == (5, reward.identity())


def test_a_thread_ends_with_its_reward() -> None:
    threads = []

    def remember(**everything: Any) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0]

    reward = PythonReward(remember)
    score(reward, ["p"], ["c"])
    assert threads[0].is_alive()
    del reward
    gc.collect()
    threads[0].join(5)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_an_impossible_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.timeout must be above 0 or null, but is"):
        PythonReward(by_length, timeout=timeout)


def test_a_functions_wrong_output_is_named() -> None:
    def short(**everything: Any) -> list[float]:
        return [1.0]

    with pytest.raises(
        InputError, match=r"^reward function .*test_rewards\..*short returned a list of length 1; expected 2"
    ):
        score(PythonReward(short), ["p", "q"], ["c", "d"])


def test_a_callable_object_is_named_by_its_class() -> None:
    class Grader:
        def __call__(self, **everything: Any) -> None:
            return None

    with pytest.raises(InputError, match=r"Grader returned None; expected 1 numbers"):
        score(PythonReward(Grader()), ["p"], ["c"])


def test_arguments_that_the_function_cannot_take_are_refused_at_once() -> None:
    def wrong(texts: list[str]) -> list[float]:
        return []

    with pytest.raises(
        InputError, match=r"^model\.reward\.init_args\.function: .*wrong\(texts.* cannot be called with"
    ):
        PythonReward(wrong)
    with pytest.raises(InputError, match=r"by_length.*cannot be called with .*unknown"):
        PythonReward(by_length, {"unknown": 1})
    with pytest.raises(InputError, match=r"init_args\.arguments: 'columns' is taken"):
        PythonReward(by_length, {"columns": {}})


# --- weighted sums


class Constant(Reward):
    """Gives every completion the same score, once loaded."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.loads = 0

    def load(self) -> None:
        self.loads += 1

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        return torch.full((len(completions),), self.value)


def test_a_weighted_sum_adds_up() -> None:
    parts: list[Reward] = [Constant(10.0), PythonReward(by_length), Constant(1.0)]
    reward = WeightedSum(parts, [0.5, 2, -3.0])
    reward.load()
    assert score(reward, ["p", "q"], ["abc", ""]).tolist() == [8.0, 2.0]  # 5 + 2 * 3 - 3 and 5 + 0 - 3
    assert [part.loads for part in parts if isinstance(part, Constant)] == [1, 1]


def test_a_weighted_sum_scores_with_models(llama: str) -> None:
    reward = WeightedSum([SequenceClassifierReward(llama), Constant(1.0)], [2.0, 1.0])
    reward.load()
    rows = [ids_of(p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_same(score(reward, PROMPTS, COMPLETIONS), 2 * score_alone(llama, rows) + 1)


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], [], "rewards: give at least one reward"),
        ([1.0], [1.0, 2.0], "weights: expected 1 weights, one for each reward, but got 2"),
        ([1.0], [float("nan")], "weights: every weight must be a finite number"),
    ],
)
def test_weights_must_fit_the_rewards(values: list[float], weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.reward\.init_args\.{message}"):
        WeightedSum([Constant(value) for value in values], weights)


def test_a_broken_part_of_a_sum_is_named() -> None:
    with pytest.raises(NonFiniteError, match=r"^Constant gave nan for row 0") as caught:
        score(WeightedSum([Constant(float("nan"))], [1.0]), ["p", "q"], ["c", "d"])
    assert caught.value.rows == [0, 1]
    with pytest.raises(NonFiniteError, match=r"^WeightedSum gave inf for row 0"):
        score(WeightedSum([Constant(1e38)], [100.0]), ["p"], ["c"])
    with pytest.raises(InputError, match=r"^reward (\w+\.)+Failing raised KeyError: 'grade'"):
        score(WeightedSum([Constant(1.0), Failing(KeyError("grade"))], [1.0, 1.0]), ["p"], ["c"])


class Failing(Reward):
    """Raises in place of scoring."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def score(
        self, prompts: Sequence[RawPrompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("no grade"), StopIteration("no grade"), RuntimeError("no grade")])
def test_what_a_reward_of_ones_own_raises_names_its_class(error: Exception) -> None:
    with pytest.raises(
        InputError, match=rf"^reward (\w+\.)+Failing raised {type(error).__name__}: no grade$"
    ) as caught:
        score(Failing(error), ["p"], ["c"])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [InputError("row 3 has no answer"), NonFiniteError("nan", [3]), KeyboardInterrupt()])
def test_bad_input_and_ctrl_c_pass_a_reward_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        score(WeightedSum([Failing(error)], [1.0]), ["p"], ["c"])
    assert caught.value is error


# --- configuration


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the name of an importable module with a reward function."""
    code = """
        def matches(prompts, completions, columns, bonus=0.0):
            return [float(a == b) + bonus for a, b in zip(completions, columns["answer"], strict=True)]
    """
    (tmp_path / "user_rewards_for_test.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    return "user_rewards_for_test"


def build(config: dict[str, Any]) -> Reward:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    parsed = parser.parse_object({"reward": config})
    reward = parser.instantiate(parsed).reward
    assert isinstance(reward, Reward)
    return reward


@pytest.mark.parametrize("prefix", ["", "xpo_lightning.rewards."])
def test_a_function_from_yaml(user_module: str, prefix: str) -> None:
    init_args = {"function": f"{user_module}.matches", "arguments": {"bonus": 0.5}}
    reward = build({"class_path": f"{prefix}PythonReward", "init_args": init_args})
    assert score(reward, ["p", "q"], ["yes", "no"], answer=["yes", "yes"]).tolist() == [1.5, 0.5]


@pytest.mark.parametrize("prefix", ["", "xpo_lightning.rewards."])
def test_nested_rewards_from_yaml(user_module: str, llama: str, prefix: str) -> None:
    function = {"class_path": f"{prefix}PythonReward", "init_args": {"function": f"{user_module}.matches"}}
    classifier = {"class_path": f"{prefix}SequenceClassifierReward", "init_args": {"path": llama, "truncate": "right"}}
    init_args = {"rewards": [function, classifier], "weights": [100, 1]}
    reward = build({"class_path": f"{prefix}WeightedSum", "init_args": init_args})
    reward.load()
    expected = torch.tensor([100.0, 0.0]) + score_alone(llama, [ids_of("the cat"), ids_of("the dog")])
    assert_same(score(reward, ["the", "the"], [" cat", " dog"], answer=[" cat", "no"]), expected)


def test_every_option_of_the_classifier_is_explained_by_help() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SequenceClassifierReward, "reward")
    explained = parser.format_help().split("--reward.")[2:]
    undocumented = [text.split()[0] for text in explained if "(type:" in text and text.index("(type:") < 40]
    assert len(explained) >= 12
    assert undocumented == []


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"path": "x", "truncate": "middle"}, "middle"),
        ({"path": "x", "no_such_option": 1}, "no_such_option"),
        ({}, "path"),
    ],
)
def test_wrong_yaml_is_refused_by_name(init_args: dict[str, Any], message: str) -> None:
    with pytest.raises(jsonargparse.ArgumentError, match=message):
        build({"class_path": "SequenceClassifierReward", "init_args": init_args})


# --- the command line


def short(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [0.0] * (len(completions) - 1)


def words(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[str]:
    return ["good"] * len(completions)


def nothing(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> None:
    return None


def not_finite(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [math.nan, math.inf, *[0.0] * (len(completions) - 2)]


def fails(
    prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], kind: str = "ValueError"
) -> list[float]:
    raise getattr(builtins, kind)("no grader")


def hangs(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    time.sleep(600)
    return []


def run_with(folder: Path, policy: str, function: str, **init_args: Any) -> list[str]:
    """Write the config of a run with a reward function of this file, and give the arguments of the command line."""
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    config = {
        "model": {
            "policy": {"path": policy},
            "reward": {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.{function}", **init_args}},
            "sampling": {"max_new_tokens": 3},
        },
        "data": {"source": str(folder / "prompts.jsonl"), "batch_size": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
        },
        "defaults": BARE,
    }
    (folder / "run.json").write_text(json.dumps(config))  # JSON is YAML
    return ["fit", "--config", str(folder / "run.json")]


@pytest.mark.parametrize(
    ("function", "init_args", "message"),
    [
        *(
            ("fails", {"arguments": {"kind": kind}}, f"raised {kind}: no grader")
            for kind in ("ValueError", "StopIteration", "KeyboardInterrupt", "SystemExit", "GeneratorExit")
        ),
        ("short", {}, "returned a list of length 3; expected 4"),
        ("words", {}, "gave a str ('good') for row 0"),
        ("nothing", {}, "returned None"),
        ("not_finite", {}, "gave nan for row 0 and inf for row 1"),
        ("hangs", {"timeout": 0.2}, "model.reward.init_args.timeout"),
    ],
)
def test_a_run_with_a_broken_reward_function_ends_with_one_line(
    model_folder: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    function: str,
    init_args: dict[str, Any],
    message: str,
) -> None:
    args = run_with(tmp_path, model_folder(), function, **init_args)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if line.startswith("xpo: error: ")] == shown[-1:]
    assert f"reward function {__name__}.{function} " in shown[-1]
    assert message in shown[-1]
    assert not any("Traceback" in line for line in shown)


@pytest.mark.slow
def test_a_process_ends_although_its_reward_function_hangs(model_folder: Callable[..., str], tmp_path: Path) -> None:
    args = run_with(tmp_path, model_folder(), "hangs", timeout=0.2)
    code = f"import sys; from xpo_lightning.cli.lightning_cli import main; main({args!r})"
    path = os.pathsep.join([TEST_PATHS, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "has not returned after 0.2 seconds" in done.stderr.splitlines()[-1]


def test_identities_keep_the_names_that_reference_caches_know(model_folder: Callable[..., str]):
    """Reward classes may move inside the package, and caches that were written before must stay valid."""
    assert PythonReward(short).identity()["class"] == "xpo_lightning.rewards.function.PythonReward"
    classifier = SequenceClassifierReward(model_folder("llama"), allow_untrained_head=True)
    classifier.load()
    assert classifier.identity()["class"] == "xpo_lightning.rewards.classifier.SequenceClassifierReward"
    both = WeightedSum([PythonReward(short), PythonReward(short)], [1.0, 1.0])
    assert both.identity()["class"] == "xpo_lightning.rewards.weighted.WeightedSum"
