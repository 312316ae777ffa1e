"""Who writes the completion that the policy's is compared with, and which reference the pairs are measured against."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import (
    PROMPTS,
    Recorder,
    fit_quietly,
    loader,
    naive_token_logps,
    noise,
    quiet_trainer,
    randomize_adapters,
)
from torch import nn

from xpo_lightning import (
    Experience,
    InputError,
    LoRASpec,
    PolicySampler,
    PreviousPolicySampler,
    PythonSampler,
    ReferenceRefresh,
    Sampler,
    Sampling,
    XPOLightningModule,
)
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.models.snapshot import Snapshot

MakeModule = Callable[..., XPOLightningModule]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
KINDS: dict[str, dict[str, Any]] = {"all weights": {}, "LoRA": {"lora": LoRASpec(r=4)}}


def moved(module: XPOLightningModule, seed: int = 3) -> XPOLightningModule:
    """Move the policy off its reference."""
    module.configure_model()
    randomize_adapters(module.policy, seed=seed)
    if module.lora is None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in module.policy.parameters():
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return module


def collected(module: XPOLightningModule, *, training: bool = True, seed: int = 0) -> Experience:
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    return module.collector.collect(module.policy, prompts, noise(seed), training=training)


def rows_of(pairs: Experience, side: str) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each prompt and what this side wrote, without padding."""
    written = getattr(pairs.completions, side)
    for row in range(len(pairs)):
        yield pairs.prompts.ids[row][pairs.prompts.mask[row]].tolist(), written.ids[row][written.mask[row]].tolist()


def sums(model: nn.Module, pairs: Experience, side: str) -> list[float]:
    """Score each completion of a side alone, naively."""
    return [sum(naive_token_logps(model, prompt, completion)) for prompt, completion in rows_of(pairs, side)]


@pytest.mark.parametrize("arch", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_writes_both_and_the_reference_scores_both(
    make_module: MakeModule, load_model: Callable[..., nn.Module], arch: str, kind: str
):
    greedy = collected(moved(make_module(arch, sampler=PolicySampler(), sampling=GREEDY, **KINDS[kind])))
    assert greedy.completions.by_policy.texts == greedy.completions.by_sampler.texts, "one model"
    module = moved(make_module(arch, sampler=PolicySampler(), **KINDS[kind]))
    pairs = collected(module)
    assert pairs.completions.by_policy.texts != pairs.completions.by_sampler.texts, "two samples"
    module.policy.eval()
    for side in ("by_policy", "by_sampler"):
        written, reference = getattr(pairs.completions, side), getattr(pairs.reference_logps, side)
        assert written.logps.tolist() == pytest.approx(sums(module.policy, pairs, side), abs=1e-3)
        assert reference.tolist() == pytest.approx(sums(load_model(arch), pairs, side), abs=1e-3)


def test_validation_compares_with_the_reference_whoever_samples(make_module: MakeModule):
    results = []
    for sampler in (None, PolicySampler(), PreviousPolicySampler()):
        (numbers,) = quiet_trainer().validate(moved(make_module(sampler=sampler)), loader(PROMPTS), verbose=False)
        results.append(numbers)
    assert results[0] == results[1] == results[2]


class Watch(pl.Callback):
    """Remembers the policy's weights before each batch, and the sampler's completions of it."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.sampled: list[Experience] = []

    def on_pairs_collected(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
        self.sampled.append(experience)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.policy.state_dict().items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("every", "used"),
    [(1, [0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 0, 2, 2])],
    ids=["every batch", "every second batch"],
)
def test_the_previous_policy_is_that_of_one_iteration_before(
    make_module: MakeModule, kind: str, every: int, used: list[int]
):
    """In iteration t the sampler has the weights with which iteration t - 1 began, the untrained ones at first."""
    watch = Watch()
    module = make_module(sampler=PreviousPolicySampler(every), learning_rate=0.03, **KINDS[kind])
    fit_quietly(module, PROMPTS[:2] * 6, batch_size=2, callbacks=[watch])
    assert len(watch.sampled) == 6
    module.policy.eval()
    for pairs, before in zip(watch.sampled, used, strict=True):
        module.policy.load_state_dict(watch.weights[before])
        assert pairs.completions.by_sampler.logps.tolist() == pytest.approx(
            sums(module.policy, pairs, "by_sampler"), abs=1e-3
        )
    module.policy.load_state_dict(watch.weights[5])
    assert sums(module.policy, watch.sampled[5], "by_sampler") != pytest.approx(
        watch.sampled[5].completions.by_sampler.logps.tolist(), abs=1e-2
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("every", "mix"), [(1, 1.0), (2, 1.0), (1, 0.25)])
def test_the_reference_follows_the_policy(make_module: MakeModule, kind: str, every: int, mix: float):
    """After every n-th batch its weights become (1 - mix) times themselves plus mix times the policy's."""
    watch = Watch()
    module = make_module(reference_refresh=ReferenceRefresh(every, mix), learning_rate=0.03, **KINDS[kind])
    fit_quietly(module, PROMPTS[:2] * 4, batch_size=2, callbacks=[watch])
    trained = {name for name, weight in module.policy.named_parameters() if weight.requires_grad}
    reference = watch.weights[0]
    module.policy.eval()
    for number, pairs in enumerate(watch.sampled):
        if number and number % every == 0:
            now = watch.weights[number]
            reference = {
                name: (1 - mix) * value + mix * now[name] if name in trained else value
                for name, value in reference.items()
            }
        module.policy.load_state_dict(reference)
        for side in ("by_policy", "by_sampler"):
            assert getattr(pairs.reference_logps, side).tolist() == pytest.approx(
                sums(module.policy, pairs, side), abs=1e-3
            )


def test_validation_compares_with_the_first_reference(make_module: MakeModule):
    """Its numbers must be comparable over the run: the KL goes on growing, though the reference follows."""
    module = make_module(reference_refresh=ReferenceRefresh(1), learning_rate=0.03, sampling=GREEDY)
    fit_quietly(module, PROMPTS[:2] * 3, batch_size=2)
    (numbers,) = quiet_trainer().validate(module, loader(PROMPTS), verbose=False)
    refreshed = collected(module, training=True)
    first = collected(module, training=False)
    assert numbers["eval/objective/kl"] == pytest.approx(
        float((first.completions.by_policy.logps - first.reference_logps.by_policy).mean()), abs=1e-4
    )
    assert numbers["eval/objective/kl"] > 0.05
    assert refreshed.completions.by_sampler.texts == refreshed.completions.by_policy.texts, "the reference caught up"


def from_columns(prompts: list[Any], columns: dict[str, list[Any]], suffix: str = "") -> list[str]:
    return [f"{answer}{suffix}" for answer in columns["answer"]]


def test_a_function_writes_what_it_returns(make_module: MakeModule, load_model: Callable[..., nn.Module]):
    """Its text becomes tokens with an EOS, is scored by both models, and is cut where it is too long."""
    module = moved(make_module(sampler=PythonSampler(from_columns, {"suffix": " mat"})))
    batch = {"prompt": PROMPTS[:2], "answer": ["the", "a very long tale of a dog and of a cat"]}
    prompts = as_prompts(batch, module.prompt_encoder, module.device)
    pairs = module.collector.collect(module.policy, prompts, noise(), training=True)
    written, tokenizer = pairs.completions.by_sampler, module.tokenizer
    ids = [row for _, row in rows_of(pairs, "by_sampler")]
    assert ids[0] == [*tokenizer("the mat", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert written.texts[0] == "the mat"
    assert len(ids[1]) == 6
    assert written.texts[1] == tokenizer.decode(ids[1])
    assert written.ended.tolist() == [True, False]
    assert pairs.reference_logps.by_sampler.tolist() == pytest.approx(
        sums(load_model("llama"), pairs, "by_sampler"), abs=1e-3
    )


def test_a_text_ends_with_its_first_stop_string_and_holds_no_special_token(make_module: MakeModule):
    sampling = Sampling(max_new_tokens=40, stop_strings=["stop", "halt"])
    module = make_module(sampler=PythonSampler(from_columns), sampling=sampling)
    module.configure_model()
    batch = {"prompt": PROMPTS[:2], "answer": ["red halt stop here", "red<eos>cat"]}
    prompts = as_prompts(batch, module.prompt_encoder, module.device)
    written = module.collector.collect(module.policy, prompts, noise(), training=True).completions.by_sampler
    tokenizer, (stopped, other) = (
        module.tokenizer,
        ([*row[real]] for row, real in zip(written.ids, written.mask, strict=True)),
    )
    assert written.texts == ("red ", "red<eos>cat")
    assert tokenizer.decode(stopped) == "red halt"
    assert [int(token) for token in other].count(tokenizer.eos_token_id) == 1
    assert other[-1] == tokenizer.eos_token_id
    assert written.ended.tolist() == [True, True]


@pytest.mark.parametrize("written", [None, ["one"], [1, 2], "ab"])
def test_a_function_that_writes_no_texts_is_named(make_module: MakeModule, written: Any):
    def unhelpful(prompts: list[Any], columns: dict[str, list[Any]]) -> Any:
        return written

    with pytest.raises(InputError, match=r"sampler function .*unhelpful must return a list of 2 completions as text"):
        fit_quietly(make_module(sampler=PythonSampler(unhelpful)), PROMPTS[:2])


def test_a_function_that_cannot_be_called_is_refused_at_once():
    with pytest.raises(InputError, match=r"model\.sampler\.init_args\.function"):
        PythonSampler(lambda prompts: prompts)
    with pytest.raises(InputError, match=r"model\.sampler\.init_args\.timeout"):
        PythonSampler(from_columns, timeout=0)


@pytest.mark.parametrize("sampler", [PolicySampler(), PreviousPolicySampler(), PythonSampler(from_columns)])
def test_every_sampler_trains(make_module: MakeModule, sampler: Sampler):
    recorder = Recorder()
    prompts = [{"prompt": prompt, "answer": "the mat"} for prompt in PROMPTS]
    module = make_module(sampler=sampler, learning_rate=1e-3, bonus_on="both", alpha=0.01)
    batches = [{"prompt": [row["prompt"] for row in prompts], "answer": [row["answer"] for row in prompts]}]
    trainer = quiet_trainer(callbacks=[recorder])
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert recorder.of("grad_norm")[0] > 0


def test_a_slow_average_of_bfloat16_weights_moves(make_module: MakeModule):
    """A thousandth of a change is below bfloat16's rounding of the weights; the average is kept in float32."""
    spec = {"dtype": "bfloat16"}
    module = make_module(spec=spec, reference_refresh=ReferenceRefresh(1, 1e-3), learning_rate=1e-2)
    fit_quietly(module, PROMPTS, batch_size=1)
    kept = module.reference.refreshed.weights
    untrained = dict(make_module(spec=spec).new_policy().named_parameters())
    moved_weights = sum(int((kept[name] != untrained[name].float()).sum()) for name in kept)
    assert moved_weights > 0.9 * sum(
        int((weight != untrained[name]).sum()) for name, weight in module.policy.named_parameters()
    )
    with module.reference.lent() as lent:
        assert next(lent.parameters()).dtype == torch.bfloat16


def test_a_second_fit_begins_with_the_policy_as_it_is_then(make_module: MakeModule):
    module = make_module(sampler=PreviousPolicySampler(), learning_rate=0.03)
    fit_quietly(module, PROMPTS, batch_size=2)
    now = {name: weight.clone() for name, weight in module.policy.named_parameters()}
    watch = Watch()
    fit_quietly(module, PROMPTS[:2], callbacks=[watch])
    module.policy.load_state_dict(now, strict=False)
    module.policy.eval()
    assert watch.sampled[0].completions.by_sampler.logps.tolist() == pytest.approx(
        sums(module.policy, watch.sampled[0], "by_sampler"), abs=1e-3
    )


def test_a_snapshot_leaves_the_policy_as_it_was(make_module: MakeModule):
    module = moved(make_module())
    snapshot = Snapshot(module.policy)
    before = {name: value.clone() for name, value in module.policy.state_dict().items()}
    moved(module, seed=5)
    now = {name: value.clone() for name, value in module.policy.state_dict().items()}
    module.policy.train()
    with snapshot.lent(module.policy) as lent:
        assert all(torch.equal(value, before[name]) for name, value in lent.state_dict().items())
        assert not lent.training
    assert all(torch.equal(value, now[name]) for name, value in module.policy.state_dict().items())
    assert module.policy.training


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: PreviousPolicySampler(0), r"model\.sampler\.init_args\.every"),
        (lambda: ReferenceRefresh(0), r"model\.reference_refresh\.every"),
        (lambda: ReferenceRefresh(1, 0.0), r"model\.reference_refresh\.mix"),
        (lambda: ReferenceRefresh(1, 1.5), r"model\.reference_refresh\.mix"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], Any], key: str):
    with pytest.raises(InputError, match=key):
        make()


def test_a_sampler_of_an_earlier_version_still_writes(make_module: MakeModule):
    class Old(Sampler):
        def write(self, desk: Any, uniforms: Any) -> Any:
            return desk.by_policy(uniforms)

    module = make_module(sampler=Old())
    with pytest.warns(DeprecationWarning, match="by_policy is generate_with_policy now"):
        fit_quietly(module, PROMPTS, max_steps=1)
    assert module.trainer.global_step == 1
