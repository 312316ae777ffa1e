"""Memory of a process among several, against numbers worked by hand."""

from dataclasses import replace

import pytest
from test_footprint import LLAMA_3_8B, SMALL, STEP

from benchmarks.scale.shapes import estimate, estimate_sharded
from xpo_lightning.reporting.memory.fsdp import Sharding
from xpo_lightning.reporting.memory.model_shape import layer_weight_count, root_weight_count, weight_count

# A layer: attention 8 x 2 x 2 x (4 + 2) = 192, feed-forward 3 x 8 x 16 = 384, norms 16: 592 weights, 2368 bytes.
# Outside: 100 x 8 of the embedding, which is the head too, and a norm of 8: 808 weights, 3232 bytes.
# Both layers with it: 1992 weights, 7968 bytes.


def test_weights_in_layers_and_outside_of_them():
    assert (layer_weight_count(SMALL), root_weight_count(SMALL)) == (592, 808)
    assert root_weight_count(replace(SMALL, tied=False)) == 1608
    assert 32 * layer_weight_count(LLAMA_3_8B) + root_weight_count(LLAMA_3_8B) == weight_count(LLAMA_3_8B)


def test_two_processes_hold_a_half_each_and_everything_while_they_write():
    """Policy and reference: 2 x 7968. Sampling: 4608 of keys and values and 7680 to read, as for one process."""
    part = estimate_sharded(STEP, Sharding(2))
    assert (part.parts, part.gradients, part.optimizer) == (7968, 3984, 7968)
    assert part.standing == 7968 + 3984 + 7968
    assert (part.whole, part.writing) == (2 * 7968, 4608 + 7680)
    assert part.rollout_peak == part.standing + 15936 + 12288


def test_in_a_pass_the_root_is_whole_and_three_layers_are():
    part = estimate_sharded(STEP, Sharding(2))
    assert part.passing == 3232 + 3 * 2368
    assert part.micro_batch == estimate(STEP).micro_batch
    assert part.update_peak == part.standing + part.passing + part.summing + part.micro_batch


def test_the_gradient_is_whole_until_the_last_micro_batch():
    """With several: 7968 and a buffer for the largest group, the root's 3232. With one: a layer's and the root's."""
    assert estimate_sharded(STEP, Sharding(2, micro_batches=2)).summing == 7968 + 3232
    assert estimate_sharded(STEP, Sharding(2, micro_batches=1)).summing == 3232 + 2368 + 3232


def test_adapters_are_added_up_in_place_of_the_frozen_weights():
    """Rank 1: 2 x (8 + 8) + 2 x (8 + 4) + 3 x (8 + 16) = 128 weights a layer, 512 bytes; no reference."""
    plan = replace(STEP, lora_rank=1)
    part = estimate_sharded(plan, Sharding(2))
    assert part.whole == 7968 + 1024
    assert (part.parts, part.gradients, part.optimizer) == (4496, 512, 1024)
    assert part.passing == 3232 + 3 * (2368 + 512)
    assert part.summing == 1024 + 512
    assert estimate_sharded(plan, Sharding(2, micro_batches=1)).summing == 512 + 512


def test_copies_of_the_policy_are_spread_too():
    assert estimate_sharded(replace(STEP, copies=2), Sharding(4)).parts == 7968


def test_a_part_that_does_not_divide_is_rounded_up():
    assert estimate_sharded(STEP, Sharding(5)).gradients == 1594  # 7968 / 5 = 1593.6


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_more_processes_divide_what_training_keeps_and_not_what_writing_needs(processes: int):
    """8B in float32: policy and reference are 2 x 8,030,261,248 x 4 bytes = 59.8 GiB on each of any number."""
    plan = replace(STEP, policy=LLAMA_3_8B)
    part = estimate_sharded(plan, Sharding(processes))
    assert part.whole == 2 * 8_030_261_248 * 4
    assert part.rollout_peak > part.whole
    assert part.standing * processes == pytest.approx(5 * 8_030_261_248 * 4, rel=1e-6)
