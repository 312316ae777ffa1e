"""What both sides of the parity check are given: tiny models, and pairs that nobody samples.

Imported where TRL is and where this package is, so it imports neither. Every number is drawn from a name, so that both
sides, and every machine, have the same.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 200
PAD, BOS, EOS = 197, 198, 199
MOST = 8
"""Most tokens of a completion."""
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 64},
        **{"bos_token_id": None, "eos_token_id": None},
    ),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=4, sliding_window=64),
}
TOKENIZERS: dict[str, dict[str, str]] = {
    "distinct": {"pad_token": "<pad>", "eos_token": "<eos>"},
    "pad_is_eos": {"pad_token": "<eos>", "eos_token": "<eos>"},
    "bos_is_eos": {"pad_token": "<pad>", "bos_token": "<eos>", "eos_token": "<eos>"},
}
REWARD_TOKENIZERS = (("its own tokenizer", "distinct", 50), ("pad is EOS", "pad_is_eos", 0))
"""What it is called, which special tokens are which, and by how much the reward model numbers words otherwise."""


@dataclass(frozen=True)
class Case:
    """A step that both sides take.

    Args:
        name: What it is called.
        architecture: Of policy and reference.
        prompts: Token ids. B rows
        by_policy: The policy's completions, as token ids. B rows
        by_sampler: The reference's.
        policy_scores: What the reward model says of the policy's completions, before any penalty. B numbers
        sampler_scores: Of the reference's.
        tokenizer: Which special tokens are which.
        loss: `sigmoid` or `ipo`.
        penalty: Missing-EOS penalty; None is off.
        accumulate: Batches that the step is cut into.
        lora: Whether the policy is the reference with adapters.
        alpha: Weight of the exploration term.
        beta: Strength of the KL constraint.
    """

    name: str
    architecture: str
    prompts: Sequence[Sequence[int]] = field(repr=False)
    by_policy: Sequence[Sequence[int]] = field(repr=False)
    by_sampler: Sequence[Sequence[int]] = field(repr=False)
    policy_scores: Sequence[float]
    sampler_scores: Sequence[float]
    tokenizer: str = "distinct"
    loss: str = "sigmoid"
    penalty: float | None = 1.0
    accumulate: int = 1
    lora: bool = False
    alpha: float = 0.05
    beta: float = 0.3

    def texts(self) -> list[str]:
        """Return the prompts as text."""
        return [text_of(row) for row in self.prompts]

    def models(self) -> tuple[nn.Module, nn.Module]:
        """Return the policy, which with `lora` has no adapters yet, and the reference."""
        reference = make_model(self.architecture)
        policy = make_model(self.architecture)
        if not self.lora:
            move(policy, self.architecture)
        return policy, reference


def base_case(architecture: str, lengths: Sequence[int] = (5, 3, 7, 2, 4, 6)) -> Case:
    """Return six pairs; of the completions of 8 tokens three were cut, and one ended with its last token.

    The penalty of 1 turns the preference of the second pair round, and that of the fourth; no scores are equal.
    """
    draw = random.Random(f"pairs of {architecture}")
    ended_by_policy, ended_by_sampler = (1, 0, 1, 0, 1, 1), (0, 1, 1, 1, 1, 1)
    return Case(
        name=architecture,
        architecture=architecture,
        prompts=[words(draw, length) for length in lengths],
        by_policy=[_completion(draw, *each) for each in zip((4, 8, 1, 8, 3, 5), ended_by_policy, strict=True)],
        by_sampler=[_completion(draw, *each) for each in zip((8, 2, 6, 3, 8, 5), ended_by_sampler, strict=True)],
        policy_scores=(0.5, 0.75, -1.0, 0.25, 2.0, 0.0),
        sampler_scores=(0.25, 0.5, 1.0, 0.0, -1.5, 0.125),
    )


def cases() -> dict[str, Case]:
    """Return every case by its name."""
    llama = base_case("llama")
    listed = [
        *(base_case(architecture) for architecture in ARCHITECTURES if architecture != "gpt2"),
        replace(base_case("gpt2", lengths=(4,) * 6), name="gpt2, prompts of one length"),
        replace(llama, name="llama, IPO", loss="ipo"),
        replace(llama, name="llama, LoRA", lora=True),
        replace(base_case("gpt2"), name="gpt2, prompts of unequal length"),
        replace(llama, name="llama, 2 batches", accumulate=2),
        replace(llama, name="llama, 6 batches", accumulate=6),
        replace(llama, name="llama, pad is EOS", tokenizer="pad_is_eos"),
        replace(
            llama,
            name="llama, BOS is EOS",
            tokenizer="bos_is_eos",
            prompts=[[EOS, *prompt] for prompt in llama.prompts],
        ),
        replace(llama, name="llama, EOS in the prompt", prompts=[[*prompt, EOS, 7] for prompt in llama.prompts]),
        replace(llama, name="llama, equal scores", policy_scores=(0.0,) * 6, sampler_scores=(0.0,) * 6, penalty=None),
        replace(llama, name="llama, identical pairs", by_sampler=llama.by_policy, penalty=None),
        _one_token_case(),
    ]
    return {case.name: case for case in listed}


AGREE = ("llama", "gpt_neox", "qwen2", "gemma2", "gpt2, prompts of one length", "llama, IPO", "llama, LoRA")
"""Cases in which TRL is right."""


def _one_token_case() -> Case:
    """Return 500 pairs of one token each, drawn from the policy and from the reference: a KL that can be summed."""
    draw = random.Random("one token")
    prompts = [[row % 190, *words(draw, 2), row // 190] for row in range(500)]
    case = Case("llama, one token", "llama", prompts, [], [], (0.5,) * 500, (0.0,) * 500, penalty=None)
    generator = torch.Generator().manual_seed(0)
    sides = []
    for model in case.models():
        tokens = torch.multinomial(next_token(model, prompts).exp(), 1, generator=generator)
        sides.append(tokens.tolist())
    return replace(case, by_policy=sides[0], by_sampler=sides[1])


@torch.no_grad()
def next_token(model: nn.Module, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return log-probabilities of the token after prompts of one length, (B, V) in float64."""
    logits: torch.Tensor = model.double()(input_ids=torch.tensor(prompts)).logits[:, -1]
    model.float()
    return logits.log_softmax(1)


def words(draw: random.Random, count: int) -> list[int]:
    """Draw tokens that are words."""
    return [draw.randrange(PAD) for _ in range(count)]


def _completion(draw: random.Random, length: int, ended: int) -> list[int]:
    return [*words(draw, length - ended), *[EOS] * ended]


def text_of(ids: Sequence[int]) -> str:
    """Write tokens as text, which the tokenizer turns back into them."""
    special = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>"}
    return " ".join(special.get(token, f"w{token}") for token in ids)


def make_tokenizer(kind: str, shift: int = 0) -> PreTrainedTokenizerFast:
    """Build a tokenizer that has a token for each word, and adds none.

    Args:
        kind: Which special tokens are which.
        shift: Added to the numbers of all words, for a tokenizer that numbers them in another way.
    """
    vocabulary = {f"w{token}": (token + shift) % PAD for token in range(PAD)}
    vocabulary |= {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **TOKENIZERS[kind])


def make_model(architecture: str) -> nn.Module:
    """Build a model without dropout; `move` makes another one of it."""
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
            weight.copy_(centre + 0.4 * normal(f"{architecture} {name}", weight))
    return model


@torch.no_grad()
def move(model: nn.Module, name: str) -> None:
    """Add noise to weights."""
    for each, weight in model.named_parameters():
        weight.add_(0.1 * normal(f"moved {name} {each}", weight))


@torch.no_grad()
def fill_adapters(model: nn.Module) -> None:
    """Give adapters weights that change something."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.copy_(0.3 * normal(name, weight))


def normal(name: str, like: torch.Tensor) -> torch.Tensor:
    """Draw normal numbers that belong to a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def reward_model() -> nn.Module:
    """Build a reward model of random weights."""
    config = transformers.LlamaConfig(**{**GROUPED, "pad_token_id": PAD}, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if weight.ndim == 1 else 0.0
            weight.copy_(centre + 0.4 * normal(f"reward {name}", weight))
    return model.eval()
