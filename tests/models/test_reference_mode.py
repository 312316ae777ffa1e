"""The reference never has dropout, whatever the mode of the modules around it."""

import pytest
import torch
from conftest import PROMPTS, naive_token_logps
from torch import nn


@pytest.mark.parametrize("outer", [False, True], ids=["the module itself", "a module around it"])
def test_a_module_in_train_mode_has_a_reference_without_dropout(make_module, load_model, outer):
    # GPT-2 has dropout, and `sample` is for users' own loops, which begin with `train()`.
    module = make_module("gpt2", spec={"dropout": 0.5})
    module.configure_model()
    (nn.ModuleList([module]) if outer else module).train()
    pairs = module.sample(PROMPTS)
    model, (written, by_reference) = load_model("gpt2"), vars(pairs.completions).values()
    for side, logps in ((written, pairs.reference_logps.by_policy), (by_reference, pairs.reference_logps.by_sampler)):
        for row, logp in enumerate(logps):
            prompt = pairs.prompts.ids[row][pairs.prompts.mask[row]].tolist()
            completion = side.ids[row][side.mask[row]].tolist()
            torch.testing.assert_close(
                float(logp), sum(naive_token_logps(model, prompt, completion)), atol=1e-4, rtol=0
            )
