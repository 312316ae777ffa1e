"""What does not go with weights that are spread over processes is refused before they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from two_processes import in_two

from xpo_lightning import InputError, LoRASpec, MixtureSampler, RolloutEngine, XPOLightningModule
from xpo_lightning.core.fault_tolerance.guard import Guard
from xpo_lightning.models.forward.joint_passes import joint_passes
from xpo_lightning.models.reference import Reference
from xpo_lightning.models.sharding import shard_all
from xpo_lightning.training.config_checks import refuse_sharding


class Engine(RolloutEngine):
    copies_weights = True

    def sync(self, policy: Any) -> None:
        pass

    def write(self, prompts: Any, asked: Any) -> list[Any]:
        return []


class PolicyAlone(Engine):
    has_reference = False


@pytest.mark.parametrize(
    ("options", "offloads", "message"),
    [
        ({"rollout": PolicyAlone()}, False, "have a server write them .model.rollout.init_args.reference_url."),
        ({"rollout": Engine(sync_every=2)}, False, "model.rollout.init_args.sync_every needs the policy's weights"),
        ({"rollout": Engine(ahead=1)}, False, "model.rollout.init_args.ahead needs the policy's weights"),
        ({"rollout": Engine(), "sampler": MixtureSampler()}, False, "model.sampler=MixtureSampler writes with"),
        ({"lora": LoRASpec(r=2)}, True, "trainer.strategy.init_args.offload_reference moves .* with model.lora"),
    ],
)
def test_options_that_need_whole_weights_are_refused(
    make_module: Callable[..., XPOLightningModule], options: dict[str, Any], offloads: bool, message: str
):
    with pytest.raises(InputError, match=message):
        refuse_sharding(make_module(**options), offloads=offloads)


def test_an_engine_that_writes_both_sides_is_accepted(make_module: Callable[..., XPOLightningModule]):
    refuse_sharding(make_module(rollout=Engine(), lora=LoRASpec(r=2)), offloads=False)
    refuse_sharding(make_module(rollout=Engine()), offloads=True)


def test_an_offloaded_reference_scores_as_it_is_and_does_not_move(model_folder: Callable[..., str]):
    """On a CPU, where the main memory is the device's: that it stays there shows in a move to another type."""
    policy = AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = policy(input_ids=ids).logits

    def run(rank: int, mesh: Any) -> Any:
        reference = Reference(policy)
        shard_all([reference], mesh, offloads=True)
        reference.is_offloaded = True
        reference.to(torch.float64)
        with Guard().together(), joint_passes(reference, device=ids.device), reference.lent() as model:
            found = model(input_ids=ids).logits.clone()
        (one, *_) = reference.parameters()
        return found.numpy(), one.dtype, isinstance(one, DTensor)

    for found, dtype, is_sharded in in_two(run):
        torch.testing.assert_close(torch.from_numpy(found), expected)
        assert dtype == torch.float32
        assert is_sharded
