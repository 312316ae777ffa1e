"""The byte-level tokenizer that the policy and the reward model share: one token for each word of the grammar."""

from collections import Counter
from collections.abc import Iterable
from typing import Final, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY: Final = 1024
PAD: Final = "<pad>"
BOS: Final = "<bos>"
EOS: Final = "<eos>"
UNK: Final = "<unk>"
MAX_LENGTH: Final = 256


def make_tokenizer(texts: Iterable[str], padding_side: Literal["left", "right"]) -> PreTrainedTokenizerFast:
    """Makes the tokenizer; a plain call of it adds neither BOS nor EOS.

    Args:
        texts: Texts of which every word becomes one token, with the space before it; other words fall into bytes.
        padding_side: Where a batch is padded.

    Returns:
        The tokenizer.
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    pieces = [PAD, BOS, EOS, UNK, *sorted(splitter.alphabet())]
    pieces += sorted(word for word in words if len(word) > 1)
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True))
    inner.pre_tokenizer = splitter
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side=padding_side,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
