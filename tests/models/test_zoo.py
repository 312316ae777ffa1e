"""One XPO step of tiny models of many families against a loop over single rows; `python tests/zoo` runs them all."""

import re
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from zoo.compare import compare
from zoo.families import BUILDABLE, UNBUILDABLE, VARIANTS, build, tiny_config
from zoo.families import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from zoo.rewards import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFYING
from zoo.rewards import UNBUILDABLE as UNUSABLE
from zoo.rewards import compare_reward
from zoo.step import MODES

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
REFUSED = {"bert (reading both ways)", "bidirectional", "cpmant", "prophetnet", "xlnet"}  # rows see what they predict
FAMILIES = [
    *("llama", "llama (dynamic NTK)", "llama (eager)", "llama (tied)", "llama (yarn)", "mistral", "qwen2 (sliding)"),
    *("gemma2", "gemma3_text", "gemma3n_text", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt"),
    *("phi3", "phimoe", "mixtral", "gpt_oss", "llama4_text", "olmo (clipped)", "cohere2"),
    *("deepseek_v3", "minimax", "mllama", "mamba", "mamba2", "rwkv", "xlstm", "jamba", "qwen3_next"),
    *("bart", "roberta", "roformer", "openai-gpt", "reach", "recurrent", "cacheless", "stretched", *sorted(REFUSED)),
]
COARSE = {
    "float32 LoRA": ["llama", "mixtral", "llama4_text", "mamba2", "gpt_neo"],
    "bfloat16": ["llama", "mpt", "falcon", "deepseek_v3", "mamba2"],
    "bfloat16 LoRA": ["gpt2", "mixtral", "falcon"],
    "float32 replayed": ["llama", "gemma3n_text", "deepseek_v3", "gpt_oss", "mpt", "bloom", "falcon"],
    "float32 dropout": ["gpt2", "phimoe", "opt", "biogpt", "dbrx"],
}
CLASSIFIERS = ["llama", "gpt2", "gpt_neo", "mistral", "phi3", "bert", "roberta", "t5", "bart", "fnet", "nystromformer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_that_of_the_naive_loop_or_refused(name: str):
    outcome = compare(partial(build, name))
    assert outcome.kind == ("refused" if name in REFUSED else "right"), str(outcome)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode, names in COARSE.items() for name in names])
def test_a_step_in_another_mode_is_that_of_the_naive_loop(mode: str, name: str):
    outcome = compare(partial(build, name), MODES[mode])
    assert outcome.kind == "right", str(outcome)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_score_is_that_of_its_row_alone(name: str):
    outcome = compare_reward(name)
    assert outcome.kind == "right", str(outcome)


def test_a_step_on_other_weights_than_those_of_the_loop_is_seen():
    calls = count()

    def other_each_time(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = build("llama", dtype)
        with torch.no_grad():
            model.lm_head.weight[5] += 0.1 * next(calls)
        return model

    assert compare(other_each_time).kind == "WRONG"


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in UNBUILDABLE])
def test_there_is_a_tiny_configuration_of_each_family(name: str):
    assert tiny_config(CONFIG_MAPPING[name], {}), f"run `python tests/zoo --only {name}`"


def test_no_family_is_named_that_transformers_does_not_have():
    assert set(UNBUILDABLE) | {family for family, _ in VARIANTS.values()} <= set(CAUSAL)
    assert set(FAMILIES) <= set(BUILDABLE)


def test_families_that_the_table_lacks_are_right_or_refused():
    """A new release of transformers may bring some; the table says what became of those that were there before."""
    known = set(re.findall(r"^\| (.+?) \|", TABLE.read_text(), re.M))
    new = [name for name in CAUSAL if name not in known | set(UNBUILDABLE)]
    outcomes = {name: compare(partial(build, name)) for name in new}
    outcomes |= {
        f"{name} as a reward": compare_reward(name) for name in CLASSIFYING if name not in known | set(UNUSABLE)
    }
    bad = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.kind not in ("right", "refused")]
    assert not bad, "run `python tests/zoo --only NAME` for each: " + "; ".join(bad)
