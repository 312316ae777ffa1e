"""The text of a completion is what was written behind the prompt, with every kind of tokenizer."""

from typing import Any

import pytest
from conftest import (
    CHAT_TEMPLATE,
    ChainModel,
    chain_module,
    fit_quietly,
    loader,
    make_tokenizer,
    noise,
    prompts_of,
    quiet_trainer,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from xpo_lightning import PythonReward, RolloutEngine, Sampling, XPOLightningModule
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.samplers import PythonSampler

WORDS = ["the", "cat", "sat", "on", "a", "mat", "hi", "Hello", "[INST]", "[/INST]"]
MAKES = ["llama", "llama_legacy", "metaspace_first", "metaspace_always", "unigram"]


def pieces_and_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """Give a vocabulary of WORDS, with and without the space before them, single characters, and all bytes."""
    pieces, merges = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", ".", ","], []
    for sequence in (*(["▁", *word] for word in WORDS), *map(list, WORDS)):
        left = sequence[0]
        pieces += sequence
        for character in sequence[1:]:
            merges.append((left, character))
            left += character
            pieces.append(left)
    return list(dict.fromkeys(pieces)), list(dict.fromkeys(merges))


def sentencepiece(make: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Build a tokenizer of the SentencePiece kind, as transformers and as published files set them up."""
    pieces, merges = pieces_and_merges()
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if make.startswith("llama"):
        made = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=make == "llama_legacy", **special)
    else:
        made = PreTrainedTokenizerFast(tokenizer_object=metaspace(make, vocabulary, merges), **special)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|end|>"]})
    made.chat_template = chat_template
    return made


def metaspace(make: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    scheme: Any = "first" if make == "metaspace_first" else "always"
    if make == "unigram":
        scores = [(piece, -10.0 / len(piece)) for piece in vocabulary]
        built = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    else:
        built = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=make == "unigram")
    bytes_too = [decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), *bytes_too])
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return built


def ids_of(tokenizer: PreTrainedTokenizerBase, *pieces: str) -> list[int]:
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(pieces))
    assert None not in ids, pieces
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids, pieces
    return ids


def text_of(tokenizer: PreTrainedTokenizerBase, prompt: Any, *written: str, **settings: Any) -> str:
    """Predict with a model that writes these pieces, and then EOS, behind the last token of the prompt."""
    start = chain_writing(tokenizer, [], **settings).prompt_encoder(prompt)[-1]
    module = chain_writing(tokenizer, [start, *ids_of(tokenizer, *written)], **settings)
    (pairs,) = quiet_trainer().predict(module, loader([prompt]))
    (one,), (other,) = pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts
    assert one == other
    return one


def chain_writing(tokenizer: PreTrainedTokenizerBase, ids: list[int], **settings: Any) -> XPOLightningModule:
    """Build a module whose model writes each token behind the one before it, and EOS behind the last."""
    assert len(set(ids)) == len(ids), "each token must have one that follows it"
    end = tokenizer.eos_token_id
    chain = ChainModel(dict(zip(ids, [*ids[1:], end], strict=False)), end, len(tokenizer))
    chain.config.max_position_embeddings = 1024
    module = chain_module(chain, tokenizer, sampling=Sampling(max_new_tokens=9, **settings))
    module.configure_model()
    return module


# ---- the first space ----


@pytest.mark.parametrize("make", MAKES)
def test_a_completion_keeps_its_first_space(make: str):
    """The prompt and the completion are read one behind the other: 'the cat' + ' sat on', never 'the catsat on'."""
    tokenizer = sentencepiece(make)
    assert text_of(tokenizer, "the cat", "▁sat", "▁on") == " sat on"
    assert text_of(tokenizer, "the cat", "sat", "▁on") == "sat on", "the model may go on with the word"
    assert text_of(tokenizer, "the cat", "▁", "▁sat") == "  sat"
    assert text_of(tokenizer, "the cat") == ""


def test_the_reward_reads_what_the_policy_wrote():
    tokenizer, seen = sentencepiece("llama"), []

    def record(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        seen.extend(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    cat, sat, mat = ids_of(tokenizer, "▁cat", "▁sat", "▁mat")
    chain = ChainModel({cat: sat, sat: mat}, tokenizer.eos_token_id, len(tokenizer))
    module = chain_module(chain, tokenizer, reward=PythonReward(record), sampling=Sampling(max_new_tokens=5))
    fit_quietly(module, ["a cat", "the cat"])
    assert seen == ["a cat sat mat", "the cat sat mat"] * 2


@pytest.mark.parametrize("make", MAKES)
def test_a_space_before_a_full_stop_stays(make: str):
    """Cleaning up spaces would show the reward another text than the one that was written."""
    tokenizer = sentencepiece(make)
    tokenizer.clean_up_tokenization_spaces = True
    assert text_of(tokenizer, "the cat", "▁sat", "▁", ".") == " sat ."


def test_words_that_are_joined_by_spaces_are_joined_to_the_prompt_too():
    """A word-level tokenizer without a decoder puts a space between any two tokens."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "the", "cat", "sat", "on"])}
    built = Tokenizer(models.WordLevel(words, "<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", eos_token="</s>")
    assert text_of(tokenizer, "the cat", "sat", "on") == " sat on"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_prompts_of_any_length(length: int):
    """Only the end of a long prompt is decoded; here all of it but one word is bytes of characters."""
    tokenizer = sentencepiece("llama")
    assert text_of(tokenizer, "é" * length + " cat", "▁sat") == " sat"
    assert text_of(tokenizer, "cat " + "日" * length, "▁sat") == " sat"


# ---- stop strings, special tokens ----


@pytest.mark.parametrize("make", MAKES)
def test_a_stop_string_may_begin_with_the_first_space(make: str):
    tokenizer = sentencepiece(make)
    assert text_of(tokenizer, "the cat", "▁sat", "▁on", stop_strings=[" sat"]) == ""
    assert text_of(tokenizer, "the cat", "▁sat", "▁on", stop_strings=[" on"]) == " sat"
    assert text_of(tokenizer, "the cat", "▁sat", "▁on", stop_strings=["mat"]) == " sat on"
    assert text_of(tokenizer, "the cat", "▁sat", "<|end|>", stop_strings=["<|end|>"]) == " sat"


def test_special_tokens_are_left_out_and_spaces_behind_them_stay():
    assert text_of(sentencepiece("llama"), "the cat", "▁sat", "<|end|>", "▁on") == " sat on"
    assert text_of(sentencepiece("llama"), "the cat", "<|end|>", "▁on") == " on"


# ---- chats ----

LLAMA_2 = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
ENDS_WITH_SPECIAL = "{% for message in messages %}{{ message['content'] }}{% endfor %}<|im_start|>"
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("make", MAKES)
def test_what_follows_the_header_of_a_chat_is_the_text(make: str):
    tokenizer = sentencepiece(make, CHAT_TEMPLATE)
    assert text_of(tokenizer, USER, "Hello", "▁cat") == "Hello cat"
    assert text_of(sentencepiece(make, LLAMA_2), USER, "▁Hello", "▁cat") == " Hello cat"
    begun = [*USER, {"role": "assistant", "content": "the cat"}]
    assert text_of(sentencepiece(make, "{{ messages[-1]['content'] }}"), begun, "▁sat") == " sat"


@pytest.mark.parametrize(
    ("make", "first", "text"),
    [
        ("llama", "Hello", "Hello cat"),
        ("llama", "▁Hello", " Hello cat"),
        ("metaspace_first", "▁Hello", " Hello cat"),
        ("llama_legacy", "▁Hello", "Hello cat"),
        ("llama_legacy", "Hello", "Hello cat"),
        ("metaspace_always", "▁Hello", "Hello cat"),
    ],
)
def test_a_space_that_the_tokenizer_puts_behind_special_tokens_is_not_text(make: str, first: str, text: str):
    """`<|im_start|>Hello` and `<|im_start|>` + `▁Hello` are the same text to some tokenizers, and two to others."""
    tokenizer = sentencepiece(make, ENDS_WITH_SPECIAL)
    assert text_of(tokenizer, USER, first, "▁cat") == text
    assert text_of(tokenizer, USER, first, "▁cat", stop_strings=["mat"]) == text


# ---- bytes ----


def test_characters_of_several_bytes():
    """Behind a prompt that ends with such a character the bytes of both must not run into one another."""
    tokenizer = sentencepiece("llama")
    smile = ("<0xF0>", "<0x9F>", "<0x98>", "<0x80>")
    for prompt in ("the cat", "the cat 日", "日" * 20):
        assert text_of(tokenizer, prompt, *smile, "▁sat") == "😀 sat"
        assert text_of(tokenizer, prompt, *smile[:3]).strip("\ufffd") == ""


def test_byte_level_tokenizers():
    tokenizer = make_tokenizer("chat")
    assert text_of(tokenizer, "the cat", "Ġthe") == " the"
    assert text_of(tokenizer, "the cat", "Ã", "©", "Ġthe") == "é the"
    assert text_of(tokenizer, "the café", "Ã", "ª", "Ġthe") == "ê the"
    assert text_of(tokenizer, USER, "the", "Ġcat") == "the cat"


def test_half_a_character_at_the_end_of_a_prompt_is_completed():
    """Token ids may end where text cannot: the first byte of é is the prompt's, the second is the completion's."""
    tokenizer = make_tokenizer()
    first, second, the = ids_of(tokenizer, "Ã", "©", "Ġthe")
    cat = tokenizer("the cat")["input_ids"]
    module = chain_writing(tokenizer, [first, second, the])
    batch = {"prompt": ["the cat"], "prompt_ids": [[*cat, first]]}
    (pairs,) = quiet_trainer().predict(module, DataLoader([batch], batch_size=None))
    assert pairs.completions.by_policy.texts == ("é the",)


# ---- another engine ----


class Elsewhere(RolloutEngine):
    """Gets tokens from somewhere else."""

    def sync(self, policy: Any) -> None:
        """Nothing to bring."""

    def write(self, prompts: Any, asked: Any) -> list[Any]:
        return []


@pytest.mark.parametrize("make", MAKES)
def test_what_an_engine_wrote_reads_the_same(make: str):
    tokenizer, engine = sentencepiece(make), Elsewhere()
    engine.begin(LocalRollout(tokenizer, Sampling(max_new_tokens=4), [tokenizer.eos_token_id]))
    prompts = prompts_of([tokenizer("the cat")["input_ids"], tokenizer("a mat on")["input_ids"]])
    rows = [ids_of(tokenizer, "▁sat", "</s>"), ids_of(tokenizer, "▁the", "▁mat", "</s>")]
    made = engine.completions(rows, [[-1.0] * len(row) for row in rows], prompts)
    assert made.texts == (" sat", " the mat")


# ---- from text to tokens ----


def from_columns(prompts: list[Any], columns: dict[str, list[Any]]) -> list[str]:
    return list(columns["answer"])


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("text", [" sat on", "sat on", "  sat", ".", "", "\nsat", " é"])
def test_a_given_text_becomes_tokens_that_read_the_same_behind_the_prompt(make: str, text: str):
    """Tokenized alone, 'sat' has a space before it, and so 'the cat' + 'sat' would become 'the cat sat'."""
    tokenizer = sentencepiece(make)
    chain, sampling = ChainModel({}, 2, len(tokenizer)), Sampling(max_new_tokens=20)
    module = chain_module(chain, tokenizer, sampler=PythonSampler(from_columns), sampling=sampling)
    module.configure_model()
    prompts = as_prompts({"prompt": ["the cat"], "answer": [text]}, module.prompt_encoder, module.device)
    written = module.collector.collect(module.policy, prompts, noise(), training=True).completions.by_sampler
    ids, prompt = written.ids[0].tolist(), tokenizer("the cat")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([*prompt, *ids[:-1]])[len(tokenizer.decode(prompt)) :] == text
    assert written.texts == (text,)
