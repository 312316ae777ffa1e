"""The attention that stands in for transformers' own honours what a model asks it for: a scale, and dropout."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import GROUPED, completions_of, prompts_of, random_rows
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xpo_lightning import Pair
from xpo_lightning.models.forward.cpu_attention import fast_attention
from xpo_lightning.models.logprobs import pair_logps


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_scale_is_the_models_own(queries, dtype, off):
    """Granite and others do not divide by the square root of the head's size, here 8."""
    query, key, value = (torch.randn(2, heads, count, 8).to(dtype) for heads, count in ((4, queries), (2, 5), (2, 5)))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    with fast_attention(torch.device("cpu")):
        ours, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, scaling=1.5)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None, scaling=1.5)
    torch.testing.assert_close(ours, theirs, atol=off, rtol=off)


@pytest.mark.parametrize(
    ("dtype", "lengths"), [(torch.bfloat16, (5, 4)), (torch.float32, (1, 2))], ids=["bfloat16", "a token at a time"]
)
def test_dropout_of_attention_stays_while_training(dtype, lengths):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, attention_dropout=0.5)).to(dtype)
    prompts, side = (random_rows([length] * 3, seed=length) for length in lengths)
    pair = Pair(completions_of(side), completions_of(side))

    def score(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return pair_logps(model, prompts_of(prompts), pair).by_policy

    model.train()
    assert not torch.equal(score(1), score(2))
    model.eval()
    assert torch.equal(score(1), score(2))
