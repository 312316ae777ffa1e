"""An engine that is sent the policy every few batches, and one that writes a batch ahead: what writes, resume, time."""

import copy
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import (
    Recorder,
    completions_of,
    loader,
    longer_is_better,
    make_tokenizer,
    noise,
    prompts_of,
    quiet_trainer,
)

from xpo_lightning import (
    InputError,
    LoRASpec,
    PromptDataModule,
    PythonReward,
    RolloutEngine,
    Sampling,
    XPOLightningModule,
)
from xpo_lightning.rollout.engine import GenerationRequest
from xpo_lightning.rollout.engine_writer import EngineWriter
from xpo_lightning.rollout.local import LocalRollout

MakeModule = Callable[..., XPOLightningModule]


def sum_of(model: Any) -> float:
    return sum(float(weight.detach().double().sum()) for weight in model.parameters())


class Elsewhere(RolloutEngine):
    """Writes with copies of the models, as a server does.

    Attributes:
        wrote: The sum of the weights that the policy's completions of each call of `write` are by.
        seconds: How long a call of `write` takes at least.
        fails: The call that fails.
    """

    copies_weights = True

    def __init__(self, reference: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.wrote: list[float] = []
        self.seconds, self.fails, self.is_closed = 0.0, -1, False
        self.models = {"reference": reference}

    def sync(self, policy: Any) -> None:
        self.models["policy"] = copy.deepcopy(policy).eval()

    def write(self, prompts: Any, asked: Any) -> list[Any]:
        end = time.monotonic() + self.seconds
        models = dict(self.models)
        self.wrote.append(sum_of(models["policy"]))
        if len(self.wrote) == self.fails:
            raise InputError("the engine has no power")
        written = [[self.some(models[each.who], prompts, numbers) for numbers in each.uniforms] for each in asked]
        while time.monotonic() < end:
            self.check()
            time.sleep(0.01)
        return written

    @torch.no_grad()
    def some(self, model: Any, prompts: Any, numbers: torch.Tensor) -> Any:
        """Draw each token by its number, each row alone."""
        ids, logps = [], []
        for row, real, uniforms in zip(prompts.ids, prompts.mask, numbers, strict=True):
            tokens, of_tokens = row[real].tolist(), []
            for number in uniforms.tolist():
                scores = model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
                tokens.append(min(int((scores.exp().cumsum(0) < number).sum()), len(scores) - 1))
                of_tokens.append(float(scores[tokens[-1]]))
            ids.append(tokens[int(real.sum()) :])
            logps.append(of_tokens)
        return self.completions(ids, logps, prompts)

    def close(self) -> None:
        self.is_closed = True


class History(pl.Callback):
    """Keeps the sum of the policy's weights after each number of batches."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.sums.append(sum_of(module.policy))

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.sums.append(sum_of(module.policy))


class Breaking(pl.Callback):
    """Saves a checkpoint in the middle of the third step, and fails."""

    def __init__(self, path: Path) -> None:
        self.path, self.batches = path, 0

    def on_pairs_collected(self, trainer: Any, module: Any, experience: Any) -> None:
        self.batches += 1
        if self.batches == 3:
            trainer.save_checkpoint(self.path)
            raise InputError("there is no power")


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., PromptDataModule]:
    """Give a function that makes a data module of six batches of two prompts."""
    rows = [f"the cat sat {word}" for word in ("on", "in", "at", "by", "to", "up") * 2]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return lambda **options: PromptDataModule(str(tmp_path / "prompts.jsonl"), batch_size=2, **options)


def fit(module: XPOLightningModule, data: PromptDataModule, ckpt: str | None = None, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        torch.manual_seed(5)
        trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


@pytest.fixture
def engine_of(load_model: Callable[..., Any]) -> Callable[..., Elsewhere]:
    """Give a function that makes an engine, with the reference, by `sync_every` and `ahead`."""
    return lambda sync_every, ahead, **options: Elsewhere(
        load_model("llama"), sync_every=sync_every, ahead=ahead, **options
    )


WAYS = {
    (1, 0): [0, 0, 0, 0, 0, 0],
    (3, 0): [0, 1, 2, 0, 1, 2],
    (1, 1): [0, 1, 1, 1, 1, 1],
    (3, 1): [0, 1, 2, 1, 2, 3],
}
"""How far behind the weights are that write each of six batches, by `sync_every` and `ahead`."""


@pytest.mark.parametrize("way", WAYS)
def test_each_batch_is_written_by_the_weights_that_are_due(
    make_module: MakeModule, data: Any, engine_of: Any, way: tuple[int, int]
) -> None:
    engine, history, recorder = engine_of(*way), History(), Recorder()
    fit(make_module(rollout=engine, learning_rate=1e-2), data(), callbacks=[history, recorder])
    behind = WAYS[way]
    assert len(set(history.sums)) == 7
    assert engine.wrote == [history.sums[batch - some] for batch, some in enumerate(behind)]
    assert engine.is_closed
    if way != (1, 0):
        assert recorder.of("rollout/staleness") == behind
    else:
        assert "rollout/staleness" not in recorder.steps[-1]


def test_engine_that_writes_with_the_policy_itself_has_it_without_dropout(
    make_module: MakeModule, data: Any, load_model: Callable[..., Any]
) -> None:
    modes: list[bool] = []

    class Here(Elsewhere):
        copies_weights = False

        def sync(self, policy: Any) -> None:
            self.models["policy"] = policy

        def write(self, prompts: Any, asked: Any) -> list[Any]:
            modes.append(self.models["policy"].training)
            return super().write(prompts, asked)

    module = make_module(rollout=Here(load_model("llama")))
    fit(module, data(), max_steps=1, callbacks=[history := Training()])
    assert modes == [False]
    assert history.modes == [True]


class Training(pl.Callback):
    """Puts the policy into train mode before each batch, and keeps the mode in which it leaves the batch."""

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        module.policy.train()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.modes.append(module.policy.training)


def test_what_is_written_ahead_is_for_its_own_batch(engine_of: Any, load_model: Callable[..., Any]) -> None:
    engine, policy = engine_of(1, 1), load_model("llama")
    engine.begin(LocalRollout(make_tokenizer(), Sampling(max_new_tokens=2), []))
    writer = EngineWriter(engine, lambda: None)
    writer.begin(policy)
    one, other = ([GenerationRequest("policy", [noise(seed).uniforms(2, 2)])] for seed in (1, 2))
    writer.start(policy, prompts_of([[5], [6]]), one, 3, wanted=True)
    written = writer.write(policy, prompts_of([[7, 8], [9]]), other, 4)[0][0]
    assert torch.equal(written.ids, engine.write(prompts_of([[7, 8], [9]]), other)[0][0].ids)
    calls = len(engine.wrote)
    writer.start(policy, prompts_of([[5], [6]]), one, 5, wanted=True)
    writer.write(policy, prompts_of([[5], [6]]), one, 5)
    assert len(engine.wrote) == calls + 1, "it is written once"
    writer.close()


def test_drift_is_nats_a_token(engine_of: Any) -> None:
    """Two completions of 1 and 3 tokens that are 0.5 and 1.5 nats apart: 2 nats over 4 tokens."""
    engine = engine_of(1, 0)
    engine.compare("policy", [completions_of([[3], [4, 5, 6]])], torch.tensor([[0.5, -1.5]]))
    assert engine.measured == {"rollout/policy_logp_drift": pytest.approx(0.5)}


def test_drift_ends_no_run_whose_engine_is_meant_to_be_behind(
    make_module: MakeModule, data: Any, engine_of: Any
) -> None:
    recorder = Recorder()
    engine = engine_of(3, 0, max_logp_drift=1e-3)
    fit(make_module(rollout=engine, learning_rate=1e-2), data(), callbacks=[recorder])
    drifts = recorder.of("rollout/policy_logp_drift")
    assert [drift > 1e-3 for drift in drifts] == [False, True, True, False, True, True]
    assert max(recorder.of("rollout/logp_drift")) < 1e-3

    class Deaf(Elsewhere):
        def sync(self, policy: Any) -> None:
            if "policy" not in self.models:
                super().sync(policy)

    deaf = Deaf(engine.models["reference"], sync_every=3, max_logp_drift=1e-3)
    with pytest.raises(InputError, match=r"of the policy's completions differ"):
        fit(make_module(rollout=deaf, learning_rate=1e-2), data())


@pytest.mark.parametrize(
    ("lora", "way"),
    [
        *((False, way) for way in ((3, 0), (1, 1), (3, 1))),
        *(pytest.param(True, way, marks=pytest.mark.slow) for way in ((3, 0), (1, 1))),
        (True, (3, 1)),
    ],
)
def test_resumed_run_ends_as_the_unbroken_one(
    make_module: MakeModule, data: Any, engine_of: Any, way: tuple[int, int], lora: bool, tmp_path: Path
) -> None:
    """The broken one fails in its third batch, with the next one under way; the other stops after two."""
    options: dict[str, Any] = {"learning_rate": 1e-2, "lr_schedule": "constant"}
    options["lora"] = LoRASpec(r=2) if lora else None
    whole = make_module(rollout=engine_of(*way), **options)
    fit(whole, data(), callbacks=[of_whole := Recorder()])
    for name in ("broken", "stopped"):
        breaks = [Breaking(tmp_path / "broken" / "last.ckpt")] if name == "broken" else []
        keeps = pl.callbacks.ModelCheckpoint(tmp_path / "stopped", every_n_train_steps=1, save_last=True)
        begun = make_module(rollout=engine_of(*way), **options)
        with pytest.raises(InputError, match="no power") if breaks else nullcontext():
            fit(begun, data(), enable_checkpointing=True, callbacks=[keeps, *breaks], max_steps=-1 if breaks else 2)
        resumed = make_module(rollout=engine_of(*way), **options)
        fit(resumed, data(), str(tmp_path / name / "last.ckpt"), callbacks=[of_rest := Recorder()])
        assert len(of_rest.steps) == 4
        assert any(step["rollout/staleness"] for step in of_rest.steps[:1])
        for step, expected in zip(of_rest.steps, of_whole.steps[2:], strict=True):
            timeless = {key for key in expected if not key.startswith(("time", "throughput"))}
            assert {key: step[key] for key in timeless} == {key: expected[key] for key in timeless}
        pairs = zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_validation_is_written_by_the_policy_as_it_is(make_module: MakeModule, data: Any, engine_of: Any) -> None:
    engine, history = engine_of(3, 1), History()
    options: dict[str, Any] = {"val_check_interval": 2, "num_sanity_val_steps": 0, "callbacks": [history]}
    fit(make_module(rollout=engine, learning_rate=1e-2), data(validation_size=2), **options)
    # Batches 0 to 4; after 2 and 4, with batches 2 and 4 written already, a validation.
    by_batch = [(0, 0), (1, 0), (2, 0), ("validation", 2), (3, 2), (4, 2), ("validation", 4)]
    assert engine.wrote == [history.sums[taken] for _, taken in by_batch]


class Given(Elsewhere):
    """Writes the same tokens for each prompt, and takes a while for it."""

    def write(self, prompts: Any, asked: Any) -> list[Any]:
        time.sleep(self.seconds)
        count = len(prompts)
        return [[self.completions([[7, 8, 9]] * count, [[-1.0] * 3] * count, prompts)] for _ in asked]


class Clock(pl.Callback):
    """Measures the seconds of a batch, without the first."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.monotonic())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


@pytest.mark.slow
def test_engine_that_takes_as_long_as_training_has_it_wait_no_more(make_module: MakeModule, data: Any) -> None:
    def slow(prompts: list[Any], completions: list[str], columns: Any) -> list[float]:
        time.sleep(0.3)
        return longer_is_better(prompts, completions, columns)

    def seconds(ahead: int, lasts: float) -> float:
        engine = Given(ahead=ahead)
        engine.seconds = lasts
        module = make_module(rollout=engine, reward=PythonReward(slow), learning_rate=1e-3)
        fit(module, data(), max_epochs=1, callbacks=[clock := Clock()])
        return clock.seconds

    of_training = seconds(0, 0.0)
    assert seconds(0, of_training) / seconds(1, of_training) > 1.6


def test_engine_writes_without_gradients_ahead_too(make_module: MakeModule, data: Any) -> None:
    class Asking(Given):
        def write(self, prompts: Any, asked: Any) -> list[Any]:
            self.wrote.append(torch.is_grad_enabled())
            return super().write(prompts, asked)

    engine = Asking(ahead=1)
    fit(make_module(rollout=engine), data())
    assert engine.wrote == [False] * 6


def test_failure_ahead_is_one_error_at_the_batch_that_needs_it(
    make_module: MakeModule, data: Any, engine_of: Any
) -> None:
    engine = engine_of(1, 1)
    engine.fails = 3
    module = make_module(rollout=engine)
    with pytest.raises(InputError, match="the engine has no power"):
        fit(module, data())
    assert module.global_step == 2


def test_run_that_ends_early_waits_for_nothing(make_module: MakeModule, data: Any, engine_of: Any) -> None:
    engine = engine_of(1, 1)

    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            engine.seconds = 30.0
            trainer.should_stop = trainer.global_step == 2

    begin = time.monotonic()
    fit(make_module(rollout=engine), data(), callbacks=[Ends()], min_epochs=0)
    assert time.monotonic() - begin < 20
    wanted = engine_of(1, 1)
    fit(make_module(rollout=wanted), data(), max_steps=2)
    assert len(wanted.wrote) == 2  # The third batch is not written, as no step will be taken on it.


def test_what_cannot_be_is_refused(make_module: MakeModule, engine_of: Any) -> None:
    class Itself(Elsewhere):
        copies_weights = False

    for name, options in {"sync_every": {"sync_every": 2}, "ahead": {"ahead": 1}}.items():
        with pytest.raises(InputError, match=rf"init_args\.{name} has the engine be behind .* Itself writes with"):
            Itself(**options)
    Itself()
    for options in ({"sync_every": 0}, {"ahead": 2}, {"ahead": -1}):
        with pytest.raises(InputError, match=rf"^model\.rollout\.init_args\.{next(iter(options))} must be"):
            Elsewhere(**options)
    module = make_module(rollout=engine_of(1, 1))
    with pytest.raises(InputError, match=r"ahead=1 needs to know the next batch"):
        quiet_trainer().fit(module, loader(["the cat"]))
    with pytest.raises(InputError, match=r"model\.rollout\.init_args\.ahead acts through"):
        make_module(rollout=engine_of(1, 1)).sample(["the cat"])
