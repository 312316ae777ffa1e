"""Causal language models that are in no list of transformers, each with a habit that a batched path may trip over."""

from dataclasses import dataclass
from typing import Any

import torch
from conftest import VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithPast
from transformers.utils import ModelOutput

WIDTH, HEADS, LAYERS, LONGEST = 32, 4, 2, 64


class StrangerConfig(PreTrainedConfig):
    """Sizes by the names that transformers uses, and a window by a name of its own."""

    model_type = "stranger"

    def __init__(self, reach: int = 6, comfort: int = 16, **more: Any) -> None:
        self.reach, self.comfort = reach, comfort
        self.vocab_size, self.hidden_size, self.num_hidden_layers = VOCABULARY, WIDTH, LAYERS
        self.num_attention_heads, self.max_position_embeddings = HEADS, LONGEST
        super().__init__(**more)


class Layer(nn.Module):
    """Attention to what is visible, and a two-layer perceptron."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, visible: Tensor, cache: Cache | None = None) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = self.qkv(self.before(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        seen = scaled_dot_product_attention(query, key, value, visible)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.down(self.up(self.between(x)).relu())


class Stranger(PreTrainedModel, GenerationMixin):
    """Embeddings, layers and a head; each kind has its own forward."""

    config_class = StrangerConfig

    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.post_init()

    def run(self, x: Tensor, visible: Tensor, cache: Cache | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, visible, cache)
        return self.lm_head(self.norm(x))


class Reach(Stranger):
    """Sees the last `reach` columns of the batch; takes position ids, and attends to padding as to any token."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if past_key_values is not None or not use_cache else DynamicCache()
        before = 0 if cache is None else cache.get_seq_length()
        here = torch.arange(before, before + input_ids.shape[1])
        back = here[:, None] - torch.arange(len(here) + before)
        x = self.embed_tokens(input_ids) + self.places(here if position_ids is None else position_ids)
        logits = self.run(x, (back >= 0) & (back < self.config.reach), cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


@dataclass
class RecurrentOutput(ModelOutput):
    """Logits and the state to go on from."""

    logits: Tensor | None = None
    state: list[Tensor] | None = None


class Recurrent(Stranger):
    """A gated linear recurrence; hands on its state as RWKV does, and reads padding as any token."""

    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.post_init()

    def forward(
        self, input_ids: Tensor, state: list[Tensor] | None = None, use_cache: bool | None = None, **_: Any
    ) -> RecurrentOutput:
        x = self.embed_tokens(input_ids)
        state = [torch.zeros_like(x[:, 0])] * LAYERS if state is None else state
        after = []
        for layer, hidden in zip(self.layers, state, strict=True):
            gate, value, out = layer(self.norm(x)).chunk(3, -1)
            seen = []
            for step in range(x.shape[1]):
                hidden = gate[:, step].sigmoid() * hidden + value[:, step].tanh()  # noqa: PLW2901
                seen.append(hidden)
            x = x + torch.stack(seen, 1) * out.sigmoid()
            after.append(hidden)
        return RecurrentOutput(logits=self.lm_head(self.norm(x)), state=after if use_cache else None)


class Cacheless(Stranger):
    """Heeds the mask, and numbers positions by it; its forward takes no cache, nor anything else."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = (mask.long().cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(input_ids.shape[1], input_ids.shape[1]).tril().bool()
        # Padding sees itself, since a softmax over nothing is not a number.
        visible = (causal & mask[:, None].bool()) | torch.eye(input_ids.shape[1]).bool()
        return CausalLMOutput(logits=self.run(self.embed_tokens(input_ids) + self.places(places), visible[:, None]))


class Stretched(Stranger):
    """Squeezes the positions of all rows once the batch is wider than `comfort`; has no cache."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        length = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = (mask.long().cumsum(1) - 1).clamp(min=0)
        x = self.embed_tokens(input_ids) + self.places(places) * min(1.0, self.config.comfort / length)
        visible = (torch.ones(length, length).tril().bool() & mask[:, None].bool()) | torch.eye(length).bool()
        return CausalLMOutput(logits=self.run(x, visible[:, None]))


class Bidirectional(Stranger):
    """Sees the tokens that it is to predict, so no log-probability of its is one."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        length = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed_tokens(input_ids) + self.places(torch.arange(length))
        return CausalLMOutput(logits=self.run(x, mask[:, None, None].bool().expand(-1, 1, length, -1)))


STRANGERS = {kind.__name__.lower(): kind for kind in (Reach, Recurrent, Cacheless, Stretched, Bidirectional)}
