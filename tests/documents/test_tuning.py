"""The tuning page: its overlay parses, and what it says of recipes and runs is what those have."""

import math
import re
from pathlib import Path

import pytest
import yaml
from test_configs import CONFIGS, parse
from test_exploration_pages import at_the_end

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tuning.md").read_text()


def test_overlay_of_the_page_parses(tmp_path: Path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(block)
    config = parse("fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(tmp_path / "mine.yaml"))
    assert config.model.optimizer.init_args.eps == 1e-12


@pytest.mark.parametrize("name", ["quickstart", "smollm2", "reasoning", "tldr", "tldr_lora"])
def test_learning_rates_are_those_of_the_recipes(name: str):
    (said,) = re.findall(rf"^\| `{name}` \| [^|]+ \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert float(said) == float(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["learning_rate"])


def test_alphas_of_the_recipes_in_units_of_beta():
    ratios = set()
    for file in CONFIGS.glob("*.yaml"):
        model = yaml.safe_load(file.read_text())["model"]
        if isinstance(model.get("alpha"), float) and "beta" in model:
            ratios.add((model["alpha"], model["beta"]))
    assert ratios == {(1e-5, 0.1), (1e-5, 0.3)}
    assert "which is 0.0001 in units of a beta of 0.1 and 0.00003 of 0.3" in " ".join(PAGE.split())


def test_margins_at_which_the_bonus_wins():
    """The preference loss pulls with beta sigma(-m), the bonus pushes with alpha: equal at log(beta / alpha - 1)."""
    said = re.findall(r"([\d.]+) at ([\d.]+)[,.]", PAGE.partition("log(beta / alpha - 1):")[2].partition("\n\n")[0])
    assert [(float(margin), float(alpha)) for margin, alpha in said] == [
        (round(math.log(1 / alpha - 1), 1), alpha) for alpha in (0.05, 0.3)
    ]


def test_divergences_are_those_that_were_measured():
    (kl, wins) = (at_the_end("smollm2", name)["xpo"] for name in ("kl", "win_rate"))
    order = sorted(kl, key=kl.get)
    shown = [", ".join(f"{kl[seed]:.1f}" for seed in order), ", ".join(f"{wins[seed]:.3f}" for seed in order)]
    assert f"| {shown[0]} | {shown[1]} |" in PAGE
    readme = (ROOT / "README.md").read_text()
    (after,) = re.findall(r"`eval/objective/kl` from it.*\| ([\d.]+) ± [\d.]+ \|$", readme, re.MULTILINE)
    (win,) = re.findall(r"`eval/win_rate` against.*\| ([\d.]+) ± [\d.]+ \|$", readme, re.MULTILINE)
    assert f"| quickstart, 60 steps | {after} | {win} |" in PAGE
