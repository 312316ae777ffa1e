"""The exploration experiments: regret by hand, seeds that do not touch each other, a sweep that goes on."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_configs import parse

from xpo_lightning.core.rng import RolloutRNG
from xpo_lightning.module import XPOLightningModule

HERE = Path(__file__).parents[2] / "experiments" / "exploration"
ARMS = sorted(file.stem for file in (HERE / "arms").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def regret_rows(folder: Path) -> list[list[float]]:
    """Read labels and the regret of each seed at each measurement."""
    with (folder / "regret.csv").open(newline="") as file:
        return [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[list[float]]]:
    """Give a function that does a run through the command line, and returns what its `regret.csv` holds."""
    from plan import Run
    from problems import PROBLEMS, write
    from sweep import do

    def trained(problem: Any, arm: str, seeds: int, labels: int, **model: Any) -> list[list[float]]:
        run, out = Run("test", problem.name, arm, labels=labels, model=model), tmp_path / f"{seeds}_seeds"
        write(problem, out / "problems", seeds)
        assert PROBLEMS[problem.name].pairs == problem.pairs  # the run looks it up there
        assert do(run, out)[0] is None, (out / run.name / "log.txt").read_text()
        return regret_rows(out / run.name)

    return trained


def test_regret_of_two_arms_worked_by_hand():
    """Reference (1/2, 1/2), rewards (log 3, 0), beta 1: J* = log(3/2 + 1/2) = log 2, reached by (3/4, 1/4).

    J(ref) = log(3) / 2. J of always taking the first arm is log 3 - log 2.
    """
    from regret import best_value, value

    policies = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1 - 1e-12, 1e-12]], dtype=torch.float64)[:, None].log()
    reference = torch.full((3, 1, 2), 0.5, dtype=torch.float64).log()
    rewards = torch.tensor([[math.log(3), 0.0]] * 3, dtype=torch.float64)
    regret = best_value(reference, rewards, 1.0) - value(policies, reference, rewards, 1.0)
    by_hand = [math.log(2) - math.log(3) / 2, 0.0, math.log(2) - (math.log(3) - math.log(2))]
    assert regret.tolist() == pytest.approx(by_hand, abs=1e-9)


def test_regret_of_sequences_worked_by_hand():
    """Two tokens of two, uniform reference, beta 1/2, r(01) = log 2, else 0: J* = log(4/4 + 3/4) / 2 = log(7/4) / 2.

    A policy with 0 first and then (1/4, 3/4), else uniform: E r = 3/4 log 2; its KL from the reference is log 2 for the
    first token and 1/4 log(1/2) + 3/4 log(3/2) = 3/4 log 3 - log 2 for the second, together 3/4 log 3.
    """
    from regret import best_value, value

    reference = torch.full((1, 3, 2), 0.5, dtype=torch.float64).log()
    policy = torch.tensor([[[1 - 1e-12, 1e-12], [0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64).log()
    rewards = torch.tensor([[0.0, math.log(2), 0.0, 0.0]], dtype=torch.float64)
    assert float(best_value(reference, rewards, 0.5)) == pytest.approx(math.log(7 / 4) / 2)
    by_hand = 0.75 * math.log(2) - 0.5 * 0.75 * math.log(3)
    assert float(value(policy, reference, rewards, 0.5)) == pytest.approx(by_hand, abs=1e-9)


def test_measurement_before_the_first_step_is_the_references_regret(train: Callable[..., Any]):
    """Regret of the reference at beta 0.02, by hand: J* = 0.02 log(e^-6.25 e^50 + (1 - e^-6.25) e^25), less its own."""
    from problems import PROBLEMS

    rare = math.exp(-6.25)
    best = 0.02 * math.log(rare * math.exp(50) + (1 - rare) * math.exp(25))
    first, *others = train(PROBLEMS["beta_0.02"], "dpo", seeds=2, labels=8)
    assert first == pytest.approx([0, *[best - (0.5 + rare / 2)] * 2], rel=1e-5)
    assert [row[0] for row in others] == [4, 8]


@pytest.mark.parametrize(
    ("problem", "arm"),
    [
        ("rare_best", "xpo_both"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("rare_mode", "xpo_sgd"), ("rare_best", "xpo"))),
    ],
)
def test_a_seed_among_others_ends_as_it_would_alone(
    problem: str, arm: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """Seed 2 of 3 has rows 2, 5, 8, ... of the noise, as process 2 of 3 would have them."""
    from problems import PROBLEMS

    shape = PROBLEMS[problem]
    together = train(shape, arm, seeds=3, labels=320)

    def third(module: XPOLightningModule, stream: int, number: int) -> RolloutRNG:
        return RolloutRNG(module.run_state.seed, stream, number, rank=2, world_size=3)

    monkeypatch.setattr(XPOLightningModule, "_rng", third)
    alone = train(replace(shape, rewards=lambda seeds: shape.rewards(3)[2:]), arm, seeds=1, labels=320)
    assert [row[1] for row in alone] == pytest.approx([row[3] for row in together], rel=1e-3)
    assert abs(alone[-1][1] - alone[0][1]) > 0.005  # it has moved, by more than rounding
    assert len({row[1] for row in together} & {row[3] for row in together}) < len(together) / 2  # and not as another


@pytest.mark.parametrize("arm", ARMS)
def test_arm_parses_with_the_rest(arm: str, tmp_path: Path):
    from problems import PROBLEMS, write

    problem = write(PROBLEMS["beta_0.02"], tmp_path, seeds=2)
    files = [HERE / "base.yaml", problem, HERE / "arms" / f"{arm}.yaml", HERE / "fast.yaml"]
    config = parse("fit", *(word for file in files for word in ("--config", str(file))))
    assert config.model.beta == 0.02
    assert config.model.labels.rule == "bradley_terry"
    assert config.model.max_grad_norm is None
    assert (config.model.alpha == 0) == arm.startswith("dpo")
    sgd, eps = arm == "xpo_sgd", {"xpo_eps": 1e-8}.get(arm, 1e-12)
    assert config.model.optimizer.class_path == f"torch.optim.{'SGD' if sgd else 'Adam'}"
    assert config.model.optimizer.init_args.get("eps") == (None if sgd else eps)


def test_every_run_has_an_arm_a_problem_a_look_and_a_name_of_its_own():
    from figures import LOOKS
    from plan import EXPERIMENTS, runs
    from problems import PROBLEMS

    names = [run.name for run in runs()]
    assert len(set(names)) == len(names)
    for run in runs():
        assert run.experiment in EXPERIMENTS
        assert run.arm in ARMS
        assert run.problem in PROBLEMS
        assert run.name.split("/")[2] in LOOKS


def test_finished_runs_are_told_from_others(tmp_path: Path):
    from plan import Run
    from problems import PROBLEMS, write
    from sweep import do, is_done

    write(PROBLEMS["beta_0.02"], tmp_path / "problems", seeds=1)
    run = Run("E1", "beta_0.02", "dpo", labels=8)
    assert not is_done(run, tmp_path)
    assert do(run, tmp_path)[0] is None
    assert is_done(run, tmp_path)
    write(PROBLEMS["beta_0.02"], tmp_path / "problems", seeds=1)
    assert is_done(run, tmp_path), "the same problem, written anew"
    assert not is_done(replace(run, labels=12), tmp_path)
    write(PROBLEMS["beta_0.02"], tmp_path / "problems", seeds=2)
    assert not is_done(run, tmp_path), "another number of seeds"


def test_run_that_fails_is_named(tmp_path: Path):
    from plan import Run
    from problems import PROBLEMS, write
    from sweep import do, is_done

    write(PROBLEMS["beta_0.02"], tmp_path / "problems", seeds=1)
    run = Run("E1", "beta_0.02", "dpo", labels=8, model={"beta": -1.0})
    assert "exit status 2" in str(do(run, tmp_path)[0])
    assert not is_done(run, tmp_path)


@pytest.mark.slow
def test_xpo_leaves_online_dpo_behind(train: Callable[..., Any]):
    """Proposition 2.1's problem at beta 0.0125: of 20 seeds more are below its regret of 1/8 by XPO than by online DPO.

    At 1,200 labels a seed. How probable is a failure, were the random numbers others? Online DPO does not move before
    it draws `a`, so at most D seeds are below 1/8, where D is binomial of 20 and 1 - (1 - e^-10)^2400 = 0.103. Of XPO's
    seeds 14 of 20 were when this was measured; were X binomial of 20 and 0.7, P(X <= D) = 1.2e-5; with the lower end of
    the one-sided 95% confidence interval, 0.49, it is 0.0031. The seed is fixed, so that on one machine the outcome is
    always the same.
    """
    from problems import PROBLEMS

    below = {}
    for arm in ("dpo", "xpo"):
        last = train(PROBLEMS["beta_0.0125"], arm, seeds=20, labels=1200)[-1]
        below[arm] = sum(regret < 1 / 8 for regret in last[1:])
    assert below["xpo"] > below["dpo"]


@pytest.mark.slow
def test_killed_sweep_goes_on(tmp_path: Path):
    command = [sys.executable, str(HERE / "run.py"), "--only", "E1/beta_0.02/dpo", "--seeds", "2", "--labels", "800"]
    command += ["--processes", "1", "--out", str(tmp_path)]
    done = tmp_path / "E1" / "beta_0.02" / "dpo" / "inputs.txt"
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not done.exists():
            assert killed.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    before = done.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 of 2 runs are done already" in again.stdout
    assert done.stat().st_mtime_ns == before
    with (tmp_path / "results" / "runs.csv").open(newline="") as file:
        arms = [row["arm"] for row in csv.DictReader(file)]
    assert arms == ["dpo", "dpo_reference"]
    assert (tmp_path / "results" / "exploration_e1.png").stat().st_size > 10_000
