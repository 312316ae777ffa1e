"""A causal language model that is a table: one row of logits for each text so far, for each of several seeds.

The first token of a text names the seed; the others are actions. So one batch trains as many independent policies as
there are seeds, with the vocabulary of each being the action set.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TabularConfig(PreTrainedConfig):
    """Sizes of a table.

    Args:
        actions: Size of the action set, and of the output vocabulary.
        length: Tokens of a completion.
        seeds: Independent tables. Token `actions + s` is the prompt that names seed s.
    """

    model_type = "tabular"

    def __init__(self, actions: int = 2, length: int = 1, seeds: int = 1, **others: Any) -> None:
        self.actions, self.length, self.seeds = actions, length, seeds
        sizes = {"vocab_size": actions + seeds, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(**{**sizes, "max_position_embeddings": length + 1, **others})
        for name, value in sizes.items():
            setattr(self, name, value)
        self.max_position_embeddings = length + 1

    @property
    def nodes(self) -> int:
        """Texts that are followed by an action: the empty one, and those of 1 to `length - 1` actions."""
        return sum(self.actions**depth for depth in range(self.length))


class Tokens(nn.Module):
    """Stands for input embeddings, of which nothing but their number is used."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_embeddings = count


class TabularLM(PreTrainedModel):
    """Looks up the logits of the next action.

    The text of no actions is node 0, and action a after node n leads to node `n * actions + 1 + a`.

    The XPO module minimises the mean over a batch, in which each seed has an equal share of the rows; the gradient is
    multiplied by the number of seeds, so that each seed's is the mean over its own rows. Optimizers that treat each
    weight by itself (SGD, Adam) then do to each seed what they would do to it alone.
    """

    config_class = TabularConfig
    config: TabularConfig

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.logits = nn.Parameter(torch.zeros(config.seeds, config.nodes, config.actions))
        self.tokens = Tokens(config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as they are."""

    def get_input_embeddings(self) -> nn.Module:
        """Return what knows how many tokens there are."""
        return self.tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Look up logits; texts must have no padding, which prompts of one token never need.

        Args:
            input_ids: New tokens; the first of a text is its seed's. (B, L)
            attention_mask: Not used.
            past_key_values: Keeps the tokens before the new ones.
            use_cache: Not used.
            logits_to_keep: Return the last so many positions alone; 0 is all.

        Returns:
            Logits of the action that follows each token. (B, L, actions)
        """
        new = input_ids.shape[1]
        ids = input_ids
        if past_key_values is not None:
            kept = input_ids[:, None, :, None].float()
            ids = past_key_values.update(kept, kept, 0)[0][:, 0, :, 0].long()
        size = self.config
        seeds = (ids[:, :1] - size.actions).clamp(0, size.seeds - 1)
        nodes = [torch.zeros_like(ids[:, 0])]
        for action in ids[:, 1:].unbind(1):
            nodes.append((nodes[-1] * size.actions + 1 + action).clamp(max=size.nodes - 1))
        kept_positions = min(logits_to_keep or new, new)
        logits = self.logits[seeds, torch.stack(nodes[-kept_positions:], 1)]
        if logits.requires_grad:
            logits.register_hook(self._times_seeds)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _times_seeds(self, gradient: Tensor) -> Tensor:
        return gradient * self.config.seeds


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModelForCausalLM.register(TabularConfig, TabularLM)
