"""What a probe finds of a model holds for its equal, and for no other model."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from conftest import PROMPTS, fit_quietly, randomize_adapters
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from xpo_lightning import LoRASpec, XPOLightningModule
from xpo_lightning.models.forward import capabilities, remembering
from xpo_lightning.models.forward.capabilities import Sharing, rows_of, sharing_of
from xpo_lightning.models.forward.remembering import identity_of

MakeModule = Callable[..., XPOLightningModule]
LoadModel = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembering, "_found", {})


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the passes of Llama models, in the one number of a list."""
    count, forward = [0], LlamaForCausalLM.forward

    def counted(*args: object, **options: object) -> object:
        count[0] += 1
        return forward(*args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return count


def passes_of(count: list[int], action: Callable[[], object]) -> int:
    before = count[0]
    action()
    return count[0] - before


def test_equal_model_is_not_probed_again_and_goes_the_same_way(load_model: LoadModel, passes: list[int]):
    one, other = load_model(), load_model()
    assert passes_of(passes, lambda: rows_of(one, 20)) > 8
    assert passes_of(passes, lambda: rows_of(other, 20)) <= 1, "to see whether it has a plain head"
    assert rows_of(other, 20) is rows_of(one, 20)
    assert passes_of(passes, lambda: rows_of(other, 40)) == passes_of(passes, lambda: rows_of(one, 40)) == 0
    assert passes_of(passes, lambda: sharing_of(other, 20)) > 8, "another question"
    assert passes_of(passes, lambda: sharing_of(one, 20)) == 0


def test_weights_are_read_once_for_all_questions_of_a_choice(load_model: LoadModel, monkeypatch: pytest.MonkeyPatch):
    model, read = load_model(), list[nn.Module]()

    def counted(model: nn.Module) -> object:
        read.append(model)
        return identity_of(model)

    monkeypatch.setattr(capabilities, "identity_of", counted)
    rows_of(model, 60)
    assert len(read) == 1
    sharing_of(model, 60)
    assert len(read) == 2, "the model may have changed"


def test_reference_and_later_runs_need_no_probe(make_module: MakeModule, passes: list[int]):
    first, second = (passes_of(passes, lambda: fit_quietly(make_module(), PROMPTS, max_steps=1)) for _ in range(2))
    assert second < first / 2


def larger_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.lm_head.weight[5, 3] += 0.1  # type: ignore[operator,union-attr,index]


def swapped_rows(model: nn.Module) -> None:
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        weight.copy_(weight.flip(0))


def other_setting(model: nn.Module) -> None:
    model.get_submodule("model.norm").variance_epsilon = 0.5  # type: ignore[assignment]


def other_config(model: nn.Module) -> None:
    model.config.rms_norm_eps = 0.5  # type: ignore[union-attr]


def other_attention(model: nn.Module) -> None:
    model.set_attn_implementation("eager")  # type: ignore[operator]


def other_function(model: nn.Module) -> None:
    model.get_submodule("model.layers.1.mlp").act_fn = torch.nn.GELU()


def other_class(model: nn.Module) -> None:
    class Own(LlamaForCausalLM):
        """The same but for its name."""

    model.__class__ = Own


CHANGES = [larger_weight, swapped_rows, other_setting, other_config, other_attention, other_function, other_class]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_model_is_another(load_model: LoadModel, change: Callable[[nn.Module], None]):
    one, other = load_model(), load_model()
    assert identity_of(one) == identity_of(other) is not None
    change(other)
    assert identity_of(one) != identity_of(other) is not None


def test_other_precision_is_another(load_model: LoadModel):
    model = load_model()
    before = identity_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert identity_of(model) != before
    assert identity_of(model.bfloat16()) != before


def test_switched_adapters_and_other_code_of_a_class_are_another(
    load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
):
    model = get_peft_model(load_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    randomize_adapters(model)
    before = identity_of(model)
    with model.disable_adapter():
        assert identity_of(model) != before
    assert identity_of(model) == before == identity_of(deepcopy(model))
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, **_: None)
    assert identity_of(model) != before


def hooked(model: nn.Module) -> None:
    model.get_submodule("model.norm").register_forward_hook(lambda *_: None)


def patched(model: nn.Module) -> None:
    model.forward = lambda **_: None  # type: ignore[method-assign,assignment]


def on_no_device(model: nn.Module) -> None:
    model.to("meta")


@pytest.mark.parametrize("change", [hooked, patched, on_no_device])
def test_model_that_cannot_be_told_from_others_has_no_equal(load_model: LoadModel, change: Callable[[nn.Module], None]):
    model = load_model()
    change(model)
    assert identity_of(model) is None


def test_model_without_equal_is_probed_itself(load_model: LoadModel, passes: list[int]):
    models = [load_model(), load_model()]
    for model in models:
        hooked(model)
    counts = [passes_of(passes, lambda model=model: rows_of(model, 20)) for model in models]  # type: ignore[misc]
    assert counts[0] == counts[1] > 8


def test_model_that_goes_wrong_is_not_taken_for_its_right_equal(load_model: LoadModel, monkeypatch: pytest.MonkeyPatch):
    """Its code counts positions from the left end, padding included."""
    assert sharing_of(load_model(), 20) is Sharing.PADDED_RIGHT
    forward = LlamaForCausalLM.forward

    def careless(self: LlamaForCausalLM, position_ids: Tensor | None = None, **options: object) -> object:
        return forward(self, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", careless)
    assert sharing_of(load_model(), 20) is not Sharing.PADDED_RIGHT


def test_adapters_of_one_module_do_not_answer_for_another(make_module: MakeModule):
    for targets in (["q_proj"], ["v_proj"]):
        fit_quietly(make_module(lora=LoRASpec(r=2, target_modules=targets)), PROMPTS, max_steps=1)
    identities = {key[0] for key in remembering._found}  # type: ignore[index]
    assert len(identities) >= 2
