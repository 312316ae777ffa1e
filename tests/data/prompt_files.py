"""Files of prompts, tokenizers for them, and a data module in one call."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xpo_lightning.core.errors import InputError
from xpo_lightning.data import PromptDataModule
from xpo_lightning.data.prompts import PromptTokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [{"prompt": f"prompt {number}", "answer": number} for number in range(10)]
TEXTS = [row["prompt"] for row in ROWS]


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = chat_template
    return fast


TOKENIZER = make_tokenizer()
CHAT = make_tokenizer(TEMPLATE)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "prompts.jsonl", ROWS)


def set_up(
    source: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    limit: int | None = None,
    stage: str | None = "fit",
    **options: Any,
) -> PromptDataModule:
    """Build a data module, attach it to a stand-in of a trainer, and set it up."""
    module = PromptDataModule(source, **options)
    encoder = None if tokenizer is None else PromptTokenizer(tokenizer, limit)
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(prompt_encoder=encoder), current_epoch=0)
    module.setup(stage)
    return module


def column(loader: Any, name: str = "prompt") -> list[Any]:
    return [value for batch in loader for value in batch[name]]


def training(source: str, name: str = "prompt", **options: Any) -> list[Any]:
    return column(set_up(source, shuffle=False, **options).train_dataloader(), name)


def refusal(source: str, **options: Any) -> str:
    """Set up, read a pass, and return the error, which must be one line."""
    with pytest.raises(InputError) as caught:
        column(set_up(source, **options).train_dataloader())
    message = str(caught.value)
    assert "\n" not in message
    return message


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streamed"])
