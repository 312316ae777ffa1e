"""The benchmarks: the floor's count by hand, the same task for both sides, and a step of ours with all its phases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import decode, measure, worker_trace
from benchmarks.gpu.assets import make_assets
from benchmarks.speed import report, worker_ours
from benchmarks.speed.flops import Shape, step_flop
from benchmarks.speed.measuring import read_prompts
from benchmarks.speed.suites import SUITES, our_spec, trl_spec

ROOT = Path(__file__).parents[2]


def test_flop_of_a_step_worked_by_hand():
    """One layer of 10 weights, attention of width 3, head of 5 x 2; a prompt of 4 tokens, completions of 2.

    Products: 2 * 10 = 20 a token; head: 2 * 5 * 2 = 20 a position; attention: 4 * 1 * 3 = 12 a pair of positions.
    Reading the prompt: 4 * 20 + 12 * (4 * 5 / 2) = 80 + 120 = 200.
    One more token behind it: 20 + 12 * (4 + 1) = 80. Two: 40 + 12 * (8 + 3) = 172.
    """
    flop = step_flop(Shape(body=10, layers=1, attention=3, hidden=2, vocabulary=5), prompt=4, completion=2)
    assert flop == {
        "policy rollout": 200 + 80 + 2 * 20,
        "reference rollout": 200 + 80 + 2 * 20,
        "reference scoring": 80 + 20,
        "reward": 200 + 2 * 172,
        "policy forward": 200 + 2 * 80 + 3 * 20,
        "backward": 2 * (200 + 2 * 80 + 3 * 20),
    }


def test_frozen_weights_need_no_gradient():
    """Of the 6 trained-on tokens' products (120) and 3 head positions (60) one backward pass falls away."""
    full = step_flop(Shape(10, 1, 3, 2, 5), 4, 2)
    lora = step_flop(Shape(10, 1, 3, 2, 5, adapters=1), 4, 2)
    assert lora["policy forward"] - full["policy forward"] == 2 * 1 * 6
    assert lora["backward"] - full["backward"] == -(120 + 60) + 4 * 1 * 6


@pytest.mark.parametrize("name", ["pythia", "smollm2", "smollm2-lora"])
def test_both_sides_are_told_the_same(name: str):
    suite = SUITES[name]
    ours = our_spec(suite, Path("assets"), suite.prompts, {})
    theirs = trl_spec(suite, Path("assets"), "trl-best", suite.trl_prompts)
    own = {"system", "timed_prompts", "warm_up_prompts", "batch", "options"}
    assert {key: value for key, value in ours.items() if key not in own} == {
        key: value for key, value in theirs.items() if key not in own
    }
    assert theirs["options"]["gradient_checkpointing"] is False
    assert "gradient_checkpointing" not in trl_spec(suite, Path("assets"), "trl-shipped", 4)["options"]


def test_the_tables_have_every_phase():
    """`report.py` runs where this package is not installed, so it keeps a list of its own."""
    from typing import get_args

    from xpo_lightning.core.timer import Phase

    assert get_args(Phase) == report.PHASES


def test_our_worker_times_a_step_and_all_of_its_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """On the tests' tiny models: the worker runs, counts the tokens it promises, and misses no phase."""
    from typing import get_args

    import torch
    from conftest import CONFIGS, make_tokenizer
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from xpo_lightning.core.timer import Phase

    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "policy")
    config = CONFIGS["llama"]()
    config.num_labels, config.pad_token_id = 1, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    for side in ("policy", "reward"):
        make_tokenizer().save_pretrained(tmp_path / side)
    tokenizer = make_tokenizer()
    rows = [f"the cat sat on the mat {number}" for number in range(48)]
    lines = [json.dumps({"prompt": row, "prompt_ids": tokenizer(row)["input_ids"]}) for row in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    spec = {
        "suite": "tiny",
        "system": "ours",
        "assets": str(tmp_path),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "dtype": "float32",
        "lora": None,
        "step_prompts": 16,
        "timed_prompts": 16,
        "options": {},
        **{"alpha": 1e-5, "beta": 0.1, "learning_rate": 5e-7, "temperature": 0.9, "new_tokens": 4},
    }
    monkeypatch.setattr(sys, "argv", ["worker_ours.py", json.dumps(spec)])
    threads = torch.get_num_threads()
    worker_ours.main()
    torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    phases = result["phases_per_prompt"]
    assert set(phases) >= set(get_args(Phase))
    assert min(phases.values()) > 0
    assert sum(phases[phase] for phase in get_args(Phase)) <= 1.01 * result["seconds_per_prompt"]
    assert result["new_tokens"] == 4


def test_the_command_needs_nothing_but_python():
    """Without site-packages: it has to run before there is any environment."""
    command = [sys.executable, "-S", "-m", "benchmarks.speed.compare", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tune-trl" in done.stdout


@pytest.mark.slow
def test_parts_for_a_gpu_run_at_toy_size_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A token's time both ways, the specs of a step's time, and a look into a step."""
    import argparse

    monkeypatch.setattr(decode, "NEW_TOKENS", 3)
    assert next(iter(decode.decode_cases(["toy"]))) == ("toy", 128)
    eager, graphs = decode.measure_decoding("toy", 3)
    assert graphs["same_tokens"] == 1
    assert "toy, 3 rows, eager" in measure.decode_row(eager)
    assets = make_assets(tmp_path, "toy", 4)
    asked = argparse.Namespace(prompts=4, trl_batches=[2], shipped=True)
    specs = measure.time_specs("toy", assets, asked)
    assert [worker for _, worker, _ in specs] == ["speed.worker_ours", "speed.worker_trl"] * 2
    spec = {**specs[0][2], "new_tokens": 3}
    warm, timed = read_prompts(spec)
    trace = worker_trace.StepTrace()
    worker_ours.fit(worker_ours.make_module(spec), [warm[:2], warm[:2], *[timed] * 3], trace)
    assert "aten::mm" in trace.tables()
    assert "modeling_llama.py" in trace.tables()
