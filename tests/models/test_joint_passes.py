"""Passes of sharded models in two processes that need different numbers of them, and errors in one of the two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from two_processes import in_two

from xpo_lightning.core.distributed import all_gather_guarded, is_out_of_step
from xpo_lightning.core.errors import ConsequentError, InputError
from xpo_lightning.core.fault_tolerance.guard import Guard
from xpo_lightning.models.forward.joint_passes import joint_passes
from xpo_lightning.models.sharding import shard

CPU = torch.device("cpu")
ROWS = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
# The models (0 or 1) that each process runs, on which rows.
PLANS = [[(0, 0), (0, 1), (1, 2)], [(1, 3), (1, 0), (0, 3), (1, 1), (1, 2)]]


@pytest.fixture
def models(model_folder: Callable[..., str]) -> list[Any]:
    """Give a language model and a classifier."""
    torch.manual_seed(0)
    kinds = (AutoModelForCausalLM, AutoModelForSequenceClassification)
    return [kind.from_pretrained(model_folder("llama"), num_labels=1).eval() for kind in kinds]


def logits(model: Any, row: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([row]), use_cache=False).logits.detach().clone()


def test_processes_with_other_numbers_of_passes_of_other_models_get_what_each_would_alone(models: list[Any]):
    with torch.no_grad():
        alone = [[logits(models[which], ROWS[row]) for which, row in plan] for plan in PLANS]

    def run(rank: int, mesh: Any) -> Any:
        for model in models:
            shard(model, mesh)
        with Guard().together(), joint_passes(*models, device=CPU):
            found = [logits(models[which], ROWS[row]) for which, row in PLANS[rank]]
            numbers = all_gather_guarded(rank)  # While the other still has passes to run.
            found += [logits(models[0], ROWS[0])] * (rank == 0)
        weights = [weight for model in models for weight in model.parameters()]
        return [one.numpy() for one in found], numbers, all(isinstance(weight, DTensor) for weight in weights)

    for expected, (found, numbers, is_sharded) in zip(alone, in_two(run), strict=True):
        for one, other in zip(expected, found, strict=False):
            torch.testing.assert_close(torch.from_numpy(other), one)
        assert numbers == [0, 1]
        assert is_sharded, "nothing is left whole"


def test_an_error_in_one_process_ends_the_block_in_both(models: list[Any]):
    def run(rank: int, mesh: Any) -> Any:
        shard(models[0], mesh)
        with Guard().together(), joint_passes(models[0], device=CPU):
            logits(models[0], ROWS[0])
            if rank == 1:
                raise InputError("the reward is out")
            for _ in range(3):
                logits(models[0], ROWS[1])

    errors = in_two(run)
    assert [type(error) for error in errors] == [InputError, InputError]
    assert str(errors[0]) == "process 1: the reward is out"


def test_a_block_that_is_skipped_is_skipped_in_both(models: list[Any]):
    """And the next one works: weights are sharded again after an error."""

    def run(rank: int, mesh: Any) -> Any:
        shard(models[0], mesh)
        guard = Guard(max_skipped=1)
        with guard.step() as step, joint_passes(models[0], device=CPU):
            logits(models[0], ROWS[0])
            if rank == 0:
                raise ConsequentError("not finite")
            logits(models[0], ROWS[0])
        with guard.step(), joint_passes(models[0], device=CPU):
            found = logits(models[0], ROWS[0])
        return step.is_skipped, found.numpy()

    with torch.no_grad():
        expected = logits(models[0], ROWS[0])
    for is_skipped, found in in_two(run):
        assert is_skipped
        torch.testing.assert_close(torch.from_numpy(found), expected)


def test_an_error_in_the_middle_of_a_pass_does_not_wait_for_the_others(models: list[Any]):
    """They are in a layer, where no report reaches them: the lifeline ends them in a run."""

    def run(rank: int, mesh: Any) -> Any:
        shard(models[0], mesh)
        if rank == 0:
            models[0].lm_head.register_forward_hook(lambda *_: 1 / 0)
        try:
            with Guard().together(), joint_passes(models[0], device=CPU):
                logits(models[0], ROWS[0])
                logits(models[0], ROWS[0])
        except ZeroDivisionError as error:
            return is_out_of_step(error)

    assert in_two(run)[0] is True


def test_unsharded_models_run_as_they_are(models: list[Any]):
    with joint_passes(*models, device=CPU):
        assert not models[0]._forward_pre_hooks
