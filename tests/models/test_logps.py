"""Log-probabilities and entropies of completions, against a loop over single rows, and what they do not depend on."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from conftest import VOCABULARY, completions_of, naive_token_logps, prompts_of, random_rows, randomize_adapters
from torch import Tensor, nn

from xpo_lightning import Completions, Pair, Prompts
from xpo_lightning.models.forward import lm_head as head_module
from xpo_lightning.models.forward.capabilities import capabilities_of, without_fast_paths
from xpo_lightning.models.forward.lm_head import logps_and_entropies
from xpo_lightning.models.logprobs import pair_logps, pair_logps_and_entropies, token_logps
from xpo_lightning.models.policy import LoRASpec

PROMPT_ROWS = random_rows([6, 3, 9, 1, 7], seed=1)
COMPLETION_ROWS = random_rows([5, 8, 1, 6, 3], seed=2)
OTHER_ROWS = random_rows([2, 4, 9, 3, 5], seed=3)
CLOSE = {"rtol": 0.0, "atol": 3e-5}  # nats a token, in float32

LoadModel = Callable[..., nn.Module]


def widened(prompts: Prompts, completions: Completions, left: int, right: int) -> tuple[Prompts, Completions]:
    """Add padding that holds arbitrary token ids."""
    rows = len(prompts)
    before, after = torch.randint(VOCABULARY, (rows, left)), torch.randint(VOCABULARY, (rows, right))
    ids = torch.cat([before, torch.where(prompts.mask, prompts.ids, 7)], 1)
    mask = torch.cat([torch.zeros(rows, left, dtype=torch.bool), prompts.mask], 1)
    wide_prompts = Prompts(ids, mask, prompts.raw)
    wide = Completions(
        torch.cat([torch.where(completions.mask, completions.ids, 9), after], 1),
        torch.cat([completions.mask, torch.zeros(rows, right, dtype=torch.bool)], 1),
        completions.ended,
        completions.texts,
        torch.cat([completions.token_logps, torch.zeros(rows, right)], 1),
    )
    return wide_prompts, wide


@torch.no_grad()
def test_token_logps_of_a_ragged_batch_equal_a_loop_over_single_rows(arch: str, load_model: LoadModel):
    model = load_model(arch)
    ours = token_logps(model, prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS))
    assert ours.dtype == torch.float32
    assert ours.shape == (5, 8)
    for row, (prompt, completion) in enumerate(zip(PROMPT_ROWS, COMPLETION_ROWS, strict=True)):
        expected = torch.tensor(naive_token_logps(model, prompt, completion))
        torch.testing.assert_close(ours[row, : len(completion)], expected, **CLOSE)
        assert not ours[row, len(completion) :].any()
        assert ours[row].sum().item() == pytest.approx(sum(expected.tolist()), abs=1e-4)


@torch.no_grad()
def test_tiny_models_are_far_from_uniform(arch: str, load_model: LoadModel):
    """Uniform is log 304 = 5.72 nats; a spread of less than a nat would let a misplaced token pass unseen."""
    logps = token_logps(load_model(arch), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS))
    assert logps[completions_of(COMPLETION_ROWS).mask].std() > 1.0


@torch.no_grad()
@pytest.mark.parametrize(("left", "right"), [(11, 0), (0, 13), (4, 2)], ids=["left", "right", "both"])
def test_token_logps_with_more_padding_are_the_same(arch: str, load_model: LoadModel, left: int, right: int):
    model, prompts, completions = load_model(arch), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS)
    expected = token_logps(model, prompts, completions)
    wide = token_logps(model, *widened(prompts, completions, left, right))
    torch.testing.assert_close(wide[:, :8], expected, **CLOSE)
    assert not wide[:, 8:].any()


@torch.no_grad()
@pytest.mark.parametrize("rows", [[3], [4, 0], [2, 4, 1, 0, 3], [1, 1, 1]], ids=["one", "two", "shuffled", "repeated"])
def test_token_logps_do_not_depend_on_the_other_rows(arch: str, load_model: LoadModel, rows: list[int]):
    model, prompts, completions = load_model(arch), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS)
    expected = token_logps(model, prompts, completions)[rows]
    some = token_logps(model, prompts.select(rows), completions.select(rows))
    torch.testing.assert_close(some, expected[:, : some.shape[1]], **CLOSE)


@torch.no_grad()
def test_pair_logps_equal_two_token_logps(arch: str, load_model: LoadModel):
    model, prompts = load_model(arch), prompts_of(PROMPT_ROWS)
    pair = Pair(completions_of(COMPLETION_ROWS), completions_of(OTHER_ROWS))
    ours = pair_logps(model, prompts, pair)
    assert ours.by_policy.shape == (5,)
    torch.testing.assert_close(ours.by_policy, token_logps(model, prompts, pair.by_policy).sum(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.by_sampler, token_logps(model, prompts, pair.by_sampler).sum(1), rtol=0, atol=1e-4)
    assert (ours.by_policy - ours.by_sampler).abs().min() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_gradient_of_pair_logps_equals_that_of_single_rows(load_model: LoadModel, checkpointing: bool):
    model, naive = load_model().train(), load_model()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pair = Pair(completions_of(COMPLETION_ROWS), completions_of(OTHER_ROWS))
    ours = pair_logps(model, prompts_of(PROMPT_ROWS), pair)
    (2 * ours.by_policy - ours.by_sampler).sum().backward()
    for rows, weight in ((COMPLETION_ROWS, 2.0), (OTHER_ROWS, -1.0)):
        for prompt, completion in zip(PROMPT_ROWS, rows, strict=True):
            steps = naive(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            (weight * steps.log_softmax(-1)[range(len(completion)), completion].sum()).backward()
    for (name, a), b in zip(model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item(), msg=name)


@torch.no_grad()
def test_token_logps_ignore_what_a_model_is_not_asked_for(load_model: LoadModel):
    """A model whose forward takes neither position_ids nor logits_to_keep is scored all the same."""

    class Bare(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model, prompts, completions = load_model(), prompts_of(PROMPT_ROWS), completions_of(COMPLETION_ROWS)
    torch.testing.assert_close(
        token_logps(Bare(model), prompts, completions), token_logps(model, prompts, completions), **CLOSE
    )


# ---- entropies ----

PAIR = Pair(completions_of(COMPLETION_ROWS), completions_of(OTHER_ROWS))


def entropy(logits: Tensor) -> Tensor:
    """Write -sum p log p out, in float64, for each row of logits."""
    logps = logits.double().log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def by_hand(model: nn.Module, weights: Tensor) -> Tensor:
    """Run each row alone, and differentiate what `combined` differentiates; return the entropies."""
    means = []
    for number, (prompt, own, other) in enumerate(zip(PROMPT_ROWS, COMPLETION_ROWS, OTHER_ROWS, strict=True)):
        total = 0.0
        for sign, completion in ((2.0, own), (-1.0, other)):
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            total = total + sign * logits.double().log_softmax(-1)[range(len(completion)), completion].sum()
            if completion is own:
                means.append(entropy(logits).mean())
        (total + weights[number] * means[-1]).backward()
    return torch.stack(means).detach()


def combined(model: nn.Module, weights: Tensor) -> Tensor:
    """Differentiate 2 log pi(policy's) - log pi(sampler's) + weight * entropy; return the entropies."""
    logps, entropies = pair_logps_and_entropies(model, prompts_of(PROMPT_ROWS), PAIR)
    (2 * logps.by_policy - logps.by_sampler + weights * entropies).sum().backward()
    return entropies.detach()


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    compared = 0
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            largest = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)
            compared += largest > 0
    assert compared > 3


@pytest.mark.parametrize("way", [nullcontext, without_fast_paths], ids=["fast", "plain"])
def test_entropies_and_gradients_equal_those_of_single_rows(
    arch: str, load_model: LoadModel, way: Callable[[nn.Module], AbstractContextManager[None]]
):
    """Without a head that can be left out, as on the plain way or in Gemma 2, logits are taken as they come."""
    model, naive, weights = load_model(arch), load_model(arch), 30 * torch.randn(5)
    expected = by_hand(naive, weights)
    with way(model):
        assert (capabilities_of(model).head is None) == (way is without_fast_paths or arch == "gemma2_sliding")
        ours = combined(model, weights)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5)
    assert ours.min() > 0.5
    assert ours.max() < math.log(VOCABULARY) - 0.2
    assert_same_gradients(model, naive)


def test_entropies_with_gradient_checkpointing_have_the_same_gradients(load_model: LoadModel):
    model, naive, weights = load_model().train(), load_model(), 30 * torch.randn(5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(combined(model, weights).double(), by_hand(naive, weights), rtol=0, atol=2e-5)
    assert_same_gradients(model, naive)


@pytest.mark.parametrize("frozen", ["all_but_adapters", "head"])
def test_entropy_gradients_reach_what_is_trained_and_nothing_else(load_model: LoadModel, frozen: str):
    models, weights = [], 30 * torch.randn(5)
    for step in (combined, by_hand):
        model = load_model()
        if frozen == "head":
            model.get_output_embeddings().weight.requires_grad_(False)
        else:
            model = LoRASpec(r=4).wrap(model).eval()
            randomize_adapters(model)
        step(model, weights)
        models.append(model)
    assert any(parameter.grad is None for parameter in models[0].parameters())
    assert_same_gradients(*models)


@torch.no_grad()
def test_logps_beside_entropies_are_those_without(arch: str, load_model: LoadModel):
    model, prompts = load_model(arch), prompts_of(PROMPT_ROWS)
    logps, entropies = pair_logps_and_entropies(model, prompts, PAIR)
    expected = pair_logps(model, prompts, PAIR)
    assert entropies.shape == (5,)
    assert entropies.dtype == torch.float32
    torch.testing.assert_close(logps.by_policy, expected.by_policy, rtol=0, atol=1e-4)
    torch.testing.assert_close(logps.by_sampler, expected.by_sampler, rtol=0, atol=1e-4)


@torch.no_grad()
def test_entropies_do_not_depend_on_padding_nor_on_the_samplers_completion(load_model: LoadModel):
    model, prompts = load_model(), prompts_of(PROMPT_ROWS)
    _, expected = pair_logps_and_entropies(model, prompts, PAIR)
    _, swapped = pair_logps_and_entropies(model, prompts, Pair(PAIR.by_policy, completions_of([[1]] * 5)))
    wide_prompts, wide = widened(prompts, PAIR.by_policy, 4, 6)
    _, padded = pair_logps_and_entropies(model, wide_prompts, Pair(wide, PAIR.by_sampler))
    torch.testing.assert_close(swapped, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5)


# ---- entropies of a vocabulary head ----


def test_entropy_of_worked_distributions():
    """Uniform over 4: log 4 = 1.3862944. (1/2, 1/4, 1/4, 0): 1.5 log 2 = 1.0397208. Certain: 0."""
    half, quarter = math.log(2), math.log(1)
    logits = torch.tensor(
        [[5.0] * 4, [half, quarter, quarter, -math.inf], [1000.0, 0.0, -1000.0, -math.inf]], requires_grad=True
    )
    logps, entropies = logps_and_entropies(logits, None, torch.tensor([3, 0, 0]))
    assert entropies.tolist() == pytest.approx([1.3862944, 1.0397208, 0.0], abs=1e-6)
    assert logps.tolist() == pytest.approx([-1.3862944, -0.6931472, 0.0], abs=1e-6)
    entropies.sum().backward()
    assert logits.grad.isfinite().all()


def test_gradient_of_an_entropy_is_minus_p_times_log_p_plus_entropy():
    """p = (1/2, 1/4, 1/4), H = 1.0397208, log p = (-0.6931472, -1.3862944, -1.3862944).

    -1/2 * (-0.6931472 + 1.0397208) = -0.1732868, and -1/4 * (-1.3862944 + 1.0397208) = 0.0866434 twice.
    """
    logits = torch.tensor([[math.log(2), 0.0, 0.0]], requires_grad=True)
    logps_and_entropies(logits, None, torch.tensor([0]))[1].sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.1732868, 0.0866434, 0.0866434], abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("chunk", "kept"), [(2**23, 2**26), (90, 2**26), (90, 200)], ids=["whole", "chunks", "again"])
def test_head_entropies_and_gradients_equal_those_of_autograd_in_float64(
    monkeypatch: pytest.MonkeyPatch, bias: bool, frozen: bool, chunk: int, kept: int
):
    monkeypatch.setattr(head_module, "CHUNK", {"cpu": chunk})
    monkeypatch.setattr(head_module, "KEPT", kept)
    head = nn.Linear(6, 30, bias=bias).requires_grad_(not frozen)
    exact = nn.Linear(6, 30, bias=bias).double().requires_grad_(not frozen)
    exact.load_state_dict(head.state_dict())
    hidden, targets, upstream = torch.randn(11, 6, requires_grad=True), torch.randint(30, (11,)), torch.randn(2, 11)
    same = hidden.detach().double().requires_grad_()
    ours = logps_and_entropies(hidden, head, targets)
    logits = exact(same)
    theirs = logits.log_softmax(-1)[range(11), targets], entropy(logits)
    gradients = []
    for outputs, inputs in ((ours, [hidden, *head.parameters()]), (theirs, [same, *exact.parameters()])):
        wanted = inputs[:1] if frozen else inputs
        gradients.append(torch.autograd.grad(outputs, wanted, [row.to(outputs[0]) for row in upstream]))
    for one, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_head_learns_from_frozen_hidden_states():
    """The gradient of the weight alone, as when everything below the head is frozen."""
    head, hidden, targets = nn.Linear(6, 30), torch.randn(11, 6), torch.randint(30, (11,))
    logps, entropies = logps_and_entropies(hidden, head, targets)
    ours = torch.autograd.grad(logps.sum() + entropies.sum(), head.weight)[0]
    logits = head(hidden)
    naive = logits.log_softmax(-1)[range(11), targets].sum() + entropy(logits).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(naive, head.weight)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("kept", [2**26, 10])
def test_bfloat16_autocast_may_end_before_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, backward_inside: bool, kept: int
):
    """Hidden states come in bfloat16 and the head is in float32; 2 decimals are what bfloat16 leaves of a gradient."""
    monkeypatch.setattr(head_module, "KEPT", kept)
    head, hidden, targets = nn.Linear(6, 30), torch.randn(5, 6), torch.randint(30, (5,))
    scorers = [head_module.head_logps, lambda *arguments: sum(logps_and_entropies(*arguments))]
    naive = head(hidden)
    expected = [naive.log_softmax(-1)[range(5), targets], naive.log_softmax(-1)[range(5), targets] + entropy(naive)]
    for scorer, sums in zip(scorers, expected, strict=True):
        gradient = partial(torch.autograd.grad, inputs=head.weight, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            total = scorer(hidden.bfloat16(), head, targets).sum()
            ours = gradient(total) if backward_inside else None
        ours = gradient(total) if ours is None else ours
        torch.testing.assert_close(ours[0], gradient(sums.sum())[0], rtol=0.05, atol=0.05)
