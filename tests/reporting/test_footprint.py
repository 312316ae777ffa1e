"""Memory worked out from shapes: every formula against numbers worked by hand, and against what torch keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MambaConfig, OPTConfig

from benchmarks.scale.shapes import RunInputs, adapter_count, estimate
from xpo_lightning.reporting.memory.estimate import (
    cache_bytes,
    head_bytes,
    layer_bytes,
    micro_batch_bytes,
    reading_bytes,
    rollout_bytes,
    scoring_bytes,
)
from xpo_lightning.reporting.memory.model_shape import Shape, weight_count

GIB = 2**30
LLAMA_7B = Shape(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocabulary=32000, tied=False
)
LLAMA_3_8B = replace(LLAMA_7B, kv_heads=8, intermediate=14336, vocabulary=128256)
SMALL = Shape(layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, vocabulary=100, tied=True)


# ---- counts ----


def test_weights_of_llama_7b_are_those_that_it_is_named_for():
    """A layer: 4 x 4096^2 = 67,108,864 of attention, 3 x 4096 x 11008 = 135,266,304, two norms of 4096: 202,383,360.

    32 of them: 6,476,267,520. Embedding and head: 2 x 32000 x 4096 = 262,144,000. The last norm: 4096.
    """
    assert weight_count(LLAMA_7B) == 6_476_267_520 + 262_144_000 + 4096 == 6_738_415_616


def test_shared_heads_of_keys_and_a_tied_head_are_counted_once():
    """Llama 3 8B, a layer: attention 4096 x 128 x 2 x (32 + 8) = 41,943,040, feed-forward 176,160,768, norms 8192.

    All 32: 6,979,584,000. Embeddings: 2 x 525,336,576. The last norm: 4096. Together 8,030,261,248, its true size.
    """
    assert weight_count(LLAMA_3_8B) == 8_030_261_248
    assert weight_count(replace(LLAMA_3_8B, tied=True)) == 8_030_261_248 - 525_336_576


@pytest.mark.parametrize(("arch", "left_out"), [("llama", 0), ("qwen2", 0.02), ("gpt_neox", 0.06), ("gpt2", 0.12)])
def test_counted_weights_are_those_of_the_model_but_for_biases_and_positions(arch: str, left_out: float):
    config = CONFIGS[arch]()
    true = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    counted = weight_count(Shape.of(config))
    assert true * (1 - left_out) <= counted <= true


def test_adapters_of_llama_7b_at_rank_16():
    """A layer: q, k, v, o 16 x 8192 = 131,072 each, and three of 16 x (4096 + 11008) = 241,664: 1,249,280."""
    assert adapter_count(LLAMA_7B, 16) == 32 * 1_249_280 == 39_976_960


def test_keys_and_values_of_llama_7b_take_half_a_mebibyte_a_token():
    """2 x 32 layers x 32 heads x 128 x 2 bytes = 524,288."""
    assert cache_bytes(LLAMA_7B, 1, 2) == 524_288
    assert cache_bytes(LLAMA_3_8B, 10, 2) == 10 * 524_288 // 4


# ---- activations ----


def test_a_layer_of_llama_7b_keeps_a_token_in_bfloat16():
    """Norms: 2 x 4096 x (4 + 2 + 2) = 65,536. Attention: 128 x (2 x 32 + 2 x 32) = 16,384 numbers, inside 4 x 11008 =
    44,032: 60,416 x 2 bytes = 120,832. Together 186,368 bytes.
    """
    assert layer_bytes(LLAMA_7B, 2) == 186_368


def test_a_layer_without_a_gate_keeps_less():
    """Pythia-14m in float32: norms 2 x 128 x 8 = 2048; (32 x (8 + 8 + 8) + 2 x 512) x 4 = 7168."""
    pythia = Shape(6, 128, 4, 4, 32, 512, 50304, gated=False)
    assert layer_bytes(pythia, 4) == 9216


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Note the bytes of each storage that autograd keeps."""
    storages: dict[int, int] = {}
    held = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield storages


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_a_layer_keeps_what_torch_keeps(arch: str):
    """The difference between a model of two layers and one of one, in float32, weights left out."""
    config, tokens = CONFIGS[arch](), 64
    config.hidden_size, config.intermediate_size = 128, 512
    kept = []
    for layers in (1, 2):
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        with kept_for_backward() as storages:
            model.base_model(input_ids=torch.arange(tokens)[None], use_cache=False)
        kept.append(sum(size for place, size in storages.items() if place not in own))
    shape = Shape.of(config)
    assert tokens * layer_bytes(shape, 4) == pytest.approx(kept[1] - kept[0], rel=0.1)


def test_the_head_keeps_probabilities_up_to_a_limit():
    """10 tokens, 100 words, width 8, float32: 4000 of probabilities, 3 x 320 of states, 3200 of the head's gradient.

    With 2^20 tokens it would be 100 x 2^20 probabilities, above 2^26: 2^26 x 8 bytes instead.
    """
    assert head_bytes(SMALL, 10, 4, trained=True) == 4000 + 960 + 3200
    assert head_bytes(SMALL, 10, 4, trained=False) == 4960
    assert head_bytes(SMALL, 2**20, 4, trained=False) == 2**26 * 8 + 3 * 2**20 * 8 * 4


def test_reading_needs_the_widest_part_of_one_layer():
    """5 tokens x 4 bytes x (2 x 8 + the larger of 2 x (2 x 4 + 2 x 2) = 24 and 3 x 16 = 48)."""
    assert reading_bytes(SMALL, 5, 4) == 5 * 4 * (16 + 48)


# ---- the phases of a step ----

STEP = RunInputs(SMALL, rows=3, prompt_tokens=10, new_tokens=4, micro_batch_size=2, reward_rows=2)


def test_rollout_holds_prompts_twice_and_completions_once():
    """3 rows x (2 x 10 + 4) tokens x 2 x 2 layers x 2 heads x 2 x 4 bytes = 72 x 64 = 4608.

    Reading 30 tokens takes 30 x 4 x 64 = 7680; drawing from 3 x 3 x 100 numbers takes 3600.
    """
    assert rollout_bytes(STEP) == 4608 + 7680
    assert rollout_bytes(replace(STEP, read_tokens=1)) == 4608 + 3600


def test_reward_model_reads_rows_of_prompt_and_completion():
    """2 rows of 14 tokens: keys and values 28 x 64, and reading 28 x 4 x 64."""
    assert scoring_bytes(replace(STEP, reward=SMALL)) == 28 * 64 + 28 * 256
    assert scoring_bytes(STEP) == 0


def test_micro_batch_computes_a_prompt_once():
    """Layers: 2 pairs have 20 prompt tokens and 2 x 2 x 4 = 16 of completions; a token keeps 2 x 8 x 12 = 192 of norms
    and 4 x (2 x 12 + 64) = 352; the prompts' keys and values are copied, twice 20 of 2 x 2 x 2 x 4 = 32 bytes.
    Head: 16 tokens keep 6400 + 1536, and its gradient 3200.
    """
    layers = 2 * (36 * 544 + 40 * 32)
    assert micro_batch_bytes(STEP) == layers + 6400 + 1536 + 3200


def test_checkpointing_keeps_inputs_of_layers_and_one_layer():
    """It reads prompts twice: 40 + 16 tokens, each 2 layers x 8 x 4 bytes, and one layer's 544."""
    plan = replace(STEP, gradient_checkpointing=True)
    assert micro_batch_bytes(plan) == 56 * (64 + 544) + 6400 + 1536 + 3200


def test_mixed_precision_holds_converted_weights():
    plain, mixed = STEP, replace(STEP, compute_bytes=2)
    assert micro_batch_bytes(replace(mixed, cast_weights=1000)) - micro_batch_bytes(mixed) == 2000
    assert micro_batch_bytes(replace(plain, cast_weights=1000)) == micro_batch_bytes(plain)


# ---- whole runs ----


def test_all_weights_of_llama_7b_in_float32_need_five_copies():
    """6,738,415,616 x 4 bytes = 25.1 GiB, for the policy, the reference, the gradient, and Adam's two: 125.5 GiB."""
    foot = estimate(RunInputs(LLAMA_7B))
    copy = 6_738_415_616 * 4
    assert (foot.policy, foot.reference, foot.gradients, foot.optimizer) == (copy, copy, copy, 2 * copy)
    assert foot.standing == 5 * copy
    assert foot.standing / GIB == pytest.approx(125.5, abs=0.05)
    assert foot.peak == 5 * copy + max(foot.rollout, foot.micro_batch, foot.update)
    assert foot.checkpoint == 3 * copy, "the weights and Adam's state"


def test_adapters_on_llama_7b_in_bfloat16_fit_a_small_gpu():
    """Weights 13,476,831,232; adapters 39,976,960 x 4 bytes, four times with gradient and Adam's state."""
    half = {"weight_bytes": 2, "compute_bytes": 2, "cache_bytes": 2}
    foot = estimate(RunInputs(LLAMA_7B, **half, lora_rank=16, rows=8, micro_batch_size=1))
    adapters = 39_976_960 * 4
    assert foot.reference == 0
    assert foot.standing == 13_476_831_232 + 4 * adapters
    assert foot.checkpoint == 3 * adapters
    assert foot.peak < 24 * GIB


def test_weights_that_are_known_take_the_place_of_those_counted():
    foot = estimate(replace(STEP, policy_weights=1000))
    assert (foot.policy, foot.reference, foot.gradients, foot.optimizer) == (4000, 4000, 4000, 8000)


def test_copies_of_the_policy_are_of_what_is_trained():
    foot = estimate(replace(STEP, copies=2, lora_rank=1))
    assert foot.copies == 2 * adapter_count(SMALL, 1) * 4
    assert foot.checkpoint == 5 * adapter_count(SMALL, 1) * 4


# ---- shapes of configs ----


def test_shape_is_read_from_a_config():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    assert Shape.of(config) == LLAMA_7B


def test_shape_of_models_without_gates_and_with_other_names():
    opt = Shape.of(OPTConfig(hidden_size=16, ffn_dim=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=50))
    assert (opt.intermediate, opt.gated, opt.head_dim) == (40, False, 4)
    assert not Shape.of(BertConfig()).gated
    gpt2 = Shape.of(CONFIGS["gpt2"]())
    assert (gpt2.hidden, gpt2.layers, gpt2.intermediate, gpt2.gated) == (32, 2, 128, False)


def test_what_is_no_transformer_has_no_shape():
    with pytest.raises(ValueError, match="mamba"):
        Shape.of(MambaConfig())
