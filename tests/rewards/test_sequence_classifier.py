"""The sequence classifier: scores, the text that it reads, and what cannot be loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scoring import (
    CHAT,
    COMPLETIONS,
    CONTEXT,
    ID,
    PROMPTS,
    SPECIAL,
    WORDS,
    assert_same,
    ids_of,
    make_config,
    save_model,
    save_tokenizer,
    score,
    score_alone,
)
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards import SequenceClassifierReward
from xpo_lightning.rewards.sequence_classifier.scoring import pad_right


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


# --- scores


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


# --- text


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


# --- length


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


# --- loading


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
