"""Log-probabilities are float32 whatever the model computes in."""

import torch
from conftest import ChainModel, completions_of, prompts_of

from xpo_lightning.models.logprobs import token_logps


@torch.no_grad()
def test_bfloat16_logits_are_normalised_in_float32():
    """The logits are rows of a table, so that they are exact in bfloat16; log-probabilities near -6 are not."""
    model = ChainModel({}, 0)
    model.table.weight.copy_(torch.randn_like(model.table.weight))
    model.bfloat16()
    found = token_logps(model, prompts_of([[7, 9]]), completions_of([[30, 40, 50]]))
    assert found.dtype == torch.float32
    exact = model.table.weight.double().log_softmax(1)
    torch.testing.assert_close(found[0].double(), exact[[9, 30, 40], [30, 40, 50]], atol=1e-5, rtol=0)
