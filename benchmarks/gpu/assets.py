"""Models with the shapes of public ones, random weights, and a tokenizer whose words are its tokens."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.scale.public_models import LLAMA_1B, LLAMA_8B, SMOLLM2
from xpo_lightning.reporting.memory.model_shape import Shape

TOY = Shape(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=64, vocabulary=500, tied=True)
SHAPES = {"toy": TOY, "smollm2": SMOLLM2, "1b": LLAMA_1B, "8b": LLAMA_8B}
"""The toy is there to try the measurements where there is no GPU."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORTEST, LONGEST = 64, 448
WARM_UP_PROMPTS = 128


def config_of(shape: Shape, **more: Any) -> LlamaConfig:
    """Return the configuration of a Llama of this shape."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        max_position_embeddings=4096,
        **more,
    )


def word_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of so many words, so that a text has as many tokens for every model as it has words."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, count))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def random_policy(shape: Shape, dtype: torch.dtype) -> Any:
    """Make a policy on the device."""
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)


def save_models(folder: Path, shape: Shape) -> None:
    """Save a policy and a reward model of a shape, in bfloat16."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(shape.vocabulary)
    with torch.device(DEVICE):
        reward = AutoModelForSequenceClassification.from_config(config_of(shape, num_labels=1), dtype=torch.bfloat16)
    random_policy(shape, torch.bfloat16).save_pretrained(folder / "policy")
    reward.save_pretrained(folder / "reward")
    for side in ("policy", "reward"):
        tokenizer.save_pretrained(folder / side)


def make_assets(folder: Path, name: str, prompts: int) -> Path:
    """Save the models of a name, and prompts of 64 to 448 tokens, 256 on average."""
    shape, source = SHAPES[name], random.Random(0)
    save_models(folder, shape)
    lines = []
    for _ in range(prompts + WARM_UP_PROMPTS):
        ids = [source.randrange(3, shape.vocabulary) for _ in range(source.randint(SHORTEST, LONGEST))]
        lines.append(json.dumps({"prompt": " ".join(f"w{token}" for token in ids), "prompt_ids": ids}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    torch.cuda.empty_cache()
    return folder
