"""Throughput: its numbers against a clock that the test turns, and against what the module sampled."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import jsonargparse
import lightning.pytorch as pl
import pytest
from conftest import PROMPTS, Recorder, fit_quietly, loader, longer_is_better, quiet_trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from xpo_lightning import XPOLightningModule
from xpo_lightning.callbacks import Throughput
from xpo_lightning.core import timer as phases
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.timer import Phase, PhaseTimer
from xpo_lightning.reporting.metrics_file import read_metrics
from xpo_lightning.rewards.python import PythonReward

MakeModule = Callable[..., XPOLightningModule]

TIMES = {f"time/{phase}" for phase in get_args(Phase)} | {"time/step"}
RATES = {"throughput/prompts_per_second", "throughput/tokens_per_second"}
EIGHT = (PROMPTS * 2)[:8]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give a clock that stands still; `now` is its time."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def slow_reward(clock: SimpleNamespace, training: list[float], validation: float = 0.0) -> PythonReward:
    """Build a reward that takes so many seconds at each training step, and so many at each validation batch."""
    left = iter(training)

    def score(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        clock.now += validation if "validation" in columns else next(left)
        return longer_is_better(prompts, completions, columns)

    return PythonReward(score)


def held_out(batches: int) -> DataLoader:
    """Batch prompts that `slow_reward` knows to be held out."""
    return DataLoader([{"prompt": PROMPTS, "validation": [True] * len(PROMPTS)}] * batches, batch_size=None)


def completion_tokens(step: dict[str, float], pairs: int) -> float:
    """Count the tokens of both sides from the means that the module logs."""
    return pairs * (step["completions/model_length"] + step["completions/ref_length"])


# ---- names ----


def test_throughput_names_are_logged_and_documented(make_module: MakeModule, tmp_path: Path):
    logger = CSVLogger(tmp_path, name=None, version="run")
    fit_quietly(make_module(), EIGHT, 4, callbacks=[Throughput()], logger=logger, log_every_n_steps=1)
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    ours = {name for name in metrics if name.startswith(("time/", "throughput/"))}
    assert ours == TIMES | RATES
    assert all(metrics[name].steps == metrics["win_rate"].steps == [1, 2] for name in ours)
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert ours == set(re.findall(r"`((?:time|throughput)/\w+)`", page))


def test_throughput_when_absent_logs_nothing(make_module: MakeModule):
    recorder = Recorder()
    fit_quietly(make_module(), PROMPTS, callbacks=[recorder], log_every_n_steps=1)
    assert not recorder.steps[0].keys() & (TIMES | RATES)


# ---- numbers ----


def test_throughput_phases_fill_the_step_and_rates_are_counts_over_its_seconds(make_module: MakeModule):
    recorder, sizes = Recorder(), [3, 3, 2]
    module = make_module(rollout_batch_size=2, micro_batch_size=2)
    fit_quietly(module, EIGHT, 3, callbacks=[Throughput(), recorder], log_every_n_steps=1)
    for step, size in zip(recorder.steps, sizes, strict=True):
        timed = [step[name] for name in TIMES - {"time/step"}]
        assert min(timed) > 0
        assert sum(timed) <= step["time/step"]
        counted = step["throughput/tokens_per_second"] * step["time/step"]
        assert counted == pytest.approx(completion_tokens(step, size), rel=1e-5)
        assert step["throughput/prompts_per_second"] * step["time/step"] == pytest.approx(size, rel=1e-5)


def test_throughput_averages_over_the_steps_since_the_last_log(make_module: MakeModule, clock: SimpleNamespace):
    """Steps of 1, 3, 5 and 7 s are logged in pairs: 2 and 6 s a step, and 4 prompts in 4 and in 12 s."""
    recorder, module = Recorder(), make_module(reward=slow_reward(clock, [1.0, 3.0, 5.0, 7.0]))
    fit_quietly(module, EIGHT, 2, callbacks=[Throughput(), recorder], log_every_n_steps=2)
    first, _, _, last = recorder.steps
    assert not first.keys() & (TIMES | RATES)
    assert recorder.steps[2]["time/step"] == recorder.steps[1]["time/step"] == 2.0
    assert last["time/step"] == last["time/reward"] == 6.0
    assert last["time/policy_rollout"] == last["time/optimizer"] == 0.0
    assert recorder.steps[1]["throughput/prompts_per_second"] == 1.0
    assert last["throughput/prompts_per_second"] == pytest.approx(4 / 12)
    for logged, seconds in ((1, 4), (3, 12)):
        tokens = sum(completion_tokens(step, 2) for step in recorder.steps[logged - 1 : logged + 1])
        assert recorder.steps[logged]["throughput/tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"val_check_interval": 1}, {"max_epochs": 2}], ids=["inside", "at the end"])
def test_throughput_does_not_count_validation(make_module: MakeModule, clock: SimpleNamespace, options: dict[str, int]):
    """Steps of 1, 2 and 6 s are 3 s a step, though validation batches of 100 s lie before and between them."""
    module = make_module(reward=slow_reward(clock, [1.0, 2.0, 6.0] * 3, validation=100.0))
    recorder = Recorder()
    trainer = quiet_trainer(callbacks=[Throughput(), recorder], log_every_n_steps=3, **options)
    trainer.fit(module, loader(EIGHT, 2), held_out(batches=2))
    assert clock.now > 1600, "or nothing was validated"
    logged = recorder.steps[2::3]
    assert logged
    for step in logged:
        assert step["time/step"] == step["time/reward"] == 3.0
        assert step["throughput/prompts_per_second"] == pytest.approx(6 / 9)


def test_throughput_of_a_second_run_forgets_the_first(make_module: MakeModule, clock: SimpleNamespace):
    """The first run leaves a step of 50 s unlogged, and a validation of 100 s on the module's timer."""
    module, callback = make_module(reward=slow_reward(clock, [50.0, 1.0, 1.0], validation=100.0)), Throughput()
    fit_quietly(module, PROMPTS, callbacks=[callback], log_every_n_steps=2)
    recorder = Recorder()
    quiet_trainer().validate(module, held_out(batches=1), verbose=False)
    fit_quietly(module, PROMPTS, callbacks=[callback, recorder], log_every_n_steps=1)
    assert recorder.of("time/step") == [1.0]
    assert recorder.of("throughput/prompts_per_second") == [5.0]


def test_throughput_reads_the_timer_at_logged_steps_only(make_module: MakeModule, monkeypatch: pytest.MonkeyPatch):
    reads: list[int] = []
    module, read = make_module(), PhaseTimer.seconds
    monkeypatch.setattr(PhaseTimer, "seconds", lambda timer: (reads.append(module.global_step), read(timer))[1])
    fit_quietly(module, EIGHT, 2, callbacks=[Throughput()], log_every_n_steps=3, max_epochs=2)
    assert reads == [3, 6]


def test_throughput_of_several_processes_adds_their_work_and_averages_their_seconds(
    make_module: MakeModule, clock: SimpleNamespace
):
    """This process takes 1 s for 5 prompts; another, equal but for its 3 s, makes it 10 prompts in 2 s."""

    class WithAnother(SingleDeviceStrategy):
        def reduce(self, tensor: Tensor, *args: Any, reduce_op: str = "mean", **options: Any) -> Tensor:
            assert reduce_op == "sum"
            if tensor.ndim == 0:  # Lightning adds up the lengths of the data.
                return 2 * tensor
            calls.append(len(tensor))
            return tensor + tensor * tensor.new_tensor([1.0, 1.0] + [3.0] * (len(tensor) - 2))

    calls: list[int] = []
    recorder, module = Recorder(), make_module(reward=slow_reward(clock, [1.0]))
    strategy = WithAnother("cpu")
    strategy.world_size = 2
    options = {"strategy": strategy, "accelerator": "auto", "log_every_n_steps": 1}
    fit_quietly(module, PROMPTS, callbacks=[Throughput(), recorder], **options)
    (step,) = recorder.steps
    assert len(calls) == 1
    assert step["time/step"] == step["time/reward"] == 2.0
    assert step["throughput/prompts_per_second"] == 5.0
    assert step["throughput/tokens_per_second"] == pytest.approx(2 * completion_tokens(step, 5) / 2)


# ---- settings ----


def test_throughput_refuses_other_modules():
    with pytest.raises(InputError, match="Throughput needs an XPOLightningModule, not LightningModule"):
        Throughput().setup(quiet_trainer(), pl.LightningModule(), "fit")


@pytest.mark.parametrize("name", ["Throughput", "xpo_lightning.callbacks.Throughput"])
def test_throughput_is_built_from_a_config(name: str):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    (built,) = parser.instantiate(parser.parse_object({"callbacks": [{"class_path": name}]})).callbacks
    assert type(built) is Throughput
