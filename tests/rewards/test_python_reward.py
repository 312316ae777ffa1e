"""Python functions as rewards: what they get, may return and may raise, alone and in a run."""

import builtins
import copy
import gc
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BARE, TEST_PATHS
from scoring import by_length, score

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards import PythonReward


def test_a_function_gets_lists_and_its_own_arguments() -> None:
    seen: dict[str, Any] = {}

    def remember(**everything: Any) -> list[bool]:
        seen.update(everything)
        return [a == b for a, b in zip(everything["completions"], everything["columns"]["answer"], strict=True)]

    scores = score(PythonReward(remember, {"strict": 2}), ("p", "q"), ("yes", "no"), answer=("yes", "yes"), n=(1, 2))
    assert scores.tolist() == [1.0, 0.0]
    columns = {"answer": ["yes", "yes"], "n": [1, 2]}
    assert seen == {"prompts": ["p", "q"], "completions": ["yes", "no"], "columns": columns, "strict": 2}


@pytest.mark.parametrize(
    "kind", [ValueError, StopIteration, KeyError, KeyboardInterrupt, SystemExit, GeneratorExit, TimeoutError]
)
def test_whatever_a_function_raises_says_what_and_where(kind: type[BaseException]) -> None:
    error = kind("no grader")

    def broken(**everything: Any) -> list[float]:
        raise error

    what = rf"^reward function .*broken raised {kind.__name__}: '?no grader"
    with pytest.raises(InputError, match=what) as caught:
        score(PythonReward(broken), ["p"], ["c"])
    assert caught.value.__cause__ is error


def test_an_exception_without_a_message_is_named_alone() -> None:
    def stops(**everything: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(InputError, match=r"stops raised KeyboardInterrupt$"):
        score(PythonReward(stops), ["p"], ["c"])


def test_bad_input_that_a_function_reports_itself_passes_unchanged() -> None:
    error = InputError("answers.csv, row 7: no answer")

    def strict(**everything: Any) -> list[float]:
        raise error

    with pytest.raises(InputError) as caught:
        score(PythonReward(strict), ["p"], ["c"])
    assert caught.value is error


def hangs_once(minutes: float = 10) -> tuple[Callable[..., list[float]], threading.Event]:
    """Give a function whose first call does not return by itself, and what lets it."""
    release, calls = threading.Event(), []

    def hang(**everything: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            release.wait(60 * minutes)
        return [float(len(calls))] * len(everything["completions"])

    return hang, release


def test_a_function_that_does_not_return_is_given_up_and_the_next_call_works() -> None:
    function, release = hangs_once()
    reward = PythonReward(function, timeout=0.2)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"function .*hang has not returned after 0\.2 seconds.*init_args\.timeout"):
        score(reward, ["p"], ["c"])
    assert 0.2 <= time.monotonic() - start < 2
    assert score(reward, ["p"], ["c"]).tolist() == [2.0]
    release.set()
    assert score(reward, ["p"], ["c"]).tolist() == [3.0], "and not what the first call returned in the end"


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e300])
def test_a_function_may_take_its_time(timeout: float | None) -> None:
    def slow(**everything: Any) -> list[float]:
        time.sleep(0.3)
        return [1.0]

    assert score(PythonReward(slow, timeout=timeout), ["p"], ["c"]).tolist() == [1.0]


def test_ctrl_c_while_a_function_hangs_is_the_users_own() -> None:
    function, release = hangs_once()

    pressed: list[float] = []

    def press(**everything: Any) -> list[float]:
        time.sleep(0.1)  # Whoever waits does so by now: a signal before that is seen at the next look.
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
        return function(**everything)

    with pytest.raises(KeyboardInterrupt):
        score(PythonReward(press, timeout=None), ["p"], ["c"])
    assert time.monotonic() - pressed[0] < 0.8, "at once, not at the next look"
    release.set()


def test_a_function_keeps_its_thread_and_runs_without_gradients() -> None:
    here, seen = threading.local(), []

    def remember(**everything: Any) -> list[float]:
        seen.append((hasattr(here, "open"), torch.is_grad_enabled(), threading.current_thread().daemon))
        here.open = True
        return [0.0]

    reward = PythonReward(remember)
    for _ in range(2):
        score(reward, ["p"], ["c"])
    assert seen == [(False, False, True), (True, False, True)]


def test_a_reward_is_copied_with_a_thread_of_its_own() -> None:
    reward = PythonReward(by_length, {"scale": 2.0}, timeout=5)
    score(reward, ["p"], ["abc"])
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):  # noqa: S301
        assert score(twin, ["p"], ["abc"]).tolist() == [6.0]
        assert (twin.timeout, twin.identity()) == (5, reward.identity())


def test_a_thread_ends_with_its_reward() -> None:
    threads = []

    def remember(**everything: Any) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0]

    reward = PythonReward(remember)
    score(reward, ["p"], ["c"])
    assert threads[0].is_alive()
    del reward
    gc.collect()
    threads[0].join(5)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_an_impossible_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(InputError, match=r"^model\.reward\.init_args\.timeout must be above 0 or null, but is"):
        PythonReward(by_length, timeout=timeout)


def test_a_functions_wrong_output_is_named() -> None:
    def short(**everything: Any) -> list[float]:
        return [1.0]

    with pytest.raises(
        InputError, match=r"^reward function .*test_python_reward\..*short returned a list of length 1; expected 2"
    ):
        score(PythonReward(short), ["p", "q"], ["c", "d"])


def test_a_callable_object_is_named_by_its_class() -> None:
    class Grader:
        def __call__(self, **everything: Any) -> None:
            return None

    with pytest.raises(InputError, match=r"Grader returned None; expected 1 numbers"):
        score(PythonReward(Grader()), ["p"], ["c"])


def test_arguments_that_the_function_cannot_take_are_refused_at_once() -> None:
    def wrong(texts: list[str]) -> list[float]:
        return []

    with pytest.raises(
        InputError, match=r"^model\.reward\.init_args\.function: .*wrong\(texts.* cannot be called with"
    ):
        PythonReward(wrong)
    with pytest.raises(InputError, match=r"by_length.*cannot be called with .*unknown"):
        PythonReward(by_length, {"unknown": 1})
    with pytest.raises(InputError, match=r"init_args\.arguments: 'columns' is taken"):
        PythonReward(by_length, {"columns": {}})


# --- the command line


def short(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [0.0] * (len(completions) - 1)


def words(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[str]:
    return ["good"] * len(completions)


def nothing(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> None:
    return None


def not_finite(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [math.nan, math.inf, *[0.0] * (len(completions) - 2)]


def fails(
    prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], kind: str = "ValueError"
) -> list[float]:
    raise getattr(builtins, kind)("no grader")


def hangs(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    time.sleep(600)
    return []


def run_with(folder: Path, policy: str, function: str, **init_args: Any) -> list[str]:
    """Write the config of a run with a reward function of this file, and give the arguments of the command line."""
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    config = {
        "model": {
            "policy": {"path": policy},
            "reward": {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.{function}", **init_args}},
            "sampling": {"max_new_tokens": 3},
        },
        "data": {"source": str(folder / "prompts.jsonl"), "batch_size": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
        },
        "defaults": BARE,
    }
    (folder / "run.json").write_text(json.dumps(config))  # JSON is YAML
    return ["fit", "--config", str(folder / "run.json")]


@pytest.mark.parametrize(
    ("function", "init_args", "message"),
    [
        *(
            ("fails", {"arguments": {"kind": kind}}, f"raised {kind}: no grader")
            for kind in ("ValueError", "StopIteration", "KeyboardInterrupt", "SystemExit", "GeneratorExit")
        ),
        ("short", {}, "returned a list of length 3; expected 4"),
        ("words", {}, "gave a str ('good') for row 0"),
        ("nothing", {}, "returned None"),
        ("not_finite", {}, "gave nan for row 0 and inf for row 1"),
        ("hangs", {"timeout": 0.2}, "model.reward.init_args.timeout"),
    ],
)
def test_a_run_with_a_broken_reward_function_ends_with_one_line(
    model_folder: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    function: str,
    init_args: dict[str, Any],
    message: str,
) -> None:
    args = run_with(tmp_path, model_folder(), function, **init_args)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if line.startswith("xpo: error: ")] == shown[-1:]
    assert f"reward function {__name__}.{function} " in shown[-1]
    assert message in shown[-1]
    assert not any("Traceback" in line for line in shown)


@pytest.mark.slow
def test_a_process_ends_although_its_reward_function_hangs(model_folder: Callable[..., str], tmp_path: Path) -> None:
    args = run_with(tmp_path, model_folder(), "hangs", timeout=0.2)
    code = f"import sys; from xpo_lightning.cli.lightning_cli import main; main({args!r})"
    path = os.pathsep.join([TEST_PATHS, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "has not returned after 0.2 seconds" in done.stderr.splitlines()[-1]
