"""What docs/extending.md and examples/ show: each is short, and trains."""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import make_tokenizer, prompts_of
from torch.utils.data import DataLoader

from xpo_lightning import (
    BufferOptions,
    InputError,
    ModelSpec,
    PythonReward,
    RolloutEngine,
    Sampling,
    XPOLightningModule,
)
from xpo_lightning.cli.lightning_cli import XPOCLI
from xpo_lightning.rollout.local import LocalRollout

ROOT = Path(__file__).parents[2]
EXAMPLES, QUICKSTART = ROOT / "examples", ROOT / "configs" / "quickstart.yaml"
PAGE = (ROOT / "docs" / "extending.md").read_text()
SMALL = ["--trainer.max_steps=2", "--trainer.callbacks=[]", "--trainer.num_sanity_val_steps=0", "--data.batch_size=4"]
SMALL += ["--trainer.limit_val_batches=0", "--trainer.val_check_interval=null", "--model.sampling.max_new_tokens=8"]
LONGEST = 15  # lines of a class or a function of the user's


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


SECTIONS = {text.split("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
NAMED = {title: text for title, text in SECTIONS.items() if blocks(text, "yaml")}


def lines(node: ast.AST, source: str) -> int:
    return sum(bool(line.strip()) for line in source.splitlines()[node.lineno - 1 : node.end_lineno])


@pytest.mark.parametrize("title", [title for title, text in SECTIONS.items() if blocks(text, "python")])
def test_extension_is_short(title):
    for source in blocks(SECTIONS[title], "python"):
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                assert lines(node, source) < LONGEST, node.name


def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: Path, *more: str) -> tuple[XPOCLI, list[dict]]:
    monkeypatch.chdir(tmp_path)
    root = "--trainer.default_root_dir=runs"
    cli = XPOCLI(["fit", "--config", str(QUICKSTART), "--config", str(overlay), *SMALL, root, *more])
    with (tmp_path / "runs" / "version_0" / "metrics.csv").open() as file:
        return cli, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("title", NAMED)
def test_extension_trains(title, tmp_path, monkeypatch):
    (source,), (overlay,) = blocks(NAMED[title], "python"), blocks(NAMED[title], "yaml")
    name = re.match(r"# (\w+)\.py\n", source)[1]
    (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "mine.yaml").write_text(overlay)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    called: list[str] = []
    (kind,) = [one for one in vars(__import__(name)).values() if getattr(one, "__module__", "") == name]
    for method in ("score", "compare", "__call__", "write"):
        if method in vars(kind):
            monkeypatch.setattr(kind, method, noting(called, vars(kind)[method]))
    cli, rows = fit(tmp_path, monkeypatch, tmp_path / "mine.yaml")
    assert cli.trainer.global_step == 2
    assert called
    assert all(torch.tensor(float(row["loss/total"])).isfinite() for row in rows)
    monkeypatch.delitem(sys.modules, name)


def noting(called: list[str], method):
    def noted(*args, **kwargs):
        called.append(method.__name__)
        return method(*args, **kwargs)

    return noted


def test_alternating_sampler_goes_on_where_it_was():
    space: dict = {}
    exec(blocks(SECTIONS["Own sampler"], "python")[0], space)  # noqa: S102
    one, other = space["Alternating"](), space["Alternating"]()
    one.after_batch(3, None)
    other.load_state(one.state())
    assert other.batches == 3


# ---- an engine of one's own ----


class Silent(RolloutEngine):
    def sync(self, policy):
        """Nothing to bring."""

    def write(self, prompts, asked):
        return []


@pytest.fixture
def engine():
    made, tokenizer = Silent(), make_tokenizer()
    made.begin(LocalRollout(tokenizer, Sampling(max_new_tokens=4), [tokenizer.eos_token_id]))
    return made


def test_completions_end_with_the_first_eos(engine):
    eos = engine.rollout.tokenizer.eos_token_id
    made = engine.completions(
        [[5, eos, 7], [5, 6, 7]], [[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]], prompts_of([[9], [9]])
    )
    assert made.ids.tolist()[0][:2] == [5, eos]
    assert made.mask.tolist() == [[True, True, False], [True, True, True]]
    assert made.ended.tolist() == [True, False]
    assert made.logps.tolist() == [-3.0, -3.0]
    assert made.texts[0] == engine.rollout.tokenizer.decode([5])


# ---- inside another module ----


def both():
    space: dict = {"__name__": "example"}
    exec(blocks(SECTIONS["Inside your LightningModule"], "python")[0], space)  # noqa: S102
    return space["Both"]()


def train(module: pl.LightningModule, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, enable_model_summary=False, **quiet)
    prompts = DataLoader(["One cold morning, Mara found a wet kitten behind the old mill."] * 4, batch_size=2)
    trainer.fit(module, prompts, **options)
    return trainer


def test_module_that_holds_xpo_trains_the_policy_alone(tmp_path):
    pl.seed_everything(0, verbose=False)
    module = both()
    trainer = train(module)
    assert trainer.global_step == 2
    policy, reference = module.xpo.policy, module.xpo.reference
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), reference.parameters(), strict=True))
    untrained = ModelSpec("package:xpo_lightning/embedded/policy").load_model()
    assert all(torch.equal(a, b) for a, b in zip(untrained.parameters(), reference.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"xpo.policy.{name}" for name in policy.state_dict()}
    again = both()
    again.xpo.configure_model()
    again.load_state_dict(saved, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(again.xpo.policy.parameters(), policy.parameters(), strict=True))


def test_option_of_xpos_own_steps_is_refused_in_another_module():
    module = both()
    module.xpo.buffer_options = BufferOptions()
    with pytest.raises(InputError, match=r"model\.buffer acts through XPOLightningModule's own steps"):
        train(module)


def test_losses_are_those_of_the_modules_own_step(tmp_path):
    """A step taken by hand on `losses` of `sample` is the module's own step: same samples, same weights after it."""

    class ByHand(pl.LightningModule):
        def __init__(self, xpo):
            super().__init__()
            self.xpo, self.setup, self.configure_model = xpo, xpo.setup, xpo.configure_model

        def training_step(self, batch, batch_idx):
            return self.xpo.losses(self.xpo.sample(batch))[0].mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.xpo.trained_parameters(), lr=1.0)

    def xpo():
        pl.seed_everything(3, verbose=False)
        reward = PythonReward(lambda prompts, completions, columns: [float(len(text)) for text in completions])
        return XPOLightningModule(
            ModelSpec("package:xpo_lightning/embedded/policy"), reward, sampling=Sampling(max_new_tokens=8), alpha=0.1,
            optimizer=lambda weights: torch.optim.SGD(weights, lr=1.0), max_grad_norm=None, lr_schedule="constant",
        )  # fmt: skip

    one, other = xpo(), ByHand(xpo())
    train(one)
    train(other)
    for a, b in zip(one.policy.parameters(), other.xpo.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- examples ----


@pytest.mark.slow
def test_example_inside_your_module_runs():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "inside_your_module.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    numbers = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert numbers["task"] < 0.3, "0.69 is a guess between two stories"
    assert "loss/xpo" in numbers


def test_example_reward_has_ten_lines_and_trains(tmp_path, monkeypatch):
    source = (EXAMPLES / "reward_in_ten_lines.py").read_text()
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 10
    monkeypatch.syspath_prepend(EXAMPLES)
    import reward_in_ten_lines

    # 3 words, 2 of them new: 2/3; 31 words of one kind: 1/31, less a point for the one too many
    scores = reward_in_ten_lines.fresh_and_short([""] * 3, ["a b A", "a " * 31, ""], {})
    assert scores == pytest.approx([2 / 3, 1 / 31 - 1, 0])
    cli, rows = fit(tmp_path, monkeypatch, EXAMPLES / "reward_in_ten_lines.yaml")
    assert cli.model.reward.function.function is reward_in_ten_lines.fresh_and_short
    assert all(float(row["objective/model_scores"]) <= 1 for row in rows)


def run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> dict[str, Any]:
    """Run the cells of the notebook in one namespace, with some lines changed, and return the namespace."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 4
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    space: dict[str, Any] = {"__name__": "notebook"}
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        source = "".join(cell["source"])
        for name, value in changes.items():
            source = re.sub(rf"\b{name}\b( ?= ?)[\d.]+", rf"{name}\g<1>{value}", source)
        exec(compile(source, "quickstart.ipynb", "exec"), space)  # noqa: S102
    return space


def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch, capsys):
    space = run_notebook(
        tmp_path, monkeypatch, STEPS="1", batch_size="4", max_validation_prompts="4", max_new_tokens="4"
    )
    assert space["trainer"].global_step == 1
    assert "win rate against the untrained policy: " in capsys.readouterr().out


@pytest.mark.slow
def test_notebook_learns(tmp_path, monkeypatch):
    space = run_notebook(tmp_path, monkeypatch)
    assert space["trainer"].global_step == 30
    assert space["win_rate"] - 2 * space["error"] > 0.5
