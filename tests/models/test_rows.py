"""Every way to run rows of unequal length gives the numbers of each row alone, also a way that few models need."""

import pytest
import torch
from conftest import completions_of, naive_token_logps, prompts_of, random_rows

from xpo_lightning.models.forward.unshared import Rows, unshared_features
from xpo_lightning.models.logprobs import logps_of

PROMPTS, COMPLETIONS = random_rows([9, 2, 5]), random_rows([1, 6, 4], seed=1)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # positions that are relative, and such that are learned
def test_each_way_gives_the_log_probabilities_of_a_row_alone(load_model, arch):
    model, completions = load_model(arch), completions_of(COMPLETIONS)
    for how in Rows:
        for head in (None, model.get_output_embeddings()):
            features = unshared_features(model, prompts_of(PROMPTS), completions, head, how)
            for row, found in enumerate(logps_of(features, completions, head).tolist()):
                expected = naive_token_logps(model, PROMPTS[row], COMPLETIONS[row])
                assert found == pytest.approx([*expected, *[0.0] * (6 - len(expected))], abs=1e-4), how
