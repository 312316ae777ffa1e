"""Runs and their folders: what looks at a run opens none, a refused start leaves none, and a folder names its run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BARE
from test_cli import refused, rows_of

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.cli.main import main as command
from xpo_lightning.core.errors import InputError
from xpo_lightning.evaluation.saved_run import checkpoint_and_config, find_saved_run

Xpo = Callable[..., None]
EXPORT = {"class_path": "PolicyExport", "init_args": {"at": "best"}}


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [len(text) + 0.01 * text.count("e") for text in completions]


def words(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[str]:
    return ["good"] * len(completions)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., str]) -> Path:
    """Write the config of a small run into an empty folder, and go there."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the cat sat on {n}"}) + "\n" for n in range(8)))
    content = {
        "model": {
            "policy": {"path": model_folder()},
            "reward": {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.letters"}},
            "sampling": {"max_new_tokens": 5},
            "learning_rate": 0.03,
        },
        "data": {"source": "prompts.jsonl", "validation_size": 4, "batch_size": 4},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False},
        "defaults": BARE,
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def xpo(monkeypatch: pytest.MonkeyPatch) -> Xpo:
    """Give a function that is the command `xpo`, with all that it checks before it imports torch."""

    def call(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["xpo", *words])
        command()

    return call


@pytest.fixture
def run(config: Path) -> Path:
    """Make a run, and return its folder."""
    main(["fit", "--config", str(config)])
    return Path("runs/version_0")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- looking at a run ----


def test_validate_and_predict_write_into_the_run_and_open_no_version(run: Path, config: Path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for verb in ("validate", "predict", "validate", "predict"):
        main([verb, "--config", str(config), "--ckpt_path", "last"])
    assert names_in(Path("runs")) == ["version_0"]
    assert names_in(run) == ["checkpoints", "config.yaml", "metrics.csv", "predict", "validate"]
    assert {path: path.read_bytes() for path in before} == before
    trained = next(row for row in rows_of(run / "metrics.csv") if "eval/win_rate" in row)
    validated = rows_of(run / "validate" / "metrics.csv")
    assert [row["eval/objective/kl"] for row in validated] == [trained["eval/objective/kl"]] * 2
    assert len((run / "predict" / "predictions.jsonl").read_text().splitlines()) == 4
    main(["report", "runs"])
    assert "runs/version_0" in Path("report.html").read_text()


def test_untrained_policy_is_looked_at_in_the_root_folder(config: Path):
    main(["validate", "--config", str(config)])
    main(["predict", "--config", str(config)])
    assert names_in(Path("runs")) == ["predict", "validate"]
    assert len(rows_of(Path("runs/validate/metrics.csv"))) == 1


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_run_without_loggers_keeps_its_config_when_looked_at(config: Path, verb: str):
    options = ["--config", str(config), "--trainer.logger=false"]
    main(["fit", *options])
    before = Path("runs/config.yaml").read_text()
    main([verb, *options, "--ckpt_path", "last"])
    assert Path("runs/config.yaml").read_text() == before
    assert verb in names_in(Path("runs"))


def test_own_version_is_not_written_over_by_a_look(config: Path):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "x", "version": "mine"}}
    options = ["--config", str(config), f"--trainer.logger={json.dumps(logger)}"]
    main(["fit", *options])
    before = Path("logs/x/mine/metrics.csv").read_text()
    main(["validate", *options, "--ckpt_path", "last"])
    assert Path("logs/x/mine/metrics.csv").read_text() == before
    assert names_in(Path("logs/x")) == ["mine"]


# ---- refused starts ----


@pytest.mark.parametrize(
    "options",
    [
        ["--model.policy.path", "nowhere/model"],
        ["--data.source", "nowhere.jsonl"],
        ["--data.prompt_column", "question"],
        ["--model.reward.init_args.function", f"{__name__}.words"],
        [f"--trainer.callbacks={json.dumps([EXPORT])}", "--data.validation_size=0"],
        ["--model.sampling.max_new_tokens", "200"],
        ["--trainer.val_check_interval", "50"],
    ],
    ids=["model", "data", "column", "reward", "export", "length", "interval"],
)  # fmt: skip
def test_refused_start_leaves_no_folder(config: Path, capsys: pytest.CaptureFixture[str], options: list[str]):
    before = names_in(Path())
    refused(capsys, "fit", "--config", str(config), *options, "--trainer.default_root_dir", "deep/er")
    assert names_in(Path()) == before


def test_refused_start_leaves_the_runs_that_are_there(run: Path, config: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(path for path in Path("runs").rglob("*"))
    for verb in ("fit", "validate", "predict"):
        refused(capsys, verb, "--config", str(config), "--data.prompt_column", "question")
    assert sorted(path for path in Path("runs").rglob("*")) == before
    main(["fit", "--config", str(config)])
    assert names_in(Path("runs")) == ["version_0", "version_1"]


def test_run_that_fails_after_it_has_logged_stays(config: Path, capsys: pytest.CaptureFixture[str]):
    refused(
        capsys, "fit", "--config", str(config), "--defaults.baseline=true", "--model.reward.init_args.function",
        f"{__name__}.words_of_training",
    )  # fmt: skip
    assert "metrics.csv" in names_in(Path("runs/version_0"))


def constant(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [7.0] * len(completions)


def words_of_training(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[Any]:
    """Score the baseline, and nothing after it."""
    CALLS.append(len(completions))
    return letters(prompts, completions, columns) if len(CALLS) == 1 else words(prompts, completions, columns)


CALLS: list[int] = []


# ---- a run by its folder ----


@pytest.mark.parametrize("name", [pytest.param("runs/version_0", marks=pytest.mark.slow), "runs"])
def test_folder_is_all_that_a_look_needs(run: Path, xpo: Xpo, capsys: pytest.CaptureFixture[str], name: str):
    Path("runs/version_1").mkdir()  # an older program's refused start
    xpo("validate", name)
    xpo("predict", name, "--data.max_validation_prompts", "2")
    assert names_in(run) == ["checkpoints", "config.yaml", "metrics.csv", "predict", "validate"]
    assert len((run / "predict" / "predictions.jsonl").read_text().splitlines()) == 2
    trained = next(row for row in rows_of(run / "metrics.csv") if "eval/win_rate" in row)
    (row,) = rows_of(run / "validate" / "metrics.csv")
    assert row["eval/objective/kl"] == trained["eval/objective/kl"] != 0
    xpo("export", name, "--out", "policy")
    assert (Path("policy") / "model.safetensors").is_file()
    capsys.readouterr()
    xpo("compare", name)
    assert f"A           {run}/checkpoints/last.ckpt\nB           reference" in capsys.readouterr().out
    xpo("chat", name, "--prompt", "the cat")
    assert "reference" in capsys.readouterr().out
    xpo("report", name)
    xpo("plot", name)
    assert {"report.html", "curves.png"} <= set(names_in(Path()))


def test_options_of_the_classes_that_a_runs_config_names_are_known(
    run: Path, xpo: Xpo, capsys: pytest.CaptureFixture[str]
):
    xpo("validate", "runs", "--model.reward.function", f"{__name__}.constant")
    (row,) = rows_of(run / "validate" / "metrics.csv")
    assert float(row["eval/objective/model_scores"]) == 7
    with pytest.raises(SystemExit) as end:
        xpo("validate", "runs", "--model.reward.function_", "x")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith("no option 'model.reward.function_' (on the command line); did you mean 'function'?\n")


def test_folder_that_is_not_there_is_named_before_anything_else(xpo: Xpo, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        xpo("validate", "runs/nowhere")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("xpo: error: RUN: there is no folder 'runs/nowhere'")


def test_folder_that_was_moved_is_written_to_where_it_is(run: Path):
    moved = run.rename("elsewhere")
    main(["validate", "elsewhere"])
    assert len(rows_of(moved / "validate" / "metrics.csv")) == 1
    assert names_in(Path("runs")) == []


def test_two_runs_are_compared_each_by_its_own_config(run: Path, config: Path, capsys: pytest.CaptureFixture[str]):
    main(["fit", "--config", str(config), "--model.lora.r", "2"])
    capsys.readouterr()
    main(["compare", "runs/version_0", "runs/version_1", "--json", "result.json"])
    first = json.loads(Path("result.json").read_text())
    assert [first["a"], first["b"]] == [f"runs/version_{n}/checkpoints/last.ckpt" for n in (0, 1)]
    main(["compare", "runs/version_1", "runs/version_0", "--json", "result.json"])
    assert json.loads(Path("result.json").read_text())["win_rate"] == pytest.approx(1 - first["win_rate"])


def test_checkpoint_in_its_run_needs_no_config(run: Path, capsys: pytest.CaptureFixture[str]):
    main(["export", str(run / "checkpoints" / "last.ckpt"), "--out", "policy"])
    assert (Path("policy") / "model.safetensors").is_file()
    (run / "checkpoints" / "last.ckpt").rename("alone.ckpt")
    assert "give the config of its run, --config" in refused(capsys, "export", "alone.ckpt", "--out", "again")


def test_folders_that_are_no_runs(run: Path, model_folder: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    for name in ("reference", "owner/name", "package:xpo_lightning/embedded/policy", model_folder()):
        assert checkpoint_and_config(name, "given.yaml") == (name, "given.yaml")
    Path("empty").mkdir()
    for verb in ("validate", "predict"):
        assert "there is no folder 'nowhere'" in refused(capsys, verb, "nowhere")
        assert "neither 'empty' nor a version_0" in refused(capsys, verb, "empty")
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="a checkpoint in checkpoints/"):
        find_saved_run("runs")
