"""Each recipe of configs/methods, laid over the quickstart by name, takes a few small steps on its own objective."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import BARE

from xpo_lightning import Experience
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.recipes import recipes

METHODS = sorted(name.removeprefix("methods/") for name in recipes() if name.startswith("methods/"))
SMALL = ["--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"]
SMALL += ["--trainer.val_check_interval=null", "--data.batch_size=4", "--model.sampling.max_new_tokens=8"]
SMALL += ["--model.warmup_ratio=0", "--model.learning_rate=1e-3"]
WITHOUT_FILES = ["--trainer.enable_checkpointing=false", *(f"--defaults.{name}=false" for name in BARE)]
BETA = 0.3  # the quickstart's
Terms = dict[str, torch.Tensor]


class Seen(pl.Callback):
    """Keeps the pairs of each batch, the log-probabilities that the policy then gave them, and what was logged."""

    last: "Seen"

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        Seen.last, self.module = self, pl_module
        self.terms: list[Terms] = []
        self.logged: list[dict[str, float]] = []

    def on_pairs_collected(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
        with torch.no_grad():
            self.terms.append(terms_of(pl_module, experience))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def terms_of(module: Any, pairs: Experience) -> Terms:
    """Score the policy's, the sampler's and the third completion, each row alone, by transformers' own forward pass."""
    sides = dict(zip(("policy", "sampler", "third"), pairs.written, strict=False))
    references = [pairs.reference_logps.by_policy, pairs.reference_logps.by_sampler]
    references += [] if pairs.sample is None else [pairs.sample.reference_logps]
    terms: Terms = {"label": pairs.labels}
    for (name, side), reference in zip(sides.items(), references, strict=True):
        rows = []
        for row in range(len(side)):
            prompt, own = pairs.prompts.ids[row][pairs.prompts.mask[row]], side.ids[row][side.mask[row]]
            logits = module.policy(input_ids=torch.cat([prompt, own])[None]).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.float().log_softmax(1).gather(1, own[:, None]).sum())
        terms[name], terms[f"ref_{name}"] = torch.stack(rows), reference
    return terms


def ratio(terms: Terms, side: str) -> torch.Tensor:
    return terms[side] - terms[f"ref_{side}"]


# What alpha multiplies, from the log-probabilities.
BONUSES: dict[str, Callable[[Terms], torch.Tensor]] = {
    "selm": lambda terms: BETA * ratio(terms, "third"),
    "vpo": lambda terms: BETA * ratio(terms, "third"),
    "sepopo": lambda terms: (torch.sigmoid(BETA * ratio(terms, "policy")) - 0.5) / BETA,
    "geb": lambda terms: torch.where(terms["label"] == 1, terms["sampler"], terms["policy"]).exp(),
    "xpo_general": lambda terms: terms["third"],
    "xpo_large_batch": lambda terms: terms["third"],
    "xpo_historical": lambda terms: terms["sampler"],
}


def mean_of_losses(terms: Terms, of_preferred: Callable[..., torch.Tensor]) -> torch.Tensor:
    ours, theirs, label = ratio(terms, "policy"), ratio(terms, "sampler"), terms["label"]
    return label * of_preferred(ours, theirs) + (1 - label) * of_preferred(theirs, ours)


# The preference loss, from the log-probabilities at the first update of a batch.
LOSSES: dict[str, Callable[[Terms], torch.Tensor]] = {
    "online_ipo": lambda terms: mean_of_losses(terms, lambda a, b: (a - b - 0.5 / BETA) ** 2),
    "egpo": lambda terms: mean_of_losses(terms, lambda a, b: (a - b - 0.5 / BETA) ** 2),
    "pilaf": lambda terms: mean_of_losses(terms, lambda a, b: -torch.nn.functional.logsigmoid(BETA * (a - b))),
    "nash_md": lambda terms: -(terms["label"] - 0.5 - BETA * ratio(terms, "policy")) * ratio(terms, "policy"),
    "sppo": lambda terms: mean_of_losses(terms, lambda a, b: (a - 0.5 / BETA) ** 2 + (b + 0.5 / BETA) ** 2),
    "inpo": lambda terms: mean_of_losses(terms, lambda a, b: (0.25 * (a - b) - 0.25 * 0.5 / BETA) ** 2),
}


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """Give a function that runs a recipe by its name."""
    monkeypatch.chdir(tmp_path)

    def run(method: str, *more: str) -> Seen:
        callbacks = f"--trainer.callbacks+={{class_path: {__name__}.Seen}}"
        main(
            ["fit", "--config", "quickstart", "--config", f"methods/{method}", *SMALL, *WITHOUT_FILES, callbacks, *more]
        )
        return Seen.last

    return run


@pytest.mark.parametrize("method", METHODS)
def test_recipe_takes_its_steps(fit: Callable[..., Seen], method: str, tmp_path: Path):
    seen = fit(method, *(["--model.updates_per_rollout=1"] if method in ("inpo", "xpo_large_batch") else []))
    assert len(seen.logged) == 2
    assert method in {*BONUSES, *LOSSES, "copo", "depo", "dpo_offline", "hybrid"}, "a check of its own objective"
    assert all(torch.tensor(step["loss/total"]).isfinite() and step["grad_norm"] > 0 for step in seen.logged)
    assert (tmp_path / "runs" / method / "version_0" / "metrics.csv").is_file()
    if method in BONUSES:
        for terms, step in zip(seen.terms, seen.logged, strict=True):
            expected = step["alpha"] * BONUSES[method](terms).mean().item()
            assert step["loss/xpo"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    if method in LOSSES:
        for terms, step in zip(seen.terms, seen.logged, strict=True):
            assert step["loss/dpo"] == pytest.approx(LOSSES[method](terms).mean().item(), rel=1e-3, abs=1e-5)
            assert step["loss/xpo"] == 0


def test_copo_raises_what_it_has_not_seen(fit: Callable[..., Seen]):
    """Its term is positive, -alpha w log pi with a weight of its own, and the weight comes from its network."""
    seen = fit("copo")
    network = seen.module.objective.bonus.network
    assert network is not None
    assert all(step["loss/xpo"] > 0 for step in seen.logged)
    assert seen.module.memory.shared()["bonus"]["optimizer"]["state"], "the network has learned"


def test_depo_raises_pairs_by_their_width(fit: Callable[..., Seen]):
    """Before the first pair, all are equally wide: alpha 0.02 sqrt 2 / (1/2), times minus both log-probabilities."""
    seen = fit("depo")
    first, both = seen.logged[0], (seen.terms[0]["policy"] + seen.terms[0]["sampler"]).mean().item()
    assert first["loss/xpo"] == pytest.approx(1e-3 * 0.02 * math.sqrt(2) / 0.5 * -both, rel=1e-3)
    assert seen.module.objective.bonus.pairs == 8


def test_egpo_steps_twice_from_one_place(fit: Callable[..., Seen]):
    """After both batches the optimizer has taken one step, and the next iteration has no weights to go back to."""
    seen = fit("egpo")
    (extragradient,) = [one for one in seen.module.trainer.callbacks if type(one).__name__ == "Extragradient"]
    assert extragradient.before is None
    assert {int(state["step"]) for state in seen.module.trainer.optimizers[0].state.values()} == {1}


def test_the_large_batch_takes_its_updates_on_pairs_of_one_iterate(fit: Callable[..., Seen]):
    """Four pairs are written by one iterate, and four updates, each on one of them, make the next."""
    seen = fit("xpo_large_batch", "--trainer.max_steps=4")
    assert len(seen.terms) == 1
    assert seen.module.trainer.global_step == 4


def test_dpo_offline_samples_nothing(fit: Callable[..., Seen], tmp_path: Path):
    """The first step is that of equal models, log 2; nothing was sampled, so there is no bonus and no KL."""
    seen = fit("dpo_offline", "--model.reward=null", "--model.missing_eos_penalty=null", "--defaults.run_summary=true")
    first, second = seen.logged
    assert first["loss/total"] == first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert second["loss/dpo"] != first["loss/dpo"]
    assert seen.terms == []
    assert "objective/kl" not in first
    shown = json.loads((tmp_path / "runs" / "dpo_offline" / "version_0" / "start.json").read_text())
    assert shown["run"]["batch"] == "4 preference pairs of at most 8 tokens"


def test_dpo_offline_validates_on_held_out_pairs(fit: Callable[..., Seen], tmp_path: Path):
    no_reward = ["--model.reward=null", "--model.missing_eos_penalty=null", "--data.validation_source=null"]
    every = ["--trainer.val_check_interval=1", "--trainer.limit_val_batches=1.0", "--data.validation_size=8"]
    whole = ["--trainer.num_sanity_val_steps=null", "--trainer.callbacks=null", "--model.learning_rate=3e-4"]
    size = ["--data.batch_size=64", "--model.sampling.max_new_tokens=64", "--trainer.max_steps=4"]
    files = ["--trainer.enable_checkpointing=true", *(f"--defaults.{name}=true" for name in BARE)]
    fit("dpo_offline", *no_reward, *every, *whole, *size, *files)
    folder = tmp_path / "runs" / "dpo_offline" / "version_0"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    held_out = [float(row["eval/loss/dpo"]) for row in rows if row["eval/loss/dpo"]]
    assert held_out[0] == pytest.approx(math.log(2), abs=1e-5), "the untrained policy"
    assert held_out[-1] < held_out[0]
    assert any(row["eval/rewards/accuracies"] for row in rows)
    assert (folder / "report.html").is_file()
    assert list((folder / "checkpoints").glob("*.ckpt"))


def test_hybrid_has_the_bonus_on_sampled_pairs_alone(fit: Callable[..., Seen]):
    """Two offline pairs beside four sampled ones: both kinds at log 2 at first, and alpha log pi(y) of four of six."""
    seen = fit("hybrid", "--data.preferences_batch_size=2")
    first, terms = seen.logged[0], seen.terms[0]
    assert len(terms["sampler"]) == 4
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss/xpo"] == pytest.approx(1e-5 * terms["sampler"].sum().item() / 6, rel=1e-3)


def test_nash_md_compares_with_a_mixture(fit: Callable[..., Seen]):
    assert type(fit("nash_md").module.sampler).__name__ == "MixtureSampler"


@pytest.mark.parametrize(
    "method", ["selm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sepopo", "geb", "copo", "sppo"))]
)
def test_the_reference_is_renewed_as_the_authors_do(fit: Callable[..., Seen], method: str):
    seen = fit(method, "--model.reference_refresh.every=1")
    second = seen.terms[1]
    assert ratio(second, "policy").abs().max() < 1e-3, "the reference of the second batch is the policy"
