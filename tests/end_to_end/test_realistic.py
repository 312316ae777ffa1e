"""XPO beside online DPO: the arms are what they are called, runs are made once, and numbers are collected right."""

import csv
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_configs import parse

HERE = Path(__file__).parents[2] / "experiments" / "realistic"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import `run.py` under a name that no other script has."""
    monkeypatch.syspath_prepend(HERE)
    spec = importlib.util.spec_from_file_location("realistic_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "realistic_run", module)
    spec.loader.exec_module(module)
    return module


def runs(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    args = script._arguments()
    monkeypatch.setattr(sys, "argv", ["xpo"])
    out.mkdir(exist_ok=True)
    options = script._shared_options(args, out)
    return {arm: script._run(arm, 1, out, args.model, options) for arm in args.arms}


@pytest.mark.parametrize("model", ["quickstart", "smollm2"])
def test_arms_differ_in_sampler_and_alpha_alone(script, model, tmp_path, monkeypatch):
    monkeypatch.chdir(script.ROOT)
    made = runs(script, monkeypatch, tmp_path, "--model", model, "--steps", "7")
    configs = {arm: parse("fit", *run.options) for arm, run in made.items()}
    assert list(configs) == ["xpo", "xpo_small", "dpo_reference", "online_dpo"]
    assert {arm: (config.model.alpha, config.model.alpha_in_beta) for arm, config in configs.items()} == {
        "xpo": (0.05, True),
        "xpo_small": (1e-5, False),
        "dpo_reference": (0.0, False),
        "online_dpo": (0.0, False),
    }
    samplers = {arm: config.model.sampler and config.model.sampler.class_path for arm, config in configs.items()}
    assert samplers == {**dict.fromkeys(configs), "online_dpo": "xpo_lightning.PolicySampler"}
    for config in configs.values():
        config.model.alpha = config.model.alpha_in_beta = config.model.sampler = config.config = None
    assert all(config == configs["xpo"] for config in configs.values())
    assert configs["xpo"].trainer.max_steps == 7
    assert configs["xpo"].seed_everything == 1


def test_smollm2_answers_each_validation_prompt_several_times(script, tmp_path, monkeypatch):
    monkeypatch.chdir(script.ROOT)
    words = ("--model", "smollm2", "--answers", "3", "--policy-path", "somewhere/policy", "--arms", "xpo")
    config = parse("fit", *runs(script, monkeypatch, tmp_path, *words)["xpo"].options)
    assert config.model.policy.path == "somewhere/policy"
    prompts = (script.ROOT / "configs/data/smollm2_prompts_validation.jsonl").read_text()
    assert Path(config.data.validation_source).read_text() == 3 * prompts


def write_metrics(folder: Path, rows: list[dict[str, float]], batch: int = 8) -> None:
    (folder / "version_0").mkdir(parents=True)
    (folder / "version_0" / "config.yaml").write_text(f"data:\n  batch_size: {batch}\n")
    with (folder / "version_0" / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)


def validation(step: int, win_rate: float) -> dict[str, float]:
    names = ("eval/win_rate", "eval/win_rate_stderr", "eval/objective/kl", "eval/objective/model_scores")
    return {"step": step, **dict(zip(names, (win_rate, 0.03, step / 10, 1.5), strict=True))}


def test_numbers_are_collected_by_labels(script, tmp_path):
    """Two seeds at 16 labels: win rates 0.6 and 0.8 have the mean 0.7 and the standard error 0.1.

    The other arm has 0.5 and 0.6 there, so the gains are 0.1 and 0.2: 0.15 with a standard error of 0.05. One run has
    gone on to 24 labels; the others have not.
    """
    wins = {("xpo", 1): 0.6, ("xpo", 2): 0.8, ("dpo_reference", 1): 0.5, ("dpo_reference", 2): 0.6}
    for (arm, seed), win in wins.items():
        training = {"step": 1, "loss/dpo": 0.7}
        rows = [validation(0, 0.5), training, validation(2, win)]
        write_metrics(tmp_path / f"{arm}-{seed}", rows + ([validation(3, 0.9)] if seed == 1 else []))
    curves = script.label_curves
    rows = curves.collect(tmp_path)
    assert len(rows) == 4 * 2 + 2
    assert rows[-1] == curves.Row("xpo", 2, 16, 0.8, 0.03, 0.2, 1.5)
    assert curves.last_labels(rows) == 16
    table = curves.table(rows, script.ARMS).splitlines()
    assert table[0].startswith("| after 16 labels |")
    assert (
        table[2]
        == "| `xpo`: XPO, alpha 0.05 beta | 2 | 0.700 ± 0.100 | 0.200 ± 0.000 | 1.500 ± 0.000 | 0.150 ± 0.050 |"
    )
    assert table[3].endswith("| 0.550 ± 0.050 | 0.200 ± 0.000 | 1.500 ± 0.000 |  |")
    assert len(table) == 4
    curves.write(rows, tmp_path / "curves.csv")
    assert curves.read(tmp_path / "curves.csv") == rows
    script.label_plot.draw(rows, script.ARMS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_one_seed_has_no_standard_error(script):
    average, error = script.label_curves.summary([0.25])
    assert average == 0.25
    assert math.isnan(error)


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(script, tmp_path, monkeypatch, capsys):
    small = ("--data.batch_size", "4", "--data.max_validation_prompts", "8", "--trainer.val_check_interval", "1")
    words = ["run.py", "--arms", "dpo_reference", "--seeds", "1", "--out", str(tmp_path), "--steps"]

    def ask(steps: int, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [*words, str(steps), "--", *small, *options])
        return script.main()

    assert ask(1, "--model.beta", "-1") == 1
    said = capsys.readouterr()
    assert "failed, see" in said.out
    assert "model.beta" in (tmp_path / "dpo_reference-1" / "log.txt").read_text()
    assert ask(1) == 0
    assert "| after 4 labels |" in capsys.readouterr().out
    written = (tmp_path / "dpo_reference-1" / "version_0" / "metrics.csv").stat()
    assert ask(1) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    assert (tmp_path / "dpo_reference-1" / "version_0" / "metrics.csv").stat() == written
    with pytest.raises(SystemExit, match="other settings"):
        ask(2)
