"""Tiny reward models, what they are asked, and their scores by transformers alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.rewards import Reward

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a Llama reward model whose tokenizer has a pad, an EOS and a chat template, and adds nothing to text."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder, "llama")
    save_tokenizer(folder, chat_template=CHAT, pad_token="<pad>", eos_token="<eos>")
    return str(folder)


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


def by_length(
    prompts: list[RawPrompt], completions: list[str], columns: dict[str, list[Any]], scale: float = 1.0
) -> list[float]:
    return [scale * len(completion) for completion in completions]
