"""The reference never has dropout, whatever the mode of the modules around it."""

import pytest
from conftest import PROMPTS, naive_token_logps
from torch import nn


@pytest.mark.parametrize("trains", ["nothing", "the module itself", "a module around it"])
def test_a_module_in_train_mode_has_a_reference_without_dropout(make_module, load_model, trains):
    # GPT-2 has dropout, and `sample` is for users' own loops, which begin with `train()`.
    module = make_module("gpt2", spec={"dropout": 0.5})
    module.configure_model()
    if trains != "nothing":
        (nn.ModuleList([module]) if trains == "a module around it" else module).train()
    pairs = module.sample(PROMPTS)
    model, (written, by_reference) = load_model("gpt2"), vars(pairs.completions).values()
    for side, logps in ((written, pairs.reference_logps.by_policy), (by_reference, pairs.reference_logps.by_sampler)):
        for row, logp in enumerate(logps):
            prompt = pairs.prompts.ids[row][pairs.prompts.mask[row]].tolist()
            completion = side.ids[row][side.mask[row]].tolist()
            assert float(logp) == pytest.approx(sum(naive_token_logps(model, prompt, completion)), abs=1e-4)
