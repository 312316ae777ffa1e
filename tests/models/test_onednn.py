"""Models that change the outputs of their linear layers in place train with oneDNN as with torch's own product."""

from collections.abc import Callable

import pytest
import torch
import transformers
from conftest import GROUPED, PROMPTS, ROPE, fit_quietly, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from xpo_lightning import LoadedModel, XPOLightningModule
from xpo_lightning.models.forward.cpu import OneDNNLinear, speed_up_linears

MakeModule = Callable[..., XPOLightningModule]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": ROPE["vocab_size"], "laurel_rank": 4}
IN_PLACE: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "olmo": lambda: transformers.OlmoConfig(**ROPE, clip_qkv=0.5),
    "olmoe": lambda: transformers.OlmoeConfig(**ROPE, **EXPERTS, clip_qkv=0.5),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **GROUPED,
        **ALTERNATING,
        **PER_LAYER,
        head_dim=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.5, 0.0],
    ),
}


@pytest.fixture(autouse=True)
def _onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take oneDNN on every processor; only on some is it the faster library."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr("xpo_lightning.models.forward.cpu.prefers_onednn", lambda: True)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(40, 80).view(4, 10)
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", IN_PLACE)
def test_gradients_of_models_that_change_outputs_in_place_are_torchs(name: str):
    model = AutoModelForCausalLM.from_config(IN_PLACE[name]())
    expected = gradients_of(model)
    speed_up_linears(model)
    assert any(type(part) is OneDNNLinear for part in model.modules())
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for weight, gradient in expected.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", IN_PLACE)
def test_all_weights_of_such_a_model_are_trained(make_module: MakeModule, name: str):
    model = AutoModelForCausalLM.from_config(IN_PLACE[name]())
    module = make_module(policy=LoadedModel(model, make_tokenizer()), learning_rate=0.01)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    fit_quietly(module, PROMPTS)
    after = dict(module.policy.named_parameters())
    assert any(type(part) is OneDNNLinear for part in module.policy.modules())
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 0, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_of_any_shape_may_be_changed_in_place(shape: tuple[int, ...], bias: bool):
    plain = nn.Linear(5, 4, bias)
    swapped = nn.Sequential(nn.Linear(5, 4, bias))
    swapped[0].load_state_dict(plain.state_dict())
    speed_up_linears(swapped)
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    outputs = [plain(x), swapped(y)]
    for output in outputs:
        assert output.shape == (*shape[:-1], 4)
        output.clamp_(-0.3, 0.3).mul_(2).square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(swapped[0].weight.grad, plain.weight.grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_in_any_memory_order(transposed: bool):
    x = torch.randn(6, 3, 5).transpose(0, 1) if transposed else torch.randn(3, 6, 5)
    plain = nn.Linear(5, 4)
    swapped = nn.Sequential(nn.Linear(5, 4))
    swapped[0].load_state_dict(plain.state_dict())
    speed_up_linears(swapped)
    torch.testing.assert_close(swapped(x), plain(x))
