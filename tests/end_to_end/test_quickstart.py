"""The README's first command: the embedded models learn, and everything that it promises is left behind."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from test_cli import DECISION_8
from transformers import AutoModelForCausalLM, AutoTokenizer

from xpo_lightning.cli.lightning_cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run a third of the quickstart; return its folder and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("quickstart")
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        import io
        from contextlib import redirect_stdout

        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        with redirect_stdout(io.StringIO()) as printed:
            main(["fit", "--config", str(CONFIG), "--trainer.max_steps", "20", "--trainer.val_check_interval", "20"])
        torch.set_num_threads(threads)
        return folder / "runs" / "quickstart" / "version_0", printed.getvalue()


def metrics(run: tuple[Path, str]) -> list[dict[str, float]]:
    with (run[0] / "metrics.csv").open() as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


@pytest.mark.slow
def test_quickstart_learns_on_held_out_prompts(run: tuple[Path, str]):
    """The untrained policy is its reference: 0.5. After 20 steps it wins more than 0.6, four standard errors away."""
    before, after = (row for row in metrics(run) if "eval/win_rate" in row)
    assert before["step"] == 0
    assert after["step"] == 20
    assert abs(before["eval/win_rate"] - 0.5) < 5 * before["eval/win_rate_stderr"]
    assert abs(before["eval/objective/kl"]) < 1e-4
    assert after["eval/win_rate"] > 0.6
    assert 0.05 < after["eval/objective/kl"] < 20


@pytest.mark.slow
def test_quickstart_logs_every_metric_and_all_are_finite(run: tuple[Path, str]):
    rows = metrics(run)
    logged = {name for row in rows for name in row}
    assert {*DECISION_8, "eval/win_rate", "eval/win_rate_stderr", "eval/objective/kl"} <= logged
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["step"] for row in rows if "loss/dpo" in row] == list(range(1, 21))


@pytest.mark.slow
def test_quickstart_says_where_everything_is(run: tuple[Path, str]):
    folder, printed = run
    for name in ("metrics.csv", "curves.png", "completions.jsonl", "policy", "checkpoints/last.ckpt", "config.yaml"):
        assert (folder / name).exists()
        assert f"runs/quickstart/version_0/{name}" in printed.replace("\n", "")
    assert "eval/win_rate" in printed


@pytest.mark.slow
def test_quickstart_exports_the_trained_policy_for_plain_transformers(run: tuple[Path, str]):
    folder, _ = run
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"policy.{name}"], weight) for name, weight in model.named_parameters())
    inputs = tokenizer("One cold morning, Mara the baker found a wet kitten behind the old mill.", return_tensors="pt")
    torch.manual_seed(0)
    story = tokenizer.decode(model.generate(**inputs, do_sample=True, max_new_tokens=64)[0], skip_special_tokens=True)
    assert story.count(".") >= 2


@pytest.mark.slow
def test_page_names_every_file_that_a_run_leaves(run: tuple[Path, str]):
    page = CONFIG.parents[1].joinpath("docs", "quickstart.md").read_text()
    named = re.findall(
        r"^\| `([\w.]+)/?` \|", page.partition("## What a run leaves")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert sorted(named) == sorted(path.name for path in run[0].iterdir())
