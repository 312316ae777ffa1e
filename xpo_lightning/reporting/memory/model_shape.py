"""The sizes of a transformer."""

from dataclasses import dataclass
from typing import Any

_UNGATED = {
    *("bert", "bloom", "codegen", "distilbert", "electra", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox"),
    *("gptj", "mpt", "opt", "phi", "roberta", "stablelm_epoch", "starcoder2", "xlm-roberta"),
}
"""Model types whose feed-forward blocks have two matrices."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer.

    Args:
        layers: Number of layers.
        hidden: Width of the hidden states.
        heads: Attention heads of a layer.
        kv_heads: Heads of keys and values; fewer than `heads` if several share them.
        head_dim: Width of a head.
        intermediate: Width inside a feed-forward block.
        vocabulary: Number of tokens in the vocabulary.
        tied: Whether the vocabulary head shares the embedding's weights.
        gated: Whether a feed-forward block has three matrices (Llama, Qwen, Mistral, Gemma), and not two (GPT-2,
            Pythia, BERT).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    gated: bool = True

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read the sizes from a transformers config.

        Raises:
            ValueError: The config is not that of a transformer.
        """
        text = config.get_text_config()
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        layers, hidden, heads, vocabulary = (getattr(text, name, None) for name in names)
        if not (layers and hidden and heads and vocabulary):
            raise ValueError(f"a {text.model_type} has no layers, hidden size, heads and vocabulary to count with")
        inner = [getattr(text, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")]
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            intermediate=next((width for width in inner if width), 4 * hidden),
            vocabulary=vocabulary,
            tied=bool(getattr(text, "tie_word_embeddings", False)),
            gated=text.model_type not in _UNGATED,
        )


def weight_count(shape: Shape) -> int:
    """Count the weights of a decoder: matrices and norms, without biases and learned positions, which are under 1 %."""
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    feed_forward = (3 if shape.gated else 2) * shape.hidden * shape.intermediate
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.layers * (attention + feed_forward + 2 * shape.hidden) + embeddings + shape.hidden


def root_weight_count(shape: Shape) -> int:
    """Count the weights outside of layers: the embedding, the vocabulary head, and the last norm."""
    return shape.vocabulary * shape.hidden * (1 if shape.tied else 2) + shape.hidden


def layer_weight_count(shape: Shape) -> int:
    """Count the weights of a layer."""
    return (weight_count(shape) - root_weight_count(shape)) // shape.layers
