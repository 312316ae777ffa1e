"""Loads GGUF files as transformers' defaults do not: with the right pre-tokenizer, and with dense weights."""

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

from xpo_lightning.core.errors import InputError

_PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # SmolLM and SmolLM2 split every number into its digits before the byte-level split.
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]),
}


def gguf_pre_tokenizer(file: Path, key: str) -> PreTokenizer | None:
    """Return the pre-tokenizer that a GGUF file names, if transformers would choose a wrong one, else None.

    Args:
        file: The GGUF file.
        key: The configuration key that names it, for errors.

    Raises:
        InputError: The package `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise InputError(f"{key}: '{file.name}' needs the package 'gguf' (pip install gguf)") from error
    name = GGUFReader(file).fields.get("tokenizer.ggml.pre")
    return None if name is None else _PRE_TOKENIZERS.get(name.contents())


def unpacked(gguf_file: str) -> Any:
    """Return a config that makes transformers load dense weights, which can be trained and saved."""
    from transformers import GgufConfig  # noqa: PLC0415  (GGUF files alone need it)

    return GgufConfig(gguf_file=gguf_file, dequantize=True)
