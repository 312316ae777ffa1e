"""Makes the models whose memory is measured. Started by `measure.py`, so that loading leaves nothing behind."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig, LlamaConfig

from benchmarks.speed.assets import PYTHIA_14M, SMOLLM2, make_smollm2
from xpo_lightning import ModelSpec

LLAMA_300M = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Make a policy and a reward model, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["pythia", "smollm2", "llama-300m"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if (args.folder / "complete").exists():
        return
    torch.manual_seed(0)
    if args.name == "smollm2":
        make_smollm2(args.folder, SMOLLM2)
    else:
        save_random(args.folder, GPTNeoXConfig(**PYTHIA_14M) if args.name == "pythia" else LlamaConfig(**LLAMA_300M))
    (args.folder / "complete").touch()


def save_random(folder: Path, config: Any) -> None:
    """Save a policy and a reward model with random weights, and SmolLM2's tokenizer."""
    tokenizer = ModelSpec(SMOLLM2).load_tokenizer()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    config.num_labels, config.pad_token_id = 1, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for side in ("policy", "reward"):
        tokenizer.save_pretrained(folder / side)


if __name__ == "__main__":
    main()
